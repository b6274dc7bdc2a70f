import json
import math
import warnings

import numpy as np
import pytest
from PIL import Image

import reports
from reports import calibration, compute_metrics, format_report, one_class_warning, result_files, wilson_interval

NAMES = ["angry", "happy", "sad"]


def log_probs_of(preds, num_classes=3, share=0.8):
    """Log-probabilities that put `share` on the class that is predicted."""
    probs = np.full((len(preds), num_classes), (1 - share) / (num_classes - 1), np.float32)
    probs[np.arange(len(preds)), preds] = share
    return np.log(probs)


def metrics_of(labels, preds, names=NAMES, split="test"):
    return compute_metrics(np.array(labels), log_probs_of(preds, len(names)), names, split=split)


@pytest.mark.parametrize(
    "correct, count, low, high",
    [
        (8, 10, 0.4902, 0.9433),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (1, 1, 0.2065, 1.0),
        (50, 100, 0.4038, 0.5962),
        (2450, 3589, 0.6672, 0.6977),
    ],
)
def test_wilson_interval(correct, count, low, high):
    assert wilson_interval(correct, count) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize("correct, count", [(0, 1), (1, 1), (0, 7), (7, 7), (3, 7), (0, 100_000)])
def test_wilson_interval_stays_a_share_about_its_value(correct, count):
    low, high = wilson_interval(correct, count)
    assert -1e-12 <= low <= correct / count + 1e-12 and correct / count - 1e-12 <= high <= 1 + 1e-12
    assert type(low) is float and type(high) is float


def test_metrics_by_hand():
    labels, preds = [0, 0, 0, 0, 1, 1, 2, 2, 2, 2], [0, 0, 0, 1, 1, 2, 2, 2, 0, 2]
    metrics = metrics_of(labels, preds)
    assert metrics["confusion_matrix"] == [[3, 1, 0], [0, 1, 1], [1, 0, 3]]  # rows are true
    assert metrics["accuracy"] == pytest.approx(0.7) and metrics["count"] == 10 and metrics["split"] == "test"
    assert metrics["balanced_accuracy"] == pytest.approx((0.75 + 0.5 + 0.75) / 3)
    assert metrics["macro_f1"] == pytest.approx((0.75 + 0.5 + 0.75) / 3)
    assert metrics["loss"] == pytest.approx(-(7 * math.log(0.8) + 3 * math.log(0.1)) / 10, rel=1e-5)
    assert metrics["accuracy_interval"] == list(wilson_interval(7, 10))
    assert metrics["class_names"] == NAMES and list(metrics["per_class"]) == NAMES
    assert metrics["per_class"]["happy"] == pytest.approx({"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2})
    assert metrics["per_class"]["sad"] == pytest.approx({"precision": 0.75, "recall": 0.75, "f1": 0.75, "support": 4})


def test_metrics_are_plain_values():
    def check(value):
        if type(value) in (dict, list):
            for part in value.values() if type(value) is dict else value:
                check(part)
        else:
            assert type(value) in (str, int, float)

    metrics = metrics_of([0, 1, 2], [0, 1, 1])
    check(metrics)
    assert json.loads(json.dumps(metrics)) == metrics


def test_absent_classes_do_not_weigh_in_the_means():
    metrics = metrics_of([0, 0, 1, 1], [0, 0, 1, 2])  # no picture is sad
    assert metrics["balanced_accuracy"] == pytest.approx(0.75)
    assert metrics["macro_f1"] == pytest.approx((1 + 2 / 3) / 2)
    assert metrics["per_class"]["sad"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
    assert metrics["confusion_matrix"] == [[2, 0, 0], [0, 1, 1], [0, 0, 0]]


def test_a_class_that_is_never_predicted_counts_as_zero_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics = metrics_of([0, 0, 1, 2], [0, 0, 0, 0])
    assert metrics["macro_f1"] == pytest.approx(2 / 9) and metrics["balanced_accuracy"] == pytest.approx(1 / 3)


def test_calibration_by_hand():
    labels, preds = np.array([0, 0, 1, 1, 2]), np.array([0, 1, 1, 1, 2])
    log_probs = log_probs_of(preds)
    log_probs[4] = log_probs_of(preds, share=0.98)[4]
    result = calibration(labels, log_probs)
    rows = [[row["count"], row["confidence"], row["accuracy"]] for row in result["bins"]]
    assert np.array(rows) == pytest.approx(np.array([[4, 0.8, 0.75], [1, 0.98, 1.0]]), rel=1e-4)
    assert result["ece"] == pytest.approx((4 * 0.05 + 1 * 0.02) / 5, rel=1e-3)


def test_calibration_of_certainty_and_of_chance():
    labels = np.array([0, 1, 2, 0])
    certain = log_probs_of(labels, share=1 - 1e-7)
    assert calibration(labels, certain)["ece"] == pytest.approx(0, abs=1e-5)
    assert calibration((labels + 1) % 3, certain)["ece"] == pytest.approx(1, abs=1e-5)


def test_metrics_hold_calibration_with_and_without_temperature():
    labels, sharp, soft = np.array([0, 1, 2, 0]), log_probs_of([0, 1, 2, 1], share=0.95), log_probs_of([0, 1, 2, 1])
    metrics = compute_metrics(labels, soft, NAMES, split="val", temperature=2.5, uncalibrated=sharp)
    assert metrics["temperature"] == 2.5 and metrics["calibration"] == calibration(labels, soft)
    assert metrics["uncalibrated"] == calibration(labels, sharp)
    line = format_report(metrics).splitlines()[3]
    assert "5.00%" in line and "20.00%" in line and "2.50" in line


def test_one_picture():
    metrics = metrics_of([1], [1])
    assert metrics["accuracy"] == 1.0 and metrics["macro_f1"] == 1.0 and "100.00%" in format_report(metrics)


@pytest.mark.parametrize("same, warned", [(79, False), (80, False), (81, True), (100, True)])
def test_one_class_warning_above_four_fifths(same, warned):
    metrics = metrics_of([0, 1] * 50, [1] * same + [0] * (100 - same))
    line = one_class_warning(metrics)
    assert (line is not None) == warned
    if warned:
        assert f"{same}%" in line and "'happy'" in line and "50%" in line and "\n" not in line


def test_report_in_percent():
    lines = format_report(metrics_of([0, 0, 0, 0, 1, 1, 2, 2, 2, 2], [0, 0, 0, 1, 1, 2, 2, 2, 0, 2], split="val"))
    rows = lines.splitlines()
    assert rows[0] == "Split: val, 10 pictures"
    assert rows[1] == "Accuracy: 70.00% (95% interval 39.68 to 89.22)"
    assert "Macro F1: 66.67%" in rows[2] and "Balanced accuracy: 66.67%" in rows[2]
    assert rows[-2].split() == ["happy", "50.00%", "50.00%", "50.00%", "2"]
    assert len({len(row) for row in rows[5:]}) == 1 and lines.endswith("\n")  # the table stands in columns


def test_report_of_long_names_stands_in_columns():
    rows = format_report(metrics_of([0, 1], [0, 1], ["a", "a very long name of a class indeed"])).splitlines()
    assert len({len(row) for row in rows[5:]}) == 1


# Plots


def assert_picture(path, least=200):
    """A PNG of a plausible size that shows something."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB"))
    assert least <= min(pixels.shape[:2]) and max(pixels.shape[:2]) < 6000
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10 and (pixels < 128).any() and pixels.std() > 5
    return pixels


def history_of(epochs):
    rows = range(1, epochs + 1)
    return [
        {
            "epoch": n,
            "lr": 1e-3,
            "train_loss": 1 / n,
            "train_acc": 1 - 1 / n,
            "val_loss": 1.1 / n,
            "val_acc": 1 - 1.1 / (n + 1),
        }
        for n in rows
    ]


NAME_SETS = [
    NAMES,
    ["a$b", "$c$ d", r"\$e"],
    ["x_1^2", "{curly}", r"\alpha", "100%"],
    ["a" * 60, "b", "c"],
    [f"class {number}" for number in range(9)],
    ["wütend", "traurig", "fröhlich"],
]


@pytest.mark.parametrize("names", NAME_SETS, ids=lambda names: names[0][:10])
def test_confusion_matrix(names, tmp_path):
    count = len(names)
    metrics = metrics_of(list(range(count)) * 3, list(range(count)) * 2 + [0] * count, names)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reports.plot_confusion_matrix(metrics, tmp_path / "matrix.any name")
    pixels = assert_picture(tmp_path / "matrix.any name")
    blue = (pixels[..., 2] > pixels[..., 0] + 80).mean()
    assert blue > 0.005  # the cells can be seen


def test_confusion_matrix_with_an_absent_class(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reports.plot_confusion_matrix(metrics_of([0, 0, 1], [0, 2, 1]), tmp_path / "matrix.png")
    assert_picture(tmp_path / "matrix.png")


@pytest.mark.parametrize("epochs", [1, 30])
def test_history(epochs, tmp_path):
    reports.plot_history(history_of(epochs), tmp_path / "history.png", title="cnn4 on $faces$ and $5")
    assert_picture(tmp_path / "history.png")


def test_history_marks_the_epoch_that_was_saved(tmp_path, monkeypatch):
    history = history_of(4)
    for row, acc, loss in zip(history, (0.5, 0.7, 0.7, 0.6), (1.0, 0.9, 0.8, 0.1), strict=True):
        row["val_acc"], row["val_loss"] = acc, loss
    from matplotlib.axes import Axes

    marked, draw = [], Axes.axvline
    monkeypatch.setattr(Axes, "axvline", lambda self, x, **options: marked.append(x) or draw(self, x, **options))
    reports.plot_history(history, tmp_path / "history.png", title="t")
    assert marked == [3, 3]


@pytest.mark.parametrize("count", [1, 6])
@pytest.mark.parametrize("shape", [(24, 24), (24, 24, 3)], ids=["gray", "colour"])
def test_samples(count, shape, tmp_path):
    rng = np.random.default_rng(0)
    samples = [
        (rng.integers(0, 256, shape, dtype=np.uint8), ("", "happy", "a$b$c")[number % 3], "happy", 100 * rng.random())
        for number in range(count)
    ]
    reports.plot_samples(samples, tmp_path / "samples.png", title="3 of $5$")
    assert_picture(tmp_path / "samples.png")


def test_samples_show_gray_values_as_they_are(tmp_path):
    picture = np.full((24, 24), 100, np.uint8)
    picture[0, 0] = 140  # stretched to the range of the picture, the rest would be black
    reports.plot_samples([(picture, "", "happy", 50.0)], tmp_path / "samples.png", title="t")
    pixels = assert_picture(tmp_path / "samples.png", least=100)
    assert (pixels == 100).all(-1).mean() > 0.2


def test_drawing_keeps_no_figures_and_needs_no_display(tmp_path, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    import matplotlib
    from matplotlib import pyplot

    before, backend = pyplot.get_fignums(), matplotlib.rcParams._get("backend")
    reports.plot_confusion_matrix(metrics_of([0, 1, 2], [0, 1, 2]), tmp_path / "matrix.png")
    reports.plot_history(history_of(3), tmp_path / "history.png", title="t")
    assert pyplot.get_fignums() == before and matplotlib.rcParams._get("backend") == backend


@pytest.mark.parametrize("names", [NAMES, ["fröhlich", "日本", "x"]], ids=["plain", "letters"])
def test_result_files(names, tmp_path):
    metrics = metrics_of([0, 1, 2, 2], [0, 1, 2, 0], names)
    files = result_files(metrics)
    assert set(files) == {"confusion_matrix.png", "reliability.png", "classification_report.txt", "metrics.json"}
    for name, write in files.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of letters that the font lacks
            write(tmp_path / name)
    assert_picture(tmp_path / "confusion_matrix.png")
    assert_picture(tmp_path / "reliability.png")
    assert json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8")) == metrics
    text = (tmp_path / "classification_report.txt").read_text(encoding="utf-8")
    assert "75.00%" in text and names[0] in text


def test_accuracy_without_copies():
    labels, preds = [0, 0, 1, 1, 2], [0, 1, 1, 1, 0]
    options = {"split": "test", "copies": np.array([True, False, False, True, False])}
    metrics = compute_metrics(np.array(labels), log_probs_of(preds, 3), ["a", "b", "c"], **options)
    assert metrics["accuracy"] == 0.6
    assert metrics["without_copies"]["count"] == 3 and metrics["without_copies"]["accuracy"] == pytest.approx(1 / 3)
    assert "Without the 2 pictures that stand in train/ too: 33.33% of 3" in format_report(metrics)
    options["copies"] = np.zeros(5, bool)
    metrics = compute_metrics(np.array(labels), log_probs_of(preds, 3), ["a", "b", "c"], **options)
    assert "without_copies" not in metrics and "stand in train" not in format_report(metrics)


def test_confusion_matrix_of_many_classes_has_a_limited_size(tmp_path):
    names = [f"class {number}" for number in range(200)]
    labels = np.arange(200)
    metrics = compute_metrics(labels, log_probs_of(labels, 200), names, split="test")
    reports.plot_confusion_matrix(metrics, tmp_path / "matrix.png")
    with Image.open(tmp_path / "matrix.png") as image:
        assert max(image.size) < 5000
