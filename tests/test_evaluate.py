"""evaluate_emotion.py: it agrees with training, matches classes by name, and writes only where it is told to."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_folder
from PIL import Image
from test_predict import write_checkpoint

import evaluate_emotion
import train_emotion_cnn
from checkpoints import BEST_NAME, save_checkpoint
from console import run_script
from inference import predict_probs
from models import create_model
from predict_emotion import load_model, predict_images
from preprocessing import read_image

REPO = Path(__file__).resolve().parent.parent
NAMES = ["angry", "happy", "sad"]
FILES = {"classification_report.txt", "metrics.json", "confusion_matrix.png", "reliability.png"}


def train(root, *args):
    folders = ["--data-dir", root / "data", "--output-dir", root / "out", "--cache-dir", root / "cache"]
    argv = [*folders, "--arch", "cnn4_bn", "--batch-size", "16", "--epochs", "3", *args]
    train_emotion_cnn.main([str(arg) for arg in argv])
    return root


@pytest.fixture(scope="module")
def with_share(tmp_path_factory):
    """Folder of a run that validated on a share of train/: data/, out/."""
    root = tmp_path_factory.mktemp("share")
    draw_folder(root / "data" / "train", {"angry": 16, "happy": 12, "sad": 10})
    draw_folder(root / "data" / "test", {"angry": 6, "happy": 5, "sad": 7})
    return train(root, "--val-fraction", "0.3", "--seed", "4")


@pytest.fixture(scope="module")
def with_val(tmp_path_factory):
    """Folder of a run that validated on val/, with averaged weights and a network of three channels."""
    root = tmp_path_factory.mktemp("val")
    draw_folder(root / "data" / "train", {"angry": 10, "happy": 12, "sad": 9})
    draw_folder(root / "data" / "val", {"angry": 5, "happy": 6})
    draw_folder(root / "data" / "test", {"angry": 4, "happy": 4, "sad": 4})
    return train(root, "--arch", "cnn6_rgb", "--ema", "0.9")


@pytest.fixture
def run(capsys, tmp_path):
    """Runs main as the script does; returns (exit code, standard output, standard error)."""

    def run_main(root, *args):
        capsys.readouterr()
        argv = ["--checkpoint", root / "out" / BEST_NAME, *args]
        with pytest.raises(SystemExit) as stop:
            run_script(lambda: evaluate_emotion.main([str(arg) for arg in argv]))
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return run_main


@pytest.fixture
def measure(run, tmp_path):
    """Evaluates into a folder of its own; returns the metrics."""

    def run_and_read(root, *args):
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        code, _, err = run(root, *args, "--output-dir", folder)
        assert (code, err) == (0, "")
        return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))

    return run_and_read


def probabilities(root, folder, flipped=False):
    """(labels, probabilities) of the pictures in a folder, one after the other."""
    model, names = load_model(root / "out" / BEST_NAME, device="cpu")
    paths = sorted(folder.glob("*/*.png"))
    images = torch.from_numpy(np.stack([read_image(path, model.input_spec) for path in paths]))
    probs = predict_probs(model, images.flip(-1) if flipped else images)
    return np.array([names.index(path.parent.name) for path in paths]), probs.numpy()


def assert_measures(metrics, labels, probs):
    assert metrics["count"] == len(labels)
    assert metrics["accuracy"] == pytest.approx((probs.argmax(1) == labels).mean())
    assert metrics["loss"] == pytest.approx(-np.log(probs[np.arange(len(labels)), labels]).mean(), rel=1e-4)


def assert_one_line(err, *words):
    assert "Traceback" not in err
    assert err.count("\n") == 1 and "error: " in err, err
    for word in words:
        assert word in err


# Agreement with training


@pytest.mark.parametrize("name", ["with_share", "with_val"])
def test_it_agrees_with_the_report_of_training(request, measure, name):
    root = request.getfixturevalue(name)
    metrics = measure(root, "--data-dir", root / "data")
    trained = json.loads((root / "out" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["split"] == "test" and metrics["tta"] is False
    for key in (
        "count",
        "accuracy",
        "accuracy_interval",
        "macro_f1",
        "balanced_accuracy",
        "per_class",
        "class_names",
        "confusion_matrix",
        "arch",
        "epoch",
    ):
        assert metrics[key] == trained[key], key
    assert metrics["loss"] == pytest.approx(trained["loss"], rel=1e-5)
    assert_measures(metrics, *probabilities(root, root / "data" / "test"))


@pytest.mark.parametrize(("name", "count"), [("with_share", 12), ("with_val", 11)])
def test_validation_is_reproduced(request, measure, name, count):
    root = request.getfixturevalue(name)
    metrics = measure(root, "--data-dir", root / "data", "--split", "val")
    stored = torch.load(root / "out" / BEST_NAME, weights_only=True)["metrics"]
    assert (metrics["split"], metrics["count"]) == ("val", count)
    assert metrics["accuracy"] == pytest.approx(stored["val_acc"], abs=1e-6)
    assert metrics["uncalibrated"]["loss"] == pytest.approx(stored["val_loss"], rel=1e-5)


@pytest.mark.parametrize(("name", "count"), [("with_share", 26), ("with_val", 31)])
def test_split_train_leaves_validation_out(request, measure, name, count):
    root = request.getfixturevalue(name)
    metrics = measure(root, "--data-dir", root / "data", "--split", "train")
    assert (metrics["split"], metrics["count"]) == ("train", count)


def test_batch_size_changes_nothing(with_share, measure):
    left, right = (measure(with_share, "--data-dir", with_share / "data", "--batch-size", n) for n in (1, 7))
    assert left["confusion_matrix"] == right["confusion_matrix"]
    assert left["loss"] == pytest.approx(right["loss"], rel=1e-5)


def test_tta_averages_over_the_mirrored_picture(with_share, measure, run):
    test = with_share / "data" / "test"
    labels, probs = probabilities(with_share, test)
    _, mirrored = probabilities(with_share, test, flipped=True)
    metrics = measure(with_share, "--data-dir", with_share / "data", "--tta")
    assert metrics["tta"] is True
    assert_measures(metrics, labels, (probs + mirrored) / 2)
    plain = measure(with_share, "--data-dir", with_share / "data")
    assert abs(metrics["loss"] - plain["loss"]) > 1e-5
    assert "mirrored" in run(with_share, "--data-dir", with_share / "data", "--tta")[1]


def test_temperature_is_applied(with_share, measure, tmp_path):
    checkpoint = torch.load(with_share / "out" / BEST_NAME, weights_only=True)
    (tmp_path / "out").mkdir()
    save_checkpoint(checkpoint | {"temperature": 3.0}, tmp_path / "out" / BEST_NAME)
    labels, probs = probabilities(with_share, with_share / "data" / "test")
    softer = probs ** (checkpoint["temperature"] / 3)
    metrics = measure(tmp_path, "--data-dir", with_share / "data")
    assert_measures(metrics, labels, softer / softer.sum(1, keepdims=True))
    assert metrics["temperature"] == 3.0 and metrics["calibration"] != metrics["uncalibrated"]
    assert metrics["uncalibrated"] == measure(with_share, "--data-dir", with_share / "data")["uncalibrated"]


# Folders and classes


def test_folder_that_itself_holds_class_folders(with_share, measure, tmp_path):
    shutil.copytree(with_share / "data" / "test", tmp_path / "meine Bilder ä")
    metrics = measure(with_share, "--data-dir", tmp_path / "meine Bilder ä")
    assert metrics["split"] == "meine Bilder ä"
    assert_measures(metrics, *probabilities(with_share, with_share / "data" / "test"))


def test_classes_are_matched_by_name(with_share, measure, tmp_path):
    """A folder with the last class only, whose first position is another class's for the network."""
    shutil.copytree(with_share / "data" / "test" / "sad", tmp_path / "some" / "sad")
    metrics = measure(with_share, "--data-dir", tmp_path / "some")
    full = measure(with_share, "--data-dir", with_share / "data")
    assert metrics["accuracy"] == metrics["balanced_accuracy"] == full["per_class"]["sad"]["recall"]
    assert [row["support"] for row in metrics["per_class"].values()] == [0, 0, 7]
    assert metrics["confusion_matrix"][2] == full["confusion_matrix"][2]


def test_unknown_class_is_refused_with_both_lists(with_share, run, tmp_path):
    draw_folder(tmp_path / "some", {"angry": 2, "contempt": 2})
    code, out, err = run(with_share, "--data-dir", tmp_path / "some")
    assert (code, out) == (2, "")
    assert_one_line(err, str(["angry", "contempt"]), str(NAMES))


def test_network_with_classes_in_another_order(with_share, measure, tmp_path):
    """Checkpoints carry their own order; folders come sorted."""
    checkpoint = torch.load(with_share / "out" / BEST_NAME, weights_only=True)
    state_dict, order = checkpoint["state_dict"], [2, 0, 1]
    for key in list(state_dict)[-2:]:
        state_dict[key] = state_dict[key][order]
    (tmp_path / "out").mkdir()
    changed = {"state_dict": state_dict, "class_names": [NAMES[position] for position in order]}
    save_checkpoint(checkpoint | changed, tmp_path / "out" / BEST_NAME)
    metrics = measure(tmp_path, "--data-dir", with_share / "data")
    expected = measure(with_share, "--data-dir", with_share / "data")
    assert metrics["class_names"] == ["sad", "angry", "happy"]
    assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert {name: row["recall"] for name, row in metrics["per_class"].items()} == {
        name: row["recall"] for name, row in expected["per_class"].items()
    }


def test_unreadable_pictures(with_share, run, tmp_path):
    shutil.copytree(with_share / "data" / "test", tmp_path / "some")
    (tmp_path / "some" / "sad" / "broken.png").write_bytes(b"no picture")
    code, out, _ = run(with_share, "--data-dir", tmp_path / "some")
    assert code == 0
    assert "broken.png" in out and "left out 1 of 19" in out and "18 pictures" in out
    code, _, err = run(with_share, "--data-dir", tmp_path / "some", "--strict")
    assert code == 2
    assert_one_line(err, "broken.png", "--strict")


# What is written


def test_files_are_written_only_where_asked(with_share, run, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = sorted((path, path.stat().st_mtime_ns) for path in with_share.rglob("*"))
    code, out, err = run(with_share, "--data-dir", with_share / "data")
    assert (code, err) == (0, "")
    assert os.listdir() == []
    report = out.partition("\n")[2].strip()
    assert "Accuracy: " in report and "Split: test, 18 pictures" in report
    assert run(with_share, "--data-dir", with_share / "data", "--output-dir", "new/folder")[0] == 0
    assert {path.name for path in Path("new/folder").iterdir()} == FILES
    assert Path("new/folder/classification_report.txt").read_text(encoding="utf-8").strip() in out
    with Image.open("new/folder/confusion_matrix.png") as image:
        image.load()
        assert min(image.size) > 400
    assert sorted((path, path.stat().st_mtime_ns) for path in with_share.rglob("*")) == before


def test_a_report_is_never_written_over(with_share, run, tmp_path):
    options = ["--data-dir", with_share / "data", "--output-dir", tmp_path / "report"]
    assert run(with_share, *options, "--split", "train")[0] == 0
    before = (tmp_path / "report" / "metrics.json").read_bytes()
    code, out, err = run(with_share, *options, "--split", "val")
    assert (code, out, err.count("\n")) == (2, "", 1) and "--output-dir" in err
    assert (tmp_path / "report" / "metrics.json").read_bytes() == before


def test_the_script_itself(with_share, tmp_path):
    """Its defaults: the best checkpoint and test/ of the current folder."""
    shutil.copytree(with_share / "data" / "test", tmp_path / "test")
    shutil.copy(with_share / "out" / BEST_NAME, tmp_path)
    done = subprocess.run(
        [sys.executable, str(REPO / "evaluate_emotion.py")],
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert (done.returncode, done.stderr) == (0, f"using {BEST_NAME}\n")
    report = (with_share / "out" / "classification_report.txt").read_text(encoding="utf-8")
    assert report in done.stdout


# Mistakes


def test_missing_splits(with_share, run, tmp_path):
    shutil.copytree(with_share / "data" / "test", tmp_path / "some" / "test")
    shutil.copytree(with_share / "data" / "train", tmp_path / "other" / "train")
    for folder, split in (("some", "val"), ("some", "train"), ("other", "test")):
        code, out, err = run(with_share, "--data-dir", tmp_path / folder, "--split", split)
        assert (code, out) == (2, "")
        assert_one_line(err, str(tmp_path / folder / split), "--split")
    (tmp_path / "empty").mkdir()
    for folder in ("none", "empty"):
        code, _, err = run(with_share, "--data-dir", tmp_path / folder)
        assert code == 2
        assert_one_line(err, str(tmp_path / folder))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--split", "all"], ["--split", "all", "test"]),
        (["--batch-size", "0"], ["--batch-size", "0"]),
        (["--batch-size", "many"], ["--batch-size", "many"]),
        (["--device", "warp"], ["--device", "warp"]),
        (["--device", "cpu", "--precision", "fp16"], ["--precision", "fp16"]),
        (["--checkpoint", "none.pth"], ["none.pth"]),
        (["picture.png"], ["picture.png"]),
    ],
)
def test_mistakes(with_share, run, tmp_path, args, words):
    code, _, err = run(with_share, "--data-dir", with_share / "data", *args)
    assert code == 2
    assert_one_line(err, *words)


def test_weights_in_the_layouts_of_other_tools_are_sent_to_training(run, tmp_path):
    weights = create_model("cnn4_bn", 3).state_dict()
    layouts = [
        {"state_dict": weights, "class_names": NAMES},
        {"model_state_dict": weights, "classes": NAMES},
        {"model": weights, "class_to_idx": {}},
        {f"module.{key}": value for key, value in weights.items()},
    ]
    draw_folder(tmp_path / "test", {"angry": 1, "happy": 1})
    for layout in layouts:
        torch.save(layout, tmp_path / "other.pth")
        code, out, err = run(tmp_path, "--checkpoint", tmp_path / "other.pth", "--data-dir", tmp_path)
        assert (code, out) == (2, "")
        assert_one_line(err, "other.pth", "--weights")


def test_output_folder_that_cannot_be_written(with_share, run, tmp_path):
    (tmp_path / "file").write_text("no folder")
    code, _, err = run(with_share, "--data-dir", with_share / "data", "--output-dir", tmp_path / "file")
    assert code == 2
    assert_one_line(err, str(tmp_path / "file"))


@pytest.mark.parametrize("copies", [8, 9])
def test_a_network_that_says_one_class_is_named(run, tmp_path, copies):
    """One picture, of which there are copies, gets one answer: 8 of 10 predictions are no reason to warn, 9 are."""
    pictures = sorted(draw_folder(tmp_path / "drawn", {"happy": 20}).glob("*/*.png"))
    (tmp_path / "out").mkdir()
    model, names = load_model(write_checkpoint(tmp_path / "out" / BEST_NAME))
    answers = [answer[0] for answer in predict_images(model, pictures, names)]
    other = next(path for path, answer in zip(pictures, answers, strict=True) if answer != answers[0])
    (tmp_path / "set" / "happy").mkdir(parents=True)
    for number in range(10):
        shutil.copy(pictures[0] if number < copies else other, tmp_path / "set" / "happy" / f"{number}.png")
    code, out, err = run(tmp_path, "--data-dir", tmp_path / "set")
    assert code == 0, err
    assert (f"of the predictions are {answers[0]!r}" in out + err) == (copies == 9)


def test_accuracy_without_training_pictures_is_told(with_val, measure, tmp_path):
    """As training tells it; a picture of train/ in test/ is counted, others are measured without it."""
    shutil.copytree(with_val / "data", tmp_path / "data")
    assert "without_copies" not in measure(with_val, "--data-dir", tmp_path / "data")
    shutil.copy(tmp_path / "data" / "train" / "sad" / "sad_000.png", tmp_path / "data" / "test" / "happy" / "copy.png")
    metrics = measure(with_val, "--data-dir", tmp_path / "data")
    labels, probs = probabilities(with_val, with_val / "data" / "test")
    assert (metrics["count"], metrics["without_copies"]["count"]) == (len(labels) + 1, len(labels))
    assert metrics["without_copies"]["accuracy"] == pytest.approx((probs.argmax(1) == labels).mean())


def test_leaks_of_every_size_are_told(with_val, run, tmp_path):
    """All of test/ in train/; and a train/ that can't be read, which is no reason not to measure test/."""
    shutil.copytree(with_val / "data" / "train", tmp_path / "data" / "train")
    shutil.copytree(tmp_path / "data" / "train", tmp_path / "data" / "test")
    code, out, err = run(with_val, "--data-dir", tmp_path / "data")
    assert code == 0 and "31 of 31 pictures in test/ stand in train/ too" in out, err
    shutil.rmtree(tmp_path / "data" / "train")
    (tmp_path / "data" / "train" / "happy").mkdir(parents=True)
    code, out, err = run(with_val, "--data-dir", tmp_path / "data")
    assert code == 0 and "copies of training pictures were not looked for" in out and "Accuracy" in out, err
