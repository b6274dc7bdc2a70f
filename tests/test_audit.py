"""prepare_data.py audit: every kind of mistake is put into a folder, and found there."""

import json
import shutil

import numpy as np
import pytest
from conftest import assert_refused, draw_folder, draw_image, run
from PIL import Image, ImageEnhance

from prepare.audit import BITS, audit, format_audit, group_near, hash_images
from prepare_data import main


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


def test_everything_is_found(folder, tmp_path):
    train, test = folder / "train", folder / "test"
    shutil.copy(train / "happy" / "happy_000.png", test / "happy" / "same.png")
    shutil.copy(train / "happy" / "happy_001.png", train / "sad" / "other_label.png")
    again = Image.open(train / "sad" / "sad_002.png").resize((64, 64))
    ImageEnhance.Brightness(again).enhance(0.9).convert("RGB").save(test / "sad" / "again.jpg", quality=85)
    Image.new("L", (48, 48), 7).save(train / "sad" / "blank.png")
    (train / "sad" / "broken.png").write_bytes(b"not an image")
    code, report, err = run(main, "audit", folder, "--output-dir", tmp_path / "out")
    assert (code, err) == (0, "") and (tmp_path / "out" / "audit.txt").read_text() in report
    assert "test/ images that are also in train/: 2, of which 1 byte for byte" in report
    assert "groups under more than one label: 1" in report and "same.png" in report
    assert min(Image.open(tmp_path / "out" / "audit.png").convert("RGB").size) > 100
    found = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert found == audit(folder)
    groups = {(group["kind"], tuple(group["splits"]), tuple(group["classes"])) for group in found["groups"]}
    assert groups == {
        ("identical", ("test", "train"), ("happy",)),
        ("identical", ("train",), ("happy", "sad")),
        ("near", ("test", "train"), ("sad",)),
    }
    assert found["leaks"] == {"test": {"identical": 1, "near": 2}} and found["duplicates"] == 2
    assert [row["file"] for row in found["unreadable"]] == [str(train / "sad" / "broken.png")]
    assert found["blank"] == [str(train / "sad" / "blank.png")] and found["kinds"]["RGB 64 x 64"] == 1


def test_worst_groups_come_first_and_show_every_label(folder):
    train = folder / "train"
    for name in ("happy/1", "happy/2", "happy/3", "happy/4", "happy/5", "sad/other"):
        shutil.copy(train / "happy" / "happy_003.png", train / f"{name}.png")
    shutil.copy(train / "happy" / "happy_000.png", folder / "test" / "happy" / "leak.png")
    found = audit(folder)
    assert [group["splits"] for group in found["groups"]] == [["test", "train"], ["train"]]
    *_, line = format_audit(found).splitlines()
    assert str(train / "sad" / "other.png") in line and line.endswith(" = ...") and line.count("happy/") == 3


def test_other_images_are_not_near():
    """Noise of all kinds; and a flat gradient next to its mirror image."""
    images = np.stack([np.asarray(draw_image(seed, 32)) for seed in range(700)])
    ramp = np.tile(np.arange(32, dtype=np.uint8) * 8, (32, 1))
    for others in (images[:0], images[:1], images, np.stack([ramp, ramp[:, ::-1]])):
        assert len(set(group_near(others))) == len(others)


def test_near_images_are_found_among_many():
    """Also a thousand that are near to one another, of which only some are compared with each that comes after."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5000, 32, 32), dtype=np.uint8)
    images[4999], images[4998] = images[3], images[4997]
    images[1500] = (images[4] * 0.8).astype(np.uint8)
    images[2000:3000] = (images[2000] * np.linspace(0.5, 1, 1000)[:, None, None]).astype(np.uint8)
    groups = group_near(images)
    for members in ([3, 4999], [4, 1500], [4997, 4998], [*range(2000, 3000)]):
        assert np.flatnonzero(groups == groups[members[0]]).tolist() == members
    assert len(set(groups)) == 5000 - 3 - 999


def test_hashes_that_differ_in_few_bits_have_two_bytes_in_common():
    """So that no near pair goes unseen, wherever these bits are."""
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 256, (500, 8), dtype=np.uint8)
    flips = np.zeros((500, 64), np.uint8)
    for row in flips:
        row[rng.permutation(64)[:BITS]] = 1
    others = hashes ^ np.packbits(flips, axis=1)
    assert ((hashes == others).sum(1) >= 2).all()
    image = np.asarray(draw_image(1, 32))[None]
    assert hash_images(image).shape == (1, 8) and (hash_images(image) == hash_images(image // 2)).all()


def test_a_chain_is_one_group(folder):
    """a is near b, and b near c, but a is not near c."""
    base, other = (np.asarray(draw_image(seed, 96)).astype(float) for seed in (500, 501))
    for split, share in {"train": 0.0, "Valid": 0.09, "test": 0.17}.items():
        (folder / split / "happy").mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(((1 - share) * base + share * other).astype(np.uint8))
        image.save(folder / split / "happy" / "chain.png")
    found = audit(folder)
    (group,) = found["groups"]
    assert len(group["files"]) == 3 and group["kind"] == "near"
    assert found["leaks"] == {"val": {"identical": 0, "near": 1}, "test": {"identical": 0, "near": 1}}


def test_a_folder_of_classes_of_which_no_image_can_be_read(tmp_path):
    for name in ("sad", "happy"):
        (tmp_path / "data" / name).mkdir(parents=True)
    (tmp_path / "data" / "happy" / "page.jpg").write_bytes(b"<html>")
    _, out, _ = run(main, "audit", tmp_path / "data", "--output-dir", tmp_path / "out")
    assert "unreadable: 1" in out and "data/: 1 images: happy 1 (100.0%), sad 0 (0.0%); without images: sad" in out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["audit.json", "audit.txt"]
    assert json.loads((tmp_path / "out" / "audit.json").read_text())["leaks"] == {}


@pytest.mark.parametrize(
    ("folder", "out", "word"),
    [("missing", "out", "missing"), ("empty", "out", "no images"), ("faces", "faces/audit", "--output-dir")],
)
def test_refusals_write_nothing(folder, out, word, tmp_path):
    (tmp_path / "empty" / "happy").mkdir(parents=True)
    draw_folder(tmp_path / "faces", {"happy": 2, "sad": 2})
    assert_refused(main, ["audit", tmp_path / folder, "--output-dir", tmp_path / out], word)
    assert not (tmp_path / out).exists()
