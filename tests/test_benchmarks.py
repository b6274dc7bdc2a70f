"""The benchmarks run from end to end on little data. What they measure is for their readers, not for tests."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import draw_folder

REPO = Path(__file__).resolve().parent.parent


def run(*words):
    command = [sys.executable, "-m", f"benchmarks.{words[0]}", *map(str, words[1:])]
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300)


@pytest.fixture
def pictures(tmp_path):
    draw_folder(tmp_path / "train", {"happy": 24, "sad": 24})
    return tmp_path


def test_training_speed(pictures):
    options = ("--arch", "cnn4_bn", "--rounds", 1, "--seconds", 0.1, "--workers", 0)
    done = run("training_speed", "--data-dir", pictures, *options)
    assert (done.returncode, done.stderr) == (0, "")
    cells = [cell.strip(" `%") for cell in done.stdout.splitlines()[-1].strip("|").split("|")]
    assert cells[:3] == ["cnn4_bn", "48", "32"] and len(cells) == 11
    assert all(float(cell.replace(",", "").partition(" ")[0]) > 0 for cell in cells[3:9])


def test_prediction_speed(pictures):
    done = run("prediction_speed", "--data-dir", pictures, "--arch", "cnn4_bn", "--pictures", 70, "--rounds", 1)
    assert done.returncode == 0, done.stderr
    cells = [cell.strip(" `ms") for cell in done.stdout.splitlines()[3].strip("|").split("|")]
    assert cells[0] == "cnn4_bn" and float(cells[3]) < 1e-5
    assert "ratio" in done.stdout.splitlines()[-1]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory(pictures):
    done = run("memory", "--data-dir", pictures, "--epochs", 1, "--sizes", 48)
    assert done.returncode == 0, done.stderr
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == ["epoch 1/1", "48 pixels"]


def test_precision(pictures):
    done = run("precision", "--data-dir", pictures, "--epochs", 1, "--seeds", 1)
    assert done.returncode == 0, done.stderr
    assert "bf16 - fp32" in done.stdout.splitlines()[-1]


def test_a_mistake_found_in_one_of_the_processes_is_one_line(pictures):
    done = run("training_speed", "--data-dir", pictures, "--arch", "cnn4", "--workers", 0)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and "--batch-size" in done.stderr


@pytest.mark.parametrize(
    "words", [("training_speed", "--rounds", 0), ("prediction_speed", "--pictures", 0), ("memory", "--sizes", -5),
              ("precision", "--arch", "nope")]
)  # fmt: skip
def test_a_wrong_flag_is_one_line_before_anything_is_measured(pictures, words):
    done = run(*words, "--data-dir", pictures)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1 and str(words[2]) in done.stderr


@pytest.mark.parametrize("name", ["training_speed", "prediction_speed", "memory", "precision"])
def test_a_missing_folder_is_one_line(name, tmp_path):
    done = run(name, "--data-dir", tmp_path / "nothing")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and "nothing" in done.stderr.splitlines()[-1]
