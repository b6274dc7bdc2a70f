"""Measures a checkpoint on a folder of pictures sorted by emotion.

    python evaluate_emotion.py                                                    # best_emotion_model.pth on test/
    python evaluate_emotion.py --checkpoint best_emotion_model.pth --data-dir DIR --split val --tta

Prints the report; with --output-dir also writes classification_report.txt, metrics.json, confusion_matrix.png and
reliability.png.
Classes are matched by name. A DIR that itself holds class folders is used as it is.
"""

import argparse
import os
from pathlib import Path

import numpy as np

import reports
from checkpoints import replace_file
from console import ArgumentParser, make_output_dir, run_script
from data import FolderImages
from device import PRECISIONS, pick_precision
from engine.loop import evaluate, to_log_probs
from errors import InputError, printable
from inference import open_model
from models import device_of
from preprocessing import to_input
from splits import Batches, find_copies, split_train_val, warn_of_copies


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--checkpoint",
        metavar="PATH",
        help="a checkpoint or an exported file (default: best_emotion_model.pth here, else weights/emotion_model.pth)",
    )
    parser.add_argument("--data-dir", metavar="DIR", default=".", help="holds the split, or class folders (default: .)")
    parser.add_argument(
        "--split",
        choices=("test", "val", "train"),
        default="test",
        help="without val/, val is the share of train/ that the checkpoint was validated on (default: test)",
    )
    parser.add_argument("--tta", action="store_true", help="average over each picture and its mirror image")
    parser.add_argument("--output-dir", metavar="DIR", help="write report, metrics and confusion matrix there")
    parser.add_argument("--batch-size", type=int, default=256, help="(default: 256)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="(default: fp32)")
    parser.add_argument("--cache-dir", metavar="DIR", help="keeps decoded pictures (default: the user's cache folder)")
    parser.add_argument("--trust", action="store_true", help="load .pt and .pt2 files, which can carry code that runs")
    parser.add_argument("--strict", action="store_true", help="stop at a picture that can't be read")
    return parser


def load_split(
    args: argparse.Namespace, model, config: dict
) -> tuple[FolderImages, np.ndarray, str, np.ndarray | None]:
    """The pictures, the rows of them that are the split, what it is called, and which of them stand in train/ too."""
    root = Path(args.data_dir)
    options = {"class_names": model.info.class_names, "cache_dir": args.cache_dir, "strict": args.strict}
    shares_train = args.split != "test" and os.path.isdir(root / "train") and not os.path.isdir(root / "val")
    if shares_train:
        data = FolderImages(root / "train", model.info.input_spec, **options)
        train_rows, val_rows = split_train_val(
            data.labels, data.digests, config.get("val_fraction", 0.1), config.get("seed", 0)
        )
        rows = val_rows if args.split == "val" else train_rows
        if len(rows) == 0:
            raise InputError(f"{len(data)} pictures in {root / 'train'} are too few for a validation share")
        return data, rows, args.split, None
    copies = None
    if os.path.isdir(root / args.split):
        data, name = FolderImages(root / args.split, model.info.input_spec, **options), args.split
        if args.split != "train" and os.path.isdir(root / "train"):
            try:
                copies = find_copies(
                    FolderImages(root / "train", model.info.input_spec, cache_dir=args.cache_dir), data
                )
                data.notes += warn_of_copies(data, copies, "train")
            except InputError as error:  # of train/, which is not what is measured
                data.notes.append(f"copies of training pictures were not looked for: {error}")
    elif any(os.path.isdir(root / other) for other in ("train", "val", "test")):
        there = " or ".join(other for other in ("test", "val", "train") if os.path.isdir(root / other))
        raise InputError(f"no folder {root / args.split}; pass --split {there}")
    else:
        data, name = FolderImages(root, model.info.input_spec, **options), printable(root.resolve().name)
    return data, np.arange(len(data)), name, copies


def new_output_dir(name: str) -> Path:
    """The folder, made where it is missing; InputError where it holds a report, such as training's or a card's."""
    output_dir = make_output_dir(name)
    for file in reports.result_files({}):
        if os.path.exists(output_dir / file):
            raise InputError(f"--output-dir {name} holds a report already ({file}); choose another folder")
    return output_dir


def main(argv: list[str] | None = None) -> None:
    args = get_args_parser().parse_args(argv)
    if args.batch_size < 1:
        raise InputError(f"--batch-size must be at least 1, not {args.batch_size}")
    model, info = open_model(args.checkpoint, args.device, trust=args.trust)
    device = device_of(model)
    precision = pick_precision(args.precision, device)
    output_dir = args.output_dir and new_output_dir(args.output_dir)
    data, rows, split, copies = load_split(args, model, info["config"])
    for note in data.notes:
        print(note)
    logits, labels = evaluate(
        model,
        Batches(data, rows, device).iterate(args.batch_size),
        lambda images: to_input(images, model.info.input_spec),
        tta=args.tta,
        precision=precision,
    )
    metrics = reports.compute_metrics(
        labels.numpy(),
        to_log_probs(logits, model.info.temperature).numpy(),
        model.info.class_names,
        split=split,
        temperature=model.info.temperature,
        uncalibrated=to_log_probs(logits).numpy(),
        copies=copies,
    )
    metrics |= {"arch": model.info.arch, "epoch": info["epoch"], "tta": args.tta}
    views = ", mirrored views averaged" if args.tta else ""
    print(f"{model.info.arch}, trained on {printable(model.info.trained_on)}{views}\n{reports.format_report(metrics)}")
    warning = reports.one_class_warning(metrics)
    if warning:
        print(warning)
    if output_dir:
        files = reports.result_files(metrics)
        for name, write in files.items():
            replace_file(output_dir / name, write)
        print(f"In {printable(output_dir.resolve())}: {', '.join(files)}")


if __name__ == "__main__":
    run_script(main)
