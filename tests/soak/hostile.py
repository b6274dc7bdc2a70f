"""Mutates a checkpoint and loads it: types, sizes, NaN, nesting, bytes of the pickle.

    python -m tests.soak.hostile --files 700        # about 6 minutes on two cores

Every value of a final checkpoint, however deep, may be replaced by something odd, be removed or be joined by more of
its kind; or bytes of the file are changed, or the whole is compressed. Each file is opened as prediction, --info,
--weights and --resume open it, in a process whose memory is limited. It must end in an answer or in one line.
"""

import argparse
import contextlib
import io
import random
import tempfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch

import predict_emotion
import train_emotion_cnn
from checkpoints import FINAL_NAME
from errors import InputError
from inference import load_model, predict_image
from tests.conftest import draw_folder, draw_image, run

FLAGS = "--arch cnn4_bn --batch-size 16 --device cpu --ema 0.9 --schedule onecycle --optimizer muon"
ROOM = 2**30  # bytes of memory that loading may take
LARGE = [10**400, -(10**400), 2**63, 10**9, 1e308, 1e-308, -1.0, 0, float("nan"), float("inf")]
ODD = [None, True, "", "x" * 10_000, "\x1b[2J\n", b"bytes", (), [], {}, {1: 2}, [[]], {"a": {"b": [1]}}, set(), 1 + 2j]
SHARED = [[]]
for _ in range(40):  # as a tree 2**40 lists
    SHARED = [SHARED, SHARED]
TENSORS = [
    torch.zeros(()),
    torch.full((3,), float("nan")),
    torch.zeros(1).expand(10**9),
    torch.arange(5),
    torch.zeros(0),
]


def paths_in(value, path=()) -> list[tuple]:
    """The keys that lead to every part of nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [inner for key, part in items for inner in paths_in(part, (*path, key))]


def mutate(value, path: tuple, rng: random.Random):
    """A copy of `value` in which the part at `path` is another, twice there, or gone."""
    key, *rest = path
    copy = value.copy()
    if rest:
        copy[key] = mutate(value[key], tuple(rest), rng)
    elif rng.random() < 0.15:
        del copy[key]
    elif isinstance(value[key], torch.Tensor) and rng.random() < 0.5:
        copy[key] = rng.choice(
            [value[key][None], value[key].double() * 1e300, -value[key].float(), value[key].flatten()]
        )
    elif isinstance(value[key], list | dict) and rng.random() < 0.3:
        copy[key] = value[key] * 1000 if isinstance(value[key], list) else value[key] | {"more": rng.choice(ODD)}
    else:
        copy[key] = rng.choice([*LARGE, *ODD, *TENSORS, SHARED])
    return copy


def damage(content: bytes, rng: random.Random) -> bytes:
    """Bytes of the pickle are changed, in an archive whose checksums are right again; or all is compressed."""
    target, method = io.BytesIO(), rng.choice([zipfile.ZIP_STORED] * 4 + [zipfile.ZIP_DEFLATED])
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(target, "w", method) as archive:
        for name in source.namelist():
            part = bytearray(source.read(name))
            for _ in range(rng.choice((1, 1, 3, 10)) if name.endswith("data.pkl") else 0):
                part[rng.randrange(len(part))] = rng.randrange(256)
            archive.writestr(name, bytes(part))
    return target.getvalue()


def open_all(path: Path, root: Path) -> str:
    """ "read" if prediction takes the file, else "refused"; a crash of any user of the file is an AssertionError."""
    image, places = np.asarray(draw_image(1)), ["--data-dir", root / "data", "--cache-dir", root / "cache"]
    commands = {
        "--info": (predict_emotion.main, ["--checkpoint", path, "--info"]),
        "--weights": (train_emotion_cnn.main, [*places, *FLAGS.split(), "--output-dir", root / "w", "--weights", path]),
        "--resume": (train_emotion_cnn.main, [*places, "--resume", path, "--output-dir", path.parent]),
    }
    for name, (main, words) in commands.items():
        code, _, err = run(main, *words, *(["--epochs", 1] if name == "--weights" else []))
        is_line = err.startswith("error: ") and err[:-1].isprintable()
        assert code == 0 or (code == 2 and is_line), f"{name} {path}: {err[-2000:]}"
    try:
        model, names = load_model(path)
        _, confidence, all_probs = predict_image(model, image, names)
        assert 0 <= confidence <= 100 and abs(sum(all_probs.values()) - 100) < 0.01, f"{path}: {all_probs}"
    except InputError as error:
        assert str(error).isprintable()
        return "refused"
    return "read"


def soak(files: int, root: Path) -> Counter:
    """Makes that many files; returns how many of each kind were read and refused."""
    rng, found = random.Random(0), Counter()
    draw_folder(root / "data" / "train", {"angry": 12, "happy": 12})
    places = ["--data-dir", root / "data", "--cache-dir", root / "cache", "--output-dir", root / "out"]
    assert run(train_emotion_cnn.main, *places, *FLAGS.split(), "--epochs", 1)[0] == 0
    path = root / "out" / FINAL_NAME
    content = path.read_bytes()
    checkpoint = torch.load(path, weights_only=True)
    parts = [path for path in paths_in(checkpoint) if path != ("config", "epochs")]  # a number of them could take years
    paths = {key: [path for path in parts if path[0] == key] for key in checkpoint}
    for number in range(files):
        kind = ("value", "value", "bytes")[number % 3]
        if kind == "value":
            torch.save(mutate(checkpoint, rng.choice(paths[rng.choice([*paths])]), rng), path)
        else:
            path.write_bytes(damage(content, rng))
        found[kind, open_all(path, root)] += 1
    return found


@contextlib.contextmanager
def limited_memory(room: int):
    """Inside, this process can have no more than `room` bytes of address space above what it has."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--files", type=int, default=700, help="(default: 700)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, limited_memory(ROOM):
        found = soak(args.files, Path(folder))
    for (kind, outcome), number in sorted(found.items()):
        print(f"{kind:5} {outcome:8} {number:,}")
    print(f"{args.files:,} files: every one was an answer or one line")


if __name__ == "__main__":
    main()
