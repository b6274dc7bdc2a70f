"""examples/train_on_modal.py without an account: what it declares, and its function run here by Modal's `.local()`."""

import contextlib
import json
import os
import runpy
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import REPO, assert_refused, draw_folder, run

from checkpoints import FINAL_NAME, read_checkpoint

modal = pytest.importorskip("modal", reason="needs modal")
from examples import train_on_modal as example  # noqa: E402

COUNTS = {"angry": 6, "happy": 6}


def test_what_is_declared(monkeypatch):
    monkeypatch.setenv("EMOTION_GPU", "H100:4")
    assert runpy.run_path(example.__file__)["train"]._spec_.gpus == "H100:4" and example.train._spec_.gpus == "T4"
    assert list(map(str, example.train._spec_.volumes)) == ["/volume"]


def test_the_image_gets_what_training_imports_and_nothing_else(tmp_path):
    files = [path.relative_to(REPO) for depth in ("*", "*/*", "*/*/*") for path in REPO.glob(depth) if path.is_file()]
    kept = [file for file in files if not example.IGNORED(file)]
    assert {str(file.parent) for file in kept} == {".", "engine", "faces", "weights"}
    for file in kept:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(REPO / file, tmp_path / file)
    subprocess.run([sys.executable, "train_emotion_cnn.py", "--help"], cwd=tmp_path, check=True, timeout=120)


class Folder:
    """A folder that answers as a Modal volume does; a real one needs an account."""

    def __init__(self, root):
        self.root = root

    def iterdir(self, path, *, recursive):
        if not (self.root / path).exists():
            raise modal.exception.NotFoundError(path)
        for found in (self.root / path).glob("**/*" if recursive else "*"):
            kind, info = SimpleNamespace(name="FILE" if found.is_file() else "DIRECTORY"), found.stat()
            name = str(found.relative_to(self.root))
            yield SimpleNamespace(path=name, type=kind, size=info.st_size, mtime=int(info.st_mtime))

    listdir = iterdir

    def read_file(self, path):
        content = (self.root / path).read_bytes()
        yield from (content[:10], content[10:])

    def remove_file(self, path, recursive=False):
        path = self.root / path.strip("/")
        shutil.rmtree(path) if recursive else path.unlink()

    def batch_upload(self, force):
        return contextlib.nullcontext(self)

    def put_file(self, local, remote):
        target = self.root / remote.strip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(local, target)


@pytest.fixture
def volume(tmp_path, monkeypatch):
    volume = Folder(tmp_path / "volume")
    monkeypatch.setattr(example, "volume", volume)
    monkeypatch.setattr(example, "VOLUME_DIR", volume.root)
    return volume


def test_upload_and_removal(volume, tmp_path):
    source, there = draw_folder(tmp_path / "faces", COUNTS), volume.root / "data" / "train"
    for path in source.glob("*/*"):
        os.utime(path, (1, 1))
    assert [example.upload(source, "data/train") for _ in range(2)] == [12, 0]
    path = source / "happy" / "happy_000.png"
    path.write_bytes(bytes(path.stat().st_size))  # of the same size
    assert example.upload(source, "data/train") == 1
    path.write_bytes(b"changed")
    os.utime(path, (1, 1))
    (source / "happy" / "happy_001.png").rename(source / "angry" / "happy_001.png")
    assert example.upload(source, "data/train") == 3
    assert not (there / "happy" / "happy_001.png").exists() and len(list(there.glob("*/*"))) == 12
    assert (there / "happy" / "happy_000.png").read_bytes() == b"changed"
    assert example.upload(None, "data/val") == 0
    assert example.upload(None, "data/train") == 12 and not there.exists()


def main(words):
    example.main.info.raw_f(*words)  # modal run calls it so


@pytest.mark.filterwarnings("ignore")  # that a local call sees no volume
def test_main_trains_there_resumes_and_brings_results_back(volume, tmp_path, monkeypatch):
    """Two GPUs are two processes, which share the cores here."""
    local, calls = example.train.local, []
    remote = SimpleNamespace(remote=lambda *call: calls.append(call) or local(*call))
    monkeypatch.setattr(example, "train", remote)
    draw_folder(tmp_path / "faces" / "train", COUNTS)
    draw_folder(tmp_path / "faces" / "valid", {"happy": 2})
    (volume.root / "runs" / "one" / "a folder").mkdir(parents=True)  # is not downloaded
    folders = ("--data-dir", tmp_path / "faces", "--output-dir", tmp_path / "out", "--run", "one")
    flags = ["--arch", "cnn4_bn", "--batch-size", "8", "--device", "cpu"]
    for epochs, gpu, words in (
        ("1", "H100:2", ["14 images uploaded or removed; run one on H100:2", "2 processes", "epoch 1/1"]),
        ("2", "T4", ["; run one on T4", "resumed after epoch 1", "epoch 2/2"]),
    ):
        monkeypatch.setattr(example, "GPU", gpu)
        code, out, err = run(main, *folders, *flags, "--epochs", epochs)
        assert (code, err) == (0, "") and [word for word in words if word not in out] == []
        assert json.loads((tmp_path / "out" / "metrics.json").read_text())["split"] == "val"
        assert read_checkpoint(tmp_path / "out" / FINAL_NAME)["epoch"] == int(epochs)
    assert calls == [("faces", "one", 2, [*flags, "--epochs", "1"]), ("faces", "one", 1, [*flags, "--epochs", "2"])]
    assert (volume.root / "data" / "faces" / "val" / "happy").is_dir()
    monkeypatch.setattr(example, "train", SimpleNamespace(remote=lambda *call: 2))
    code, out, _ = run(main, *folders)
    assert code == 2 and "In " not in out
    monkeypatch.setattr(example, "train", None)  # so that nothing may be called there
    assert_refused(main, ["--data-dir", tmp_path / "nowhere"], "no folder")
    assert_refused(main, [*folders, "--weights=a.pth"], "--weights")
