"""What is wrong with a folder of images: unreadable and blank ones, duplicates, also across splits or classes.

Example::

    found = audit("fer2013")                    # a dict of plain values, for audit.json
    print(format_audit(found))
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
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
    """uint8 (N, SIDE, SIDE) -> float32 (N, 64): 1 if a part of the image is brighter than its left neighbor, else -1.

    The difference hash of Krawetz 2013, on means over parts of 9 x 8. It changes little when an image is saved again
    in another size, format or brightness.
    """
    columns = np.linspace(0, SIDE, 10).round().astype(int)
    means = np.add.reduceat(gray.astype(np.float32), np.arange(0, SIDE, SIDE // 8), axis=1)
    means = np.add.reduceat(means, columns[:-1], axis=2) / np.diff(columns)
    return np.where(means[:, :, 1:] > means[:, :, :-1], np.float32(1), np.float32(-1)).reshape(-1, 64)


def find_near_pairs(gray: np.ndarray) -> Iterator[tuple[int, int]]:
    """Positions (i, j), i < j, of images uint8 (N, SIDE, SIDE) that are the same except for small changes.

    Images whose hashes differ in few bits are compared pixel by pixel: by correlation, which brightness and contrast
    leave alone. All pairs of hashes are compared, N * N / 2 of them.
    """
    hashes = hash_images(gray)
    flat = gray.reshape(-1, SIDE * SIDE).astype(np.float32)
    flat -= flat.mean(1, keepdims=True)
    flat /= np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)
    size = 1 + 2**24 // max(1, len(hashes))
    starts = range(0, len(hashes), size)
    for start in tqdm(starts, desc="comparing", unit="block", leave=False, disable=None):
        agreement = hashes[start : start + size] @ hashes[start:].T  # equal bits minus different ones
        rows, columns = np.nonzero(np.triu(agreement >= 64 - 2 * BITS, k=1))
        for first in range(0, len(rows), 2**16):
            left, right = rows[first : first + 2**16] + start, columns[first : first + 2**16] + start
            near = np.einsum("nd,nd->n", flat[left], flat[right]) >= CORRELATION
            yield from zip(left[near].tolist(), right[near].tolist(), strict=True)


def connect(pairs: Iterable[tuple[int, int]], count: int) -> list[list[int]]:
    """The connected components, of two nodes or more, of the graph of nodes 0 to `count` - 1 with the edges `pairs`."""
    parents = list(range(count))

    def find_root(node: int) -> int:
        while parents[node] != node:
            parents[node] = node = parents[parents[node]]
        return node

    for one, other in pairs:
        parents[find_root(other)] = find_root(one)
    members = defaultdict(list)
    for node in range(count):
        members[find_root(node)].append(node)
    return [nodes for nodes in members.values() if len(nodes) > 1]


def pair_duplicates(digests: list[str], gray: np.ndarray) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Pairs of positions of (identical files, near-identical images), of which one of identical files is compared."""
    same = defaultdict(list)
    for position, digest in enumerate(digests):
        same[digest].append(position)
    identical = [(members[0], other) for members in same.values() for other in members[1:]]
    firsts = [members[0] for members in same.values() if gray[members[0]].std() >= BLANK]  # nothing is near to all
    near = [(firsts[one], firsts[other]) for one, other in find_near_pairs(gray[np.array(firsts, int)])]
    return identical, near


def count_leaks(files: list[File], digests: list[str], near_pairs: list[tuple[int, int]], split: str) -> dict[str, int]:
    """How many images of `split` are also in train, or near one that is there."""
    train = {digest for file, digest in zip(files, digests, strict=True) if file.split == "train"}
    both_ways = [(digests[one], digests[other]) for pair in near_pairs for one, other in (pair, pair[::-1])]
    near = train | {one for one, other in both_ways if other in train}
    own = [digest for file, digest in zip(files, digests, strict=True) if file.split == split]
    return {"identical": sum(digest in train for digest in own), "near": sum(digest in near for digest in own)}


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

    "leaks" counts the images of val and test that are also in train: "identical" byte for byte, "near" those and the
    near-identical ones. A group holds all that is near to one another, also through others; the worst group is first.
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
    identical_pairs, near_pairs = pair_duplicates(digests, gray)
    groups = []
    for rows in connect(identical_pairs + near_pairs, len(files)):
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
        "leaks": {split: count_leaks(files, digests, near_pairs, split) for split in others},
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
