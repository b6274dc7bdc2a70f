"""Several processes: the same model as from one, every image once, exact counts, and what is left when one dies.

The processes are torchrun's, on the CPU, with gloo between them.
"""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_folder, free_port, run
from PIL import Image

import train_emotion_cnn
from checkpoints import BEST_NAME, FINAL_NAME, read_checkpoint
from predict_emotion import load_model
from preprocessing import read_image

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")

REPO = Path(__file__).resolve().parent.parent
PLAIN = [  # nothing in it is random, and no image depends on another
    *("--arch", "tiny", "--augment", "none", "--precision", "fp32", "--optimizer", "sgd", "--lr", "0.02"),
    *("--weight-decay", "0", "--schedule", "none", "--batch-size", "33"),
]
SUMS = [*PLAIN, "--epochs", "2", "--class-weights", "balanced", "--clip-grad", "0.05", "--grad-accum", "2"]
DRAWINGS = ["--data-dir", str(REPO), "--arch", "cnn4_bn", "--epochs", "5"]
BN = ["--arch", "cnn4_bn", "--augment", "light", "--ema", "0.9", "--batch-size", "16"]
SCRIPT = """
import sys
sys.path.insert(0, {repo!r})
from torch import nn
import models
import train_emotion_cnn
from console import run_script

@models.register("tiny", models.get_arch("cnn4").recipe)
def tiny(num_classes, image_size):
    model = nn.Sequential()
    parts = nn.Conv2d(1, 8, 5), nn.ReLU(), nn.MaxPool2d(4), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.MaxPool2d(3)
    model.features = nn.Sequential(*parts)
    model.classifier = nn.Sequential(nn.Flatten(), nn.Linear(144, num_classes))
    return model

if __name__ == "__main__":
    run_script(train_emotion_cnn.main)
"""
SEVERAL = """
import json, os, sys
from train import run_script, train_emotion_cnn

def main():
    for port, words in json.loads(sys.argv[1]):  # torchrun's own store serves one group of processes only
        os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}
        train_emotion_cnn.main(words)

run_script(main)  # which ends the process as that of a training ends, before gloo's threads can abort it
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """data/ with 160 + 19 + 15 images, and scripts. Four epochs of batches of 33, shared as 16 and 17, are 20 steps.

    The images are smooth: in flat ones max-pooling has ties, which rounding decides.
    """
    root = tmp_path_factory.mktemp("several")
    for split, count in (("train", 54), ("val", 7), ("test", 5)):
        draw_folder(root / "data" / split, {"angry": count, "happy": count - (count > 5), "sad": count - (count > 5)})
    for path in (root / "data").rglob("*.png"):
        small = Image.open(path).resize((6, 6), Image.Resampling.NEAREST)
        small.resize((48, 48), Image.Resampling.BICUBIC).save(path)
    (root / "train.py").write_text(SCRIPT.format(repo=str(REPO)))
    (root / "several.py").write_text(SEVERAL)
    return root


def flags(root, out, *args):
    words = ["--data-dir", root / "data", "--cache-dir", root / "cache", "--output-dir", root / out, *args]
    return [*map(str, words)]


def launch(*words, launcher=("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")):
    command = [sys.executable, *launcher, *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    return out


@pytest.fixture(scope="module")
def together(root):
    """What is printed by five runs, one after the other over the same two processes: starting takes longer than they.

    "bn" has batch-norm, whose statistics differ by process, dropout, EMA and augmentation.
    """
    several = [
        ["two", *PLAIN, "--epochs", "4"],
        ["sums2", *SUMS],
        ["half", *PLAIN, "--epochs", "2"],
        ["bn", *BN, "--epochs", "3"],
        ["drawings", *DRAWINGS],
    ]
    return finish(launch(root / "several.py", json.dumps([(free_port(), flags(root, *words)) for words in several])))


@pytest.fixture(scope="module")
def alone(root, together):
    """Runs four epochs, 20 steps, in one process, which also sums and goes on with "half"."""
    several = [["alone", *PLAIN, "--epochs", "4"], ["sums1", *SUMS], ["half", "--resume", "--epochs", "4"]]
    finish(launch(root / "several.py", json.dumps([(0, flags(root, *words)) for words in several]), launcher=()))


def assert_same_run(found, expected):
    """Two folders hold the same weights, history and report, except for rounding."""
    for name in (BEST_NAME, FINAL_NAME):
        one, other = (read_checkpoint(folder / name) for folder in (found, expected))
        torch.testing.assert_close(one["state_dict"], other["state_dict"], atol=1e-5, rtol=0)
    for key in ("train_loss", "train_acc", "val_loss", "val_acc"):
        rows = [[row[key] for row in checkpoint["history"]] for checkpoint in (one, other)]
        assert rows[0] == pytest.approx(rows[1], abs=1e-5)
    one, other = (json.loads((folder / "metrics.json").read_text()) for folder in (found, expected))
    for key in ("split", "count", "epoch", "temperature", "confusion_matrix"):
        assert one[key] == other[key]
    assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)


@pytest.mark.parametrize(("found", "expected"), [("two", "alone"), ("sums2", "sums1"), ("half", "alone")])
def test_two_processes_train_the_same_model(found, expected, root, alone):
    """Class weights and gradients, clipped and added up over passes, count the whole batch; one process goes on."""
    assert_same_run(root / found, root / expected)


def test_one_process_prints(together):
    assert "2 processes" in together and together.count("epoch 4/4") == 1 and "Split: test, 15 " in together


def test_two_machines_train_the_same_model(root, alone):
    where = ("--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(free_port()))
    words = [root / "train.py", *flags(root, "nodes", *PLAIN, "--epochs", "4")]
    launchers = [("-m", "torch.distributed.run", *where, "--node-rank", rank) for rank in "01"]
    for node in [launch(*words, launcher=launcher) for launcher in launchers]:
        finish(node)
    assert_same_run(root / "nodes", root / "alone")


def test_validation_is_that_of_the_saved_model(root, together):
    best = read_checkpoint(root / "bn" / BEST_NAME)
    model, names = load_model(root / "bn" / BEST_NAME, "cpu")
    paths = sorted((root / "data" / "val").glob("*/*.png"))
    images = torch.from_numpy(np.stack([read_image(path, model.info.input_spec) for path in paths]))
    with torch.inference_mode():
        logits = model((images.float() / 255 - 0.5) / 0.5)
    labels = torch.tensor([names.index(path.parent.name) for path in paths])
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    assert best["metrics"]["val_loss"] == pytest.approx(loss, abs=1e-5)
    assert best["metrics"]["val_acc"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())


def test_batch_norm_learns_as_in_one_process(root, together):
    """On the drawings that come with the project: other random numbers, but no worse by more than a seed's noise."""
    assert run(train_emotion_cnn.main, *flags(root, "drawings alone", *DRAWINGS))[0] == 0
    folders = [root / "drawings", root / "drawings alone"]
    accuracies = [json.loads((folder / "metrics.json").read_text())["accuracy"] for folder in folders]
    assert min(accuracies) > 0.55 and abs(accuracies[0] - accuracies[1]) < 0.12, accuracies


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_all_and_leaves_what_can_be_resumed(root, victim):
    words = flags(root, f"killed{victim}", *BN)
    process = launch(REPO / "train_emotion_cnn.py", *words, "--epochs", "500")
    try:
        assert any(line.startswith("epoch 2/") for line in process.stdout)
        children = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "train_emotion"], capture_output=True)
        workers = sorted(map(int, children.stdout.split()))
        os.kill(workers[victim], signal.SIGKILL)
        _, err = process.communicate(timeout=300)
    finally:
        process.terminate()  # which ends the workers too
    assert process.returncode != 0 and "SIGKILL" in err, err
    assert not any(os.path.exists(f"/proc/{worker}") for worker in workers)
    done = read_checkpoint(root / f"killed{victim}" / FINAL_NAME)["epoch"]
    code, out, err = run(train_emotion_cnn.main, *words, "--resume", "--epochs", done + 1)
    assert code == 0 and f"resumed after epoch {done}" in out, err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data-dir", "nowhere"], "error: no folder nowhere"),  # the first process fails, while the other waits
        (["--batch-size", "2"], "error: --batch-size 2 .* too few for 2 processes"),
        (["--lr", "1e30", "--epochs", "2"], "error: epoch 1/2: the loss became (nan|inf)"),
    ],
)
def test_a_mistake_ends_all(root, args, message):
    process = launch(root / "train.py", *flags(root, "mistake", *PLAIN, *args))
    out, err = process.communicate(timeout=300)
    assert process.returncode != 0 and re.search("^" + message, err, re.MULTILINE), err
    assert not (root / "mistake" / FINAL_NAME).exists() and "epoch 1/2 " not in out
