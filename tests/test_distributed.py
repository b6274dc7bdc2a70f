"""Many processes: the same network as from one, every picture once, exact counts, and what is left when one dies.

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
from conftest import draw_folder, free_port
from PIL import Image

import train_emotion_cnn
from checkpoints import BEST_NAME, FINAL_NAME, read_checkpoint
from engine.distributed import Group
from predict_emotion import load_model
from preprocessing import read_image
from splits import Batches

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")

REPO = Path(__file__).resolve().parent.parent
PLAIN = [
    "--arch",
    "plain_cnn4",
    "--augment",
    "none",
    "--precision",
    "fp32",
    "--optimizer",
    "sgd",
    "--lr",
    "0.003",
    "--weight-decay",
    "0",
    "--schedule",
    "none",
    "--batch-size",
    "33",
]
SUMS = [*PLAIN, "--epochs", "2", "--class-weights", "balanced", "--clip-grad", "0.05", "--grad-accum", "2"]
SCRIPT = '''
import sys
sys.path.insert(0, {repo!r})
import models
import train_emotion_cnn
from console import run_script

@models.register("plain_cnn4", models.get_arch("cnn4").recipe)
def plain_cnn4(num_classes, image_size, dropout):
    """cnn4 without any dropout, so that nothing in it is random."""
    model = models.get_arch("cnn4").build(num_classes, image_size, 0.0)
    for module in model.modules():
        if isinstance(module, models.Dropout):
            module.p = 0.0
    return model

if __name__ == "__main__":
    run_script(train_emotion_cnn.main)
'''
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
    """data/ with 160 + 19 + 15 pictures, and scripts. Four epochs of batches of 33, shared as 16 and 17, are 20 steps.

    The pictures are smooth: in flat ones max-pooling has ties, which rounding decides.
    """
    root = tmp_path_factory.mktemp("many")
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


def start(root, out, *args, **options):
    return launch(root / "train.py", *flags(root, out, *args), **options)


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    return out


def largest_gap(one, other):
    pairs = zip(one["state_dict"].values(), other["state_dict"].values(), strict=True)
    return max((a.double() - b.double()).abs().max().item() for a, b in pairs)


@pytest.fixture(scope="module")
def together(root):
    """What is printed by four runs, one after the other over the same two processes: starting takes longer than they.

    "bn" has batch-norm, whose statistics differ by process, dropout, EMA and augmentation.
    """
    many = [
        ["two", *PLAIN, "--epochs", "4"],
        ["sums2", *SUMS],
        ["half", *PLAIN, "--epochs", "2"],
        ["bn", "--arch", "cnn4_bn", "--augment", "light", "--ema", "0.9", "--batch-size", "16", "--epochs", "3"],
    ]
    return finish(launch(root / "several.py", json.dumps([(free_port(), flags(root, *words)) for words in many])))


@pytest.fixture(scope="module")
def alone(root, together):
    """The final checkpoint of four epochs, 20 steps, in one process, which also sums and goes on with "half"."""
    many = [["alone", *PLAIN, "--epochs", "4"], ["sums1", *SUMS], ["half", "--resume", "--epochs", "4"]]
    finish(launch(root / "several.py", json.dumps([(0, flags(root, *words)) for words in many]), launcher=()))
    return read_checkpoint(root / "alone" / FINAL_NAME)


def assert_same_run(found, alone):
    assert largest_gap(found, alone) < 1e-5
    for name in ("train_loss", "train_acc", "val_loss", "val_acc"):
        rows = [[row[name] for row in checkpoint["history"]] for checkpoint in (found, alone)]
        assert rows[0] == pytest.approx(rows[1], abs=1e-5)


def test_two_processes_train_the_same_network(root, together, alone):
    assert "2 processes" in together and together.count("epoch 4/4") == 1  # one of them prints
    assert "Split: test, 15 pictures" in together
    assert_same_run(read_checkpoint(root / "two" / FINAL_NAME), alone)
    assert json.loads((root / "two" / "metrics.json").read_text())["count"] == 15


def test_sums_of_parts(root, alone):
    """Class weights, gradients clipped and added up over passes: all of it counts the whole batch."""
    assert_same_run(*(read_checkpoint(root / name / FINAL_NAME) for name in ("sums2", "sums1")))


def test_two_machines_train_the_same_network(root, alone):
    where = ("--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(free_port()))
    nodes = [
        start(
            root,
            "nodes",
            *PLAIN,
            "--epochs",
            "4",
            launcher=("-m", "torch.distributed.run", *where, "--node-rank", rank),
        )
        for rank in "01"
    ]
    for node in nodes:
        finish(node)
    assert_same_run(read_checkpoint(root / "nodes" / FINAL_NAME), alone)


def test_resume_with_another_number_of_processes(root, alone):
    assert_same_run(read_checkpoint(root / "half" / FINAL_NAME), alone)


def test_validation_is_that_of_the_saved_network(root, together):
    best = read_checkpoint(root / "bn" / BEST_NAME)
    model, names = load_model(root / "bn" / BEST_NAME, "cpu")
    paths = sorted((root / "data" / "val").glob("*/*.png"))
    images = torch.from_numpy(np.stack([read_image(path, model.input_spec) for path in paths]))
    with torch.inference_mode():
        logits = model((images.float() / 255 - 0.5) / 0.5)
    labels = torch.tensor([names.index(path.parent.name) for path in paths])
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    assert best["metrics"]["val_loss"] == pytest.approx(loss, abs=1e-5)
    assert best["metrics"]["val_acc"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())


def test_default_recipe_is_as_accurate(tmp_path):
    """cnn4_bn on the drawings that come along: other random numbers, but no worse by more than the noise of a seed."""
    words = ["--data-dir", REPO, "--cache-dir", tmp_path / "cache", "--arch", "cnn4_bn", "--epochs", "8"]
    train_emotion_cnn.main([*map(str, words), "--output-dir", str(tmp_path / "one")])
    finish(launch(REPO / "train_emotion_cnn.py", *words, "--output-dir", tmp_path / "two"))
    accuracies = [json.loads((tmp_path / name / "metrics.json").read_text())["accuracy"] for name in ("one", "two")]
    assert min(accuracies) > 0.6 and abs(accuracies[0] - accuracies[1]) < 0.12, accuracies


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
@pytest.mark.parametrize("victim", [0, 1])
def test_a_worker_that_dies(root, victim):
    process = start(root, f"killed{victim}", *PLAIN, "--epochs", "500")
    try:
        for line in process.stdout:
            if line.startswith("epoch 2/"):
                break
        children = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "train.py"], capture_output=True, text=True)
        workers = sorted(map(int, children.stdout.split()))
        os.kill(workers[victim], signal.SIGKILL)
        _, err = process.communicate(timeout=300)
    finally:
        process.terminate()  # which ends the workers too
    assert process.returncode != 0
    assert len(re.findall("another process of this run has ended; go on with: .*--resume", err)) == 1, err
    for name in (BEST_NAME, FINAL_NAME):
        assert read_checkpoint(root / f"killed{victim}" / name)["epoch"] >= (2 if name == FINAL_NAME else 1)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data-dir", "nowhere"], "error: no folder nowhere"),
        (["--batch-size", "2"], "error: --batch-size 2 .* too few for 2 processes"),
        (["--epochs", "x"], "error: .*--epochs"),
        (["--lr", "1e30", "--epochs", "2"], "error: epoch 1: the loss became nan|error: epoch 1: the loss became inf"),
    ],
)
def test_one_line_for_all_processes(root, args, message):
    process = start(root, "one_line", *PLAIN, *args)
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0
    assert len(re.findall("^" + message, err, re.MULTILINE)) == 1 == err.count("error: "), err
    assert not any(words in err for words in ("Terminated", "another process", "train_emotion_cnn.py")), err


# What needs no second process


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_every_picture_is_seen_once_in_equally_many_steps(size):
    images = np.arange(53, dtype=np.uint8).reshape(-1, 1, 1, 1)

    class Pictures:
        labels = np.arange(53) % 3

    Pictures.images = images
    batches = Batches(Pictures, np.arange(53), torch.device("cpu"))
    order = torch.randperm(53, generator=torch.Generator().manual_seed(0))
    counts = [stop - start for start, stop in batches.bounds(16, Group(size=size))]
    shares = [list(batches.iterate(16, order, Group(rank, size))) for rank in range(size)]
    assert sum(counts) == 53 and {len(share) for share in shares} == {len(counts)}
    for count, parts in zip(counts, zip(*shares, strict=True), strict=True):
        sizes = [len(labels) for _, labels in parts]
        assert sum(sizes) == count and min(sizes) >= 2 and max(sizes) - min(sizes) <= 1
    seen = torch.cat([images.flatten() for share in shares for images, _ in share])
    assert sorted(seen.tolist()) == list(range(53))
