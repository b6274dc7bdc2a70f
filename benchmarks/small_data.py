"""Four emotions from a thousand images each, and from fewer: from scratch, and from weights trained on other emotions.

    python -m benchmarks.small_data --data-dir fer2013 --output-dir small_data            # many hours on two cores
    python -m benchmarks.small_data --data-dir fer2013 --output-dir small_data --epochs 30 --seeds 2       # 75 minutes

Makes of FER2013, in --output-dir: four/, with 1,000 training images per class of angry, happy, neutral and sad, and 250
test images per class (from val/, the challenge's PublicTest); others/, with the images of the other emotions; and
few_N_S/, with N images per class of four/train, others for every seed S, and the same test images. No image is in two
of four/train, four/test and others/: of duplicates only the first is taken. A tenth of each train/ validates; test/ is
measured once, at the end.

The first table is trained by the recipes. In the second, fewer images get more epochs, by the square root of how many
fewer, and batches of 32; its columns are trained alike, except for what they start from.
"""

import json
import math
import shutil
import statistics
from pathlib import Path

import numpy as np

from benchmarks import check_inputs, train
from checkpoints import BEST_NAME
from console import ArgumentParser, make_output_dir, number, run_script
from data import FolderImages
from errors import InputError
from models import InputSpec, get_arch
from reports import wilson_interval
from train_emotion_cnn import DEFAULT_ARCH

CLASSES, TRAIN, TEST = ("angry", "happy", "neutral", "sad"), 1000, 250
SYSTEM = "cnn6_bn"  # the network of S0, whose document claims 75 to 85% on such a set


def unique_images(folder: Path, seen: set[str]) -> dict[str, list[str]]:
    """{class: its files in a drawn order}, without those whose pixels are among `seen`, to which they are added.

    Raises InputError if one of the four classes has no images.
    """
    data = FolderImages(folder, InputSpec())
    found = {name: [] for name in data.class_names}
    for position in np.random.default_rng(0).permutation(len(data)):
        if data.digests[position] not in seen:
            seen.add(data.digests[position])
            found[data.class_names[data.labels[position]]].append(data.paths[position])
    missing = [name for name in CLASSES if not found.get(name)]
    if missing:
        raise InputError(f"{folder} has no images of {', '.join(missing)}; --data-dir must hold FER2013")
    return found


def copy_images(files: dict[str, list[str]], folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for name, paths in files.items():
        (folder / name).mkdir(parents=True)
        for path in paths:
            shutil.copyfile(path, folder / name / Path(path).name)


def make_sets(folders: dict[str, Path], output_dir: Path, counts: list[int], seeds: int) -> None:
    """Writes four/, others/ and few_N_S/ anew, from the splits' `folders`; the same images each time."""
    seen = set()
    test, train = (unique_images(folders[split], seen) for split in ("val", "train"))
    parts = {"four": slice(TRAIN)}
    parts |= {f"few_{n}_{seed}": slice(n * seed, n * (seed + 1)) for n in counts for seed in range(seeds) if n < TRAIN}
    for name, part in parts.items():
        copy_images({emotion: train[emotion][:TRAIN][part] for emotion in CLASSES}, output_dir / name / "train")
        copy_images({emotion: test[emotion][:TEST] for emotion in CLASSES}, output_dir / name / "test")
    others = {name: paths for name, paths in train.items() if name not in CLASSES}
    copy_images(others, output_dir / "others" / "train")


def test_accuracy(folder: Path) -> tuple[int, int]:
    """(correct, count) of the report on test/ that training has left in `folder`."""
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    if metrics["split"] != "test":
        raise InputError(f"{folder} holds no report on test/; remove it and start again")
    return round(metrics["accuracy"] * metrics["count"]), metrics["count"]


def format_accuracy(results: list[tuple[int, int]]) -> str:
    """One run with its 95% interval, several as mean and standard deviation."""
    shares = [100 * right / total for right, total in results]
    if len(shares) > 1:
        return f"{statistics.mean(shares):.1f} ± {statistics.stdev(shares):.1f}"
    low, high = wilson_interval(*results[0])
    return f"{shares[0]:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def main() -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--data-dir", metavar="DIR", default=".", help="FER2013, with train/ and val/")
    add("--output-dir", metavar="DIR", default="small_data", help="sets and runs")
    add("--arch", default=DEFAULT_ARCH, help="of the second table")
    add("--recipes", nargs="*", metavar="ARCH", help=f"the first table (default: {SYSTEM} and --arch)")
    add("--counts", nargs="*", type=number(int, 1), default=[25, 100, TRAIN], help="(default: 25 100 1000)")
    add("--seeds", type=number(int, 1), default=3, help="how many for counts below 1000")
    add("--lr", type=number(float, 1e-9), default=0.001, help="of the second table")
    add("--epochs", type=number(int, 1), help="of it, for 1,000 images per class (default: the recipe's)")
    args = parser.parse_args()
    for count in args.counts:
        if count < TRAIN < count * args.seeds:
            raise InputError(f"--counts {count}: {args.seeds} times as many are more than {TRAIN:,}; lower --seeds")
    recipes = [SYSTEM, args.arch] if args.recipes is None else args.recipes
    folders = check_inputs(args.data_dir, args.arch, *recipes, splits=("train", "val"))
    output_dir = make_output_dir(args.output_dir)
    make_sets(folders, output_dir, args.counts, args.seeds)

    def run(folder: str, images: str, arch: str, *options) -> Path:
        folder = output_dir / "runs" / f"{folder}-{arch}"
        train(folder, "--data-dir", output_dir / images, "--arch", arch, "--no-pretrained", *options)
        return folder

    if recipes:
        print(f"| {TRAIN:,} images per class | test accuracy (95% interval) |\n| --- | --- |", flush=True)
    for arch in recipes:
        print(f"| `{arch}` | {format_accuracy([test_accuracy(run('four', 'four', arch))])} |", flush=True)
    if not args.counts:
        return

    epochs = args.epochs or get_arch(args.arch).recipe.epochs
    others = run("others", "others", args.arch, "--epochs", epochs)
    print("\n| images per class | from scratch | from the other emotions |\n| --- | --- | --- |", flush=True)
    for count in args.counts:
        names = [f"few_{count}_{seed}" for seed in range(args.seeds)] if count < TRAIN else ["four"]
        longer = math.sqrt(TRAIN / min(count, TRAIN))
        options = ["--optimizer", "adamw", "--lr", args.lr, "--epochs", round(epochs * longer)]
        options += ["--batch-size", 32] if count < TRAIN else []
        cells = [f"{min(count, TRAIN):,}"]
        for way, start in (("scratch", ()), ("others", ("--weights", others / BEST_NAME))):
            runs = [run(f"{name}-{way}", name, args.arch, *options, *start) for name in names]
            cells.append(format_accuracy([test_accuracy(folder) for folder in runs]))
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    run_script(main)
