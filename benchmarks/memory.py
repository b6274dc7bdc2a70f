"""Memory while training, epoch by epoch, and that a set may be larger than memory. Linux only (it reads /proc).

    python -m benchmarks.memory --data-dir fer2013
    python -m benchmarks.memory --video clip.mp4        # instead: while a video is classified, frame by frame

First train_emotion_cnn.py is run, and its resident memory read after every epoch. Then one epoch of batches is drawn
from the same images cached at growing sizes: `anonymous` is the memory that the process holds itself, `file` the
pages of the memory map, which the system takes back when it needs room.
"""

import multiprocessing
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import REPO, check_inputs
from console import ArgumentParser, number, run_script
from device import keep_freed_memory
from errors import InputError
from models import InputSpec
from splits import draw_order, load_splits


def read_memory(process: int | str = "self") -> dict[str, float]:
    """MB of a running process: VmHWM (peak resident), VmRSS (resident), RssAnon (anonymous), RssFile (of files)."""
    text = Path(f"/proc/{process}/status").read_text()
    return {name: int(value) * 1024 / 1e6 for name, value in re.findall(r"(Vm\w+|Rss\w+):\s+(\d+) kB", text)}


def watch_training(data_dir: str, arch: str, epochs: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-u", REPO / "train_emotion_cnn.py", "--data-dir", data_dir, "--arch", arch]
        command += ["--epochs", str(epochs), "--output-dir", folder, "--device", "cpu"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                if line.startswith("epoch "):
                    memory = read_memory(process.pid)
                    print(f"{line.split('  ')[0]}: resident {memory['VmRSS']:,.0f} MB, peak {memory['VmHWM']:,.0f} MB")
        if process.returncode:
            raise InputError("training has stopped; its message is above")


def watch_video(path: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, REPO / "predict_emotion.py", path, "--annotate", folder, "--device", "cpu"]
        resident = []
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            while process.poll() is None:
                memory = read_memory(process.pid)
                resident += [memory["VmRSS"]] if "VmRSS" in memory else []  # none of a process that is just ending
                time.sleep(0.2)
        if process.returncode:
            raise InputError("predict_emotion.py has stopped; its message is above")
    for share in (0.25, 0.5, 0.75, 0.95):  # the last samples are of the timeline's plot and of the end
        print(f"resident after {share:.0%} of the time: {resident[int(share * len(resident))]:,.0f} MB")


def draw_epoch(pipe, data_dir: str, spec: InputSpec, cache_dir: str) -> None:
    keep_freed_memory()
    options = {"val_fraction": 0.1, "seed": 0, "cache_dir": cache_dir}
    train = load_splits(data_dir, spec, torch.device("cpu"), **options).train
    checksum, size = 0, len(train) * spec.image_size**2
    start = read_memory()["RssAnon"]
    for images, _ in train.iterate(64, draw_order(train.labels, "shuffle", seed=0)):
        checksum += int(images[0, 0, 0, 0])
    memory = read_memory()
    pipe.send((size / 1e6, start, memory["RssAnon"], memory["RssFile"]))


def watch_sets(args) -> None:
    check_inputs(args.data_dir, args.arch)
    specs = [InputSpec(image_size) for image_size in args.sizes]
    watch_training(args.data_dir, args.arch, args.epochs)
    context = multiprocessing.get_context("spawn")
    for spec in specs:
        with tempfile.TemporaryDirectory() as cache_dir:
            pipe, other = context.Pipe()
            process = context.Process(target=draw_epoch, args=(other, args.data_dir, spec, cache_dir))
            process.start()
            other.close()
            try:
                size, start, anonymous, mapped = pipe.recv()
            except EOFError:
                raise InputError(f"drawing batches at {spec.image_size} pixels has stopped; see above") from None
            process.join()
        print(
            f"{spec.image_size} pixels: the set has {size:,.0f} MB; anonymous {start:,.0f} MB before an epoch of "
            f"batches, {anonymous:,.0f} MB after it; file {mapped:,.0f} MB"
        )


def main() -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--data-dir", metavar="DIR", default=".", help="holds train/")
    add("--arch", default="cnn4_bn", help="to train")
    add("--epochs", type=number(int, 1), default=3, help="to train for")
    add("--sizes", type=number(int, 8, 2048), nargs="*", default=[48, 96, 192], help="pixels (default: 48 96 192)")
    add("--video", metavar="FILE", help="measure the memory of classifying this video")
    args = parser.parse_args()
    if args.video:
        watch_video(args.video)
    else:
        watch_sets(args)


if __name__ == "__main__":
    run_script(main)
