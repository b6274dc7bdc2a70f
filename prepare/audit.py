"""What is wrong with a folder of pictures: unreadable and blank ones, copies, copies across splits or under two labels.

found = audit("fer2013")                    # a dict of plain values, for audit.json
print(format_audit(found))
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from data import find_classes, walk_pictures
from errors import InputError, printable
from models import InputSpec
from preprocessing import READABLE, in_chunks, read_image

SIDE = 32  # pixels of the gray copies that are compared
BITS = 6  # of 64 in which the hashes of near-identical pictures may differ
CORRELATION = 0.99  # of the pixels of near-identical pictures, at least
BLANK = 2.0  # standard deviation of the gray values, of 255, below which a picture shows nothing
SPLITS = ("train", "val", "test")


def list_files(folder: str | Path) -> tuple[list[tuple[str, str, str]], dict[str, dict[str, int]]]:
    """(path, split, class) of every picture, and how many each class of each split has, which may be none.

    A folder that holds no splits is one of its own name.
    """
    root = Path(folder)
    splits = {name: root / name for name in SPLITS if os.path.isdir(root / name)}
    files, counts = [], {}
    for split, place in (splits or {root.resolve().name: root}).items():
        counts[split] = {}
        for class_name in find_classes(place):
            own = [(entry.path, split, class_name) for entry in walk_pictures(place / class_name)]
            counts[split][class_name] = len(own)
            files += own
    if not files:
        raise InputError(f"{folder} holds no pictures in class folders")
    return files, counts


def _look_at(path: str) -> tuple[str, str, np.ndarray] | str:
    """(hash of the bytes, "mode width x height", gray uint8 (SIDE, SIDE)), or why the picture can't be read."""
    try:
        gray = read_image(path, InputSpec(image_size=SIDE))[0]
        content = Path(path).read_bytes()
        with Image.open(path, formats=READABLE) as image:
            kind = f"{image.mode} {image.width} x {image.height}"
        return hashlib.blake2b(content, digest_size=16).hexdigest(), kind, gray
    except (InputError, OSError) as error:
        return str(error)


def hash_pictures(gray: np.ndarray) -> np.ndarray:
    """uint8 (N, SIDE, SIDE) -> uint64 (N,): which of the neighbouring parts of a picture is brighter, as 64 bits.

    The difference hash of Krawetz 2013, on means over parts of 9 x 8. It changes little when a picture is saved again
    in another size, format or brightness.
    """
    columns = np.linspace(0, SIDE, 10).round().astype(int)
    means = np.add.reduceat(gray.astype(np.float32), np.arange(0, SIDE, SIDE // 8), axis=1)
    means = np.add.reduceat(means, columns[:-1], axis=2) / np.diff(columns)
    bits = means[:, :, 1:] > means[:, :, :-1]
    return np.packbits(bits.reshape(len(gray), 64), axis=1).view(np.uint64)[:, 0]


def _count_bits(values: np.ndarray) -> np.ndarray:
    if hasattr(np, "bitwise_count"):  # numpy 2
        return np.bitwise_count(values)
    table = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)
    return table[values[..., None].view(np.uint8)].sum(-1, dtype=np.uint8)


def find_near_pairs(gray: np.ndarray) -> Iterator[tuple[int, int]]:
    """Positions (i, j), i < j, of pictures uint8 (N, SIDE, SIDE) that are the same but for small changes.

    Pictures whose hashes differ in few bits are compared pixel by pixel: by correlation, which brightness and contrast
    leave alone. All pairs of hashes are compared, N * N / 2 of them.
    """
    hashes = hash_pictures(gray)
    flat = gray.reshape(len(gray), SIDE * SIDE).astype(np.float32)
    flat -= flat.mean(1, keepdims=True)
    flat /= np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)
    size = max(1, 2**24 // max(1, len(hashes)))
    starts = range(0, len(hashes), size)
    for start in tqdm(starts, desc="comparing", unit="block", leave=False, disable=None):
        block = hashes[start : start + size]
        rows, columns = np.nonzero(_count_bits(block[:, None] ^ hashes[None, start:]) <= BITS)
        rows, columns = rows + start, columns + start
        rows, columns = rows[rows < columns], columns[rows < columns]
        for first in range(0, len(rows), 65_536):
            left, right = rows[first : first + 65_536], columns[first : first + 65_536]
            same = np.einsum("nd,nd->n", flat[left], flat[right]) >= CORRELATION
            yield from zip(left[same].tolist(), right[same].tolist(), strict=True)


class _Groups:
    """Which positions belong together, as pairs of them come in (union-find)."""

    def __init__(self, count: int):
        self.parents = list(range(count))

    def find(self, item: int) -> int:
        while self.parents[item] != item:
            self.parents[item] = self.parents[self.parents[item]]
            item = self.parents[item]
        return item

    def join(self, one: int, other: int) -> None:
        self.parents[self.find(other)] = self.find(one)

    def groups(self) -> list[list[int]]:
        """Those of two and more, each sorted."""
        members: dict[int, list[int]] = {}
        for item in range(len(self.parents)):
            members.setdefault(self.find(item), []).append(item)
        return [group for group in members.values() if len(group) > 1]


def _link(files: list[tuple[str, str, str]], digests: list[str], gray: np.ndarray, blank: np.ndarray) -> tuple:
    """(groups of copies, the worst first; positions outside train that stand in it, byte for byte and near).

    Of identical files one is compared with the others. A picture stands in train where it is near one there itself;
    a group holds all that is near to one another, also through others.
    """
    same: dict[str, list[int]] = {}
    for position, digest in enumerate(digests):
        same.setdefault(digest, []).append(position)
    groups = _Groups(len(files))
    for members in same.values():
        for position in members[1:]:
            groups.join(members[0], position)
    firsts = np.array([members[0] for members in same.values()], np.int64)
    firsts = firsts[~blank[firsts]]  # nothing is near to everything

    def split(positions: list[int]) -> tuple[list[int], list[int]]:
        inside = [position for position in positions if files[position][1] == "train"]
        return inside, [position for position in positions if files[position][1] != "train"]

    identical, near = set(), set()
    for members in same.values():
        inside, outside = split(members)
        identical.update(outside if inside else ())
    for one, other in find_near_pairs(gray[firsts]):
        first, second = firsts[one].item(), firsts[other].item()
        groups.join(first, second)
        (inside, outside), (inside2, outside2) = split(same[digests[first]]), split(same[digests[second]])
        near.update(outside if inside2 else ())
        near.update(outside2 if inside else ())
    found = []
    for members in groups.groups():
        rows = [files[position] for position in members]
        found.append(
            {
                "kind": "identical" if len({digests[position] for position in members}) == 1 else "near",
                "splits": sorted({split for _, split, _ in rows}),
                "classes": sorted({class_name for _, _, class_name in rows}),
                "files": [path for path, _, _ in rows],
                "labels": [f"{split}/{class_name}" for _, split, class_name in rows],
            }
        )
    found.sort(key=lambda group: (-len(group["splits"]), -len(group["classes"]), -len(group["files"])))
    return found, identical, near | identical


def _spread(gray: np.ndarray) -> np.ndarray:
    """Standard deviation of each picture, uint8 (N, SIDE, SIDE) -> (N,)."""
    parts = [part.std((1, 2)) for part in np.array_split(gray, 1 + len(gray) // 4096)]
    return np.concatenate(parts)


def audit(folder: str | Path) -> dict:
    """All that is found, as plain values: see format_audit for what it says.

    "leaks" counts the pictures of val and test that stand in train too: "identical" byte for byte, "near" those and
    the near-identical ones. Raises InputError for a folder without pictures.
    """
    files, counts = list_files(folder)
    readable, unreadable, digests, kinds, gray = [], [], [], Counter(), []
    with tqdm(total=len(files), desc="reading", unit="img", leave=False, disable=None) as bar:
        paths = [path for path, _, _ in files]
        for start, results in in_chunks(paths, lambda chunk: [_look_at(path) for path in chunk], 128):
            for file, result in zip(files[start:], results, strict=False):
                if isinstance(result, str):
                    unreadable.append({"file": file[0], "reason": result})
                    continue
                readable.append(file)
                digests.append(result[0])
                kinds[result[1]] += 1
                gray.append(result[2])
            bar.update(len(results))
    gray = np.array(gray, np.uint8).reshape(-1, SIDE, SIDE)
    blank = _spread(gray) < BLANK
    groups, identical, near = _link(readable, digests, gray, blank)
    leaks = {}
    for split in counts if "train" in counts else ():
        if split != "train":
            own = [sum(readable[position][1] == split for position in leaked) for leaked in (identical, near)]
            leaks[split] = dict(zip(("identical", "near"), own, strict=True))
    return {
        "folder": str(folder),
        "count": len(files),
        "counts": counts,
        "kinds": dict(kinds.most_common()),
        "unreadable": unreadable,
        "blank": [readable[position][0] for position in np.flatnonzero(blank)],
        "leaks": leaks,
        "copies": len(digests) - len(set(digests)),
        "groups": groups,
    }


def _describe_balance(counts: dict[str, dict[str, int]]) -> list[str]:
    lines = []
    for split, classes in counts.items():
        total, most, least = sum(classes.values()), max(classes.values()), min(classes.values())
        shares = ", ".join(f"{name} {count:,} ({100 * count / max(1, total):.1f}%)" for name, count in classes.items())
        ratio = ""
        if not least:
            ratio = f"; without pictures: {', '.join(name for name, count in classes.items() if not count)}"
        elif most > 1.05 * least:
            ratio = f"; the largest class has {most / least:.1f} times the pictures of the smallest"
        lines.append(f"{printable(split)}/: {total:,} pictures: {shares}{ratio}")
    return lines


def _others_first(labels: list[str]) -> list[int]:
    """Positions, such that one of every label comes before the second of any."""
    seen, ranks = Counter(), []
    for label in labels:
        ranks.append(seen[label])
        seen[label] += 1
    return sorted(range(len(labels)), key=ranks.__getitem__)


def _name_files(group: dict, most: int = 4) -> str:
    files = [group["files"][number] for number in _others_first(group["labels"])]
    sign = {"identical": " = ", "near": " ~ "}[group["kind"]]
    return sign.join(files[:most]) + f"{sign}..." * (len(files) > most)


def format_audit(found: dict, most: int = 20) -> str:
    """The report as text; of long lists the first `most`."""

    def listed(items: list[str]) -> list[str]:
        more = [f"  ... and {len(items) - most:,} more, in audit.json"] if len(items) > most else []
        return [f"  {printable(item)}" for item in items[:most]] + more

    groups = found["groups"]
    conflicts = [group for group in groups if len(group["classes"]) > 1]
    lines = [*_describe_balance(found["counts"]), ""]
    kinds = [f"{count:,} {kind}" for kind, count in found["kinds"].items()]
    lines.append("sizes and modes: " + ", ".join(kinds[:8]) + (f" and {len(kinds) - 8:,} others" * (len(kinds) > 8)))
    lines.append(f"unreadable: {len(found['unreadable']):,}")
    lines += listed([row["reason"] for row in found["unreadable"]])
    lines.append(f"blank: {len(found['blank']):,}")
    lines += listed(found["blank"])
    for split, count in found["leaks"].items():
        lines.append(
            f"{printable(split)}/ pictures that stand in train/ too: {count['near']:,}, of which "
            f"{count['identical']:,} byte for byte"
        )
    lines.append(f"copies of another picture, byte for byte: {found['copies']:,}")
    for kind, name in (("identical", "identical pictures"), ("near", "near-identical pictures, with their copies")):
        own = [group for group in groups if group["kind"] == kind]
        size = sum(len(group["files"]) for group in own)
        lines.append(f"groups of {name}: {len(own):,}, of {size:,} pictures")
    across = [group for group in groups if len(group["splits"]) > 1]
    for name, own in (("across splits", across), ("under more than one label", conflicts)):
        lines.append(f"groups {name}: {len(own):,}")
        lines += listed([_name_files(group) for group in own])
    return "\n".join(lines) + "\n"


def draw_groups(found: dict, path: Path, *, rows: int = 12, columns: int = 6) -> None:
    """The worst groups of copies, a row each, with split and class above every picture; other ones come first."""
    from reports import plot_rows

    chosen = []
    for group in found["groups"][:rows]:
        names = [printable(label) for label in group["labels"]]
        best = _others_first(names)[:columns]
        pictures = [read_image(group["files"][number], InputSpec(image_size=96))[0] for number in best]
        chosen.append(list(zip(pictures, [names[number] for number in best], strict=True)))
    plot_rows(chosen, path, title=f"The worst groups of copies in {printable(Path(found['folder']).resolve().name)}")
