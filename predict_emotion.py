"""Predicts the emotion in images of faces, from the command line and from Python.

Usage::

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
import csv
import glob
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torch import nn

import inference
import reports
from checkpoints import BEST_NAME, replace_file
from console import ArgumentParser, check_writable, make_output_dir, number, run_script
from data import describe_others, find_classes, find_splits, is_sample_set, walk_images
from errors import InputError, printable
from faces.detector import CROP_SIZE, LONGEST, SMALLEST
from faces.overlay import COPY, Result, Targets, annotate_images
from faces.video import Video, is_video, predict_video
from inference import BUNDLED, OnError, Prediction, View, load_model, predict_faces, predict_image, predict_images
from models import count_parameters
from preprocessing import read_image

__all__ = ["BUNDLED", "CROP_SIZE", "load_model", "predict_faces", "predict_image", "predict_images"]  # the public API
COLUMNS = ["file", "time", "face", "left", "top", "width", "height", "score", "emotion", "confidence"]
SAMPLES = 20  # images in prediction_samples.png
_FORMULA_STARTS = tuple("=+-@\t\r\n＝＋－＠")  # the last four are full-width, which some spreadsheets take alike


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    count = number(int, 1)

    add = parser.add_argument_group("input").add_argument
    add("inputs", nargs="*", metavar="IMAGE", help="images, folders, patterns, videos; without any, a sample of test/")
    add("--data-dir", default=".", metavar="DIR", help="its test/ is sampled if no image is named")
    add("--every", default=1, type=count, metavar="N", help="of a video every Nth frame")

    add = parser.add_argument_group("output").add_argument
    add("--show-all", action="store_true", help="every probability, as a bar")
    add("--output", metavar="FILE", help="also write the predictions to FILE, .csv or .json")
    add("--annotate", metavar="DIR", help="write the images and videos there with boxes and bars, of videos a timeline")
    add("--output-dir", default=".", metavar="DIR", help="for prediction_samples.png, the sample")

    add = parser.add_argument_group("faces").add_argument
    text = f"on: every face found; off: the whole image; auto: faces, but images of at most {CROP_SIZE} pixels, or the "
    text += "model's image_size, whole"
    add("--faces", default="auto", choices=("auto", "on", "off"), help=text)
    text = f"the smallest face to look for (default: {SMALLEST}, or a 60th of an image of over {LONGEST})"
    add("--min-face", type=count, metavar="PIXELS", help=text)

    add = parser.add_argument_group("model").add_argument
    text = f"a checkpoint or an exported file (default: {BEST_NAME} here, else weights/emotion_model.pth)"
    add("--checkpoint", metavar="PATH", help=text)
    add("--info", action="store_true", help="print what the checkpoint is, and stop")
    add("--trust", action="store_true", help="load .pt, .pt2 and .onnx files, which can run code or fill the memory")
    add("--batch-size", default=64, type=count, help="images or faces per batch")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    return parser


def find_images(inputs: list[str]) -> list[str]:
    """Paths of images, folders (searched through) and patterns, each once; InputError for one that leads to nothing."""
    found = []
    for item in inputs:
        if os.path.isdir(item):
            paths = [entry.path for entry in walk_images(item)]
            if not paths:
                raise InputError(f"no images in the folder {item}, which holds {describe_others(item) or 'no files'}")
        elif os.path.lexists(item):
            paths = [item]
        else:
            paths = sorted(path for path in glob.glob(item, recursive=True) if not os.path.isdir(path))
            if not paths:
                raise InputError(f"no file or pattern match: {item}")
        found += paths
    return list(dict.fromkeys(found))


def is_own_copy(path: str, folder: str | None) -> bool:
    """Whether an earlier run has written the file to `folder`, the --annotate of this one."""
    return bool(folder) and path.endswith(COPY) and os.path.realpath(folder) == os.path.dirname(os.path.realpath(path))


# Printing


def format_bars(all_probs: dict[str, float]) -> list[str]:
    """A line for each class: name, percent, a bar of one block for every two percent begun."""
    width = max(10, *(len(name) + 1 for name in all_probs))
    rows = [f"{name:{width}}: {p:5.2f}% {'█' * int(np.ceil(round(p, 2) / 2))}" for name, p in all_probs.items()]
    return [row.rstrip() for row in rows]


def describe_view(view: View) -> str:
    """Which part of the image was classified, or that none was; empty for the whole of a small image."""
    if view.kind == "face":
        left, top, width, height = view.box
        turned = f", turned by {view.face.tilt:.0f} degrees" if abs(view.face.tilt) > 45 else ""
        return f"face {view.number} at {left}, {top}, {width} x {height} pixels{turned}"
    return {"whole": "whole image", "crop": "", "none": "no face found"}[view.kind]


def print_prediction(view: View, prediction: Prediction | None, *, is_only: bool, show_all: bool) -> None:
    """The prediction as a block for the only image, as a line for one image or frame of many."""
    part = describe_view(view)
    source = printable(view.source) + ("" if view.time is None else f" at {view.time:.2f} s")
    if prediction is None:
        print(part.capitalize() if is_only else f"{source}: {part}")
        return
    emotion, confidence, all_probs = prediction
    if is_only:
        rule = "=" * 50
        where = [part.capitalize()] if view.kind == "face" else []
        print(rule, *where, f"Predicted Emotion: {emotion.upper()}", f"Confidence: {confidence:.2f}%", rule, sep="\n")
        heading, indent = "\nAll emotion probabilities:\n", ""
    else:
        print(f"{source}, {part}: {emotion} {confidence:.2f}%" if part else f"{source}: {emotion} {confidence:.2f}%")
        heading, indent = "", "  "
    if show_all:
        print(heading + "\n".join(indent + bar for bar in format_bars(all_probs)))


def print_info(info: dict, model: nn.Module) -> None:
    """What a checkpoint is: arch, classes, input, what it was trained on, metrics, settings."""
    spec, metrics, config = model.info.input_spec, info["metrics"], info["config"]
    color = "gray" if spec.stored_channels == 1 else "RGB"
    parameters = f"{count_parameters(model):,} parameters" if count_parameters(model) else "exported"
    epochs = f"epoch {info['epoch']} of {printable(config.get('epochs', '?'))}"
    shown = [f"{key} {value:.4f}" if isinstance(value, float) else f"{key} {value:,}" for key, value in metrics.items()]
    print(f"arch: {model.info.arch}, {parameters}")
    print(f"classes: {', '.join(model.info.class_names)}")
    print(f"input: {spec.image_size} x {spec.image_size} {color}, mean {spec.mean}, std {spec.std}")
    print(f"trained on: {printable(model.info.trained_on)}, {epochs}, temperature {model.info.temperature:g}")
    print(f"metrics: {', '.join(shown)}")
    print("settings:", ", ".join(f"{key} {printable(value)}" for key, value in config.items() if value is not None))


def summarize(paths: list[str], unreadable: set[str], kinds: Counter) -> str:
    """How many images, videos and faces there were; `kinds` counts the views."""
    videos = sum(is_video(path) for path in paths if path not in unreadable)
    counts = {"image": len(paths) - len(unreadable) - videos, "video": videos, "face": kinds["face"]}
    parts = [f"{count:,} {name}{'s' * (count > 1)}" for name, count in counts.items() if count] or ["0 images"]
    parts += [f"{kinds['none']:,} without a face"] * bool(kinds["none"])
    parts += [f"{len(unreadable):,} could not be read"] * bool(unreadable)
    return ", ".join(parts)


# Tables


def to_cell(value):
    """A CSV cell: text that a spreadsheet would take for a formula gets an apostrophe in front."""
    return "'" + value if isinstance(value, str) and value.startswith(_FORMULA_STARTS) else value


def to_row(view: View, prediction: Prediction | None, class_columns: dict[str, str]) -> dict:
    """A row of --output: `face` is a face's number, "whole" for a whole image, "none" if there is no face."""
    row = {"file": view.source, "time": view.time, "face": {"crop": "whole"}.get(view.kind, view.kind)}
    if view.face:
        row |= dict(zip(("left", "top", "width", "height"), view.box, strict=True))
        row |= {"face": view.number, "score": round(view.face.score, 4)}
    if prediction:
        emotion, confidence, all_probs = prediction
        row |= {"emotion": emotion, "confidence": round(confidence, 4)}
        row |= {class_columns[name]: round(value, 4) for name, value in all_probs.items()}
    return row


class TableWriter(contextlib.AbstractContextManager):
    """Rows as a CSV or JSON file, by the ending of `path`. Each is written as it comes, so memory does not grow.

    What a row lacks is empty in CSV and null in JSON. `path` is replaced at the end of the block, unless no row was
    added or the block raised an error, which is passed on. Raises InputError if the file can't be written.
    """

    def __init__(self, path: str | Path, columns: list[str]):
        self.path, self.columns, self._file = Path(path), columns, None
        self._is_json = self.path.suffix.lower() == ".json"
        self._rows = self.path.with_name(f".{self.path.name}.{os.getpid()}.rows.tmp")

    def add(self, row: dict) -> None:
        cells, is_first = [row.get(column) for column in self.columns], self._file is None
        try:
            if is_first:  # surrogateescape: names of files may hold bytes that are not UTF-8
                self._file = self._rows.open("w", newline="", encoding="utf-8", errors="surrogateescape")
            if self._is_json:
                self._file.write("[\n" if is_first else ",\n")
                self._file.write(json.dumps(dict(zip(self.columns, cells, strict=True))))
            else:
                lines = [self.columns, cells] if is_first else [cells]  # where None becomes an empty cell
                writer = csv.writer(self._file, quoting=csv.QUOTE_NONNUMERIC)  # for tables that split at semicolons
                writer.writerows(map(to_cell, line) for line in lines)
        except OSError as error:
            raise InputError(f"can't write {self.path}: {error.strerror}") from None

    def __exit__(self, error: type | None, *_) -> None:
        if self._file is None:
            return
        try:
            if error is None:
                replace_file(self.path, self._finish)
        finally:
            with contextlib.suppress(OSError):  # a full disk, which has been reported
                self._file.close()
            self._rows.unlink(missing_ok=True)

    def _finish(self, target: Path) -> None:
        if self._is_json:
            self._file.write("\n]\n")
        self._file.close()
        os.replace(self._rows, target)


# What the script does


def predict_all(
    model: nn.Module, paths: list[str], args: argparse.Namespace, targets: Targets | None, on_error: OnError
) -> Iterator[Result]:
    """Yields (view, prediction) of the images, then of the videos, and annotates them if there are `targets`."""
    spec, images = model.info.input_spec, [path for path in paths if not is_video(path)]
    find = inference.make_finder(spec, args.faces, args.min_face)
    classified = inference.classify_on_cores(model, images, find, args.batch_size, on_error)
    predicted = ((view, inference.to_prediction(probs, model.info.class_names)) for view, probs in classified)
    yield from annotate_images(predicted, targets, on_error) if targets else predicted
    find = inference.make_finder(spec, args.faces, args.min_face, turns=False)  # the rotation of a video is in its file
    for path in filter(is_video, paths):
        try:
            video = Video(path)
        except InputError as error:
            on_error(path, str(error))
        else:
            yield from predict_video(model, video, path, find, every=args.every, targets=targets)


def predict_files(model: nn.Module, paths: list[str], args: argparse.Namespace) -> int:
    """Predicts and prints the images and videos; returns the exit code, which is 2 if nothing could be read."""
    is_single = len(paths) == 1 and not os.path.isdir(args.inputs[0])
    others = [describe_others(item) for item in args.inputs if os.path.isdir(item)]  # before files are written there
    class_columns = {name: f"{name} (class)" if name in COLUMNS else name for name in model.info.class_names}
    targets = Targets(make_output_dir(args.annotate, "--annotate"), paths) if args.annotate else None
    table = TableWriter(args.output, [*COLUMNS, *class_columns.values()]) if args.output else contextlib.nullcontext()
    kinds, unreadable = Counter(), set()
    unread = contextlib.suppress(BrokenPipeError) if args.output or args.annotate else contextlib.nullcontext()

    def on_error(path: str, message: str) -> None:
        unreadable.add(path)
        print(f"error: {message}" if is_single else message, file=sys.stderr)

    with table, contextlib.closing(predict_all(model, paths, args, targets, on_error)) as predictions:
        for view, prediction in predictions:
            with unread:  # `| head` ends a run that only prints, but not one that writes files
                if view.time is None or not (args.output or args.annotate):  # a video would print thousands of lines
                    print_prediction(view, prediction, is_only=is_single and view.time is None, show_all=args.show_all)
            if args.output:
                table.add(to_row(view, prediction, class_columns))
            kinds[view.kind] += 1
    if args.output:
        name = printable(args.output)
        print(f"written to {name}" if kinds else f"{name} was not written", file=sys.stderr)
    if args.annotate and kinds:
        print(f"annotated in {printable(args.annotate)}", file=sys.stderr)
    if any(others):
        print(f"not read: {', '.join(filter(None, others))}", file=sys.stderr)
    if is_single and kinds["none"] and not is_video(paths[0]):
        print("--min-face looks for smaller faces; --faces off classifies the whole image", file=sys.stderr)
    if not is_single or is_video(paths[0]) and kinds:
        print(summarize(paths, unreadable, kinds), file=sys.stderr)
    return 0 if kinds else 2


def pick_samples(folder: Path, class_names: list[str]) -> dict[str, str]:
    """{path: class name} of images in `folder`, at random but always the same, in turn from every class."""
    known = [name for name in find_classes(folder) if name in class_names]
    if not known:
        raise InputError(f"{folder} has none of the classes that the model knows, {class_names}; pass --data-dir")
    rng, by_class = np.random.default_rng(0), []
    for name in known:
        images = [(entry.path, name) for entry in walk_images(folder / name)]
        by_class.append([images[index] for index in rng.permutation(len(images))])
    turns = [images[turn] for turn in range(SAMPLES) for images in by_class if turn < len(images)]
    return dict(turns[:SAMPLES])


def draw_samples(model: nn.Module, args: argparse.Namespace) -> None:
    """Draws a sample of test/ with true and predicted classes to prediction_samples.png."""
    folder = find_splits(args.data_dir).get("test")
    if folder is None:
        raise InputError(f"no image was named, and there is no {Path(args.data_dir) / 'test'} to sample; name an image")
    spec, class_names = model.info.input_spec, model.info.class_names
    samples, cells, right = pick_samples(folder, class_names), [], 0
    find = inference.make_finder(spec)
    for view, probs in inference.classify(model, list(samples), find, args.batch_size, lambda _, text: print(text)):
        emotion, confidence, _ = inference.to_prediction(probs, class_names)
        name, image = samples[view.source], read_image(view.source, spec)
        pixels = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
        color = "tab:green" if emotion == name else "tab:red"
        cells.append((pixels, f"{emotion} {confidence:.0f}%\ntrue: {name}", color))
        right += emotion == name
    if not cells:
        raise InputError(f"no image in {folder} can be read")
    rows = [cells[start : start + 5] for start in range(0, len(cells), 5)]
    title = f"{right} of {len(cells)} images of {printable(folder)} right ({model.info.arch})"
    target = make_output_dir(args.output_dir) / "prediction_samples.png"
    replace_file(target, lambda path: reports.plot_grid(rows, path, title=title))
    print(f"{title}; drawn to {printable(target)}")


def main(argv: list[str] | None = None) -> int | None:
    args = get_args_parser().parse_args(argv)
    if args.output:
        if Path(args.output).suffix.lower() not in (".csv", ".json"):
            raise InputError(f"--output {args.output}: the name must end in .csv or .json")
        check_writable(args.output)
    paths = [path for path in find_images(args.inputs) if not is_own_copy(path, args.annotate)]
    if args.inputs and not paths:
        raise InputError(f"all images named are copies of an earlier --annotate {args.annotate}")
    photos = not is_sample_set(paths)  # False without any path: test/ may be the sample set's
    model, info = inference.open_model(args.checkpoint, args.device, trust=args.trust, photos=photos)
    if args.info:
        return print_info(info, model)
    return predict_files(model, paths, args) if paths else draw_samples(model, args)


if __name__ == "__main__":
    run_script(main)
