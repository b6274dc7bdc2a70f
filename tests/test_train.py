"""train_emotion_cnn.py from end to end: what it writes and prints, and that every flag does what it should."""

import csv
import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import COUNTS, SMALL, draw_folder, draw_image, interrupt, run, run_process
from PIL import Image

from checkpoints import BEST_NAME, FINAL_NAME, PREVIOUS_NAME
from models import create_model
from predict_emotion import load_model, predict_images
from reports import HISTORY_FILES, METRICS_FILES
from train_emotion_cnn import DEFAULT_ARCH, main, parse_settings

FILES = {BEST_NAME, FINAL_NAME, *METRICS_FILES, *HISTORY_FILES}
KEYS = {
    *("format_version", "arch", "num_classes", "class_names", "input_spec", "temperature", "trained_on"),
    *("state_dict", "epoch", "metrics", "config"),
}
RESUME_KEYS = {
    *("train_state_dict", "optimizer", "scheduler", "scaler", "ema", "history", "best_metric"),
    *("split_hash", "teacher_hashes"),
}
TIMES = {"images_per_s", "seconds"}


def load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def same(left, right):
    """Whether two checkpoints hold the same, bit for bit, except for how long things took."""
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict) and isinstance(right, dict):
        keys = left.keys() - TIMES
        return keys == right.keys() - TIMES and all(same(left[key], right[key]) for key in keys)
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(same(*pair) for pair in zip(left, right, strict=True))
    return left == right


def differing(left, right):
    """The keys of two checkpoints, given or in files, whose values differ."""
    left, right = (part if isinstance(part, dict) else load(part) for part in (left, right))
    return {key for key in left.keys() | right.keys() if not same(left.get(key, math.nan), right.get(key, math.nan))}


def read_metrics(folder):
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def train(data, out, *args):
    """Trains the small network; returns what is printed."""
    code, printed, err = run(main, "--data-dir", data, "--output-dir", out, *SMALL, *args)
    assert (code, err) == (0, "")
    return printed


def train_only(data, out, *args):
    """Trains the small network, without the report; returns the final checkpoint."""
    interrupt(main, ["--data-dir", data, "--output-dir", out, *SMALL, *args], "fit_temperature")
    return load(out / FINAL_NAME)


@pytest.fixture
def data(tmp_path):
    """A folder with train/ and test/, to change."""
    draw_folder(tmp_path / "data" / "train", COUNTS)
    draw_folder(tmp_path / "data" / "test", dict.fromkeys(COUNTS, 5))
    return tmp_path / "data"


# One run with everything at its default except the network and the number of epochs


@pytest.fixture(scope="session")
def default_run(tmp_path_factory):
    """(folder with train/ and test/ that the script ran in, what it printed)."""
    folder = tmp_path_factory.mktemp("default")
    draw_folder(folder / "train", COUNTS)
    draw_folder(folder / "test", {"angry": 6, "happy": 5, "sad": 4})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        code, out, err = run_process(main, "--arch", "cnn4_bn", "--epochs", 3, cwd=folder)
    assert (code, err) == (0, "")
    return folder, out


def test_all_files_are_written_and_named(default_run):
    folder, out = default_run
    assert {path.name for path in folder.iterdir()} == FILES | {"train", "test", "cache"}
    assert all(name in out for name in FILES)
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            image.load()
            assert image.format == "PNG" and min(image.size) > 400
    assert (folder / "classification_report.txt").read_text(encoding="utf-8") in out
    assert "36 images to train, 4 to validate (from train/), 15 to test" in out
    assert "3 classes: angry, happy, sad" in out and "cnn4_bn: 1,570,499 parameters" in out
    assert all(f"epoch {number}/3" in out for number in (1, 2, 3))


def test_history_csv(default_run):
    folder, _ = default_run
    with (folder / "training_history.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["epoch", "lr", "train_loss", "train_acc", "val_loss", "val_acc", "images_per_s", "seconds"]
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    history = load(folder / FINAL_NAME)["history"]
    assert [{key: float(value) for key, value in row.items()} for row in rows] == history
    for row in history:
        for name, count in (("train_acc", 36), ("val_acc", 4)):  # shares of images, not means over batches
            assert abs(row[name] * count - round(row[name] * count)) < 1e-4 and 0 <= row[name] <= 1
        assert row["lr"] == 1e-3 and row["train_loss"] > 0 and row["val_loss"] > 0


def foreign_parts(value, path=""):
    """Where a checkpoint holds anything except tensors, numbers, strings, lists, tuples and dicts."""
    if isinstance(value, dict):
        return [bad for key, part in value.items() for bad in foreign_parts(part, f"{path}.{key}")]
    if isinstance(value, list | tuple):
        return [bad for number, part in enumerate(value) for bad in foreign_parts(part, f"{path}[{number}]")]
    return [] if value is None or type(value) in (torch.Tensor, int, float, str, bool) else [f"{path}: {type(value)}"]


def test_checkpoints(default_run):
    folder, _ = default_run
    best, final = load(folder / BEST_NAME), load(folder / FINAL_NAME)
    assert (set(best), set(final)) == (KEYS, KEYS | RESUME_KEYS)
    assert foreign_parts(best) == foreign_parts(final) == []
    spec = {"image_size": 48, "channels": 1, "mean": [0.5], "std": [0.5], "gray": False}
    assert (best["format_version"], best["arch"], best["num_classes"]) == (2, "cnn4_bn", 3)
    assert (best["class_names"], best["input_spec"]) == (["angry", "happy", "sad"], spec)
    assert best["trained_on"] == folder.name and final["epoch"] == len(final["history"]) == 3
    assert best["state_dict"].keys() == create_model("cnn4_bn", 3).state_dict().keys()
    assert best["temperature"] == final["temperature"] == 1.0  # validation is too small to fit it on
    assert str(folder) not in str(best["config"]) and str(folder) in str(final["config"])  # the best is handed on
    assert set(final["config"]) - set(best["config"]) == {"data_dir", "cache_dir", "tensorboard"}


def test_best_is_chosen_on_validation_and_measured_on_test(default_run):
    folder, _ = default_run
    rows, best, metrics = load(folder / FINAL_NAME)["history"], load(folder / BEST_NAME), read_metrics(folder)
    expected = max(rows, key=lambda row: (row["val_acc"], -row["val_loss"]))
    selected = {key: expected[key] for key in ("val_loss", "val_acc", "train_loss", "train_acc")}
    tested = {f"test_{key}": metrics[key] for key in ("accuracy", "macro_f1", "count")}
    assert best["epoch"] == metrics["epoch"] == expected["epoch"]
    assert best["metrics"] == selected | tested and tested["test_count"] == 15 and metrics["val"] == selected
    assert (metrics["split"], metrics["count"], metrics["arch"]) == ("test", 15, "cnn4_bn")
    assert list(metrics["per_class"]) == metrics["class_names"] == ["angry", "happy", "sad"]
    assert [row["support"] for row in metrics["per_class"].values()] == [6, 5, 4]
    assert metrics["accuracy"] == pytest.approx(np.trace(metrics["confusion_matrix"]) / 15)


def test_accuracy_and_loss_are_those_of_prediction(default_run):
    folder, _ = default_run
    model, class_names = load_model(folder / BEST_NAME, device="cpu")
    paths = sorted((folder / "test").glob("*/*.png"))
    answers = list(zip(paths, predict_images(model, paths, class_names), strict=True))
    metrics = read_metrics(folder)
    assert metrics["accuracy"] == sum(answer[0] == path.parent.name for path, answer in answers) / 15
    losses = [-math.log(all_probs[path.parent.name] / 100) for path, (_, _, all_probs) in answers]
    assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-4)


def test_the_seed_decides_in_another_process_too(default_run, trained, tmp_path):
    folder, _ = default_run
    places = ("--data-dir", folder, "--output-dir", tmp_path, "--cache-dir", tmp_path / "cache")
    assert run(main, *places, "--arch", "cnn4_bn", "--epochs", 3)[0] == 0
    assert differing(folder / BEST_NAME, tmp_path / BEST_NAME) == set()
    assert differing(folder / FINAL_NAME, tmp_path / FINAL_NAME) == {"config"}  # the cache's folder
    assert read_metrics(folder) == read_metrics(tmp_path)
    other = train_only(trained, tmp_path / "other", "--epochs", 1, "--seed", 2**31 - 1)
    assert {"state_dict", "split_hash"} <= differing(other, trained / "out" / FINAL_NAME)


# Where validation and test come from


def test_temperature_is_fitted_on_validation(tmp_path):
    draw_folder(tmp_path / "train", {"happy": 60, "sad": 60})
    draw_folder(tmp_path / "val", {"happy": 60, "sad": 60})
    out = tmp_path / "out"
    assert "120 images to train, 120 to validate (val/), none to test" in train(tmp_path, out, "--epochs", 4)
    best, metrics = load(out / BEST_NAME), read_metrics(out)
    assert best["temperature"] == metrics["temperature"] > 1.05  # noise learned by heart: the model is too certain
    assert load(out / FINAL_NAME)["temperature"] == 1.0
    assert metrics["uncalibrated"]["loss"] == pytest.approx(best["metrics"]["val_loss"], rel=1e-4)
    assert metrics["loss"] == metrics["calibration"]["loss"] < metrics["uncalibrated"]["loss"]
    assert metrics["calibration"]["ece"] < metrics["uncalibrated"]["ece"]
    shutil.copytree(tmp_path / "train", tmp_path / "test")  # of which it is not certain enough
    assert run(main, "--resume", "--output-dir", out)[0] == 0
    assert (read_metrics(out)["split"], read_metrics(out)["temperature"]) == ("test", best["temperature"])


def test_report_is_on_validation_without_test(data, tmp_path):
    shutil.rmtree(data / "test")
    out = train(data, tmp_path / "out", "--epochs", 2)
    metrics = read_metrics(tmp_path / "out")
    assert (metrics["split"], metrics["count"]) == ("val", 4)
    assert metrics["accuracy"] == pytest.approx(metrics["val"]["val_acc"], abs=1e-6)
    assert metrics["loss"] == pytest.approx(metrics["val"]["val_loss"], rel=1e-5)
    assert "Split: val" in (tmp_path / "out" / "classification_report.txt").read_text(encoding="utf-8")
    assert "no test/" in out and "none to test" in out
    assert not any(name.startswith("test_") for name in load(tmp_path / "out" / BEST_NAME)["metrics"])


def test_test_images_play_no_part_in_training(trained, data, tmp_path):
    shutil.rmtree(data / "test" / "angry")  # classes are matched by name, so one may be missing
    for number, path in enumerate(sorted((data / "test").glob("*/*.png"))):
        draw_image(10_000 + number).save(path)
    train(data, tmp_path, "--epochs", 1, "--cache-dir", trained / "cache", "--data-dir", data)
    assert differing(trained / "out" / FINAL_NAME, tmp_path / FINAL_NAME) == {
        "config",
        "trained_on",
    }  # names of folders
    assert differing(trained / "out" / BEST_NAME, tmp_path / BEST_NAME) == {"metrics", "trained_on"}
    one, other = read_metrics(trained / "out"), read_metrics(tmp_path)
    assert one["val"] == other["val"] and one["loss"] != other["loss"]
    assert {name: row["support"] for name, row in other["per_class"].items()} == {"angry": 0, "happy": 5, "sad": 5}


def test_unreadable_images_are_named_and_counted(data, tmp_path):
    (data / "train" / "happy" / "broken.png").write_bytes(b"no image")
    whole = (data / "test" / "sad" / "sad_000.png").read_bytes()
    (data / "test" / "sad" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (data / "train" / "__MACOSX").mkdir()  # hidden, so it is no class
    out = train(data, tmp_path / "out", "--epochs", 1)
    assert str(data / "train" / "happy" / "broken.png") in out and str(data / "test" / "sad" / "cut.png") in out
    assert "left out 1 of 41" in out and "left out 1 of 16" in out and "3 classes" in out
    assert "36 images to train, 4 to validate (from train/), 15 to test" in out


@pytest.mark.parametrize("split", ["val", "test"])
def test_training_images_in_other_splits_are_counted(split, tmp_path):
    draw_folder(tmp_path / "train", COUNTS)
    draw_folder(tmp_path / split, dict.fromkeys(COUNTS, 5))
    for number in range(3):
        shutil.copy(tmp_path / "train/sad" / f"sad_00{number}.png", tmp_path / split / "sad" / f"again{number}.png")
    out = train(tmp_path, tmp_path / "out", "--epochs", 1)
    assert "warning: 3 of 18" in out and f" in {split}/ are also in train/" in out
    assert "Without the 3 images that are also in train/: " in out and "% of 15 (" in out


def test_a_class_of_one_image_and_fewer_than_a_batch(tmp_path):
    draw_folder(tmp_path / "train", {"angry": 1, "happy": 3})
    assert "3 images to train, 1 to validate" in train(tmp_path, tmp_path / "out", "--epochs", 1)
    assert load_model(tmp_path / "out" / BEST_NAME, device="cpu")[1] == ["angry", "happy"]


@pytest.mark.parametrize(
    ("mode", "prefix", "trained_on"), [("L", "drawing_", "the sample set of drawings"), ("RGB", "face_", "Köpfe")]
)
def test_three_channels_tell_gray_training_and_the_sample_set_is_named(mode, prefix, trained_on, tmp_path):
    for path in draw_folder(tmp_path / "Köpfe" / "train", dict.fromkeys(COUNTS, 6), mode=mode).glob("*/*.png"):
        path.rename(path.with_name(prefix + path.name))
    checkpoint = train_only(tmp_path / "Köpfe", tmp_path / "out", "--arch", "cnn6_rgb", "--epochs", 1)
    assert checkpoint["trained_on"] == trained_on
    assert (checkpoint["input_spec"]["gray"], checkpoint["input_spec"]["channels"]) == (mode == "L", 3)


def test_an_earlier_best_is_announced_and_kept(trained, tmp_path):
    for name in (BEST_NAME, FINAL_NAME):
        shutil.copy(trained / "out" / name, tmp_path / name)
    earlier = (tmp_path / BEST_NAME).read_bytes()
    out = train(trained, tmp_path, "--epochs", 2, "--seed", 3)
    assert PREVIOUS_NAME in out.partition("epoch 1/")[0]
    assert {path.name for path in tmp_path.iterdir()} == FILES | {PREVIOUS_NAME}
    assert (tmp_path / PREVIOUS_NAME).read_bytes() == earlier
    assert load(tmp_path / BEST_NAME)["config"]["seed"] == load(tmp_path / FINAL_NAME)["config"]["seed"] == 3


# Flags


@pytest.mark.parametrize(
    "option",
    [
        *("--sampler balanced", "--optimizer adamw --weight-decay 0.1", "--optimizer sgd", "--grad-accum 3"),
        *("--clip-grad 0.01", "--label-smoothing 0.2", "--mixup 0.2", "--dropout 0.1", "--schedule cosine"),
        *("--class-weights balanced", "--class-weights sqrt", "--ema 0.9", "--augment light", "--augment flip=1"),
        *("--lr 0.01", "--image-size 64", "--val-fraction 0.4", "--batch-size 5"),
    ],
)
def test_option_changes_the_weights(option, trained, tmp_path):
    checkpoint = train_only(trained, tmp_path, "--epochs", 1, *option.split())
    assert {"state_dict", "config"} <= differing(checkpoint, trained / "out" / FINAL_NAME)
    assert math.isfinite(checkpoint["history"][0]["train_loss"])
    assert all(torch.isfinite(value).all() for value in checkpoint["state_dict"].values())
    if "ema" in option:  # the averaged weights are those that are validated
        assert same(checkpoint["state_dict"], checkpoint["ema"]["state_dict"])
        assert not same(checkpoint["state_dict"], checkpoint["train_state_dict"])


def test_options_that_change_nothing(trained, tmp_path):
    options = "--class-weights none --augment none --schedule none --clip-grad 1e9 --strict --device cpu"
    checkpoint = train_only(trained, tmp_path, "--epochs", 1, *options.split())
    assert differing(checkpoint, trained / "out" / FINAL_NAME) == {"config"}


def test_the_recipe_is_the_default_and_backbones_start_pretrained():
    settings = parse_settings([])[0]
    assert settings.arch == DEFAULT_ARCH == "seresnet13" and "window" in settings.augment
    assert (settings.schedule, settings.optimizer, settings.pretrained) == ("onecycle", "adamw", False)
    assert parse_settings(["--arch", "mobilenet_v2"])[0].pretrained
    assert not parse_settings(["--arch", "mobilenet_v2", "--weights", __file__])[0].pretrained
    assert parse_settings(["--arch", "cnn4", "--lr", "0.5"])[0].lr == 0.5


def test_plateau_lowers_the_learning_rate(trained, tmp_path):
    """Weights hardly move at this rate, but batch-norm's statistics do, so the validation loss rises and falls."""
    rows = train_only(trained, tmp_path, "--epochs", 9, "--schedule", "plateau", "--lr", 1e-6)["history"]
    falls = [number for number in range(8) if rows[number + 1]["lr"] == rows[number]["lr"] / 2]
    lowest = min(rows[: falls[0] + 1], key=lambda row: row["val_loss"])  # four epochs before
    assert falls and rows[falls[0]]["epoch"] == lowest["epoch"] + 4 and rows[falls[0]]["lr"] == 1e-6


def test_tensorboard(trained, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = train_only(trained, tmp_path / "out", "--epochs", 2, "--tensorboard", tmp_path / "logs")["history"]
    assert [path.name[:6] for path in (tmp_path / "logs").iterdir()] == ["events"]
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"Loss/train", "Loss/val", "Accuracy/train", "Accuracy/val", "lr"}
    assert [event.value for event in events.Scalars("Loss/val")] == pytest.approx([row["val_loss"] for row in rows])
    assert [event.step for event in events.Scalars("lr")] == [1, 2]


def test_deterministic_reaches_torch(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        interrupt(main, ["--data-dir", trained, "--output-dir", tmp_path, "--deterministic"], "load_splits")
        assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
    finally:
        torch.use_deterministic_algorithms(False)


# Starting from weights


@pytest.mark.parametrize(
    ("names", "kept"), [(COUNTS, True), (["laugh", "smirk", "weep"], False), (["laugh", "weep"], False)]
)
def test_weights_of_a_checkpoint(names, kept, trained, tmp_path):
    """The last layer is kept for the same classes only."""
    draw_folder(tmp_path / "train", dict.fromkeys(names, 8))
    source = trained / "out" / BEST_NAME
    out = train(tmp_path, tmp_path / "out", "--epochs", 1, "--weights", source, "--lr", 1e-9)
    assert f"{source}: all weights loaded" in out
    assert kept or f"the last layer's: other classes or size, [3, 512] there and [{len(names)}, 512] here" in out
    old, new = load(source)["state_dict"], load(tmp_path / "out" / FINAL_NAME)["state_dict"]
    learned = [key for key in new if key.endswith(("weight", "bias"))]
    moved = [
        key for key in learned if old[key].shape != new[key].shape or not torch.allclose(new[key], old[key], atol=1e-6)
    ]
    assert moved == ([] if kept else learned[-2:])
    assert load(tmp_path / "out" / BEST_NAME)["config"]["weights"] == BEST_NAME  # the file's name, not its folder


def test_a_frozen_backbone_starts_from_a_state_dict_and_stays(trained, tmp_path):
    torch.manual_seed(0)
    initial = create_model("mobilenet_v2", 3, image_size=64).state_dict()
    torch.save(initial, tmp_path / "weights.pth")
    options = ("--arch", "mobilenet_v2", "--image-size", 64, "--freeze", "features.10", "--epochs", 1)
    checkpoint = train_only(trained, tmp_path, *options, "--weights", tmp_path / "weights.pth")
    frozen = tuple(f"features.{number}." for number in range(11))
    for key, value in checkpoint["state_dict"].items():
        assert torch.equal(value, initial[key]) == key.startswith(frozen), key
    assert checkpoint["input_spec"]["image_size"] == 64 and checkpoint["input_spec"]["gray"] is True
