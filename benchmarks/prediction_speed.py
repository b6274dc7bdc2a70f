"""How fast images are classified: one at a time from Python, a folder from the command line, and the start-up.

    python -m benchmarks.prediction_speed --data-dir fer2013

The models have random weights, which cost the same as trained ones, and logits scaled to give clear predictions.

predict_image   one JPEG of 48x48 pixels, model loaded, median of 500 calls in a process that does nothing else;
                forward: the model's share of it
difference      the largest between probabilities of an image alone and in a batch of 64
folder          predict_emotion.py over a folder of 10,000 images, start-up taken off, as a share of the rate of
                forward passes alone on images that are ready in memory
start           predict_emotion.py with one image, against `python -c "import torch, PIL.Image"`, medians
"""

import itertools
import multiprocessing
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from benchmarks import REPO, check_inputs
from checkpoints import make_checkpoint, save_checkpoint
from console import ArgumentParser, number, run_script
from data import walk_images
from errors import InputError
from inference import load_model, predict_image, predict_probs
from models import create_model, last_layer
from preprocessing import read_image

ARCHS = ("seresnet13", "cnn6_bn", "cnn6_rgb", "cnn4_bn", "cnn4")
CLASSES = ["angry", "disgust", "fear", "happy", "neutral", "sad", "surprise"]


def median_ms(function, times: int) -> float:
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds)


def wall_seconds(*command: str) -> float:
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=REPO)
    if done.returncode:
        raise InputError(f"{' '.join(command)} has stopped: {done.stderr.decode(errors='replace')}")
    return time.perf_counter() - start


def time_python_calls(checkpoint: str, jpeg: str) -> tuple[float, float]:
    """Milliseconds of predict_image and of the forward pass in it, as a user's own Python has them."""
    model, class_names = load_model(checkpoint, "cpu")
    pixels = torch.tensor(read_image(jpeg, model.info.input_spec))[None]
    calls = (lambda: predict_image(model, jpeg, class_names), lambda: predict_probs(model, pixels))
    return tuple(median_ms(call, 500) for call in calls)


def fill_folder(folder: Path, source: Path, count: int) -> list[str]:
    """Copies of the images below `source`, again from the first if they are too few."""
    found = [Path(entry.path) for entry in walk_images(source)]
    paths = []
    for row, path in zip(range(count), itertools.cycle(found), strict=False):
        paths.append(str(folder / f"{row:05d}{path.suffix}"))
        shutil.copyfile(path, paths[-1])
    return paths


def measure(arch: str, folder: Path, paths: list[str], rounds: int) -> str:
    checkpoint = folder.parent / f"{arch}.pth"
    model = create_model(arch, len(CLASSES))
    last_layer(model).weight.data *= 50
    model.info = replace(model.info, class_names=CLASSES, trained_on="nothing")
    save_checkpoint(make_checkpoint(model, epoch=0, metrics={}, config={}), checkpoint)
    model, _ = load_model(checkpoint, "cpu")
    jpeg = folder.parent / "face.jpg"
    Image.open(paths[0]).convert("L").resize((48, 48)).save(jpeg, quality=90)
    pixels = torch.stack([torch.tensor(read_image(path, model.info.input_spec)) for path in paths[:64]])
    together = predict_probs(model, pixels)
    alone = torch.cat([predict_probs(model, image[None]) for image in pixels])
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        one, forward = pool.apply(time_python_calls, (str(checkpoint), str(jpeg)))
    script = ("predict_emotion.py", "--device", "cpu", "--checkpoint", str(checkpoint))
    ready, through = [], []
    for _ in range(rounds):
        ready.append(len(pixels) / median_ms(lambda: predict_probs(model, pixels), 20) * 1000)
        through.append(len(paths) / (wall_seconds(*script, str(folder)) - wall_seconds(*script, str(jpeg))))
    rate, whole = statistics.median(ready), statistics.median(through)
    return (
        f"| `{arch}` | {one:.2f} ms | {forward:.2f} ms | {(together - alone).abs().max():.0e} | {rate:,.0f} | "
        f"{whole:,.0f} | {whole / rate:.2f} |"
    )


def main() -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--data-dir", metavar="DIR", default=".", help="the images are those of its train/")
    add("--arch", nargs="+", default=ARCHS, help=f"(default: {' '.join(ARCHS)})")
    add("--images", type=number(int, 1), default=10_000, help="in the folder")
    add("--rounds", type=number(int, 1), default=3, help="the median is printed")
    args = parser.parse_args()
    source = check_inputs(args.data_dir, *args.arch)["train"]
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, float32")
    print(
        "| arch | predict_image | forward | difference | forward img/s, batch 64 | folder img/s | folder / forward |\n|"
        + " --- |" * 7
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "images"
        folder.mkdir()
        paths = fill_folder(folder, source, args.images)
        for arch in args.arch:
            print(measure(arch, folder, paths, args.rounds), flush=True)
        checkpoint = ("--device", "cpu", "--checkpoint", f"{temporary}/{args.arch[0]}.pth")
        starts, imports = [], []
        for _ in range(2 * args.rounds + 1):
            starts.append(wall_seconds("predict_emotion.py", f"{temporary}/face.jpg", *checkpoint))
            imports.append(wall_seconds("-c", "import torch, PIL.Image"))
    start, least = statistics.median(starts), statistics.median(imports)
    print(f"\nstart: {start:.2f} s, importing torch and PIL alone: {least:.2f} s, ratio {start / least:.2f}")


if __name__ == "__main__":
    run_script(main)
