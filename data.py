"""Folders of pictures as uint8 arrays, decoded once and cached. splits.py makes batches of them.

images = FolderImages("train", InputSpec())         # images.images: uint8 (N, C, H, W)
"""

import contextlib
import hashlib
import io
import json
import os
import struct
import sys
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from errors import InputError, printable
from models import InputSpec
from preprocessing import decode_paths, in_chunks

CACHE_VERSION = 4  # raise it whenever decoding or the cache's layout changes
EXTENSIONS = {".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm"}
SAMPLE_PREFIX, SAMPLE_SET = "drawing_", "the sample set of drawings"  # its files' names, what checkpoints call it
_CHUNK_BYTES = 2**22  # of pictures decoded by one task
_FOOTER = struct.Struct("<QI")  # of a cache file: the trailer's length, the CRC-32 of all before the footer


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
    """A folder of class folders, decoded once, as one uint8 array that is memory-mapped from the cache.

    images      uint8 (N, C, H, W); C is 1 where every picture is gray, else `spec.stored_channels`
    labels      int64 (N,), positions in `class_names`
    paths       list of N paths
    digests     list of N hashes of the pixels; equal pictures have equal ones
    unreadable  dict, path to reason, of the pictures that are left out
    notes       list of lines that the user should see

    `class_names` defaults to the folder's own. Raises InputError for a missing or empty folder, unknown classes, a
    class left without pictures, and with `strict` for the first picture that can't be read.
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
        self.images, self.digests, unreadable = self._load_or_build(listed, Path(cache_dir or default_cache_dir()))
        self.unreadable = {listed[int(row)].path: reason for row, reason in unreadable.items()}
        kept = [picture for row, picture in enumerate(listed) if str(row) not in unreadable]
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

    def _load_or_build(self, listed: list[Picture], cache_dir: Path):
        path = cache_dir / self._cache_name(listed)
        try:
            images, digests, unreadable = _read_cache(path)
            again = decode_paths([listed[int(row)].path for row in unreadable], self.spec, self.spec.stored_channels)
            if all(isinstance(result, str) for result in again):  # else a disk or a permission was mended
                return images, digests, unreadable
            del images  # Windows can't replace a file that is mapped
        except (OSError, ValueError, KeyError, TypeError):
            pass  # none yet, or a damaged one, which is rebuilt
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            try:
                with temporary.open("wb") as file:
                    self._decode_into(file, listed)
                with contextlib.suppress(PermissionError):  # Windows, where another run was first and has it open
                    os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
            _remove_stale(path)
            return _read_cache(path)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            self.notes.append(f"no cache in {cache_dir} ({reason}): this run keeps the pictures in memory")
            file = io.BytesIO()
            self._decode_into(file, listed)
            return _parse_cache(np.frombuffer(file.getbuffer(), np.uint8))

    def _cache_name(self, listed: list[Picture]) -> str:
        """FOLDER-SPEC-FILES.cache, so that stale ones of the same folder and spec can be told."""
        folder = os.path.realpath(self.folder)
        files = [CACHE_VERSION, *((os.path.relpath(picture.path, self.folder), *picture.stat) for picture in listed)]
        spec = (self.spec.image_size, self.spec.stored_channels)
        parts = [os.fsencode(folder), repr(spec).encode(), repr(files).encode("utf-8", "surrogateescape")]
        return "-".join(hashlib.sha256(part).hexdigest()[:16] for part in parts) + ".cache"

    def _decode_into(self, file, listed: list[Picture]) -> None:
        """Writes the cache: pixels, a JSON trailer, then the trailer's length and the CRC-32 of all before it."""
        result = self._decode(file, listed, channels=1)
        if result is None:  # no gray set after all
            result = self._decode(file, listed, channels=self.spec.stored_channels)
        trailer, crc = result
        encoded = json.dumps(trailer).encode()
        file.write(encoded + _FOOTER.pack(len(encoded), zlib.crc32(encoded, crc)))

    def _decode(self, file, listed: list[Picture], channels: int) -> tuple[dict, int] | None:
        """Writes the pixels, returns the trailer and their CRC; None at the first picture that needs more channels."""
        trailer, crc = {"unreadable": {}, "digests": []}, 0
        file.seek(0)
        file.truncate()
        title = f"decoding {printable(self.folder.name)}"
        with tqdm(total=len(listed), desc=title, unit="img", leave=False, disable=None) as bar:
            size = min(256, 1 + _CHUNK_BYTES // (channels * self.spec.image_size**2))
            paths = [picture.path for picture in listed]
            for start, results in in_chunks(paths, lambda chunk: decode_paths(chunk, self.spec, channels), size):
                for row, result in enumerate(results, start):
                    if result is None:
                        return None
                    if isinstance(result, str):
                        trailer["unreadable"][str(row)] = result
                        continue
                    trailer["digests"].append(hash_pixels(result))
                    crc = zlib.crc32(result, crc)
                    file.write(result)
                bar.update(len(results))
        trailer["shape"] = [len(trailer["digests"]), channels, self.spec.image_size, self.spec.image_size]
        return trailer, crc


def _read_cache(path: Path):
    """(images, digests, unreadable) of a cache file; OSError or ValueError where there is none or it is damaged."""
    return _parse_cache(np.memmap(path, np.uint8, mode="r"))


def _parse_cache(raw: np.ndarray):
    if len(raw) < _FOOTER.size:
        raise ValueError("cut short")
    body = raw[: -_FOOTER.size]
    length, crc = _FOOTER.unpack(raw[-_FOOTER.size :].tobytes())
    found = 0
    for start in range(0, len(body), 1 << 24):
        found = zlib.crc32(body[start : start + (1 << 24)], found)
    if found != crc or length > len(body):
        raise ValueError("damaged")
    trailer = json.loads(body[len(body) - length :].tobytes())
    return body[: len(body) - length].reshape(trailer["shape"]), trailer["digests"], trailer["unreadable"]


def _remove_stale(path: Path) -> None:
    """Removes caches of the same folder and spec with other files, and what killed runs left a day ago."""
    folder_and_spec = path.stem.rpartition("-")[0]
    for other in path.parent.glob(f"{folder_and_spec}-*"):
        with contextlib.suppress(OSError):  # gone meanwhile, or mapped by another process, which Windows keeps
            is_old_rest = other.suffix == ".tmp" and time.time() - other.stat().st_mtime > 86_400
            if (other.suffix == ".cache" and other != path) or is_old_rest:
                other.unlink()
