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
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

import predict_emotion
import train_emotion_cnn
from errors import InputError
from models import InputSpec
from preprocessing import read_image
from tests.conftest import draw_image, run

CHECKPOINT = Path(__file__).resolve().parent.parent.parent / "weights" / "emotion_model.pth"
FORMATS = {"JPEG": ".jpg", "PNG": ".png", "GIF": ".gif", "BMP": ".bmp", "WEBP": ".webp", "TIFF": ".tiff"}
KINDS = ("flip", "cut", "field")


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


def soak(count: int, root: Path) -> Counter:
    """Damages that many files; returns how many of each (format, kind of damage, "read" or "refused") there were."""
    rng, found, read, refused = random.Random(0), Counter(), set(), set()
    for number in range(count):
        name = list(FORMATS)[number % len(FORMATS)]
        kind = KINDS[number // len(FORMATS) % len(KINDS)]
        valid = io.BytesIO()
        draw_image(number, 48, "L" if number % 2 else "RGB").save(valid, name)
        path = root / "data" / "train" / ("happy", "sad")[number % 2] / f"{number:05}{FORMATS[name]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(damage(valid.getvalue(), kind, rng))
        try:
            pixels = read_image(path, InputSpec())
            read.add(path)
            assert kind != "cut", f"{path.name} was cut short and is read all the same"
            unchanged = name != "PNG" or np.array_equal(pixels, read_image(Image.open(valid), InputSpec()))
            assert unchanged, f"{path.name} shows something else than before"
        except InputError as error:
            refused.add(path)
            assert path.name in str(error) and "\n" not in str(error)
        found[name, kind, "read" if path in read else "refused"] += 1

    words = ["--checkpoint", CHECKPOINT, "--faces", "off", "--output", root / "p.json"]
    code, _, err = run(predict_emotion.main, root / "data", *words)
    assert code == 0, err
    assert {Path(row["file"]) for row in json.loads((root / "p.json").read_text())} == read
    assert {path for path in read | refused if path.name in err} == refused

    draw_image(0).save(root / "data" / "train" / "happy" / "valid.png")
    places = ["--data-dir", root / "data", "--output-dir", root / "out", "--cache-dir", root / "cache"]
    code, out, err = run(train_emotion_cnn.main, *places, "--arch", "cnn4_bn", "--epochs", 1)
    assert code == 0, err
    assert f"left out {len(refused)} of {count + 1} images" in out, out
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--files", type=int, default=2400, help="(default: 2400)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = soak(args.files, Path(folder))
    for (name, kind, outcome), number in sorted(found.items()):
        print(f"{name:5} {kind:5} {outcome:8} {number:,}")
    print(f"{args.files:,} files: every one read or named, by prediction and by training")


if __name__ == "__main__":
    main()
