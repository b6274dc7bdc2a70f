"""Speed and accuracy, against the plain way of doing it; each runs as `python -m benchmarks.NAME`."""

import argparse
from pathlib import Path

from models import InputError, get_arch

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
