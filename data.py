"""Folders of images sorted by class: their splits and files, and a split as one uint8 array, decoded once and cached.

folders = find_splits("fer2013")                    # {"train": Path, "val": Path, "test": Path}
data = FolderImages(folders["train"], InputSpec())  # data.images: uint8 (N, C, H, W)
"""

import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from errors import InputError, printable
from models import InputSpec
from preprocessing import decode_paths, in_chunks

CACHE_VERSION = 5  # raise it whenever decoding or the cache's layout changes
EXTENSIONS = {".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm"}
SAMPLE_PREFIX, SAMPLE_SET = "drawing_", "the sample set of drawings"  # its files' names, what checkpoints call it
_CHUNK_BYTES = 2**22  # of pictures decoded by one task
_HEADER_BYTES = 128  # of a .npy file; numpy pads the header of any shape of ours to this length


_SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}  # by lower-case name


# Folders


class Picture(NamedTuple):
    path: str
    label: int
    stat: tuple[int, ...]  # size and time of change


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "__"))


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def find_classes(folder: str | Path) -> list[str]:
    """Sorted names of the class folders in `folder`; hidden ones are none. InputError where there is none."""
    folder = Path(folder)
    if not os.path.isdir(folder):
        raise InputError(f"no folder {folder}; it should hold one folder of pictures for each class")
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if _is_folder(entry) and not _is_hidden(entry.name))
    except OSError as error:
        raise InputError(f"can't read the folder {folder}: {error.strerror}") from None
    for name in names:
        if not name.isprintable():  # it would garble terminals, plots and CSV files
            raise InputError(f"the class folder {folder / name} has an unprintable name; rename it")
    if not names:
        raise InputError(f"{folder} holds no class folders; make one for each class, pictures inside")
    return names


def find_splits(folder: str | Path) -> dict[str, Path]:
    """The folders of "train", "val" and "test" in `folder`, in that order, as far as they exist.

    Their names may be in any case, and val/ may be called valid/ or validation/. Empty for a folder of another kind,
    such as one that itself holds class folders, or a missing one. Raises InputError if one split is there twice.
    """
    found: dict[str, Path] = {}
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name) if os.path.isdir(folder) else ():
        split = _SPLITS.get(entry.name.lower())
        if split and _is_folder(entry):
            if split in found:
                raise InputError(
                    f"{folder} holds {found[split].name}/ and {entry.name}/, both of them {split}; keep one"
                )
            found[split] = Path(entry.path)
    return {split: found[split] for split in ("train", "val", "test") if split in found}


def walk_pictures(folder: str | Path) -> list[os.DirEntry]:
    """Files below `folder` that are pictures by their ending, sorted by path; links are followed, loops are not."""
    found, folders, seen = [], [str(folder)], set()
    while folders:
        current = folders.pop()
        real = os.path.realpath(current)
        if real in seen:
            continue
        seen.add(real)
        try:
            entries = list(os.scandir(current))
        except OSError as error:
            raise InputError(f"can't read the folder {current}: {error.strerror}") from None
        for entry in entries:
            if _is_hidden(entry.name):
                continue
            if _is_folder(entry):
                folders.append(entry.path)
            elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
                found.append(entry)
    return sorted(found, key=lambda entry: entry.path)


def list_pictures(folder: str | Path, class_names: list[str]) -> list[Picture]:
    """Every picture of every class folder in `folder`, in the order of `class_names`, then by path.

    Raises InputError for a class folder without pictures, and for one that is not in `class_names`.
    """
    found = find_classes(folder)
    if not set(found) <= set(class_names):
        raise InputError(
            f"classes differ: {folder} has {found}, but train/ or the network has "
            f"{class_names}; rename {sorted(set(found) - set(class_names))}, or train a network that knows them"
        )
    pictures = []
    for name in found:
        label = class_names.index(name)
        entries = walk_pictures(Path(folder) / name)
        if not entries:
            raise InputError(f"the class folder {Path(folder) / name} holds no pictures; fill or remove it")
        for entry in entries:
            try:
                info = entry.stat()
                pictures.append(Picture(entry.path, label, (info.st_size, info.st_mtime_ns)))
            except OSError:  # a dangling link is listed, so that decoding names it
                pictures.append(Picture(entry.path, label, ()))
    return pictures


def default_cache_dir() -> Path:
    """The user's cache folder, by the custom of the system."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "emotion_cnn"


def is_sample_set(paths: list[str]) -> bool:
    """Whether all pictures are the drawings that come with the project, told by their names."""
    return all(os.path.basename(path).startswith(SAMPLE_PREFIX) for path in paths)


def hash_pixels(picture: np.ndarray) -> str:
    """16 hexadecimal digits of a contiguous uint8 array."""
    return hashlib.blake2b(picture, digest_size=8).hexdigest()


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
        listed = list_pictures(folder, self.class_names)
        self.images, info = self._load_or_build(listed, Path(cache_dir or default_cache_dir()))
        self.digests = info["digests"]
        self.unreadable = {listed[int(row)].path: reason for row, reason in info["unreadable"].items()}
        kept = [picture for row, picture in enumerate(listed) if str(row) not in info["unreadable"]]
        self.paths = [picture.path for picture in kept]
        self.labels = np.array([picture.label for picture in kept], dtype=np.int64)
        self._report_unreadable(strict, {picture.label for picture in listed})

    def __len__(self) -> int:
        return len(self.paths)

    def _report_unreadable(self, strict: bool, expected: set[int]) -> None:
        lines = [f"can't read {printable(path)}: {reason}" for path, reason in self.unreadable.items()]
        if strict and lines:
            raise InputError(f"{lines[0]} (--strict stops at the first of {len(lines)}; mend or remove it)")
        for label in sorted(expected - set(self.labels.tolist())):
            name = printable(self.folder / self.class_names[label])
            raise InputError(f"no picture in {name} can be read, so the class is empty; for example, {lines[0]}")
        if lines:
            self.notes += lines[:50] + [f"... and {len(lines) - 50} more"] * (len(lines) > 50)
            self.notes.append(f"left out {len(lines)} of {len(lines) + len(self)} pictures in {printable(self.folder)}")

    def _load_or_build(self, listed: list[Picture], cache_dir: Path) -> tuple[np.ndarray, dict]:
        """The images and {"shape", "digests", "unreadable"}, from the cache or decoded into it."""
        path = cache_dir / self._cache_name(listed)
        try:
            images, info = _read_cache(path)
            paths = [listed[int(row)].path for row in info["unreadable"]]
            again = decode_paths(paths, self.spec, self.spec.stored_channels)
            if all(isinstance(result, str) for result in again):  # else a disk or a permission was mended
                return images, info
            del images  # Windows can't replace a file that is mapped
        except (OSError, ValueError, KeyError, TypeError):
            pass  # none yet, or a damaged one, which is rebuilt
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            self._write_cache(path, listed)
            return _read_cache(path)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            self.notes.append(f"no cache in {cache_dir} ({reason}): this run keeps the pictures in memory")
            rows: list[np.ndarray] = []
            info = self._decode(listed, rows.append, rows.clear)
            return np.stack(rows) if rows else np.zeros(info["shape"], np.uint8), info

    def _cache_name(self, listed: list[Picture]) -> str:
        """FOLDER-SPEC-FILES.npy: a hash of each, so that stale ones of the same folder and spec can be told."""
        folder = os.path.realpath(self.folder)
        files = [CACHE_VERSION, *((os.path.relpath(picture.path, self.folder), *picture.stat) for picture in listed)]
        spec = (self.spec.image_size, self.spec.stored_channels)
        parts = [os.fsencode(folder), repr(spec).encode(), repr(files).encode("utf-8", "surrogateescape")]
        return "-".join(hashlib.sha256(part).hexdigest()[:16] for part in parts) + ".npy"

    def _write_cache(self, path: Path, listed: list[Picture]) -> None:
        """Decodes into `path`, with all else in the JSON file next to it.

        The pixels go through write(), which reports a full disk; a memory map would end the process there.
        """
        temporary, info_path = path.with_suffix(f".{os.getpid()}.tmp"), path.with_suffix(".json")
        try:
            with temporary.open("wb") as file:
                file.seek(_HEADER_BYTES)
                info = self._decode(listed, file.write, lambda: file.truncate(file.seek(_HEADER_BYTES)))
                file.seek(0)
                header = {"descr": "|u1", "fortran_order": False, "shape": tuple(info["shape"])}
                np.lib.format.write_array_header_1_0(file, header)
            info_path.unlink(missing_ok=True)  # the pixels are valid from the moment that it is there again
            with contextlib.suppress(PermissionError):  # Windows, if another run was first and has it open
                os.replace(temporary, path)
            temporary.write_text(json.dumps(info), encoding="utf-8")
            os.replace(temporary, info_path)
        finally:
            temporary.unlink(missing_ok=True)
        _remove_stale(path)

    def _decode(self, listed: list[Picture], add: Callable, start_over: Callable) -> dict:
        """Calls `add` with the pixels of each readable image, uint8 (C, H, W), in order; returns the cache's info.

        C is 1 until the first color image; then `start_over` is called, and all are decoded again.
        """
        for channels in dict.fromkeys((1, self.spec.stored_channels)):
            start_over()
            info = {"unreadable": {}, "digests": []}
            if self._decode_with(listed, add, info, channels):
                break
        return info | {"shape": [len(info["digests"]), channels, self.spec.image_size, self.spec.image_size]}

    def _decode_with(self, listed: list[Picture], add: Callable, info: dict, channels: int) -> bool:
        """False at the first image that needs more `channels`."""
        title = f"decoding {printable(self.folder.name)}"
        with tqdm(total=len(listed), desc=title, unit="img", leave=False, disable=None) as bar:
            size = min(256, 1 + _CHUNK_BYTES // (channels * self.spec.image_size**2))
            paths = [picture.path for picture in listed]
            for start, results in in_chunks(paths, lambda chunk: decode_paths(chunk, self.spec, channels), size):
                for row, result in enumerate(results, start):
                    if result is None:
                        return False
                    if isinstance(result, str):
                        info["unreadable"][str(row)] = result
                    else:
                        info["digests"].append(hash_pixels(result))
                        add(result)
                bar.update(len(results))
        return True


def _read_cache(path: Path) -> tuple[np.ndarray, dict]:
    """The memory-mapped images and their info; reads no pixels. OSError or ValueError if missing or damaged."""
    info = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    shape = tuple(info["shape"])
    if path.stat().st_size != _HEADER_BYTES + np.prod(shape, dtype=int) or len(info["digests"]) != shape[0]:
        raise ValueError("the cache is damaged")
    images = np.lib.format.open_memmap(path, mode="r")
    if images.shape != shape or images.dtype != np.uint8:
        raise ValueError("the cache is damaged")
    return images, info


def _remove_stale(path: Path) -> None:
    """Removes caches of the same folder and spec with other files, and what killed runs left a day ago."""
    folder_and_spec = path.stem.rpartition("-")[0]
    for other in path.parent.glob(f"{folder_and_spec}-*"):
        with contextlib.suppress(OSError):  # gone meanwhile, or mapped by another process, which Windows keeps
            is_leftover = other.suffix == ".tmp" and time.time() - other.stat().st_mtime > 86_400
            if (other.suffix != ".tmp" and other.stem != path.stem) or is_leftover:
                other.unlink()
