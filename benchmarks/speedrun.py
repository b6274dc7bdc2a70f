"""How many minutes until a network is of use? Time until validation accuracy passes 60% and 65%.

    python -m benchmarks.speedrun --data-dir fer2013                        # ours; then S2's and S0's in the plain loop
    python -m benchmarks.speedrun --data-dir fer2013 --minutes 60           # which gives the plain loops an hour each

Ours is train_emotion_cnn.py with a recipe of fewer epochs; the others are the networks of two earlier systems by their
recipes, in the loop of the tutorials (see benchmarks.training_speed). Validation, on val/, is part of the time.
"""

import sys
import tempfile
import time
from collections.abc import Iterator

import torch

from benchmarks import check_inputs, count, train
from benchmarks.training_speed import describe, plain_loader, plain_model, plain_step
from engine import make_scheduler, pick_device
from models import InputError
from predict_emotion import ArgumentParser, run_script
from train_emotion_cnn import DEFAULT_ARCH, settle

GOALS = (0.60, 0.65)


def run_ours(args) -> list[tuple[float, float]]:
    """(minutes, validation accuracy) after each epoch."""
    with tempfile.TemporaryDirectory() as folder:
        options = ("--arch", args.arch, "--epochs", args.epochs, "--seed", args.seed)
        history = train(folder, "--data-dir", args.data_dir, *options)
    done, minutes = [], 0.0
    for row in history:
        minutes += row["seconds"] / 60
        done.append((minutes, row["val_acc"]))
    return done


def run_plain(settings: dict, workers: int, device: torch.device) -> Iterator[tuple[float, float]]:
    """(minutes, validation accuracy) after each epoch of the recipe in the plain loop."""
    torch.manual_seed(settings["seed"])
    batches = {split: plain_loader(settings, split, workers, device) for split in ("train", "val")}
    model, optimizer = plain_model(settings, len(batches["train"].dataset.classes), device)
    scheduler = make_scheduler(settings["schedule"], optimizer, total_steps=0)  # none or plateau
    start = time.perf_counter()
    for _ in range(settings["epochs"]):
        model.train()
        for inputs, labels in batches["train"]:
            plain_step(model, optimizer, inputs, labels, device)
        model.eval()
        correct, loss, total = 0, 0.0, len(batches["val"].dataset)
        with torch.no_grad():
            for inputs, labels in batches["val"]:
                outputs, labels = model(inputs.to(device)), labels.to(device)
                loss += torch.nn.functional.cross_entropy(outputs, labels, reduction="sum").item() / total
                correct += (outputs.argmax(1) == labels).sum().item()
        if scheduler:
            scheduler.step(loss)
        yield (time.perf_counter() - start) / 60, correct / total


def until_goals(epochs: Iterator[tuple[float, float]], minutes: float) -> list[tuple[float, float]]:
    """The epochs until the last goal is passed, or so many minutes are."""
    done = []
    for row in epochs:
        done.append(row)
        print(f"{row[0]:.1f} minutes: {100 * row[1]:.2f}%", file=sys.stderr, flush=True)
        if row[1] >= GOALS[-1] or row[0] >= minutes:
            break
    return done


def format_row(name: str, done: list[tuple[float, float]]) -> str:
    best, total = max(acc for _, acc in done), done[-1][0]
    cells = [name]
    for goal in GOALS:
        passed = [minutes for minutes, acc in done if acc >= goal]
        cells.append(f"{passed[0]:.1f}" if passed else f"not reached, best {100 * best:.1f}% in {total:.0f} minutes")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-dir", metavar="DIR", default=".", help="holds train/ and val/ (default: .)")
    parser.add_argument("--arch", default=DEFAULT_ARCH, help=f"ours (default: {DEFAULT_ARCH})")
    parser.add_argument("--epochs", type=count, default=12, help="of ours (default: 12)")
    parser.add_argument("--plain", nargs="*", default=["cnn4_bn", "cnn6_bn"], help="(default: cnn4_bn cnn6_bn)")
    parser.add_argument("--minutes", type=float, default=1e9, help="the most that each plain loop gets (default: all)")
    parser.add_argument("--workers", type=int, default=1, help="of the plain loaders (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    args = parser.parse_args()
    check_inputs(args.data_dir, args.arch, *args.plain)
    device, rows = pick_device(), []
    for arch in args.plain:
        settings = settle({"arch": arch, "data_dir": args.data_dir, "seed": args.seed, "pretrained": False})[0]
        if settings["schedule"] not in ("none", "plateau"):
            raise InputError(f"--plain {arch}: the plain loop knows the schedules none and plateau")
        rows.append((f"`{arch}`, plain loop, at most {settings['epochs']} epochs", settings))
    goals = " | ".join(f"minutes to {100 * goal:.0f}%" for goal in GOALS)
    print(f"{describe(device, 'auto')}\n\n| network | {goals} |\n| --- |{' --- |' * len(GOALS)}", flush=True)
    print(format_row(f"`{args.arch}`, {args.epochs} epochs", run_ours(args)), flush=True)
    for name, settings in rows:
        done = until_goals(run_plain(settings, args.workers, device), args.minutes)
        print(format_row(name, done), flush=True)


if __name__ == "__main__":
    run_script(main)
