"""How many minutes until a network is of use? Time until validation accuracy passes 60% and 65%.

    python -m benchmarks.speedrun --data-dir fer2013                        # ours; then S2's and S0's in the plain loop
    python -m benchmarks.speedrun --data-dir fer2013 --minutes 60           # which gives the plain loops an hour each
    python -m benchmarks.speedrun --data-dir fer2013 --plain -- --epochs 10 # ours alone, otherwise trained

Ours is train_emotion_cnn.py with OURS, or with what stands behind --; start-up, decoding the pictures, saving and the
final report all count, as if they came before the first epoch. The others are the networks of two earlier systems by
their recipes, in the loop of the tutorials (see benchmarks.training_speed), from the first picture on. Validation, on
val/, counts for all. Where there is a test/ too, ours measures it at its end, as always.
"""

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator

import torch

from benchmarks import check_inputs, train
from benchmarks.training_speed import describe, fastest_plain, plain_loader, plain_model, plain_step
from console import ArgumentParser, run_script
from device import limit_threads, pick_device
from engine.optim import make_scheduler
from errors import InputError
from train_emotion_cnn import DEFAULT_ARCH, settle

GOALS = (0.60, 0.65)
# So few epochs want smaller batches, which make more steps, weak augmentation and a short average.
OURS = ("--epochs", "9", "--batch-size", "64", "--lr", "0.002", "--augment", "flip,window=0.83", "--ema", "0.998")


def run_ours(args) -> list[tuple[float, float]]:
    """(minutes, validation accuracy) after each epoch."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        options = ("--arch", args.arch, "--seed", args.seed, "--cache-dir", f"{folder}/cache", *args.options)
        history = train(f"{folder}/run", "--data-dir", args.data_dir, *options)
    done, minutes = [], (time.perf_counter() - start - sum(row["seconds"] for row in history)) / 60
    for row in history:
        minutes += row["seconds"] / 60
        done.append((minutes, row["val_acc"]))
    return done


def train_plainly(pipe, settings: dict, workers: int) -> None:
    """Sends (minutes, validation accuracy) after each epoch of the recipe in the plain loop."""
    limit_threads()
    start, device = time.perf_counter(), pick_device()
    torch.manual_seed(settings["seed"])
    batches = {split: plain_loader(settings, split, workers, device) for split in ("train", "val")}
    model, optimizer = plain_model(settings, len(batches["train"].dataset.classes), device)
    scheduler = make_scheduler(settings["schedule"], optimizer, total_steps=0)  # none or plateau
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
        pipe.send(((time.perf_counter() - start) / 60, correct / total))
    pipe.close()


def run_plain(settings: dict, workers: int) -> Iterator[tuple[float, float]]:
    """What train_plainly sends, from a process of its own, which has none of our settings."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=train_plainly, args=(theirs, settings, workers))
    process.start()
    theirs.close()
    try:
        while True:
            yield pipe.recv()
    except EOFError:  # the recipe has ended, or the process has
        process.join()
        if process.exitcode:
            raise InputError(f"the plain loop of {settings['arch']} ended with {process.exitcode}, see above") from None
    finally:
        process.terminate()
        process.join()


def until_goals(epochs: Iterable[tuple[float, float]], minutes: float) -> list[tuple[float, float]]:
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


def settle_plain(arch: str, args) -> dict:
    """The recipe of `arch`; InputError where the plain loop can't follow it."""
    settings = settle({"arch": arch, "data_dir": args.data_dir, "seed": args.seed, "pretrained": False})[0]
    plain = {"class_weights": ("none",), "label_smoothing": (0.0,), "ema": (0.0,), "schedule": ("none", "plateau")}
    for name, known in plain.items():
        if settings[name] not in known:
            raise InputError(f"--plain {arch}: its recipe has {name} {settings[name]}, which the plain loop has not")
    return settings


def main() -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-dir", metavar="DIR", default=".", help="holds train/ and val/ (default: .)")
    parser.add_argument("--arch", default=DEFAULT_ARCH, help=f"ours (default: {DEFAULT_ARCH})")
    parser.add_argument("--plain", nargs="*", default=["cnn4_bn", "cnn6_bn"], help="(default: cnn4_bn cnn6_bn)")
    parser.add_argument("--minutes", type=float, default=1e9, help="the most that each plain loop gets (default: all)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="at most, for the plain loops")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("options", nargs="*", default=OURS, metavar="-- OPTIONS", help="for ours (default: OURS)")
    args = parser.parse_args()
    check_inputs(args.data_dir, args.arch, *args.plain, splits=("train", "val"))
    recipes = [settle_plain(arch, args) for arch in args.plain]
    goals = " | ".join(f"minutes to {100 * goal:.0f}%" for goal in GOALS)
    print(f"{describe(pick_device(), 'auto')}\n\n| network | {goals} |\n| --- |{' --- |' * len(GOALS)}", flush=True)
    print(format_row(f"`{args.arch}`, `{' '.join(args.options)}`", run_ours(args)), flush=True)
    for settings in recipes:
        workers = fastest_plain(settings, 3, args.workers)
        done = until_goals(run_plain(settings, workers), args.minutes)
        print(format_row(f"`{settings['arch']}`, plain loop, recipe of {settings['epochs']} epochs", done), flush=True)


if __name__ == "__main__":
    run_script(main)
