"""Folders of images sorted by class: their splits and files, and a split as one uint8 array, decoded once and cached.

Example::

    folders = find_splits("fer2013")                    # {"train": Path, "val": Path, "test": Path}
    data = FolderImages(folders["train"], InputSpec())  # data.images: uint8 (N, C, H, W)
"""

import contextlib
import hashlib
import io
import json
import math
import os
import sys
import tempfile
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from checkpoints import replace_file
from errors import InputError, printable
from models import InputSpec
from preprocessing import decode_paths, in_chunks

CACHE_VERSION = 5  # raise it whenever decoding or the cache's layout changes
EXTENSIONS = {".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".avif"}
EXTENSIONS |= {".ppm", ".pgm", ".pbm"} | ({".heic", ".heif"} if find_spec("pillow_heif") else set())
SAMPLE_PREFIX, SAMPLE_SET = "drawing_", "the sample set of drawings"  # its files' names, what checkpoints call it
SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_CHUNK_BYTES = 2**22  # of images decoded by one task
_HEADER_BYTES = 128  # of a .npy file; numpy pads the header of any shape of ours to this length


# Folders


class ImageFile(NamedTuple):
    path: str
    label: int
    key: tuple  # path below the split's folder, then size, times and number: what the cache knows it by


def _scan(folder: str | Path) -> list[os.DirEntry]:
    """What `folder` holds, without the hidden, in no order; InputError if it can't be read."""
    try:
        return [entry for entry in os.scandir(folder) if not entry.name.startswith((".", "__"))]
    except OSError as error:
        raise InputError(f"can't read the folder {folder}: {error.strerror}") from None


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def find_classes(folder: str | Path) -> list[str]:
    """Sorted names of the class folders in `folder`, without hidden ones. InputError if there are none."""
    folder = Path(folder)
    if not os.path.isdir(folder):
        raise InputError(f"no folder {folder}; it should hold one folder of images for each class")
    names = sorted(entry.name for entry in _scan(folder) if _is_folder(entry))
    for name in names:
        if not name.isprintable():  # it would garble terminals, plots and CSV files
            raise InputError(f"the class folder {folder / name} has an unprintable name; rename it")
    if not names:
        raise InputError(f"{folder} holds no class folders; make one for each class, images inside")
    return names


def find_splits(folder: str | Path) -> dict[str, Path]:
    """The folders of "train", "val" and "test" in `folder`, in that order, as far as they exist.

    Their names may be in any case, and val/ may be called valid/ or validation/. Empty for a folder of another kind,
    such as one that itself holds class folders, or a missing one. Raises InputError if one split is there twice.
    """
    found: dict[str, Path] = {}
    for entry in sorted(_scan(folder), key=lambda entry: entry.name) if os.path.isdir(folder) else ():
        split = SPLIT_NAMES.get(entry.name.lower())
        if split and _is_folder(entry):
            if split in found:
                names = f"{found[split].name}/ and {entry.name}/"
                raise InputError(f"{folder} holds {names}, both of them {split}; keep one")
            found[split] = Path(entry.path)
    return {split: found[split] for split in ("train", "val", "test") if split in found}


def _ending(entry: os.DirEntry) -> str:
    return os.path.splitext(entry.name)[1].lower()


def walk_images(folder: str | Path) -> list[os.DirEntry]:
    """Those of `walk` that are images by their ending, sorted by path."""
    return sorted((entry for entry in walk(folder) if _ending(entry) in EXTENSIONS), key=lambda entry: entry.path)


def describe_others(folder: str | Path) -> str:
    """How many files below `folder` are no images, by their ending, such as "5 .heic, 2 .txt"; "" without any."""
    counts = Counter(_ending(entry) or "without an ending" for entry in walk(folder))
    others = [f"{count:,} {printable(ending)}" for ending, count in counts.most_common() if ending not in EXTENSIONS]
    more = f" and {len(others) - 5:,} more endings" if len(others) > 5 else ""
    hint = " (HEIC needs: pip install pillow-heif)" if {".heic", ".heif"} & counts.keys() - EXTENSIONS else ""
    return ", ".join(others[:5]) + more + hint


def walk(folder: str | Path) -> list[os.DirEntry]:
    """Files below `folder`, in no order; links are followed, loops are not."""
    found, folders, seen = [], [str(folder)], set()
    while folders:
        current = folders.pop()
        real = os.path.realpath(current)
        if real in seen:
            continue
        seen.add(real)
        for entry in _scan(current):
            if _is_folder(entry):
                folders.append(entry.path)
            else:
                found.append(entry)
    return found


def list_images(folder: str | Path, class_names: list[str]) -> list[ImageFile]:
    """Every image of every class folder in `folder`, by the class folder's name, then by path.

    Raises InputError for a class folder without images, and for one that is not in `class_names`.
    """
    found = find_classes(folder)
    if unknown := sorted(set(found) - set(class_names)):
        raise InputError(
            f"classes differ: {folder} has {found}, but train/ or the model has {class_names}; rename {unknown}, or "
            "train a model that knows them"
        )
    images = []
    for name in found:
        class_folder = str(Path(folder) / name)
        entries, start = walk_images(class_folder), len(class_folder) - len(name)
        if not entries:
            held = describe_others(class_folder) or "no files"
            raise InputError(f"the class folder {class_folder} holds no images ({held}); fill or remove it")
        for entry in entries:
            key = [entry.path[start:]]
            with contextlib.suppress(OSError):  # a dangling link is listed, so that decoding names it
                info = os.stat(entry.path)  # on Windows that of the entry has no number
                key += [info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino]
            images.append(ImageFile(entry.path, class_names.index(name), tuple(key)))
    return images


def default_cache_dir() -> Path:
    """The user's cache folder, by the custom of the system."""
    try:
        if sys.platform == "win32":
            base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
        elif sys.platform == "darwin":
            base = Path.home() / "Library" / "Caches"
        else:
            base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # no home
        base = tempfile.gettempdir()
    return Path(base) / "emotion_cnn"


def is_sample_set(paths: list[str]) -> bool:
    """Whether all images are the drawings that come with the project, told by their names."""
    return all(os.path.basename(path).startswith(SAMPLE_PREFIX) for path in paths)


def hash_pixels(image: np.ndarray) -> str:
    """16 hexadecimal digits of a contiguous uint8 array."""
    return hashlib.blake2b(image, digest_size=8).hexdigest()


# A split and its cache


class FolderImages:
    """A folder of class folders as one uint8 array, decoded once and memory-mapped from the cache.

    images      uint8 (N, C, H, W); C is 1 if every image is gray, else `spec.stored_channels`
    labels      int64 (N,), positions in `class_names`
    paths       list of N paths
    digests     list of N hashes of the pixels; equal images have equal ones
    unreadable  dict, path to reason, of the images that are left out
    notes       list of lines for the user

    `class_names` defaults to the folder's own. Raises InputError for a missing or empty folder, unknown classes, a
    class without a readable image, and with `strict` for the first image that can't be read.
    """

    def __init__(
        self,
        folder: str | Path,
        spec: InputSpec,
        *,
        class_names: list[str] | None = None,
        cache_dir: str | Path | None = None,
        strict: bool = False,
    ):
        self.folder, self.spec, self.notes = Path(folder), spec, []
        self.class_names = class_names or find_classes(folder)
        listed = list_images(folder, self.class_names)
        self.images, info = self._load_or_build(listed, Path(cache_dir or default_cache_dir()))
        self.digests = info["digests"]
        self.unreadable = {listed[row].path: reason for row, reason in info["unreadable"].items()}
        kept = [image for row, image in enumerate(listed) if row not in info["unreadable"]]
        self.paths = [image.path for image in kept]
        self.labels = np.array([image.label for image in kept], dtype=np.int64)
        self._report_unreadable(strict, listed)

    def __len__(self) -> int:
        return len(self.paths)

    def _report_unreadable(self, strict: bool, listed: list[ImageFile]) -> None:
        lines = {path: f"can't read {printable(path)}: {reason}" for path, reason in self.unreadable.items()}
        if strict and lines:
            first = next(iter(lines.values()))
            raise InputError(f"{first} (--strict stops at the first of {len(lines)}; mend or remove it)")
        readable = set(self.labels.tolist())
        for image in listed:
            if image.label not in readable:
                name, example = self.folder / self.class_names[image.label], lines[image.path]
                raise InputError(f"no image in {name} can be read, so the class is empty; for example, {example}")
        if lines:
            self.notes += [*lines.values()][:50] + [f"... and {len(lines) - 50} more"] * (len(lines) > 50)
            self.notes.append(f"left out {len(lines)} of {len(listed)} images in {printable(self.folder)}")
        if others := describe_others(self.folder):
            self.notes.append(f"not read in {printable(self.folder)}: {others}")

    def _load_or_build(self, listed: list[ImageFile], cache_dir: Path) -> tuple[np.ndarray, dict]:
        """The images and {"shape", "digests", "unreadable"}, from the cache, or decoded into it or into memory."""
        path = cache_dir / self._cache_name(listed)
        with contextlib.suppress(Exception):  # none yet, or a damaged one, to be rebuilt; odd JSON raises anything
            images, info = _read_cache(path, len(listed))
            paths = [listed[row].path for row in info["unreadable"]]
            again = decode_paths(paths, self.spec, self.spec.stored_channels)
            if all(isinstance(result, str) for result in again):  # else a disk or a permission was mended
                return images, info
            del images  # Windows can't replace a file that is mapped
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            self._write_cache(path, listed)
            return _read_cache(path, len(listed))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            self.notes.append(f"no cache in {printable(cache_dir)} ({reason}): this run keeps the images in memory")
            file = io.BytesIO()
            info = self._write_images(file, listed)
            return np.frombuffer(file.getbuffer(), np.uint8, offset=_HEADER_BYTES).reshape(info["shape"]), info

    def _cache_name(self, listed: list[ImageFile]) -> str:
        """FOLDER-SPEC-FILES.npy: a hash of each, so that stale ones of the same folder and spec can be told."""
        files = [CACHE_VERSION, *(image.key for image in listed)]
        spec = (self.spec.image_size, self.spec.stored_channels)
        parts = [os.fsencode(os.path.realpath(self.folder)), repr(spec).encode(), repr(files).encode()]
        return "-".join(hashlib.sha256(part).hexdigest()[:16] for part in parts) + ".npy"

    def _write_cache(self, path: Path, listed: list[ImageFile]) -> None:
        """Decodes into `path` and the JSON file next to it; a cache is valid if both are there and agree.

        Processes that build the same cache at once write the same, so it does not matter which one is first.
        """

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                info = self._write_images(file, listed)
            replace_file(path.with_suffix(".json"), lambda other: other.write_text(json.dumps(info), encoding="utf-8"))

        replace_file(path, write)
        _remove_stale(path)

    def _write_images(self, file: BinaryIO, listed: list[ImageFile]) -> dict:
        """Writes the readable images to `file` as .npy does and returns the cache's info."""
        info = self._decode(file, listed, 1) or self._decode(file, listed, self.spec.stored_channels)
        file.seek(0)
        file.write(_header(info["shape"]))
        return info

    def _decode(self, file: BinaryIO, listed: list[ImageFile], channels: int) -> dict | None:
        """Writes the pixels, uint8 (`channels`, H, W), in order; None at the first image that needs more channels."""
        file.seek(_HEADER_BYTES)
        file.truncate()
        digests, unreadable = [], {}
        title = f"decoding {printable(self.folder.name)}"
        with tqdm(total=len(listed), desc=title, unit="img", leave=False, disable=None) as bar:
            size = min(256, 1 + _CHUNK_BYTES // (channels * self.spec.image_size**2))
            paths = [image.path for image in listed]
            for start, results in in_chunks(paths, lambda chunk: decode_paths(chunk, self.spec, channels), size):
                for row, result in enumerate(results, start):
                    if result is None:
                        return None
                    if isinstance(result, str):
                        unreadable[row] = result
                    else:
                        digests.append(hash_pixels(result))
                        file.write(result)  # which reports a full disk; a memory map would end the process there
                bar.update(len(results))
        shape = (len(digests), channels, self.spec.image_size, self.spec.image_size)
        return {"shape": shape, "digests": digests, "unreadable": unreadable}


def _header(shape: tuple[int, ...]) -> bytes:
    """The first _HEADER_BYTES of a .npy file of uint8."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.getvalue()


def _read_cache(path: Path, count: int) -> tuple[np.ndarray, dict]:
    """The memory-mapped images and the info of a cache of `count` files; reads no pixels.

    OSError if it is missing, ValueError, KeyError, AttributeError or TypeError if it is damaged.
    """
    info = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    info["unreadable"] = {int(row): reason for row, reason in info["unreadable"].items()}
    shape = tuple(info["shape"])
    with path.open("rb") as file:
        is_whole = file.read(_HEADER_BYTES) == _header(shape) and (
            os.fstat(file.fileno()).st_size == _HEADER_BYTES + math.prod(shape)
            and shape[0] == len(info["digests"]) == count - len(info["unreadable"])
            and all(0 <= row < count for row in info["unreadable"])
        )
        if not is_whole:
            raise ValueError("the cache is damaged")
        return np.memmap(file, np.uint8, "r", _HEADER_BYTES, shape), info


def _remove_stale(path: Path) -> None:
    """Removes caches of the same folder and spec with other files, and what killed runs left a day ago."""
    folder_and_spec = path.stem.rpartition("-")[0]
    for other in path.parent.glob(f"*{folder_and_spec}-*"):
        with contextlib.suppress(OSError):  # gone meanwhile, or mapped by another process, which Windows keeps
            is_leftover = other.suffix == ".tmp" and time.time() - other.stat().st_mtime > 86_400
            if (other.suffix != ".tmp" and other.stem != path.stem) or is_leftover:
                other.unlink()
