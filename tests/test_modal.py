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
from conftest import draw_folder

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


def test_gpu_is_chosen_by_the_environment():
    code = "from examples import train_on_modal as example; print(example.train._spec_.gpus)"
    env = {**os.environ, "EMOTION_GPU": "H100:4"}
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["H100:4"], done.stderr


def test_function_trains_resumes_and_streams(example, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(example, "VOLUME_DIR", tmp_path)
    draw_folder(tmp_path / "data" / "faces" / "train", COUNTS)
    flags = ["--arch", "cnn4_bn", "--batch-size", "8", "--cache-dir", str(tmp_path / "cache")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a local call sees no volume
        assert example.train.local("faces", "one", 1, [*flags, "--epochs", "1"]) == 0
        assert "epoch 1/1" in capsys.readouterr().out
        assert example.train.local("faces", "one", 1, [*flags, "--epochs", "2"]) == 0
        out = capsys.readouterr().out
        assert "resumed after epoch 1" in out and "epoch 2/2" in out
        assert example.train.local("nowhere", "two", 1, flags) == 2
        assert "no folder" in capsys.readouterr().out
    run = tmp_path / "runs" / "one"
    assert read_checkpoint(run / FINAL_NAME)["epoch"] == 2
    assert json.loads((run / "metrics.json").read_text())["split"] == "val"


def test_the_image_gets_the_modules_and_nothing_else(example):
    kept = {path.name for path in REPO.iterdir() if path.is_file() and not example.IGNORED(Path(path.name))}
    assert kept == {path.name for path in REPO.glob("*.py")}
    assert example.IGNORED(Path("tests/test_modal.py")) and example.IGNORED(Path("train/happy/drawing.png"))


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
    assert example.upload(tmp_path / "no val", "data/faces/val") == 0
    assert example.upload(tmp_path / "no train", "data/faces/train") == 24 and not there.exists()
    run = tmp_path / "volume" / "runs" / "one"
    (run / "tensorboard").mkdir(parents=True)
    (run / "metrics.json").write_text("{}" * 20)
    assert example.download("runs/one", tmp_path) == ["metrics.json"]
    assert (tmp_path / "metrics.json").read_text() == "{}" * 20


def run_main(example, *args):
    with pytest.raises(SystemExit) as stop:
        example.main.info.raw_f(*map(str, args))
    return stop.value.code


def test_main_trains_there_and_brings_results_back(example, tmp_path, monkeypatch, capsys):
    """Two GPUs are two processes, which share the cores here."""
    monkeypatch.setattr(example, "volume", Folder(tmp_path / "volume"))
    monkeypatch.setattr(example, "VOLUME_DIR", tmp_path / "volume")
    monkeypatch.setattr(example, "GPU", "H100:2")
    local, calls = example.train.local, []

    def remote(data, run, gpus, flags):
        calls.append((data, gpus, flags))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a local call sees no volume
            return local(data, run, gpus, flags)

    monkeypatch.setattr(example, "train", SimpleNamespace(remote=remote))
    draw_folder(tmp_path / "faces" / "train", COUNTS)
    folders = ("--data-dir", tmp_path / "faces", "--output-dir", tmp_path / "out")
    flags = ["--epochs", "1", "--arch", "cnn4_bn", "--batch-size", "8", "--device", "cpu"]
    assert run_main(example, *folders, *flags) == 0
    assert calls == [("faces", 2, flags)]
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["split"] == "val"
    assert read_checkpoint(tmp_path / "out" / FINAL_NAME)["epoch"] == 1
    out = capsys.readouterr().out
    assert "24 pictures uploaded or removed" in out and "epoch 1/1" in out and "2 processes" in out
    assert run_main(example, "--data-dir", tmp_path / "nowhere") == 2
    assert "no folder" in capsys.readouterr().err
    assert run_main(example, *folders, f"--weights={tmp_path / 'best_emotion_model.pth'}") == 2
    assert "--weights" in capsys.readouterr().err and len(calls) == 1
