"""The benchmarks run from end to end on little data. What they measure is for their readers, not for tests."""

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import draw_folder, open_portrait, run

from benchmarks import small_data, speedrun
from data import find_splits
from faces.video import VideoCopy

REPO = Path(__file__).resolve().parent.parent
FACES = {"angry": 30, "happy": 30, "neutral": 30, "sad": 30, "fear": 24, "surprise": 24}
linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def measure(*words, code=0):
    """Runs a benchmark in a process of its own; returns the lines of standard output, and standard error."""
    command = [sys.executable, "-m", f"benchmarks.{words[0]}", *map(str, words[1:])]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    return done.stdout.splitlines(), done.stderr


def refuse(*words):
    """Runs a benchmark in this process, which must end with 2; returns standard output and the lines of error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*map(str, words)])
        code, out, err = run(lambda _: importlib.import_module(f"benchmarks.{words[0]}").main())
    assert code == 2, err
    return out, err.splitlines()


def cells_of(line):
    return [cell.strip(" `") for cell in line.strip("|").split("|")]


@pytest.fixture
def images(tmp_path):
    draw_folder(tmp_path / "train", {"happy": 24, "sad": 24})
    return tmp_path


@pytest.fixture
def faces(tmp_path):
    draw_folder(tmp_path / "train", FACES)
    draw_folder(tmp_path / "valid", dict.fromkeys(FACES, 6))
    return tmp_path


def test_training_speed(images):
    words = ("--arch", "cnn4_bn", "--rounds", 1, "--seconds", 0.1, "--workers", 0)
    lines, err = measure("training_speed", "--data-dir", images, *words)
    head, _, row = (cells_of(line) for line in lines[-3:])
    assert err == "" and row[:3] == ["cnn4_bn", "48", "32"] and len(row) == len(head) == 11
    assert head[3:8] == ["baseline img/s (workers)", "ours img/s", "step img/s", "ours / baseline", "ours / step"]
    assert all(float(cell.replace(",", "").rstrip("%").partition(" ")[0]) > 0 for cell in row[3:10])


def test_a_mistake_found_in_one_of_the_processes_is_one_line(images):
    assert (
        "--batch-size" in measure("training_speed", "--data-dir", images, "--arch", "cnn4", "--workers", 0, code=2)[1]
    )


def test_prediction_speed(images):
    lines, _ = measure("prediction_speed", "--data-dir", images, "--arch", "cnn4_bn", "--images", 70, "--rounds", 1)
    cells = cells_of(lines[3])
    assert cells[0] == "cnn4_bn" and float(cells[3]) < 1e-5 and "ratio" in lines[-1]


@linux_only
def test_memory(images):
    lines, _ = measure("memory", "--data-dir", images, "--epochs", 1, "--sizes", 48)
    assert [line.partition(":")[0] for line in lines] == ["epoch 1/1", "48 pixels"]


@linux_only
def test_memory_of_a_video(tmp_path):
    copy = VideoCopy(tmp_path / "clip.mp4", 25.0, (320, 240))
    for _ in range(5):
        copy.add(open_portrait().resize((320, 240)))
    copy.close()
    lines, _ = measure("memory", "--video", tmp_path / "clip.mp4")
    assert len(lines) == 4 and all(int(line.split()[-2].replace(",", "")) > 10 for line in lines)


def test_precision(images):
    assert "bf16 - fp32" in measure("precision", "--data-dir", images, "--epochs", 1, "--seeds", 1)[0][-1]


def test_accuracy(faces):
    shutil.copy(next((faces / "train" / "sad").iterdir()), faces / "valid" / "sad" / "again.png")
    words = ("accuracy", "--data-dir", faces, "--output-dir", faces / "out", "--arch", "cnn4_bn")
    lines, _ = measure(*words, "--seeds", 2, "--", "--epochs", 1)
    cells = cells_of(lines[4])
    assert cells[:2] == ["cnn4_bn", "--epochs 1`, 1 epochs, 48 pixels, 2 seeds"]
    assert all(0 <= float(part) <= 100 for cell in cells[2:6] for part in cell.partition(" (")[0].split(" ± "))
    assert cells[6:9] == ["1.57 M", "34 M", "6.3 MB"]
    assert lines[-1] == "37 images, 36 of them without a duplicate in train/"
    assert "is finished" in measure(*words, "--", "--epochs", 1)[1]  # from what is in the folder
    assert "other options" in refuse(*words)[1][0]  # the recipe: not what is in the folder
    (faces / "out" / "cnn4_bn-0" / "options.json").unlink()  # as after a run that train_emotion_cnn.py was started for
    assert "other options" in refuse(*words)[1][0]


def test_speedrun(faces):
    words = ("--arch", "cnn4_bn", "--baseline", "cnn4_bn", "--minutes", 0.001, "--workers", 0, "--", "--epochs", 1)
    rows = [cells_of(line) for line in measure("speedrun", "--data-dir", faces, *words)[0][4:]]
    assert [row[0] for row in rows] == ["cnn4_bn`, `--epochs 1", "cnn4_bn`, baseline loop, recipe of 20 epochs"]
    assert all("not reached" in cell or float(cell) > 0 for row in rows for cell in row[1:])


def test_speedrun_tells_when_goals_are_passed():
    epochs = [(1.0, 0.5), (2.0, 0.61), (3.5, 0.6), (4.0, 0.66), (5.0, 0.7)]
    assert speedrun.until_goals(epochs, minutes=9) == epochs[:4]
    assert speedrun.until_goals(epochs, minutes=2.5) == epochs[:3]
    assert speedrun.format_row("a", epochs[:4]) == "| a | 2.0 | 4.0 |"
    assert speedrun.format_row("a", epochs[:3]) == "| a | 2.0 | not reached, best 61.0% in 4 minutes |"


def test_small_data(faces):
    happy, afraid = (sorted((faces / "train" / name).iterdir()) for name in ("happy", "fear"))
    shutil.copy(happy[0], faces / "valid" / "happy" / "again.png")  # in two splits
    shutil.copy(happy[1], afraid[0])  # under two labels
    words = ("--data-dir", faces, "--output-dir", faces / "out", "--arch", "cnn4_bn", "--counts", 10, "--seeds", 1)
    lines, err = measure("small_data", *words, "--epochs", 1, "--recipes", "cnn4_bn")
    rows = [cells_of(line)[0] for line in lines]
    assert [row for row in rows if row.startswith("cnn") or row.isdigit()] == ["cnn4_bn", "10"]
    assert "last layer" in err  # whose classes are others
    small_data.make_sets(find_splits(faces), faces / "out", [10], seeds=2)

    def contents(*parts):
        return [path.read_bytes() for part in parts for path in (faces / "out" / part).rglob("*.png")]

    apart = contents("four/train", "four/test", "others")
    assert len(apart) == len(set(apart)) == 4 * (30 + 6) + 2 * 24 - 1  # both duplicates are gone, one test image is new
    few = contents("few_10_0/train", "few_10_1/train")
    assert len(few) == len(set(few)) == 80 and set(few) <= set(contents("four/train"))
    assert sorted(contents("few_10_0/test")) == sorted(contents("four/test"))


def test_faces(tmp_path):
    face = open_portrait().crop((175, 64, 275, 164)).resize((48, 48))
    (tmp_path / "train" / "happy").mkdir(parents=True)
    for number in range(2):
        face.save(tmp_path / "train" / "happy" / f"{number}.png")
    lines, _ = measure("faces", "--data-dir", tmp_path, "--rounds", 1)
    assert lines[0].startswith("faces found in 2 of 2 images")
    assert abs(float(lines[0].rpartition("margin ")[2]) - 0.01) < 0.05  # the crop is about as wide as the box
    assert [float(cell.removesuffix(" ms")) > 0 for line in lines[4:] for cell in cells_of(line)[1:]] == [True] * 4


def test_scaling():
    words = ("--arch", "cnn4_bn", "--batch-size", 16, "--steps", 2, "--step-ms", 8, "--bandwidth", 10)
    lines, _ = measure("scaling", *words)
    one, two = (cells_of(line) for line in lines[4:6])
    assert one[0] == "1" and two[0] == "2" and float(one[2].replace(",", "")) > 0 and two[4] == "6.3 MB"
    assert lines[7].startswith("ESTIMATE, not measured: 8 ms per step of 16 images")
    # 8 GPUs: 8 / 8 + 1 ms, and 2 * 7 / 8 of 6.29 MB at 10 GB/s
    assert cells_of(lines[10])[:3] == ["8", "16", "3.10 ms"]
    assert "it stops paying beyond 4 GPUs" in lines[-2] and "--batch-size 2048 --lr 0.008" in lines[-1]


@pytest.mark.parametrize(
    "words",
    [
        ("training_speed", "--rounds", 0),
        ("prediction_speed", "--images", 0),
        ("memory", "--sizes", -5),
        ("precision", "--arch", "nope"),
        ("accuracy", "--arch", "nope"),
        ("speedrun", "--baseline", "nope"),
        ("speedrun", "--baseline", "cnn6_rgb"),
        ("small_data", "--counts", 400),
        ("scaling", "--bandwidth", 0),
    ],
)
def test_a_wrong_flag_is_one_line_before_anything_is_measured(faces, words):
    out, err = refuse(*words, *([] if words[0] == "scaling" else ["--data-dir", faces]))
    assert out == "" and len(err) == 1 and str(words[2]) in err[0]


@pytest.mark.parametrize("name", ["training_speed", "prediction_speed", "memory", "precision", "faces"])
def test_a_missing_folder_is_one_line(name, tmp_path):
    assert "nothing" in refuse(name, "--data-dir", tmp_path / "nothing")[1][-1]


@pytest.mark.parametrize("name", ["accuracy", "speedrun", "small_data"])
def test_without_val_nothing_is_trained(images, name):
    for folder, word in ((images, "val"), (images / "nothing", "nothing")):
        out, err = refuse(name, "--data-dir", folder)
        assert out == "" and len(err) == 1 and word in err[0]
