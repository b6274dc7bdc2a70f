"""Measures a checkpoint on a folder of images sorted by emotion.

    python evaluate_emotion.py                                                    # best_emotion_model.pth on test/
    python evaluate_emotion.py --checkpoint best_emotion_model.pth --data-dir DIR --split val --tta

Prints the report; with --output-dir also writes classification_report.txt, metrics.json, confusion_matrix.png and
reliability.png.
Classes are matched by name. A DIR that itself holds class folders is used as it is.
"""

import os
from pathlib import Path

import reports
from console import ArgumentParser, make_output_dir, number, run_script
from data import SAMPLE_SET, is_sample_set
from device import PRECISIONS, pick_precision
from engine.evaluation import measure
from errors import InputError, printable
from inference import open_model
from models import device_of
from splits import Batches, load_split


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add(
        "--checkpoint",
        metavar="PATH",
        help="a checkpoint or an exported file (default: best_emotion_model.pth here, else weights/emotion_model.pth)",
    )
    add("--data-dir", metavar="DIR", default=".", help="holds the split, or class folders")
    add(
        "--split",
        choices=("test", "val", "train"),
        default="test",
        help="without val/, val is the share of train/ that the checkpoint was validated on",
    )
    add("--tta", action="store_true", help="average over each image and its mirror image")
    add("--output-dir", metavar="DIR", help="write report, metrics and plots there")
    add("--batch-size", type=number(int, 1), default=256, help="images per forward pass")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--precision", choices=PRECISIONS, default="fp32", help="of the forward pass")
    add("--cache-dir", metavar="DIR", help="for decoded images (default: the user's cache folder)")
    add("--trust", action="store_true", help="load .pt, .pt2 and .onnx files, which can run code or fill the memory")
    add("--strict", action="store_true", help="stop at an image that can't be read, instead of leaving it out")
    return parser


def new_output_dir(name: str) -> Path:
    """The folder, created if needed; InputError if it holds a report, such as training's."""
    output_dir = make_output_dir(name)
    for file in reports.METRICS_FILES:
        if os.path.exists(output_dir / file):
            raise InputError(f"--output-dir {name} holds a report already ({file}); choose another folder")
    return output_dir


def main(argv: list[str] | None = None) -> None:
    args = get_args_parser().parse_args(argv)
    model, checkpoint = open_model(args.checkpoint, args.device, trust=args.trust)
    device, config = device_of(model), checkpoint["config"]
    precision = pick_precision(args.precision, device)
    output_dir = args.output_dir and new_output_dir(args.output_dir)
    data, rows, split, in_train = load_split(
        args.data_dir,
        args.split,
        model.info,
        val_fraction=config.get("val_fraction", 0.1),
        seed=config.get("seed", 0),
        cache_dir=args.cache_dir,
        strict=args.strict,
    )
    for note in data.notes:
        print(note)
    if is_sample_set(data.paths) and model.info.trained_on != SAMPLE_SET:
        print(f"note: these images are {SAMPLE_SET}, and the model was trained on {printable(model.info.trained_on)}")
    batches = Batches(data, rows, device)
    metrics = measure(
        model, batches, split=split, batch_size=args.batch_size, tta=args.tta, precision=precision, in_train=in_train
    )
    metrics |= {"epoch": checkpoint["epoch"], "tta": args.tta}
    files = reports.write_report(metrics, output_dir) if output_dir else []  # before `| head` can end the run
    views = ", mirrored views averaged" if args.tta else ""
    print(f"{model.info.arch}, trained on {printable(model.info.trained_on)}{views}\n{reports.format_report(metrics)}")
    if output_dir:
        print(f"In {printable(output_dir.resolve())}: {', '.join(files)}")


if __name__ == "__main__":
    run_script(main)
