"""Metrics from scikit-learn, plots from matplotlib; all of it from labels, log-probabilities and the history."""

import contextlib
import csv
import json
from functools import cache, partial
from pathlib import Path

import numpy as np

from checkpoints import replace_file


def wilson_interval(correct: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95% interval of a share, after Wilson 1927; both ends are fractions."""
    share, z2 = correct / count, z * z
    center = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = z / (1 + z2 / count) * np.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    return float(center - half), float(center + half)


def calibration(labels: np.ndarray, log_probs: np.ndarray, bins: int = 15) -> dict:
    """How well probabilities tell what happens. `labels` int64 (N,), `log_probs` float32 (N, classes).

    "loss" is the cross-entropy; "ece" the expected calibration error, how far accuracy lies from confidence, as a mean
    over the images, which are put into `bins` equal parts of the range of confidence (Guo et al. 2017,
    arXiv:1706.04599); "bins" holds count, mean confidence and accuracy of those that have images.
    """
    confidence, right = np.exp(log_probs.max(1)), log_probs.argmax(1) == labels
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    parts = [place == number for number in np.unique(place)]
    rows = [
        {"count": int(part.sum()), "confidence": float(confidence[part].mean()), "accuracy": float(right[part].mean())}
        for part in parts
    ]
    error = sum(row["count"] * abs(row["accuracy"] - row["confidence"]) for row in rows) / len(labels)
    return {"loss": float(-log_probs[np.arange(len(labels)), labels].mean()), "ece": float(error), "bins": rows}


def compute_metrics(
    labels: np.ndarray,
    log_probs: np.ndarray,
    class_names: list[str],
    *,
    split: str,
    temperature: float = 1.0,
    uncalibrated: np.ndarray | None = None,
    in_train: np.ndarray | None = None,
) -> dict:
    """Plain numbers for metrics.json; fractions, not percent. `labels` int64 (N,), `log_probs` float32 (N, classes).

    Balanced accuracy and macro F1 are means over the classes that have images in the split. `uncalibrated` is what
    `log_probs` would be without the `temperature`. `in_train`, bool (N,), marks images that are also in train: if
    there are any, "without_duplicates" holds count and accuracy of the others.
    """
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    preds, positions = log_probs.argmax(1), np.arange(len(class_names))
    precision, recall, f1, support = precision_recall_fscore_support(
        labels, preds, labels=positions, average=None, zero_division=0
    )
    correct, present, calibrated = int((preds == labels).sum()), support > 0, calibration(labels, log_probs)
    per_class = {
        name: {"precision": float(p), "recall": float(r), "f1": float(f), "support": int(n)}
        for name, p, r, f, n in zip(class_names, precision, recall, f1, support, strict=True)
    }
    extra = {}
    if in_train is not None and 0 < in_train.sum() < len(labels):
        count, right = int((~in_train).sum()), int((preds == labels)[~in_train].sum())
        own = {"count": count, "accuracy": right / count, "accuracy_interval": list(wilson_interval(right, count))}
        extra["without_duplicates"] = own
    return {
        "split": split,
        "count": len(labels),
        "loss": calibrated["loss"],
        "accuracy": correct / len(labels),
        "accuracy_interval": list(wilson_interval(correct, len(labels))),
        **extra,
        "macro_f1": float(f1[present].mean()),
        "balanced_accuracy": float(recall[present].mean()),
        "temperature": temperature,
        "calibration": calibrated,
        "uncalibrated": calibrated if uncalibrated is None else calibration(labels, uncalibrated),
        "per_class": per_class,
        "class_names": list(class_names),
        "confusion_matrix": confusion_matrix(labels, preds, labels=positions).tolist(),
    }


def one_class_warning(metrics: dict) -> str | None:
    """A line where over 80% of the predictions are one class."""
    matrix = np.array(metrics["confusion_matrix"])
    predicted, actual = matrix.sum(0) / matrix.sum(), matrix.sum(1) / matrix.sum()
    top = int(predicted.argmax())
    if predicted[top] <= 0.8:
        return None
    name = metrics["class_names"][top]
    return (
        f"warning: {100 * predicted[top]:.0f}% of the predictions are {name!r}, which {100 * actual[top]:.0f}% of the "
        "images are; see 'Always one class' in docs/troubleshooting.md"
    )


def format_report(metrics: dict) -> str:
    """The classification report as text, percent."""
    low, high = metrics["accuracy_interval"]
    width = max(10, *(len(name) for name in metrics["class_names"]))
    lines = [
        f"Split: {metrics['split']}, {metrics['count']:,} images",
        f"Accuracy: {100 * metrics['accuracy']:.2f}% (95% interval {100 * low:.2f} to {100 * high:.2f})",
        f"Macro F1: {100 * metrics['macro_f1']:.2f}%   Balanced accuracy: {100 * metrics['balanced_accuracy']:.2f}%   "
        f"Loss: {metrics['loss']:.4f}",
        f"Expected calibration error: {100 * metrics['calibration']['ece']:.2f}%   {_describe_temperature(metrics)}",
        *_describe_duplicates(metrics),
        "",
        f"{'':{width}}  precision     recall         F1     images",
    ]
    for name, row in metrics["per_class"].items():
        shares = "".join(f"{100 * row[key]:10.2f}%" for key in ("precision", "recall", "f1"))
        lines.append(f"{name:{width}}{shares}{row['support']:11,}")
    warning = one_class_warning(metrics)
    return "\n".join([*lines, *([warning] if warning else [])]) + "\n"


def _describe_temperature(metrics: dict) -> str:
    if metrics["temperature"] == 1:
        return "no temperature was fitted"
    return f"without the temperature of {metrics['temperature']:.2f}: {100 * metrics['uncalibrated']['ece']:.2f}%"


def _describe_duplicates(metrics: dict) -> list[str]:
    if "without_duplicates" not in metrics:
        return []
    own = metrics["without_duplicates"]
    low, high = own["accuracy_interval"]
    return [
        f"Without the {metrics['count'] - own['count']:,} images that are also in train/: "
        f"{100 * own['accuracy']:.2f}% of {own['count']:,} (95% interval {100 * low:.2f} to {100 * high:.2f})"
    ]


METRICS_FILES = ("metrics.json", "classification_report.txt", "confusion_matrix.png", "reliability.png")
HISTORY_NAME = "training_history.csv"
HISTORY_FILES = (HISTORY_NAME, "training_history.png")


def write_report(metrics: dict, output_dir: Path, history: list[dict] | None = None, *, title: str = "") -> list[str]:
    """Writes METRICS_FILES, with a training `history` also HISTORY_FILES, and returns their names."""
    writers = [
        lambda path: path.write_text(json.dumps(metrics, indent=1), encoding="utf-8"),
        lambda path: path.write_text(format_report(metrics), encoding="utf-8"),
        lambda path: plot_confusion_matrix(metrics, path),
        lambda path: plot_reliability(metrics, path),
    ]
    files = dict(zip(METRICS_FILES, writers, strict=True))
    if history:
        plot = partial(plot_history, history, title=title)
        files |= dict(zip(HISTORY_FILES, (partial(write_history, history), plot), strict=True))
    for name, write in files.items():
        replace_file(output_dir / name, write)
    return list(files)


def write_history(history: list[dict], path: Path) -> None:
    """One row per epoch, as CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(history[0]))
        writer.writeheader()
        writer.writerows(history)


@cache
def find_font(character: str):
    """A font that has the character, DejaVu Sans before others, with `name` and `fname`; None if there is none."""
    from matplotlib.font_manager import fontManager
    from matplotlib.ft2font import FT2Font

    fonts = [font for font in fontManager.ttflist if not font.name.startswith("Last Resort")]  # which has empty boxes
    fonts.sort(key=lambda font: (font.name != "DejaVu Sans", font.style != "normal", font.weight != 400))
    for font in fonts:
        with contextlib.suppress(OSError, RuntimeError):  # matplotlib remembers fonts that are gone
            if ord(character) in FT2Font(font.fname).get_charmap():
                return font
    return None


def drawable(text: str) -> str:
    """`text` with a question mark for what no font has, and for control characters except line breaks."""
    shown = (char == "\n" or char.isprintable() and (char.isascii() or find_font(char)) for char in text)
    return "".join(char if is_shown else "?" for char, is_shown in zip(text, shown, strict=True))


def _plain(text: str) -> str:
    """`text` for matplotlib, which takes text between two dollar signs for a formula."""
    return drawable(text).replace("$", r"\$")


def _numbered(class_names: list[str]) -> list[str]:
    """The names for a plot; of one that can't be drawn, its number in the order of the classes."""
    return [_plain(name) if drawable(name) == name else f"{number}" for number, name in enumerate(class_names, 1)]


def _save(figure, path: str | Path) -> None:
    """Draws the figure as PNG, in fonts that have what it shows."""
    from matplotlib.text import Text

    texts = figure.findobj(Text)
    fonts = {find_font(char) for text in texts for char in text.get_text() if not char.isascii()} - {None}
    for text in texts:
        text.set_fontfamily(["DejaVu Sans", *sorted(font.name for font in fonts)])
    figure.savefig(path, format="png")


def _figure(width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)  # draws to a file without a display, whatever backend the user has set
    return figure


def plot_history(history: list[dict], path: str | Path, *, title: str) -> None:
    """Loss and accuracy over the epochs, training and validation, with the epoch of the best checkpoint marked."""
    figure = _figure(11, 4.4)
    epochs = [row["epoch"] for row in history]
    best = max(history, key=lambda row: (row["val_acc"], -row["val_loss"]))
    figure.suptitle(_plain(title))
    panels = zip(figure.subplots(1, 2), ("loss", "acc"), ("Loss", "Accuracy (%)"), (1, 100), strict=True)
    for axes, key, label, factor in panels:
        marker = "o" if len(epochs) < 4 else None  # a line through one point can't be seen
        for split, name in (("train", "training"), ("val", "validation")):
            axes.plot(epochs, [factor * row[f"{split}_{key}"] for row in history], label=name, marker=marker)
        axes.axvline(best["epoch"], color="gray", linestyle=":", label=f"best, epoch {best['epoch']}")
        axes.set(xlabel="Epoch", ylabel=label)
        axes.set_xlim(0.5, epochs[-1] + 0.5)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    _save(figure, path)


def plot_confusion_matrix(metrics: dict, path: str | Path) -> None:
    """Rows are true classes; color and percent are shares of the row, below them the number of images.

    Of more than 30 classes only the colors are drawn.
    """
    matrix, names = np.array(metrics["confusion_matrix"]), metrics["class_names"]
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    is_small = len(names) <= 30
    side = max(5.0, 1.5 + 0.85 * len(names)) if is_small else 25.0
    figure = _figure(side + 1, side)
    axes = figure.subplots()
    image = axes.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100)
    for row, column in np.ndindex(*matrix.shape) if is_small else ():
        text = f"{100 * shares[row, column]:.0f}%\n{matrix[row, column]:,}"
        color = "white" if shares[row, column] > 0.55 else "black"
        axes.text(column, row, text, ha="center", va="center", color=color, fontsize=9)
    names = _numbered([name if len(name) <= 24 else name[:23] + "…" for name in names])
    places = range(0, len(names), -(-len(names) // 60))
    axes.set_xticks(places, names[:: places.step], rotation=45, ha="right")
    axes.set_yticks(places, names[:: places.step])
    name = f"{metrics['arch']}, " if "arch" in metrics else ""
    accuracy = f"accuracy {100 * metrics['accuracy']:.1f}% on {metrics['count']:,} images"
    title = f"{name}{_plain(metrics['split'])}: {accuracy}"
    axes.set(xlabel="Predicted", ylabel="True", title=title)
    figure.colorbar(image, label="% of the true class", shrink=0.8)
    _save(figure, path)


def plot_reliability(metrics: dict, path: str | Path) -> None:
    """Accuracy over confidence, with the temperature and without it; on the diagonal confidence is accuracy.

    The area of a point is the number of images in its bin. Bins of fewer than 10 are left out, since chance decides
    there, unless all have fewer.
    """
    figure = _figure(6, 6.4)
    axes = figure.subplots()
    axes.plot([0, 100], [0, 100], color="gray", linestyle=":", label="perfectly calibrated")
    curves = [("uncalibrated", "tab:orange", "without temperature")]
    if metrics["temperature"] != 1:  # else the same curve again
        curves.append(("calibration", "tab:blue", f"temperature {metrics['temperature']:.2f}"))
    for key, color, name in curves:
        rows = [row for row in metrics[key]["bins"] if row["count"] >= 10] or metrics[key]["bins"]
        confidence, accuracy = ([100 * row[column] for row in rows] for column in ("confidence", "accuracy"))
        areas = [20 + 300 * row["count"] / metrics["count"] for row in rows]
        axes.plot(confidence, accuracy, color=color, label=f"{name}: ECE {100 * metrics[key]['ece']:.1f}%")
        axes.scatter(confidence, accuracy, areas, color=color, alpha=0.7)
    name = f"{metrics['arch']}, " if "arch" in metrics else ""
    title = f"{name}{_plain(metrics['split'])}: reliability"
    axes.set(xlabel="Confidence (%)", ylabel="Accuracy (%)", title=title, xlim=(-3, 103), ylim=(-3, 103))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=1)
    _save(figure, path)


def plot_timeline(points: list[tuple], class_names: list[str], path: str | Path, *, title: str) -> None:
    """Probabilities over time: `points` are (seconds, probability of each class), gaps where no face was found."""
    figure = _figure(11, 4)
    axes = figure.subplots()
    times, probs = np.array([point[0] for point in points]), 100 * np.array([point[1:] for point in points])
    steps = np.diff(times)
    gaps = np.flatnonzero(steps > 1.5 * np.median(steps)) + 1 if len(steps) else []
    marker = "o" if len(points) < 4 else None  # a line through one point can't be seen
    for name, values in zip(_numbered(class_names), probs.T, strict=True):
        axes.plot(np.insert(times, gaps, np.nan), np.insert(values, gaps, np.nan), label=name, marker=marker)
    axes.set(xlabel="Time (s)", ylabel="Probability (%)", title=_plain(title), ylim=(-2, 102))
    axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")
    _save(figure, path)


def plot_grid(rows: list[list[tuple[np.ndarray, str, str]]], path: str | Path, *, title: str) -> None:
    """Rows of (image uint8 (H, W) or (H, W, 3), text above it, color of the text)."""
    columns = max(map(len, rows))
    figure = _figure(2.1 * columns, 2.45 * len(rows) + 0.5)
    figure.suptitle(_plain(title))
    for axes, row in zip(figure.subplots(len(rows), columns, squeeze=False), rows, strict=True):
        for place, (image, text, color) in zip(axes, row, strict=False):
            place.imshow(image, cmap="gray", vmin=0, vmax=255)
            place.set_title(_plain(text), color=color, fontsize=9)
    for axes in figure.axes:
        axes.axis("off")
    _save(figure, path)
