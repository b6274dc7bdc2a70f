"""Four emotions from a thousand pictures each, and from fewer: from nothing, and from what other emotions taught.

    python -m benchmarks.small_data --data-dir fer2013 --output-dir small_data            # many hours on two cores
    python -m benchmarks.small_data --data-dir fer2013 --output-dir small_data --epochs 30 --seeds 2       # 75 minutes

Makes of FER2013, in --output-dir: four/, with 1,000 training pictures a class of angry, happy, neutral and sad, and 250
test pictures a class (from val/, the challenge's PublicTest); others/, with the pictures of the other emotions; and
few_N_S/, with N pictures a class of four/train, others for every seed S, and the same test pictures. No picture stands
in two of four/train, four/test and others/: of equal ones only the first is taken. A tenth of each train/ validates;
test/ is measured once, at the end.

The first table is trained by the recipes. In the second, fewer pictures get more epochs, by the square root of how many
fewer, and batches of 32; its columns are trained alike, but for what they start from.
"""

import json
import math
import shutil
import statistics
from pathlib import Path

import numpy as np

from benchmarks import check_inputs, count, train
from checkpoints import BEST_NAME
from console import ArgumentParser, make_output_dir, run_script
from data import FolderImages
from errors import InputError
from models import InputSpec, get_arch
from reports import wilson_interval
from train_emotion_cnn import DEFAULT_ARCH

CLASSES, TRAIN, TEST = ("angry", "happy", "neutral", "sad"), 1000, 250
SYSTEM = "cnn6_bn"  # the network of S0, whose document claims 75 to 85% on such a set


def unique_pictures(data_dir: Path, split: str, seen: set[str]) -> dict[str, list[str]]:
    """{class: its files in a drawn order} but for those whose pixels are among `seen`, to which they are added.

    Raises InputError where one of the four classes has no pictures.
    """
    data = FolderImages(data_dir / split, InputSpec())
    found = {name: [] for name in data.class_names}
    for position in np.random.default_rng(0).permutation(len(data)):
        if data.digests[position] not in seen:
            seen.add(data.digests[position])
            found[data.class_names[data.labels[position]]].append(data.paths[position])
    missing = [name for name in CLASSES if not found.get(name)]
    if missing:
        raise InputError(f"{data_dir / split} has no pictures of {', '.join(missing)}; --data-dir must hold FER2013")
    return found


def copy_pictures(files: dict[str, list[str]], folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for name, paths in files.items():
        (folder / name).mkdir(parents=True)
        for path in paths:
            shutil.copyfile(path, folder / name / Path(path).name)


def make_sets(data_dir: Path, output_dir: Path, counts: list[int], seeds: int) -> None:
    """Writes four/, others/ and few_N_S/ anew; the same pictures each time."""
    seen = set()
    test, learn = (unique_pictures(data_dir, split, seen) for split in ("val", "train"))
    places = {"four": slice(TRAIN)}
    places |= {f"few_{n}_{seed}": slice(n * seed, n * (seed + 1)) for n in counts for seed in range(seeds) if n < TRAIN}
    for name, place in places.items():
        copy_pictures({emotion: learn[emotion][:TRAIN][place] for emotion in CLASSES}, output_dir / name / "train")
        copy_pictures({emotion: test[emotion][:TEST] for emotion in CLASSES}, output_dir / name / "test")
    others = {name: paths for name, paths in learn.items() if name not in CLASSES}
    copy_pictures(others, output_dir / "others" / "train")


def test_accuracy(folder: Path) -> tuple[int, int]:
    """(right, all) of the report on test/ that training has left in `folder`."""
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
    parser.add_argument("--data-dir", metavar="DIR", default=".", help="FER2013, with train/ and val/ (default: .)")
    parser.add_argument("--output-dir", metavar="DIR", default="small_data", help="sets and runs (default: small_data)")
    parser.add_argument("--arch", default=DEFAULT_ARCH, help=f"of the second table (default: {DEFAULT_ARCH})")
    parser.add_argument("--recipes", nargs="*", metavar="ARCH", help=f"the first table (default: {SYSTEM} and --arch)")
    parser.add_argument("--counts", nargs="*", type=count, default=[25, 100, TRAIN], help="(default: 25 100 1000)")
    parser.add_argument("--seeds", type=count, default=3, help="how many for counts below 1000 (default: 3)")
    parser.add_argument("--lr", type=float, default=0.001, help="of the second table (default: 0.001)")
    parser.add_argument("--epochs", type=count, help="of it, for 1,000 pictures a class (default: the recipe's)")
    args = parser.parse_args()
    for number in args.counts:
        if number < TRAIN < number * args.seeds:
            raise InputError(
                f"--counts {number}: {TRAIN:,} pictures a class have no {args.seeds} times so many; lower --seeds"
            )
    recipes = [SYSTEM, args.arch] if args.recipes is None else args.recipes
    check_inputs(args.data_dir, args.arch, *recipes, splits=("train", "val"))
    output_dir = make_output_dir(args.output_dir)
    make_sets(Path(args.data_dir), output_dir, args.counts, args.seeds)

    def run(folder: str, pictures: str, arch: str, *options) -> Path:
        folder = output_dir / "runs" / f"{folder}-{arch}"
        train(folder, "--data-dir", output_dir / pictures, "--arch", arch, "--no-pretrained", *options)
        return folder

    if recipes:
        print(f"| {TRAIN:,} pictures a class | test accuracy (95% interval) |\n| --- | --- |", flush=True)
    for arch in recipes:
        print(f"| `{arch}` | {format_accuracy([test_accuracy(run('four', 'four', arch))])} |", flush=True)
    if not args.counts:
        return

    epochs = args.epochs or get_arch(args.arch).recipe.epochs
    others = run("others", "others", args.arch, "--epochs", epochs)
    print("\n| pictures a class | from nothing | from the other emotions |\n| --- | --- | --- |", flush=True)
    for number in args.counts:
        names = [f"few_{number}_{seed}" for seed in range(args.seeds)] if number < TRAIN else ["four"]
        options = ["--lr", args.lr, "--epochs", round(epochs * math.sqrt(TRAIN / min(number, TRAIN)))]
        options += ["--batch-size", 32] if number < TRAIN else []
        cells = [f"{min(number, TRAIN):,}"]
        for way, start in (("nothing", ()), ("others", ("--weights", others / BEST_NAME))):
            runs = [run(f"{name}-{way}", name, args.arch, *options, *start) for name in names]
            cells.append(format_accuracy([test_accuracy(folder) for folder in runs]))
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    run_script(main)
