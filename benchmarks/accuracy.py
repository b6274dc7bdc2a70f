"""How accurate is every arch? Trains each on FER2013, by its recipe by default, and prints a row.

    python -m benchmarks.accuracy --data-dir fer2013 --output-dir results                    # every arch, many hours
    python -m benchmarks.accuracy --data-dir fer2013 --output-dir results --arch cnn4_bn --seeds 3
    python -m benchmarks.accuracy --data-dir fer2013 --output-dir results --arch resnet18 -- --epochs 5 --no-pretrained

What follows -- goes to train_emotion_cnn.py. A run that was stopped goes on, a finished one is only measured, both
from its folder in --output-dir. All figures are on val/, which FER2013's import makes of PublicTest, and which also
chooses the epoch. If there is a test/ too, training measures it at its end, as always.
"""

import statistics
import sys
from pathlib import Path

import reports
from benchmarks import check_inputs, train
from benchmarks.training_speed import count_multiply_adds, describe
from checkpoints import BEST_NAME
from console import ArgumentParser, make_output_dir, number, run_script
from device import pick_device
from engine import evaluation
from errors import InputError
from inference import load_model
from models import count_parameters, device_of, list_archs
from splits import Batches, load_split

HEAD = """| arch | training | accuracy (95% interval) | with `--tta` | macro F1 | without duplicates | parameters | \
multiply-adds | file | minutes |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"""


def measure(path: Path, data_dir: str) -> dict:
    """Metrics of a checkpoint on val/, and "model", "tta" (accuracy) and "without_duplicates" (count and accuracy)."""
    model, _ = load_model(path, "cpu")
    data, rows, split, in_train = load_split(data_dir, "val", model.info, val_fraction=0.1, seed=0)
    batches = Batches(data, rows, device_of(model))
    metrics, with_tta = (
        evaluation.measure(model, batches, split=split, batch_size=256, tta=tta, in_train=in_train)
        for tta in (False, True)
    )
    return {"without_duplicates": metrics} | metrics | {"model": model, "tta": with_tta["accuracy"]}


def format_row(arch: str, runs: list[tuple[dict, list[dict]]], path: Path, training: str) -> str:
    """A row of the table from (metrics, history) of each seed; with several seeds mean and standard deviation.

    The interval is that of the mean accuracy.
    """

    def cell(values: list[float]) -> str:
        spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{100 * statistics.mean(values):.1f}{spread}"

    accuracy, tta, macro_f1 = (cell([metrics[key] for metrics, _ in runs]) for key in ("accuracy", "tta", "macro_f1"))
    without_duplicates = cell([metrics["without_duplicates"]["accuracy"] for metrics, _ in runs])
    total = runs[0][0]["count"]
    right = statistics.mean(metrics["accuracy"] * total for metrics, _ in runs)
    low, high = (100 * end for end in reports.wilson_interval(right, total))
    model, history = runs[0][0]["model"], runs[0][1]
    minutes = statistics.mean(sum(row["seconds"] for row in history) / 60 for _, history in runs)
    seeds = f", {len(runs)} seeds" if len(runs) > 1 else ""
    cells = [
        f"`{arch}`",
        f"{training}, {len(history)} epochs, {model.info.input_spec.image_size} pixels{seeds}",
        f"{accuracy} ({low:.1f} to {high:.1f})",
        *(tta, macro_f1, without_duplicates),
        f"{count_parameters(model) / 1e6:.2f} M",
        f"{count_multiply_adds(model, model.info.input_spec.image_size) / 1e6:.0f} M",
        f"{path.stat().st_size / 1e6:.1f} MB",
        f"{minutes:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--data-dir", metavar="DIR", default=".", help="holds train/ and val/")
    add("--output-dir", metavar="DIR", default="results", help="a folder per run")
    add("--arch", nargs="+", default=list_archs(), help="(default: every one)")
    add("--seeds", type=number(int, 1), default=1, help="how many")
    add("options", nargs="*", metavar="-- OPTIONS", help="flags for train_emotion_cnn.py")
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
                metrics = measure(folder / BEST_NAME, args.data_dir)
                runs.append((metrics, history))
        except InputError as error:  # such as ImageNet weights that can't be had; the others go on
            print(f"{arch}: {error}", file=sys.stderr)
            failed.append(arch)
        else:
            print(format_row(arch, runs, folder / BEST_NAME, training), flush=True)
    if metrics:
        others = metrics["without_duplicates"]["count"]
        print(f"\n{metrics['count']:,} images, {others:,} of them without a duplicate in train/")
    if failed:
        raise InputError(f"not measured: {', '.join(failed)}")


if __name__ == "__main__":
    run_script(main)
