"""train_emotion_cnn.py from end to end: what it writes, that it resumes, and what it refuses."""

import csv
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_folder, draw_picture, interrupt, run_as_user
from PIL import Image

import train_emotion_cnn
from checkpoints import BEST_NAME, FINAL_NAME
from console import run_script
from models import create_model, input_spec_for
from predict_emotion import load_model, predict_images
from splits import load_splits

REPO = Path(__file__).resolve().parent.parent
SCRIPT = str(REPO / "train_emotion_cnn.py")
FILES = {
    BEST_NAME,
    FINAL_NAME,
    "training_history.csv",
    "training_history.png",
    "confusion_matrix.png",
    "reliability.png",
    "classification_report.txt",
    "metrics.json",
}
COUNTS = {"angry": 16, "happy": 14, "sad": 10}
SMALL = ["--arch", "cnn4_bn", "--batch-size", "16"]
KEYS = {
    "format_version",
    "arch",
    "num_classes",
    "class_names",
    "input_spec",
    "temperature",
    "trained_on",
    "state_dict",
    "epoch",
    "metrics",
    "config",
}
RESUME_KEYS = {
    "train_state_dict",
    "optimizer",
    "scheduler",
    "scaler",
    "ema",
    "rng",
    "history",
    "best_metric",
    "early_stopping",
    "class_weights",
    "split_hash",
    "teacher_hashes",
}
TIMES = {"images_per_s", "seconds"}

posix_only = pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal or sets POSIX permissions")


@pytest.fixture(autouse=True)
def one_thread():
    """The processes that tests start get one thread too, so that their results are the same bit for bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def data(tmp_path):
    draw_folder(tmp_path / "data" / "train", COUNTS)
    draw_folder(tmp_path / "data" / "test", dict.fromkeys(COUNTS, 5))
    return tmp_path / "data"


@pytest.fixture
def run(capsys):
    """Runs main as the script does; returns (exit code, standard output, standard error)."""

    def run_main(*args):
        with pytest.raises(SystemExit) as stop:
            run_script(lambda: train_emotion_cnn.main([str(arg) for arg in args]))
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return run_main


@pytest.fixture
def train(run):
    """Trains the small network and returns its final checkpoint."""

    def run_training(data, output_dir, *args):
        code, _, err = run("--data-dir", data, "--output-dir", output_dir, *SMALL, *args)
        assert code == 0, err
        return load(output_dir / FINAL_NAME)

    return run_training


@pytest.fixture
def refuse(run):
    """Asserts that a command ends with 2 and one line on standard error that holds `words`."""

    def run_refused(*args, words=()):
        code, _, err = run(*args)
        assert code == 2, err
        assert_one_line(err, words)

    return run_refused


def assert_one_line(err, words=()):
    assert "Traceback" not in err
    assert err.count("\n") == 1 and "error: " in err, err
    for word in words:
        assert word in err


def environment(cache):
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8", "XDG_CACHE_HOME": str(cache)}


def start(*args, cwd, **options):
    """The script in a process that Ctrl-C reaches, whatever started these tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [sys.executable, SCRIPT, *map(str, args)],
            cwd=cwd,
            encoding="utf-8",
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(cwd / "cache"),
            **options,
        )
    finally:
        signal.signal(signal.SIGINT, before)


def wait_for_line(process, beginning):
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(beginning):
            return
    raise AssertionError("".join(lines) + process.stderr.read())


def load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def same(left, right):
    """Whether two checkpoints hold the same, bit for bit, but for how long things took."""
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        keys = left.keys() - TIMES
        return keys == right.keys() - TIMES and all(same(left[key], right[key]) for key in keys)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(same(*pair) for pair in zip(left, right, strict=True))
    return left == right


def differing(left, right):
    """The keys of two checkpoints whose values differ."""
    return {key for key in left.keys() | right.keys() if not same(left.get(key, math.nan), right.get(key, math.nan))}


def read_history(folder):
    with (folder / "training_history.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read_metrics(folder):
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


# One run with everything at its default but the network and the number of epochs


@pytest.fixture(scope="module")
def default_run(tmp_path_factory):
    """(folder with train/ and test/ that the script ran in, what it printed)."""
    folder = tmp_path_factory.mktemp("default")
    draw_folder(folder / "train", COUNTS)
    draw_folder(folder / "test", {"angry": 6, "happy": 5, "sad": 4})
    process = start("--arch", "cnn4_bn", "--epochs", 3, cwd=folder)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "Warning" not in err
    return folder, out


def test_all_files_are_written_and_named(default_run):
    folder, out = default_run
    assert {path.name for path in folder.iterdir()} == FILES | {"train", "test", "cache"}
    assert all(name in out for name in FILES)
    for name in ("training_history.png", "confusion_matrix.png"):
        with Image.open(folder / name) as image:
            image.load()
            assert image.format == "PNG" and min(image.size) > 400
    assert (folder / "classification_report.txt").read_text(encoding="utf-8") in out


def test_what_is_printed(default_run):
    _, out = default_run
    assert "36 pictures to train, 4 to validate (10% of train/), 15 to test" in out
    assert "3 classes: angry, happy, sad" in out
    assert all(f"epoch {number}/3" in out for number in (1, 2, 3))


def test_history_csv(default_run):
    folder, _ = default_run
    rows = read_history(folder)
    assert list(rows[0]) == ["epoch", "lr", "train_loss", "train_acc", "val_loss", "val_acc", "images_per_s", "seconds"]
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    kept = load(folder / FINAL_NAME)["history"]
    assert [{key: float(value) for key, value in row.items()} for row in rows] == kept
    for row in kept:
        for name, count in (("train_acc", 36), ("val_acc", 4)):  # shares of pictures, not means over batches
            assert abs(row[name] * count - round(row[name] * count)) < 1e-4 and 0 <= row[name] <= 1
        assert row["lr"] == 1e-3 and row["train_loss"] > 0 and row["val_loss"] > 0


def test_temperature_is_fitted_on_validation(run, tmp_path):
    draw_folder(tmp_path / "train", {"happy": 60, "sad": 60})
    draw_folder(tmp_path / "val", {"happy": 60, "sad": 60})
    assert run("--data-dir", tmp_path, "--output-dir", tmp_path / "out", *SMALL, "--epochs", 4)[0] == 0
    best, metrics = load(tmp_path / "out" / BEST_NAME), json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert best["temperature"] == metrics["temperature"] > 1.05  # noise learnt by heart: the network is too certain
    assert load(tmp_path / "out" / FINAL_NAME)["temperature"] == 1.0
    assert metrics["uncalibrated"]["loss"] == pytest.approx(best["metrics"]["val_loss"], rel=1e-4)
    assert metrics["loss"] == metrics["calibration"]["loss"] < metrics["uncalibrated"]["loss"]
    assert metrics["calibration"]["ece"] < metrics["uncalibrated"]["ece"]


def test_temperature_stays_one_with_few_pictures_to_fit_it_on(default_run):
    assert load(default_run[0] / BEST_NAME)["temperature"] == 1.0


def test_what_deploys_names_no_folder_of_the_machine(default_run):
    folder, _ = default_run
    best, final = load(folder / BEST_NAME)["config"], load(folder / FINAL_NAME)["config"]
    assert str(folder) not in str(best) and str(folder) in str(final)
    assert set(final) - set(best) == {"data_dir", "cache_dir", "tensorboard"}


def test_a_window_needs_a_network_that_takes_any_size(refuse):
    refuse("--arch", "cnn4_bn", "--augment", "window=0.8", words=["--augment", "window", "cnn4_bn"])


def test_best_is_chosen_on_validation(default_run):
    folder, _ = default_run
    rows = load(folder / FINAL_NAME)["history"]
    expected = max(rows, key=lambda row: (row["val_acc"], -row["val_loss"]))
    best = load(folder / BEST_NAME)
    assert best["epoch"] == expected["epoch"]
    selected = {key: expected[key] for key in ("val_loss", "val_acc", "train_loss", "train_acc")}
    metrics = read_metrics(folder)
    tested = {f"test_{key}": metrics[key] for key in ("accuracy", "macro_f1", "count")}
    assert best["metrics"] == selected | tested and tested["test_count"] == 15


def test_metrics_json(default_run):
    folder, _ = default_run
    metrics, best = read_metrics(folder), load(folder / BEST_NAME)
    matrix = np.array(metrics["confusion_matrix"])
    recall = matrix.diagonal() / matrix.sum(1)
    f1 = 2 * matrix.diagonal() / np.maximum(matrix.sum(0) + matrix.sum(1), 1)
    assert (metrics["split"], metrics["count"], metrics["arch"]) == ("test", 15, "cnn4_bn")
    assert matrix.sum(1).tolist() == [6, 5, 4]
    assert metrics["accuracy"] == pytest.approx(matrix.trace() / 15)
    low, high = metrics["accuracy_interval"]
    assert 0 <= low <= metrics["accuracy"] <= high <= 1 and high - low > 0.2
    assert metrics["macro_f1"] == pytest.approx(f1.mean())
    assert metrics["balanced_accuracy"] == pytest.approx(recall.mean())
    assert list(metrics["per_class"]) == metrics["class_names"] == ["angry", "happy", "sad"]
    assert [row["support"] for row in metrics["per_class"].values()] == [6, 5, 4]
    assert [row["recall"] for row in metrics["per_class"].values()] == pytest.approx(recall.tolist())
    selected = {key: value for key, value in best["metrics"].items() if not key.startswith("test_")}
    assert (metrics["val"], metrics["epoch"]) == (selected, best["epoch"])


def test_accuracy_is_what_prediction_gives(default_run):
    folder, _ = default_run
    model, class_names = load_model(folder / BEST_NAME, device="cpu")
    paths = sorted((folder / "test").glob("*/*.png"))
    predictions = predict_images(model, paths, class_names)
    right = sum(prediction[0] == path.parent.name for path, prediction in zip(paths, predictions, strict=True))
    metrics = read_metrics(folder)
    assert metrics["accuracy"] == right / len(paths)
    losses = [
        -math.log(all_probs[path.parent.name] / 100) for path, (_, _, all_probs) in zip(paths, predictions, strict=True)
    ]
    assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-4)


def test_checkpoints_hold_these_keys(default_run):
    folder, _ = default_run
    best, final = load(folder / BEST_NAME), load(folder / FINAL_NAME)
    assert set(best) == KEYS
    assert set(final) == KEYS | RESUME_KEYS
    spec = {"image_size": 48, "channels": 1, "mean": [0.5], "std": [0.5], "gray": False}
    assert (best["format_version"], best["arch"], best["num_classes"]) == (1, "cnn4_bn", 3)
    assert (best["class_names"], best["input_spec"]) == (["angry", "happy", "sad"], spec)
    assert final["temperature"] == 1.0
    assert best["trained_on"] == folder.name
    assert final["epoch"] == len(final["history"]) == 3
    assert best["state_dict"].keys() == create_model("cnn4_bn", 3).state_dict().keys()


def foreign_parts(value, path=""):
    """Where a checkpoint holds anything but tensors, numbers, strings, lists, tuples and dicts."""
    if isinstance(value, dict):
        return [bad for key, part in value.items() for bad in foreign_parts(part, f"{path}.{key}")]
    if isinstance(value, list | tuple):
        return [bad for number, part in enumerate(value) for bad in foreign_parts(part, f"{path}[{number}]")]
    return [] if value is None or type(value) in (torch.Tensor, int, float, str, bool) else [f"{path}: {type(value)}"]


def test_checkpoints_are_plain(default_run):
    folder, _ = default_run
    for name in (BEST_NAME, FINAL_NAME):
        checkpoint = load(folder / name)
        assert foreign_parts(checkpoint) == []
        assert all(key == key.removeprefix("module.").removeprefix("_orig_mod.") for key in checkpoint["state_dict"])


def test_same_seed_gives_the_same_weights_in_another_process(default_run, run, tmp_path):
    folder, _ = default_run
    assert run("--data-dir", folder, "--output-dir", tmp_path, "--arch", "cnn4_bn", "--epochs", "3")[0] == 0
    for name in (BEST_NAME, FINAL_NAME):
        assert differing(load(folder / name), load(tmp_path / name)) == set()


def test_another_seed_gives_other_weights(default_run, train, tmp_path):
    folder, _ = default_run
    left = train(folder, tmp_path / "a", "--epochs", 1, "--seed", 1)
    right = train(folder, tmp_path / "b", "--epochs", 1, "--seed", 2**31 - 1)
    assert not same(left["state_dict"], right["state_dict"])
    assert left["split_hash"] != right["split_hash"]


def test_a_finished_run_only_redoes_its_reports(default_run, run, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(default_run[0], folder, ignore=shutil.ignore_patterns("train", "test", "cache"))
    before = {name: (folder / name).read_bytes() for name in FILES}
    reports = FILES - {BEST_NAME, FINAL_NAME}
    for name in reports:
        (folder / name).unlink()
    code, out, err = run("--resume", folder / FINAL_NAME)
    assert (code, err) == (0, "")
    assert "finished" in out
    assert {name: (folder / name).read_bytes() for name in FILES} == before


def test_a_finished_run_resumed_elsewhere_leaves_there_all_that_it_names(default_run, run, tmp_path):
    code, out, _ = run("--resume", default_run[0] / FINAL_NAME, "--output-dir", tmp_path / "other")
    assert code == 0
    assert all(name in out for name in FILES)
    assert {path.name for path in (tmp_path / "other").iterdir()} == FILES


# Where validation and test come from


def mark_pictures(folder, shade):
    """Puts a pixel of this shade into a corner of every picture, to tell later where it came from."""
    for path in folder.glob("*/*.png"):
        image = Image.open(path)
        image.putpixel((0, 0), shade)
        image.save(path)


def corners(batches):
    return torch.cat([images[:, 0, 0, 0] for images, _ in batches.iterate(8)])


@pytest.mark.parametrize("has_val", [False, True])
def test_pictures_stay_in_their_split(data, has_val):
    if has_val:
        mark_pictures(draw_folder(data / "val", dict.fromkeys(COUNTS, 3)), 90)
    mark_pictures(data / "train", 30)
    mark_pictures(data / "test", 200)
    copies = [data / "train" / "happy" / f"copy{number}.png" for number in range(6)]
    for copy in copies:
        shutil.copy(data / "train" / "happy" / "happy_000.png", copy)
    splits = load_splits(data, input_spec_for("cnn4_bn"), torch.device("cpu"), val_fraction=0.3, seed=0)
    assert set(corners(splits.train).tolist()) == {30}
    assert set(corners(splits.val).tolist()) == {90 if has_val else 30}
    assert set(corners(splits.test).tolist()) == {200}
    if not has_val:
        sides = [
            {image.numpy().tobytes() for images, _ in part.iterate(8) for image in images}
            for part in (splits.train, splits.val)
        ]
        assert not sides[0] & sides[1]
        assert len(splits.train) + len(splits.val) == sum(COUNTS.values()) + 6
        assert splits.val.class_counts(3) == pytest.approx([0.3 * 16, 0.3 * 20, 0.3 * 10], abs=1)


def test_val_folder_is_used(data, run, tmp_path):
    draw_folder(data / "val", {"angry": 3, "sad": 4})  # a class that is missing there is fine
    code, out, _ = run("--data-dir", data, "--output-dir", tmp_path / "out", *SMALL, "--epochs", "1")
    assert code == 0
    assert "40 pictures to train, 7 to validate (val/), 15 to test" in out


def test_report_is_on_validation_without_test(data, run, tmp_path):
    shutil.rmtree(data / "test")
    folder = tmp_path / "out"
    code, out, _ = run("--data-dir", data, "--output-dir", folder, *SMALL, "--epochs", "2")
    assert code == 0
    metrics = read_metrics(folder)
    assert (metrics["split"], metrics["count"]) == ("val", 4)
    assert metrics["accuracy"] == pytest.approx(metrics["val"]["val_acc"], abs=1e-6)
    assert metrics["loss"] == pytest.approx(metrics["val"]["val_loss"], rel=1e-5)
    assert "Split: val" in (folder / "classification_report.txt").read_text(encoding="utf-8")
    assert "no test/" in out and "none to test" in out


def test_test_pictures_play_no_part_in_training(data, train, tmp_path):
    left = train(data, tmp_path / "a", "--epochs", 3)
    for number, path in enumerate(sorted((data / "test").glob("*/*.png"))):
        draw_picture(10_000 + number).save(path)
    right = train(data, tmp_path / "b", "--epochs", 3)
    assert differing(left, right) == set()
    best = [load(tmp_path / name / BEST_NAME) for name in ("a", "b")]
    assert differing(*best) <= {"metrics"}  # of test/
    assert read_metrics(tmp_path / "a")["val"] == read_metrics(tmp_path / "b")["val"]
    assert read_metrics(tmp_path / "a")["loss"] != read_metrics(tmp_path / "b")["loss"]


def test_test_is_matched_by_class_name(data, train, tmp_path):
    shutil.rmtree(data / "test" / "angry")
    train(data, tmp_path / "out", "--epochs", 1)
    support = {name: row["support"] for name, row in read_metrics(tmp_path / "out")["per_class"].items()}
    assert support == {"angry": 0, "happy": 5, "sad": 5}


def test_hidden_files_are_no_classes(data, run, tmp_path):
    for name in (".cache", "__MACOSX"):
        (data / "train" / name).mkdir()
    (data / "train" / "README.txt").write_text("no class")
    (data / "train" / "happy" / ".DS_Store").write_bytes(b"\0")
    (data / "train" / "happy" / "._happy_000.png").write_bytes(b"\0")
    code, out, _ = run("--data-dir", data, "--output-dir", tmp_path / "out", *SMALL, "--epochs", "1", "--strict")
    assert code == 0
    assert "3 classes: angry, happy, sad" in out
    assert "36 pictures to train, 4 to validate" in out


def test_unreadable_pictures_are_named_and_counted(data, run, tmp_path):
    (data / "train" / "happy" / "broken.png").write_bytes(b"no picture")
    whole = (data / "test" / "sad" / "sad_000.png").read_bytes()
    (data / "test" / "sad" / "cut.png").write_bytes(whole[: len(whole) // 2])
    command = ["--data-dir", data, "--output-dir", tmp_path / "out", *SMALL, "--epochs", "1"]
    for _ in range(2):  # the second run reads the cache, and must say it again
        code, out, _ = run(*command)
        assert code == 0
        assert str(data / "train" / "happy" / "broken.png") in out and str(data / "test" / "sad" / "cut.png") in out
        assert "left out 1 of 41 pictures" in out and "left out 1 of 16 pictures" in out
        assert "36 pictures to train, 4 to validate (10% of train/), 15 to test" in out
    code, _, err = run(*command, "--strict")
    assert code == 2
    assert_one_line(err, ["broken.png", "--strict"])


@pytest.mark.parametrize(("mode", "gray"), [("L", True), ("RGB", False)])
def test_three_channels_remember_whether_training_was_gray(tmp_path, train, mode, gray):
    draw_folder(tmp_path / "data" / "train", dict.fromkeys(COUNTS, 6), mode=mode)
    checkpoint = train(tmp_path / "data", tmp_path / "out", "--arch", "cnn6_rgb", "--epochs", 1)
    assert checkpoint["input_spec"]["gray"] is gray
    assert checkpoint["input_spec"]["channels"] == 3


@pytest.mark.parametrize(("prefix", "expected"), [("drawing_", "the sample set of drawings"), ("face_", "Köpfe")])
def test_trained_on_tells_the_sample_set(tmp_path, train, prefix, expected):
    for path in draw_folder(tmp_path / "Köpfe" / "train", dict.fromkeys(COUNTS, 6)).glob("*/*.png"):
        path.rename(path.with_name(prefix + path.name))
    assert train(tmp_path / "Köpfe", tmp_path / "out", "--epochs", 1)["trained_on"] == expected


# Options


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    """(data, final checkpoint of one epoch without any option)."""
    folder = tmp_path_factory.mktemp("plain")
    draw_folder(folder / "train", COUNTS)
    torch.set_num_threads(1)
    train_emotion_cnn.main(
        [
            "--data-dir",
            str(folder),
            "--output-dir",
            str(folder / "out"),
            *SMALL,
            "--epochs",
            "1",
            "--cache-dir",
            str(folder / "cache"),
        ]
    )
    return folder, load(folder / "out" / FINAL_NAME)


@pytest.mark.parametrize(
    "option",
    [
        "--sampler balanced",
        "--optimizer adamw --weight-decay 0.1",
        "--optimizer sgd",
        "--grad-accum 3",
        "--clip-grad 0.01",
        "--label-smoothing 0.2",
        "--mixup 0.2",
        "--dropout 0.1",
        "--schedule cosine",
        "--class-weights balanced",
        "--class-weights sqrt",
        "--ema 0.9",
        "--augment light",
        "--augment flip=1",
        "--lr 0.01",
        "--image-size 64",
        "--val-fraction 0.4",
        "--batch-size 5",
    ],
)
def test_option_changes_the_weights(plain_run, train, tmp_path, option):
    data, plain = plain_run
    checkpoint = train(data, tmp_path, "--epochs", 1, *option.split())
    assert not same(checkpoint["state_dict"], plain["state_dict"])
    assert checkpoint["config"] != plain["config"]
    assert math.isfinite(checkpoint["history"][0]["train_loss"])
    assert all(torch.isfinite(value).all() for value in checkpoint["state_dict"].values())


def test_options_that_change_nothing(plain_run, train, tmp_path):
    data, plain = plain_run
    options = "--class-weights none --augment none --schedule none --clip-grad 1e9 --strict --device cpu"
    assert differing(train(data, tmp_path, "--epochs", 1, *options.split()), plain) == {"config"}  # clip_grad


def test_ema_weights_are_the_ones_that_are_validated(plain_run, train, tmp_path):
    data, _ = plain_run
    checkpoint = train(data, tmp_path, "--epochs", 2, "--ema", 0.9)
    assert same(checkpoint["state_dict"], checkpoint["ema"]["state_dict"])
    assert not same(checkpoint["state_dict"], checkpoint["train_state_dict"])


def test_all_at_once(plain_run, train, tmp_path):
    data, _ = plain_run
    options = (
        "--sampler balanced --optimizer adamw --weight-decay 0.01 --grad-accum 2 --clip-grad 1 --dropout 0.2 "
        "--label-smoothing 0.1 --schedule cosine --ema 0.99 --augment strong --class-weights balanced"
    )
    checkpoint = train(data, tmp_path, "--epochs", 2, *options.split())
    assert checkpoint["history"][1]["lr"] < 1e-3
    assert checkpoint["class_weights"] == pytest.approx([36 / (3 * n) for n in (14, 13, 9)])
    assert len(read_history(tmp_path)) == 2


def test_early_stopping_stops(plain_run, run, train, tmp_path):
    data, _ = plain_run
    checkpoint = train(data, tmp_path, "--epochs", 60, "--early-stopping", 2, "--lr", 0.02)
    rows = checkpoint["history"]
    assert len(rows) < 60
    best = max(rows, key=lambda row: (row["val_acc"], -row["val_loss"]))
    assert len(rows) - best["epoch"] == 2
    assert load(tmp_path / BEST_NAME)["epoch"] == best["epoch"]
    code, out, _ = run("--resume", "--output-dir", tmp_path)
    assert code == 0 and "finished" in out
    assert same(load(tmp_path / FINAL_NAME), checkpoint)


def test_plateau_lowers_the_learning_rate(plain_run, train, tmp_path):
    """Weights hardly move at this rate, but batch-norm's statistics do, so the validation loss rises and falls."""
    data, _ = plain_run
    rows = train(data, tmp_path, "--epochs", 9, "--schedule", "plateau", "--lr", 1e-6)["history"]
    lr, best, waited, expected = 1e-6, math.inf, 0, []
    for row in rows:
        expected.append(lr)
        waited = 0 if row["val_loss"] < best * (1 - 1e-4) else waited + 1
        best = min(best, row["val_loss"])
        if waited > 3:
            lr, waited = lr / 2, 0
    assert [row["lr"] for row in rows] == pytest.approx(expected)
    assert rows[-1]["lr"] < 1e-6


def test_frozen_backbone(plain_run, run, tmp_path):
    data, _ = plain_run
    torch.manual_seed(0)
    initial = create_model("mobilenet_v2", 3, image_size=64).state_dict()
    torch.save(initial, tmp_path / "weights.pth")
    options = "--arch mobilenet_v2 --image-size 64 --freeze features.10 --epochs 1 --batch-size 16 --weights"
    code, _, err = run("--data-dir", data, "--output-dir", tmp_path, *options.split(), tmp_path / "weights.pth")
    assert code == 0, err
    checkpoint = load(tmp_path / FINAL_NAME)
    frozen = tuple(f"features.{number}." for number in range(11))
    for key, value in checkpoint["state_dict"].items():
        assert torch.equal(value, initial[key]) == key.startswith(frozen), key
    assert checkpoint["input_spec"]["image_size"] == 64 and checkpoint["input_spec"]["gray"] is True


def test_tensorboard(plain_run, train, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = train(plain_run[0], tmp_path / "out", "--epochs", 2, "--tensorboard", tmp_path / "logs")["history"]
    assert [path.name[:6] for path in (tmp_path / "logs").iterdir()] == ["events"]
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"Loss/train", "Loss/val", "Accuracy/train", "Accuracy/val", "lr"}
    assert [event.value for event in events.Scalars("Loss/val")] == pytest.approx([row["val_loss"] for row in rows])
    assert [event.step for event in events.Scalars("lr")] == [1, 2]


# The default network and its recipe


def test_default_recipe_goes_on_where_it_was_stopped(data, run, tmp_path):
    """Windows, one-cycle, AdamW, EMA and smoothing: with the same weights as a run that never stopped."""
    command = ["--data-dir", data, "--epochs", "3", "--batch-size", "8"]
    assert run(*command, "--output-dir", tmp_path / "whole")[0] == 0
    interrupt(train_emotion_cnn.main, [*command, "--output-dir", tmp_path / "out"], "format_row", call=2)
    code, out, err = run("--resume", "--output-dir", tmp_path / "out")
    assert code == 0 and "resumed after epoch 2" in out, err
    whole, resumed = load(tmp_path / "whole" / FINAL_NAME), load(tmp_path / "out" / FINAL_NAME)
    assert differing(whole, resumed) == set()
    config = whole["config"]
    assert whole["arch"] == train_emotion_cnn.DEFAULT_ARCH == "seresnet13"
    assert "window" in config["augment"] and (config["schedule"], config["optimizer"]) == ("onecycle", "adamw")


def test_default_network_starts_from_weights_of_other_classes(data, run, tmp_path):
    options = ("--epochs", "1", "--batch-size", "8", "--lr", "1e-9")
    assert run("--data-dir", data, "--output-dir", tmp_path / "source", *options)[0] == 0
    source = tmp_path / "source" / BEST_NAME
    draw_folder(tmp_path / "other" / "train", {"laugh": 8, "weep": 8})
    code, out, err = run(
        "--data-dir", tmp_path / "other", "--output-dir", tmp_path / "out", *options, "--weights", source
    )
    assert code == 0, err
    assert "[3, 256] there and [2, 256] here" in out
    old, new = load(source)["state_dict"], load(tmp_path / "out" / FINAL_NAME)["train_state_dict"]
    torch.testing.assert_close(new["0.weight"], old["0.weight"], atol=1e-6, rtol=0)
    assert load(tmp_path / "out" / BEST_NAME)["config"]["weights"] == BEST_NAME  # the file's name, not its folder


# Starting from weights


def test_weights_of_other_classes(plain_run, run, tmp_path):
    source = plain_run[0] / "out" / BEST_NAME
    draw_folder(tmp_path / "data" / "train", {"laugh": 8, "weep": 8})
    command = ["--data-dir", tmp_path / "data", "--output-dir", tmp_path / "out", *SMALL, "--epochs", "1"]
    code, out, err = run(*command, "--weights", source, "--lr", "1e-9")
    assert code == 0, err
    assert "[3, 512] there and [2, 512] here" in out and str(source) in out
    old, new = load(source)["state_dict"], load(tmp_path / "out" / FINAL_NAME)["state_dict"]
    for key, value in new.items():
        if key.endswith(("weight", "bias")) and value.shape == old[key].shape:
            torch.testing.assert_close(value, old[key], atol=1e-6, rtol=0)
    assert [key for key in new if new[key].shape != old[key].shape] == [list(new)[-2], list(new)[-1]]


def test_weights_of_a_bare_state_dict(plain_run, run, tmp_path):
    source, state_dict = tmp_path / "bare.pth", load(plain_run[0] / "out" / BEST_NAME)["state_dict"]
    torch.save(state_dict, source)
    command = ["--data-dir", plain_run[0], "--output-dir", tmp_path / "out", *SMALL, "--epochs", "1"]
    assert run(*command, "--weights", source, "--lr", "1e-9")[0] == 0
    new = load(tmp_path / "out" / FINAL_NAME)["state_dict"]
    torch.testing.assert_close(new["0.weight"], state_dict["0.weight"], atol=1e-6, rtol=0)


def test_weights_that_are_refused(plain_run, refuse, tmp_path):
    data, source = plain_run[0], plain_run[0] / "out" / BEST_NAME
    command = ["--data-dir", data, "--output-dir", tmp_path / "out", "--epochs", "1"]
    refuse(*command, "--arch", "cnn4", "--weights", source, words=["cnn4_bn", str(source)])
    refuse(*command, *SMALL, "--weights", tmp_path / "none.pth", words=["none.pth"])
    refuse(*command, "--arch", "mobilenet_v2", "--weights", "", words=["--weights"])  # "$WEIGHTS" of a shell without it
    torch.save({"0.weight": torch.zeros(2)}, tmp_path / "foreign.pth")
    refuse(*command, *SMALL, "--weights", tmp_path / "foreign.pth", words=["foreign.pth"])
    (tmp_path / "text.pth").write_text("no weights")
    refuse(*command, *SMALL, "--weights", tmp_path / "text.pth", words=["text.pth"])
    refuse(*command, "--arch", "mobilenet_v2", "--pretrained", "--weights", source, words=["--pretrained", "--weights"])


def test_teachers_are_learnt_from_and_named(plain_run, run, train, tmp_path):
    """Two teachers, of which each batch draws one; resumed, the same are drawn as in a run that never stopped."""
    data, plain = plain_run
    teachers = [tmp_path / "one.pth", data / "out" / BEST_NAME]
    train(data, tmp_path / "one", "--epochs", 1, "--seed", 5, "--arch", "cnn4")  # another network with the same input
    (tmp_path / "one" / BEST_NAME).rename(teachers[0])
    whole = train(data, tmp_path / "whole", "--epochs", 2, "--teacher", *teachers)
    assert load(tmp_path / "whole" / BEST_NAME)["config"]["teacher"] == ["one.pth", BEST_NAME]
    first = train(data, tmp_path / "parts", "--epochs", 1, "--teacher", *teachers)
    assert not same(first["state_dict"], plain["state_dict"])
    shutil.move(teachers[0], tmp_path / "moved.pth")
    code, _, err = run("--resume", "--output-dir", tmp_path / "parts", "--epochs", 2)
    assert code == 2 and "one.pth" in err
    code, _, err = run("--resume", "--output-dir", tmp_path / "parts", "--epochs", 2, "--teacher", teachers[1])
    assert code == 2 and "--teacher" in err
    teachers[0] = tmp_path / "moved.pth"
    code, _, err = run("--resume", "--output-dir", tmp_path / "parts", "--epochs", 2, "--teacher", *teachers)
    assert code == 0, err
    assert same(load(tmp_path / "parts" / FINAL_NAME)["state_dict"], whole["state_dict"])


def test_teachers_that_are_refused(plain_run, refuse, tmp_path):
    data, teacher = plain_run[0], plain_run[0] / "out" / BEST_NAME
    draw_folder(tmp_path / "data" / "train", {"laugh": 8, "weep": 8})
    command = ["--output-dir", tmp_path / "out", "--epochs", "1"]
    refuse("--data-dir", tmp_path / "data", *command, *SMALL, "--teacher", teacher, words=["--teacher", "classes"])
    refuse("--data-dir", data, *command, "--arch", "cnn6_rgb", "--teacher", teacher, words=["--teacher", "input"])
    refuse("--data-dir", data, *command, *SMALL, "--teacher", tmp_path / "none.pth", words=["--teacher", "none.pth"])
    refuse("--data-dir", data, *command, "--teacher", teacher, words=["--teacher", "cnn4_bn", "window"])
    refuse(
        "--data-dir",
        data,
        *command[2:],
        *SMALL,
        "--output-dir",
        teacher.parent,
        "--teacher",
        teacher,
        words=["--teacher", "--output-dir"],
    )


def test_earlier_checkpoints_are_kept(plain_run, train, tmp_path):
    data, _ = plain_run
    train(data, tmp_path, "--epochs", 1)
    first = {name.replace(".", ".previous."): (tmp_path / name).read_bytes() for name in FILES}
    (tmp_path / f".{FINAL_NAME}.123.tmp").write_bytes(b"of a process that was killed while it wrote")
    train(data, tmp_path, "--epochs", 3, "--seed", 3)
    assert {name: (tmp_path / name).read_bytes() for name in first} == first
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == FILES | first.keys()


def test_the_run_before_is_resumed_in_a_folder_of_its_own(plain_run, run, refuse, train, tmp_path):
    data, _ = plain_run
    for seed, epochs in ((4, 2), (4, 1)):
        train(data, tmp_path, "--epochs", epochs, "--seed", seed)
    previous = {name: tmp_path / name.replace(".pth", ".previous.pth") for name in (BEST_NAME, FINAL_NAME)}
    refuse("--resume", previous[FINAL_NAME], words=["previous", BEST_NAME, FINAL_NAME])
    (tmp_path / "own").mkdir()
    for name, path in previous.items():
        shutil.copy(path, tmp_path / "own" / name)
    assert run("--resume", tmp_path / "own" / FINAL_NAME, "--epochs", 3)[0] == 0
    assert load(tmp_path / "own" / FINAL_NAME)["epoch"] == 3


# Resuming


def test_two_and_two_epochs_are_four(data, run, train, tmp_path):
    options = ["--ema", "0.9", "--schedule", "plateau", "--augment", "strong", "--class-weights", "sqrt"]
    whole = train(data, tmp_path / "whole", "--epochs", 4, *options)
    train(data, tmp_path / "parts", "--epochs", 2, *options)
    code, out, err = run("--resume", "--output-dir", tmp_path / "parts", "--epochs", 4)
    assert code == 0, err
    assert "resumed after epoch 2" in out and "epoch 3/4" in out and "epoch 2/4" not in out
    assert differing(whole, load(tmp_path / "parts" / FINAL_NAME)) == set()
    whole_best, best = load(tmp_path / "whole" / BEST_NAME), load(tmp_path / "parts" / BEST_NAME)
    assert differing(whole_best, best) <= {"config"}  # its number of epochs, where the best is of the first part
    assert [row["epoch"] for row in read_history(tmp_path / "parts")] == ["1", "2", "3", "4"]
    assert read_metrics(tmp_path / "whole") == read_metrics(tmp_path / "parts")


@posix_only
def test_a_killed_run_goes_on(data, run, train, tmp_path):
    options = [
        "--optimizer",
        "sgd",
        "--schedule",
        "onecycle",
        "--lr",
        "0.02",
        "--epochs",
        "20",
        "--batch-size",
        "4",
        "--augment",
        "light",
    ]
    process = start("--data-dir", data, "--output-dir", "out", *SMALL, *options, cwd=tmp_path)
    wait_for_line(process, "epoch 1/20")
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert 1 <= load(tmp_path / "out" / FINAL_NAME)["epoch"] < 20
    code, _, err = run("--resume", tmp_path / "out" / FINAL_NAME)
    assert code == 0, err
    whole = train(data, tmp_path / "whole", *options)
    assert differing(whole, load(tmp_path / "out" / FINAL_NAME)) == set()
    assert differing(load(tmp_path / "whole" / BEST_NAME), load(tmp_path / "out" / BEST_NAME)) == set()


@posix_only
def test_ctrl_c_says_a_command_that_works(tmp_path, train):
    """In folders whose names have spaces and letters that ASCII lacks."""
    data = tmp_path / "Gesichter, große & kleine"
    draw_folder(data / "train", {"fröhlich": 14, "traurig": 14, "weiß nicht": 14})
    draw_folder(data / "test", {"fröhlich": 4, "traurig": 4})
    options = ["--epochs", "20", "--batch-size", "4", "--augment", "light"]
    process = start("--data-dir", data, "--output-dir", "Lauf 1 (ä)", *SMALL, *options, cwd=tmp_path)
    wait_for_line(process, "epoch 1/20")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert not list((tmp_path / "Lauf 1 (ä)").glob("*.tmp")) + list((tmp_path / "Lauf 1 (ä)").glob(".*"))
    python, script, *args = shlex.split(err.partition("go on with: ")[2])
    assert (python, script) == ("python", "train_emotion_cnn.py")
    process = start(*args, cwd=tmp_path)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "resumed after epoch" in out
    whole = train(data, tmp_path / "whole", *options)
    assert differing(whole, load(tmp_path / "Lauf 1 (ä)" / FINAL_NAME)) == set()


def said_command(err):
    """The arguments of the command that goes on, as `err` says it."""
    return shlex.split(err.partition("train_emotion_cnn.py ")[2])


@pytest.mark.parametrize("function", ["augment", "evaluate", "save", "replace_file"])
def test_ctrl_c_in_the_first_epoch_promises_nothing(plain_run, tmp_path, capsys, function):
    interrupt(train_emotion_cnn.main, ["--data-dir", plain_run[0], "--output-dir", tmp_path, *SMALL], function)
    assert not (tmp_path / FINAL_NAME).exists()
    err = capsys.readouterr().err
    assert "nothing to resume" in err and "--resume" not in err and "as it was" not in err
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_in_the_first_epoch_leaves_the_run_before(plain_run, train, tmp_path, capsys):
    data, _ = plain_run
    train(data, tmp_path, "--epochs", 1)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    interrupt(train_emotion_cnn.main, ["--data-dir", data, "--output-dir", tmp_path, *SMALL, "--seed", "3"], "augment")
    assert "as it was" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


@pytest.mark.parametrize(("function", "call"), [("augment", 5), ("save_checkpoint", 3), ("write_history", 2)])
def test_ctrl_c_in_the_second_epoch(plain_run, run, train, tmp_path, capsys, function, call):
    data, _ = plain_run
    words = ["--data-dir", data, "--output-dir", tmp_path / "out", *SMALL, "--epochs", "3"]
    interrupt(train_emotion_cnn.main, words, function, call)
    assert not list((tmp_path / "out").glob(".*"))
    command = said_command(capsys.readouterr().err)
    code, _, err = run(*command)
    assert code == 0, err
    assert differing(train(data, tmp_path / "whole", "--epochs", 3), load(tmp_path / "out" / FINAL_NAME)) == set()
    assert differing(load(tmp_path / "whole" / BEST_NAME), load(tmp_path / "out" / BEST_NAME)) == set()
    assert read_metrics(tmp_path / "whole") == read_metrics(tmp_path / "out")


def test_ctrl_c_right_after_resuming_elsewhere(plain_run, run, train, tmp_path, capsys):
    """The command that is said then must work too, though no epoch has ended in the new folder."""
    data, _ = plain_run
    train(data, tmp_path / "first", "--epochs", 1)
    final = tmp_path / "first" / FINAL_NAME
    words = ["--resume", final, "--epochs", "2", "--output-dir", tmp_path / "second"]
    interrupt(train_emotion_cnn.main, words, "augment")
    command = said_command(capsys.readouterr().err)
    assert command
    code, _, err = run(*command, "--epochs", "2")
    assert code == 0, err
    assert load(tmp_path / "second" / FINAL_NAME)["epoch"] == 2


def test_resuming_elsewhere_leaves_the_old_run_alone(plain_run, run, train, tmp_path):
    data, _ = plain_run
    whole = train(data, tmp_path / "whole", "--epochs", 3)
    train(data, tmp_path / "first", "--epochs", 1)
    before = {path.name: path.read_bytes() for path in (tmp_path / "first").iterdir()}
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / BEST_NAME).write_bytes(b"the best of an earlier run")
    options = ["--resume", tmp_path / "first" / FINAL_NAME, "--epochs", 3]
    assert run(*options, "--output-dir", tmp_path / "second")[0] == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "first").iterdir()} == before
    previous = tmp_path / "second" / "best_emotion_model.previous.pth"
    assert previous.read_bytes() == b"the best of an earlier run"
    assert {path.name for path in (tmp_path / "second").iterdir()} == FILES | {previous.name}
    assert differing(whole, load(tmp_path / "second" / FINAL_NAME)) == set()


@pytest.mark.parametrize(
    ("flag", "value", "kept"),
    [
        ("--lr", "0.5", "0.001"),
        ("--arch", "cnn4", "cnn4_bn"),
        ("--seed", "5", "0"),
        ("--ema", "0.5", "0.0"),
        ("--batch-size", "8", "16"),
        ("--augment", "strong", "none"),
        ("--schedule", "plateau", "none"),
        ("--image-size", "64", ""),
    ],
)
def test_contradicting_flag_is_refused(plain_run, refuse, flag, value, kept):
    refuse("--resume", plain_run[0] / "out" / FINAL_NAME, flag, value, words=[flag, value, kept, FINAL_NAME])


def test_flags_that_agree_are_accepted(plain_run, run, monkeypatch):
    """The command of the run with --resume added to it; relative paths are those of the current folder."""
    monkeypatch.chdir(plain_run[0])
    code, out, err = run(
        "--data-dir",
        ".",
        "--output-dir",
        "out",
        *SMALL,
        "--epochs",
        "1",
        "--lr",
        "1e-3",
        "--image-size",
        "48",
        "--resume",
    )
    assert code == 0, err
    assert "finished" in out


def test_pictures_may_have_moved(data, run, train, tmp_path):
    whole = train(data, tmp_path / "whole", "--epochs", 2)
    train(data, tmp_path / "out", "--epochs", 1)
    data.rename(tmp_path / "moved")
    code, _, err = run("--resume", tmp_path / "out" / FINAL_NAME, "--epochs", 2, "--data-dir", tmp_path / "moved")
    assert code == 0, err
    checkpoint = load(tmp_path / "out" / FINAL_NAME)
    assert differing(whole, checkpoint) == {"config", "trained_on"}
    assert checkpoint["config"]["data_dir"] == str(tmp_path / "moved")


def test_what_resume_refuses(data, run, train, refuse, tmp_path):
    folder = tmp_path / "out"
    train(data, folder, "--epochs", 2, "--schedule", "cosine")
    refuse("--resume", folder / FINAL_NAME, "--epochs", 3, words=["cosine", "--epochs"])
    refuse("--resume", tmp_path / "none.pth", words=["none.pth"])
    refuse("--resume", "--output-dir", tmp_path / "empty", words=[str(tmp_path / "empty" / FINAL_NAME)])
    assert not (tmp_path / "empty").exists()
    refuse("--resume", folder / BEST_NAME, words=[BEST_NAME, FINAL_NAME])
    (tmp_path / "text.pth").write_text("no checkpoint")
    refuse("--resume", tmp_path / "text.pth", words=["text.pth"])
    (folder / BEST_NAME).rename(tmp_path / "moved.pth")
    refuse("--resume", folder / FINAL_NAME, words=[BEST_NAME])
    (tmp_path / "moved.pth").rename(folder / BEST_NAME)
    picture = data / "train" / "happy" / "happy_001.png"
    draw_picture(77).save(picture)
    before = (folder / FINAL_NAME).read_bytes()
    refuse("--resume", folder / FINAL_NAME, words=["changed"])
    assert (folder / FINAL_NAME).read_bytes() == before


def test_renamed_class_is_a_changed_split(data, train, refuse, tmp_path):
    train(data, tmp_path / "out", "--epochs", 1)
    for name in ("train", "test"):
        (data / name / "happy").rename(data / name / "joy")
    refuse("--resume", tmp_path / "out" / FINAL_NAME, "--epochs", 2, words=["changed"])


def test_fewer_epochs_than_are_done_are_refused(data, train, refuse, tmp_path):
    train(data, tmp_path / "out", "--epochs", 2)
    refuse("--resume", tmp_path / "out" / FINAL_NAME, "--epochs", 1, words=["--epochs"])


def test_best_of_another_run_is_not_taken_for_this_one(data, train, refuse, tmp_path):
    train(data, tmp_path / "one", "--epochs", 1)
    train(data, tmp_path / "two", "--arch", "cnn6_rgb", "--epochs", 1)
    shutil.copy(tmp_path / "two" / BEST_NAME, tmp_path / "one" / BEST_NAME)
    refuse("--resume", tmp_path / "one" / FINAL_NAME, "--epochs", 2, words=[BEST_NAME])


def test_killed_between_best_and_final(data, run, train, tmp_path):
    """The epoch that is done again may come out worse, on another device say; the best file is still of the run."""
    folder = tmp_path / "out"
    train(data, folder, "--epochs", 1)
    shutil.copy(folder / FINAL_NAME, tmp_path / FINAL_NAME)
    assert run("--resume", folder / FINAL_NAME, "--epochs", 2)[0] == 0
    best = load(folder / BEST_NAME)
    torch.save(best | {"epoch": 2, "metrics": best["metrics"] | {"val_acc": 0.99}}, folder / BEST_NAME)
    shutil.copy(tmp_path / FINAL_NAME, folder / FINAL_NAME)
    for epochs in (3, 4):
        code, _, err = run("--resume", folder / FINAL_NAME, "--epochs", epochs)
        assert code == 0, err
    metric = load(folder / FINAL_NAME)["best_metric"]
    assert metric == {"val_acc": 0.99, "val_loss": best["metrics"]["val_loss"], "epoch": 2}
    assert load(folder / BEST_NAME)["metrics"]["val_acc"] == 0.99


def test_a_copy_of_the_final_checkpoint_is_resumed(data, train, run, refuse, tmp_path):
    folder, copy = tmp_path / "out", tmp_path / "out" / "epoch1.pth"
    train(data, folder, "--epochs", 1)
    shutil.copy(folder / FINAL_NAME, copy)
    assert run("--resume", folder / FINAL_NAME, "--epochs", 2)[0] == 0
    newer = (folder / FINAL_NAME).read_bytes()
    best = load(folder / BEST_NAME)
    torch.save(best | {"epoch": 1}, folder / BEST_NAME)
    assert run("--resume", copy, "--epochs", 1)[0] == 0
    assert (folder / "final_emotion_model.previous.pth").read_bytes() == newer
    torch.save(best | {"epoch": 3}, folder / BEST_NAME)
    refuse("--resume", copy, words=[BEST_NAME, "later"])


def test_the_run_before_is_whole_until_the_first_epoch_is_saved(data, run, train, tmp_path, monkeypatch):
    """A disk that is full when a new run first saves leaves the pair of the run before, which resumes."""
    train(data, tmp_path, "--epochs", 1)
    before = {name: (tmp_path / name).read_bytes() for name in (BEST_NAME, FINAL_NAME)}
    write = torch.save

    def fill_disk(content, file, *args, **options):
        if "train_state_dict" in content:
            raise OSError(28, "No space left on device")
        write(content, file, *args, **options)

    monkeypatch.setattr(torch, "save", fill_disk)
    code, _, err = run("--data-dir", data, "--output-dir", tmp_path, *SMALL, "--epochs", "1", "--seed", "3")
    monkeypatch.setattr(torch, "save", write)
    assert code == 2 and "No space left" in err
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert run("--resume", "--output-dir", tmp_path, "--epochs", 2)[0] == 0


# What other runs and other sets left behind


def test_earlier_results_are_announced(data, run, tmp_path):
    command = ["--data-dir", data, "--output-dir", tmp_path / "out", *SMALL, "--epochs", "1"]
    assert ".previous" not in run(*command)[1]
    code, out, err = run(*command)
    assert code == 0, err
    assert "earlier results" in out and "best_emotion_model.previous.pth" in out


@pytest.mark.parametrize("split", ["val", "test"])
def test_training_pictures_in_other_splits_are_counted(data, run, tmp_path, split):
    shutil.rmtree(data / "test")
    draw_folder(data / split, dict.fromkeys(COUNTS, 5))
    label = min(COUNTS)
    for number, path in enumerate(sorted((data / "train" / label).iterdir())[:3]):
        shutil.copy(path, data / split / label / f"copy{number}.png")
    code, out, err = run("--data-dir", data, "--output-dir", tmp_path / "out", *SMALL, "--epochs", "1")
    assert code == 0, err
    assert f"3 of {5 * len(COUNTS) + 3} pictures in {split}/ stand in train/ too" in out
    assert "Without the 3 pictures that stand in train/ too: " in out and f"% of {5 * len(COUNTS)} (" in out


def test_validation_pictures_in_test_are_counted(data, run, tmp_path):
    draw_folder(data / "val", dict.fromkeys(COUNTS, 4))
    label = min(COUNTS)
    shutil.copy(next((data / "val" / label).iterdir()), data / "test" / label / "copy.png")
    code, out, err = run("--data-dir", data, "--output-dir", tmp_path / "out", *SMALL, "--epochs", "1")
    assert code == 0, err
    assert f"1 of {5 * len(COUNTS) + 1} pictures in test/ stand in val/ too" in out and "in train/ too" not in out


def test_weights_of_the_same_size_for_other_classes_lose_their_head(plain_run, run, tmp_path):
    names = [f"other {number}" for number in range(len(COUNTS))]
    draw_folder(tmp_path / "data" / "train", dict.fromkeys(names, 8))
    source = plain_run[0] / "out" / BEST_NAME
    command = ["--data-dir", tmp_path / "data", "--output-dir", tmp_path / "out", *SMALL, "--epochs", "1"]
    code, out, err = run(*command, "--weights", source, "--lr", "1e-9")
    assert code == 0, err
    assert "last layer" in out
    old, new = load(source)["state_dict"], load(tmp_path / "out" / FINAL_NAME)["state_dict"]
    first, last = list(new)[0], list(new)[-2]
    torch.testing.assert_close(new[first], old[first], atol=1e-6, rtol=0)
    assert not torch.allclose(new[last], old[last], atol=1e-3)


# Mistakes


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("--arch cnn9", ["cnn9", "cnn4_bn", "mobilenet_v2"]),
        ("--epochs 0", ["--epochs", "0"]),
        ("--epochs many", ["--epochs", "many"]),
        ("--lr nan", ["--lr", "nan"]),
        ("--dropout 1", ["--dropout"]),
        ("--val-fraction 2", ["--val-fraction"]),
        ("--image-size 8", ["--image-size"]),
        ("--batch-size 1", ["--batch-size"]),
        ("--optimizer lion", ["--optimizer", "lion", "adamw"]),
        ("--no-such-flag", ["--no-such-flag"]),
        ("--epoch 1", ["--epoch"]),
        ("--augment blur=3", ["--augment", "blur"]),
        ("--augment rotation", ["--augment", "rotation"]),
        ("--augment flip=2", ["--augment", "flip"]),
        ("--device warp", ["--device", "warp"]),
        ("--device cuda:99", ["--device", "cuda:99"]),
        ("--device meta", ["--device", "meta"]),
        ("--device cpu --precision fp16", ["--precision", "fp16"]),
        ("--freeze all", ["--freeze"]),
        ("--pretrained", ["--pretrained", "cnn4_bn"]),
        ("--arch mobilenet_v2 --no-pretrained --freeze features.9", ["--freeze", "--no-pretrained"]),
        ("--weights none.pth", ["--weights", "none.pth"]),
    ],
)
def test_wrong_flags(plain_run, refuse, tmp_path, args, words):
    command = ["--data-dir", plain_run[0], "--output-dir", tmp_path / "out", "--epochs", "1", "--arch", "cnn4_bn"]
    refuse(*command, *args.split(), words=words)
    assert not (tmp_path / "out" / BEST_NAME).exists()


def test_folders_that_are_refused(data, refuse, tmp_path):
    command = ["--output-dir", tmp_path / "out", *SMALL, "--epochs", "1", "--data-dir"]
    refuse(*command, tmp_path / "none", words=[str(tmp_path / "none")])
    refuse(*command, data / "train", words=["train"])  # class folders, but no train/ among them
    (tmp_path / "bare" / "train").mkdir(parents=True)
    refuse(*command, tmp_path / "bare", words=[str(tmp_path / "bare" / "train")])
    (data / "train" / "fear").mkdir()
    (data / "train" / "fear" / "notes.txt").write_text("no picture")
    refuse(*command, data, words=[str(data / "train" / "fear")])
    (data / "train" / "fear" / "broken.png").write_bytes(b"no picture")
    refuse(*command, data, words=[str(data / "train" / "fear"), "broken.png"])
    shutil.rmtree(data / "train" / "fear")
    for name in ("val", "test"):
        draw_folder(data / name, {"zeal": 2})
        refuse(*command, data, words=["zeal", "happy", "sad", str(data / name)])
        shutil.rmtree(data / name)
    shutil.rmtree(data / "train" / "angry")
    shutil.rmtree(data / "train" / "sad")
    refuse(*command, data, words=["happy"])  # one class
    draw_folder(data / "train", {"sad": 1})
    shutil.rmtree(data / "train" / "happy")
    draw_folder(data / "train", {"happy": 1})
    refuse(*command, data, words=["2 pictures"])  # nothing to validate on
    assert not (tmp_path / "out" / BEST_NAME).exists()


def test_a_class_of_one_picture_and_fewer_than_a_batch(tmp_path, run):
    draw_folder(tmp_path / "train", {"angry": 1, "happy": 3})
    code, out, err = run("--data-dir", tmp_path, "--output-dir", tmp_path / "out", *SMALL, "--epochs", "1")
    assert (code, err) == (0, "") and "3 pictures to train, 1 to validate" in out
    assert load_model(tmp_path / "out" / BEST_NAME, device="cpu")[1] == ["angry", "happy"]


def test_output_folders_that_are_refused(plain_run, refuse, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        refuse("--data-dir", plain_run[0], *SMALL, "--output-dir", folder, words=["--output-dir", str(folder)])


def test_tensorboard_folder_that_is_refused(plain_run, refuse, tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "file").write_text("not a folder")
    command = ["--data-dir", plain_run[0], *SMALL, "--output-dir", tmp_path / "out"]
    refuse(*command, "--tensorboard", tmp_path / "file", words=["--tensorboard", str(tmp_path / "file")])


def test_loss_that_is_no_number_stops(plain_run, refuse, tmp_path):
    command = ["--data-dir", plain_run[0], "--output-dir", tmp_path, *SMALL, "--epochs", "5"]
    refuse(*command, "--optimizer", "sgd", "--lr", "1e38", words=["--lr", "epoch"])


def test_missing_permissions_are_one_line():
    """As an ordinary user, for whom permissions count."""
    out = run_as_user("""
        import sys, threading, time
        from pathlib import Path

        sys.path += [os.environ["PYTHONPATH"], os.path.join(os.environ["PYTHONPATH"], "tests")]
        import train_emotion_cnn
        from checkpoints import read_checkpoint
        from conftest import draw_folder
        from test_train import SMALL

        def attempt(*args):
            try:
                command = ["--data-dir", ".", *SMALL, "--epochs", "1", "--device", "cpu", *args]
                train_emotion_cnn.run_script(lambda: train_emotion_cnn.main(command))
            except SystemExit as stop:
                print("exit", stop.code, flush=True)

        draw_folder("train", {"angry": 4, "happy": 4})
        draw_folder("shut/train", {"angry": 4, "happy": 4})
        Path("shut/train/happy").chmod(0)
        Path("closed").mkdir(mode=0o555)
        Path("open").mkdir()
        Path("open").chmod(0o777)
        attempt("--output-dir", "warm")  # imports all that is imported late: the user may not be let to Python's files
        become_user()
        os.dup2(1, 2)
        attempt("--output-dir", "closed")
        attempt("--output-dir", "closed/below")
        attempt("--output-dir", "open", "--data-dir", "shut")

        def shut():
            while not os.path.exists("open/own/final_emotion_model.pth"):
                time.sleep(0.01)
            os.chmod("open/own", 0o555)

        threading.Thread(target=shut, daemon=True).start()
        attempt("--output-dir", "open/own", "--epochs", "1000")
        for name in ("best", "final"):
            print("whole", read_checkpoint(f"open/own/{name}_emotion_model.pth")["epoch"], flush=True)
        print(os.listdir("closed"), os.listdir("open"), flush=True)
    """)
    lines = out.splitlines()
    assert "Traceback" not in out
    assert [line for line in lines if line.startswith("exit")] == ["exit None"] + ["exit 2"] * 4
    errors = [line for line in lines if line.startswith("error: ")]
    names = ("--output-dir closed", "closed/below", "shut/train/happy", "can't write open/own")  # the last while it ran
    for line, name in zip(errors, names, strict=True):
        assert name in line
    assert len([line for line in lines if line.startswith("whole ")]) == 2
    assert lines[-1] == "[] ['own']"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory with ulimit")
def test_out_of_memory_names_the_flag(data, tmp_path):
    words = ["--data-dir", data, "--output-dir", tmp_path / "out", "--cache-dir", tmp_path / "cache"]
    words += ["--arch", "cnn6_bn", "--image-size", "512", "--batch-size", "32", "--epochs", "1", "--device", "cpu"]
    command = shlex.join([sys.executable, SCRIPT, *map(str, words)])
    done = subprocess.run(["bash", "-c", f"ulimit -v 9000000; {command}"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: out of memory; lower --batch-size")
    assert "Traceback" not in done.stderr


def test_deterministic(data, tmp_path):
    """The flag reaches torch, in a process of its own, since it stays set there."""
    words = ["--data-dir", data, "--output-dir", tmp_path / "out", "--cache-dir", tmp_path / "cache", *SMALL]
    argv = [*map(str, words), "--epochs", "1", "--deterministic"]
    code = (
        f"import sys, torch; sys.path.insert(0, {str(REPO)!r}); import train_emotion_cnn; "
        f"train_emotion_cnn.main({argv!r}); print('set', torch.are_deterministic_algorithms_enabled(), "
        "torch.backends.cudnn.benchmark)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "set True False"


@pytest.mark.skipif(os.name != "posix", reason="limits files with ulimit")
def test_disk_full_while_saving_keeps_the_last_checkpoint(data, run, tmp_path):
    words = ["--data-dir", data, "--output-dir", tmp_path / "out", "--cache-dir", tmp_path / "cache", *SMALL]
    assert run(*words, "--epochs", "1")[0] == 0
    before = {name: (tmp_path / "out" / name).read_bytes() for name in (BEST_NAME, FINAL_NAME)}
    words = [*map(str, words), "--epochs", "3", "--resume"]
    command = shlex.join([sys.executable, SCRIPT, *words])
    done = subprocess.run(["bash", "-c", f"ulimit -f 2000; {command}"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and "can't write" in done.stderr and "emotion_model.pth" in done.stderr
    assert {name: (tmp_path / "out" / name).read_bytes() for name in before} == before
    assert not [path for path in (tmp_path / "out").iterdir() if path.suffix == ".tmp"]


@posix_only
def test_output_folder_removed_while_running(data, tmp_path):
    words = ["--data-dir", data, "--output-dir", tmp_path / "out", "--cache-dir", tmp_path / "cache", *SMALL]
    process = subprocess.Popen(
        [sys.executable, "-u", SCRIPT, *map(str, words), "--epochs", "1000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("epoch 2/"):
            break
    os.rename(tmp_path / "out", tmp_path / "elsewhere")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and err.count("\n") == 1 and "can't write" in err, err
    for name in (BEST_NAME, FINAL_NAME):
        load(tmp_path / "elsewhere" / name)


def test_weights_that_end_an_epoch_as_no_numbers_are_not_kept(data, run, tmp_path):
    """All pictures in one batch: the loss is fine, the update is not, and only validation can see it."""
    words = ["--data-dir", data, "--output-dir", tmp_path / "out", "--arch", "cnn4_bn", "--batch-size", "500"]
    assert run(*words, "--epochs", "1")[0] == 0
    before = {name: (tmp_path / "out" / name).read_bytes() for name in (BEST_NAME, FINAL_NAME)}
    code, _, err = run(*words, "--epochs", "2", "--optimizer", "sgd", "--lr", "1e38")
    assert code == 2 and err.count("\n") == 1 and "epoch 1: the validation loss became" in err
    assert {name: (tmp_path / "out" / name).read_bytes() for name in before} == before


def test_gray_test_pictures_are_counted_beside_coloured_training(data, run, tmp_path):
    """Sets of other channels are compared all the same."""
    label = sorted(COUNTS)[0]
    shutil.copy(sorted((data / "train" / label).iterdir())[0], data / "test" / label / "copy.png")
    draw_picture(77, mode="RGB").save(data / "train" / label / "colour.png")
    words = ["--data-dir", data, "--output-dir", tmp_path / "out", "--arch", "cnn6_rgb", "--epochs", "1"]
    code, out, err = run(*words, "--batch-size", "16")
    assert code == 0 and f"1 of {5 * len(COUNTS) + 1} pictures in test/ stand in train/ too" in out, err


def test_damaged_final_checkpoint_is_one_line(plain_run, refuse, tmp_path):
    shutil.copytree(plain_run[0] / "out", tmp_path / "out")
    checkpoint = torch.load(tmp_path / "out" / FINAL_NAME, weights_only=True)
    for key, value in (("train_state_dict", {}), ("optimizer", {"state": 1}), ("early_stopping", {})):
        torch.save(checkpoint | {key: value}, tmp_path / "out" / FINAL_NAME)
        refuse("--resume", tmp_path / "out" / FINAL_NAME, "--data-dir", plain_run[0], words=["--resume", FINAL_NAME])
