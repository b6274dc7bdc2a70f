"""examples/train_on_modal.py without an account: what it declares, and its function run here by Modal's `.local()`."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import assert_refused, draw_folder, run

from checkpoints import FINAL_NAME, read_checkpoint

modal = pytest.importorskip("modal", reason="needs modal")
REPO = Path(__file__).resolve().parent.parent
COUNTS = {"angry": 12, "happy": 12}


@pytest.fixture
def example():
    from examples import train_on_modal

    return train_on_modal


def test_what_is_declared(example):
    assert isinstance(example.train, modal.Function) and example.app.name == "facial-emotions"
    declared = example.train._spec_
    assert declared.gpus == "T4"
    assert {str(path): kept.name for path, kept in declared.volumes.items()} == {"/volume": "facial-emotions"}
    code = "from examples import train_on_modal as example; print(example.train._spec_.gpus)"
    env = {**os.environ, "EMOTION_GPU": "H100:4"}
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["H100:4"], done.stderr


def test_the_image_gets_what_training_imports_and_nothing_else(example, tmp_path):
    files = [path.relative_to(REPO) for depth in ("*", "*/*", "*/*/*") for path in REPO.glob(depth) if path.is_file()]
    kept = [file for file in files if not example.IGNORED(file)]
    assert {str(file.parent) for file in kept} == {".", "engine"}
    for file in kept:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(REPO / file, tmp_path / file)
    command = [sys.executable, "train_emotion_cnn.py", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "--data-dir" in done.stdout, done.stderr


class Folder:
    """A folder that answers as a Modal volume does; a real one needs an account."""

    def __init__(self, root):
        self.root, self.put = root, []

    def iterdir(self, path, *, recursive=True):
        if not (self.root / path).exists():
            raise modal.exception.NotFoundError(path)
        for found in sorted((self.root / path).glob("**/*" if recursive else "*")):
            kind = SimpleNamespace(name="FILE" if found.is_file() else "DIRECTORY")
            info = found.stat()
            yield SimpleNamespace(
                path=str(found.relative_to(self.root)), type=kind, size=info.st_size, mtime=int(info.st_mtime)
            )

    def listdir(self, path, *, recursive=False):
        return list(self.iterdir(path, recursive=recursive))

    def read_file(self, path):
        yield from [(self.root / path).read_bytes()[:10], (self.root / path).read_bytes()[10:]]

    def remove_file(self, path, recursive=False):
        path = self.root / path.strip("/")
        shutil.rmtree(path) if recursive else path.unlink()

    def batch_upload(self, force=False):
        return contextlib.nullcontext(self)

    def put_file(self, local, remote):
        target = self.root / remote.strip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(Path(local).read_bytes())
        self.put.append(remote)


def test_upload_and_download(example, tmp_path, monkeypatch):
    folder = Folder(tmp_path / "volume")
    monkeypatch.setattr(example, "volume", folder)
    source = draw_folder(tmp_path / "faces", COUNTS)
    for path in source.glob("*/*"):
        os.utime(path, (1, 1))
    assert example.upload(source, "data/faces/train") == 24
    assert example.upload(source, "data/faces/train") == 0
    path = source / "happy" / "happy_000.png"
    path.write_bytes(bytes(path.stat().st_size))  # of the same size
    assert example.upload(source, "data/faces/train") == 1
    assert folder.put[-1] == "/data/faces/train/happy/happy_000.png"
    path.write_bytes(b"changed")
    os.rename(source / "happy" / "happy_001.png", source / "angry" / "happy_001.png")
    assert example.upload(source, "data/faces/train") == 3
    assert not (tmp_path / "volume" / "data" / "faces" / "train" / "happy" / "happy_001.png").exists()
    there = tmp_path / "volume" / "data" / "faces" / "train"
    assert (there / "happy" / "happy_000.png").read_bytes() == b"changed" and len(list(there.glob("*/*"))) == 24
    assert example.upload(None, "data/faces/val") == 0
    assert example.upload(None, "data/faces/train") == 24 and not there.exists()
    run = tmp_path / "volume" / "runs" / "one"
    (run / "tensorboard").mkdir(parents=True)
    (run / "metrics.json").write_text("{}" * 20)
    assert example.download("runs/one", tmp_path) == ["metrics.json"]
    assert (tmp_path / "metrics.json").read_text() == "{}" * 20


def test_main_trains_there_resumes_and_brings_results_back(example, tmp_path, monkeypatch):
    """Two GPUs are two processes, which share the cores here."""
    monkeypatch.setattr(example, "volume", Folder(tmp_path / "volume"))
    monkeypatch.setattr(example, "VOLUME_DIR", tmp_path / "volume")
    local, calls = example.train.local, []

    def remote(data, name, gpus, flags):
        calls.append((data, name, gpus, flags))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a local call sees no volume
            return local(data, name, gpus, flags)

    def main(words):
        example.main.info.raw_f(*words)  # modal run calls it so

    monkeypatch.setattr(example, "train", SimpleNamespace(remote=remote))
    draw_folder(tmp_path / "faces" / "train", COUNTS)
    draw_folder(tmp_path / "faces" / "valid", {"happy": 2})
    folders = ("--data-dir", tmp_path / "faces", "--output-dir", tmp_path / "out", "--run", "one")
    flags = ["--arch", "cnn4_bn", "--batch-size", "8", "--device", "cpu"]
    for epochs, gpu, words in (
        ("1", "H100:2", ["26 images uploaded or removed; run one on H100:2", "2 processes", "epoch 1/1"]),
        ("2", "T4", ["; run one on T4", "resumed after epoch 1", "epoch 2/2"]),
    ):
        monkeypatch.setattr(example, "GPU", gpu)
        code, out, err = run(main, *folders, *flags, "--epochs", epochs)
        assert (code, err) == (0, "") and [word for word in words if word not in out] == []
        assert json.loads((tmp_path / "out" / "metrics.json").read_text())["split"] == "val"
        assert read_checkpoint(tmp_path / "out" / FINAL_NAME)["epoch"] == int(epochs)
    assert calls == [("faces", "one", 2, [*flags, "--epochs", "1"]), ("faces", "one", 1, [*flags, "--epochs", "2"])]
    assert (tmp_path / "volume" / "data" / "faces" / "val" / "happy").is_dir()
    assert remote("nowhere", "two", 1, flags) == 2
    for args, word in (
        (["--data-dir", tmp_path / "nowhere"], "no folder"),
        ([*folders, "--weights=a.pth"], "--weights"),
    ):
        assert_refused(main, args, word)
    assert len(calls) == 3
