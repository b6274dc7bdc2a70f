"""Trains on Modal's GPUs with the same script: images and results on a volume there, the results downloaded.

    pip install modal && modal setup                        # once; needs an account
    modal run -m examples.train_on_modal --data-dir fer2013 --epochs 30 --output-dir outputs
    EMOTION_GPU=H100:4 modal run -m examples.train_on_modal --data-dir fer2013          # four GPUs, by torchrun

All flags except --data-dir, --output-dir and --run go to train_emotion_cnn.py as they are; those that name files of
yours (--weights, --teacher) and --tensorboard don't work there. Images are uploaded once; if they change, the volume
is brought up to date. A container that is taken away starts again and resumes; so does `--run NAME` with the name that
an earlier call printed. `modal volume delete facial-emotions` removes what is kept there.
"""

import os
import posixpath
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import modal

from checkpoints import FINAL_NAME, replace_file
from console import ArgumentParser, make_output_dir
from data import find_splits
from errors import InputError

NAME = "facial-emotions"
GPU = os.environ.get("EMOTION_GPU", "T4")  # or L4, A10G, A100, H100, with :2 and so on for several
REPO = Path(__file__).resolve().parent.parent  # /root in the container
VOLUME_DIR = Path("/volume")
NOT_THERE = ("--weights", "--teacher", "--tensorboard")  # files of this machine, and a package that isn't installed
IGNORED = ~modal.FilePatternMatcher(
    "*.py", "engine/*.py", "faces/*.py", "weights/face_detector.pth"
)  # what training uses

app = modal.App(NAME)
volume = modal.Volume.from_name(NAME, create_if_missing=True)
image = (
    modal.Image.debian_slim(python_version="3.12")
    .pip_install_from_requirements(str(REPO / "requirements.txt"))
    .add_local_dir(REPO, "/root", ignore=IGNORED)
)


@app.function(image=image, gpu=GPU, volumes={str(VOLUME_DIR): volume}, timeout=24 * 3600)
def train(data: str, run: str, gpus: int, flags: list[str]) -> int:
    """Runs train_emotion_cnn.py on the images in data/`data` of the volume, into runs/`run`; returns its exit code.

    Resumes if an earlier container has saved an epoch. What it prints is streamed, and every epoch is kept.
    """
    output_dir = VOLUME_DIR / "runs" / run
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"] if gpus > 1 else ["-u"]
    command = [sys.executable, *launch, str(REPO / "train_emotion_cnn.py"), *flags]
    command += ["--data-dir", str(VOLUME_DIR / "data" / data), "--output-dir", str(output_dir)]
    if (output_dir / FINAL_NAME).exists():
        command.append("--resume")
    output = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in output.stdout:
        print(line, end="", flush=True)
        if line.startswith("epoch ") and not modal.is_local():
            volume.commit()
    code = output.wait()
    if not modal.is_local():
        volume.commit()  # the report too, before the results are fetched
    return code


def upload(folder: Path | None, target: str) -> int:
    """Makes `target` on the volume hold the files of `folder` and no others; returns how many it added or removed.

    A file is uploaded again if its size differs or if it has changed since. Without `folder`, `target` is removed.
    """
    try:
        entries = [entry for entry in volume.listdir(target, recursive=True) if entry.type.name == "FILE"]
    except (FileNotFoundError, modal.exception.NotFoundError):
        entries = []
    there = {entry.path.strip("/"): entry for entry in entries}
    paths = [Path(root, name) for root, _, names in os.walk(folder) for name in names] if folder else []
    here = {posixpath.join(target, path.relative_to(folder).as_posix()): path for path in paths if path.is_file()}
    gone = there.keys() - here.keys()
    if gone and not folder:
        volume.remove_file(f"/{target}", recursive=True)
    else:
        for name in gone:
            volume.remove_file("/" + name)
    new = {name: path for name, path in here.items() if name not in there or has_changed(path, there[name])}
    if new:
        with volume.batch_upload(force=True) as batch:
            for name, path in new.items():
                batch.put_file(path, "/" + name)
    return len(gone) + len(new)


def has_changed(path: Path, entry) -> bool:
    info = path.stat()
    return info.st_size != entry.size or info.st_mtime >= entry.mtime


def download(source: str, folder: Path) -> list[str]:
    """Copies the files of `source` on the volume into `folder`; returns their names."""
    names = []
    for entry in volume.iterdir(source, recursive=False):
        if entry.type.name == "FILE":
            names.append(posixpath.basename(entry.path))
            content = b"".join(volume.read_file(entry.path))
            replace_file(folder / names[-1], lambda temporary, content=content: temporary.write_bytes(content))
    return names


@app.local_entrypoint()
def main(*arguments: str) -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--data-dir", metavar="DIR", default=".", help="holds train/, and val/ and test/ if there are any")
    add("--output-dir", metavar="DIR", default=".", help="for the results, at the end")
    add("--run", metavar="NAME", help="go on with an earlier run (default: a new one)")
    args, flags = parser.parse_known_args(arguments)
    try:
        for flag in flags:
            if flag.partition("=")[0] in NOT_THERE:
                raise InputError(f"{flag.partition('=')[0]} doesn't work there; train with it on your own machine")
        folders = find_splits(args.data_dir)
        if "train" not in folders:
            raise InputError(f"no folder {Path(args.data_dir, 'train')}: --data-dir must hold train/")
        output_dir = make_output_dir(args.output_dir)
        data, run = Path(args.data_dir).resolve().name, args.run or datetime.now().strftime("%Y%m%d-%H%M%S")
        count = sum(upload(folders.get(split), f"data/{data}/{split}") for split in ("train", "val", "test"))
        print(f"{count:,} images uploaded or removed; run {run} on {GPU}")
        code = train.remote(data, run, int(GPU.partition(":")[2] or 1), flags)
        if code == 0:
            print(f"In {output_dir.resolve()}: {', '.join(download(f'runs/{run}', output_dir))}")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    sys.exit(code)
