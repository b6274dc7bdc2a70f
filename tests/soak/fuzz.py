"""Damages valid images and passes them through prediction and training.

    python -m tests.soak.fuzz --files 2400          # a minute on two cores

JPEG, PNG, GIF, BMP, WebP and TIFF files, gray and color, get bits flipped, are cut short, or have four bytes (length
fields among them) set to zeros or ones. No crash, no hang: every file is predicted or named, by prediction and by
training; files that lost a tenth or more of their end are all refused; and a damaged PNG is refused or shows what it
showed before, since its checksums are verified. The other formats have none: damage may be read as other pixels.
"""

import argparse
import io
import json
import random
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from errors import InputError
from models import InputSpec
from preprocessing import read_image
from tests.conftest import draw_image

REPO = Path(__file__).resolve().parent.parent.parent
FORMATS = {"JPEG": ".jpg", "PNG": ".png", "GIF": ".gif", "BMP": ".bmp", "WEBP": ".webp", "TIFF": ".tiff"}
KINDS = ("flip", "cut", "field")
SPEC = InputSpec()


def damage(content: bytes, kind: str, rng: random.Random) -> bytes:
    data = bytearray(content)
    if kind == "cut":
        return bytes(data[: rng.randrange(int(0.9 * len(data)))])
    if kind == "field":
        start = rng.randrange(len(data) - 4)
        data[start : start + 4] = rng.choice((b"\0\0\0\0", b"\xff" * 4, b"\x7f" + b"\xff" * 3, b"\xff" * 3 + b"\x7f"))
        return bytes(data)
    for _ in range(rng.choice((1, 1, 4, 16))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def make_files(folder: Path, count: int, rng: random.Random) -> tuple[dict[Path, tuple[str, str]], dict[Path, bytes]]:
    """{path: (format, kind of damage)} of damaged files in folder/<class>/, and the valid content of each."""
    files, valid = {}, {}
    for number in range(count):
        name = list(FORMATS)[number % len(FORMATS)]
        kind = KINDS[number // len(FORMATS) % len(KINDS)]
        content = io.BytesIO()
        draw_image(number, 48, "L" if number % 2 else "RGB").save(content, name)
        path = folder / ("happy", "sad")[number % 2] / f"{number:05}{FORMATS[name]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(damage(content.getvalue(), kind, rng))
        files[path], valid[path] = (name, kind), content.getvalue()
    return files, valid


def run(*words) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, words)], cwd=REPO, capture_output=True, text=True, timeout=900)


def soak(count: int, root: Path, seed: int = 0) -> Counter:
    """Damages that many files; returns how many of each (format, kind of damage, "read" or "refused") there were."""
    files, valid = make_files(root / "data" / "train", count, random.Random(seed))
    found = Counter()
    read = set()
    for path, (name, kind) in files.items():
        try:
            pixels = read_image(path, SPEC)
        except InputError as error:
            assert path.name in str(error) and "\n" not in str(error)
            found[name, kind, "refused"] += 1
            continue
        read.add(path)
        found[name, kind, "read"] += 1
        assert kind != "cut", f"{path.name} was cut short and is read all the same"
        if name == "PNG":
            before = read_image(Image.open(io.BytesIO(valid[path])), SPEC)
            assert np.array_equal(pixels, before), f"{path.name} shows something else than before"
    checkpoint = REPO / "weights" / "emotion_model.pth"
    done = run(
        "predict_emotion.py", root / "data", "--checkpoint", checkpoint, "--faces", "off", "--output", root / "p.json"
    )
    assert done.returncode == 0, done.stderr
    assert {Path(row["file"]) for row in json.loads((root / "p.json").read_text())} == read
    named = {path for path in files if path.name in done.stderr}
    assert named == set(files) - read, "prediction doesn't name what it left out"
    (root / "data" / "train" / "happy" / "valid.png").write_bytes(next(iter(valid.values())))
    done = run(
        "train_emotion_cnn.py",
        "--data-dir",
        root / "data",
        "--output-dir",
        root / "out",
        "--cache-dir",
        root / "cache",
        "--arch",
        "cnn4_bn",
        "--epochs",
        1,
    )
    assert done.returncode == 0, done.stderr
    assert f"left out {len(files) - len(read)} of {len(files) + 1} images" in done.stdout, done.stdout
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--files", type=int, default=2400, help="(default: 2400)")
    parser.add_argument("--seed", type=int, default=0, help="of the damage (default: 0)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = soak(args.files, Path(folder), args.seed)
    for (name, kind, outcome), number in sorted(found.items()):
        print(f"{name:5} {kind:5} {outcome:8} {number:,}")
    print(f"{args.files:,} files: every one read or named, by prediction and by training")


if __name__ == "__main__":
    main()
