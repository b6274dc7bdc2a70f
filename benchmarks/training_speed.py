"""Images per second of training: the baseline loop, our loop, and our step alone, side by side on the same images.

    python -m benchmarks.training_speed --data-dir fer2013
    python -m benchmarks.training_speed --data-dir fer2013 --arch cnn4_bn --batch-size 1024      # on a GPU

baseline   the loop of PyTorch's tutorials, see benchmarks/baseline.py
ours       the training part of train_emotion_cnn.py: batches, transfer, augmentation, step, running metrics
step       our step alone, on one batch that is ready on the device

Network, images, batch size, kinds of augmentation, optimizer and threads are the same for all three. Each runs in a
process of its own, so that none inherits another's settings, and they take turns; figures are medians over rounds,
ratios the medians of each round's ratio, since a machine's clock drifts. The baseline gets whatever number of workers
is fastest for it, and is timed in its steady state, when its workers' queue is neither filled nor emptied.
"""

import argparse
import contextlib
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import baseline, check_inputs
from console import ArgumentParser, number, run_script
from data import find_splits
from device import PRECISIONS, keep_freed_memory, limit_threads, pick_device, pick_precision
from engine import resume
from engine.augment import parse_augment
from engine.distributed import ALONE
from engine.pretrained import train_mode
from engine.settings import Settings
from engine.step import TrainStep, train_one_epoch
from errors import InputError
from models import InputSpec, create_model, get_arch
from splits import Batches, draw_order, load_splits
from train_emotion_cnn import load_data, make_model, make_step, parse_settings, set_up_torch

ARCHS = ("seresnet13", "cnn6_bn", "cnn6_rgb", "cnn4_bn", "cnn4", "mobilenet_v2")
FER2013 = 28_709  # training images
MATMUL = 4096


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def check_count(count: int, settings: Settings) -> None:
    if count < settings.batch_size:
        raise InputError(f"{count} images fill no batch of {settings.batch_size}; pass a smaller --batch-size")


# Three ways to train: each is made ready, and returns a function that trains a number of steps and returns the seconds


def make_baseline(settings: Settings, workers: int, device: torch.device):
    folder = find_splits(settings.data_dir)["train"]
    loader = baseline.make_loader(folder, settings, workers, device, is_train=True)
    check_count(len(loader.dataset), settings)
    model, optimizer = baseline.make_model(settings, len(loader.dataset.classes), device)

    def endless():
        while True:
            yield from loader

    batches = endless()

    def measure(steps: int) -> float:
        train(2 * workers)  # what the workers have prepared while the others ran
        seconds = train(steps)
        time.sleep(2 * workers * seconds / steps)  # until they have done so again, not while the others run
        return seconds

    def train(steps: int) -> float:
        synchronize(device)
        start, running_loss, correct = time.perf_counter(), 0.0, 0
        for _ in range(steps):
            loss, right = baseline.train_step(model, optimizer, *next(batches), device)
            running_loss, correct = running_loss + loss, correct + right
        synchronize(device)
        return time.perf_counter() - start

    return measure


def start_training(settings: Settings, device: torch.device) -> tuple[TrainStep, Batches]:
    """The step and the training images, as train_emotion_cnn.py makes them."""
    set_up_torch(settings)
    splits = load_data(settings, device)
    check_count(len(splits.train), settings)
    model = make_model(settings, splits, device)
    train_mode(model)
    return make_step(settings, splits, model, ALONE), splits.train


def make_ours(settings: Settings, _, device: torch.device):
    step, train = start_training(settings, device)

    def measure(steps: int) -> float:
        count = steps * settings.batch_size
        epochs = range(1 + count // len(train))
        order = torch.cat([draw_order(train.labels, "shuffle", seed=epoch) for epoch in epochs])[:count]
        synchronize(device)
        start = time.perf_counter()
        train_one_epoch(step, train, order, batch_size=settings.batch_size)
        synchronize(device)
        return time.perf_counter() - start

    return measure


def make_step_alone(settings: Settings, _, device: torch.device):
    step, train = start_training(settings, device)
    images, labels = next(train.iterate(settings.batch_size))
    inputs = step.augment(images, generator=step.generator)
    step.augment = lambda inputs, generator: inputs

    def measure(steps: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(steps):
            step(inputs, labels)
        synchronize(device)
        return time.perf_counter() - start

    return measure


def measure_saving(settings: Settings, device: torch.device) -> float:
    """Seconds to write both checkpoints and the history, as after an epoch that was the best so far."""
    step, train = start_training(settings, device)
    step(*next(train.iterate(settings.batch_size)))  # the optimizer has no state before
    progress, seconds = resume.Progress(), []
    names = ("lr", "train_loss", "train_acc", "val_loss", "val_acc", "images_per_s", "seconds")
    for epoch in (1, 2):
        progress.record({"epoch": epoch} | dict.fromkeys(names, 0.5))
    with tempfile.TemporaryDirectory(dir=".") as folder:  # where training writes; /tmp may be in memory
        for _ in range(5):
            start = time.perf_counter()
            resume.save(Path(folder), step, progress, settings.to_config(), {}, is_best=True)
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


# The comparison


class Contestant:
    """A way to train, in its own process: `rate(seconds)` is its images per second over about so long."""

    def __init__(self, make, settings: Settings, workers: int = 0):
        context = multiprocessing.get_context("spawn")
        self.batch_size = settings.batch_size
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, make, settings, workers))
        self.process.start()
        other.close()
        self._measure(1)  # so that it is ready before another one is timed

    def _measure(self, steps: int) -> float:
        try:
            self.pipe.send(steps)
            return self.pipe.recv()
        except (EOFError, OSError):
            raise InputError("one of the ways to train has stopped; its message is above") from None

    def rate(self, seconds: float) -> float:
        steps = max(2, round(seconds / self._measure(1)))
        return steps * self.batch_size / self._measure(steps)

    def close(self) -> None:
        self.pipe.close()  # which ends it
        self.process.join()


def _serve(pipe, make, settings: Settings, workers: int) -> None:
    limit_threads()
    if make is not make_baseline:
        keep_freed_memory()
    try:
        measure = make(settings, workers, pick_device(settings.device))
        while True:
            pipe.send(measure(pipe.recv()))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
    except (EOFError, OSError, KeyboardInterrupt):  # no more is asked for
        pass


def fastest_workers(settings: Settings, seconds: float, most_workers: int) -> int:
    """The number of workers, up to `most_workers`, with which the baseline loop is fastest."""
    rates = {}
    for workers in sorted({0, 1, 2, most_workers // 2, most_workers}):
        if workers <= most_workers:
            with contextlib.closing(Contestant(make_baseline, settings, workers)) as contestant:
                contestant.rate(seconds)
                rates[workers] = contestant.rate(seconds)
    return max(rates, key=rates.get)


def matmul_rate(precision: torch.dtype, device: torch.device) -> float:
    """Peak FLOPS: arithmetic operations per second of a square matrix product."""
    a = torch.randn(MATMUL, MATMUL, device=device).to(precision)
    seconds = []
    for _ in range(4):
        synchronize(device)
        start = time.perf_counter()
        a @ a
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * MATMUL**3 / min(seconds[1:])


def count_multiply_adds(model: nn.Module, side: int) -> int:
    """Of the convolutions and linear layers, for one image of `side` x `side` pixels."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, model.info.input_spec.channels, side, side))
    return counter.get_total_flops() // 2


def count_operations(settings: Settings) -> int:
    """Arithmetic operations of training on one image: a multiply-add is two, and backward counts twice forward.

    The first layer needs no gradient of its input, so that is up to one percent too much.
    """
    model = create_model(settings.arch, 7, image_size=settings.image_size)
    side = round(parse_augment(settings.augment).window * model.info.input_spec.image_size)
    return 6 * count_multiply_adds(model, side)


def compare(settings: Settings, args: argparse.Namespace, device: torch.device) -> str:
    """A row of the table."""
    precision = pick_precision(settings.precision, device)
    workers = fastest_workers(settings, args.seconds, args.workers)
    rates = {name: [] for name in ("baseline", "ours", "step", "matmul")}
    with contextlib.ExitStack() as stack:
        ways = {}
        for name, make in (("baseline", make_baseline), ("ours", make_ours), ("step", make_step_alone)):
            ways[name] = stack.enter_context(contextlib.closing(Contestant(make, settings, workers)))
        for _ in range(args.rounds):
            for name, way in ways.items():
                rates[name].append(way.rate(args.seconds))
            rates["matmul"].append(matmul_rate(precision, device))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    by = {name: statistics.median(x / y for x, y in zip(rates["ours"], rates[name], strict=True)) for name in rates}
    mfu, epoch = by["matmul"] * count_operations(settings), FER2013 / medians["ours"]
    return (
        f"| `{settings.arch}` | {settings.image_size} | {settings.batch_size} | {medians['baseline']:,.0f} ({workers}) "
        f"| {medians['ours']:,.0f} | {medians['step']:,.0f} | {by['baseline']:.2f} | {by['step']:.3f} | "
        f"{100 * mfu:.0f}% | {epoch:,.1f} | {100 * measure_saving(settings, device) / epoch:.1f}% |"
    )


def describe_loading(data_dir: str, device: torch.device) -> str:
    """How long a first run decodes the images, and a second one reads them from the cache."""
    seconds = []
    with tempfile.TemporaryDirectory() as cache_dir:
        for _ in range(2):
            start = time.perf_counter()
            splits = load_splits(data_dir, InputSpec(), device, val_fraction=0.1, seed=0, cache_dir=cache_dir)
            seconds.append(time.perf_counter() - start)
    count = len(splits.train) + len(splits.val) + len(splits.test or [])
    return f"{count:,} images decoded in {seconds[0]:.1f} s, read from the cache in {seconds[1]:.2f} s"


def describe(device: torch.device, precision: str) -> str:
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), cpu)
    units = [name for name, there in torch.cpu.get_capabilities().items() if there and "bf16" in name]
    gpu = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    return (
        f"{cpu}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads, {' '.join(units) or 'no bf16 units'}{gpu}; "
        f"torch {torch.__version__}; ours in {str(pick_precision(precision, device)).removeprefix('torch.')}"
    )


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--data-dir", metavar="DIR", default=".", help="holds train/")
    add("--arch", nargs="+", default=ARCHS, help=f"(default: {' '.join(ARCHS)})")
    add("--image-size", type=number(int, 32), default=96, help="of backbones")
    add("--batch-size", type=number(int, 2), help="(default: the recipe's)")
    add("--rounds", type=number(int, 1), default=9, help="the median is printed")
    add("--seconds", type=number(float, 0.01), default=2.0, help="of each round, about")
    add("--workers", type=number(int, 0), default=torch.get_num_threads(), help="of the baseline loop, at most")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--precision", choices=PRECISIONS, default="auto", help="of ours")
    return parser


def main() -> None:
    args = get_args_parser().parse_args()
    check_inputs(args.data_dir, *args.arch)
    device = pick_device(args.device)
    print(f"{describe(device, args.precision)}; {args.rounds} rounds of about {args.seconds:g} s, median")
    print(describe_loading(args.data_dir, device))
    print(
        "| arch | pixels | batch | baseline img/s (workers) | ours img/s | step img/s | ours / baseline | ours / step "
        "| MFU | s per FER2013 epoch | saving |\n|" + " --- |" * 11
    )
    for arch in args.arch:
        flags = ["--arch", arch, "--data-dir", args.data_dir, "--device", args.device, "--precision", args.precision]
        if get_arch(arch).is_backbone:
            flags += ["--image-size", str(args.image_size), "--no-pretrained"]
        if args.batch_size:
            flags += ["--batch-size", str(args.batch_size)]
        settings, _ = parse_settings(flags)
        print(compare(settings, args, device), flush=True)


if __name__ == "__main__":
    run_script(main)
