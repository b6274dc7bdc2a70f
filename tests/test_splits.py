import random
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import draw_folder, draw_picture
from hypothesis import given, settings
from hypothesis import strategies as st

from data import SAMPLE_SET, FolderImages
from errors import InputError
from models import InputSpec
from splits import Batches, batch_bounds, draw_order, hash_split, load_splits, split_train_val

GRAY = InputSpec(image_size=8)
COLOUR = InputSpec(8, 3, (0.5,) * 3, (0.5,) * 3)
CPU = torch.device("cpu")

PICTURES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 30)), min_size=1, max_size=80)
FRACTIONS = st.floats(0.01, 0.9)


def unzip(pictures):
    """(labels, digests) of drawn pairs."""
    return np.array([label for label, _ in pictures]), [f"{digest:02}" for _, digest in pictures]


@settings(deadline=None)
@given(PICTURES, FRACTIONS, st.integers(0, 5))
def test_split_covers_everything_once_and_keeps_copies_together(pictures, fraction, seed):
    labels, digests = unzip(pictures)
    train, val = split_train_val(labels, digests, fraction, seed)
    assert sorted([*train, *val]) == list(range(len(labels)))
    assert train.tolist() == sorted(train) and val.tolist() == sorted(val)
    assert {digests[row] for row in train}.isdisjoint(digests[row] for row in val)


@settings(deadline=None)
@given(PICTURES, FRACTIONS, st.integers(0, 5))
def test_split_has_every_class_with_two_groups_on_both_sides(pictures, fraction, seed):
    labels, digests = unzip(pictures)
    digests = [f"{label}-{digest}" for label, digest in zip(labels, digests, strict=True)]  # no conflicting labels
    train, val = split_train_val(labels, digests, fraction, seed)
    for label in set(labels.tolist()):
        groups = {digest for digest, own in zip(digests, labels, strict=True) if own == label}
        assert (labels[train] == label).any()
        assert (labels[val] == label).any() == (len(groups) > 1)


@settings(deadline=None)
@given(PICTURES, FRACTIONS, st.randoms(use_true_random=False))
def test_split_does_not_depend_on_the_order_of_the_files(pictures, fraction, rng):
    pictures = [(label, 4 * digest + label) for label, digest in pictures]  # no conflicting labels
    shuffled = rng.sample(pictures, len(pictures))
    sides = []
    for version in (pictures, shuffled):
        labels, digests = unzip(version)
        _, val = split_train_val(labels, digests, fraction, 3)
        sides.append(Counter(digests[row] for row in val))
    assert sides[0] == sides[1]


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


def test_copies_with_conflicting_labels_stay_on_one_side():
    labels = np.array([0, 1] * 20)
    digests = [str(row // 2) for row in range(40)]  # every picture stands in both classes
    for seed in range(5):
        train, val = split_train_val(labels, digests, 0.3, seed)
        assert {digests[row] for row in train}.isdisjoint(digests[row] for row in val) and len(val) == 12


def test_groups_larger_than_the_share_still_validate():
    labels, digests = np.zeros(20, int), ["a"] * 8 + ["b"] * 12
    train, val = split_train_val(labels, digests, 0.1, 0)
    assert (len(train), len(val)) == (12, 8)  # the smaller of the two


# Batches


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(2, 64))
def test_bounds_cover_everything_once_without_a_lone_picture(count, batch_size):
    bounds = batch_bounds(count, batch_size)
    rows = [row for start, stop in bounds for row in range(start, stop)]
    assert rows == list(range(count))
    sizes = [stop - start for start, stop in bounds]
    assert all(size == batch_size for size in sizes[:-1])
    assert 2 <= sizes[-1] <= batch_size + 1 or count == 1


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 64), st.integers(1, 8))
def test_bounds_with_more_to_the_last_batch(count, batch_size, least):
    bounds = batch_bounds(count, batch_size, least)
    assert [row for start, stop in bounds for row in range(start, stop)] == list(range(count))
    assert bounds[-1][1] - bounds[-1][0] >= min(least, batch_size, count)


def test_bounds_by_hand():
    assert batch_bounds(10, 4) == [(0, 4), (4, 8), (8, 10)]
    assert batch_bounds(9, 4) == [(0, 4), (4, 9)]
    assert batch_bounds(8, 4) == [(0, 4), (4, 8)]
    assert batch_bounds(3, 4) == [(0, 3)] and batch_bounds(1, 4) == [(0, 1)]
    assert batch_bounds(10, 4, least=3) == [(0, 4), (4, 10)]


@pytest.fixture
def images(tmp_path):
    return FolderImages(draw_folder(tmp_path / "train", {"angry": 5, "happy": 9, "sad": 3}, 8), GRAY)


@pytest.mark.parametrize("batch_size", [2, 4, 8, 100])
def test_batches_serve_the_pictures_of_the_folder(images, batch_size):
    rows = np.array([16, 0, 3, 4, 9, 12, 1, 2, 8])
    batches = Batches(images, rows, CPU)
    served = list(batches.iterate(batch_size))
    assert len(batches) == 9 and len(served) == len(batches.bounds(batch_size))
    assert [len(labels) for _, labels in served] == [stop - start for start, stop in batches.bounds(batch_size)]
    pixels, labels = (torch.cat(parts) for parts in zip(*served, strict=True))
    assert pixels.dtype == torch.uint8 and labels.dtype == torch.int64
    assert np.array_equal(pixels.numpy(), images.images[rows]) and np.array_equal(labels.numpy(), images.labels[rows])


def test_batches_in_a_given_order(images):
    rows = np.arange(3, 15)
    batches, order = Batches(images, rows, CPU), torch.randperm(12, generator=torch.Generator().manual_seed(0))
    pixels, labels = (torch.cat(parts) for parts in zip(*batches.iterate(5, order), strict=True))
    assert np.array_equal(pixels.numpy(), images.images[rows[order.numpy()]])
    assert np.array_equal(labels.numpy(), images.labels[rows[order.numpy()]])
    twice = torch.tensor([0, 0, 0, 1])
    pixels, labels = (torch.cat(parts) for parts in zip(*batches.iterate(2, twice), strict=True))
    assert np.array_equal(pixels.numpy(), images.images[[3, 3, 3, 4]])


def test_batches_are_copies(images):
    batches = Batches(images, np.arange(17), CPU)
    before = np.array(images.images)
    for pixels, labels in batches.iterate(4):
        pixels.zero_(), labels.zero_()
    assert np.array_equal(images.images, before)
    assert np.array_equal(next(batches.iterate(17))[0].numpy(), before) and images.labels.sum() == 9 + 6


def test_class_counts_include_absent_classes(images):
    assert Batches(images, np.arange(17), CPU).class_counts(3) == [5, 9, 3]
    assert Batches(images, np.array([0, 16]), CPU).class_counts(5) == [1, 0, 1, 0, 0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_on_an_accelerator_are_those_of_the_cpu(images):
    rows, order = np.arange(2, 16), torch.randperm(14, generator=torch.Generator().manual_seed(0))
    for a, b in zip(
        Batches(images, rows, CPU).iterate(4, order),
        Batches(images, rows, torch.device("cuda")).iterate(4, order),
        strict=True,
    ):
        assert torch.equal(a[0], b[0].cpu()) and torch.equal(a[1], b[1].cpu())


def test_order_is_a_permutation_by_the_generator():
    labels = torch.tensor([0] * 50 + [1] * 5)
    draw = [draw_order(labels, balanced=False, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert all(sorted(order.tolist()) == list(range(55)) for order in draw)
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])


def test_balanced_order_draws_classes_alike():
    labels = torch.tensor([0] * 3000 + [2] * 300 + [3] * 30)  # there is no picture of class 1
    order = draw_order(labels, balanced=True, generator=torch.Generator().manual_seed(0))
    assert len(order) == 3330 and order.dtype == torch.int64
    counts = torch.bincount(labels[order], minlength=4).tolist()
    assert counts[1] == 0 and all(1000 < counts[label] < 1220 for label in (0, 2, 3))
    assert len(set(order[labels[order] == 3].tolist())) == 30
    again = draw_order(labels, balanced=True, generator=torch.Generator().manual_seed(0))
    assert torch.equal(order, again)


def test_hash_tells_every_change():
    base = (["a", "b", "c"], np.array([0, 1, 1]))
    versions = [
        (base, base),
        ((["a", "b", "d"], base[1]), base),
        ((base[0], np.array([0, 1, 0])), base),
        ((["b", "a", "c"], base[1]), base),
        ((["b", "a", "c"], np.array([1, 0, 1])), base),
        (base, (["c", "b", "a"], base[1])),
        ((base[0][:2], base[1][:2]), base),
        ((base[0] + base[0], np.tile(base[1], 2)),),
        (base,),
    ]
    hashes = [hash_split(*parts) for parts in versions]
    assert len(set(hashes)) == len(hashes)
    assert hashes[0] == hash_split((list("abc"), np.array([0, 1, 1], np.int32)), base)


# Folders to splits


def load(root, spec=GRAY, **options):
    return load_splits(root, spec, CPU, **{"val_fraction": 0.25, "seed": 0, **options})


def test_validation_is_a_share_of_train_where_there_is_no_folder(tmp_path):
    draw_folder(tmp_path / "faces" / "train", {"angry": 8, "sad": 12}, 8)
    splits = load(tmp_path / "faces")
    assert splits.train.class_counts(2) == [6, 9] and splits.val.class_counts(2) == [2, 3] and splits.test is None
    assert splits.where_val == "25% of train/" and splits.trained_on == "faces" and splits.notes == []
    pixels = [{images.numpy().tobytes() for images, _ in part.iterate(1)} for part in (splits.train, splits.val)]
    assert pixels[0].isdisjoint(pixels[1])
    assert load(tmp_path / "faces").split_hash == splits.split_hash
    assert load(tmp_path / "faces", seed=1).split_hash != splits.split_hash


def test_validation_and_test_folders_are_matched_by_name(tmp_path):
    draw_folder(tmp_path / "train", {"angry": 4, "happy": 4, "sad": 5}, 8)
    draw_folder(tmp_path / "val", {"sad": 2}, 8)
    draw_folder(tmp_path / "test", {"happy": 3, "sad": 1}, 8)
    splits = load(tmp_path)
    assert splits.where_val == "val/" and splits.class_names == ["angry", "happy", "sad"]
    counts = [part.class_counts(3) for part in (splits.train, splits.val, splits.test)]
    assert counts == [[4, 4, 5], [0, 0, 2], [0, 3, 1]]


@pytest.mark.parametrize("part", ["val", "test"])
def test_an_unknown_class_is_refused(part, tmp_path):
    draw_folder(tmp_path / "train", {"angry": 4, "sad": 5}, 8)
    draw_folder(tmp_path / part, {"angry": 2, "surprise": 1}, 8)
    with pytest.raises(InputError, match="surprise") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_network_of_three_channels_is_told_that_training_was_gray(tmp_path):
    draw_folder(tmp_path / "train", {"angry": 4, "sad": 5}, 8)
    draw_folder(tmp_path / "test", {"angry": 2}, 8, "RGB")
    splits = load(tmp_path, COLOUR)
    assert splits.spec.gray and splits.spec.channels == 3
    assert next(splits.test.iterate(2))[0].shape[1] == 1
    draw_picture(1, 8, "RGB").save(tmp_path / "train" / "sad" / "colour.png")
    splits = load(tmp_path, COLOUR)
    assert not splits.spec.gray and next(splits.test.iterate(2))[0].shape[1] == 3


def test_the_sample_set_is_named_as_such(tmp_path):
    root = draw_folder(tmp_path / "train", {"angry": 4, "sad": 4}, 8)
    for path in root.rglob("*.png"):
        path.rename(path.with_name("drawing_" + path.name))
    assert load(tmp_path).trained_on == SAMPLE_SET
    draw_picture(1, 8).save(root / "sad" / "photo.png")
    assert load(tmp_path).trained_on == tmp_path.name


def test_drawings_among_a_users_pictures_are_counted(tmp_path):
    draw_folder(tmp_path / "train", {"happy": 6, "sad": 6}, 16)
    draw_folder(tmp_path / "test", {"happy": 3, "sad": 3}, 16)
    for part, count in (("train", 5), ("test", 6)):
        for path in sorted((tmp_path / part).glob("*/*"))[:count]:
            path.rename(path.with_name(f"drawing_{path.name}"))
    splits = load(tmp_path)
    notes = [note for note in splits.notes if "sample set" in note]
    assert [note.partition(" (")[0] for note in notes] == [
        f"warning: 5 of 12 pictures in {tmp_path / 'train'} are drawings of the sample set",
        f"warning: 6 of 6 pictures in {tmp_path / 'test'} are drawings of the sample set",
    ]
    assert splits.trained_on == tmp_path.name


def test_notes_of_every_part_are_handed_on(tmp_path):
    for part in ("train", "val", "test"):
        root = draw_folder(tmp_path / part, {"angry": 2, "sad": 2}, 8)
        (root / "sad" / f"bad_{part}.png").write_bytes(b"x")
    notes = "\n".join(load(tmp_path).notes)
    assert all(f"bad_{part}.png" in notes for part in ("train", "val", "test"))
    with pytest.raises(InputError, match="bad_train"):
        load(tmp_path, strict=True)


@pytest.mark.parametrize(
    "counts, message", [({}, "class folders"), ({"sad": 5}, "only the class sad"), ({"sad": 1, "angry": 1}, "too few")]
)
def test_too_little_to_train_on(counts, message, tmp_path):
    (tmp_path / "train").mkdir()
    draw_folder(tmp_path / "train", counts, 8)
    with pytest.raises(InputError, match=message) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_train_folder_is_named(tmp_path):
    with pytest.raises(InputError) as caught:
        load(tmp_path)
    assert str(tmp_path / "train") in str(caught.value) and "--data-dir" in str(caught.value)
