"""Speed and accuracy, against the plain way of doing it; each runs as `python -m benchmarks.NAME`."""

from pathlib import Path

from models import InputError

REPO = Path(__file__).resolve().parent.parent


def check_data_dir(data_dir: str) -> None:
    if not (Path(data_dir) / "train").is_dir():
        raise InputError(f"no folder {Path(data_dir) / 'train'}: --data-dir must hold train/ with a folder per class")
