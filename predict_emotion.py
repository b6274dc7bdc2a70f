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
import glob
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from checkpoints import BEST_NAME, build_model, read_checkpoint, replace_file
from data import SAMPLE_SET, find_classes, walk_pictures
from decoding import in_chunks, read_image, to_input
from engine import keep_freed_memory, limit_threads, memory_format, pick_device
from models import InputError, InputSpec, count_parameters, printable

BUNDLED = Path(__file__).resolve().parent / "weights" / "emotion_model.pth"
COLUMNS = ["file", "time", "face", "left", "top", "width", "height", "score", "emotion", "confidence"]
SAMPLES = 20  # pictures in prediction_samples.png

Prediction = tuple[str, float, dict[str, float]]


# The public API


def find_checkpoint(path: str | Path | None = None) -> Path:
    """`path`, or where it is None the user's best checkpoint in the current folder, or the network that comes along.

    Says on standard error which one was found; raises InputError where there is none.
    """
    if path is not None:
        return Path(path)
    for found in (Path(BEST_NAME), BUNDLED):
        if os.path.isfile(found):
            print(f"using {printable(found)}", file=sys.stderr)
            return found
    raise InputError(f"no {BEST_NAME} here: train one with train_emotion_cnn.py, or name one with --checkpoint PATH")


def load_model(path: str | Path | None = None, device: str = "auto") -> tuple[nn.Module, list[str]]:
    """The network of a checkpoint, in evaluation mode on `device`, and its class names.

    Without `path`: best_emotion_model.pth in the current folder, else weights/emotion_model.pth. The network carries
    `arch`, `input_spec`, `class_names`, `temperature` and `trained_on`. Raises InputError (a ValueError).
    """
    path = find_checkpoint(path)
    return prepare_model(read_checkpoint(path), path, device)


def prepare_model(checkpoint: dict, path: str | Path, device: str = "auto") -> tuple[nn.Module, list[str]]:
    """What load_model returns, from a checkpoint that was read from `path`; says so where it knows only drawings."""
    target = pick_device(device)
    model = build_model(checkpoint, path).to(target, memory_format=memory_format(target))
    if model.trained_on == SAMPLE_SET:
        print(f"note: this network was trained on {model.trained_on}; for photos, train on real faces", file=sys.stderr)
    return model, model.class_names


def predict_image(model: nn.Module, image, class_names: list[str]) -> Prediction:
    """(predicted class, its confidence in percent, dict of class name to percent in class order).

    `image` is a path, a PIL image, or a uint8 array in RGB order (H, W, 3) or gray (H, W); the whole of it is taken
    as one face. Raises ValueError that names a picture which can't be read.
    """
    return predict_images(model, [image], class_names)[0]


def predict_images(
    model: nn.Module, images: Iterable, class_names: list[str], batch_size: int = 64
) -> list[Prediction]:
    """`predict_image` for many pictures, in batches; the same three for each, in the order given."""
    if isinstance(images, str | os.PathLike | np.ndarray):
        raise InputError("predict_images takes a list of pictures; for one, call predict_image")
    if len(class_names) != model.num_classes:
        raise InputError(f"the network has {model.num_classes} classes, but class_names has {len(class_names)}")
    predictions = []
    for pixels, _ in _decode_ahead(list(images), model.input_spec, batch_size, on_error=None):
        predictions += [_to_prediction(row, class_names) for row in predict_probs(model, pixels)]
    return predictions


@torch.inference_mode()
def predict_probs(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """uint8 (N, C, H, W) as `read_image` makes them -> probabilities float32 (N, num_classes) on the CPU."""
    device = next(model.parameters()).device
    inputs = to_input(images.to(device), model.input_spec).contiguous(memory_format=memory_format(device))
    return torch.softmax(model(inputs).float() / getattr(model, "temperature", 1.0), dim=1).cpu()


def _to_prediction(probs: torch.Tensor, class_names: list[str]) -> Prediction:
    all_probs = {name: 100 * value for name, value in zip(class_names, probs.tolist(), strict=True)}
    best = max(all_probs, key=all_probs.get)
    return best, all_probs[best], all_probs


def _decode_ahead(
    sources: list, spec: InputSpec, batch_size: int, *, on_error: Callable[[object, str], None] | None
) -> Iterator[tuple[torch.Tensor, list]]:
    """Yields (images uint8 (n, C, H, W), their sources); the next batch is decoded while the network works.

    A picture that can't be read goes to `on_error(source, message)` and is left out; None raises instead.
    """
    waiting = []
    decode = partial(_decode, spec=spec, raises=on_error is None)
    for _, results in in_chunks(sources, decode, 8, ahead=2 * batch_size):
        for source, result in results:
            if isinstance(result, str):
                on_error(source, result)
            else:
                waiting.append((source, result))
        while len(waiting) >= batch_size:
            yield _to_batch(waiting[:batch_size])
            del waiting[:batch_size]
    if waiting:
        yield _to_batch(waiting)


def _decode(sources: list, spec: InputSpec, *, raises: bool = False) -> list[tuple[object, np.ndarray | str]]:
    """(source, its pixels) of each; for one that can't be read the message stands there, unless it is raised."""
    results = []
    for source in sources:
        try:
            results.append((source, read_image(source, spec)))
        except InputError as error:
            if raises:
                raise
            results.append((source, str(error)))
    return results


def _to_batch(pairs: list[tuple[object, np.ndarray]]) -> tuple[torch.Tensor, list]:
    return torch.from_numpy(np.stack([pixels for _, pixels in pairs])), [source for source, _ in pairs]


def predict_stream(
    model: nn.Module, sources: list, batch_size: int, on_error: Callable[[object, str], None]
) -> Iterator[tuple[list, torch.Tensor]]:
    """Yields (sources, probs) in order, as the pictures are read; for scripts, since it sets torch's threads.

    On the CPU every core takes a share of the batch and works it through on its own, decoding included: with small
    networks cores that share one batch wait for each other, and for whichever of them decodes.
    """
    threads = torch.get_num_threads()
    if len(sources) == 1 or next(model.parameters()).device.type != "cpu":
        for pixels, good in _decode_ahead(sources, model.input_spec, batch_size, on_error=on_error):
            yield good, predict_probs(model, pixels)
        return

    def work(chunk: list) -> tuple[list, list, torch.Tensor | None]:
        results = _decode(chunk, model.input_spec)
        pairs = [pair for pair in results if not isinstance(pair[1], str)]
        pixels, good = _to_batch(pairs) if pairs else (None, [])
        bad = [pair for pair in results if isinstance(pair[1], str)]
        return bad, good, predict_probs(model, pixels) if pairs else None

    torch.set_num_threads(1)  # for the threads that start from here on
    try:
        for _, (bad, good, probs) in in_chunks(sources, work, max(1, batch_size // threads), workers=threads):
            for source, message in bad:
                on_error(source, message)
            if good:
                yield good, probs
    finally:
        torch.set_num_threads(threads)


# The command line


def run_script(main: Callable[[], int | None]) -> None:
    """Runs a script's `main`: exit code 2 and one line for the user's mistakes, 130 for Ctrl-C."""
    limit_threads()
    keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # notebooks have streams of their own
            stream.reconfigure(errors="replace")  # a terminal that can't show a bar or a name still shows the rest
    try:
        sys.exit(main())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, but a wrong flag gets one line instead of the whole usage, and a part of a flag is a wrong one."""

    def __init__(self, **options):
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str):
        self.exit(2, f"error: {message}\n")


def make_output_dir(path: str | Path, flag: str = "--output-dir") -> Path:
    """The folder that `flag` names, made where it is missing; InputError where nothing can be written to it."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise InputError(f"can't write to {flag} {path}: {error.strerror}") from None


def check_folder_of(path: Path) -> None:
    """InputError where --output could not be written, before the work is done for it."""
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(f"can't write --output {path}: {error.strerror}") from None


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("inputs", nargs="*", metavar="PICTURE", help="pictures, folders or patterns; without"
                        " any, a sample of test/ is drawn to prediction_samples.png")  # fmt: skip
    parser.add_argument("--checkpoint", metavar="PATH", help=f"(default: {BEST_NAME} here, else "
                        "weights/emotion_model.pth)")  # fmt: skip
    parser.add_argument("--show-all", action="store_true", help="every probability, as a bar")
    parser.add_argument("--output", metavar="FILE", help="also write the predictions to FILE, .csv or .json")
    parser.add_argument("--info", action="store_true", help="print what the checkpoint is, and stop")
    parser.add_argument("--data-dir", metavar="DIR", default=".", help="its test/ is sampled where no picture is named "
                        "(default: .)")  # fmt: skip
    parser.add_argument("--output-dir", metavar="DIR", default=".", help="for prediction_samples.png (default: .)")
    parser.add_argument("--batch-size", type=int, default=64, help="(default: 64)")
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
    return found


def format_bars(all_probs: dict[str, float]) -> list[str]:
    """A line for each class: name, percent, a bar of one block for every two percent begun."""
    width = max(10, *(len(name) + 1 for name in all_probs))
    rows = [f"{name:{width}}: {p:5.2f}% {'█' * int(np.ceil(round(p, 2) / 2))}" for name, p in all_probs.items()]
    return [row.rstrip() for row in rows]


def print_prediction(name: str | None, prediction: Prediction, show_all: bool) -> None:
    """One picture (`name` None) as a block; one of many as a line with its name, and bars below it."""
    emotion, confidence, all_probs = prediction
    if name is None:
        rule = "=" * 50
        print(f"{rule}\nPredicted Emotion: {emotion.upper()}\nConfidence: {confidence:.2f}%\n{rule}")
        if show_all:
            print("\nAll emotion probabilities:", *format_bars(all_probs), sep="\n")
        return
    print(f"{printable(name)}: {emotion} {confidence:.2f}%")
    if show_all:
        print(*("  " + line for line in format_bars(all_probs)), sep="\n")


def print_info(checkpoint: dict, model: nn.Module) -> None:
    """What a checkpoint is: arch, classes, input, what it was trained on, metrics, settings."""
    spec, metrics, config = model.input_spec, checkpoint["metrics"], checkpoint["config"]
    colour = "gray" if spec.stored_channels == 1 else "RGB"
    print(f"arch: {model.arch}, {count_parameters(model):,} parameters")
    print(f"classes: {', '.join(model.class_names)}")
    print(f"input: {spec.image_size} x {spec.image_size} {colour}, mean {spec.mean}, std {spec.std}")
    epochs = f"epoch {checkpoint['epoch']} of {config.get('epochs', '?')}"
    print(f"trained on: {printable(model.trained_on)}, {epochs}, temperature {model.temperature:g}")
    print("metrics: " + ", ".join(f"{key} {value:.4f}" for key, value in metrics.items()))
    print("settings: " + ", ".join(f"{key} {printable(value)}" for key, value in config.items() if value is not None))


def write_rows(rows: list[dict], columns: list[str], path: Path) -> None:
    """The predictions as CSV (empty where a column doesn't apply) or JSON (null), by the ending of `path`."""

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            if path.suffix.lower() == ".json":
                import json

                json.dump([{column: row.get(column) for column in columns} for row in rows], file, indent=1)
            else:
                import csv

                writer = csv.DictWriter(file, columns, restval="")
                writer.writeheader()
                writer.writerows(rows)

    replace_file(path, write)


def predict_files(model: nn.Module, class_names: list[str], args: argparse.Namespace) -> int:
    """Predicts and prints `args.inputs`; returns the exit code, 2 where nothing could be read."""
    paths = find_pictures(args.inputs)
    is_single = len(paths) == 1 and not os.path.isdir(args.inputs[0])
    class_columns = {name: f"{name} (class)" if name in COLUMNS else name for name in class_names}
    rows, unreadable, done = [], [], 0

    def on_error(_, message: str) -> None:
        unreadable.append(message)
        print(f"error: {message}" if is_single else message, file=sys.stderr)

    for sources, batch in predict_stream(model, paths, args.batch_size, on_error):
        for path, probs in zip(sources, batch, strict=True):
            prediction = _to_prediction(probs, class_names)
            print_prediction(None if is_single else path, prediction, args.show_all)
            done += 1
            if args.output:
                emotion, confidence, all_probs = prediction
                rows.append({"file": path, "emotion": emotion, "confidence": round(confidence, 4)}
                            | {class_columns[name]: round(value, 4) for name, value in all_probs.items()})  # fmt: skip
    if rows:
        write_rows(rows, [*COLUMNS, *class_columns.values()], Path(args.output))
        print(f"written to {printable(args.output)}", file=sys.stderr)
    if not is_single:
        left_out = f", {len(unreadable):,} could not be read" if unreadable else ""
        print(f"{done:,} pictures{left_out}", file=sys.stderr)
    return 0 if done else 2


def draw_samples(model: nn.Module, class_names: list[str], args: argparse.Namespace) -> None:
    """Draws pictures of test/, in turn from every class, with true and predicted class to prediction_samples.png."""
    import reports

    folder = Path(args.data_dir) / "test"
    if not os.path.isdir(folder):
        raise InputError(f"no picture was named, and there is no {folder} to sample; name a picture")
    rng = np.random.default_rng(0)
    by_class = [[(entry.path, name) for entry in walk_pictures(folder / name)] for name in find_classes(folder)]
    shuffled = [[pictures[index] for index in rng.permutation(len(pictures))] for pictures in by_class]
    turns = [pictures[turn] for turn in range(SAMPLES) for pictures in shuffled if turn < len(pictures)]
    samples, names = [], dict(turns[:SAMPLES])
    decoded = _decode_ahead(list(names), model.input_spec, args.batch_size, on_error=lambda _, message: print(message))
    for pixels, sources in decoded:
        for path, image, probs in zip(sources, pixels.numpy(), predict_probs(model, pixels), strict=True):
            emotion, confidence, _ = _to_prediction(probs, class_names)
            picture = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
            samples.append((picture, names[path], emotion, confidence))
    if not samples:
        raise InputError(f"no picture in {folder} can be read")
    right = sum(true == emotion for _, true, emotion, _ in samples)
    title = f"{right} of {len(samples)} test pictures right ({model.arch})"
    target = make_output_dir(args.output_dir) / "prediction_samples.png"
    replace_file(target, lambda path: reports.plot_samples(samples, path, title=title))
    print(f"{title}; drawn to {printable(target)}")


def main(argv: list[str] | None = None) -> int | None:
    args = get_args_parser().parse_args(argv)
    if args.batch_size < 1:
        raise InputError(f"--batch-size must be at least 1, not {args.batch_size}")
    if args.output and Path(args.output).suffix.lower() not in (".csv", ".json"):
        raise InputError(f"--output {args.output}: the name must end in .csv or .json")
    if args.output:
        check_folder_of(Path(args.output))
    path = find_checkpoint(args.checkpoint)
    checkpoint = read_checkpoint(path)
    model, class_names = prepare_model(checkpoint, path, args.device)
    if args.info:
        return print_info(checkpoint, model)
    if args.inputs:
        return predict_files(model, class_names, args)
    return draw_samples(model, class_names, args)


if __name__ == "__main__":
    run_script(main)
