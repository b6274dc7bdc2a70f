"""What several test files share. Tests draw their own images, and none touches the user's cache."""

import contextlib
import functools
import inspect
import io
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from errors import InputError  # the other modules of ours are imported later: they import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for torch: tests run side by side and would slow each other down
signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C ends what tests start, whatever started the tests
REPO = Path(__file__).resolve().parent.parent
PORTRAIT = REPO / "examples" / "astronaut.jpg"
COUNTS = {"angry": 16, "happy": 14, "sad": 10}
SMALL = ["--arch", "cnn4_bn", "--batch-size", "16"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """A cache folder of its own for every test and for the processes that it starts."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "emotion_cnn"


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder for reading: train/, test/, the cache of their images, and out/, what one epoch of training wrote."""
    import train_emotion_cnn

    folder = tmp_path_factory.mktemp("trained")
    draw_folder(folder / "train", COUNTS)
    draw_folder(folder / "test", dict.fromkeys(COUNTS, 5))
    places = ["--data-dir", folder, "--cache-dir", folder / "cache", "--output-dir", folder / "out"]
    code, _, err = run(train_emotion_cnn.main, *places, *SMALL, "--epochs", 1)
    assert code == 0, err
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A checkpoint of an untrained model of three classes."""
    from test_predict import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("untrained") / "model.pth")


def free_port():
    """A port that nothing listens on, and that the system gives to nobody who asks for any: those lie higher."""
    while True:
        with socket.socket() as server, contextlib.suppress(OSError):
            port = random.randrange(20_000, 32_000)
            server.bind(("127.0.0.1", port))
            return port


def draw_image(seed, size=48, mode="L"):
    """A PIL image of coarse noise, another for every seed; color really differs by channel."""
    rng, side = np.random.default_rng(seed), max(2, size // 4)
    image = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
    return image.convert(mode).resize((size, size), Image.Resampling.NEAREST)


def refusal(function, *args, **options):
    """The message of the InputError that a call raises, which is one line."""
    with pytest.raises(InputError) as caught:
        function(*args, **options)
    assert str(caught.value).isprintable()
    return str(caught.value)


def differing(left, right):
    """The keys of two checkpoints, given or in files, whose values differ by so much as a bit; times may."""
    import torch

    def same(one, other):
        if isinstance(one, dict) and isinstance(other, dict):
            return not differing(one, other)
        if isinstance(one, list | tuple) and isinstance(other, list | tuple):
            return len(one) == len(other) and all(map(same, one, other))
        if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
            return one.dtype == other.dtype and torch.equal(one, other)
        return one == other

    load = functools.partial(torch.load, map_location="cpu", weights_only=True)
    left, right = (part if isinstance(part, dict) else load(part) for part in (left, right))
    keys = (left.keys() | right.keys()) - {"images_per_s", "seconds"}
    return {key for key in keys if key not in left or key not in right or not same(left[key], right[key])}


def open_portrait():
    """A photo of a real face, 512 x 512 pixels."""
    return Image.open(PORTRAIT).convert("RGB")


def open_faceless():
    """A photo without a face: what is below it in the portrait."""
    return open_portrait().crop((0, 200, 512, 512))


def run(main, *args):
    """Runs a script's main as the script does; returns (exit code, standard output, standard error)."""
    from console import run_script

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stop:
        run_script(lambda: main([str(arg) for arg in args]))
    return stop.value.code or 0, out.getvalue(), err.getvalue()


def start(main, *args, ulimit="", **options):
    """The script of `main` in a process that Ctrl-C reaches; `ulimit` is the shell's."""
    command = [sys.executable, "-u", sys.modules[main.__module__].__file__, *map(str, args)]
    if ulimit:
        command = ["bash", "-c", f'ulimit {ulimit}; exec "$@"', "bash", *command]
    options |= {"env": {**os.environ, "PYTHONIOENCODING": "utf-8"}, "encoding": "utf-8"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def run_process(main, *args, **options):
    process = start(main, *args, **options)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def assert_refused(main, args, *words, run=run):
    """Asserts that a script ends with exit code 2 and one line on standard error, which holds all of `words`."""
    code, _, err = run(main, *args)
    assert code == 2, err
    assert err.startswith("error: ") and err.endswith("\n") and err[:-1].isprintable(), err
    assert [word for word in map(str, words) if word not in err] == [], err


def interrupt(main, args, function, call=1):
    """The standard error of a script's main; Ctrl-C is pressed where it enters `function` for the `call`th time."""
    calls = 0

    def press(frame, event, _):
        nonlocal calls
        calls += event == "call" and frame.f_code.co_name == function
        if calls == call:
            sys.setprofile(None)
            signal.raise_signal(signal.SIGINT)

    sys.setprofile(press)
    try:
        code, _, err = run(main, *args)
    finally:
        sys.setprofile(None)
    assert code == 130, err
    return err


@contextlib.contextmanager
def full_disk(size):
    """Inside, this process can write no file of more than `size` bytes."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def draw_folder(root, counts, size=48, ending=".png"):
    """Draws {class name: count} distinct images into class folders under `root`; returns `root` as a Path."""
    root = Path(root)
    for class_name, count in counts.items():
        (root / class_name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            seed = [zlib.crc32(f"{root.name}/{class_name}".encode()), number]  # train/ and test/ differ
            draw_image(seed, size).save(root / class_name / f"{class_name}_{number:03}{ending}")
    return root


def become_user():
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)


def run_as_user(code):
    """Output of Python `code` in a folder of its own; after its become_user() permissions bind it, also as root."""
    if os.name != "posix":
        pytest.skip("needs POSIX permissions")
    code = f"import os\n{inspect.getsource(become_user)}{textwrap.dedent(code)}"
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        options = {"cwd": folder, "env": {**os.environ, "PYTHONPATH": str(REPO), "XDG_CACHE_HOME": folder}}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout
