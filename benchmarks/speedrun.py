"""How many minutes until a model is of use? Time until validation accuracy passes 60%, 65% and 70%.

    python -m benchmarks.speedrun --data-dir fer2013              # ours; then S2's and S0's in the baseline loop
    python -m benchmarks.speedrun --data-dir fer2013 --minutes 60           # which gives the baselines an hour each
    python -m benchmarks.speedrun --data-dir fer2013 --baseline -- --epochs 10        # ours alone, otherwise trained

Ours is train_emotion_cnn.py, once with each of OURS or with what follows --; start-up, decoding the images, saving and
the final report all count, as if they came before the first epoch. The others are the networks of two earlier systems
by their recipes, in the baseline loop (see benchmarks/baseline.py), from the first image on. Validation, on val/,
counts for all. If there is a test/ too, ours measures it at its end, as always.
"""

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator

import torch

from benchmarks import baseline, check_inputs, train
from benchmarks.training_speed import describe, fastest_workers
from console import ArgumentParser, number, run_script
from data import find_splits
from device import limit_threads, pick_device
from engine.optim import make_scheduler
from engine.settings import Settings
from errors import InputError
from train_emotion_cnn import DEFAULT_ARCH, parse_settings

GOALS = (0.60, 0.65, 0.70)
OURS = (("--epochs", "8"), ("--epochs", "30"))  # the learning rate falls to zero at the end, so each aims at one goal


def run_ours(args, options: tuple[str, ...]) -> list[tuple[float, float]]:
    """(minutes, validation accuracy) after each epoch."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        options = ("--arch", args.arch, "--seed", args.seed, "--cache-dir", f"{folder}/cache", *options)
        history = train(f"{folder}/run", "--data-dir", args.data_dir, *options)
    done, minutes = [], (time.perf_counter() - start - sum(row["seconds"] for row in history)) / 60
    for row in history:
        minutes += row["seconds"] / 60
        done.append((minutes, row["val_acc"]))
    return done


def train_baseline(pipe, settings: Settings, workers: int) -> None:
    """Sends (minutes, validation accuracy) after each epoch of the recipe in the baseline loop."""
    limit_threads()
    start, device, folders = time.perf_counter(), pick_device(), find_splits(settings.data_dir)
    torch.manual_seed(settings.seed)
    batches, val_batches = (
        baseline.make_loader(folders[split], settings, workers, device, is_train=split == "train")
        for split in ("train", "val")
    )
    model, optimizer = baseline.make_model(settings, len(batches.dataset.classes), device)
    scheduler = make_scheduler(settings.schedule, optimizer, total_steps=0)  # none or plateau
    for _ in range(settings.epochs):
        model.train()
        for inputs, labels in batches:
            baseline.train_step(model, optimizer, inputs, labels, device)
        model.eval()
        correct, loss, total = 0, 0.0, len(val_batches.dataset)
        with torch.no_grad():
            for inputs, labels in val_batches:
                outputs, labels = model(inputs.to(device)), labels.to(device)
                loss += torch.nn.functional.cross_entropy(outputs, labels, reduction="sum").item() / total
                correct += (outputs.argmax(1) == labels).sum().item()
        if scheduler:
            scheduler.step(loss)
        pipe.send(((time.perf_counter() - start) / 60, correct / total))
    pipe.close()


def run_baseline(settings: Settings, workers: int) -> Iterator[tuple[float, float]]:
    """What train_baseline sends, from a process of its own, which has none of our settings."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=train_baseline, args=(theirs, settings, workers))
    process.start()
    theirs.close()
    try:
        while True:
            yield pipe.recv()
    except EOFError:  # the recipe has ended, or the process has
        process.join()
        if process.exitcode:
            message = f"the baseline loop of {settings.arch} ended with {process.exitcode}, see above"
            raise InputError(message) from None
    finally:
        process.terminate()
        process.join()


def until_goals(epochs: Iterable[tuple[float, float]], minutes: float) -> list[tuple[float, float]]:
    """The epochs until the last goal is passed, or the minutes are over."""
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


def parse_recipe(arch: str, args) -> Settings:
    """The recipe of `arch`; InputError if the baseline loop can't follow it."""
    flags = ["--arch", arch, "--data-dir", args.data_dir, "--seed", str(args.seed), "--no-pretrained"]
    settings, _ = parse_settings(flags)
    known = {"label_smoothing": (0.0,), "mixup": (0.0,), "ema": (0.0,)}
    known |= {"class_weights": ("none",), "schedule": ("none", "plateau")}
    for name, values in known.items():
        value = getattr(settings, name)
        if value not in values:
            raise InputError(f"--baseline {arch}: its recipe has {name} {value}, which the baseline loop has not")
    return settings


def main() -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--data-dir", metavar="DIR", default=".", help="holds train/ and val/")
    add("--arch", default=DEFAULT_ARCH, help="ours")
    add("--baseline", nargs="*", default=["cnn4_bn", "cnn6_bn"], help="(default: cnn4_bn cnn6_bn)")
    add("--minutes", type=number(float, 0), default=1e9, help="the most that each baseline gets (default: all)")
    add("--workers", type=number(int, 0), default=os.cpu_count(), help="of the baseline loop, at most")
    add("--seed", type=int, default=0, help="of all")
    add("options", nargs="*", metavar="-- OPTIONS", help="for ours (default: OURS)")
    args = parser.parse_args()
    check_inputs(args.data_dir, args.arch, *args.baseline, splits=("train", "val"))
    recipes = [parse_recipe(arch, args) for arch in args.baseline]
    goals = " | ".join(f"minutes to {100 * goal:.0f}%" for goal in GOALS)
    print(f"{describe(pick_device(), 'auto')}\n\n| network | {goals} |\n| --- |{' --- |' * len(GOALS)}", flush=True)
    for options in [args.options] if args.options else OURS:
        print(format_row(f"`{args.arch}`, `{' '.join(options)}`", run_ours(args, options)), flush=True)
    for settings in recipes:
        workers = fastest_workers(settings, 3, args.workers)
        done = until_goals(run_baseline(settings, workers), args.minutes)
        print(format_row(f"`{settings.arch}`, baseline loop, recipe of {settings.epochs} epochs", done), flush=True)


if __name__ == "__main__":
    run_script(main)
