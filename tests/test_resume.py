"""--resume: a run that was stopped, at any point and in any way, ends with the weights of one that never was."""

import functools
import os
import shlex
import shutil
import signal

import pytest
import torch
from conftest import SMALL, assert_refused, draw_image, interrupt, run, start
from test_train import FILES, differing, load, read_metrics, same, train, train_only

from checkpoints import BEST_NAME, FINAL_NAME, PREVIOUS_NAME, V1_FEATURES, read_checkpoint
from engine import resume
from engine.optim import make_optimizer
from engine.step import TrainStep
from models import create_model
from preprocessing import to_input
from train_emotion_cnn import main

posix_only = pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
RECIPES = {
    "plateau": "--epochs 4 --schedule plateau --ema 0.9 --augment strong --class-weights sqrt --dropout 0.2",
    "onecycle": "--epochs 12 --optimizer sgd --lr 0.02 --schedule onecycle --mixup 0.2 --sampler balanced "
    "--label-smoothing 0.1 --grad-accum 2 --clip-grad 1 --augment light",
    "early stopping": "--epochs 30 --early-stopping 2 --lr 0.02",
    "default": "--arch seresnet13 --epochs 3 --batch-size 8",  # windows, one-cycle, AdamW, EMA and smoothing
}


@pytest.fixture(scope="session")
def whole(trained, tmp_path_factory):
    """The folder of a run that was never stopped, by the name of its recipe."""

    @functools.cache
    def train_whole(name):
        out = tmp_path_factory.mktemp("whole")
        train(trained, out, "--cache-dir", trained / "cache", *RECIPES[name].split())
        return out

    return train_whole


@pytest.fixture
def command(trained):
    """The arguments of a run by a recipe."""
    places = ["--data-dir", trained, "--cache-dir", trained / "cache"]
    return lambda name, out: [*places, "--output-dir", out, *SMALL, *RECIPES[name].split()]


def go_on(*args):
    """Resumes; returns what is printed."""
    code, printed, err = run(main, *args)
    assert (code, err) == (0, "")
    return printed


def printed_command(err):
    """The arguments of the command that goes on, as standard error has it."""
    python, script, *args = shlex.split(err.partition("go on with: ")[2])
    assert (python, script) == ("python", "train_emotion_cnn.py")
    return args


def assert_same_run(out, expected):
    assert differing(out / FINAL_NAME, expected / FINAL_NAME) == set()
    assert differing(out / BEST_NAME, expected / BEST_NAME) == set()
    assert read_metrics(out) == read_metrics(expected)
    assert {path.name for path in out.iterdir()} == FILES


# It ends as a run that was never stopped


@pytest.mark.parametrize("name", RECIPES)
def test_stopped_before_the_last_epoch(name, whole, command, tmp_path):
    """With early stopping that is while it waits for a better epoch."""
    done = load(whole(name) / FINAL_NAME)["epoch"]
    args = printed_command(interrupt(main, command(name, tmp_path), "format_row", call=done - 1))
    printed = go_on(*args)
    assert f"resumed after epoch {done - 1}" in printed and f"epoch {done}/" in printed
    assert f"epoch {done - 1}/" not in printed
    assert_same_run(tmp_path, whole(name))
    if name == "early stopping":
        epochs = [load(whole(name) / file)["epoch"] for file in (BEST_NAME, FINAL_NAME)]
        assert epochs[1] == epochs[0] + 2 < 30 and "finished" in go_on("--resume", "--output-dir", tmp_path)


def test_two_and_two_epochs_are_four(whole, command, tmp_path):
    go_on(*command("plateau", tmp_path), "--epochs", 2)
    printed = go_on("--resume", "--output-dir", tmp_path, "--epochs", 4)
    assert "resumed after epoch 2" in printed and "epoch 3/4" in printed and "epoch 2/4" not in printed
    assert differing(tmp_path / FINAL_NAME, whole("plateau") / FINAL_NAME) == set()
    assert differing(tmp_path / BEST_NAME, whole("plateau") / BEST_NAME) <= {"config"}  # which has its epochs
    assert read_metrics(tmp_path) == read_metrics(whole("plateau"))


@posix_only
@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_a_signal_from_outside(name, trained, whole, command, tmp_path, monkeypatch):
    """In folders whose names have spaces and letters that ASCII lacks."""
    (tmp_path / "Gesichter, große & kleine").symlink_to(trained)
    words = [*command("onecycle", "Lauf 1 (ä)"), "--data-dir", "Gesichter, große & kleine"]
    process = start(main, *words, cwd=tmp_path)
    assert any(line.startswith("epoch 1/") for line in process.stdout)
    process.send_signal(getattr(signal, name))
    _, err = process.communicate(timeout=60)
    assert 1 <= load(tmp_path / "Lauf 1 (ä)" / FINAL_NAME)["epoch"] < 12
    if name == "SIGINT":
        assert process.returncode == 130 and "Traceback" not in err
        assert not list((tmp_path / "Lauf 1 (ä)").glob(".*"))
    monkeypatch.chdir(tmp_path)
    args = printed_command(err) if name == "SIGINT" else ["--resume", "Lauf 1 (ä)/" + FINAL_NAME]
    assert "resumed after epoch" in go_on(*args)
    assert differing("Lauf 1 (ä)/" + FINAL_NAME, whole("onecycle") / FINAL_NAME) == {"config"}  # data_dir
    assert differing("Lauf 1 (ä)/" + BEST_NAME, whole("onecycle") / BEST_NAME) == set()


@pytest.mark.parametrize("function", ["augment", "evaluate", "save", "replace_file"])
def test_ctrl_c_in_the_first_epoch(function, trained, command, tmp_path):
    """There is nothing to resume then, and what the folder held is as it was."""
    (tmp_path / "empty").mkdir()
    shutil.copytree(trained / "out", tmp_path / "earlier")
    for name in ("empty", "earlier"):
        before = {path: path.read_bytes() for path in (tmp_path / name).iterdir()}
        err = interrupt(main, [*command("plateau", tmp_path / name), "--seed", "3"], function)
        assert "nothing to resume" in err and "--resume" not in err
        assert {path: path.read_bytes() for path in (tmp_path / name).iterdir()} == before


@pytest.mark.parametrize(("function", "call"), [("augment", 5), ("save_checkpoint", 3), ("write_history", 2)])
def test_ctrl_c_in_the_second_epoch(function, call, whole, command, tmp_path):
    err = interrupt(main, command("onecycle", tmp_path), function, call)
    assert not list(tmp_path.glob(".*"))
    go_on(*printed_command(err))
    assert_same_run(tmp_path, whole("onecycle"))


def test_elsewhere_the_old_run_stays(whole, command, tmp_path):
    """Stopped right after it was resumed, the command that is printed must work, though no epoch has ended there."""
    first, second = tmp_path / "first", tmp_path / "second"
    interrupt(main, command("plateau", first), "format_row")
    before = {path.name: path.read_bytes() for path in first.iterdir()}
    second.mkdir()
    (second / BEST_NAME).write_bytes(b"the best of an earlier run")
    go_on(*printed_command(interrupt(main, ["--resume", first / FINAL_NAME, "--output-dir", second], "augment")))
    assert {path.name: path.read_bytes() for path in first.iterdir()} == before
    assert (second / PREVIOUS_NAME).read_bytes() == b"the best of an earlier run"
    (second / PREVIOUS_NAME).unlink()
    assert_same_run(second, whole("plateau"))


def test_killed_between_best_and_final(whole, command, tmp_path):
    """The epoch that is done again may come out worse, on another device say; the best file is still of the run."""
    interrupt(main, command("plateau", tmp_path), "format_row", call=2)
    best = load(tmp_path / BEST_NAME)
    torch.save(best | {"epoch": 3, "metrics": best["metrics"] | {"val_acc": 0.99}}, tmp_path / BEST_NAME)
    go_on("--resume", "--output-dir", tmp_path)
    score = {"val_acc": 0.99, "val_loss": best["metrics"]["val_loss"], "epoch": 3}
    assert load(tmp_path / FINAL_NAME)["best_metric"] == score
    assert load(tmp_path / BEST_NAME)["metrics"]["val_acc"] == 0.99
    assert differing(tmp_path / FINAL_NAME, whole("plateau") / FINAL_NAME) == {"best_metric"}


def test_teachers(trained, whole, tmp_path):
    """Of two teachers each batch draws one; resumed, the same are drawn, wherever their files are."""
    teachers = [tmp_path / "one.pth", trained / "out" / BEST_NAME]
    train_only(trained, tmp_path / "one", "--epochs", 1, "--seed", 5, "--arch", "cnn4")  # another arch, the same input
    (tmp_path / "one" / BEST_NAME).rename(teachers[0])
    done = train_only(trained, tmp_path / "whole", "--epochs", 2, "--teacher", *teachers)
    assert load(tmp_path / "whole" / BEST_NAME)["config"]["teacher"] == ["one.pth", BEST_NAME]
    out = tmp_path / "parts"
    assert "teachers: cnn4, cnn4_bn\n" in train(trained, out, "--epochs", 1, "--teacher", *teachers)
    assert "state_dict" in differing(out / FINAL_NAME, trained / "out" / FINAL_NAME)
    teachers[0] = teachers[0].rename(tmp_path / "moved.pth")
    resumed = ["--resume", "--output-dir", out, "--epochs", 2]
    assert_refused(main, resumed, "one.pth")
    assert_refused(main, [*resumed, "--teacher", teachers[1]], "--teacher", FINAL_NAME)
    go_on(*resumed, "--teacher", *teachers)
    assert same(load(out / FINAL_NAME)["state_dict"], done["state_dict"])
    assert_refused(main, ["--resume", out / FINAL_NAME, "--output-dir", trained / "out"], "--teacher", "overwritten")


def test_the_gradient_scale_of_fp16(tmp_path):
    """Which the command line allows on CUDA only."""

    def make_step():
        model = create_model("cnn4_bn", 3, image_size=32)
        optimizer = make_optimizer("adam", model, lr=1e-3, weight_decay=0)
        augment = lambda images, generator: to_input(images, model.info.input_spec)  # noqa: E731
        return TrainStep(model, optimizer, augment, precision=torch.float16)

    step, resumed = make_step(), make_step()
    for _ in range(3):
        step(torch.zeros(4, 1, 32, 32, dtype=torch.uint8), torch.tensor([0, 1, 2, 0]))
    progress = resume.Progress()
    progress.record({"epoch": 1, "val_loss": 1.0, "val_acc": 0.5, "train_loss": 1.0, "train_acc": 0.5})
    resume.save(tmp_path, step, progress, {"epochs": 2}, resume.fingerprint("", None), is_best=True)
    path = tmp_path / FINAL_NAME
    assert (
        resume.restore(read_checkpoint(path), path, resumed, resume.fingerprint("", None)).history == progress.history
    )
    assert resumed.scaler.state_dict() == step.scaler.state_dict() != make_step().scaler.state_dict()


def test_a_checkpoint_of_version_1(whole, command, tmp_path):
    """Whose scratch networks had numbered layers, and which held more than it takes to resume."""
    interrupt(main, command("plateau", tmp_path), "format_row", call=2)

    def number(key):
        child, layer, rest = key.split(".")
        return f"{int(layer) + (child == 'classifier') * V1_FEATURES['cnn4_bn']}.{rest}"

    for name in (BEST_NAME, FINAL_NAME):
        checkpoint = load(tmp_path / name) | {"format_version": 1}
        weights = [checkpoint, checkpoint.get("ema", {})]
        for part, key in ((part, key) for part in weights for key in ("state_dict", "train_state_dict") if key in part):
            part[key] = {number(key): value for key, value in part[key].items()}
        if name == FINAL_NAME:
            extra = {"rng": {"seed": 0, "next_epoch": 3}, "early_stopping": {"since_best": 0}, "class_weights": None}
            checkpoint |= extra
        torch.save(checkpoint, tmp_path / name)
    assert "0.weight" in load(tmp_path / FINAL_NAME)["ema"]["state_dict"]
    go_on("--resume", "--output-dir", tmp_path)
    assert_same_run(tmp_path, whole("plateau"))


# Files and folders


def test_a_finished_run_only_redoes_its_reports(trained, tmp_path):
    shutil.copytree(trained / "out", tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for path in before:
        if path.suffix != ".pth":
            path.unlink()
    assert "finished" in go_on("--resume", tmp_path / "out" / FINAL_NAME)
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_flags_that_agree_are_accepted(trained, tmp_path, monkeypatch):
    """The command of the run with --resume added to it; relative paths are those of the current folder."""
    shutil.copytree(trained / "out", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "moved").symlink_to(trained)  # the images are compared, not their folder
    words = ["--data-dir", "moved", "--output-dir", "out", *SMALL, "--epochs", 2, "--lr", "1e-3", "--image-size", 48]
    assert "resumed after epoch 1" in go_on(*words, "--resume")
    whole = train_only(trained, tmp_path / "whole", "--epochs", 2)
    assert differing(whole, tmp_path / "out" / FINAL_NAME) == {"config"}
    assert load(tmp_path / "out" / FINAL_NAME)["config"]["data_dir"] == str(tmp_path / "moved")


def test_an_earlier_copy_never_overwrites_a_later_final_checkpoint(whole, command, tmp_path):
    now, copy = tmp_path / "now", tmp_path / "copy"
    interrupt(main, command("plateau", now), "format_row")
    shutil.copytree(now, copy)
    go_on("--resume", "--output-dir", now)
    shutil.copy(copy / FINAL_NAME, now / "copy.pth")
    for path in (copy / FINAL_NAME, now / "copy.pth"):
        assert_refused(main, ["--resume", path, "--output-dir", now], "--output-dir", "already")
    (now / "copy.pth").unlink()
    assert_same_run(now, whole("plateau"))
    go_on("--resume", copy / FINAL_NAME)
    assert_same_run(copy, whole("plateau"))


def test_a_disk_that_is_full_at_the_first_save_leaves_the_run_before(trained, command, tmp_path, monkeypatch):
    shutil.copytree(trained / "out", tmp_path / "out")
    before = {name: (tmp_path / "out" / name).read_bytes() for name in (BEST_NAME, FINAL_NAME)}
    write = torch.save

    def fill_disk(content, file):
        if "train_state_dict" in content:
            raise OSError(28, "No space left on device")
        write(content, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fill_disk)
        assert_refused(main, command("plateau", tmp_path / "out"), "No space left", FINAL_NAME)
    assert {name: (tmp_path / "out" / name).read_bytes() for name in before} == before
    go_on("--resume", "--output-dir", tmp_path / "out", "--epochs", 2)


# What is refused


def change_image(data, out):
    draw_image(77).save(data / "train" / "happy" / "happy_001.png")


def rename_class(data, out):
    for split in ("train", "test"):
        (data / split / "happy").rename(data / split / "joy")


def take_best_of_another_run(data, out):
    train_only(data, data / "other", "--epochs", 1, "--seed", 1)
    shutil.copy(data / "other" / BEST_NAME, out / BEST_NAME)


def change_checkpoint(name, **parts):
    return lambda data, out: torch.save(load(out / name) | parts, out / name)


def cut(name):
    return lambda data, out: os.truncate(out / name, os.path.getsize(out / name) // 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (change_image, ["changed", FINAL_NAME]),
        (rename_class, ["changed", FINAL_NAME]),
        (take_best_of_another_run, [BEST_NAME, "another run"]),
        (change_checkpoint(BEST_NAME, epoch=3), [BEST_NAME, "later epochs"]),
        (lambda data, out: (out / BEST_NAME).unlink(), [BEST_NAME, "missing"]),
        (lambda data, out: (out / FINAL_NAME).unlink(), ["--resume", FINAL_NAME, "first epoch"]),
        (lambda data, out: shutil.copy(out / BEST_NAME, out / FINAL_NAME), ["--resume", "can't be resumed"]),
        (lambda data, out: (out / FINAL_NAME).write_text("text"), [FINAL_NAME, "no checkpoint"]),
        (cut(BEST_NAME), [BEST_NAME, "damaged"]),
        (cut(FINAL_NAME), [FINAL_NAME, "damaged"]),
        (change_checkpoint(FINAL_NAME, train_state_dict={}), ["--resume", FINAL_NAME, "damaged"]),
        (change_checkpoint(FINAL_NAME, optimizer={"state": 1}), ["--resume", FINAL_NAME, "damaged"]),
    ],
)
def test_changed_and_damaged_files(change, words, trained, tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(trained, data, ignore=shutil.ignore_patterns("out"))
    shutil.copytree(trained / "out", out)
    change(data, out)
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert_refused(main, ["--resume", "--output-dir", out, "--data-dir", data, "--epochs", 2], *words)
    assert {path: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize(
    "flag",
    [
        *("--lr 0.5", "--arch cnn4", "--seed 5", "--ema 0.5", "--batch-size 8", "--augment strong", "--image-size 64"),
        *("--schedule plateau", "--sampler balanced", "--early-stopping 3", "--weights none.pth", "--val-fraction 0.2"),
    ],
)
def test_flags_that_contradict_the_run(flag, trained):
    assert_refused(main, ["--resume", trained / "out" / FINAL_NAME, *flag.split()], *flag.split(), FINAL_NAME)


def test_epochs_that_contradict_the_run(whole):
    for name, epochs, word in (("onecycle", 13, "onecycle"), ("plateau", 3, "4 epochs that are done")):
        assert_refused(main, ["--resume", whole(name) / FINAL_NAME, "--epochs", epochs], "--epochs", word)
