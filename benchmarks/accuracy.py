"""How accurate is every network? Trains each on FER2013, by its recipe unless said, and prints a row for each.

    python -m benchmarks.accuracy --data-dir fer2013 --output-dir results                    # every arch, many hours
    python -m benchmarks.accuracy --data-dir fer2013 --output-dir results --arch cnn4_bn --seeds 3
    python -m benchmarks.accuracy --data-dir fer2013 --output-dir results --arch resnet18 -- --epochs 5 --no-pretrained

What stands behind -- goes to train_emotion_cnn.py. A run that was stopped goes on, a finished one is only measured,
both from its folder in --output-dir. All figures are on val/, which FER2013's import makes of PublicTest, and which
also chooses the epoch.
"""

import statistics
from pathlib import Path

import numpy as np
import torch

import reports
from benchmarks import check_inputs, count, train
from checkpoints import BEST_NAME
from data import FolderImages
from decoding import to_input
from engine import evaluate, to_log_probs
from models import count_parameters, list_archs
from predict_emotion import ArgumentParser, load_model, make_output_dir, run_script
from splits import Batches

HEAD = """| arch | training | accuracy (95% interval) | with `--tta` | macro F1 | no twin in train | parameters | \
multiply-adds | file | minutes |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"""


def count_multiply_adds(model: torch.nn.Module) -> int:
    """Of the convolutions and linear layers, for one picture."""
    from torch.utils.flop_counter import FlopCounterMode

    spec = model.input_spec
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.zeros(1, spec.channels, spec.image_size, spec.image_size, device=next(model.parameters()).device))
    return counter.get_total_flops() // 2


def measure(path: Path, data_dir: Path) -> dict:
    """Metrics of a checkpoint on val/, with "tta" and "no_twin" (accuracies) and "model" beside them."""
    model, class_names = load_model(path)
    val = FolderImages(data_dir / "val", model.input_spec, class_names=class_names)
    train_digests = set(FolderImages(data_dir / "train", model.input_spec, class_names=class_names).digests)
    batches = Batches(val, np.arange(len(val)), next(model.parameters()).device).iterate(256)
    logits, labels = evaluate(model, batches, lambda images: to_input(images, model.input_spec), tta=True)
    log_probs = to_log_probs(logits[:1], model.temperature).numpy()
    metrics = reports.compute_metrics(labels.numpy(), log_probs, class_names, split="val")
    right = log_probs.argmax(1) == labels.numpy()
    alone = np.array([digest not in train_digests for digest in val.digests])
    tta = (to_log_probs(logits, model.temperature).argmax(1) == labels).float().mean().item()
    return metrics | {"model": model, "tta": tta, "no_twin": right[alone].mean(), "alone": int(alone.sum())}


def format_row(arch: str, runs: list[tuple[dict, list[dict]]], path: Path, training: str) -> str:
    """A row of the table from (metrics, history) of each seed; with several seeds mean and standard deviation."""

    def cell(key: str) -> str:
        values = [100 * metrics[key] for metrics, _ in runs]
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.1f}{spread}"

    low, high = (100 * end for end in runs[0][0]["accuracy_interval"])
    accuracy = f"{cell('accuracy')} ({low:.1f} to {high:.1f})" if len(runs) == 1 else f"{cell('accuracy')}"
    model, history = runs[0][0]["model"], runs[0][1]
    minutes = statistics.mean(sum(row["seconds"] for row in history) / 60 for _, history in runs)
    seeds = f", {len(runs)} seeds" if len(runs) > 1 else ""
    cells = [
        f"`{arch}`",
        f"{training}{len(history)} epochs at {model.input_spec.image_size} pixels{seeds}",
        accuracy,
        *map(cell, ("tta", "macro_f1", "no_twin")),
        f"{count_parameters(model) / 1e6:.2f} M",
        f"{count_multiply_adds(model) / 1e6:.0f} M",
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
    check_inputs(args.data_dir, *args.arch)
    output_dir = make_output_dir(args.output_dir)
    training = f"`{' '.join(args.options)}`, " if args.options else "recipe, "
    print(HEAD)
    for arch in args.arch:
        runs = []
        for seed in range(args.seeds):
            folder = output_dir / f"{arch}-{seed}"
            history = train(folder, "--data-dir", args.data_dir, "--arch", arch, "--seed", seed, *args.options)
            runs.append((measure(folder / BEST_NAME, Path(args.data_dir)), history))
        print(format_row(arch, runs, folder / BEST_NAME, training), flush=True)
    print(f"\n{runs[0][0]['count']:,} pictures, {runs[0][0]['alone']:,} of them without a twin in train/")


if __name__ == "__main__":
    run_script(main)
