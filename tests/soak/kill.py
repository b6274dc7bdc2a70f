"""Kills a training process again and again, and looks at what is left.

    python -m tests.soak.kill --kills 50            # about 5 minutes on two cores

Every life of the run is ended with SIGKILL after its first epoch, every second one while a temporary file is being
written. After each, best and final checkpoint must load; and the run that was killed and resumed ten times must end
with the weights, history, best score and optimizer state of one that never stopped, bit for bit.
"""

import argparse
import os
import random
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import train_emotion_cnn
from checkpoints import BEST_NAME, FINAL_NAME, build_model, read_checkpoint
from tests.conftest import differing, draw_folder, run, start

LIVES, EPOCHS = 10, 45  # of one run
FLAGS = "--arch cnn4_bn --batch-size 16 --augment light --ema 0.9 --schedule onecycle --class-weights balanced"


def command(root: Path, out: str, *more: str) -> list:
    places = ["--data-dir", root / "data", "--cache-dir", root / "cache", "--output-dir", root / out]
    return [*places, *FLAGS.split(), "--epochs", EPOCHS, *more]


def is_writing(folder: Path, pid: int) -> bool:
    """Whether `folder` holds a temporary file of that process; those of processes killed before stay."""
    return any(f".{pid}." in name for name in os.listdir(folder))


def kill(process: subprocess.Popen, folder: Path, rng: random.Random, *, while_writing: bool) -> tuple[bool, bool]:
    """Kills `process` after an epoch; returns whether it was still alive, and whether a temporary file was left."""
    any(line.startswith("epoch ") for line in process.stdout)
    end = time.monotonic() + rng.uniform(0, 1)
    while (time.monotonic() < end or while_writing) and process.poll() is None:
        if while_writing and is_writing(folder, process.pid):
            process.send_signal(signal.SIGSTOP)  # or the file may be in its place before the signal that kills arrives
            if is_writing(folder, process.pid):
                break
            process.send_signal(signal.SIGCONT)
        if not while_writing:
            time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL, is_writing(folder, process.pid)


def soak(kills: int, root: Path, lives: int = LIVES) -> tuple[int, int]:
    """Kills that many times; returns how many left a temporary file, and how many runs were compared."""
    rng, done, writing, runs = random.Random(0), 0, 0, 0
    draw_folder(root / "data" / "train", {"angry": 60, "happy": 50, "sad": 40})
    assert run(train_emotion_cnn.main, *command(root, "whole"))[0] == 0
    while done < kills:
        out, resume = f"killed{runs}", ()
        for _ in range(min(lives, kills - done)):
            process = start(train_emotion_cnn.main, *command(root, out, *resume))
            was_alive, left = kill(process, root / out, rng, while_writing=done % 2 == 1)
            for name in (BEST_NAME, FINAL_NAME):
                build_model(read_checkpoint(root / out / name))
            resume = ("--resume",)
            if not was_alive:
                break
            done, writing = done + 1, writing + left
        assert run(train_emotion_cnn.main, *command(root, out, *resume))[0] == 0
        for name in (BEST_NAME, FINAL_NAME):
            assert differing(root / out / name, root / "whole" / name) == set(), f"{name} differs"
        runs += 1
    return writing, runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="(default: 50)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        writing, runs = soak(args.kills, Path(folder))
    if writing < 0.3 * args.kills:
        raise SystemExit(f"only {writing} of {args.kills} kills came while a file was being written: run it again")
    print(f"{args.kills} kills, {writing} of them while a file was being written: every checkpoint loads, and")
    print(f"{runs} runs ended as one that never stopped")


if __name__ == "__main__":
    main()
