"""Speed and accuracy, against the plain way of doing it; each runs as `python -m benchmarks.NAME`."""

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path

from checkpoints import FINAL_NAME
from engine.resume import HISTORY_NAME
from errors import InputError
from models import get_arch

REPO = Path(__file__).resolve().parent.parent


def count(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return int(text)


def check_inputs(data_dir: str, *archs: str, splits: tuple[str, ...] = ("train",)) -> None:
    """InputError for an unknown arch or a folder without one of `splits`, before anything is measured."""
    for arch in archs:
        get_arch(arch)
    for split in splits:
        if not (Path(data_dir) / split).is_dir():
            folders = " and ".join(f"{name}/" for name in splits)
            raise InputError(f"no folder {Path(data_dir) / split}: --data-dir must hold {folders} with class folders")


def train(folder: str | Path, *options) -> list[dict[str, float]]:
    """Runs train_emotion_cnn.py with `options` into `folder`, or goes on with what stands there; returns the history.

    Its messages go to standard error. Raises InputError where training stops, and where `folder` holds a run with
    other options.
    """
    folder, options = Path(folder), [str(option) for option in options]
    command = [sys.executable, str(REPO / "train_emotion_cnn.py"), *options, "--output-dir", str(folder)]
    record = folder / "options.json"
    if (folder / FINAL_NAME).exists():
        if not record.exists() or json.loads(record.read_text(encoding="utf-8")) != options:
            raise InputError(f"{folder} holds a run with other options; remove it or choose another --output-dir")
        command.append("--resume")
    folder.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(options), encoding="utf-8")
    if subprocess.run(command, stdout=sys.stderr).returncode:
        raise InputError("training has stopped; its message stands above")
    with open(folder / HISTORY_NAME, encoding="utf-8") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
