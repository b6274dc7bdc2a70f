"""Speed, accuracy and memory, against the baseline loop of tutorials; each runs as `python -m benchmarks.NAME`."""

import csv
import json
import subprocess
import sys
from pathlib import Path

from checkpoints import FINAL_NAME
from data import find_splits
from errors import InputError
from models import get_arch
from reports import HISTORY_NAME

REPO = Path(__file__).resolve().parent.parent


def check_inputs(data_dir: str, *archs: str, splits: tuple[str, ...] = ("train",)) -> dict[str, Path]:
    """The folders of `data_dir`'s splits; InputError, before anything is measured, for an unknown arch or if one of
    `splits` is missing."""
    for arch in archs:
        get_arch(arch)
    folders = find_splits(data_dir)
    for split in splits:
        if split not in folders:
            needed = " and ".join(f"{name}/" for name in splits)
            raise InputError(f"no folder {Path(data_dir) / split}: --data-dir must hold {needed} with class folders")
    return folders


def train(folder: str | Path, *options) -> list[dict[str, float]]:
    """Runs train_emotion_cnn.py with `options` into `folder`, or goes on with the run in it; returns the history.

    Its messages go to standard error. Raises InputError if training stops, and if `folder` holds a run with other
    options.
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
        raise InputError("training has stopped; its message is above")
    with open(folder / HISTORY_NAME, encoding="utf-8") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
