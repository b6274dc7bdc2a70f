"""train_emotion_cnn.py from end to end: what it writes and prints, and that every flag does what it should."""

import json
import math
import shutil
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import COUNTS, SMALL, differing, draw_folder, interrupt, run, run_process

from checkpoints import BEST_NAME, FINAL_NAME, PREVIOUS_NAME
from models import create_model, get_arch
from predict_emotion import load_model, predict_images
from reports import HISTORY_FILES, METRICS_FILES
from train_emotion_cnn import DEFAULT_ARCH, main, parse_settings

FILES = {BEST_NAME, FINAL_NAME, *METRICS_FILES, *HISTORY_FILES}
INFO_KEYS = {"arch", "num_classes", "class_names", "input_spec", "temperature", "trained_on"}
BEST_KEYS = INFO_KEYS | {"format_version", "state_dict", "epoch", "metrics", "config"}
STEP_KEYS = {"train_state_dict", "optimizer", "scheduler", "scaler", "ema"}
FINAL_KEYS = BEST_KEYS | STEP_KEYS | {"history", "best_metric", "split_hash", "teacher_hashes"}


def load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def read_metrics(folder):
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def read_files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def train(data, out, *args):
    code, printed, err = run(main, "--data-dir", data, "--output-dir", out, *SMALL, *args)
    assert (code, err) == (0, "")
    return printed


def train_only(data, out, *args):
    """Trains the small network, without the report; returns the final checkpoint."""
    interrupt(main, ["--data-dir", data, "--output-dir", out, *SMALL, *args], "fit_temperature")
    return load(out / FINAL_NAME)


@pytest.fixture(scope="module")
def default(tmp_path_factory):
    """The folder of a run with all defaults but two; it holds train/, test/, and in a file what was printed."""
    folder = tmp_path_factory.mktemp("default")
    draw_folder(folder / "train", COUNTS)
    draw_folder(folder / "test", {"angry": 6, "happy": 5, "sad": 4})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        code, out, err = run_process(main, "--arch", "cnn4_bn", "--epochs", 3, cwd=folder)
    assert (code, err) == (0, "")
    (folder / "printed.txt").write_text(out, encoding="utf-8")
    return folder


def test_all_files_are_written_and_named(default):
    out = (default / "printed.txt").read_text(encoding="utf-8")
    assert {path.name for path in default.iterdir()} == FILES | {"train", "test", "cache", "printed.txt"}
    assert all(name in out for name in FILES)
    assert (default / "classification_report.txt").read_text(encoding="utf-8") in out
    assert "36 images to train, 4 to validate (from train/), 15 to test" in out
    assert "3 classes: angry, happy, sad" in out and "cnn4_bn: 1,570,499 parameters" in out
    assert all(f"epoch {number}/3" in out for number in (1, 2, 3))


def test_best_of_the_history_is_chosen_on_validation_and_measured_on_test(default):
    history, columns = load(default / FINAL_NAME)["history"], "epoch,lr,train_loss,train_acc,val_loss,val_acc,"
    assert (default / "training_history.csv").read_text().startswith(f"{columns}images_per_s,seconds\n1,0.001,")
    assert all(row["lr"] == 1e-3 and 0 <= row["train_acc"] <= 1 and row["val_loss"] > 0 for row in history)
    for row in history:
        for number in (36 * row["train_acc"], 4 * row["val_acc"]):  # shares of images, not means over batches
            assert number == pytest.approx(round(number), abs=1e-4)
    best, metrics = load(default / BEST_NAME), read_metrics(default)
    expected = max(history, key=lambda row: (row["val_acc"], -row["val_loss"]))
    selected = {key: expected[key] for key in ("val_loss", "val_acc", "train_loss", "train_acc")}
    tested = {f"test_{key}": metrics[key] for key in ("accuracy", "macro_f1", "count")}
    assert best["epoch"] == metrics["epoch"] == expected["epoch"]
    assert best["metrics"] == selected | tested and tested["test_count"] == 15 and metrics["val"] == selected
    assert (metrics["split"], metrics["count"], metrics["arch"]) == ("test", 15, "cnn4_bn")
    assert list(metrics["per_class"]) == metrics["class_names"] == ["angry", "happy", "sad"]
    assert [row["support"] for row in metrics["per_class"].values()] == [6, 5, 4]
    assert metrics["accuracy"] == pytest.approx(np.trace(metrics["confusion_matrix"]) / 15)


def test_checkpoints(default):
    best, final = load(default / BEST_NAME), load(default / FINAL_NAME)
    assert (set(best), set(final)) == (BEST_KEYS, FINAL_KEYS)
    spec = {"image_size": 48, "channels": 1, "mean": [0.5], "std": [0.5], "gray": False}
    assert (best["format_version"], best["arch"], best["num_classes"]) == (2, "cnn4_bn", 3)
    assert (best["class_names"], best["input_spec"]) == (["angry", "happy", "sad"], spec)
    assert best["trained_on"] == default.name and final["epoch"] == len(final["history"]) == 3
    assert best["state_dict"].keys() == create_model("cnn4_bn", 3).state_dict().keys()
    assert best["temperature"] == final["temperature"] == 1.0  # validation is too small to fit it on
    assert str(default) not in str(best["config"]) and str(default) in str(final["config"])  # the best is handed on
    assert set(final["config"]) - set(best["config"]) == {"data_dir", "cache_dir", "tensorboard"}


def test_accuracy_and_loss_are_those_of_prediction(default):
    model, class_names = load_model(default / BEST_NAME, device="cpu")
    paths, metrics = sorted((default / "test").glob("*/*.png")), read_metrics(default)
    answers = predict_images(model, paths, class_names)
    labels = [path.parent.name for path in paths]
    assert metrics["accuracy"] == np.mean([label == name for label, (name, _, _) in zip(labels, answers, strict=True)])
    losses = [-math.log(probs[label] / 100) for label, (_, _, probs) in zip(labels, answers, strict=True)]
    assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-4)


def test_without_test_the_report_is_on_validation_where_the_temperature_is_fitted(tmp_path):
    draw_folder(tmp_path / "train", {"happy": 60, "sad": 60})
    draw_folder(tmp_path / "val", {"happy": 60, "sad": 60})
    out = tmp_path / "out"
    printed = train(tmp_path, out, "--epochs", 4)
    assert "120 images to train, 120 to validate (val/), none to test" in printed and "no test/" in printed
    best, metrics = load(out / BEST_NAME), read_metrics(out)
    assert best["temperature"] == metrics["temperature"] > 1.05  # noise learned by heart: the model is too certain
    assert load(out / FINAL_NAME)["temperature"] == 1.0
    assert (metrics["split"], metrics["count"], metrics["val"]) == ("val", 120, best["metrics"])
    assert metrics["accuracy"] == pytest.approx(best["metrics"]["val_acc"], abs=1e-6)
    assert metrics["uncalibrated"]["loss"] == pytest.approx(best["metrics"]["val_loss"], rel=1e-4)
    assert metrics["loss"] == metrics["calibration"]["loss"] < metrics["uncalibrated"]["loss"]
    assert metrics["calibration"]["ece"] < metrics["uncalibrated"]["ece"]
    shutil.copytree(tmp_path / "train", tmp_path / "test")  # of which it is not certain enough
    assert run(main, "--resume", "--output-dir", out)[0] == 0
    assert (read_metrics(out)["split"], read_metrics(out)["temperature"]) == ("test", best["temperature"])


def test_test_images_play_no_part_in_training(trained, tmp_path):
    draw_folder(tmp_path / "train", COUNTS)
    draw_folder(tmp_path / "test", {"happy": 5, "sad": 5}, size=40)  # other images, and a class is missing
    train(tmp_path, tmp_path, "--epochs", 1, "--cache-dir", trained / "cache")
    assert differing(trained / "out" / FINAL_NAME, tmp_path / FINAL_NAME) == {"config", "trained_on"}  # folders
    assert differing(trained / "out" / BEST_NAME, tmp_path / BEST_NAME) == {"metrics", "trained_on"}
    one, other = read_metrics(trained / "out"), read_metrics(tmp_path)
    assert one["val"] == other["val"] and one["loss"] != other["loss"]
    assert {name: row["support"] for name, row in other["per_class"].items()} == {"angry": 0, "happy": 5, "sad": 5}


@pytest.mark.parametrize("split", ["val", "test"])
def test_unreadable_images_and_those_of_two_splits_are_counted(split, tmp_path):
    draw_folder(tmp_path / "train", COUNTS)
    draw_folder(tmp_path / split, dict.fromkeys(COUNTS, 5))
    broken = [tmp_path / "train" / "happy" / "broken.png", tmp_path / split / "sad" / "broken.png"]
    for path in broken:
        path.write_bytes(b"no image")
    for number in range(3):
        shutil.copy(tmp_path / "train/sad" / f"sad_00{number}.png", tmp_path / split / "sad" / f"again{number}.png")
    out = train(tmp_path, tmp_path / "out", "--epochs", 1)
    assert all(str(path) in out for path in broken) and "left out 1 of 41" in out and "left out 1 of 19" in out
    assert "warning: 3 of 18" in out and f" in {split}/ are also in train/" in out
    assert "Without the 3 images that are also in train/: " in out and "% of 15 (" in out


def test_an_earlier_best_is_announced_and_kept(trained, tmp_path):
    for name in (BEST_NAME, FINAL_NAME):
        shutil.copy(trained / "out" / name, tmp_path / name)
    out = train(trained, tmp_path, "--epochs", 2, "--seed", 3)
    assert PREVIOUS_NAME in out.partition("epoch 1/")[0]
    assert {path.name for path in tmp_path.iterdir()} == FILES | {PREVIOUS_NAME}
    assert (tmp_path / PREVIOUS_NAME).read_bytes() == (trained / "out" / BEST_NAME).read_bytes()
    assert load(tmp_path / BEST_NAME)["config"]["seed"] == load(tmp_path / FINAL_NAME)["config"]["seed"] == 3


@pytest.mark.parametrize(
    "option",
    [
        *("--sampler balanced", "--optimizer sgd", "--weight-decay 0.1", "--grad-accum 3", "--batch-size 5"),
        *("--clip-grad 0.01", "--label-smoothing 0.2", "--mixup 0.2", "--dropout 0.1", "--schedule cosine"),
        *("--class-weights balanced", "--ema 0.9", "--augment flip=1", "--lr 0.01", "--image-size 64"),
        *("--val-fraction 0.4", "--seed 2147483647"),
    ],
)
def test_option_changes_the_weights(option, trained, tmp_path):
    checkpoint = train_only(trained, tmp_path, "--epochs", 1, *option.split())
    assert {"state_dict", "config"} <= differing(checkpoint, trained / "out" / FINAL_NAME)
    assert math.isfinite(checkpoint["history"][0]["train_loss"])
    assert all(torch.isfinite(value).all() for value in checkpoint["state_dict"].values())
    if "ema" in option:  # the averaged weights are those that are validated
        assert differing(checkpoint["state_dict"], checkpoint["ema"]["state_dict"]) == set()
        assert differing(checkpoint["state_dict"], checkpoint["train_state_dict"])


def test_options_that_change_nothing(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which --deterministic would set for good
    options = "--class-weights none --augment none --schedule none --clip-grad 1e9 --strict --deterministic"
    try:
        checkpoint = train_only(trained, tmp_path, "--epochs", 1, *options.split())
        assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
    finally:
        torch.use_deterministic_algorithms(False)
    assert differing(checkpoint, trained / "out" / FINAL_NAME) == {"config"}


def test_the_recipe_is_the_default_and_that_of_backbones_depends_on_their_start():
    settings = parse_settings([])[0]
    assert settings.arch == DEFAULT_ARCH == "seresnet13" and "window" in settings.augment
    assert (settings.schedule, settings.optimizer, settings.pretrained) == ("linear", "muon", False)
    (fine, _), (other, _) = (
        parse_settings(["--arch", "mobilenet_v2", *flags]) for flags in ([], ["--weights", __file__])
    )
    assert fine.pretrained and not other.pretrained
    for each in (fine, other):
        assert (each.optimizer, each.lr, each.backbone_lr, each.is_from_scratch) == ("adam", 3e-4, 0.1, False)
    scratch = parse_settings(["--arch", "mobilenet_v2", "--no-pretrained", "--epochs", "3"])[0]
    recipe = asdict(get_arch(DEFAULT_ARCH).recipe) | {"epochs": 3}
    assert {name: getattr(scratch, name) for name in recipe} == recipe and scratch.is_from_scratch


def test_another_optimizer_brings_its_own_learning_rate():
    assert parse_settings(["--arch", "cnn4_bn", "--optimizer", "muon"])[0].lr == 0.02
    assert parse_settings(["--optimizer", "adamw"])[0].lr == 3e-3
    assert parse_settings(["--optimizer", "adamw", "--lr", "0.1"])[0].lr == 0.1


def test_tensorboard(trained, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    rows = train_only(trained, tmp_path / "out", "--epochs", 2, "--tensorboard", tmp_path / "logs")["history"]
    events = accumulator.EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"Loss/train", "Loss/val", "Accuracy/train", "Accuracy/val", "lr"}
    assert [event.value for event in events.Scalars("Loss/val")] == pytest.approx([row["val_loss"] for row in rows])
    assert [event.step for event in events.Scalars("lr")] == [1, 2]


def test_a_frozen_backbone_starts_from_a_state_dict_and_stays(trained, tmp_path):
    initial = create_model("mobilenet_v2", 3, image_size=64).state_dict()
    torch.save(initial, tmp_path / "weights.pth")
    options = ("--arch", "mobilenet_v2", "--image-size", 64, "--freeze", "features.10", "--epochs", 1)
    checkpoint = train_only(trained, tmp_path, *options, "--weights", tmp_path / "weights.pth")
    frozen = tuple(f"features.{number}." for number in range(11))
    for key, value in checkpoint["state_dict"].items():
        assert torch.equal(value, initial[key]) == key.startswith(frozen), key
    assert checkpoint["input_spec"]["image_size"] == 64 and checkpoint["input_spec"]["gray"] is True
    assert load(tmp_path / BEST_NAME)["config"]["weights"] == "weights.pth"  # without its folder
