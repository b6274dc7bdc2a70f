"""prepare_data.py audit: every kind of mistake is put into a folder, and found there."""

import json
import shutil

import numpy as np
import pytest
from conftest import draw_folder, draw_image
from PIL import Image, ImageEnhance

import prepare_data
from console import run_script
from prepare.audit import audit, find_near_pairs, format_audit, hash_images


@pytest.fixture
def folder(tmp_path):
    """Clean: train/ and test/ of two classes, all images other ones."""
    draw_folder(tmp_path / "data" / "train", {"happy": 12, "sad": 6})
    draw_folder(tmp_path / "data" / "test", {"happy": 4, "sad": 4})
    return tmp_path / "data"


def test_clean_folder(folder):
    found = audit(folder)
    assert found["count"] == 26
    assert found["counts"] == {"train": {"happy": 12, "sad": 6}, "test": {"happy": 4, "sad": 4}}
    assert found["groups"] == found["unreadable"] == found["blank"] == [] and found["duplicates"] == 0
    assert found["leaks"] == {"test": {"identical": 0, "near": 0}} and found["kinds"] == {"L 48 x 48": 26}
    assert "2.0 times the images of the smallest" in format_audit(found)


def test_everything_is_found(folder):
    train, test = folder / "train", folder / "test"
    shutil.copy(train / "happy" / "happy_000.png", test / "happy" / "same.png")
    shutil.copy(train / "happy" / "happy_001.png", train / "sad" / "other_label.png")
    again = Image.open(train / "sad" / "sad_002.png").resize((64, 64))
    ImageEnhance.Brightness(again).enhance(0.9).convert("RGB").save(test / "sad" / "again.jpg", quality=85)
    Image.new("L", (48, 48), 7).save(train / "sad" / "blank.png")
    (train / "sad" / "broken.png").write_bytes(b"not an image")
    found = audit(folder)
    groups = {(group["kind"], tuple(group["splits"]), tuple(group["classes"])) for group in found["groups"]}
    assert groups == {
        ("identical", ("test", "train"), ("happy",)),
        ("identical", ("train",), ("happy", "sad")),
        ("near", ("test", "train"), ("sad",)),
    }
    assert found["leaks"] == {"test": {"identical": 1, "near": 2}} and found["duplicates"] == 2
    assert [row["file"] for row in found["unreadable"]] == [str(train / "sad" / "broken.png")]
    assert found["blank"] == [str(train / "sad" / "blank.png")]
    assert found["kinds"]["RGB 64 x 64"] == 1
    report = format_audit(found)
    assert "test/ images that are also in train/: 2, of which 1 byte for byte" in report
    assert "groups under more than one label: 1" in report


def test_worst_groups_come_first(folder):
    source = folder / "train" / "happy" / "happy_000.png"
    for number in range(5):
        shutil.copy(folder / "train" / "happy" / "happy_003.png", folder / "train" / "happy" / f"many{number}.png")
    shutil.copy(source, folder / "test" / "happy" / "leak.png")
    assert [group["splits"] for group in audit(folder)["groups"]] == [["test", "train"], ["train"]]


@pytest.mark.parametrize("count", [1, 2, 700])
def test_other_images_are_not_near(count):
    """Noise of all kinds; and a flat gradient next to its mirror image."""
    images = [np.asarray(draw_image(seed, 32)) for seed in range(count)]
    assert list(find_near_pairs(np.stack(images))) == []
    ramp = np.tile(np.arange(32, dtype=np.uint8) * 8, (32, 1))
    assert list(find_near_pairs(np.stack([ramp, ramp[:, ::-1]]))) == []


def test_pairs_are_found_across_blocks():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5000, 32, 32), dtype=np.uint8)
    images[4999], images[4998] = images[3], images[4997]
    images[1500] = (images[4] * 0.8).astype(np.uint8)
    assert sorted(find_near_pairs(images)) == [(3, 4999), (4, 1500), (4997, 4998)]
    hashes = hash_images(images)
    assert (hashes[3] == hashes[4999]).all() and set(np.unique(hashes)) == {-1, 1}


def test_folder_of_classes_alone(tmp_path):
    draw_folder(tmp_path / "faces", {"happy": 2, "sad": 2})
    found = audit(tmp_path / "faces")
    assert found["counts"] == {"faces": {"happy": 2, "sad": 2}} and found["leaks"] == {}


@pytest.fixture
def run(tmp_path, capsys):
    """Runs the command with --output-dir `out`; returns (exit code, standard output, standard error)."""

    def run_main(folder, out=tmp_path / "out"):
        with pytest.raises(SystemExit) as stop:
            run_script(lambda: prepare_data.main(["audit", str(folder), "--output-dir", str(out)]))
        return stop.value.code or 0, *capsys.readouterr()

    return run_main


def test_command_line_writes_report_table_and_plot(folder, tmp_path, run):
    shutil.copy(folder / "train" / "happy" / "happy_000.png", folder / "test" / "sad" / "same.png")
    code, out, err = run(folder)
    assert (code, err) == (0, "")
    assert "also in train/: 1, of which 1 byte for byte" in out and "same.png" in out
    assert (tmp_path / "out" / "audit.txt").read_text() in out
    assert json.loads((tmp_path / "out" / "audit.json").read_text())["leaks"]["test"]["identical"] == 1
    with Image.open(tmp_path / "out" / "audit.png") as image:
        image.load()
        assert image.width > 200


def test_mistakes_are_one_line(tmp_path, run):
    (tmp_path / "empty" / "happy").mkdir(parents=True)
    draw_folder(tmp_path / "faces", {"happy": 2, "sad": 2})
    mistakes = [("missing", "out", "missing"), ("empty", "out", "no images"), ("faces", "faces/audit", "--output-dir")]
    for name, out, word in mistakes:
        code, _, err = run(tmp_path / name, tmp_path / out)
        assert code == 2 and err.count("\n") == 1 and word in err and not (tmp_path / out).exists()


def test_images_of_which_none_can_be_read(tmp_path, run):
    (tmp_path / "data" / "sad").mkdir(parents=True)
    (tmp_path / "data" / "happy").mkdir()
    (tmp_path / "data" / "happy" / "page.jpg").write_bytes(b"<html>")
    _, out, _ = run(tmp_path / "data")
    assert "unreadable: 1" in out and "happy 1 (100.0%), sad 0 (0.0%); without images: sad" in out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["audit.json", "audit.txt"]


def test_a_chain_is_one_group_but_leaks_are_pairs(folder):
    """a is near b, and b near c, but a is not near c: of a chain, only what is near a training image leaks."""
    base = np.asarray(draw_image(500, 96).convert("L")).astype(float)
    other = np.asarray(draw_image(501, 96).convert("L")).astype(float)
    shares = {"train": 0.0, "Valid": 0.09, "test": 0.17}
    for split, share in shares.items():
        (folder / split / "happy").mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(((1 - share) * base + share * other).astype(np.uint8))
        image.save(folder / split / "happy" / "chain.png")
    found = audit(folder)
    (group,) = found["groups"]
    assert len(group["files"]) == 3 and group["kind"] == "near"
    assert found["leaks"] == {"val": {"identical": 0, "near": 1}, "test": {"identical": 0, "near": 0}}


def test_groups_show_the_other_label_among_the_first_files(tmp_path):
    draw_folder(tmp_path / "train", {"angry": 1, "sad": 3})
    source = tmp_path / "train" / "angry" / "angry_000.png"
    for number in range(5):
        shutil.copy(source, source.with_name(f"copy{number}.png"))
    shutil.copy(source, tmp_path / "train" / "sad" / "copy.png")
    (line,) = [line for line in format_audit(audit(tmp_path)).splitlines() if " = " in line]
    assert str(tmp_path / "train" / "sad" / "copy.png") in line and line.endswith(" = ...") and line.count("angry") > 2
