"""Several processes: the same model as from one, every image once, exact counts, and what is left when one dies.

The processes are torchrun's, on the CPU, with gloo between them; what they run is the end of this file.
"""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import REPO, draw_folder, free_port, refusal, run
from PIL import Image
from torch import nn

import models
import train_emotion_cnn
from checkpoints import BEST_NAME, FINAL_NAME, read_checkpoint
from console import run_script
from engine import distributed
from errors import InputError

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")

PLAIN = [  # nothing in it is random, and no image depends on another
    *("--arch", "tiny", "--augment", "none", "--precision", "fp32", "--optimizer", "sgd", "--lr", "0.02"),
    *("--weight-decay", "0", "--schedule", "none", "--batch-size", "33", "--epochs", "4"),
]
SUMS = [*PLAIN, "--epochs", "2", "--class-weights", "balanced", "--clip-grad", "0.05", "--grad-accum", "2"]
MUON = [*PLAIN, "--optimizer", "muon", "--schedule", "linear", "--epochs", "2"]
# Batch-norm, whose statistics differ by process, in equal shares of batches; weights hardly move
NORM = [*PLAIN, "--arch", "cnn4_bn", "--lr", "1e-9", "--ema", "0.9", "--batch-size", "32", "--epochs", "2"]
MISTAKES = {  # of which the last one ends all
    "--batch-size 2": "--batch-size 2 of 160 images to train on is too few for 2 processes",
    "--lr 1e30": "epoch 1/4: the loss became",
    "--seed RANK": "the processes of this run have not the same flags",
    "--data-dir nowhere": "error: no folder nowhere",  # the first process finds it while the other waits
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """data/ with 160 + 19 images. Four epochs of batches of 33, shared as 16 and 17, are 20 steps.

    The images are smooth: in flat ones max-pooling has ties, which rounding decides.
    """
    root = tmp_path_factory.mktemp("several")
    draw_folder(root / "data" / "train", {"angry": 54, "happy": 53, "sad": 53})
    draw_folder(root / "data" / "val", {"angry": 7, "happy": 6, "sad": 6})
    for path in (root / "data").rglob("*.png"):
        small = Image.open(path).resize((6, 6), Image.Resampling.NEAREST)
        small.resize((48, 48), Image.Resampling.BICUBIC).save(path)
    return root


def flags(root, out, *args):
    places = ["--data-dir", root / "data", "--cache-dir", root / "cache", "--output-dir", root / out]
    return [*map(str, places), *args]


def launch(script, *words):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, *words]
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def together(root):
    """What runs print, one after the other over the same two processes, since starting takes longer than they."""
    machines = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}  # torchrun's on two, each of which fills its cache
    runs = [
        ({}, ["two", *PLAIN]),
        ({}, ["sums2", *SUMS]),
        ({}, ["muon2", *MUON]),
        ({}, ["half", *PLAIN, "--epochs", "2"]),
        ({}, ["norm2", *NORM]),
        (machines, ["machines", *PLAIN, "--cache-dir", str(root / "their cache")]),
        *(({}, ["mistake", *PLAIN, *args.split()]) for args in MISTAKES),
    ]
    runs = [(env | {"MASTER_PORT": str(free_port())}, flags(root, *words)) for env, words in runs]
    process = launch(__file__, json.dumps(runs))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1, out + err
    return out + err


@pytest.fixture(scope="module")
def alone(root, together):
    """The same runs in one process, which also goes on with "half"."""
    register_tiny()
    for words in (
        ["one", *PLAIN],
        ["sums1", *SUMS],
        ["muon1", *MUON],
        ["norm1", *NORM],
        ["half", "--resume", "--epochs", "4"],
    ):
        code, _, err = run(train_emotion_cnn.main, *flags(root, *words))
        assert code == 0, err
    yield
    del models.ARCHS["tiny"]


@pytest.mark.parametrize(
    "found, expected", [("two", "one"), ("sums2", "sums1"), ("muon2", "muon1"), ("half", "one"), ("machines", "one")]
)
def test_two_processes_train_the_same_model(found, expected, root, alone):
    """Class weights and gradients, clipped and added up over passes, count the whole batch; one process goes on."""
    for name in (BEST_NAME, FINAL_NAME):
        one, other = (read_checkpoint(root / folder / name) for folder in (found, expected))
        torch.testing.assert_close(one["state_dict"], other["state_dict"], atol=1e-5, rtol=0)
    for key in ("train_loss", "train_acc", "val_loss", "val_acc"):
        rows = [[row[key] for row in checkpoint["history"]] for checkpoint in (one, other)]
        assert rows[0] == pytest.approx(rows[1], abs=1e-5)
    one, other = (json.loads((root / folder / "metrics.json").read_text()) for folder in (found, expected))
    for key in ("split", "count", "epoch", "temperature", "confusion_matrix"):
        assert one[key] == other[key]
    assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)


def test_batch_norm_and_validation_are_of_all_images(root, alone):
    """The means of its first layer are the same as in one process; its variances are over half a batch each."""
    for key in ("state_dict", "train_state_dict"):  # the EMA's, and those of training
        one, other = (read_checkpoint(root / folder / FINAL_NAME)[key] for folder in ("norm2", "norm1"))
        names = [next(name for name in one if name.endswith(end)) for end in ("running_mean", "running_var")]
        torch.testing.assert_close(one[names[0]], other[names[0]], atol=1e-5, rtol=0)
        torch.testing.assert_close(one[names[1]], other[names[1]], atol=1e-5, rtol=0.1)
    metrics = json.loads((root / "norm2" / "metrics.json").read_text())  # by one process, from the file
    assert (metrics["split"], metrics["count"], metrics["temperature"]) == ("val", 19, 1.0)
    assert metrics["loss"] == pytest.approx(metrics["val"]["val_loss"], abs=1e-5)
    assert metrics["accuracy"] == pytest.approx(metrics["val"]["val_acc"])


def test_one_process_prints_and_all_see_a_mistake(root, together):
    assert ", 2 processes\n" in together and together.count("Split: val, 19 ") == 6
    assert together.count("epoch 2/2") == 4 and together.count("epoch 4/4") == 2
    assert [together.count(message) for message in MISTAKES.values()] == [2, 2, 2, 2]
    assert not (root / "mistake" / FINAL_NAME).exists()


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
def test_a_process_that_dies_ends_all_and_leaves_what_can_be_resumed(root):
    words = flags(root, "killed", "--arch", "cnn4_bn", "--batch-size", "16")
    process = launch(REPO / "train_emotion_cnn.py", *words, "--epochs", "500")
    try:
        assert any(line.startswith("epoch 1/") for line in process.stdout)
        children = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "train_emotion"], capture_output=True)
        os.kill(max(map(int, children.stdout.split())), signal.SIGKILL)
        _, err = process.communicate(timeout=300)  # until the pipe is closed, which the other worker has open, too
    finally:
        process.terminate()  # which ends the workers too
    assert process.returncode != 0 and "SIGKILL" in err, err
    done = read_checkpoint(root / "killed" / FINAL_NAME)["epoch"]
    code, out, err = run(train_emotion_cnn.main, *words, "--resume", "--epochs", done + 1)
    assert code == 0 and f"resumed after epoch {done}" in out, err


def test_what_torchrun_is_refused(root, monkeypatch):
    whole = dict(RANK="98", WORLD_SIZE="99", LOCAL_RANK="98", LOCAL_WORLD_SIZE="99", MASTER_ADDR="x", MASTER_PORT="1")
    for name, value in (whole | {"TORCHELASTIC_RUN_ID": "x"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    settings, _ = train_emotion_cnn.parse_settings(list(map(str, flags(root, "restarted"))))
    assert "--resume" in refusal(train_emotion_cnn.check_group, settings, None, {}, distributed.ALONE)
    for device, words in (("cuda:1", "each its own GPU"), ("mps", "each its own GPU"), ("cuda", "99 processes")):
        assert words in refusal(distributed.init, torch.device(device))
    for left in (
        "RANK",
        "MASTER_ADDR",
        "TORCHELASTIC_RUN_ID",
    ):  # all but one of the variables, as a shell may keep them
        with monkeypatch.context() as context:
            context.delenv(left)
            assert distributed.init(torch.device("cpu")) == (distributed.ALONE, torch.device("cpu"))
    monkeypatch.setenv("RANK", "99")  # of 99
    assert distributed.init(torch.device("cpu")) == (distributed.ALONE, torch.device("cpu"))


def register_tiny():
    @models.register("tiny", models.get_arch("cnn4").recipe)
    def tiny(num_classes, image_size):
        model = nn.Sequential()
        parts = nn.Conv2d(1, 8, 5), nn.ReLU(), nn.MaxPool2d(4), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.MaxPool2d(3)
        model.features = nn.Sequential(*parts)
        model.classifier = nn.Sequential(nn.Flatten(), nn.Linear(144, num_classes))
        return model


def train_several():
    for env, words in json.loads(sys.argv[1]):
        before = dict(os.environ)
        os.environ |= env | {"TORCHELASTIC_USE_AGENT_STORE": "False"}  # which serves one group of processes only
        try:
            train_emotion_cnn.main([os.environ["RANK"] if word == "RANK" else word for word in words])
        except InputError as error:
            if "nowhere" in words:
                raise
            print(error, flush=True)
            distributed.shutdown()  # every process has failed
        os.environ |= before


if __name__ == "__main__":
    register_tiny()
    run_script(train_several)  # which ends the process as that of a training ends, before gloo's threads can abort it
