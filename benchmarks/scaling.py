"""What a second process brings, measured here, and an estimate of what more GPUs would bring.

    python -m benchmarks.scaling                                    # the default network, batch of its recipe
    python -m benchmarks.scaling --arch cnn4_bn --batch-size 512
    python -m benchmarks.scaling --step-ms 20 --bandwidth 25        # the estimate for other GPUs and networks

Measured: images/s of our training step on random images, in one process of one thread and in two of one thread each
that share the same batch (gloo between them); the share of the step that the exchange of gradients takes, which is what
the step is faster without it; and the bytes that a process sends a step, by a ring: 2 (n - 1) / n of the gradients.

Estimated, for n GPUs: step = step-ms / n * batch / batch of the recipe + overhead-ms + bytes / bandwidth, the exchange
not hidden behind the backward pass. It prints where more GPUs stop paying off, and the flags to go on with from there.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import REPO
from console import ArgumentParser, number, run_script
from device import memory_format, pick_device, pick_precision
from engine import distributed
from engine.optim import make_optimizer
from engine.step import TrainStep
from errors import InputError
from models import count_parameters, create_model, get_arch
from preprocessing import to_input
from splits import shard

SIZES = (8, 64, 512)
PAYS = 0.5  # of what n times the speed would be; below, more GPUs stop paying


def measure(arch: str, batch_size: int, steps: int) -> dict[str, float]:
    """In one of torchrun's processes, or alone: median seconds of a step, with and without exchange of gradients."""
    group, device = distributed.init(pick_device("cpu"))
    torch.set_num_threads(1)
    model = create_model(arch, 7).to(memory_format=memory_format(device)).train()
    spec = model.info.input_spec
    optimizer = make_optimizer("sgd", model, lr=1e-3, weight_decay=0.0)
    precision = pick_precision("auto", device)
    step = TrainStep(
        model, optimizer, lambda images, generator: to_input(images, spec), precision=precision, group=group
    )
    start, stop = shard(0, batch_size, group.rank, group.world_size)
    images = torch.randint(0, 256, (stop - start, spec.channels, spec.image_size, spec.image_size), dtype=torch.uint8)
    labels = torch.randint(0, 7, (stop - start,))
    times = {"exchanged": [], "alone": []}
    for turn in range(2 * steps + 4):
        kind = ("exchanged", "alone")[turn % 2]
        if group.world_size > 1:
            step.wrapped_model.require_backward_grad_sync = kind == "exchanged"
            group.gather(None)  # so that all start at once
        begin = time.perf_counter()
        step(images, labels, batch_size)
        group.gather(None)
        if turn >= 4:
            times[kind].append(time.perf_counter() - begin)
    distributed.shutdown()
    return {name: statistics.median(values) for name, values in times.items()}


def start(processes: int, args: argparse.Namespace) -> dict[str, float]:
    """`measure` in `count` processes of one thread each; the figures of the first."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        words = ["--arch", args.arch, "--batch-size", str(args.batch_size), "--steps", str(args.steps)]
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        launch = launch if processes > 1 else []
        command = [sys.executable, *launch, "-m", "benchmarks.scaling", *words, "--result", str(result)]
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
        if done.returncode:
            sys.stderr.write(done.stderr)
            raise InputError(f"{processes} processes failed; their messages are above")
        return json.loads(result.read_text())


def sent_bytes(parameters: int, processes: int) -> float:
    """By one process a step: float32 gradients around a ring (Patarasuk & Yuan 2009)."""
    return 4 * parameters * 2 * (processes - 1) / processes


def estimate(processes: int, batch_size: int, parameters: int, args: argparse.Namespace) -> float:
    """Seconds of a step."""
    compute = args.step_ms / 1000 / processes * batch_size / args.batch_size
    return compute + args.overhead_ms / 1000 + sent_bytes(parameters, processes) / (args.bandwidth * 1e9)


def describe_estimate(parameters: int, args: argparse.Namespace) -> list[str]:
    def efficiency(processes: int, batch_size: int) -> float:
        alone = estimate(1, args.batch_size, parameters, args) / args.batch_size
        return alone / (processes * estimate(processes, batch_size, parameters, args) / batch_size)

    lines = [
        f"ESTIMATE, not measured: {args.step_ms:g} ms per step of {args.batch_size} images on one GPU, overhead "
        f"{args.overhead_ms:g} ms, {args.bandwidth:g} GB/s",
        "| GPUs | batch | step | images/s | of ideal |",
        "| --- | --- | --- | --- | --- |",
    ]
    pays = max((n for n in (2**k for k in range(11)) if efficiency(n, args.batch_size) >= PAYS), default=1)
    rows = [(n, args.batch_size) for n in SIZES]
    rows += [(n, args.batch_size * n // pays) for n in SIZES if n > pays]
    for processes, batch_size in rows:
        seconds = estimate(processes, batch_size, parameters, args)
        lines.append(
            f"| {processes} | {batch_size:,} | {1000 * seconds:.2f} ms | {batch_size / seconds:,.0f} | "
            f"{100 * efficiency(processes, batch_size):.0f}% |"
        )
    recipe = get_arch(args.arch).recipe
    grown, is_sgd = SIZES[-1] // pays, recipe.optimizer == "sgd"
    factor = args.batch_size * grown / recipe.batch_size
    lr = recipe.lr * (factor if is_sgd else math.sqrt(factor))
    rule = "in proportion, Goyal et al. 2017" if is_sgd else "by its square root, Malladi et al. 2022"
    lines.append(f"At a batch of {args.batch_size} it stops paying beyond {pays} GPUs ({100 * PAYS:.0f}% of ideal).")
    if grown > 1:
        lines.append(
            f"On {SIZES[-1]}, let each keep its share: --batch-size {args.batch_size * grown} --lr {lr:.3g} (with the "
            f"batch {rule}) --schedule onecycle, whose first 30% of steps warm up."
        )
    return lines


def main() -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--arch", default="seresnet13", help="to train")
    add("--batch-size", type=number(int, 4), metavar="N", help="of all processes (default: the recipe's)")
    add("--steps", type=number(int, 1), default=12, help="timed of each kind")
    add("--step-ms", type=number(float, 1e-3), default=10.0, help="of one GPU, for the estimate")
    add("--overhead-ms", type=number(float, 0), default=1.0, help="of a step whatever its batch")
    add("--bandwidth", type=number(float, 1e-3), default=12.5, help="GB/s of a GPU to the next; 12.5 is 100 Gbit/s")
    add("--result", help=argparse.SUPPRESS)  # where a process that `start` has started leaves its figures
    args = parser.parse_args()
    args.batch_size = args.batch_size or get_arch(args.arch).recipe.batch_size
    if args.result:
        result = measure(args.arch, args.batch_size, args.steps)
        if int(os.environ.get("RANK", 0)) == 0:
            Path(args.result).write_text(json.dumps(result))
        return
    parameters = count_parameters(create_model(args.arch, 7))
    alone, two = start(1, args)["exchanged"], start(2, args)
    print(f"{args.arch}, batch of {args.batch_size}, {parameters:,} parameters\n")
    print("| processes of one thread | step | images/s | exchange of gradients | sent per step |")
    print("| --- | --- | --- | --- | --- |")
    print(f"| 1 | {1000 * alone:.1f} ms | {args.batch_size / alone:,.0f} | none | none |")
    share = max(0.0, 1 - two["alone"] / two["exchanged"])
    print(
        f"| 2 | {1000 * two['exchanged']:.1f} ms | {args.batch_size / two['exchanged']:,.0f} | {100 * share:.0f}% of "
        f"the step | {sent_bytes(parameters, 2) / 1e6:.1f} MB |\n"
    )
    print("\n".join(describe_estimate(parameters, args)))


if __name__ == "__main__":
    run_script(main)
