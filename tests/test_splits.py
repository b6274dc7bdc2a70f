"""How images are divided, found again in other splits, and served in batches."""

import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import draw_folder, draw_image, refusal
from hypothesis import given, settings
from hypothesis import strategies as st

from data import SAMPLE_SET, FolderImages
from models import InputSpec, ModelInfo
from splits import Batches, batch_bounds, draw_order, hash_split, load_split, load_splits, shard, split_train_val

GRAY = InputSpec(image_size=8)
COLOR = InputSpec(8, 3, (0.5,) * 3, (0.5,) * 3)
CPU = torch.device("cpu")
IMAGES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 30)), min_size=1, max_size=80)  # (label, digest)


@settings(deadline=None)
@given(IMAGES, st.floats(0.01, 0.9), st.integers(0, 5), st.randoms(use_true_random=False), st.booleans())
def test_split_keeps_duplicates_on_one_side_and_most_classes_on_both(images, fraction, seed, rng, conflicts):
    """With `conflicts`, equal digests may have different labels; without, order doesn't matter either."""
    labels = np.array([label for label, _ in images])
    digests = [f"{digest:02}" if conflicts else f"{digest:02}-{label}" for label, digest in images]
    train, val = split_train_val(labels, digests, fraction, seed)
    assert sorted([*train, *val]) == list(range(len(labels)))
    assert train.tolist() == sorted(train) and val.tolist() == sorted(val)
    assert {digests[row] for row in train}.isdisjoint(digests[row] for row in val)
    if conflicts:
        return
    for label in set(labels.tolist()):
        groups = {digest for digest, own in zip(digests, labels, strict=True) if own == label}
        assert (labels[train] == label).any()
        assert (labels[val] == label).any() == (len(groups) > 1)
    order = rng.sample(range(len(labels)), len(labels))
    _, shuffled = split_train_val(labels[order], [digests[row] for row in order], fraction, seed)
    assert Counter(digests[order[row]] for row in shuffled) == Counter(digests[row] for row in val)


@pytest.mark.parametrize("fraction", [0.05, 0.25, 0.9])
def test_split_takes_the_share_of_every_class(fraction):
    labels = np.repeat([0, 1, 2], [1000, 200, 40])
    _, val = split_train_val(labels, [str(row) for row in range(1240)], fraction, 0)
    assert np.bincount(labels[val]).tolist() == [round(fraction * count) for count in (1000, 200, 40)]
    train, val = split_train_val(np.zeros(20, int), ["a"] * 8 + ["b"] * 12, 0.1, 0)
    assert (len(train), len(val)) == (12, 8)  # groups larger than the share: the smaller one


def test_hash_tells_every_change(tmp_path):
    data, moved, changed = (FolderImages(draw_folder(tmp_path / "train", {"a": 3, "b": 3}, 8), GRAY) for _ in range(3))
    moved.labels[0], changed.digests[0], rows = 1, "0123456789abcdef", np.arange(6)
    splits = [[rows, rows], [rows[:5], rows], [rows[::-1], rows], [rows, rows[::-1]], [rows], [np.tile(rows, 2)]]
    hashes = [hash_split(*((data, part) for part in split)) for split in splits]
    hashes += [hash_split((other, rows), (data, rows)) for other in (moved, changed)]
    assert len(set(hashes)) == 8 and hash_split((data, rows), (data, rows)) == hashes[0]


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


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("batch_size", [2, 8, 100])
@pytest.mark.parametrize("device", ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def test_batches_serve_the_images_in_the_order_given_to_all_processes(tmp_path, batch_size, device, world_size):
    images = FolderImages(draw_folder(tmp_path / "train", {"angry": 5, "happy": 9, "sad": 3}, 8), GRAY)
    rows, stored = np.array([16, 0, 3, 4, 9, 12, 1, 2, 8]), np.array(images.images)
    batches = Batches(images, rows, torch.device(device))
    assert len(batches) == 9
    for order in (None, torch.tensor([8, 3, 0, 7, 1, 2, 6, 4, 5]), torch.tensor([0, 0, 0, 1])):
        expected = rows if order is None else rows[order.numpy()]
        parts = [batches.iterate(batch_size, order, rank=rank, world_size=world_size) for rank in range(world_size)]
        bounds = batch_bounds(len(expected), batch_size, world_size)
        for (start, stop), shards in zip(bounds, zip(*parts, strict=True), strict=True):
            pixels, labels = (torch.cat(tensors) for tensors in zip(*shards, strict=True))
            assert pixels.dtype == torch.uint8 and np.array_equal(pixels.cpu().numpy(), stored[expected[start:stop]])
            assert labels.dtype == torch.int64 and labels.tolist() == images.labels[expected[start:stop]].tolist()
            for part in (tensor for pair in shards for tensor in pair):
                part.zero_()  # they are no views
    assert np.array_equal(images.images, stored) and images.labels.sum() == 9 + 6


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


def load(root, spec=GRAY, **options):
    return load_splits(root, spec, CPU, **{"val_fraction": 0.25, "seed": 0, **options})


def test_validation_is_a_share_of_train_if_there_is_no_folder(tmp_path):
    root = draw_folder(tmp_path / "faces" / "train", {"angry": 8, "sad": 12}, 8)
    for number in range(4):
        shutil.copy(root / "sad" / "sad_000.png", root / "sad" / f"again{number}.png")
    splits = load(tmp_path / "faces")
    assert splits.train.class_counts(2) == [6, 12] and splits.val.class_counts(2) == [2, 4]
    assert splits.test is splits.in_train is None and splits.notes == []
    assert splits.val_source == "from train/" and splits.trained_on == "faces"
    pixels = [{images.numpy().tobytes() for images, _ in part.iterate(1)} for part in (splits.train, splits.val)]
    assert pixels[0].isdisjoint(pixels[1])
    assert [load(tmp_path / "faces", seed=seed).split_hash == splits.split_hash for seed in (0, 1)] == [True, False]


@pytest.mark.parametrize("has_color", [False, True])
def test_folders_are_matched_by_name_and_their_duplicates_told(has_color, tmp_path):
    """A model of three channels is told that training was gray, and gray images are found among color ones."""
    train = draw_folder(tmp_path / "Train", {"angry": 4, "happy": 4, "sad": 5}, 8)
    val = draw_folder(tmp_path / "valid", {"sad": 2}, 8)
    test = draw_folder(tmp_path / "TEST", {"happy": 3, "sad": 1}, 8)
    shutil.copy(train / "sad" / "sad_001.png", val / "sad" / "again.png")
    for number in range(2):
        draw_image(number, 8).save(train / "angry" / f"gray{number}.png")
        draw_image(number, 8).convert("RGB").save(test / "sad" / f"gray{number}.png")
    shutil.copy(val / "sad" / "sad_000.png", test / "sad" / "of_val.png")
    if has_color:
        draw_image(7, 8, "RGB").save(train / "sad" / "sad_004.png")
        draw_image(8, 8, "RGB").save(test / "happy" / "happy_000.png")
    splits = load(tmp_path, COLOR)
    assert splits.class_names == ["angry", "happy", "sad"] and splits.val_source == "valid/"
    assert splits.train.class_counts(3) == [6, 4, 5] and splits.val.class_counts(3) == [0, 0, 3]
    assert splits.spec.gray != has_color and next(splits.train.iterate(2))[0].shape[1] == (3 if has_color else 1)
    assert splits.test.class_counts(3) == [0, 3, 4]
    assert splits.in_train.tolist() == [False, False, False, True, True, False, False]
    assert splits.notes == [
        "warning: 1 of 3 images in valid/ are also in Train/",
        "warning: 2 of 7 images in TEST/ are also in Train/",
        "warning: 1 of 7 images in TEST/ are also in valid/",
    ]
    shutil.rmtree(test)
    splits = load(tmp_path, COLOR)
    assert splits.test is None and splits.in_train.tolist() == [True, False, False] and len(splits.notes) == 1


def test_too_little_to_train_on(tmp_path):
    assert "--data-dir" in refusal(load, tmp_path)
    (tmp_path / "train").mkdir()
    for counts, word in (({}, "class folders"), ({"sad": 1}, "only the class sad"), ({"angry": 1}, "too few")):
        draw_folder(tmp_path / "train", counts, 8)
        assert str(tmp_path / "train") in (message := refusal(load, tmp_path)) and word in message
    assert "too few" in refusal(load_one, tmp_path, "val")
    for name in ("angry", "sad"):
        for number in range(9):
            shutil.copy(next((tmp_path / "train" / name).iterdir()), tmp_path / "train" / name / f"copy{number}.png")
    assert "20 images" in (message := refusal(load, tmp_path)) and "2 of them different" in message
    draw_folder(tmp_path / "train", {"angry": 3}, 8)
    (note,) = load(tmp_path).notes
    assert "the 10 images in" in note and note.endswith("sad are all the same one: add others")


def test_drawings_and_numbers_are_told(tmp_path):
    train, test = (draw_folder(tmp_path / part, {"drawing_a": 6, "drawing_b": 6}, 8) for part in ("train", "test"))
    splits = load(tmp_path)
    assert (splits.trained_on, splits.notes) == (SAMPLE_SET, [])
    draw_folder(train, {"3": 2}, 8)
    splits = load(tmp_path)
    numbers, *drawings = splits.notes
    assert splits.trained_on == tmp_path.name and "class folders are called 3:" in numbers
    for note, count, folder in zip(drawings, (14, 12), (train, test), strict=True):
        assert note.startswith(f"warning: 12 of {count} images in {folder} are drawings of the sample set")


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_unreadable_images_and_unknown_classes_of_every_part_are_told(part, tmp_path):
    for name in ("train", "val", "test"):
        draw_folder(tmp_path / name, {"angry": 2, "sad": 2}, 8)
    (tmp_path / part / "sad" / "bad.png").write_bytes(b"x")
    assert "bad.png" in load(tmp_path).notes[0] and "bad.png" in refusal(load, tmp_path, strict=True)
    if part != "train":
        draw_folder(tmp_path / part, {"surprise": 1}, 8)
        assert "surprise" in refusal(load, tmp_path) and str(tmp_path / part) in refusal(load, tmp_path)


def load_one(root, split, **options):
    info = ModelInfo("cnn4_bn", ["angry", "happy", "sad"], GRAY)
    return load_split(root, split, info, **{"val_fraction": 0.25, "seed": 0, **options})


def test_the_shares_are_those_of_training(tmp_path):
    draw_folder(tmp_path / "Train", {"angry": 8, "sad": 12}, 8)
    splits = load(tmp_path)
    for split, batches in (("train", splits.train), ("val", splits.val)):
        data, rows, name, in_train = load_one(tmp_path, split)
        assert (name, in_train, data.class_names) == (split, None, ["angry", "happy", "sad"])
        assert np.array_equal(data.images[rows], next(batches.iterate(100))[0])
    assert "--split val" in refusal(load_one, tmp_path, "test")


def test_a_split_folder_is_measured_whole_and_compared_with_train(tmp_path):
    draw_folder(tmp_path / "train", {"angry": 3, "sad": 3}, 8)
    for split in ("valid", "test"):
        draw_folder(tmp_path / split, {"happy": 2}, 8)
        shutil.copy(tmp_path / "train" / "sad" / "sad_000.png", tmp_path / split / "happy" / "again.png")
    assert load_one(tmp_path, "train")[3] is None
    for split, name in (("val", "valid"), ("test", "test")):
        data, rows, shown, in_train = load_one(tmp_path, split)
        assert (shown, rows.tolist(), in_train.tolist()) == (split, [0, 1, 2], [True, False, False])
        assert data.folder == tmp_path / name
        assert data.notes == [f"warning: 1 of 3 images in {name}/ are also in train/"]
    (tmp_path / "train" / "sad" / "bad.png").write_bytes(b"x")
    assert load_one(tmp_path, "test", strict=True)[3].tolist() == [True, False, False]  # train/ is not measured
    (tmp_path / "train" / "empty").mkdir()
    data, _, _, in_train = load_one(tmp_path, "test")
    assert in_train is None and "were not looked for" in data.notes[0]
    shutil.rmtree(tmp_path / "train")
    assert load_one(tmp_path, "test")[0].notes == []
    assert "--split test" in refusal(load_one, tmp_path, "train")


def test_a_folder_of_class_folders_is_used_as_it_is(tmp_path):
    data, rows, name, in_train = load_one(draw_folder(tmp_path / "faces", {"angry": 2, "sad": 1}, 8), "test")
    assert (rows.tolist(), name, in_train) == ([0, 1, 2], "faces", None) and data.labels.tolist() == [0, 0, 2]
    for folder in ("missing", "."):
        refusal(load_one, tmp_path / folder, "test")
