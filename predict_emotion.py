"""Names the emotion in pictures of faces, from the command line and from Python.

python predict_emotion.py photo.jpg --show-all          # emotion, confidence, every probability as a bar
python predict_emotion.py DIR "more/*.png" --output predictions.csv
python predict_emotion.py --info                        # what the checkpoint is
python predict_emotion.py                               # a sample of test/, drawn to prediction_samples.png

from predict_emotion import load_model, predict_image
model, class_names = load_model("best_emotion_model.pth")
predicted_class, confidence, all_probs = predict_image(model, "photo.jpg", class_names)
"""

import argparse
import contextlib
import glob
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

import numpy as np
from torch import nn

from checkpoints import BEST_NAME, replace_file
from console import ArgumentParser, check_writable, make_output_dir, run_script
from data import find_classes, walk_pictures
from errors import InputError, printable
from faces.detector import LONGEST, SMALLEST, opencv_problem
from faces.overlay import Annotator, Targets
from faces.video import Video, classify_video, is_video
from inference import (
    BUNDLED,
    CROP_SIZE,
    Prediction,
    View,
    classify,
    classify_on_cores,
    load_model,
    make_finder,
    open_model,
    predict_faces,
    predict_image,
    predict_images,
    to_prediction,
)
from models import count_parameters
from preprocessing import read_image

__all__ = ["BUNDLED", "CROP_SIZE", "load_model", "predict_faces", "predict_image", "predict_images"]  # the public API
COLUMNS = ["file", "time", "face", "left", "top", "width", "height", "score", "emotion", "confidence"]
SAMPLES = 20  # pictures in prediction_samples.png
_FORMULA_STARTS = tuple("=+-@\t\r\n＝＋－＠")  # the last four are full-width, which some spreadsheets take alike


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "inputs",
        nargs="*",
        metavar="PICTURE",
        help="pictures, folders, patterns, videos; without any, a sample of test/ is drawn to prediction_samples.png",
    )
    parser.add_argument(
        "--checkpoint",
        metavar="PATH",
        help=f"a checkpoint or an exported file (default: {BEST_NAME} here, else weights/emotion_model.pth)",
    )
    parser.add_argument("--show-all", action="store_true", help="every probability, as a bar")
    parser.add_argument("--output", metavar="FILE", help="also write the predictions to FILE, .csv or .json")
    parser.add_argument(
        "--faces",
        choices=("auto", "on", "off"),
        default="auto",
        help="on: every face that OpenCV "
        "finds; off: the whole picture as one; auto: faces, but pictures of at most "
        f"{CROP_SIZE} pixels whole (default: auto)",
    )
    parser.add_argument(
        "--min-face",
        type=int,
        metavar="PIXELS",
        help=f"the smallest face to look for (default: {SMALLEST}, in a picture of at most {LONGEST})",
    )
    parser.add_argument(
        "--yunet", metavar="FILE", help="YuNet's .onnx file, to find faces with in the place of OpenCV's cascade"
    )
    parser.add_argument(
        "--annotate",
        metavar="DIR",
        help="write the pictures and videos there, with boxes, labels and bars, and of each video a timeline",
    )
    parser.add_argument("--every", type=int, default=1, metavar="N", help="of a video every Nth frame (default: 1)")
    parser.add_argument("--info", action="store_true", help="print what the checkpoint is, and stop")
    parser.add_argument(
        "--data-dir", metavar="DIR", default=".", help="its test/ is sampled where no picture is named (default: .)"
    )
    parser.add_argument("--output-dir", metavar="DIR", default=".", help="for prediction_samples.png (default: .)")
    parser.add_argument("--batch-size", type=int, default=64, help="(default: 64)")
    parser.add_argument("--trust", action="store_true", help="load .pt and .pt2 files, which can carry code that runs")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    return parser


def find_pictures(inputs: list[str]) -> list[str]:
    """Paths of pictures, folders (searched through) and patterns; InputError for one that leads to nothing."""
    found = []
    for item in inputs:
        if os.path.isdir(item):
            pictures = [entry.path for entry in walk_pictures(item)]
        elif os.path.lexists(item):
            pictures = [item]
        else:
            pictures = sorted(path for path in glob.glob(item, recursive=True) if not os.path.isdir(path))
        if not pictures:
            kind = "no pictures in the folder" if os.path.isdir(item) else "no file or pattern match"
            raise InputError(f"{kind}: {item}")
        found += pictures
    return list(dict.fromkeys(found))  # folders and patterns may overlap


def format_bars(all_probs: dict[str, float]) -> list[str]:
    """A line for each class: name, percent, a bar of one block for every two percent begun."""
    width = max(10, *(len(name) + 1 for name in all_probs))
    rows = [f"{name:{width}}: {p:5.2f}% {'█' * int(np.ceil(round(p, 2) / 2))}" for name, p in all_probs.items()]
    return [row.rstrip() for row in rows]


def describe_view(view: View) -> str:
    """Which part of the picture was classified, or that none was; empty where it was small anyway."""
    if view.kind == "face":
        left, top, width, height = view.face.box
        return f"face {view.number} at {left}, {top}, {width} x {height} pixels"
    return {"whole": "whole picture", "crop": "", "none": "no face found"}[view.kind]


def describe_source(view: View) -> str:
    return printable(view.source) if view.time is None else f"{printable(view.source)} at {view.time:.2f} s"


def print_prediction(view: View, prediction: Prediction | None, *, is_single: bool, show_all: bool) -> None:
    """The only picture as a block; one of many as a line with its name, and bars below it."""
    part = describe_view(view)
    if prediction is None:
        print(part.capitalize() if is_single else f"{describe_source(view)}: {part}")
        return
    emotion, confidence, all_probs = prediction
    if is_single:
        rule = "=" * 50
        where = f"{part.capitalize()}\n" if view.kind == "face" else ""
        print(f"{rule}\n{where}Predicted Emotion: {emotion.upper()}\nConfidence: {confidence:.2f}%\n{rule}")
        if show_all:
            print("\nAll emotion probabilities:", *format_bars(all_probs), sep="\n")
        return
    where = f", {part}" if part else ""
    print(f"{describe_source(view)}{where}: {emotion} {confidence:.2f}%")
    if show_all:
        print(*("  " + line for line in format_bars(all_probs)), sep="\n")


def print_info(info: dict, model: nn.Module) -> None:
    """What a checkpoint is: arch, classes, input, what it was trained on, metrics, settings."""
    spec, metrics, config = model.info.input_spec, info["metrics"], info["config"]
    colour = "gray" if spec.stored_channels == 1 else "RGB"
    parameters = f"{count_parameters(model):,} parameters" if count_parameters(model) else "exported"
    print(f"arch: {model.info.arch}, {parameters}")
    print(f"classes: {', '.join(model.info.class_names)}")
    print(f"input: {spec.image_size} x {spec.image_size} {colour}, mean {spec.mean}, std {spec.std}")
    epochs = f"epoch {info['epoch']} of {printable(config.get('epochs', '?'))}"
    print(f"trained on: {printable(model.info.trained_on)}, {epochs}, temperature {model.info.temperature:g}")
    shown = (f"{value:.4f}" if isinstance(value, float) else f"{value:,}" for value in metrics.values())
    print("metrics: " + ", ".join(map(" ".join, zip(metrics, shown, strict=True))))
    print("settings: " + ", ".join(f"{key} {printable(value)}" for key, value in config.items() if value is not None))


class _Interrupted(Exception):
    """Carries an error of the prediction past replace_file, which would take it for one of writing."""


def to_cell(value):
    """As a table's cell: empty for None, and text that a spreadsheet would take for a formula behind an apostrophe."""
    if isinstance(value, str) and value.startswith(_FORMULA_STARTS):
        return "'" + value
    return "" if value is None else value


def write_rows(rows: Iterable[dict], columns: list[str], path: Path) -> None:
    """The predictions as CSV (empty where a column doesn't apply) or JSON (null), by the ending of `path`.

    Each is written as it comes, so that memory doesn't grow with a long video; `path` changes when all are there.
    Raises InputError where it can't be written, and whatever `rows` raises.
    """

    def guarded() -> Iterator[dict]:
        try:
            yield from rows
        except (OSError, RuntimeError) as error:
            raise _Interrupted from error

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            if path.suffix.lower() == ".json":
                import json

                file.write("[")
                for number, row in enumerate(guarded()):
                    content = json.dumps({column: row.get(column) for column in columns})
                    file.write(("," if number else "") + "\n" + content)
                file.write("\n]\n")
            else:
                import csv

                writer = csv.writer(file)
                writer.writerow(map(to_cell, columns))
                writer.writerows([to_cell(row.get(column)) for column in columns] for row in guarded())

    try:
        replace_file(path, write)
    except _Interrupted as interrupted:
        raise interrupted.__cause__ from None


def to_row(view: View, prediction: Prediction | None, class_columns: dict[str, str]) -> dict:
    """A row of --output: `face` is a face's number, "whole" for a whole picture, "none" where there is no face."""
    row = {"file": view.source, "time": view.time, "face": {"crop": "whole"}.get(view.kind, view.kind)}
    if view.face:
        row |= dict(zip(("left", "top", "width", "height"), view.face.box, strict=True))
        row |= {"face": view.number, "score": round(view.face.score, 4)}
    if prediction:
        emotion, confidence, all_probs = prediction
        row |= {"emotion": emotion, "confidence": round(confidence, 4)}
        row |= {class_columns[name]: round(value, 4) for name, value in all_probs.items()}
    return row


class Summary:
    """Counts what was predicted, and says it."""

    def __init__(self):
        self.kinds, self.sources, self.last = Counter(), Counter(), None

    def add(self, view: View) -> None:
        self.kinds[view.kind] += 1
        if view.source != self.last:  # all of one file come together
            self.last = view.source
            self.sources["pictures" if view.time is None else "videos"] += 1

    def __str__(self) -> str:
        counts = [*self.sources.items(), ("faces", self.kinds["face"])]
        parts = [f"{count:,} {name if count > 1 else name[:-1]}" for name, count in counts if count] or ["0 pictures"]
        parts += [f"{self.kinds['none']:,} without a face"] * bool(self.kinds["none"])
        return ", ".join(parts)


def predict_all(model: nn.Module, paths: list[str], args: argparse.Namespace, on_error) -> Iterator[tuple]:
    """Yields (view, probs) of the pictures and then of the videos, annotated where --annotate asks for it."""
    pictures, videos = ([path for path in paths if is_video(path) == wanted] for wanted in (False, True))
    find = make_finder(model.info.input_spec, args.faces, min_size=args.min_face, yunet=args.yunet)
    targets = Targets(args.annotate, paths) if args.annotate else None
    annotate = Annotator(targets) if targets else None
    for view, probs in classify_on_cores(model, pictures, find, args.batch_size, on_error):
        yield view, probs
        if annotate:
            annotate(view.source, view.face, None if probs is None else to_prediction(probs, model.info.class_names))
    if annotate:
        annotate.close()
    for path in videos:
        try:
            video = Video(path)
        except InputError as error:
            on_error(path, str(error))
        else:
            yield from classify_video(model, video, path, find, every=args.every, targets=targets)


def predict_files(model: nn.Module, class_names: list[str], args: argparse.Namespace) -> int:
    """Predicts and prints `args.inputs`; returns the exit code, 2 where nothing could be read."""
    paths = find_pictures(args.inputs)
    is_single = len(paths) == 1 and not os.path.isdir(args.inputs[0])
    class_columns = {name: f"{name} (class)" if name in COLUMNS else name for name in class_names}
    summary, unreadable = Summary(), []

    def on_error(_, message: str) -> None:
        unreadable.append(message)
        print(f"error: {message}" if is_single else message, file=sys.stderr)

    def rows() -> Iterator[dict]:
        for view, probs in predict_all(model, paths, args, on_error):
            prediction = None if probs is None else to_prediction(probs, class_names)
            if view.time is None:
                print_prediction(view, prediction, is_single=is_single, show_all=args.show_all)
            elif not (args.output or args.annotate):  # thousands of lines, that stand in the table or the copy
                print_prediction(view, prediction, is_single=False, show_all=args.show_all)
            summary.add(view)
            yield to_row(view, prediction, class_columns)

    with contextlib.closing(rows()) as found:
        first = list(islice(found, 1))
        if args.output and first:
            write_rows(chain(first, found), [*COLUMNS, *class_columns.values()], Path(args.output))
        elif args.output:
            print(f"{printable(args.output)} was not written", file=sys.stderr)
        for _ in found:
            pass
    if args.output and first:
        print(f"written to {printable(args.output)}", file=sys.stderr)
    if args.annotate and first:
        print(f"annotated in {printable(args.annotate)}", file=sys.stderr)
    if args.faces == "auto" and summary.kinds["whole"]:
        print(f"whole pictures were classified; {opencv_problem()}", file=sys.stderr)
    if not is_single or summary.sources["videos"]:
        left_out = f", {len(unreadable):,} could not be read" if unreadable else ""
        print(f"{summary}{left_out}", file=sys.stderr)
    return 0 if first else 2


def draw_samples(model: nn.Module, class_names: list[str], args: argparse.Namespace) -> None:
    """Draws pictures of test/, in turn from every class, with true and predicted class to prediction_samples.png."""
    import reports

    folder = Path(args.data_dir) / "test"
    if not os.path.isdir(folder):
        raise InputError(f"no picture was named, and there is no {folder} to sample; name a picture")
    rng = np.random.default_rng(0)
    known = [name for name in find_classes(folder) if name in class_names]
    if not known:
        raise InputError(f"{folder} has none of the classes that the network knows, {class_names}; pass --data-dir")
    by_class = [[(entry.path, name) for entry in walk_pictures(folder / name)] for name in known]
    shuffled = [[pictures[index] for index in rng.permutation(len(pictures))] for pictures in by_class]
    turns = [pictures[turn] for turn in range(SAMPLES) for pictures in shuffled if turn < len(pictures)]
    samples, names = [], dict(turns[:SAMPLES])
    find = make_finder(model.info.input_spec)
    for view, probs in classify(model, list(names), find, args.batch_size, lambda _, message: print(message)):
        emotion, confidence, _ = to_prediction(probs, class_names)
        image = read_image(view.source, model.info.input_spec)
        picture = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
        samples.append((picture, names[view.source], emotion, confidence))
    if not samples:
        raise InputError(f"no picture in {folder} can be read")
    right = sum(true == emotion for _, true, emotion, _ in samples)
    title = f"{right} of {len(samples)} pictures of {printable(folder)} right ({model.info.arch})"
    target = make_output_dir(args.output_dir) / "prediction_samples.png"
    replace_file(target, lambda path: reports.plot_samples(samples, path, title=title))
    print(f"{title}; drawn to {printable(target)}")


def main(argv: list[str] | None = None) -> int | None:
    args = get_args_parser().parse_args(argv)
    if args.batch_size < 1:
        raise InputError(f"--batch-size must be at least 1, not {args.batch_size}")
    if args.output and Path(args.output).suffix.lower() not in (".csv", ".json"):
        raise InputError(f"--output {args.output}: the name must end in .csv or .json")
    for flag, value in (("--min-face", args.min_face), ("--every", args.every)):
        if value is not None and value < 1:
            raise InputError(f"{flag} must be at least 1, not {value}")
    if args.output:
        check_writable(args.output)
    model, info = open_model(args.checkpoint, args.device, trust=args.trust)
    if args.info:
        return print_info(info, model)
    if args.inputs:
        return predict_files(model, model.info.class_names, args)
    return draw_samples(model, model.info.class_names, args)


if __name__ == "__main__":
    run_script(main)
