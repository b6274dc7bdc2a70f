"""--resume: a run that was stopped, at any point and in any way, ends with the weights of one that never was."""

import functools
import os
import shlex
import shutil
import signal

import pytest
import torch
from conftest import SMALL, assert_refused, differing, draw_image, interrupt, refusal, run, start
from test_train import FILES, load, read_files, read_metrics, train, train_only
from torch.optim import Adam

from checkpoints import BEST_NAME, FINAL_NAME, PREVIOUS_NAME, read_checkpoint
from engine import resume
from engine.step import TrainStep
from models import create_model
from train_emotion_cnn import main

RECIPES = {
    "plateau": "--epochs 4 --schedule plateau --ema 0.9 --augment strong --class-weights sqrt --dropout 0.2 "
    "--logit-adjustment 0.5",
    "onecycle": "--epochs 12 --optimizer sgd --lr 0.02 --schedule onecycle --mixup 0.2 --sampler balanced "
    "--label-smoothing 0.1 --grad-accum 2 --clip-grad 1 --augment light",
    "early stopping": "--epochs 30 --early-stopping 2 --lr 0.02",
    "default": "--arch seresnet13 --epochs 3 --batch-size 8",  # windows, Muon, EMA, smoothing and logit adjustment
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
    places = ["--data-dir", trained, "--cache-dir", trained / "cache"]
    return lambda name, out: [*places, "--output-dir", out, *SMALL, *RECIPES[name].split()]


def go_on(*args):
    code, printed, err = run(main, *args)
    assert (code, err) == (0, "")
    return printed


def printed_command(err):
    python, script, *args = shlex.split(err.partition("go on with: ")[2])
    assert (python, script) == ("python", "train_emotion_cnn.py")
    return args


def assert_same_run(out, expected):
    assert differing(out / FINAL_NAME, expected / FINAL_NAME) == set()
    assert differing(out / BEST_NAME, expected / BEST_NAME) == set()
    assert read_metrics(out) == read_metrics(expected)
    assert {path.name for path in out.iterdir()} == FILES


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
        assert load(tmp_path / BEST_NAME)["epoch"] == done - 2 < 28
        before = read_files(tmp_path)
        assert "finished" in go_on("--resume", "--output-dir", tmp_path) and read_files(tmp_path) == before


def test_two_and_two_epochs_are_four(whole, command, tmp_path):
    """With the whole command again: flags that agree with the run are accepted."""
    go_on(*command("plateau", tmp_path), "--epochs", 2)
    printed = go_on(*command("plateau", tmp_path), "--resume")
    assert "resumed after epoch 2" in printed and "epoch 3/4" in printed and "epoch 2/4" not in printed
    final = load(tmp_path / FINAL_NAME)
    assert final["scheduler"]["last_epoch"] == 4  # it sees the validation loss of every epoch
    assert final["scheduler"]["best"] == min(row["val_loss"] for row in final["history"])
    assert differing(tmp_path / FINAL_NAME, whole("plateau") / FINAL_NAME) == set()
    assert differing(tmp_path / BEST_NAME, whole("plateau") / BEST_NAME) <= {"config"}  # which has its epochs
    assert read_metrics(tmp_path) == read_metrics(whole("plateau"))


@pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_from_outside(number, trained, whole, command, tmp_path, monkeypatch):
    """Ctrl-C, `docker stop`, a closed terminal; in folders whose names have spaces and letters that ASCII lacks."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Gesichter, große & kleine").symlink_to(trained)
    out = tmp_path / "Lauf 1 (ä)"
    process = start(main, *command("onecycle", out.name), "--data-dir", "Gesichter, große & kleine")
    assert any(line.startswith("epoch 1/") for line in process.stdout)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err and not list(out.glob(".*"))
    assert 1 <= load(out / FINAL_NAME)["epoch"] < 12
    assert "resumed after epoch" in go_on(*printed_command(err))
    assert len({row["lr"] for row in load(out / FINAL_NAME)["history"]}) == 12
    assert differing(out / FINAL_NAME, whole("onecycle") / FINAL_NAME) == {"config"}  # data_dir
    assert differing(out / BEST_NAME, whole("onecycle") / BEST_NAME) == set()


@pytest.mark.parametrize("function", ["augment", "evaluate", "save", "replace_file"])
def test_ctrl_c_in_the_first_epoch(function, trained, command, tmp_path):
    """There is nothing to resume then, and what the folder held is as it was."""
    (tmp_path / "empty").mkdir()
    shutil.copytree(trained / "out", tmp_path / "earlier")
    for folder in (tmp_path / "empty", tmp_path / "earlier"):
        before = read_files(folder)
        err = interrupt(main, [*command("plateau", folder), "--seed", "3"], function)
        assert "nothing to resume" in err and "--resume" not in err
        assert read_files(folder) == before


@pytest.mark.parametrize(("function", "call"), [("augment", 5), ("save_checkpoint", 3), ("write_history", 2)])
def test_ctrl_c_in_the_second_epoch(function, call, whole, command, tmp_path):
    err = interrupt(main, command("plateau", tmp_path), function, call)
    assert not list(tmp_path.glob(".*"))
    assert "resumed after epoch" in go_on(*printed_command(err))
    assert_same_run(tmp_path, whole("plateau"))


def test_elsewhere_the_old_run_stays(whole, command, tmp_path):
    """Stopped right after it was resumed, the command that is printed must work, though no epoch has ended there."""
    first, second = tmp_path / "first", tmp_path / "second"
    interrupt(main, command("plateau", first), "format_row")
    before = read_files(first)
    second.mkdir()
    (second / BEST_NAME).write_bytes(b"the best of an earlier run")
    go_on(*printed_command(interrupt(main, ["--resume", first / FINAL_NAME, "--output-dir", second], "augment")))
    assert read_files(first) == before
    assert (second / PREVIOUS_NAME).read_bytes() == b"the best of an earlier run"
    (second / PREVIOUS_NAME).unlink()
    shutil.copy(first / FINAL_NAME, second / "earlier.pth")
    for path in (first / FINAL_NAME, second / "earlier.pth"):  # neither overwrites the later one
        assert_refused(main, ["--resume", path, "--output-dir", second], "--output-dir", "already")
    (second / "earlier.pth").unlink()
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


def test_teachers(trained, tmp_path):
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
    assert "state_dict" not in differing(out / FINAL_NAME, done)
    assert_refused(main, ["--resume", out / FINAL_NAME, "--output-dir", trained / "out"], "--teacher", "overwritten")


def test_the_gradient_scale_of_fp16(tmp_path):
    """Which the command line allows on CUDA only."""
    models = [create_model("cnn4_bn", 3, image_size=32) for _ in range(2)]
    step, resumed = (TrainStep(model, Adam(model.parameters()), None, precision=torch.float16) for model in models)
    step.scaler.load_state_dict(step.scaler.state_dict() | {"scale": 3.0})
    progress, path = resume.Progress(), tmp_path / FINAL_NAME
    progress.record({"epoch": 1, "val_loss": 1.0, "val_acc": 0.5, "train_loss": 1.0, "train_acc": 0.5})
    prints = resume.fingerprint("", None)
    resume.save(tmp_path, step, progress, {"epochs": 2}, prints, is_best=True)
    assert resume.restore(read_checkpoint(path), path, resumed, prints).history == progress.history
    assert resumed.scaler.get_scale() == 3.0


def change(name, **parts):
    return lambda data, out: torch.save(load(out / name) | parts, out / name)


def change_config(**values):
    return lambda data, out: change(FINAL_NAME, config=load(out / FINAL_NAME)["config"] | values)(data, out)


def change_optimizer(**values):
    def spoil(data, out):
        optimizer = load(out / FINAL_NAME)["optimizer"]
        optimizer["param_groups"][0] |= values
        change(FINAL_NAME, optimizer=optimizer)(data, out)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda data, out: draw_image(77).save(data / "train/happy/happy_001.png"), ["changed", FINAL_NAME]),
        (change(FINAL_NAME, class_names=["angry", "joy", "sad"]), ["changed", FINAL_NAME]),
        (change(BEST_NAME, config={"seed": 1}), [BEST_NAME, "another run"]),
        (change(BEST_NAME, epoch=3), [BEST_NAME, "later epochs"]),
        (change(BEST_NAME, metrics={}), [BEST_NAME, "damaged"]),
        (change(FINAL_NAME, history=[{}]), [FINAL_NAME, "damaged"]),
        (change_optimizer(lr="x"), [FINAL_NAME, "damaged"]),
        (change_config(output_dir="elsewhere", teacher=["--help"]), ["--teacher", "'--help'"]),
        (lambda data, out: (out / BEST_NAME).unlink(), [BEST_NAME, "missing"]),
        (lambda data, out: (out / FINAL_NAME).unlink(), ["--resume", FINAL_NAME, "first epoch"]),
        (lambda data, out: shutil.copy(out / BEST_NAME, out / FINAL_NAME), ["--resume", "can't be resumed"]),
        (lambda data, out: os.truncate(out / BEST_NAME, 1_000_000), [BEST_NAME, "damaged"]),
        (change(FINAL_NAME, train_state_dict={}), ["--resume", FINAL_NAME, "damaged"]),
        *(
            (change_config(**{name: value}), ["--resume", FINAL_NAME, "damaged", "--" + name])
            for name, value in dict(epochs="x", lr=-1, optimizer="lion", seed=True, augment=None).items()
        ),
    ],
)
def test_changed_and_damaged_files(spoil, words, trained, tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(trained, data, ignore=shutil.ignore_patterns("out"))
    shutil.copytree(trained / "out", out)
    spoil(data, out)
    before = read_files(out)
    assert_refused(main, ["--resume", "--output-dir", out, "--data-dir", data, "--epochs", 2], *words)
    assert read_files(out) == before


def test_the_report_is_of_the_own_best(trained, tmp_path):
    shutil.copy(trained / "out" / BEST_NAME, tmp_path)
    best = load(tmp_path / BEST_NAME)
    progress = resume.Progress(best={"epoch": 1, **{name: best["metrics"][name] for name in ("val_acc", "val_loss")}})
    assert resume.read_best(tmp_path, progress)["epoch"] == 1
    progress.best["val_loss"] += 1e-9
    assert "another run" in refusal(resume.read_best, tmp_path, progress)


@pytest.mark.skipif(os.name != "posix", reason="kills a process")
def test_a_run_owns_its_folder(command, tmp_path):
    """Until it ends, even if it is killed."""
    process = start(main, *command("plateau", tmp_path), "--epochs", 1000)
    assert any(line.startswith("epoch 1/") for line in process.stdout)
    for words in ([], ["--resume"], ["--seed", "9"]):
        assert_refused(main, [*command("plateau", tmp_path), "--epochs", 1000, *words], "another run", tmp_path)
    process.kill()
    process.communicate()
    go_on(*command("plateau", tmp_path), "--epochs", load(tmp_path / FINAL_NAME)["epoch"] + 1, "--resume")


def test_flags_that_contradict_the_run(trained, whole):
    for flag in ("--lr 0.5", "--arch cnn4", "--seed 5", "--augment strong", "--weights none.pth"):
        assert_refused(main, ["--resume", trained / "out" / FINAL_NAME, *flag.split()], *flag.split(), FINAL_NAME)
    for name, epochs, words in (("onecycle", 13, "onecycle"), ("plateau", 3, "4 epochs that are done")):
        assert_refused(main, ["--resume", whole(name) / FINAL_NAME, "--epochs", epochs], "--epochs", words)
