"""Predicts many images in one process, and looks at its memory.

    python -m tests.soak.memory --predictions 10000

Arrays, one at a time and in batches, and a file that can't be read, with the smallest model. What the process holds
after all of them may be no more than 20 MB above what it held after the first fifth.
"""

import argparse
import resource
from pathlib import Path

import numpy as np
import torch

from inference import predict_image, predict_images
from models import create_model
from tests.conftest import refusal

STATM = Path("/proc/self/statm")  # Linux only
LIMIT = 20e6


def held() -> int:
    """Bytes of memory that this process holds."""
    return int(STATM.read_text().split()[1]) * resource.getpagesize()


def predict_some(model: torch.nn.Module, count: int, rng: np.random.Generator) -> None:
    """`count` predictions: of every 64 half in one batch and half alone, and one image more that can't be read."""
    names = [str(number) for number in range(model.info.num_classes)]
    for start in range(0, count, 64):
        images = list(rng.integers(0, 256, (min(64, count - start), 96, 96, 3), dtype=np.uint8))
        half = len(images) // 2
        predict_images(model, images[:half], names)
        for image in images[half:]:
            predict_image(model, image, names)
        refusal(predict_image, model, __file__, names)


def soak(predictions: int) -> int:
    """Bytes that memory grew by over the last four fifths of the predictions."""
    rng = np.random.default_rng(0)
    model = create_model("cnn6_rgb", 7, image_size=32).eval()
    predict_some(model, predictions // 5, rng)
    warm = held()
    predict_some(model, predictions - predictions // 5, rng)
    return held() - warm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--predictions", type=int, default=10_000, help="(default: 10000)")
    args = parser.parse_args()
    grown = soak(args.predictions)
    assert grown < LIMIT, f"memory grew by {grown / 1e6:.1f} MB"
    print(f"{args.predictions:,} predictions: memory grew by {grown / 1e6:.1f} MB over the last four fifths")


if __name__ == "__main__":
    main()
