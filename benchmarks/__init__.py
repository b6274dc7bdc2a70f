"""Speed and accuracy, against the plain way of doing it; each runs as `python -m benchmarks.NAME`."""

import argparse
import csv
import subprocess
import sys
from pathlib import Path

from checkpoints import FINAL_NAME
from models import InputError, get_arch
from training_run import HISTORY_NAME

REPO = Path(__file__).resolve().parent.parent


def count(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return int(text)


def check_inputs(data_dir: str, *archs: str) -> None:
    """InputError for an unknown arch or a folder without train/, before anything is measured."""
    for arch in archs:
        get_arch(arch)
    if not (Path(data_dir) / "train").is_dir():
        raise InputError(f"no folder {Path(data_dir) / 'train'}: --data-dir must hold train/ with a folder per class")


def train(folder: str | Path, *options) -> list[dict[str, float]]:
    """Runs train_emotion_cnn.py with `options` into `folder`, or goes on with what stands there; returns the history.

    Its messages go to standard error. Raises InputError where training stops.
    """
    command = [sys.executable, REPO / "train_emotion_cnn.py", *options, "--output-dir", folder]
    if (Path(folder) / FINAL_NAME).exists():
        command.append("--resume")
    if subprocess.run([str(part) for part in command], stdout=sys.stderr).returncode:
        raise InputError("training has stopped; its message stands above")
    with open(Path(folder) / HISTORY_NAME, encoding="utf-8") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
