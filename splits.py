"""Train, validation and test: how pictures are divided, and the batches that they are served in."""

import hashlib
import json
import math
import os
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from data import SAMPLE_PREFIX, SAMPLE_SET, FolderImages, hash_pixels, is_sample_set
from engine.distributed import ALONE, Group
from errors import InputError, printable
from models import InputSpec


def split_train_val(
    labels: np.ndarray, digests: list[str], fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Positions (train, val), each sorted: a share of every class for validation, equal pictures on one side.

    A group of equal pictures counts to the class of its first. A class with one group only stays in train.
    """
    groups: dict[str, list[int]] = {}
    for index, digest in enumerate(digests):
        groups.setdefault(digest, []).append(index)
    rng = np.random.default_rng(seed)
    is_val = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        own = [groups[digest] for digest in sorted(groups) if labels[groups[digest][0]] == label]
        if len(own) < 2:
            continue
        total = sum(map(len, own))
        target, count = min(max(1, round(fraction * total)), total - 1), 0
        for position in rng.permutation(len(own)):
            if count + len(own[position]) <= target:
                is_val[own[position]] = True
                count += len(own[position])
        if count == 0:  # every group is larger than the share
            is_val[min(own, key=len)] = True
    return np.flatnonzero(~is_val), np.flatnonzero(is_val)


def hash_split(*parts: tuple[list[str], np.ndarray]) -> str:
    """A hash over (digests, labels) of the parts of a split, to tell on resume that nothing has changed."""
    return hashlib.sha256(json.dumps([[d, np.asarray(y).tolist()] for d, y in parts]).encode()).hexdigest()[:16]


def batch_bounds(count: int, batch_size: int, least: int = 2) -> list[tuple[int, int]]:
    """(start, stop) of the batches of `count` pictures; a last one of fewer than `least` joins the one before."""
    starts = list(range(0, count, batch_size))
    if len(starts) > 1 and count - starts[-1] < least:
        starts.pop()
    return list(zip(starts, [*starts[1:], count], strict=True))


class Batches:
    """Pictures `indices` of `data` as batches on `device`: `for images, labels in batches.iterate(64)`.

    images uint8 (n, C, H, W), labels int64 (n,). On an accelerator the pictures are moved there once, where they
    take under a quarter of the memory that is free there; else they are read from the memory map, batch by batch.
    """

    def __init__(self, data: FolderImages, indices: np.ndarray, device: torch.device):
        self.device, self.labels = device, torch.from_numpy(data.labels[indices]).to(device)
        self._images, self._rows, self._resident = np.asarray(data.images), np.asarray(indices), None
        if device.type == "cuda":
            shape = (len(indices), *self._images.shape[1:])
            if math.prod(shape) < torch.cuda.mem_get_info(device)[0] / 4:
                self._resident = torch.empty(shape, dtype=torch.uint8, device=device)
                for start, stop in batch_bounds(len(indices), 4096):  # so that memory never holds the whole set
                    self._resident[start:stop] = torch.from_numpy(self._images[self._rows[start:stop]])

    def __len__(self) -> int:
        return len(self._rows)

    def bounds(self, batch_size: int, group: Group = ALONE) -> list[tuple[int, int]]:
        """(start, stop) of the batches of one epoch, of all processes together; each gets two pictures or more."""
        return batch_bounds(len(self), batch_size, 2 * group.size)

    def class_counts(self, num_classes: int) -> list[int]:
        counts = Counter(self.labels.tolist())
        return [counts[label] for label in range(num_classes)]

    def iterate(self, batch_size: int, order: torch.Tensor | None = None, group: Group = ALONE):
        """Yields batches in the order given (int64, positions in this object), or one after the other.

        Of each batch it is this process's share, where there are more in the group.
        """
        order = torch.arange(len(self)) if order is None else order
        rows, order = order.numpy(), order.to(self.device)
        for start, stop in batch_bounds(len(order), batch_size, 2 * group.size):
            start, stop = group.share(start, stop)
            if self._resident is None:
                images = torch.from_numpy(self._images[self._rows[rows[start:stop]]]).to(self.device)
            else:
                images = self._resident[order[start:stop]]
            yield images, self.labels[order[start:stop]]


def draw_order(labels: torch.Tensor, *, balanced: bool, generator: torch.Generator) -> torch.Tensor:
    """Positions for one epoch: a permutation, or with `balanced` draws that give every class the same chance."""
    labels = labels.cpu()
    if not balanced:
        return torch.randperm(len(labels), generator=generator)
    counts = torch.bincount(labels).float()
    return torch.multinomial(1 / counts[labels], len(labels), replacement=True, generator=generator)


@dataclass
class Splits:
    """What a training run works on. `where_val` says where validation came from, `notes` what the user should see.

    `copies` tells of "val" and "test", where these are folders, which pictures stand in train too: bool (N,).
    """

    train: Batches
    val: Batches
    test: Batches | None
    class_names: list[str]
    spec: InputSpec
    trained_on: str
    split_hash: str
    where_val: str
    notes: list[str]
    copies: dict[str, np.ndarray | None]


def load_splits(
    data_dir: str | Path,
    spec: InputSpec,
    device: torch.device,
    *,
    val_fraction: float,
    seed: int,
    cache_dir: str | Path | None = None,
    strict: bool = False,
) -> Splits:
    """Reads train/, then val/ or a share of train/, and test/ where there is one; the classes are train's.

    The spec of a network of three channels becomes gray where every training picture is. Raises InputError for
    folders that are missing, empty or of other classes, and for too few pictures.
    """
    root = Path(data_dir)
    if not os.path.isdir(root / "train"):
        raise InputError(f"no folder {root / 'train'}: --data-dir must hold train/ with a folder per class")
    options = {"cache_dir": cache_dir, "strict": strict}
    train = FolderImages(root / "train", spec, **options)
    if len(train.class_names) < 2:
        raise InputError(f"{root / 'train'} holds only the class {train.class_names[0]}; two are the least")
    if spec.channels == 3 and train.images.shape[1] == 1:
        spec = replace(spec, gray=True)
    options["class_names"] = train.class_names
    val, test = (
        FolderImages(root / name, spec, **options) if os.path.isdir(root / name) else None for name in ("val", "test")
    )
    if val:
        train_rows, val_rows = np.arange(len(train)), np.arange(len(val))
    else:
        train_rows, val_rows = split_train_val(train.labels, train.digests, val_fraction, seed)
    if len(val_rows) == 0 or len(train_rows) < 2:
        raise InputError(f"{len(train)} pictures in {root / 'train'} are too few to train and validate on")
    is_sample = is_sample_set(train.paths)
    parts = ((train, train_rows), (val or train, val_rows))
    copies = {"val": find_copies(train, val), "test": find_copies(train, test)}
    return Splits(
        train=Batches(train, train_rows, device),
        val=Batches(val or train, val_rows, device),
        test=Batches(test, np.arange(len(test)), device) if test else None,
        class_names=train.class_names,
        spec=spec,
        trained_on=SAMPLE_SET if is_sample else printable(root.resolve().name),
        split_hash=hash_split(*(([data.digests[row] for row in rows], data.labels[rows]) for data, rows in parts)),
        where_val="val/" if val else f"{100 * val_fraction:g}% of train/",
        notes=[note for part in (train, val, test) if part for note in part.notes]
        + ([] if is_sample else [note for part in (train, val, test) if part for note in warn_of_drawings(part)])
        + warn_of_copies(val, copies["val"], "train")
        + warn_of_copies(test, copies["test"], "train")
        + (warn_of_copies(test, find_copies(val, test), "val") if val else []),
        copies=copies,
    )


def find_copies(train: FolderImages, other: FolderImages | None) -> np.ndarray | None:
    """bool (N,), True where a picture of `other` stands in `train` too, pixel for pixel."""
    if other is None:
        return None
    channels = max(train.images.shape[1], other.images.shape[1])
    known = set(_digests_of(train, channels))
    return np.array([digest in known for digest in _digests_of(other, channels)])


def _digests_of(data: FolderImages, channels: int) -> list[str]:
    """The digests as they would be with so many channels: a gray set has one, and three in the company of colours."""
    if data.images.shape[1] == channels:
        return data.digests
    return [hash_pixels(np.repeat(picture, channels, 0)) for picture in data.images]


def warn_of_drawings(part: FolderImages) -> list[str]:
    count = sum(is_sample_set([path]) for path in part.paths)
    if count == 0:
        return []
    return [
        f"warning: {count:,} of {len(part):,} pictures in {printable(part.folder)} are drawings of the sample set "
        f"({SAMPLE_PREFIX}*); move them elsewhere, or your own into a folder of their own"
    ]


def warn_of_copies(part: FolderImages | None, copies: np.ndarray | None, other: str) -> list[str]:
    if part is None or not copies.any():
        return []
    where = printable(part.folder.name)
    return [f"warning: {copies.sum():,} of {len(part):,} pictures in {where}/ stand in {other}/ too"]
