"""Four emotions from a thousand pictures each, and from fewer: from nothing, and from what other emotions taught.

    python -m benchmarks.small_data --data-dir fer2013 --output-dir small_data           # an hour on two cores

Makes of FER2013, in --output-dir: four/, with 1,000 training pictures a class of angry, happy, neutral and sad, and 250
test pictures a class (from val/, the challenge's PublicTest); others/, with the pictures of the other three emotions;
and few_N/, with the first N pictures a class of four/train and the same test pictures. No picture stands in two places:
of equal ones only the first is taken. A tenth of each train/ validates; test/ is measured once, at the end.
"""

import json
import shutil
import statistics
from pathlib import Path

import numpy as np

from benchmarks import check_inputs, count, train
from checkpoints import BEST_NAME
from data import FolderImages
from models import InputSpec
from predict_emotion import ArgumentParser, make_output_dir, run_script
from reports import wilson_interval
from train_emotion_cnn import DEFAULT_ARCH

CLASSES, TRAIN, TEST = ("angry", "happy", "neutral", "sad"), 1000, 250
SYSTEM = "cnn6_bn"  # the network of S0, whose document claims 75 to 85% on such a set


def unique_pictures(data_dir: Path, split: str, seen: set[str], seed: int) -> dict[str, list[str]]:
    """{class: its files in a drawn order}, those left out whose pixels are among `seen`, to which they are added."""
    data = FolderImages(data_dir / split, InputSpec())
    found = {name: [] for name in data.class_names}
    for position in np.random.default_rng(seed).permutation(len(data)):
        if data.digests[position] not in seen:
            seen.add(data.digests[position])
            found[data.class_names[data.labels[position]]].append(data.paths[position])
    return found


def copy_pictures(files: dict[str, list[str]], folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for name, paths in files.items():
        (folder / name).mkdir(parents=True)
        for path in paths:
            shutil.copyfile(path, folder / name / Path(path).name)


def make_sets(data_dir: Path, output_dir: Path, counts: list[int], seed: int) -> None:
    """Writes four/, others/ and few_N/ where they aren't there yet."""
    if (output_dir / "others").exists():
        return
    seen = set()
    test = unique_pictures(data_dir, "val", seen, seed)
    learn = unique_pictures(data_dir, "train", seen, seed)
    for number in {TRAIN, *counts}:
        folder = output_dir / ("four" if number == TRAIN else f"few_{number}")
        copy_pictures({name: learn[name][:number] for name in CLASSES}, folder / "train")
        copy_pictures({name: test[name][:TEST] for name in CLASSES}, folder / "test")
    copy_pictures({name: paths for name, paths in learn.items() if name not in CLASSES}, output_dir / "others/train")


def test_accuracy(folder: Path) -> tuple[int, int]:
    """(right, all) of the report that training has left in `folder`."""
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["split"] == "test"
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
    parser.add_argument("--arch", default=DEFAULT_ARCH, help=f"beside {SYSTEM} (default: {DEFAULT_ARCH})")
    parser.add_argument("--counts", nargs="+", type=count, default=[25, 100, TRAIN], help="(default: 25 100 1000)")
    parser.add_argument("--seeds", type=count, default=3, help="how many for counts below 1000 (default: 3)")
    parser.add_argument("--others-epochs", type=count, default=40, help="of the first training (default: 40)")
    parser.add_argument("--lr", type=float, default=0.001, help="of training that starts from weights (default: 0.001)")
    parser.add_argument("--epochs", type=count, help="of all others (default: the recipes')")
    args = parser.parse_args()
    check_inputs(args.data_dir, args.arch)
    output_dir = make_output_dir(args.output_dir)
    make_sets(Path(args.data_dir), output_dir, args.counts, seed=0)
    epochs = ("--epochs", args.epochs) if args.epochs else ()

    def run(name: str, pictures: str, arch: str, seed: int, *options) -> tuple[int, int]:
        folder = output_dir / "runs" / f"{name}-{arch}-{seed}"
        train(folder, "--data-dir", output_dir / pictures, "--arch", arch, "--seed", seed, *epochs, *options)
        return test_accuracy(folder)

    print(f"| {TRAIN:,} pictures a class | test accuracy (95% interval) |\n| --- | --- |", flush=True)
    for arch in (SYSTEM, args.arch):
        print(f"| `{arch}` | {format_accuracy([run('four', 'four', arch, 0)])} |", flush=True)

    source = output_dir / "runs" / "others"
    train(source, "--data-dir", output_dir / "others", "--arch", args.arch, "--epochs", args.others_epochs)
    print("\n| pictures a class | from nothing | from the other three emotions |\n| --- | --- | --- |", flush=True)
    for number in args.counts:
        cells, pictures = [f"{number:,}"], "four" if number == TRAIN else f"few_{number}"
        seeds = range(1 if number == TRAIN else args.seeds)
        cells.append(format_accuracy([run(pictures, pictures, args.arch, seed) for seed in seeds]))
        start = ("--weights", source / BEST_NAME, "--lr", args.lr)
        cells.append(format_accuracy([run(f"{pictures}-from", pictures, args.arch, seed, *start) for seed in seeds]))
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    run_script(main)
