"""What is wrong with a folder of images: unreadable and blank ones, duplicates, also across splits or classes.

Example::

    found = audit("fer2013")                    # a dict of plain values, for audit.json
    print(format_audit(found))
"""

import hashlib
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from data import describe_others, find_classes, find_splits, walk_images
from errors import InputError, printable
from models import InputSpec
from preprocessing import in_chunks, read_image
from reports import plot_grid

SIDE = 32  # pixels of the gray thumbnails that are compared
BITS = 6  # of 64 in which the hashes of near-identical images may differ
CORRELATION = 0.99  # of the pixels of near-identical images, at least
MEMBERS = 8  # of a group that are compared with others that share two bytes: enough of a thousand that are near
BLANK = 2.0  # standard deviation of the gray values, of 255, below which an image shows nothing


class File(NamedTuple):
    path: str
    split: str
    class_name: str


def list_files(folder: str | Path) -> tuple[list[File], dict[str, dict[str, int]]]:
    """Every image, and how many each class of each split has, which may be none.

    A folder that holds no splits is one of its own name.
    """
    files, counts = [], {}
    for split, place in (find_splits(folder) or {Path(folder).resolve().name: Path(folder)}).items():
        counts[split] = {}
        for class_name in find_classes(place):
            own = [File(entry.path, split, class_name) for entry in walk_images(place / class_name)]
            counts[split][class_name] = len(own)
            files += own
    if not files:
        raise InputError(f"{folder} holds no images in class folders")
    return files, counts


def read_thumbnail(path: str) -> tuple[str, str, np.ndarray] | str:
    """(hash of the bytes, "mode width x height", gray uint8 (SIDE, SIDE)), or why the image can't be read."""
    try:
        gray = read_image(path, InputSpec(image_size=SIDE))[0]
        digest = hashlib.blake2b(Path(path).read_bytes(), digest_size=16).hexdigest()
        with Image.open(path) as image:  # of a format that read_image accepts
            return digest, f"{image.mode} {image.width} x {image.height}", gray
    except (InputError, OSError) as error:
        return str(error)


def hash_images(gray: np.ndarray) -> np.ndarray:
    """uint8 (N, SIDE, SIDE) -> uint8 (N, 8): 64 bits, 1 if a part of the image is brighter than its left neighbor.

    The difference hash of Krawetz 2013, on means over parts of 9 x 8. It changes little when an image is saved again
    in another size, format or brightness. A byte has its bits from a diagonal, so that they say different things.
    """
    columns = np.linspace(0, SIDE, 10).round().astype(int)
    means = np.add.reduceat(gray, np.arange(0, SIDE, SIDE // 8), axis=1, dtype=np.float32)
    means = np.add.reduceat(means, columns[:-1], axis=2) / np.diff(columns)
    is_brighter, rows = means[:, :, 1:] > means[:, :, :-1], np.arange(8)
    return np.packbits(is_brighter[:, rows, (rows + rows[:, None]) % 8], axis=2)[..., 0]


def group_near(gray: np.ndarray) -> np.ndarray:
    """int64 (N,): equal numbers for images uint8 (N, SIDE, SIDE) that are the same except for small changes.

    Two images are if few bits of their hashes differ and their pixels correlate, which brightness and contrast leave
    alone; a group also holds what is connected through others. Hashes that differ in at most 6 bits have at least two
    of their 8 bytes in common, so only images that share two bytes are compared.
    """
    groups, parts = np.arange(len(gray)), np.array_split(gray, 1 + len(gray) // 4096)
    hashes = np.concatenate([hash_images(part) for part in parts])
    mean, std = np.array([(image.mean(), image.std()) for image in gray], np.float32).reshape(-1, 2).T
    images = _Images(gray.reshape(-1, SIDE * SIDE), mean, std, hashes)
    for pair in tqdm(list(combinations(range(8), 2)), desc="comparing", unit="pass", leave=False, disable=None):
        bytes_in_order = [*pair, *(byte for byte in range(8) if byte not in pair)]
        order = np.lexsort([hashes[:, byte] for byte in reversed(bytes_in_order)])
        keys = hashes[order, pair[0]].astype(int) << 8 | hashes[order, pair[1]]
        _compare(images, groups, order, keys, pair[1], steps=1)  # most of what is near is next to one another
        by_group = np.lexsort([groups[order], keys])
        is_first = np.diff(keys[by_group] * len(gray) + groups[order][by_group], prepend=-1) != 0
        place = np.arange(len(order))
        few = np.sort(by_group[place - np.maximum.accumulate(place * is_first) < MEMBERS])
        _compare(images, groups, order[few], keys[few], pair[1], steps=len(few))
    return groups


class _Images(NamedTuple):
    pixels: np.ndarray  # uint8 (N, SIDE * SIDE)
    mean: np.ndarray  # float32 (N,)
    std: np.ndarray  # float32 (N,)
    hashes: np.ndarray  # uint8 (N, 8)

    def correlation(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """float32 (n,) of the images at positions `one` (n,) with those at `other`."""
        products = np.einsum("nd,nd->n", *(self.pixels[rows].astype(np.float32) for rows in (one, other)))
        covariance = products / self.pixels.shape[1] - self.mean[one] * self.mean[other]
        return covariance / np.maximum(self.std[one] * self.std[other], 1e-6)


def _compare(images: _Images, groups: np.ndarray, order: np.ndarray, keys: np.ndarray, byte: int, steps: int) -> None:
    """Joins, in place, the groups of images in `order` that are near, have one key and lie at most `steps` apart.

    `byte` is the second of the two that the key is made of.
    """
    starts = np.arange(len(order))
    for step in range(1, steps + 1):
        starts = starts[: np.searchsorted(starts, len(order) - step)]
        starts = starts[keys[starts] == keys[starts + step]]
        if len(starts) == 0:
            return
        left, right = order[starts], order[starts + step]
        left, right = (side[groups[left] != groups[right]] for side in (left, right))
        differences = images.hashes[left] ^ images.hashes[right]
        is_new = (differences[:, : byte + 1] == 0).sum(1) == 2  # else an earlier pass has compared the two
        is_near = is_new & (np.unpackbits(differences, axis=1).sum(1) <= BITS)
        left, right = left[is_near], right[is_near]
        for first in range(0, len(left), 4096):
            one, other = left[first : first + 4096], right[first : first + 4096]
            near = images.correlation(one, other) >= CORRELATION
            _join(groups, one[near], other[near])


def _join(groups: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
    """Gives the groups of each pair one number, in place: the lowest of all that are connected."""
    while len(left):
        low = np.minimum(groups[left], groups[right])
        new = np.arange(len(groups))
        np.minimum.at(new, groups[left], low)
        np.minimum.at(new, groups[right], low)
        groups[:] = new[groups]
        is_apart = groups[left] != groups[right]
        left, right = left[is_apart], right[is_apart]


def find_groups(digests: list[str], gray: np.ndarray) -> np.ndarray:
    """int64 (N,): equal numbers for identical files and near-identical images; a blank image is near to none."""
    firsts, same = np.unique(digests, return_index=True, return_inverse=True)[1:]
    is_seen = np.flatnonzero([gray[row].std() >= BLANK for row in firsts])  # of identical files one is compared
    groups = np.arange(len(firsts))
    groups[is_seen] = is_seen[group_near(gray[firsts[is_seen]])]
    return groups[same]


def count_leaks(files: list[File], digests: list[str], groups: np.ndarray, split: str) -> dict[str, int]:
    """How many images of `split` are also in train, or in a group with one that is there."""
    counts = {}
    for kind, keys in (("identical", digests), ("near", groups)):
        train = {key for file, key in zip(files, keys, strict=True) if file.split == "train"}
        counts[kind] = sum(file.split == split and key in train for file, key in zip(files, keys, strict=True))
    return counts


def describe_group(files: list[File], kind: str) -> dict:
    return {
        "kind": kind,
        "splits": sorted({file.split for file in files}),
        "classes": sorted({file.class_name for file in files}),
        "files": [file.path for file in files],
        "labels": [f"{file.split}/{file.class_name}" for file in files],
    }


def audit(folder: str | Path) -> dict:
    """All that is found, as plain values; format_audit makes a report of it.

    "leaks" counts the images of val and test that are also in train: "identical" byte for byte, "near" those in a
    group with an image of train. A group holds all that is near to one another, also through others; the worst first.
    Raises InputError for a folder without images.
    """
    listed, counts = list_files(folder)
    results = []
    with tqdm(total=len(listed), desc="reading", unit="img", leave=False, disable=None) as bar:
        for _, part in in_chunks([file.path for file in listed], lambda paths: list(map(read_thumbnail, paths)), 128):
            results += part
            bar.update(len(part))
    readable = [row for row, result in enumerate(results) if not isinstance(result, str)]
    files, digests = [listed[row] for row in readable], [results[row][0] for row in readable]
    gray = np.array([results[row][2] for row in readable], np.uint8).reshape(-1, SIDE, SIDE)
    numbers, members, groups = find_groups(digests, gray), defaultdict(list), []
    for row, number in enumerate(numbers):
        members[number].append(row)
    for rows in members.values():
        if len(rows) == 1:
            continue
        is_near = len({digests[row] for row in rows}) > 1
        groups.append(describe_group([files[row] for row in rows], "near" if is_near else "identical"))
    groups.sort(key=lambda group: (-len(group["splits"]), -len(group["classes"]), -len(group["files"])))
    others = [split for split in counts if split != "train"] if "train" in counts else []
    return {
        "folder": str(folder),
        "count": len(listed),
        "counts": counts,
        "not read": describe_others(folder),
        "kinds": dict(Counter(results[row][1] for row in readable).most_common()),
        "unreadable": [
            {"file": file.path, "reason": result}
            for file, result in zip(listed, results, strict=True)
            if isinstance(result, str)
        ],
        "blank": [file.path for file, image in zip(files, gray, strict=True) if image.std() < BLANK],
        "leaks": {split: count_leaks(files, digests, numbers, split) for split in others},
        "duplicates": len(digests) - len(set(digests)),
        "groups": groups,
    }


def describe_balance(counts: dict[str, dict[str, int]]) -> list[str]:
    lines = []
    for split, classes in counts.items():
        total, most, least = sum(classes.values()), max(classes.values()), min(classes.values())
        shares = ", ".join(f"{name} {count:,} ({100 * count / max(1, total):.1f}%)" for name, count in classes.items())
        ratio = ""
        if not least:
            ratio = f"; without images: {', '.join(name for name, count in classes.items() if not count)}"
        elif most > 1.05 * least:
            ratio = f"; the largest class has {most / least:.1f} times the images of the smallest"
        lines.append(f"{printable(split)}/: {total:,} images: {shares}{ratio}")
    return lines


def mix_labels(labels: list[str]) -> list[int]:
    """Positions, such that one of every label comes before the second of any."""
    seen, ranks = Counter(), []
    for label in labels:
        ranks.append(seen[label])
        seen[label] += 1
    return sorted(range(len(labels)), key=ranks.__getitem__)


def name_files(group: dict, most: int = 4) -> str:
    files = [group["files"][position] for position in mix_labels(group["labels"])]
    sign = {"identical": " = ", "near": " ~ "}[group["kind"]]
    return sign.join(files[:most] + ["..."] * (len(files) > most))


def format_audit(found: dict, most: int = 20) -> str:
    """The report as text; of long lists the first `most`."""

    def section(title: str, items: list[str]) -> list[str]:
        more = [f"  ... and {len(items) - most:,} more, in audit.json"] if len(items) > most else []
        return [f"{title}: {len(items):,}", *(f"  {printable(item)}" for item in items[:most]), *more]

    groups = found["groups"]
    kinds = [f"{count:,} {kind}" for kind, count in found["kinds"].items()]
    others = f" and {len(kinds) - 8:,} others" if len(kinds) > 8 else ""
    lines = [*describe_balance(found["counts"]), "", f"sizes and modes: {', '.join(kinds[:8])}{others}"]
    lines += [f"not read: {found['not read']}"] * bool(found["not read"])
    lines += section("unreadable", [row["reason"] for row in found["unreadable"]])
    lines += section("blank", found["blank"])
    for split, count in found["leaks"].items():
        lines.append(
            f"{split}/ images that are also in train/: {count['near']:,}, of which {count['identical']:,} byte for byte"
        )
    lines.append(f"duplicates, byte for byte: {found['duplicates']:,}")
    for kind in ("identical", "near"):
        sizes = [len(group["files"]) for group in groups if group["kind"] == kind]
        name = "near-identical images, with their duplicates" if kind == "near" else "identical images"
        lines.append(f"groups of {name}: {len(sizes):,}, of {sum(sizes):,} images")
    lines += section("groups across splits", [name_files(group) for group in groups if len(group["splits"]) > 1])
    conflicts = [name_files(group) for group in groups if len(group["classes"]) > 1]
    lines += section("groups under more than one label", conflicts)
    return "\n".join(lines) + "\n"


def draw_groups(found: dict, path: Path, *, rows: int = 12, columns: int = 6) -> None:
    """The worst groups of duplicates, a row each, with split and class above each image; every label comes first."""
    chosen = []
    for group in found["groups"][:rows]:
        shown = mix_labels(group["labels"])[:columns]
        images = [read_image(group["files"][position], InputSpec(image_size=96))[0] for position in shown]
        texts = [printable(group["labels"][position]) for position in shown]
        chosen.append([(image, text, "black") for image, text in zip(images, texts, strict=True)])
    name = printable(Path(found["folder"]).resolve().name)
    plot_grid(chosen, path, title=f"The worst groups of duplicates in {name}")
