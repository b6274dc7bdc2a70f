"""The benchmarks run from end to end on little data. What they measure is for their readers, not for tests."""

import importlib
import multiprocessing.dummy
import os
import shutil
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import draw_folder, open_portrait, run

import benchmarks
from benchmarks import prediction_speed, small_data, speedrun, training_speed
from console import run_script
from data import find_splits
from faces.video import VideoCopy

FACES = {"angry": 6, "happy": 6, "neutral": 6, "sad": 6, "fear": 4, "surprise": 4}
linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@pytest.fixture
def measure(capfd, monkeypatch):
    """Runs a benchmark; returns the lines of standard output, and standard error, of its processes too."""

    def call(*words, code=0):
        monkeypatch.setattr(sys, "argv", [*map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            run_script(importlib.import_module(f"benchmarks.{words[0]}").main)
        out, err = capfd.readouterr()
        assert stop.value.code == code, err
        return out.splitlines(), err

    return call


def run_script_here(command, **_):
    """subprocess.run of a Python script, or of `-c` and imports, in this process, where torch is imported already."""
    code, out, err = (0, "", "")
    if command[1] != "-c":
        code, out, err = run(importlib.import_module(Path(command[1]).stem).main, *command[2:])
    print(out, err, file=sys.stderr)
    return SimpleNamespace(returncode=code, stderr=err.encode())


def make_thread(target, args):
    """multiprocessing's Process as a thread, with a pipe of its own."""
    pipe, *others = args
    return threading.Thread(target=target, args=(Connection(os.dup(pipe.fileno())), *others), daemon=True)


@pytest.fixture
def in_this_process(monkeypatch):
    """What benchmarks start as processes runs here; test_accuracy, test_memory and test_speedrun have real ones."""
    for module in (benchmarks, prediction_speed):
        monkeypatch.setattr(module, "subprocess", SimpleNamespace(run=run_script_here, DEVNULL=None, PIPE=None))
    context = SimpleNamespace(Pool=multiprocessing.dummy.Pool, Pipe=multiprocessing.Pipe, Process=make_thread)
    for module in (training_speed, prediction_speed):
        monkeypatch.setattr(module, "multiprocessing", SimpleNamespace(get_context=lambda _: context))


def cells_of(line):
    return [cell.strip(" `") for cell in line.strip("|").split("|")]


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faces")
    draw_folder(folder / "train", FACES)
    draw_folder(folder / "valid", dict.fromkeys(FACES, 2))
    happy, afraid = (sorted((folder / "train" / name).iterdir()) for name in ("happy", "fear"))
    shutil.copy(happy[0], folder / "valid" / "happy" / "again.png")  # in two splits
    shutil.copy(happy[1], afraid[0])  # under two labels
    return folder


def test_training_speed(faces, measure, in_this_process, monkeypatch):
    monkeypatch.setattr(training_speed, "MATMUL", 64)
    words = ("training_speed", "--data-dir", faces, "--seconds", 0.01, "--rounds", 1, "--workers", 0, "--arch")
    lines, err = measure(*words, "cnn4_bn", "--batch-size", 8)
    head, _, row = (cells_of(line) for line in lines[-3:])
    assert err == "" and row[:3] == ["cnn4_bn", "48", "8"] and len(row) == len(head) == 11
    assert head[3:8] == ["baseline img/s (workers)", "ours img/s", "step img/s", "ours / baseline", "ours / step"]
    assert all(float(cell.replace(",", "").rstrip("%").partition(" ")[0]) > 0 for cell in row[3:8])
    assert "error: 32 images fill no batch of 500" in measure(*words, "cnn4", code=2)[1]  # found in a process


def test_prediction_speed(faces, measure, in_this_process):
    lines, _ = measure("prediction_speed", "--data-dir", faces, "--arch", "cnn4_bn", "--images", 9, "--rounds", 1)
    cells = cells_of(lines[3])
    assert cells[0] == "cnn4_bn" and float(cells[3]) < 1e-5 and "ratio" in lines[-1]


@linux_only
def test_memory(faces, measure):
    lines, _ = measure("memory", "--data-dir", faces, "--epochs", 1, "--sizes", 48)
    assert [line.partition(":")[0] for line in lines] == ["epoch 1/1", "48 pixels"]


@linux_only
def test_memory_of_a_video(tmp_path, measure):
    copy = VideoCopy(tmp_path / "clip.mp4", 25.0, (320, 240))
    copy.add(open_portrait().resize((320, 240)))
    copy.close()
    lines, _ = measure("memory", "--video", tmp_path / "clip.mp4")
    assert len(lines) == 4 and all(int(line.split()[-2].replace(",", "")) > 10 for line in lines)


def test_precision(faces, measure, in_this_process):
    lines, _ = measure("precision", "--data-dir", faces, "--epochs", 1, "--seeds", 1)
    assert [line.partition(":")[0] for line in lines[1:]] == ["bf16", "fp32", "bf16 - fp32"]


def test_accuracy(faces, tmp_path, measure, request):
    words = ("accuracy", "--data-dir", faces, "--output-dir", tmp_path, "--arch", "cnn4_bn")
    assert measure(*words, "--", "--epochs", 1)[0][-1] == "13 images, 12 of them without a duplicate in train/"
    request.getfixturevalue("in_this_process")
    lines, err = measure(*words, "--seeds", 2, "--", "--epochs", 1)
    assert "is finished" in err  # the first of the runs, which is in the folder
    cells = cells_of(lines[4])
    assert cells[:2] == ["cnn4_bn", "--epochs 1`, 1 epochs, 48 pixels, 2 seeds"]
    assert all(0 <= float(part) <= 100 for cell in cells[2:6] for part in cell.partition(" (")[0].split(" ± "))
    assert cells[6:9] == ["1.57 M", "34 M", "6.3 MB"]
    assert "other options" in measure(*words, code=2)[1]  # the recipe: not what is in the folder
    (tmp_path / "cnn4_bn-0" / "options.json").unlink()  # as after a run that train_emotion_cnn.py was started for
    assert "other options" in measure(*words, code=2)[1]


def test_speedrun(faces, measure, in_this_process):
    words = ("--arch", "cnn4_bn", "--baseline", "cnn4_bn", "--minutes", 0.001, "--workers", 0, "--", "--epochs", 1)
    rows = [cells_of(line) for line in measure("speedrun", "--data-dir", faces, *words)[0][4:]]
    assert [row[0] for row in rows] == ["cnn4_bn`, `--epochs 1", "cnn4_bn`, baseline loop, recipe of 20 epochs"]
    assert all("not reached" in cell or float(cell) >= 0 for row in rows for cell in row[1:])


def test_speedrun_tells_when_goals_are_passed():
    epochs = [(1.0, 0.5), (2.0, 0.61), (3.5, 0.6), (4.0, 0.66), (5.0, 0.7)]
    assert speedrun.until_goals(epochs, minutes=9) == epochs[:4]
    assert speedrun.until_goals(epochs, minutes=2.5) == epochs[:3]
    assert speedrun.format_row("a", epochs[:4]) == "| a | 2.0 | 4.0 |"
    assert speedrun.format_row("a", epochs[:3]) == "| a | 2.0 | not reached, best 61.0% in 4 minutes |"


def test_small_data(faces, tmp_path, measure, in_this_process):
    words = ("small_data", "--data-dir", faces, "--output-dir", tmp_path, "--arch", "cnn4_bn", "--epochs", 1)
    lines, err = measure(*words, "--counts", 3, "--seeds", 1, "--recipes", "cnn4_bn")
    assert [len(cells_of(line)) for line in lines] == [2, 2, 2, 1, 3, 3, 3]
    assert [cells_of(lines[row])[0] for row in (2, 6)] == ["cnn4_bn", "3"]
    assert "last layer" in err  # whose classes are others
    small_data.make_sets(find_splits(faces), tmp_path, [2], seeds=2)

    def contents(*parts):
        return [path.read_bytes() for part in parts for path in (tmp_path / part).rglob("*.png")]

    apart = contents("four/train", "four/test", "others")
    assert len(apart) == len(set(apart)) == 4 * (6 + 2) + 2 * 4 - 1  # both duplicates are gone, one test image is new
    few = contents("few_2_0/train", "few_2_1/train")
    assert len(few) == len(set(few)) == 16 and set(few) <= set(contents("four/train"))
    assert sorted(contents("few_2_0/test")) == sorted(contents("four/test"))


def test_faces(tmp_path, measure):
    (tmp_path / "train" / "happy").mkdir(parents=True)
    open_portrait().crop((175, 64, 275, 164)).resize((48, 48)).save(tmp_path / "train" / "happy" / "1.png")
    lines, _ = measure("faces", "--data-dir", tmp_path, "--rounds", 1)
    assert lines[0].startswith("faces found in 1 of 1 images")
    assert abs(float(lines[0].rpartition("margin ")[2]) - 0.01) < 0.05  # the crop is about as wide as the box
    assert [float(cell.removesuffix(" ms")) > 0 for line in lines[4:] for cell in cells_of(line)[1:]] == [True] * 4


def test_scaling(measure):
    words = ("--arch", "cnn4_bn", "--batch-size", 16, "--steps", 1, "--step-ms", 8, "--bandwidth", 10)
    lines, _ = measure("scaling", *words)
    one, two = (cells_of(line) for line in lines[4:6])
    assert one[0] == "1" and two[0] == "2" and float(one[2].replace(",", "")) > 0 and two[4] == "6.3 MB"
    assert lines[7].startswith("ESTIMATE, not measured: 8 ms per step of 16 images")
    # 8 GPUs: 8 / 8 + 1 ms, and 2 * 7 / 8 of 6.29 MB at 10 GB/s
    assert cells_of(lines[10])[:3] == ["8", "16", "3.10 ms"]
    assert "it stops paying beyond 4 GPUs" in lines[-2] and "--batch-size 2048 --lr 0.008" in lines[-1]


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        *[("", (name, "--arch", "nope")) for name in ("training_speed", "prediction_speed", "memory", "precision")],
        ("", ("speedrun", "--baseline", "nope")),
        ("", ("speedrun", "--baseline", "cnn6_rgb")),
        ("", ("small_data", "--counts", "400")),
        ("nothing", ("faces",)),
        ("no_val", ("accuracy",)),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_measured(folder, words, faces, measure):
    (faces / "no_val" / "train" / "happy").mkdir(parents=True, exist_ok=True)
    lines, err = measure(*words, "--data-dir", faces / folder, code=2)
    assert lines == [] and len(err.splitlines()) == 1 and (folder or words[-1]) in err
