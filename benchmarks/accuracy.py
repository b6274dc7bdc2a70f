"""How accurate is every network? Trains each on FER2013, by its recipe unless said, and prints a row for each.

    python -m benchmarks.accuracy --data-dir fer2013 --output-dir results                    # every arch, many hours
    python -m benchmarks.accuracy --data-dir fer2013 --output-dir results --arch cnn4_bn --seeds 3
    python -m benchmarks.accuracy --data-dir fer2013 --output-dir results --arch resnet18 -- --epochs 5 --no-pretrained

What stands behind -- goes to train_emotion_cnn.py. A run that was stopped goes on, a finished one is only measured,
both from its folder in --output-dir. All figures are on val/, which FER2013's import makes of PublicTest, and which
also chooses the epoch. Where there is a test/ too, training measures it at its end, as always.
"""

import statistics
import sys
from pathlib import Path

import numpy as np
import torch

import reports
from benchmarks import check_inputs, count, train
from benchmarks.training_speed import count_multiply_adds, describe
from checkpoints import BEST_NAME
from console import ArgumentParser, make_output_dir, run_script
from data import FolderImages
from device import pick_device
from engine.loop import evaluate, to_log_probs
from errors import InputError
from inference import load_model
from models import count_parameters, list_archs
from preprocessing import to_input
from splits import Batches, find_copies

HEAD = """| arch | training | accuracy (95% interval) | with `--tta` | macro F1 | no twin in train | parameters | \
multiply-adds | file | minutes |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"""


def measure(path: Path, data_dir: Path) -> dict:
    """Metrics of a checkpoint on val/, with "tta" and "no_twin" (accuracies) and "model" beside them."""
    model, class_names = load_model(path, "cpu")
    val = FolderImages(data_dir / "val", model.info.input_spec, class_names=class_names)
    train = FolderImages(data_dir / "train", model.info.input_spec, class_names=class_names)
    batches = Batches(val, np.arange(len(val)), torch.device("cpu")).iterate(256)
    logits, labels = evaluate(model, batches, lambda images: to_input(images, model.info.input_spec), tta=True)
    log_probs = to_log_probs(logits[:1], model.info.temperature).numpy()
    metrics = reports.compute_metrics(labels.numpy(), log_probs, class_names, split="val")
    right = log_probs.argmax(1) == labels.numpy()
    alone = ~find_copies(train, val)
    tta = (to_log_probs(logits, model.info.temperature).argmax(1) == labels).float().mean().item()
    return metrics | {"model": model, "tta": tta, "no_twin": right[alone].mean(), "alone": int(alone.sum())}


def format_row(arch: str, runs: list[tuple[dict, list[dict]]], path: Path, training: str) -> str:
    """A row of the table from (metrics, history) of each seed; with several seeds mean and standard deviation.

    The interval is that of the mean accuracy on so many pictures.
    """

    def cell(key: str) -> str:
        values = [100 * metrics[key] for metrics, _ in runs]
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.1f}{spread}"

    total = runs[0][0]["count"]
    right = statistics.mean(metrics["accuracy"] * total for metrics, _ in runs)
    low, high = (100 * end for end in reports.wilson_interval(right, total))
    model, history = runs[0][0]["model"], runs[0][1]
    minutes = statistics.mean(sum(row["seconds"] for row in history) / 60 for _, history in runs)
    seeds = f", {len(runs)} seeds" if len(runs) > 1 else ""
    cells = [
        f"`{arch}`",
        f"{training}, {len(history)} epochs, {model.info.input_spec.image_size} pixels{seeds}",
        f"{cell('accuracy')} ({low:.1f} to {high:.1f})",
        *map(cell, ("tta", "macro_f1", "no_twin")),
        f"{count_parameters(model) / 1e6:.2f} M",
        f"{count_multiply_adds(model, model.info.input_spec.image_size) / 1e6:.0f} M",
        f"{path.stat().st_size / 1e6:.1f} MB",
        f"{minutes:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-dir", metavar="DIR", default=".", help="holds train/ and val/ (default: .)")
    parser.add_argument("--output-dir", metavar="DIR", default="results", help="a folder per run (default: results)")
    parser.add_argument("--arch", nargs="+", default=list_archs(), help="(default: every one)")
    parser.add_argument("--seeds", type=count, default=1, help="how many (default: 1)")
    parser.add_argument("options", nargs="*", metavar="-- OPTIONS", help="flags for train_emotion_cnn.py")
    return parser


def main() -> None:
    args = get_args_parser().parse_args()
    check_inputs(args.data_dir, *args.arch, splits=("train", "val"))
    output_dir = make_output_dir(args.output_dir)
    training = f"`{' '.join(args.options)}`" if args.options else "recipe"
    print(f"{describe(pick_device(), 'auto')}\n\n{HEAD}", flush=True)
    metrics, failed = None, []
    for arch in args.arch:
        runs = []
        try:
            for seed in range(args.seeds):
                folder = output_dir / f"{arch}-{seed}"
                history = train(folder, "--data-dir", args.data_dir, "--arch", arch, "--seed", seed, *args.options)
                metrics = measure(folder / BEST_NAME, Path(args.data_dir))
                runs.append((metrics, history))
        except InputError as error:  # such as ImageNet weights that can't be had; the others go on
            print(f"{arch}: {error}", file=sys.stderr)
            failed.append(arch)
        else:
            print(format_row(arch, runs, folder / BEST_NAME, training), flush=True)
    if metrics:
        print(f"\n{metrics['count']:,} pictures, {metrics['alone']:,} of them without a twin in train/")
    if failed:
        raise InputError(f"not measured: {', '.join(failed)}")


if __name__ == "__main__":
    run_script(main)
