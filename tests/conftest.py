"""What several test files share. Tests draw their own pictures, and none touches the user's cache."""

import contextlib
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

PORTRAIT = Path(__file__).resolve().parent.parent / "examples" / "astronaut.jpg"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, and threads would stand in each other's way


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """A cache folder of its own for every test and for the processes that it starts."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "emotion_cnn"


def free_port():
    """A port that nothing listens on, and that the system gives to nobody who asks for any: those lie higher."""
    while True:
        with socket.socket() as server, contextlib.suppress(OSError):
            port = random.randrange(20_000, 32_000)
            server.bind(("127.0.0.1", port))
            return port


def draw_picture(seed, size=48, mode="L"):
    """A PIL picture of coarse noise, another for every seed; colour really differs by channel."""
    rng, side = np.random.default_rng(seed), max(2, size // 4)
    image = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
    return image.convert(mode).resize((size, size), Image.Resampling.NEAREST)


def open_portrait():
    """The photo of a real face that comes along, 512 x 512 pixels."""
    return Image.open(PORTRAIT).convert("RGB")


def open_faceless():
    """A photo without a face: what is below it in the portrait."""
    return open_portrait().crop((0, 200, 512, 512))


def interrupt(main, args, function, call=1):
    """Runs a script's main; Ctrl-C is pressed where it enters `function` for the `call`th time."""
    from console import run_script  # not above, where torch would come before OMP_NUM_THREADS

    calls = 0

    def press(frame, event, _):
        nonlocal calls
        calls += event == "call" and frame.f_code.co_name == function
        if calls == call:
            sys.setprofile(None)
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.setprofile(press)
    try:
        with pytest.raises(SystemExit) as stop:
            run_script(lambda: main([str(arg) for arg in args]))
    finally:
        sys.setprofile(None)
        signal.signal(signal.SIGINT, before)
    assert stop.value.code == 130


def draw_folder(root, counts, size=48, mode="L", ending=".png"):
    """Draws {class name: count} distinct pictures into class folders under `root`; returns `root` as a Path."""
    root = Path(root)
    for class_name, count in counts.items():
        (root / class_name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            seed = [zlib.crc32(f"{root.name}/{class_name}".encode()), number]  # train/ and test/ differ
            draw_picture(seed, size, mode).save(root / class_name / f"{class_name}_{number:03}{ending}")
    return root


def run_as_user(code):
    """Output of Python `code` in a folder of its own; after its become_user() permissions bind it, also as root.

    It imports what it needs first, since the interpreter's own files may be out of an ordinary user's reach.
    """
    if os.name != "posix":
        pytest.skip("needs POSIX permissions")
    become_user = """
        import os

        def become_user():
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
    """
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent), "XDG_CACHE_HOME": folder}
        command = [sys.executable, "-c", textwrap.dedent(become_user) + textwrap.dedent(code)]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout
