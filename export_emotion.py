"""Exports a trained model to formats that other programs read: ONNX, TorchScript, torch.export, safetensors.

    python export_emotion.py --checkpoint best_emotion_model.pth
    python export_emotion.py --formats onnx --output-dir exported --data-dir DIR
    python export_emotion.py --formats onnx --int8 --data-dir DIR      # also in 8-bit integers, calibrated on DIR/train

The programs take uint8 images (N, C, H, W), any number N of them, and return probabilities: scaling, normalization,
temperature and softmax are inside. Each is compared with PyTorch before it is kept.
"""

import json
import os
import tempfile
from pathlib import Path

import torch

from checkpoints import get_info, replace_file
from console import ArgumentParser, make_output_dir, number, run_script
from data import FolderImages, find_splits
from errors import InputError, printable
from export.formats import (
    CONFIG_NAME,
    FORMATS,
    Deployed,
    export_model,
    is_exported,
    missing_packages,
    sample_images,
)
from export.quantize import CALIBRATION_IMAGES, INT8_NAME, measure, quantize
from inference import open_model
from models import ModelInfo

COMPARED = 256  # images


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--checkpoint", metavar="PATH", help="(default: best_emotion_model.pth here, else weights/emotion_model.pth)")
    add("--formats", metavar="NAMES", help=f"any of {','.join(FORMATS)} (default: all whose packages are installed)")
    add("--output-dir", default=".", metavar="DIR", help="for the files")
    add(
        "--data-dir",
        metavar="DIR",
        help="compare on images of its test/, val/ or train/, or of its own class folders (default: on seeded noise)",
    )
    add(
        "--int8",
        action="store_true",
        help=f"also write {INT8_NAME}, in 8-bit integers: smaller, and faster if the processor multiplies in them; "
        "needs --data-dir with train/ to calibrate on, and val/ or test/ to measure on",
    )
    add(
        "--max-drop",
        type=number(float, 0),
        default=1.0,
        metavar="POINTS",
        help="of accuracy that --int8 may cost",
    )
    add("--cache-dir", metavar="DIR", help="for decoded images (default: the user's cache folder)")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = get_args_parser().parse_args(argv)
    names, output_dir = pick_formats(args.formats, needs_onnx=args.int8), Path(args.output_dir)
    if args.int8 and "train" not in find_splits(args.data_dir or ""):
        raise InputError("--int8 needs --data-dir with train/ to calibrate on, and val/ or test/ to measure on")
    check_source(args.checkpoint, output_dir, names)
    model, checkpoint = open_model(args.checkpoint, "cpu")
    deployed = Deployed(model.to(memory_format=torch.contiguous_format).requires_grad_(False))
    make_output_dir(output_dir)
    check_config(output_dir, names)

    images, compared = deployed.example(COMPARED), f"{COMPARED} images of noise"
    if args.data_dir:
        data = load_images(args.data_dir, ("test", "val", "train"), model.info, args.cache_dir)
        own = sample_images(data, COMPARED)
        images = torch.cat([own, images[len(own) :]])
        rest = " and noise" if len(own) < COMPARED else ""
        compared = f"{COMPARED} images, {len(own)} of {printable(data.folder.resolve().name)}/{rest}"
    if args.int8:
        train = load_images(args.data_dir, ("train",), model.info, args.cache_dir)
        data = load_images(args.data_dir, ("val", "test"), model.info, args.cache_dir)

    with tempfile.TemporaryDirectory(prefix=".export_", dir=output_dir) as folder:
        for name in names:
            paths, gap = export_model(name, deployed, get_info(checkpoint), images, Path(folder))
            print(f"{describe(paths[0])}, largest difference in probability {gap:.1e} over {compared}")
            keep(paths, output_dir)
        if args.int8:
            original, path = output_dir / FORMATS["onnx"][0], Path(folder, INT8_NAME)
            quantize(original, path, sample_images(train, CALIBRATION_IMAGES))
            compare_accuracy(original, path, data, args.max_drop)
            keep([path], output_dir)
    print(f"In {printable(output_dir.resolve())}")


def pick_formats(text: str | None, *, needs_onnx: bool) -> list[str]:
    """The names in --formats, or all that can be written here; InputError for one that can't."""
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


def check_source(checkpoint: str | None, output_dir: Path, names: list[str]) -> None:
    """InputError if the checkpoint is an exported program, or one of the files to be written has its name."""
    if not checkpoint or not os.path.isfile(checkpoint):
        return  # open_model reports what is wrong
    if is_exported(checkpoint) and Path(checkpoint).suffix != ".safetensors":
        raise InputError(f"--checkpoint {checkpoint} is an exported file; export from the checkpoint")
    for name in names:
        path = output_dir / FORMATS[name][0]
        if path.exists() and path.samefile(checkpoint):
            raise InputError(f"--checkpoint {checkpoint} would be overwritten; choose another --output-dir")


def check_config(output_dir: Path, names: list[str]) -> None:
    """InputError if another program's config.json would be overwritten."""
    path = output_dir / CONFIG_NAME
    if "safetensors" not in names or not path.exists():
        return
    try:
        is_ours = "format_version" in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        is_ours = False
    if not is_ours:
        raise InputError(f"{path} is of another program; choose another --output-dir, or --formats without safetensors")


def load_images(data_dir: str, splits: tuple[str, ...], info: ModelInfo, cache_dir: str | None) -> FolderImages:
    """The first of `splits` that exists in `data_dir`, or the class folders that it holds itself."""
    folders = find_splits(data_dir)
    found = [folders[split] for split in splits if split in folders]
    if folders and not found:
        raise InputError(f"--data-dir {data_dir} has no {' or '.join(splits)}/")
    folder = found[0] if found else data_dir
    return FolderImages(folder, info.input_spec, class_names=info.class_names, cache_dir=cache_dir)


def describe(path: Path) -> str:
    return f"{path.name}: {path.stat().st_size / 1e6:.1f} MB"


def compare_accuracy(original: Path, quantized: Path, data: FolderImages, max_drop: float) -> None:
    """Prints accuracy and speed of both; InputError if the quantized file costs more than `max_drop` points."""
    measured = {path: measure(path, data) for path in (original, quantized)}
    for path, (accuracy, milliseconds) in measured.items():
        where = f"{len(data):,} images of {printable(data.folder.resolve().name)}/"
        print(f"{describe(path)}, accuracy {100 * accuracy:.2f}% on {where}, {milliseconds:.2f} ms per image")
    drop = 100 * (measured[original][0] - measured[quantized][0])
    if drop > max_drop:
        earlier = original.with_name(INT8_NAME)
        note = f", and {earlier} is an earlier one" if earlier.exists() else ""
        raise InputError(
            f"{INT8_NAME} loses {drop:.2f} points of accuracy, more than --max-drop {max_drop:g}; it was not kept{note}"
        )


def keep(paths: list[Path], output_dir: Path) -> None:
    """Moves the files to `output_dir`, over earlier ones."""
    for path in paths:
        replace_file(output_dir / path.name, lambda temporary, path=path: os.replace(path, temporary))


if __name__ == "__main__":
    run_script(main)
