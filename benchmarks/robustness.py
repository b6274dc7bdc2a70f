"""How accurate does a model stay on images of worse cameras? Ten corruptions, each in five severities.

    python -m benchmarks.robustness --data-dir fer2013                                 # the bundled model, on val/
    python -m benchmarks.robustness --data-dir fer2013 --checkpoint A.pth B.pth --plot robustness.png

After Hendrycks & Dietterich 2019, arXiv:1903.12261, for faces of few pixels. The images are corrupted at the size of
the model's input, by random numbers that are the same for every model. What goes either way (darker or brighter, left
or right, ...) goes one way in every second image. Moved images repeat their edges. The mean is that of all fifty
accuracies.
"""

import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as transforms

from console import ArgumentParser, number, run_script
from device import PRECISIONS, pick_device, pick_precision
from engine.evaluation import evaluate, loss_and_accuracy
from inference import BUNDLED, load_model
from splits import Batches, load_split


def alternate(count: int, first: float, second: float) -> torch.Tensor:
    """float32 (count,): `first` for the images at even positions, `second` for the others."""
    return torch.tensor([first, second]).repeat(count)[:count]


def add_noise(images: torch.Tensor, sigma: float) -> torch.Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + sigma * noise).round().clamp(0, 255).byte()


def change_gamma(images: torch.Tensor, gamma: float) -> torch.Tensor:
    exponents = alternate(len(images), gamma, 1 / gamma)
    return (255 * (images / 255) ** exponents.view(-1, 1, 1, 1)).round().byte()


def lose_resolution(images: torch.Tensor, share: float) -> torch.Tensor:
    """Reduced to a `share` of the side, and enlarged again."""
    size = list(images.shape[2:])
    return transforms.resize(transforms.resize(images, [round(share * side) for side in size]), size)


def compress(images: torch.Tensor, quality: int) -> torch.Tensor:
    changed = []
    for image in images:
        file = io.BytesIO()
        transforms.to_pil_image(image).save(file, "JPEG", quality=quality)
        changed.append(transforms.pil_to_tensor(Image.open(file)))
    return torch.stack(changed)


def cover(images: torch.Tensor, share: float) -> torch.Tensor:
    """A black square over a `share` of the area, anywhere."""
    images, height, width = images.clone(), *images.shape[2:]
    side = round((share * height * width) ** 0.5)
    places = torch.rand(len(images), 2, generator=torch.Generator().manual_seed(0))
    for image, (x, y) in zip(images, places, strict=True):
        top, left = int(y * (height - side + 1)), int(x * (width - side + 1))
        image[:, top : top + side, left : left + side] = 0
    return images


def move(images: torch.Tensor, *, shift: float = 0.0, zoom: float = 1.0, tilt: float = 0.0) -> torch.Tensor:
    """By a `shift` (share of the side) to a corner, a factor of `zoom`, a `tilt` in degrees; images at odd positions
    the other way."""
    way = alternate(len(images), 1.0, -1.0)
    angle, scale, offset = torch.deg2rad(tilt * way), zoom**-way, 2 * shift * way
    cos, sin = scale * angle.cos(), scale * angle.sin()
    theta = torch.stack([cos, -sin, offset, sin, cos, offset]).t().reshape(-1, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False).round().byte()


CORRUPTIONS: dict[str, tuple[Callable[..., torch.Tensor], tuple[float, ...]]] = {
    "noise, gray levels": (add_noise, (4, 8, 12, 18, 26)),
    "blur, pixels": (lambda images, sigma: transforms.gaussian_blur(images, 13, sigma), (0.5, 0.75, 1, 1.5, 2)),
    "gamma": (change_gamma, (1.25, 1.5, 2, 2.5, 3)),
    "contrast": (transforms.adjust_contrast, (0.8, 0.6, 0.45, 0.3, 0.2)),
    "JPEG quality": (compress, (60, 40, 25, 15, 8)),
    "resolution": (lose_resolution, (0.8, 0.65, 0.5, 0.4, 0.3)),
    "shift": (lambda images, share: move(images, shift=share), (0.04, 0.08, 0.12, 0.16, 0.2)),
    "zoom": (lambda images, factor: move(images, zoom=factor), (1.1, 1.2, 1.3, 1.45, 1.6)),
    "tilt, degrees": (lambda images, degrees: move(images, tilt=degrees), (6, 12, 18, 25, 35)),
    "covered": (cover, (0.05, 0.1, 0.15, 0.2, 0.3)),
}


@dataclass
class Corrupted:
    """`batches` as evaluate() takes them, with every image corrupted."""

    batches: Batches
    corrupt: Callable[..., torch.Tensor]
    level: float

    def __len__(self) -> int:
        return len(self.batches)

    def iterate(self, batch_size: int, order: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for images, labels in self.batches.iterate(batch_size, order):
            yield self.corrupt(images.cpu(), self.level).to(labels.device), labels


def measure(model, batches: Batches, precision: torch.dtype) -> tuple[float, np.ndarray]:
    """Accuracy (fractions) as the images are, and float64 (10, 5) under each corruption and severity."""

    def accuracy(images: Batches | Corrupted) -> float:
        return loss_and_accuracy(*evaluate(model, images, batch_size=512, precision=precision))[1]

    rows = [
        [accuracy(Corrupted(batches, corrupt, level)) for level in levels] for corrupt, levels in CORRUPTIONS.values()
    ]
    return accuracy(batches), np.array(rows)


def format_table(name: str, clean: float, accuracies: np.ndarray) -> str:
    lines = [f"{name}: {100 * clean:.1f}% as they are, {100 * accuracies.mean():.1f}% as the mean over corruptions\n"]
    lines += ["| corruption | severities | 1 | 2 | 3 | 4 | 5 | mean |", "| --- |" + " --- |" * 7]
    for (corruption, (_, levels)), row in zip(CORRUPTIONS.items(), 100 * accuracies, strict=True):
        cells = [corruption, ", ".join(map(str, levels)), *(f"{value:.1f}" for value in (*row, row.mean()))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(results: dict[str, tuple[float, np.ndarray]], path: str) -> None:
    """A panel for each corruption, accuracy over severity, a line for each model; severity 0 is the clean image."""
    figure = Figure(figsize=(13, 6), layout="constrained", dpi=130)
    panels = figure.subplots(2, 5, sharex=True, sharey=True)
    for row, (axes, corruption) in enumerate(zip(panels.flat, CORRUPTIONS, strict=True)):
        for name, (clean, accuracies) in results.items():
            axes.plot(range(6), [100 * clean, *100 * accuracies[row]], marker="o", label=name)
        axes.set(title=corruption, xticks=range(6))
        axes.grid(alpha=0.3)
    for axes in panels[1]:
        axes.set_xlabel("Severity")
    figure.supylabel("Accuracy (%)")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center")
    figure.savefig(path, format="png")


def main() -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--data-dir", metavar="DIR", default=".", help="holds the images, as for evaluate_emotion.py")
    add("--split", default="val", choices=("test", "val", "train"), help="of --data-dir")
    add(
        "--checkpoint",
        nargs="+",
        default=[os.path.relpath(BUNDLED)],
        metavar="PATH",
        help="(default: the bundled model)",
    )
    add("--limit", type=number(int, 1), metavar="N", help="measure N images, drawn once, instead of all")
    add("--precision", default="fp32", choices=PRECISIONS, help="auto is bf16 if the hardware has it")
    add("--plot", metavar="FILE", help="draw the accuracies to a PNG file")
    args = parser.parse_args()
    device, results = pick_device(), {}
    precision = pick_precision(args.precision, device)
    for path in args.checkpoint:
        model, _ = load_model(path, device)
        data, rows, _, _ = load_split(args.data_dir, args.split, model.info, val_fraction=0.1, seed=0)
        if args.limit:
            rows = np.random.default_rng(0).permutation(rows)[: args.limit]
        results[path] = measure(model, Batches(data, rows, device), precision)
        print(format_table(path, *results[path]), flush=True)
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    run_script(main)
