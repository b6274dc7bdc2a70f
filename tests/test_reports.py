"""reports.py: metrics by hand, the report as text, and plots that show something."""

import csv
import json
import math

import numpy as np
import pytest
from PIL import Image

import reports
from reports import calibration, compute_metrics, format_report, wilson_interval

NAMES = ["angry", "happy", "sad"]
TEN = [0, 0, 0, 0, 1, 1, 2, 2, 2, 2], [0, 0, 0, 1, 1, 2, 2, 2, 0, 2]  # labels and predictions


def log_probs_of(preds, num_classes=3, share=0.8):
    """Log-probabilities that put `share` on the class that is predicted."""
    probs = np.full((len(preds), num_classes), (1 - share) / (num_classes - 1), np.float32)
    probs[np.arange(len(preds)), preds] = share
    return np.log(probs)


def metrics_of(labels, preds, names=NAMES):
    return compute_metrics(np.array(labels), log_probs_of(preds, len(names)), names, split="test")


@pytest.mark.parametrize("correct, count, low, high", [(0, 10, 0.0, 0.2775), (2450, 3589, 0.6672, 0.6977)])
def test_wilson_interval(correct, count, low, high):
    assert wilson_interval(correct, count) == pytest.approx((low, high), abs=1e-4)


def test_metrics_by_hand():
    metrics = metrics_of(*TEN)
    assert json.loads(json.dumps(metrics)) == metrics and "np." not in repr(metrics)  # plain values
    assert metrics["confusion_matrix"] == [[3, 1, 0], [0, 1, 1], [1, 0, 3]]  # rows are true
    assert metrics["accuracy"] == pytest.approx(0.7) and metrics["count"] == 10 and metrics["split"] == "test"
    assert metrics["balanced_accuracy"] == metrics["macro_f1"] == pytest.approx((0.75 + 0.5 + 0.75) / 3)
    assert metrics["loss"] == pytest.approx(-(7 * math.log(0.8) + 3 * math.log(0.1)) / 10, rel=1e-5)
    assert metrics["accuracy_interval"] == list(wilson_interval(7, 10))
    assert metrics["class_names"] == NAMES and list(metrics["per_class"]) == NAMES
    for name, share, support in (("happy", 0.5, 2), ("sad", 0.75, 4)):
        expected = {"precision": share, "recall": share, "f1": share, "support": support}
        assert metrics["per_class"][name] == pytest.approx(expected)


@pytest.mark.filterwarnings("error")
def test_classes_that_are_absent_or_never_predicted():
    """The first don't weigh in the means, the second count as zero; neither brings a warning."""
    absent, never = metrics_of([0, 0, 1, 1], [0, 0, 1, 2]), metrics_of([0, 0, 1, 2], [0, 0, 0, 0])
    assert absent["balanced_accuracy"] == pytest.approx(0.75) and absent["macro_f1"] == pytest.approx((1 + 2 / 3) / 2)
    assert absent["per_class"]["sad"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
    assert absent["confusion_matrix"] == [[2, 0, 0], [0, 1, 1], [0, 0, 0]]
    assert never["macro_f1"] == pytest.approx(2 / 9) and never["balanced_accuracy"] == pytest.approx(1 / 3)


def test_calibration_by_hand_with_and_without_temperature():
    labels, preds = np.array([0, 0, 1, 1, 2]), np.array([0, 1, 1, 1, 2])
    log_probs = log_probs_of(preds)
    log_probs[4] = log_probs_of(preds, share=0.98)[4]
    result = calibration(labels, log_probs)
    rows = np.array([list(row.values()) for row in result["bins"]])  # count, confidence, accuracy
    assert rows == pytest.approx(np.array([[4, 0.8, 0.75], [1, 0.98, 1.0]]), rel=1e-4)
    assert result["ece"] == pytest.approx((4 * 0.05 + 1 * 0.02) / 5, rel=1e-3)
    certain = log_probs_of(labels, share=1 - 1e-7)
    assert [calibration(true, certain)["ece"] for true in (labels, (labels + 1) % 3)] == pytest.approx([0, 1], abs=1e-5)
    labels, sharp, soft = np.array([0, 1, 2, 0]), log_probs_of([0, 1, 2, 1], share=0.95), log_probs_of([0, 1, 2, 1])
    metrics = compute_metrics(labels, soft, NAMES, split="val", temperature=2.5, uncalibrated=sharp)
    assert metrics["temperature"] == 2.5 and metrics["calibration"] == calibration(labels, soft)
    assert metrics["uncalibrated"] == calibration(labels, sharp)
    assert all(word in format_report(metrics).splitlines()[3] for word in ("5.00%", "20.00%", "2.50"))


@pytest.mark.parametrize(("same", "warned"), [(80, False), (81, True)])
def test_one_class_warning_above_four_fifths(same, warned):
    report = format_report(metrics_of([0, 1] * 50, [1] * same + [0] * (100 - same)))
    assert ("warning" in report) == warned == ("\nwarning: 81% of the predictions are 'happy', which 50% of" in report)


def test_report_in_percent():
    rows = format_report(metrics_of(*TEN, ["angry", "a very long name of a class indeed", "sad"])).splitlines()
    assert rows[0].startswith("Split: test, 10 ")
    assert rows[1] == "Accuracy: 70.00% (95% interval 39.68 to 89.22)"
    assert "Macro F1: 66.67%" in rows[2] and "Balanced accuracy: 66.67%" in rows[2]
    assert rows[-2].split()[-4:] == ["50.00%", "50.00%", "50.00%", "2"]
    assert len({len(row) for row in rows[5:]}) == 1 and len(rows) == 9  # in columns


@pytest.mark.parametrize("marked", [[0, 3], [], range(5)])
def test_accuracy_without_duplicates(marked):
    labels, probs, in_train = np.array([0, 0, 1, 1, 2]), log_probs_of([0, 1, 1, 1, 0]), np.isin(np.arange(5), marked)
    metrics = compute_metrics(labels, probs, NAMES, split="test", in_train=in_train)
    line = "Without the 2 images that are also in train/: 33.33% of 3 (95%"
    assert metrics["accuracy"] == 0.6 and (line in format_report(metrics)) == (marked == [0, 3])
    own = metrics.get("without_duplicates", {})
    assert (own.get("count"), own.get("accuracy")) == ((3, 1 / 3) if marked == [0, 3] else (None, None))


def read_plot(path):
    with Image.open(path) as image:
        assert image.format == "PNG" and min(image.size) >= 200 and max(image.size) < 5000
        pixels = np.asarray(image.convert("RGB"))
    assert (pixels < 128).any() and pixels.std() > 5
    return pixels


HISTORY = [
    {"epoch": number, "train_loss": 1 / number, "train_acc": 0.5, "val_loss": loss, "val_acc": acc}
    for number, loss, acc in ((1, 1.0, 0.5), (2, 0.9, 0.7), (3, 0.8, 0.7), (4, 0.1, 0.6))
]
SPECIAL = ["a$b", "$c$ d", r"\$e", r"\alpha", "x_1^2", "{curly}", "100%", "a" * 60, "wütend", "怒り", "غاضب"]


@pytest.mark.parametrize("names", [SPECIAL, [f"class {number}" for number in range(80)]], ids=["special", "many"])
@pytest.mark.filterwarnings("error")
def test_confusion_matrix(names, tmp_path):
    labels, path = list(range(len(names) - 1)), tmp_path / "matrix.any name"  # the last class is absent
    metrics = metrics_of(labels * 3, labels * 2 + [0] * len(labels), names)
    reports.plot_confusion_matrix(metrics, path)
    assert "怒り" not in reports._numbered(["a", "怒り"]) or reports.find_font("怒").name != "DejaVu Sans"
    pixels = read_plot(path)
    assert (pixels[..., 2] > pixels[..., 0] + 80).mean() > 0.005  # the blue cells can be seen


@pytest.mark.parametrize(("epochs", "best"), [(1, 1), (4, 3)])
def test_history_marks_the_epoch_that_was_saved(epochs, best, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    marked, draw = [], Axes.axvline
    monkeypatch.setattr(Axes, "axvline", lambda self, x, **options: marked.append(x) or draw(self, x, **options))
    reports.plot_history(HISTORY[:epochs], tmp_path / "history.png", title="cnn4 on $faces$ and $5")
    read_plot(tmp_path / "history.png")
    assert marked == [best, best]


def test_samples_show_gray_values_as_they_are(tmp_path):
    gray, color = np.full((24, 24), 100, np.uint8), np.full((24, 24, 3), (250, 0, 0), np.uint8)
    gray[0, 0] = 140  # stretched to the range of the image, the rest would be black
    rows = [[(gray, "a$b$c", "black"), (color, "sad", "black")], [(gray, "angry", "black")]]
    reports.plot_grid(rows, tmp_path / "samples.png", title="3 of $5$")
    pixels = read_plot(tmp_path / "samples.png")
    assert (pixels == 100).all(-1).mean() > 0.2 and (pixels == (250, 0, 0)).all(-1).mean() > 0.1


@pytest.mark.filterwarnings("ignore")  # that the font lacks letters
def test_all_files_of_a_report_without_a_display(tmp_path, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    import matplotlib
    from matplotlib import pyplot

    before, backend = pyplot.get_fignums(), matplotlib.rcParams._get("backend")
    metrics, history = metrics_of([0, 1, 2, 2], [0, 1, 2, 0], ["fröhlich", "日本", "x"]), HISTORY[:2]
    assert reports.write_report(metrics, tmp_path) == list(reports.METRICS_FILES)
    assert {path.name for path in tmp_path.iterdir()} == set(reports.METRICS_FILES)
    written = reports.write_report(metrics, tmp_path, history, title="t")
    assert pyplot.get_fignums() == before and matplotlib.rcParams._get("backend") == backend  # the user's
    assert {path.name for path in tmp_path.iterdir()} == {*written} == {*reports.METRICS_FILES, *reports.HISTORY_FILES}
    for path in tmp_path.glob("*.png"):
        read_plot(path)
    assert json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8")) == metrics
    assert (tmp_path / "classification_report.txt").read_text(encoding="utf-8") == format_report(metrics)
    with (tmp_path / "training_history.csv").open(encoding="utf-8", newline="") as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    assert rows == history
