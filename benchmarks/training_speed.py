"""Images per second of training: the plain way, our loop, and our step alone, side by side on the same pictures.

    python -m benchmarks.training_speed --data-dir fer2013
    python -m benchmarks.training_speed --data-dir fer2013 --arch cnn4_bn --batch-size 1024      # on a GPU

plain   what tutorials show: ImageFolder, a PIL transform per picture, a DataLoader, float32, loss.item() every step
ours    the training part of train_emotion_cnn.py: batches, transfer, augmentation, step, running metrics
step    our step alone, on one batch that is ready on the device

Network, pictures, batch size, kinds of augmentation, optimiser and threads are the same for all three. Each runs in a
process of its own, so that none inherits another's settings, and they take turns; figures are medians over rounds,
ratios the medians of each round's ratio, since a machine's clock drifts. The plain way gets whatever number of workers
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
from torchvision import datasets, transforms

from benchmarks import check_inputs, count
from console import ArgumentParser, run_script
from device import PRECISIONS, keep_freed_memory, limit_threads, pick_device, pick_precision
from engine.augment import Strengths, parse_augment
from engine.loop import train_one_epoch
from engine.pretrained import train_mode
from engine.resume import Run
from errors import InputError
from models import Dropout, InputSpec, create_model, get_arch, input_spec_for
from splits import draw_order, load_splits
from train_emotion_cnn import settle, to_config

ARCHS = ("seresnet13", "cnn6_bn", "cnn6_rgb", "cnn4_bn", "cnn4", "mobilenet_v2")
FER2013 = 28_709  # training pictures
MATMUL = 4096


def synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def check_count(count: int, settings: dict) -> None:
    if count < settings["batch_size"]:
        raise InputError(f"{count} pictures fill no batch of {settings['batch_size']}; pass a smaller --batch-size")


# The plain way


def plain_transform(spec: InputSpec, strengths: Strengths) -> transforms.Compose:
    """The same kinds of augmentation from torchvision, a picture at a time."""
    size = spec.image_size
    steps = [transforms.Grayscale()] if spec.channels == 1 else []
    if strengths.crop < 1:
        steps.append(transforms.RandomResizedCrop(size, scale=(strengths.crop, 1), ratio=(3 / 4, 4 / 3)))
    else:
        steps.append(transforms.Resize((size, size)))
    if strengths.flip:
        steps.append(transforms.RandomHorizontalFlip(strengths.flip))
    if strengths.translate or strengths.scale:
        zoom = (1 - strengths.scale, 1 + strengths.scale)
        steps.append(transforms.RandomAffine(strengths.rotation, (strengths.translate,) * 2, zoom))
    elif strengths.rotation:
        steps.append(transforms.RandomRotation(strengths.rotation))
    if strengths.brightness or strengths.contrast:
        steps.append(transforms.ColorJitter(strengths.brightness, strengths.contrast))
    if strengths.window < 1:
        steps.append(transforms.RandomCrop(round(strengths.window * size)))
    steps += [transforms.ToTensor(), transforms.Normalize(spec.mean, spec.std)]
    return transforms.Compose(steps + [transforms.RandomErasing(strengths.erase)] * (strengths.erase > 0))


def plain_loader(settings: dict, split: str, workers: int, device: torch.device) -> torch.utils.data.DataLoader:
    """Batches of a split by ImageFolder, a transform a picture and `workers` processes; augmented for train."""
    strengths = parse_augment(settings["augment"] if split == "train" else "none")
    transform = plain_transform(input_spec_for(settings["arch"], settings["image_size"]), strengths)
    return torch.utils.data.DataLoader(
        datasets.ImageFolder(Path(settings["data_dir"]) / split, transform),
        settings["batch_size"],
        shuffle=split == "train",
        drop_last=split == "train",
        num_workers=workers,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
    )


def plain_model(settings: dict, num_classes: int, device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The network with torch's own dropout, and the optimiser of its recipe."""
    model = create_model(settings["arch"], num_classes, image_size=settings["image_size"]).to(device).train()
    for module in model.modules():
        if isinstance(module, Dropout):
            module.__class__ = nn.Dropout
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[settings["optimizer"]]
    return model, kind(model.parameters(), lr=settings["lr"], weight_decay=settings["weight_decay"])


def plain_step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs, labels, device: torch.device):
    """One step of the tutorials' loop on a batch of a loader: its mean loss and how many were right."""
    inputs, labels = inputs.to(device), labels.to(device)
    optimizer.zero_grad()
    outputs = model(inputs)
    loss = nn.functional.cross_entropy(outputs, labels)
    loss.backward()
    optimizer.step()
    return loss.item(), (outputs.argmax(1) == labels).sum().item()


def make_plain(settings: dict, workers: int, device: torch.device):
    """A function that trains so many batches the plain way and returns the seconds."""
    loader = plain_loader(settings, "train", workers, device)
    check_count(len(loader.dataset), settings)
    model, optimizer = plain_model(settings, len(loader.dataset.classes), device)

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
        synchronise(device)
        start, running_loss, correct = time.perf_counter(), 0.0, 0
        for _ in range(steps):
            loss, right = plain_step(model, optimizer, *next(batches), device)
            running_loss, correct = running_loss + loss, correct + right
        synchronise(device)
        return time.perf_counter() - start

    return measure


# Ours


def make_run(settings: dict, device: torch.device) -> Run:
    spec = input_spec_for(settings["arch"], settings["image_size"])
    splits = load_splits(settings["data_dir"], spec, device, val_fraction=settings["val_fraction"], seed=0)
    check_count(len(splits.train), settings)
    run = Run(settings, to_config(settings), splits, device, is_resumed=False)
    train_mode(run.model)
    return run


def make_ours(settings: dict, _, device: torch.device):
    run = make_run(settings, device)
    train, size = run.splits.train, settings["batch_size"]

    def measure(steps: int) -> float:
        epochs = 1 + steps * size // len(train)
        order = torch.cat([draw_order(train.labels, balanced=False, generator=None) for _ in range(epochs)])
        order = order[: steps * size]
        synchronise(device)
        start = time.perf_counter()
        train_one_epoch(run.step, train.iterate(size, order), total=len(order))
        synchronise(device)
        return time.perf_counter() - start

    return measure


def make_step(settings: dict, _, device: torch.device):
    run = make_run(settings, device)
    images, labels = next(run.splits.train.iterate(settings["batch_size"]))
    inputs = run.step.prepare(images)
    run.step.prepare = lambda inputs: inputs

    def measure(steps: int) -> float:
        synchronise(device)
        start = time.perf_counter()
        for _ in range(steps):
            run.step(inputs, labels)
        synchronise(device)
        return time.perf_counter() - start

    return measure


def measure_saving(settings: dict, device: torch.device) -> float:
    """Seconds to write both checkpoints and the history, as after an epoch that was the best so far."""
    with tempfile.TemporaryDirectory(dir=".") as folder:  # where training writes; /tmp may be in memory
        run = make_run({**settings, "output_dir": folder}, device)
        run.step(*next(run.splits.train.iterate(settings["batch_size"])))
        names = ("epoch", "lr", "train_loss", "train_acc", "val_loss", "val_acc", "images_per_s", "seconds")
        run.history = [dict.fromkeys(names, 0.5)] * 2
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            run.save(is_best=True)
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)


# The comparison


class Contestant:
    """A way to train, in its own process: `rate(seconds)` is its images per second over about so long."""

    def __init__(self, make, settings: dict, workers: int = 0):
        context = multiprocessing.get_context("spawn")
        self.batch_size = settings["batch_size"]
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
            raise InputError("one of the ways to train has stopped; its message stands above") from None

    def rate(self, seconds: float) -> float:
        steps = max(2, round(seconds / self._measure(1)))
        return steps * self.batch_size / self._measure(steps)

    def close(self) -> None:
        self.pipe.close()  # which ends it
        self.process.join()


def _serve(pipe, make, settings: dict, workers: int) -> None:
    limit_threads()
    if make is not make_plain:
        keep_freed_memory()
    try:
        measure = make(settings, workers, pick_device(settings["device"]))
        while True:
            pipe.send(measure(pipe.recv()))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
    except (EOFError, OSError, KeyboardInterrupt):  # no more is asked for
        pass


def fastest_plain(settings: dict, seconds: float, most_workers: int) -> int:
    """The number of workers, up to `most_workers`, with which the plain way is fastest."""
    rates = {}
    for workers in sorted({0, 1, 2, most_workers // 2, most_workers}):
        if workers <= most_workers:
            with contextlib.closing(Contestant(make_plain, settings, workers)) as plain:
                plain.rate(seconds)
                rates[workers] = plain.rate(seconds)
    return max(rates, key=rates.get)


def matmul_rate(precision: torch.dtype, device: torch.device) -> float:
    """Arithmetic operations per second of a square matrix product."""
    a = torch.randn(MATMUL, MATMUL, device=device).to(precision)
    seconds = []
    for _ in range(4):
        synchronise(device)
        start = time.perf_counter()
        a @ a
        synchronise(device)
        seconds.append(time.perf_counter() - start)
    return 2 * MATMUL**3 / min(seconds[1:])


def count_multiply_adds(model: nn.Module, side: int) -> int:
    """Of the convolutions and linear layers, for one picture of `side` x `side` pixels."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, model.info.input_spec.channels, side, side))
    return counter.get_total_flops() // 2


def count_operations(settings: dict) -> int:
    """Arithmetic operations of training on one picture: a multiply-add is two, and backward counts twice forward.

    The first layer needs no gradient of its input, so that is up to one percent too much.
    """
    model = create_model(settings["arch"], 7, image_size=settings["image_size"])
    side = round(parse_augment(settings["augment"]).window * model.info.input_spec.image_size)
    return 6 * count_multiply_adds(model, side)


def compare(settings: dict, args: argparse.Namespace, device: torch.device) -> str:
    """A row of the table."""
    precision = pick_precision(settings["precision"], device)
    workers = fastest_plain(settings, args.seconds, args.workers)
    rates = {name: [] for name in ("plain", "ours", "step", "matmul")}
    with contextlib.ExitStack() as stack:
        ways = {}
        for name, make in (("plain", make_plain), ("ours", make_ours), ("step", make_step)):
            ways[name] = stack.enter_context(contextlib.closing(Contestant(make, settings, workers)))
        for _ in range(args.rounds):
            for name, way in ways.items():
                rates[name].append(way.rate(args.seconds))
            rates["matmul"].append(matmul_rate(precision, device))
    a, b, c, _ = (statistics.median(rates[name]) for name in rates)
    by = {name: statistics.median(x / y for x, y in zip(rates["ours"], rates[name], strict=True)) for name in rates}
    share = by["matmul"] * count_operations(settings)
    saving = measure_saving(settings, device) / (FER2013 / b)
    return (
        f"| `{settings['arch']}` | {settings['image_size']} | {settings['batch_size']} | {a:,.0f} ({workers}) | "
        f"{b:,.0f} | {c:,.0f} | {by['plain']:.2f} | {by['step']:.3f} | {100 * share:.0f}% | {FER2013 / b:,.1f} | "
        f"{100 * saving:.1f}% |"
    )


def describe_loading(data_dir: str, device: torch.device) -> str:
    """How long a first run decodes the pictures, and a second one reads them from the cache."""
    seconds = []
    with tempfile.TemporaryDirectory() as cache_dir:
        for _ in range(2):
            start = time.perf_counter()
            splits = load_splits(data_dir, InputSpec(), device, val_fraction=0.1, seed=0, cache_dir=cache_dir)
            seconds.append(time.perf_counter() - start)
    count = len(splits.train) + len(splits.val) + len(splits.test or [])
    return f"{count:,} pictures decoded in {seconds[0]:.1f} s, read from the cache in {seconds[1]:.2f} s"


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
    parser.add_argument("--data-dir", metavar="DIR", default=".", help="its train/ is used (default: .)")
    parser.add_argument("--arch", nargs="+", default=ARCHS, help=f"(default: {' '.join(ARCHS)})")
    parser.add_argument("--image-size", type=count, default=96, help="of backbones (default: 96)")
    parser.add_argument("--batch-size", type=count, help="(default: the recipe's)")
    parser.add_argument("--rounds", type=count, default=9, help="the median is printed (default: 9)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each round, about (default: 2)")
    parser.add_argument("--workers", type=int, default=torch.get_num_threads(), help="at most, for the plain way")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto", help="of ours (default: auto)")
    return parser


def main() -> None:
    args = get_args_parser().parse_args()
    check_inputs(args.data_dir, *args.arch)
    device = pick_device(args.device)
    print(f"{describe(device, args.precision)}; {args.rounds} rounds of about {args.seconds:g} s, median")
    print(describe_loading(args.data_dir, device))
    print(
        "| arch | pixels | batch | plain img/s (workers) | ours img/s | step img/s | ours / plain | ours / step | "
        "of matrix product | s per FER2013 epoch | saving |\n|" + " --- |" * 11
    )
    for arch in args.arch:
        given = {"arch": arch, "data_dir": args.data_dir, "device": args.device, "precision": args.precision}
        if get_arch(arch).is_backbone:
            given |= {"image_size": args.image_size, "pretrained": False}
        if args.batch_size:
            given["batch_size"] = args.batch_size
        settings, _ = settle(given)
        print(compare(settings, args, device), flush=True)


if __name__ == "__main__":
    run_script(main)
