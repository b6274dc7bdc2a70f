"""How images are divided, found again in other splits, and served in batches."""

import random
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import draw_folder, draw_image, refusal
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data import SAMPLE_SET, FolderImages
from models import InputSpec, ModelInfo
from splits import (
    Batches,
    batch_bounds,
    draw_order,
    find_duplicates,
    hash_split,
    load_split,
    load_splits,
    shard,
    split_train_val,
)

GRAY = InputSpec(image_size=8)
COLOR = InputSpec(8, 3, (0.5,) * 3, (0.5,) * 3)
CPU = torch.device("cpu")

IMAGES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 30)), min_size=1, max_size=80)  # (label, digest)
FRACTIONS = st.floats(0.01, 0.9)


def unzip(images, *, conflicts=True):
    """(labels, digests) of drawn pairs, without `conflicts` such that equal digests have equal labels."""
    digests = [f"{digest:02}" if conflicts else f"{digest:02}-{label}" for label, digest in images]
    return np.array([label for label, _ in images]), digests


@settings(deadline=None)
@given(IMAGES, FRACTIONS, st.integers(0, 5))
def test_split_covers_everything_once_and_keeps_duplicates_on_one_side(images, fraction, seed):
    labels, digests = unzip(images)
    train, val = split_train_val(labels, digests, fraction, seed)
    assert sorted([*train, *val]) == list(range(len(labels)))
    assert train.tolist() == sorted(train) and val.tolist() == sorted(val)
    assert {digests[row] for row in train}.isdisjoint(digests[row] for row in val)


@settings(deadline=None)
@given(IMAGES, FRACTIONS, st.integers(0, 5), st.randoms(use_true_random=False))
def test_split_has_every_class_with_two_groups_on_both_sides_in_any_order(images, fraction, seed, rng):
    labels, digests = unzip(images, conflicts=False)
    train, val = split_train_val(labels, digests, fraction, seed)
    for label in set(labels.tolist()):
        groups = {digest for digest, own in zip(digests, labels, strict=True) if own == label}
        assert (labels[train] == label).any()
        assert (labels[val] == label).any() == (len(groups) > 1)
    order = rng.sample(range(len(labels)), len(labels))
    _, shuffled = split_train_val(labels[order], [digests[row] for row in order], fraction, seed)
    assert Counter(digests[order[row]] for row in shuffled) == Counter(digests[row] for row in val)


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.25, 0.5, 0.9])
def test_split_takes_the_share_of_every_class(fraction):
    labels = np.repeat([0, 1, 2], [1000, 200, 40])
    train, val = split_train_val(labels, [str(row) for row in range(len(labels))], fraction, 0)
    for label, count in enumerate((1000, 200, 40)):
        assert (labels[val] == label).sum() == round(fraction * count)
        assert (labels[train] == label).sum() == count - round(fraction * count)


def test_split_follows_from_the_seed_alone():
    labels, digests = np.repeat([0, 1], 50), [f"{row:03}" for row in range(100)]
    first = split_train_val(labels, digests, 0.2, 1)[1].tolist()
    np.random.seed(5), random.seed(5), torch.manual_seed(5)
    assert split_train_val(labels, digests, 0.2, 1)[1].tolist() == first
    others = {tuple(split_train_val(labels, digests, 0.2, seed)[1].tolist()) for seed in range(5)}
    assert len(others) == 5 and tuple(first) in others


def test_duplicates_with_conflicting_labels_and_large_groups():
    labels = np.array([0, 1] * 20)
    digests = [str(row // 2) for row in range(40)]  # every image is in both classes
    for seed in range(5):
        train, val = split_train_val(labels, digests, 0.3, seed)
        assert {digests[row] for row in train}.isdisjoint(digests[row] for row in val) and len(val) == 12
    train, val = split_train_val(np.zeros(20, int), ["a"] * 8 + ["b"] * 12, 0.1, 0)
    assert (len(train), len(val)) == (12, 8)  # both are larger than the share, so the smaller one


def test_hash_tells_every_change(tmp_path):
    data = FolderImages(draw_folder(tmp_path / "train", {"angry": 3, "sad": 3}, 8), GRAY)
    rows, hashes = np.arange(6), []
    for split in ((rows, rows), (rows[:5], rows), (rows[::-1], rows), (rows, rows[::-1]), (rows,), (np.tile(rows, 2),)):
        hashes.append(hash_split(*((data, part) for part in split)))
    for name in ("labels", "digests"):
        changed = FolderImages(tmp_path / "train", GRAY)
        getattr(changed, name)[0] = 1 if name == "labels" else "0123456789abcdef"
        hashes.append(hash_split((changed, rows), (data, rows)))
    assert len(set(hashes)) == len(hashes) == 8
    assert hash_split((FolderImages(tmp_path / "train", GRAY), rows), (data, rows)) == hashes[0]


# Batches


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 64), st.integers(1, 8))
def test_bounds_cover_everything_once_with_two_images_for_each_process(count, batch_size, world_size):
    bounds = batch_bounds(count, batch_size, world_size)
    assert [row for start, stop in bounds for row in range(start, stop)] == list(range(count))
    sizes = [stop - start for start, stop in bounds]
    assert all(size == batch_size for size in sizes[:-1])
    assert min(2 * world_size, batch_size, count) <= sizes[-1] < batch_size + max(1, 2 * world_size)
    for bound in bounds:
        parts = [shard(*bound, rank, world_size) for rank in range(world_size)]
        assert [row for start, stop in parts for row in range(start, stop)] == list(range(*bound))
        lengths = [stop - start for start, stop in parts]
        assert max(lengths) - min(lengths) <= 1
        assert min(lengths) >= 2 or min(count, batch_size) < 2 * world_size


@pytest.fixture
def images(tmp_path):
    return FolderImages(draw_folder(tmp_path / "train", {"angry": 5, "happy": 9, "sad": 3}, 8), GRAY)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("batch_size", [2, 5, 100])
def test_batches_serve_the_images_of_the_folder_in_the_order_given(images, batch_size, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    rows, pixels = np.array([16, 0, 3, 4, 9, 12, 1, 2, 8]), np.array(images.images)
    batches, shuffled = Batches(images, rows, torch.device(device)), torch.tensor([8, 3, 0, 7, 1, 2, 6, 4, 5])
    assert len(batches) == 9
    for order in (None, shuffled, torch.tensor([0, 0, 0, 1])):
        expected = rows if order is None else rows[order.numpy()]
        served = list(batches.iterate(batch_size, order))
        for (start, stop), (part, labels) in zip(batch_bounds(len(expected), batch_size), served, strict=True):
            assert part.dtype == torch.uint8 and np.array_equal(part.cpu().numpy(), pixels[expected[start:stop]])
            assert labels.dtype == torch.int64 and labels.tolist() == images.labels[expected[start:stop]].tolist()
            part.zero_(), labels.zero_()  # they are no views
    assert np.array_equal(images.images, pixels) and images.labels.sum() == 9 + 6


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_every_batch(images, world_size):
    batches, order = Batches(images, np.arange(17), CPU), torch.randperm(17, generator=torch.Generator().manual_seed(0))
    parts = [batches.iterate(8, order, rank=rank, world_size=world_size) for rank in range(world_size)]
    for (start, stop), shards in zip(batch_bounds(17, 8, world_size), zip(*parts, strict=True), strict=True):
        pixels, labels = (torch.cat(tensors) for tensors in zip(*shards, strict=True))
        assert torch.equal(labels, batches.labels[order[start:stop]])
        assert np.array_equal(pixels.numpy(), images.images[order[start:stop].numpy()])


def test_order_is_a_permutation_or_draws_classes_alike():
    labels = torch.tensor([0] * 3000 + [2] * 300 + [3] * 30)  # no image is of class 1
    for sampler in ("shuffle", "balanced"):
        order, again, other = (draw_order(labels, sampler, seed=seed) for seed in (0, 0, 1))
        assert torch.equal(order, again) and not torch.equal(order, other)
        assert len(order) == 3330 and order.dtype == torch.int64
        assert (sorted(order.tolist()) == list(range(3330))) == (sampler == "shuffle")
    counts = torch.bincount(labels[order], minlength=4).tolist()
    assert counts[1] == 0 and all(1000 < counts[label] < 1220 for label in (0, 2, 3))
    assert len(set(order[labels[order] == 3].tolist())) == 30


# Folders to splits


def load(root, spec=GRAY, **options):
    return load_splits(root, spec, CPU, **{"val_fraction": 0.25, "seed": 0, **options})


def test_validation_is_a_share_of_train_if_there_is_no_folder(tmp_path):
    root = draw_folder(tmp_path / "faces" / "train", {"angry": 8, "sad": 12}, 8)
    for number in range(4):
        shutil.copy(root / "sad" / "sad_000.png", root / "sad" / f"again{number}.png")
    splits = load(tmp_path / "faces")
    assert splits.train.class_counts(2) == [6, 12] and splits.val.class_counts(2) == [2, 4] and splits.test is None
    assert splits.val_source == "from train/" and splits.trained_on == "faces" and splits.notes == []
    assert splits.in_train is None
    pixels = [{images.numpy().tobytes() for images, _ in part.iterate(1)} for part in (splits.train, splits.val)]
    assert pixels[0].isdisjoint(pixels[1])
    assert load(tmp_path / "faces").split_hash == splits.split_hash
    assert load(tmp_path / "faces", seed=1).split_hash != splits.split_hash


@pytest.mark.parametrize("names", [("train", "val", "test"), ("Train", "Valid", "TEST"), ("train", "validation", None)])
def test_folders_are_matched_by_name_and_their_duplicates_told(names, tmp_path):
    """A model of three channels is told that training was gray, and gray images are found among color ones."""
    train, val, test = (tmp_path / (name or "elsewhere") for name in names)
    draw_folder(train, {"angry": 4, "happy": 4, "sad": 5}, 8)
    draw_folder(val, {"sad": 2}, 8)
    draw_folder(test, {"happy": 3, "sad": 1}, 8)
    shutil.copy(train / "sad" / "sad_001.png", val / "sad" / "again.png")
    for number in range(2):
        draw_image(number, 8).save(train / "angry" / f"gray{number}.png")
        draw_image(number, 8).convert("RGB").save(test / "sad" / f"gray{number}.png")
    shutil.copy(val / "sad" / "sad_000.png", test / "sad" / "of_val.png")
    for has_color in (False, True):
        if has_color:
            draw_image(7, 8, "RGB").save(train / "sad" / "color.png")
            draw_image(8, 8, "RGB").save(test / "happy" / "color.png")
        splits = load(tmp_path, COLOR)
        assert splits.class_names == ["angry", "happy", "sad"] and splits.val_source == f"{val.name}/"
        assert splits.train.class_counts(3) == [6, 4, 5 + has_color] and splits.val.class_counts(3) == [0, 0, 3]
        assert splits.spec.gray != has_color and next(splits.train.iterate(2))[0].shape[1] == (3 if has_color else 1)
        warnings = [f"warning: 1 of 3 images in {val.name}/ are also in {train.name}/"]
        if names[2]:
            count = 7 + has_color
            warnings.append(f"warning: 2 of {count} images in {test.name}/ are also in {train.name}/")
            warnings.append(f"warning: 1 of {count} images in {test.name}/ are also in {val.name}/")
            assert splits.test.class_counts(3) == [0, 3 + has_color, 4]
            assert splits.in_train.tolist() == [False] * (3 + has_color) + [True, True, False, False]
        else:
            assert splits.test is None and splits.in_train.tolist() == [True, False, False]
        assert splits.notes == warnings


def test_duplicates_are_equal_pixels_whatever_the_channels(tmp_path):
    gray, color = draw_folder(tmp_path / "a", {"sad": 3}, 8), draw_folder(tmp_path / "b", {"sad": 2}, 8, "RGB")
    Image.open(gray / "sad" / "sad_001.png").convert("RGB").save(color / "sad" / "again.bmp")
    sets = [FolderImages(folder, COLOR) for folder in (gray, color)]
    assert [data.images.shape[1] for data in sets] == [1, 3]
    assert find_duplicates(*sets).tolist() == [True, False, False]
    assert find_duplicates(*reversed(sets)).tolist() == [False, True, False]


@pytest.mark.parametrize(
    "counts, message",
    [(None, "--data-dir"), ({}, "class folders"), ({"sad": 5}, "only the class sad"), ({"sad": 1, "b": 1}, "too few")],
)
def test_too_little_to_train_on(counts, message, tmp_path):
    if counts is not None:
        (tmp_path / "train").mkdir()
        draw_folder(tmp_path / "train", counts, 8)
    shown = refusal(load, tmp_path)
    assert message in shown and str(tmp_path / "train") in shown


def test_drawings_and_numbers_are_told(tmp_path):
    parts = [draw_folder(tmp_path / part, {"3": 6, "happy": 6}, 8) for part in ("train", "test")]
    for part in parts:
        for path in part.glob("*/*.png"):
            path.rename(path.with_name(f"drawing_{path.name}"))
    (numbers,) = (splits := load(tmp_path)).notes
    assert splits.trained_on == SAMPLE_SET and "class folders are called 3:" in numbers
    draw_image(1, 8).save(parts[0] / "happy" / "photo.png")
    splits = load(tmp_path)
    assert splits.trained_on == tmp_path.name
    assert [note.partition(" (")[0] for note in splits.notes[1:]] == [
        f"warning: 12 of 13 images in {parts[0]} are drawings of the sample set",
        f"warning: 12 of 12 images in {parts[1]} are drawings of the sample set",
    ]


def test_unreadable_images_and_unknown_classes_of_every_part_are_told(tmp_path):
    for part in ("train", "val", "test"):
        root = draw_folder(tmp_path / part, {"angry": 2, "sad": 2}, 8)
        (root / "sad" / f"bad_{part}.png").write_bytes(b"x")
    notes = "\n".join(load(tmp_path).notes)
    assert all(f"bad_{part}.png" in notes for part in ("train", "val", "test"))
    assert "bad_train" in refusal(load, tmp_path, strict=True)
    for part in ("val", "test"):
        draw_folder(tmp_path / part, {"surprise": 1}, 8)
        assert "surprise" in refusal(load, tmp_path) and str(tmp_path / part) in refusal(load, tmp_path)
        (tmp_path / part).rename(tmp_path / f"no {part}")


# One split, to measure on


INFO = ModelInfo("cnn4_bn", ["angry", "happy", "sad"], GRAY)


def load_one(root, split, **options):
    return load_split(root, split, INFO, **{"val_fraction": 0.25, "seed": 0, **options})


def test_the_shares_are_those_of_training(tmp_path):
    draw_folder(tmp_path / "Train", {"angry": 8, "sad": 12}, 8)
    splits = load(tmp_path)
    for split, batches in (("train", splits.train), ("val", splits.val)):
        data, rows, name, in_train = load_one(tmp_path, split)
        assert (name, in_train) == (split, None) and data.class_names == INFO.class_names
        assert np.array_equal(data.images[rows], next(batches.iterate(100))[0])
    assert "--split val" in refusal(load_one, tmp_path, "test")
    draw_folder(tmp_path / "few" / "train", {"angry": 1, "sad": 1}, 8)
    assert "too few" in refusal(load_one, tmp_path / "few", "val")


def test_a_split_folder_is_measured_whole_and_compared_with_train(tmp_path):
    draw_folder(tmp_path / "train", {"angry": 3, "sad": 3}, 8)
    for split in ("valid", "test"):
        draw_folder(tmp_path / split, {"happy": 2}, 8)
        shutil.copy(tmp_path / "train" / "sad" / "sad_000.png", tmp_path / split / "happy" / "again.png")
    for split, name, count in (("train", "train", 6), ("val", "valid", 3), ("test", "test", 3)):
        data, rows, shown, in_train = load_one(tmp_path, split)
        assert shown == split and rows.tolist() == list(range(count)) and data.folder == tmp_path / name
        assert (in_train is None) if split == "train" else in_train.tolist() == [True, False, False]
        warning = f"warning: 1 of 3 images in {name}/ are also in train/"
        assert data.notes == [] if split == "train" else [warning]
    (tmp_path / "train" / "sad" / "bad.png").write_bytes(b"x")
    assert load_one(tmp_path, "test", strict=True)[3].tolist() == [True, False, False]  # train/ is not measured
    shutil.rmtree(tmp_path / "train" / "sad")
    (tmp_path / "train" / "sad").mkdir()
    data, _, _, in_train = load_one(tmp_path, "test")
    assert in_train is None and "were not looked for" in data.notes[0]
    shutil.rmtree(tmp_path / "train")
    assert load_one(tmp_path, "test")[0].notes == []
    assert "--split test" in refusal(load_one, tmp_path, "train")


def test_a_folder_of_class_folders_is_used_as_it_is(tmp_path):
    draw_folder(tmp_path / "faces", {"angry": 2, "sad": 1}, 8)
    for split in ("train", "val", "test"):
        data, rows, name, in_train = load_one(tmp_path / "faces", split)
        assert (rows.tolist(), name, in_train) == ([0, 1, 2], "faces", None) and data.labels.tolist() == [0, 0, 2]
    for folder in ("missing", "."):
        refusal(load_one, tmp_path / folder, "test")
