"""Benchmarks, the cheap ones from end to end. What they measure is for their readers, not for tests."""

import importlib
import shutil
import sys

import pytest
import torch
from conftest import draw_folder, open_portrait
from PIL import Image
from torchvision.transforms.v2.functional import resize

from benchmarks import accuracy, robustness, small_data, speedrun, training_speed
from checkpoints import BEST_NAME
from console import run_script
from data import find_splits
from faces.video import VideoCopy

FACES = {"angry": 6, "happy": 6, "neutral": 6, "sad": 6, "fear": 4, "surprise": 4}


@pytest.fixture
def measure(capfd, monkeypatch):
    """Runs a benchmark; returns the lines of standard output, and standard error, of its processes too."""

    def call(*words, code=0):
        monkeypatch.setattr(sys, "argv", [*map(str, words)])
        with pytest.raises(SystemExit) as stop:
            run_script(importlib.import_module(f"benchmarks.{words[0]}").main)
        out, err = capfd.readouterr()
        assert stop.value.code == code, err
        return out.splitlines(), err

    return call


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


def test_training_speed(faces, measure, monkeypatch):
    monkeypatch.setattr(training_speed, "MATMUL", 64)
    words = ("--data-dir", faces, "--arch", "cnn4_bn", "--batch-size", 8)
    lines, err = measure("training_speed", *words, "--seconds", 0.01, "--rounds", 1, "--workers", 0)
    row = cells_of(lines[-1])
    assert err == "" and row[:3] == ["cnn4_bn", "48", "8"] and len(row) == len(cells_of(lines[-3])) == 11
    assert all(float(cell.replace(",", "").rstrip("%").partition(" ")[0]) > 0 for cell in row[3:8])
    assert "32 images fill no batch of 500" in measure("training_speed", *words, "--batch-size", 500, code=2)[1]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory(faces, tmp_path, measure):
    lines, _ = measure("memory", "--data-dir", faces, "--epochs", 1, "--sizes", 48)
    assert [line.partition(":")[0] for line in lines] == ["epoch 1/1", "48 pixels"]
    copy = VideoCopy(tmp_path / "clip.mp4", 25.0, (320, 240))
    copy.add(open_portrait().resize((320, 240)))
    copy.close()
    lines, _ = measure("memory", "--video", tmp_path / "clip.mp4")
    assert len(lines) == 4 and all(int(line.split()[-2].replace(",", "")) > 10 for line in lines)


def test_accuracy(faces, tmp_path, measure):
    words = ("accuracy", "--data-dir", faces, "--output-dir", tmp_path, "--arch", "cnn4_bn")
    (first, _), (again, err) = (measure(*words, "--", "--epochs", 1) for _ in range(2))
    assert again == first and "is finished" in err
    cells = cells_of(first[4])
    assert cells[:2] == ["cnn4_bn", "--epochs 1`, 1 epochs, 48 pixels"] and cells[6:9] == ["1.57 M", "34 M", "6.3 MB"]
    assert first[-1] == "13 images, 12 of them without a duplicate in train/"
    assert "other options" in measure(*words, code=2)[1]  # the recipe: not what is in the folder
    run = tmp_path / "cnn4_bn-0"
    metrics = accuracy.measure(run / BEST_NAME, faces) | {"tta": 0.5}
    runs = [(metrics | {"accuracy": share}, [{"seconds": 240.0}]) for share in (0.5, 0.7)]
    cells = cells_of(accuracy.format_row("cnn4_bn", runs, run / BEST_NAME, "recipe"))
    assert cells[1].endswith(", 2 seeds") and cells[2:4] == ["60.0 ± 14.1 (34.2 to 81.2)", "50.0 ± 0.0"]
    assert cells[9] == "4"


def test_goals_of_the_speedrun():
    epochs = [(1.0, 0.5), (2.0, 0.61), (3.5, 0.6), (4.0, 0.66), (5.0, 0.7), (6.0, 0.69)]
    assert speedrun.until_goals(epochs, minutes=9) == epochs[:5]
    assert speedrun.until_goals(epochs, minutes=2.5) == epochs[:3]
    assert speedrun.format_row("a", epochs[:5]) == "| a | 2.0 | 4.0 | 5.0 |"
    assert speedrun.format_row("a", epochs[:4]) == "| a | 2.0 | 4.0 | not reached, best 66.0% in 4 minutes |"


def test_sets_of_small_data(faces, tmp_path):
    def contents(*parts):
        return [path.read_bytes() for part in parts for path in (tmp_path / part).rglob("*.png")]

    small_data.make_sets(find_splits(faces), tmp_path, [2], seeds=2)
    apart, few = contents("four/train", "four/test", "others"), contents("few_2_0/train", "few_2_1/train")
    assert len(apart) == len(set(apart)) == 4 * (6 + 2) + 2 * 4 - 1  # both duplicates are gone, one test image is new
    assert len(few) == len(set(few)) == 16 and set(few) <= set(contents("four/train"))
    assert sorted(contents("few_2_0/test")) == sorted(contents("four/test"))


def test_faces(tmp_path, measure):
    (tmp_path / "val" / "happy").mkdir(parents=True)
    open_portrait().crop((175, 64, 275, 164)).resize((48, 48)).save(tmp_path / "val" / "happy" / "1.png")
    lines, _ = measure("faces", "--data-dir", tmp_path, "--rounds", 1)
    assert lines[0] == "| detector | ms | full | 0° | 15° | 30° | 45° | 60° |"
    name, ms, *cells = cells_of(lines[2])
    assert name == "faces/detector.py" and float(ms) > 0 and cells[:4] == ["100.0 / 100.0"] * 4


def test_robustness(faces, tmp_path, measure):
    noise = torch.randint(0, 256, (6, 1, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = resize(noise, [48, 48])  # smooth, so that what moves it further changes it more
    before = images.clone()
    for corrupt, levels in robustness.CORRUPTIONS.values():
        changed = [(corrupt(images, level).float() - images).abs().mean() for level in levels]
        assert changed[0] > 0 and changed == sorted(changed) and torch.equal(images, before)
        assert torch.equal(corrupt(images, levels[2]), corrupt(images, levels[2]))
    same = robustness.move(images, shift=0.0)
    assert torch.equal(same, images)
    lines, _ = measure("robustness", "--data-dir", faces, "--limit", 4, "--plot", tmp_path / "plot.png")
    assert "as they are" in lines[0] and len(lines) == 4 + 10
    assert all(len(cells_of(line)) == 8 and 0 <= float(cells_of(line)[-1]) <= 100 for line in lines[4:])
    assert Image.open(tmp_path / "plot.png").size[0] > 1000


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
        *[("", ("speedrun", "--baseline", arch)) for arch in ("nope", "cnn6_rgb")],
        ("", ("small_data", "--counts", "400")),
        *[("no_val", (name,)) for name in ("faces", "accuracy")],
    ],
)
def test_a_mistake_is_one_line_before_anything_is_measured(folder, words, faces, measure):
    (faces / "no_val" / "train" / "happy").mkdir(parents=True, exist_ok=True)
    lines, err = measure(*words, "--data-dir", faces / folder, code=2)
    assert lines == [] and len(err.splitlines()) == 1 and (folder or words[-1]) in err
