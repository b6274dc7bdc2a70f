"""The benchmarks run from end to end on little data. What they measure is for their readers, not for tests."""

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import draw_folder, open_portrait

from benchmarks import small_data, speedrun
from console import run_script
from faces.video import VideoCopy

REPO = Path(__file__).resolve().parent.parent


def run(*words):
    command = [sys.executable, "-m", f"benchmarks.{words[0]}", *map(str, words[1:])]
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300)


@pytest.fixture
def refuse(monkeypatch, capfd):
    """Runs a benchmark in this process, which must end with 2; returns what stands on standard output and error."""

    def run_refused(*words):
        monkeypatch.setattr(sys, "argv", [*map(str, words)])
        with pytest.raises(SystemExit) as stop:
            run_script(importlib.import_module(f"benchmarks.{words[0]}").main)
        out, err = capfd.readouterr()
        assert stop.value.code == 2 and "Traceback" not in err, err
        return out, err

    return run_refused


@pytest.fixture
def pictures(tmp_path):
    draw_folder(tmp_path / "train", {"happy": 24, "sad": 24})
    return tmp_path


def test_training_speed(pictures):
    options = ("--arch", "cnn4_bn", "--rounds", 1, "--seconds", 0.1, "--workers", 0)
    done = run("training_speed", "--data-dir", pictures, *options)
    assert (done.returncode, done.stderr) == (0, "")
    cells = [cell.strip(" `%") for cell in done.stdout.splitlines()[-1].strip("|").split("|")]
    assert cells[:3] == ["cnn4_bn", "48", "32"] and len(cells) == 11
    assert all(float(cell.replace(",", "").partition(" ")[0]) > 0 for cell in cells[3:9])


def test_prediction_speed(pictures):
    done = run("prediction_speed", "--data-dir", pictures, "--arch", "cnn4_bn", "--pictures", 70, "--rounds", 1)
    assert done.returncode == 0, done.stderr
    cells = [cell.strip(" `ms") for cell in done.stdout.splitlines()[3].strip("|").split("|")]
    assert cells[0] == "cnn4_bn" and float(cells[3]) < 1e-5
    assert "ratio" in done.stdout.splitlines()[-1]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory(pictures):
    done = run("memory", "--data-dir", pictures, "--epochs", 1, "--sizes", 48)
    assert done.returncode == 0, done.stderr
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == ["epoch 1/1", "48 pixels"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_a_video(tmp_path):
    copy = VideoCopy(tmp_path / "clip.mp4", 25.0, (320, 240))
    for _ in range(5):
        copy.add(open_portrait().resize((320, 240)))
    copy.close()
    done = run("memory", "--video", tmp_path / "clip.mp4")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 4 and all(int(line.split()[-2].replace(",", "")) > 10 for line in lines)


def test_precision(pictures):
    done = run("precision", "--data-dir", pictures, "--epochs", 1, "--seeds", 1)
    assert done.returncode == 0, done.stderr
    assert "bf16 - fp32" in done.stdout.splitlines()[-1]


FACES = {"angry": 30, "happy": 30, "neutral": 30, "sad": 30, "fear": 24, "surprise": 24}


@pytest.fixture
def faces(tmp_path):
    draw_folder(tmp_path / "train", FACES)
    draw_folder(tmp_path / "val", dict.fromkeys(FACES, 6))
    return tmp_path


def cells_of(line):
    return [cell.strip(" `") for cell in line.strip("|").split("|")]


def test_accuracy(faces, refuse):
    one = next((faces / "train" / "sad").iterdir())
    shutil.copy(one, faces / "val" / "sad" / "twin.png")
    words = ("--data-dir", faces, "--output-dir", faces / "out", "--arch", "cnn4_bn")
    done = run("accuracy", *words, "--seeds", 2, "--", "--epochs", 1)
    assert done.returncode == 0, done.stderr
    cells = cells_of(done.stdout.splitlines()[4])
    assert cells[:2] == ["cnn4_bn", "--epochs 1`, 1 epochs, 48 pixels, 2 seeds"]
    assert all(0 <= float(part) <= 100 for cell in cells[2:6] for part in cell.partition(" (")[0].split(" ± "))
    assert cells[6:9] == ["1.57 M", "34 M", "6.3 MB"]
    assert done.stdout.splitlines()[-1] == "37 pictures, 36 of them without a twin in train/"
    again = run("accuracy", *words, "--seeds", 2, "--", "--epochs", 1)  # from what stands there
    assert again.stdout == done.stdout and "is finished" in again.stderr
    assert "other options" in refuse("accuracy", *words)[1]  # the recipe: not what stands there
    (faces / "out" / "cnn4_bn-0" / "options.json").unlink()  # as after a run that train_emotion_cnn.py was started for
    assert "other options" in refuse("accuracy", *words)[1]


def test_speedrun(faces):
    words = ("--arch", "cnn4_bn", "--plain", "cnn4_bn", "--minutes", 0.001, "--workers", 0, "--", "--epochs", 1)
    done = run("speedrun", "--data-dir", faces, *words)
    assert done.returncode == 0, done.stderr
    rows = [cells_of(line) for line in done.stdout.splitlines()[4:]]
    assert [row[0] for row in rows] == ["cnn4_bn`, `--epochs 1", "cnn4_bn`, plain loop, recipe of 20 epochs"]
    assert all("not reached" in cell or float(cell) > 0 for row in rows for cell in row[1:])


def test_speedrun_tells_when_goals_are_passed():
    epochs = [(1.0, 0.5), (2.0, 0.61), (3.5, 0.6), (4.0, 0.66), (5.0, 0.7)]
    assert speedrun.until_goals(epochs, minutes=9) == epochs[:4]
    assert speedrun.until_goals(epochs, minutes=2.5) == epochs[:3]
    assert speedrun.format_row("a", epochs[:4]) == "| a | 2.0 | 4.0 |"
    assert speedrun.format_row("a", epochs[:3]) == "| a | 2.0 | not reached, best 61.0% in 4 minutes |"


def test_small_data(faces):
    happy, afraid = sorted((faces / "train" / "happy").iterdir()), sorted((faces / "train" / "fear").iterdir())
    shutil.copy(happy[0], faces / "val" / "happy" / "twin.png")  # in two splits
    shutil.copy(happy[1], afraid[0])  # under two labels
    words = ("--data-dir", faces, "--output-dir", faces / "out", "--arch", "cnn4_bn", "--counts", 10, "--seeds", 1)
    done = run("small_data", *words, "--epochs", 1, "--recipes", "cnn4_bn")
    assert done.returncode == 0, done.stderr
    tables = [cells_of(line) for line in done.stdout.splitlines()]
    assert [row[0] for row in tables if row[0].startswith("cnn") or row[0].isdigit()] == ["cnn4_bn", "10"]
    assert "last layer" in done.stderr  # whose classes are others
    small_data.make_sets(faces, faces / "out", [10], seeds=2)

    def contents(*parts):
        return [path.read_bytes() for part in parts for path in (faces / "out" / part).rglob("*.png")]

    apart = contents("four/train", "four/test", "others")
    assert len(apart) == len(set(apart)) == 4 * (30 + 6) + 2 * 24 - 1  # both twins are gone, one test picture is new
    few = contents("few_10_0/train", "few_10_1/train")
    assert len(few) == len(set(few)) == 80 and set(few) <= set(contents("four/train"))
    assert sorted(contents("few_10_0/test")) == sorted(contents("four/test"))


def test_faces(tmp_path):
    face = open_portrait().crop((175, 64, 275, 164)).resize((48, 48))
    (tmp_path / "train" / "happy").mkdir(parents=True)
    for number in range(2):
        face.save(tmp_path / "train" / "happy" / f"{number}.png")
    done = run("faces", "--data-dir", tmp_path, "--rounds", 1, "--checkpoint", REPO / "weights" / "emotion_model.pth")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("faces found in 2 of 2 pictures")
    assert abs(float(lines[0].rpartition("margin ")[2]) - 0.01) < 0.05  # the crop is about as wide as the box
    assert [float(cell.removesuffix(" ms")) > 0 for line in lines[4:] for cell in cells_of(line)[1:]] == [True] * 4


@pytest.mark.parametrize("name", ["accuracy", "speedrun", "small_data"])
def test_without_val_nothing_is_trained(pictures, refuse, name):
    out, err = refuse(name, "--data-dir", pictures)
    assert out == "" and len(err.splitlines()) == 1 and "val" in err


def test_a_mistake_found_in_one_of_the_processes_is_one_line(pictures):
    done = run("training_speed", "--data-dir", pictures, "--arch", "cnn4", "--workers", 0)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and "--batch-size" in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("training_speed", "--rounds", 0),
        ("prediction_speed", "--pictures", 0),
        ("memory", "--sizes", -5),
        ("precision", "--arch", "nope"),
        ("accuracy", "--arch", "nope"),
        ("speedrun", "--plain", "nope"),
        ("speedrun", "--plain", "cnn6_rgb"),
        ("small_data", "--counts", 0),
    ],
)
def test_a_wrong_flag_is_one_line_before_anything_is_measured(faces, refuse, words):
    out, err = refuse(*words, "--data-dir", faces)
    assert out == "" and len(err.splitlines()) == 1 and str(words[2]) in err


@pytest.mark.parametrize(
    "name", ["training_speed", "prediction_speed", "memory", "precision", "accuracy", "speedrun", "small_data", "faces"]
)
def test_a_missing_folder_is_one_line(name, refuse, tmp_path):
    _, err = refuse(name, "--data-dir", tmp_path / "nothing")
    assert "nothing" in err.splitlines()[-1]


def test_scaling():
    words = ("--arch", "cnn4_bn", "--batch-size", 16, "--steps", 2, "--step-ms", 8, "--bandwidth", 10)
    done = run("scaling", *words)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    one, two = (cells_of(line) for line in lines[4:6])
    assert one[0] == "1" and two[0] == "2" and float(one[2].replace(",", "")) > 0 and two[4] == "6.3 MB"
    assert lines[7].startswith("ESTIMATE, not measured: 8 ms a step of 16 pictures")
    first = cells_of(lines[10])  # 8 GPUs: 8 / 8 + 1 ms, and 2 * 7 / 8 of 6.29 MB at 10 GB/s
    assert first[:3] == ["8", "16", "3.10 ms"]
    assert "it stops paying beyond 4 GPUs" in done.stdout and "--batch-size 2048 --lr 0.008" in done.stdout


def test_scaling_mistakes(refuse):
    _, err = refuse("scaling", "--bandwidth", 0)
    assert err.count("\n") == 1 and "--bandwidth" in err
