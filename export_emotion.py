"""Writes a trained network in formats that other programs read: ONNX, TorchScript, torch.export, safetensors.

    python export_emotion.py --checkpoint best_emotion_model.pth
    python export_emotion.py --formats onnx --output-dir exported --data-dir DIR
    python export_emotion.py --formats onnx --int8 --data-dir DIR       # also in whole numbers, calibrated on DIR/train

The programs take uint8 pictures (N, C, H, W) of any number N and give probabilities: scaling, normalisation,
temperature and softmax are inside. Each is compared with PyTorch before it is kept.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from checkpoints import get_info, replace_file
from console import ArgumentParser, make_output_dir, run_script
from data import FolderImages
from errors import InputError, printable
from export.formats import (
    CONFIG_NAME,
    FORMATS,
    INFO_NAME,
    Deployed,
    is_exported,
    missing_packages,
    read_exported,
    to_stored,
)
from inference import open_model, predict_probs
from models import InputSpec

TOLERANCE = 1e-4  # largest difference in probability from PyTorch's, in float32
COMPARED = 256  # pictures
CALIBRATION = 512
INT8_NAME = "emotion_model.int8.onnx"
QUANTIZED = ["Conv", "Gemm", "MatMul", "Add", "Mul", "Sigmoid", "MaxPool", "AveragePool", "GlobalAveragePool"]


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--checkpoint", metavar="PATH", help="(default: best_emotion_model.pth here, else weights/emotion_model.pth)"
    )
    parser.add_argument(
        "--formats", metavar="NAMES", help=f"of {','.join(FORMATS)} (default: all whose packages are installed)"
    )
    parser.add_argument("--output-dir", metavar="DIR", default=".", help="where they are written (default: .)")
    parser.add_argument(
        "--data-dir",
        metavar="DIR",
        help="compare on pictures of its test/, val/ or train/, or of its own class folders (default: on seeded noise)",
    )
    parser.add_argument(
        "--int8",
        action="store_true",
        help=f"also write {INT8_NAME}, in whole numbers of 8 bits: "
        "smaller, and faster where the processor multiplies in them; needs --data-dir",
    )
    parser.add_argument(
        "--max-drop", type=float, default=1.0, metavar="POINTS", help="of accuracy that --int8 may cost (default: 1.0)"
    )
    parser.add_argument("--cache-dir", metavar="DIR", help="keeps decoded pictures (default: the user's cache folder)")
    return parser


def pick_formats(text: str | None, needs_onnx: bool) -> list[str]:
    """Names from --formats, or all that can be written here; InputError for one that can't."""
    names = list(dict.fromkeys(text.split(","))) if text else list(FORMATS)
    for name in names:
        if name not in FORMATS:
            raise InputError(f"--formats: {name!r} is none of {', '.join(FORMATS)}")
    if needs_onnx and "onnx" not in names:
        raise InputError("--int8 is made from the ONNX file: add onnx to --formats")
    chosen = []
    for name in names:
        missing = missing_packages(name)
        if missing and (text or (needs_onnx and name == "onnx")):
            raise InputError(f"--formats {name} needs packages that aren't there: pip install {' '.join(missing)}")
        if missing:
            print(f"{name} is left out: pip install {' '.join(missing)}")
        else:
            chosen.append(name)
    return chosen


def load_pictures(data_dir: str | None, splits: tuple[str, ...], model, cache_dir: str | None) -> FolderImages | None:
    """The first of `splits` that stands in `data_dir`, or the class folders that it holds itself."""
    if data_dir is None:
        return None
    found = [Path(data_dir, name) for name in splits if os.path.isdir(Path(data_dir, name))]
    if not found and any(os.path.isdir(Path(data_dir, name)) for name in ("train", "val", "test")):
        raise InputError(f"--data-dir {data_dir} has no {' or '.join(splits)}/")
    folder = found[0] if found else Path(data_dir)
    return FolderImages(folder, model.info.input_spec, class_names=model.info.class_names, cache_dir=cache_dir)


def draw_pictures(data: FolderImages, count: int, spec: InputSpec) -> torch.Tensor:
    """`count` pictures uint8 (N, C, H, W) of `data`, or all where there are fewer."""
    rows = np.random.default_rng(0).permutation(len(data))[:count]
    return to_stored(torch.from_numpy(np.array(data.images[np.sort(rows)])), spec)


@torch.inference_mode()
def largest_difference(deployed: Deployed, other, images: torch.Tensor) -> float:
    """In probability, between the network and what was made of it; in batches of 64, and the first picture alone."""
    batches = [images[:1], *images.split(64)]
    gaps = [(deployed(batch) - other(batch)).abs().max() for batch in batches]
    return torch.stack(gaps).max().item()


def describe_size(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.1f} MB"


def not_written(file: str, error: Exception) -> InputError:
    reason = printable(" ".join(str(error).split())[:200]) or type(error).__name__
    return InputError(f"{file} can't be written: {reason}")


def export(name: str, deployed: Deployed, info: dict, images: torch.Tensor, what: str, folder: Path) -> list[Path]:
    """Writes one format into `folder`, compares it on `images`, which are `what`, and says so; returns its files.

    Raises InputError where it can't be written, and where it answers differently.
    """
    file, _, write = FORMATS[name]
    path = folder / file
    try:
        write(deployed, info, path)
    except Exception as error:  # exporters raise anything
        raise not_written(file, error) from None
    exported, _ = read_exported(path, trust=True)
    gap = largest_difference(deployed, Deployed(exported) if name == "safetensors" else exported.probs, images)
    if not gap <= TOLERANCE:
        raise InputError(f"{file} answers differently from PyTorch, by {gap:.1g} in probability; it was not kept")
    print(f"{file}: {describe_size(path)}, largest difference in probability {gap:.1e} over {what}")
    return [path, path.with_name(CONFIG_NAME)] if name == "safetensors" else [path]


# Whole numbers


def quantize(source: Path, target: Path, pictures: torch.Tensor) -> None:
    """Static quantisation by onnxruntime: weights per channel and activations in 8 bits, ranges from `pictures`."""
    import logging

    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        def __init__(self):
            self.batches = iter(pictures.split(64))

        def get_next(self):
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch.numpy()}

    logging.disable(logging.WARNING)
    try:
        prepared = target.with_suffix(".prepared")
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        quantization.quantize_static(
            str(prepared),
            str(target),
            Reader(),
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,  # with signed ones x86 takes over twice as long as in float
            weight_type=quantization.QuantType.QInt8,
            op_types_to_quantize=QUANTIZED,
        )
    finally:
        logging.disable(logging.NOTSET)
    text = {prop.key: prop.value for prop in onnx.load(str(source)).metadata_props}[INFO_NAME]
    program = onnx.load(str(target))
    onnx.helper.set_model_props(program, {INFO_NAME: text})
    onnx.save(program, str(target))


def measure(model, data: FolderImages) -> tuple[float, float]:
    """Accuracy on `data` as a fraction, and milliseconds a picture one at a time."""
    images, labels = torch.from_numpy(np.array(data.images)), torch.from_numpy(np.array(data.labels))
    right = [
        (predict_probs(model, part).argmax(1) == own).sum()
        for part, own in zip(images.split(256), labels.split(256), strict=True)
    ]
    times = []
    for index in range(60):
        start = time.perf_counter()
        predict_probs(model, images[index % len(images)][None])
        times.append(time.perf_counter() - start)
    return torch.stack(right).sum().item() / len(labels), 1000 * statistics.median(times[10:])


def load_for_int8(model, args: argparse.Namespace) -> tuple[torch.Tensor, FolderImages]:
    """Pictures uint8 (N, C, H, W) of train/ to calibrate on, and val/ or test/ to measure on."""
    if not os.path.isdir(Path(args.data_dir, "train")):
        raise InputError(f"--int8: no folder {Path(args.data_dir, 'train')} to calibrate on")
    calibration = load_pictures(args.data_dir, ("train",), model, args.cache_dir)
    data = load_pictures(args.data_dir, ("val", "test"), model, args.cache_dir)
    return draw_pictures(calibration, CALIBRATION, model.info.input_spec), data


def export_int8(source: Path, calibration: torch.Tensor, data: FolderImages, max_drop: float, folder: Path) -> Path:
    """The ONNX file in whole numbers, in `folder`; InputError where it costs more accuracy than `max_drop` points."""
    path = folder / INT8_NAME
    try:
        quantize(source, path, calibration)
    except Exception as error:  # like exporters
        raise not_written(INT8_NAME, error) from None
    measured = [measure(read_exported(file)[0], data) for file in (source, path)]
    for file, (accuracy, ms) in zip((source, path), measured, strict=True):
        where = printable(data.folder.name)
        print(
            f"{file.name}: {describe_size(file)}, accuracy {100 * accuracy:.2f}% on {len(data):,} pictures of "
            f"{where}/, {ms:.2f} ms a picture"
        )
    drop = 100 * (measured[0][0] - measured[1][0])
    if drop > max_drop:
        earlier = source.with_name(INT8_NAME)
        note = f", and {earlier} is an earlier one" if earlier.exists() else ""
        raise InputError(
            f"{INT8_NAME} loses {drop:.2f} points of accuracy, more than --max-drop {max_drop:g}; it was not kept{note}"
        )
    return path


def check_config(output_dir: Path, names: list[str]) -> None:
    """InputError where another program's config.json would be written over."""
    path = output_dir / CONFIG_NAME
    if "safetensors" in names and path.exists():
        try:
            is_ours = "format_version" in json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError):
            is_ours = False
        if not is_ours:
            raise InputError(
                f"{path} is of another program; choose another --output-dir, or --formats without safetensors"
            )


def check_source(checkpoint: str | None, output_dir: Path, names: list[str]) -> None:
    """InputError where the checkpoint is an exported program, or one of the files to be written has its name."""
    if not checkpoint or not os.path.isfile(checkpoint):
        return  # open_model says what is wrong
    if is_exported(checkpoint) and Path(checkpoint).suffix != ".safetensors":
        raise InputError(f"--checkpoint {checkpoint} is an exported file; export from the checkpoint")
    for name in names:
        path = output_dir / FORMATS[name][0]
        if path.exists() and path.samefile(checkpoint):
            raise InputError(f"--checkpoint {checkpoint} would be written over; choose another --output-dir")


def keep(paths: list[Path], output_dir: Path) -> None:
    """Moves the files to `output_dir`, over earlier ones."""
    for path in paths:
        replace_file(output_dir / path.name, lambda temporary, path=path: os.replace(path, temporary))


def main(argv: list[str] | None = None) -> None:
    args = get_args_parser().parse_args(argv)
    if args.int8 and not args.data_dir:
        raise InputError("--int8 needs --data-dir: train/ there to calibrate on, val/ or test/ to measure on")
    if not args.max_drop >= 0:
        raise InputError(f"--max-drop must be at least 0, not {args.max_drop}")
    names = pick_formats(args.formats, args.int8)
    check_source(args.checkpoint, Path(args.output_dir), names)
    model, checkpoint = open_model(args.checkpoint, "cpu")
    deployed = Deployed(model.to(memory_format=torch.contiguous_format).requires_grad_(False))
    info, output_dir = get_info(checkpoint), make_output_dir(args.output_dir)
    check_config(output_dir, names)
    images, what = deployed.example(COMPARED), f"{COMPARED} pictures of noise"
    data = load_pictures(args.data_dir, ("test", "val", "train"), model, args.cache_dir)
    if data:
        own = draw_pictures(data, COMPARED, model.info.input_spec)
        images = torch.cat([own, images[len(own) :]])
        rest = " and noise" if len(own) < COMPARED else ""
        what = f"{COMPARED} pictures, {len(own)} of {printable(data.folder.name)}/{rest}"
    for_int8 = load_for_int8(model, args) if args.int8 else None
    with tempfile.TemporaryDirectory(prefix=".export_", dir=output_dir) as folder:
        for name in names:
            keep(export(name, deployed, info, images, what, Path(folder)), output_dir)
        if for_int8:
            source = output_dir / FORMATS["onnx"][0]
            keep([export_int8(source, *for_int8, args.max_drop, Path(folder))], output_dir)
    print(f"In {printable(output_dir.resolve())}")


if __name__ == "__main__":
    run_script(main)
