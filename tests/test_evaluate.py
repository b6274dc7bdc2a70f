"""evaluate_emotion.py: it agrees with training, matches classes by name, and writes only if it is told to."""

import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import assert_refused, draw_folder, run, run_process
from test_train import read_metrics, train

from checkpoints import BEST_NAME, save_checkpoint
from evaluate_emotion import main
from models import create_model, last_layer_name
from reports import METRICS_FILES

NAMES = ["angry", "happy", "sad"]


def train_on(counts, root, *args):
    for split, numbers in counts.items():
        draw_folder(root / "data" / split, dict(zip(NAMES, numbers, strict=False)))
    train(root / "data", root / "out", "--cache-dir", root / "cache", "--epochs", 2, *args)
    return root


@pytest.fixture(scope="module")
def with_share(tmp_path_factory):
    counts = {"train": (16, 12, 10), "test": (6, 5, 7)}
    return train_on(counts, tmp_path_factory.mktemp("share"), "--val-fraction", 0.3, "--seed", 4)


@pytest.fixture(scope="module")
def with_val(tmp_path_factory):
    counts = {"train": (10, 12, 9), "val": (5, 6), "test": (4, 4, 4)}
    return train_on(counts, tmp_path_factory.mktemp("val"), "--arch", "cnn6_rgb", "--ema", 0.9)


def evaluate(root, data_dir, *args):
    code, out, err = run(main, "--checkpoint", root / "out" / BEST_NAME, "--data-dir", data_dir, *args)
    assert (code, err) == (0, "")
    return out


def measure(*args):
    with tempfile.TemporaryDirectory() as folder:
        evaluate(*args, "--output-dir", folder)
        return read_metrics(Path(folder))


@pytest.mark.parametrize(("name", "val", "others"), [("with_share", 12, 26), ("with_val", 11, 31)])
def test_it_agrees_with_training(request, name, val, others):
    root = request.getfixturevalue(name)
    found = {split: measure(root, root / "data", "--split", split) for split in ("test", "val", "train")}
    trained = read_metrics(root / "out")
    assert found["test"]["loss"] == pytest.approx(trained["loss"], rel=1e-5) and found["test"]["tta"] is False
    exact = found["test"].keys() & trained.keys() - {"loss", "calibration", "uncalibrated"}
    assert len(exact) == 12 and {key: found["test"][key] for key in exact} == {key: trained[key] for key in exact}
    counts = {split: (metrics["split"], metrics["count"]) for split, metrics in found.items()}
    assert counts == {"test": ("test", trained["count"]), "val": ("val", val), "train": ("train", others)}
    assert found["val"]["accuracy"] == pytest.approx(trained["val"]["val_acc"], abs=1e-6)
    assert found["val"]["uncalibrated"]["loss"] == pytest.approx(trained["val"]["val_loss"], rel=1e-5)
    metrics = measure(root, root / "data", "--tta", "--batch-size", 7)
    assert metrics["tta"] is True and abs(metrics["loss"] - trained["loss"]) > 1e-5


def test_classes_in_another_order_are_matched_by_name(with_share, tmp_path):
    checkpoint, order = torch.load(with_share / "out" / BEST_NAME, weights_only=True), [2, 0, 1]
    for name in ("weight", "bias"):
        key = f"{last_layer_name(create_model('cnn4_bn', 3))}.{name}"
        checkpoint["state_dict"][key] = checkpoint["state_dict"][key][order]
    (tmp_path / "out").mkdir()
    changed = {"class_names": [NAMES[position] for position in order], "temperature": 3.0}
    save_checkpoint(checkpoint | changed, tmp_path / "out" / BEST_NAME)
    full, expected = measure(tmp_path, with_share / "data"), measure(with_share, with_share / "data")
    assert full["class_names"] == ["sad", "angry", "happy"] and full["per_class"] == expected["per_class"]
    assert full["temperature"] == 3.0 and full["loss"] != expected["loss"]  # which the temperature alone changes
    assert full["uncalibrated"]["loss"] == pytest.approx(expected["uncalibrated"]["loss"], rel=1e-5)


def test_duplicates_and_unreadable_images(with_val, tmp_path):
    """As in training: an image of train/ in test/ is counted, and accuracy is given without it too."""
    clean = measure(with_val, with_val / "data")
    data = shutil.copytree(with_val / "data", tmp_path / "data")
    shutil.copy(data / "train" / "sad" / "sad_000.png", data / "test" / "happy" / "again.png")
    (data / "test" / "sad" / "broken.png").write_bytes(b"no image")
    metrics = measure(with_val, data)
    assert "without_duplicates" not in clean and metrics["count"] == 13
    assert metrics["without_duplicates"] == {key: clean[key] for key in metrics["without_duplicates"]}
    out = evaluate(with_val, data)
    assert "warning: 1 of 13 " in out and out.count("also in train/") == 2 and "left out 1 of 14" in out
    words = ["--checkpoint", with_val / "out" / BEST_NAME, "--data-dir", data, "--strict"]
    assert_refused(main, words, "broken.png", "--strict")


def test_files_are_written_only_with_output_dir_and_never_over_a_report(with_share, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted((path, path.stat().st_mtime_ns) for path in with_share.rglob("*"))
    out = evaluate(with_share, with_share / "data")
    assert list(tmp_path.iterdir()) == []
    report = (with_share / "out" / "classification_report.txt").read_text(encoding="utf-8")
    assert out == f"cnn4_bn, trained on data\n{report}\n"
    evaluate(with_share, with_share / "data", "--output-dir", "new/folder")
    assert {path.name for path in Path("new/folder").iterdir()} == set(METRICS_FILES)
    written = Path("new/folder/metrics.json").read_bytes()
    words = ["--checkpoint", with_share / "out" / BEST_NAME, "--data-dir", with_share / "data", "--split", "val"]
    assert_refused(main, [*words, "--output-dir", "new/folder"], "--output-dir", "new/folder", "metrics.json")
    assert Path("new/folder/metrics.json").read_bytes() == written
    assert sorted((path, path.stat().st_mtime_ns) for path in with_share.rglob("*")) == before


def test_the_script_itself(with_share, tmp_path):
    """Its defaults: the best checkpoint and test/ of the current folder."""
    shutil.copytree(with_share / "data" / "test", tmp_path / "test")
    shutil.copy(with_share / "out" / BEST_NAME, tmp_path)
    code, out, err = run_process(main, cwd=tmp_path)
    assert (code, err) == (0, f"using {BEST_NAME}\n")
    assert (with_share / "out" / "classification_report.txt").read_text(encoding="utf-8") in out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--batch-size", "0"], ["--batch-size", "0"]),
        (["--precision", "fp16", "--device", "cpu"], ["--precision", "fp16"]),
        (["--checkpoint", "none.pth"], ["none.pth"]),
        (["--checkpoint", "other.pth"], ["other.pth", "--weights"]),  # another tool's, which training can start from
        (["--data-dir", "tests", "--split", "val"], ["tests", "val", "--split"]),
        (["--data-dir", "empty"], ["empty"]),
        (["--data-dir", "unknown"], [["angry", "contempt"], NAMES]),
    ],
)
def test_mistakes(with_share, tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "tests/test/angry", "unknown/angry", "unknown/contempt"):
        Path(folder).mkdir(parents=True)
    torch.save({"state_dict": create_model("cnn4_bn", 3).state_dict(), "classes": NAMES}, "other.pth")
    assert_refused(main, ["--checkpoint", with_share / "out" / BEST_NAME, "--data-dir", with_share, *args], *words)
