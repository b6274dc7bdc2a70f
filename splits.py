"""Train, validation and test: how images are divided, duplicates between them, and batches."""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from data import SAMPLE_PREFIX, SAMPLE_SET, FolderImages, find_splits, hash_pixels, is_sample_set
from errors import InputError, printable
from models import InputSpec, ModelInfo

SAMPLERS = ("shuffle", "balanced")


def split_train_val(
    labels: np.ndarray, digests: list[str], fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Positions (train, val), each sorted: a share of every class for validation, duplicates on one side.

    A group of duplicates counts to the class of its first. A class with only one group stays in train.
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


def hash_split(*parts: tuple[FolderImages, np.ndarray]) -> str:
    """A hash over the pixels and labels of (images, rows) of each split, by which --resume knows them again."""
    content = [[[data.digests[row] for row in rows], data.labels[rows].tolist()] for data, rows in parts]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def shard(start: int, stop: int, rank: int, world_size: int) -> tuple[int, int]:
    """This rank's part of the positions from `start` to `stop`; parts differ in size by one at most."""
    count = stop - start
    return start + rank * count // world_size, start + (rank + 1) * count // world_size


def batch_bounds(count: int, batch_size: int, world_size: int = 1) -> list[tuple[int, int]]:
    """(start, stop) of the batches of `count` images.

    A last batch with fewer than two images per process joins the one before it: batch-norm needs two.
    """
    starts = list(range(0, count, batch_size))
    if len(starts) > 1 and count - starts[-1] < 2 * world_size:
        starts.pop()
    return list(zip(starts, [*starts[1:], count], strict=True))


class Batches:
    """The images `rows` of `data` as batches on `device`: `for images, labels in batches.iterate(64)`.

    images uint8 (n, C, H, W), labels int64 (n,). On CUDA the images are moved to the device once if they take less
    than a quarter of its free memory; otherwise they are read from the memory map, batch by batch.
    """

    def __init__(self, data: FolderImages, rows: np.ndarray, device: torch.device):
        self.device, self.labels = device, torch.from_numpy(data.labels[rows]).to(device)
        self._images, self._rows, self._resident = np.asarray(data.images), np.asarray(rows), None
        shape = (len(rows), *self._images.shape[1:])
        if device.type == "cuda" and math.prod(shape) < torch.cuda.mem_get_info(device)[0] / 4:
            self._resident = torch.empty(shape, dtype=torch.uint8, device=device)
            for start, stop in batch_bounds(len(rows), 4096):  # so that memory never holds the whole set
                self._resident[start:stop] = torch.from_numpy(self._images[self._rows[start:stop]])

    def __len__(self) -> int:
        return len(self._rows)

    def class_counts(self, num_classes: int) -> list[int]:
        return torch.bincount(self.labels, minlength=num_classes).tolist()

    def iterate(
        self, batch_size: int, order: torch.Tensor | None = None, *, rank: int = 0, world_size: int = 1
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yields (images, labels) of this rank's shard of each batch.

        `order` (int64) are positions in this object; by default each once, in sequence.
        """
        order = torch.arange(len(self)) if order is None else order
        rows, order = order.numpy(), order.to(self.device)
        for bounds in batch_bounds(len(order), batch_size, world_size):
            start, stop = shard(*bounds, rank, world_size)
            if self._resident is None:
                images = torch.from_numpy(self._images[self._rows[rows[start:stop]]]).to(self.device)
            else:
                images = self._resident[order[start:stop]]
            yield images, self.labels[order[start:stop]]


def draw_order(labels: torch.Tensor, sampler: str, *, seed: int) -> torch.Tensor:
    """Positions int64 (N,) for one epoch: a permutation ("shuffle"), or draws that give every class the same chance
    ("balanced"). `labels` int64 (N,)."""
    labels, generator = labels.cpu(), torch.Generator().manual_seed(seed)
    if sampler == "shuffle":
        return torch.randperm(len(labels), generator=generator)
    counts = torch.bincount(labels).float()
    return torch.multinomial(1 / counts[labels], len(labels), replacement=True, generator=generator)


@dataclass
class Splits:
    """What a training run works on."""

    train: Batches
    val: Batches
    test: Batches | None
    class_names: list[str]
    spec: InputSpec
    trained_on: str
    split_hash: str
    val_source: str  # where validation came from
    in_train: np.ndarray | None  # bool (N,): which images of test (of val, without a test/) are also in train
    notes: list[str]  # lines for the user


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
    """Reads train/, then val/ or a share of train/, and test/ if there is one; the classes are train's.

    The spec of a model with three channels becomes gray if every training image is. Raises InputError for folders
    that are missing, empty or of other classes, and for too few images.
    """
    folders = find_splits(data_dir)
    if "train" not in folders:
        raise InputError(f"no folder {Path(data_dir) / 'train'}: --data-dir must hold train/ with a folder per class")
    options = {"cache_dir": cache_dir, "strict": strict}
    train = FolderImages(folders["train"], spec, **options)
    if len(train.class_names) < 2:
        raise InputError(f"{train.folder} holds only the class {train.class_names[0]}; two are the least")
    if spec.channels == 3 and train.images.shape[1] == 1:
        spec = replace(spec, gray=True)
    options["class_names"] = train.class_names
    val, test = (FolderImages(folders[name], spec, **options) if name in folders else None for name in ("val", "test"))
    if val:
        train_rows, val_rows = np.arange(len(train)), np.arange(len(val))
    else:
        train_rows, val_rows = split_train_val(train.labels, train.digests, val_fraction, seed)
    if len(val_rows) == 0 or len(train_rows) < 2:
        count = f"{len(train)} images in {train.folder}, {len(set(train.digests))} of them different,"
        raise InputError(f"{count} are too few to train and validate on")
    return Splits(
        train=Batches(train, train_rows, device),
        val=Batches(val or train, val_rows, device),
        test=Batches(test, np.arange(len(test)), device) if test else None,
        class_names=train.class_names,
        spec=spec,
        trained_on=SAMPLE_SET if is_sample_set(train.paths) else printable(Path(data_dir).resolve().name),
        split_hash=hash_split((train, train_rows), (val or train, val_rows)),
        val_source=f"{val.folder.name}/" if val else "from train/",
        in_train=find_duplicates(train, test or val) if test or val else None,
        notes=_notes_on(train, val, test),
    )


def _notes_on(train: FolderImages, val: FolderImages | None, test: FolderImages | None) -> list[str]:
    parts = [part for part in (train, val, test) if part]
    notes = [note for part in parts for note in part.notes] + warn_of_numbers(train) + warn_of_copies(train)
    if not is_sample_set(train.paths):
        notes += [note for part in parts for note in warn_of_drawings(part)]
    for part, other in ((val, train), (test, train), (test, val)):
        if part and other:
            notes += warn_of_duplicates(part, find_duplicates(other, part), other)
    return notes


def load_split(
    data_dir: str | Path,
    split: str,
    info: ModelInfo,
    *,
    val_fraction: float,
    seed: int,
    cache_dir: str | Path | None = None,
    strict: bool = False,
) -> tuple[FolderImages, np.ndarray, str, np.ndarray | None]:
    """(images, rows of them that are the split, its name, which rows are also in train) to measure a model on.

    Without a val/, "val" and "train" are the shares of train/ by `val_fraction` and `seed`. A folder that holds class
    folders instead of splits is used as it is, under its own name. Raises InputError for a split that is missing.
    """
    folders = find_splits(data_dir)
    is_share = split != "test" and "train" in folders and "val" not in folders
    if folders and not is_share and split not in folders:
        raise InputError(f"no folder {Path(data_dir) / split}; pass --split {'test' if 'test' in folders else 'val'}")
    folder = folders["train" if is_share else split] if folders else data_dir
    data = FolderImages(folder, info.input_spec, class_names=info.class_names, cache_dir=cache_dir, strict=strict)
    rows, in_train = np.arange(len(data)), None
    if is_share:
        train_rows, val_rows = split_train_val(data.labels, data.digests, val_fraction, seed)
        if len(val_rows) == 0:
            raise InputError(f"{len(data)} images in {data.folder} are too few for a validation share")
        rows = val_rows if split == "val" else train_rows
    elif split != "train" and "train" in folders:
        try:
            train = FolderImages(folders["train"], info.input_spec, cache_dir=cache_dir)
            in_train = find_duplicates(train, data)
            data.notes += warn_of_duplicates(data, in_train, train)
        except InputError as error:  # about train/, which is not what is measured
            data.notes.append(f"duplicates of training images were not looked for: {error}")
    return data, rows, split if folders else printable(Path(data_dir).resolve().name), in_train


def find_duplicates(train: FolderImages, other: FolderImages) -> np.ndarray:
    """bool (N,), True for an image of `other` that is also in `train`, pixel for pixel."""
    channels = max(train.images.shape[1], other.images.shape[1])
    known = set(_digests_with(channels, train))
    return np.array([digest in known for digest in _digests_with(channels, other)])


def _digests_with(channels: int, data: FolderImages) -> list[str]:
    """The digests as they would be with `channels`: a gray set is stored with one, and is compared with color."""
    if data.images.shape[1] == channels:
        return data.digests
    return [hash_pixels(np.repeat(image, channels, 0)) for image in data.images]


def warn_of_numbers(part: FolderImages) -> list[str]:
    """A line if class folders have numbers for names."""
    numbers = [name for name in part.class_names if name.isdecimal()]
    if not numbers:
        return []
    first = printable(part.folder / numbers[0])
    return [
        f"warning: class folders are called {', '.join(numbers[:8])}: numbers are no names, and predictions will show "
        f"them; rename each to its emotion, for example {first} to {printable(part.folder / 'angry')}"
    ]


def warn_of_copies(part: FolderImages) -> list[str]:
    """A line for each class whose images are all the same one."""
    lines = []
    for label, name in enumerate(part.class_names):
        rows = np.flatnonzero(part.labels == label)
        if len(rows) > 1 and len({part.digests[row] for row in rows}) == 1:
            folder = printable(part.folder / name)
            lines.append(f"warning: the {len(rows):,} images in {folder} are all the same one: add others")
    return lines


def warn_of_drawings(part: FolderImages) -> list[str]:
    count = sum(is_sample_set([path]) for path in part.paths)
    if count == 0:
        return []
    return [
        f"warning: {count:,} of {len(part):,} images in {printable(part.folder)} are drawings of the sample set "
        f"({SAMPLE_PREFIX}*); move them elsewhere, or your own into a folder of their own"
    ]


def warn_of_duplicates(part: FolderImages, duplicates: np.ndarray, other: FolderImages) -> list[str]:
    if not duplicates.any():
        return []
    name, other_name = printable(part.folder.name), printable(other.folder.name)
    return [f"warning: {duplicates.sum():,} of {len(part):,} images in {name}/ are also in {other_name}/"]
