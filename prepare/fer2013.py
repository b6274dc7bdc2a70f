"""FER2013 in any form that is passed around (archive, CSV, unpacked folder) -> <split>/<class>/ folders of images.

Example::

    counts, notes = import_fer2013(Path("archive.zip"), Path("fer2013"))    # fer2013/train/happy/Training_1206.jpg, ...
"""

import csv
import gzip
import os
import re
import shutil
import stat
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from data import find_splits, walk, walk_images
from errors import InputError, printable, reason_of

CSV_CLASSES = {"0": "angry", "1": "disgust", "2": "fear", "3": "happy", "4": "sad", "5": "surprise", "6": "neutral"}
SPELLINGS = {name: name for name in CSV_CLASSES.values()} | dict(
    anger="angry", disgusted="disgust", fearful="fear", happiness="happy", sadness="sad", surprised="surprise"
)
USAGES = {"Training": "train", "PublicTest": "val", "PrivateTest": "test"}
HALF = re.compile("PublicTest|PrivateTest")  # in the names of the files of test/
TABLES = ("fer2013.csv", "icml_face_data.csv")
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
BY_HAND = "download https://www.kaggle.com/datasets/msambare/fer2013 by hand and pass the zip"

# FER2013 has 35,887 images: 60 MB of JPEGs, 300 MB of CSV, which are 97 MB in a zip. What unpacks to far more is a
# mistake or an attack.
MAX_FILES = 200_000
MAX_BYTES, MAX_INFLATION = 4 * 2**30, 50


def import_fer2013(source: Path, folder: Path) -> tuple[Counter, list[str]]:
    """Writes the set in `source` to <split>/<class>/ in `folder`, which is empty; image files are copied unchanged.

    `source` is a zip, tar, tar.gz or CSV file, or a folder with images in <split>/<class>/, a CSV or one archive.
    Returns (Counter of (split, class), lines for the user). Raises InputError for what is not FER2013, and OSError.
    """
    if not os.path.exists(source):
        raise InputError(f"no file or folder {source}; {BY_HAND}")
    counts = Counter()
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        root, table, images, notes = find_set(source, Path(temporary))
        places, undecided = place_images(source, root, images)
        rows = read_table(table) if table else zip(places, images, strict=True)
        for place, image in tqdm(rows, total=len(images) or None, unit="image", leave=False, disable=None):
            path = folder / place
            path.parent.mkdir(parents=True, exist_ok=True)
            if table:
                image.save(path)
            else:
                shutil.copyfile(image, path)
            counts[place.parts[0], place.parts[1]] += 1
    splits = {split for split, _ in counts}
    if "train" not in splits:
        raise InputError(f"{source} holds no training images; {BY_HAND}")
    for usage, split in USAGES.items():
        if split not in splits:
            reason = f"{printable(undecided)} is of neither half" if undecided else f"there are no {usage} images"
            notes.append(f"No {split}/ was made: {reason}.")
    return counts, notes


def find_set(source: Path, temporary: Path) -> tuple[Path, Path | None, dict[Path, str], list[str]]:
    """(root, table, images, notes): a CSV file, or {path: split} of the images in <split>/<class>/ below `root`.

    An archive is unpacked to `temporary`, which then is `root`; in a folder without images or CSV, the only archive is.
    """
    root = source
    if not source.is_dir():
        if source.name.lower().endswith(".csv"):
            return source.parent, source, {}, []
        if not source.name.lower().endswith(ARCHIVES):
            raise InputError(f"{source} is no folder, .csv, .zip, .tar or .tar.gz; {BY_HAND}")
        unpack(source, temporary)
        root = temporary
    found = [Path(entry.path) for entry in walk_images(root) if entry.is_file()]
    folders = {path.parents[2] for path in found if len(path.parts) > len(root.parts) + 2}
    splits = {place: split for folder in sorted(folders) for split, place in find_splits(folder).items()}
    images = {path: splits[path.parent.parent] for path in found if path.parent.parent in splits}
    if images:
        strays = [path.relative_to(root) for path in found if path not in images]
        where = f"outside of <split>/<class>/, such as {printable(strays[0])}" if strays else ""
        return root, None, images, [f"Skipped {len(strays)} images {where}."] if strays else []
    files = sorted(Path(entry.path) for entry in walk(root))
    tables = [path for name in TABLES for path in files if path.name.lower() == name]
    if tables:
        return root, tables[0], {}, []
    archives = [path for path in files if path.name.lower().endswith(ARCHIVES) and path.name[0] != "."]
    if source.is_dir() and len(archives) == 1:
        return find_set(archives[0], temporary)
    raise InputError(
        f"{source} holds no train/<class>/*.jpg, neither {' nor '.join(TABLES)}, and {len(archives)} archives instead "
        f"of one; pass the archive itself, or {BY_HAND}"
    )


class _BoundedGzip(gzip.GzipFile):
    """A tar's headers can unpack to any size, and tarfile reads each at once."""

    def read(self, size: int = -1) -> bytes:
        _check_size(self.name, 0, self.tell())
        return super().read(min(size, 2**20))


def _check_size(archive: Path | str, files: int, size: int) -> None:
    most = min(MAX_BYTES, max(2**24, MAX_INFLATION * os.path.getsize(archive)))
    if files > MAX_FILES or size > most:
        limit = f"{MAX_FILES:,} files" if files > MAX_FILES else f"{most:,} bytes"
        raise InputError(f"{archive} holds more than {limit}: this is not FER2013")


def _check_member(archive: Path, name: str, folder: Path, *, is_plain: bool) -> None:
    path = Path(name)
    if not is_plain or path.anchor or ".." in path.parts:
        raise InputError(
            f"{archive} is refused: its member '{name}' is a link or leads out of the target folder; get the archive "
            "from a source you trust"
        )
    if (folder / path).is_file():
        raise InputError(f"{archive} is refused: it holds '{name}' twice")


def unpack(archive: Path, folder: Path) -> None:
    """Unpacks a zip or tar to `folder`. InputError if it is damaged, encrypted, too large, or holds unsafe members.

    Both libraries read no more of a member than the size that is checked before.
    """
    try:
        if archive.name.lower().endswith(".zip"):
            with zipfile.ZipFile(archive) as file:
                members = file.infolist()
                _check_size(archive, len(members), sum(member.file_size for member in members))
                for member in members:
                    is_link = stat.S_ISLNK(member.external_attr >> 16)
                    _check_member(archive, member.filename, folder, is_plain=not is_link)
                    file.extract(member, folder)
            return
        unzip = open if archive.name.lower().endswith(".tar") else _BoundedGzip
        with unzip(archive, "rb") as stream, tarfile.TarFile(fileobj=stream) as file:
            for count, member in enumerate(file, start=1):
                _check_size(archive, count, member.offset_data + member.size)
                _check_member(
                    archive, member.name, folder, is_plain=member.isdir() or member.isfile() and not member.issparse()
                )
                file.extract(member, folder, filter="data")
            stream.seek(file.offset)
            if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes damage for the end
                raise tarfile.ReadError("it is cut short or damaged")
            while stream.read(2**20):  # up to the checksum
                pass
    except (InputError, MemoryError):
        raise
    except Exception as error:  # their own, those of the decompressors, OSError, RuntimeError for a password
        raise InputError(f"can't unpack {archive}: {reason_of(error)}") from error


def place_images(source: Path, root: Path, images: dict[Path, str]) -> tuple[list[Path], Path | None]:
    """(<split>/<class>/<file name> of each image, undecided); `images` and `root` are find_set's.

    Without a val/, the images of the PublicTest half move there from test/, unless some are of neither half: then
    `undecided` is one of them, and test/ stays whole. Raises InputError for unknown classes and for two sets.
    """
    roots = sorted({printable(path.relative_to(root).parents[2]) for path in images})
    if len(roots) > 1:
        raise InputError(f"{source} holds more than one set, in {' and '.join(roots[:2])}; pass one")
    halves = {path: HALF.search(path.name) for path, split in images.items() if split == "test"}
    undecided = None
    if "val" in images.values():
        halves = {}
    elif not all(halves.values()):
        undecided = next(path.relative_to(root) for path, half in halves.items() if half is None)
        halves = {}
    places = []
    for path, split in images.items():
        class_name = SPELLINGS.get(path.parent.name.lower())
        if class_name is None:
            raise InputError(
                f"{source} holds the unknown class '{path.parent.name}'; rename or remove it, the known ones are "
                f"{', '.join(sorted(CSV_CLASSES.values()))}"
            )
        places.append(Path(USAGES[halves[path][0]] if path in halves else split, class_name, path.name))
    for place, count in Counter(places).most_common(1):
        if count > 1:
            raise InputError(f"{source} holds {count} files for {place}; remove one")
    return places, undecided


def read_table(table: Path) -> Iterator[tuple[Path, Image.Image]]:
    """Yields (<split>/<class>/<Usage>_<row>.png, image 48x48 of mode L) for each row; row 1 follows the header.

    Raises InputError with the line's number for one that is not as it should be.
    """
    with table.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        rows = csv.reader(iter(lambda: file.readline(2**16), ""))  # an endless line comes in pieces: bad rows
        try:
            header = [name.strip().lower() for name in next(rows, [])]
            for number, row in enumerate(filter(None, rows), start=1):
                cells = dict(zip(header, map(str.strip, row), strict=True))
                pixels = bytes(map(int, cells["pixels"].split()))  # which refuses what is outside of 0 to 255
                image = Image.fromarray(np.frombuffer(pixels, np.uint8).reshape(48, 48))
                usage = cells["usage"]
                yield Path(USAGES[usage], CSV_CLASSES[cells["emotion"]], f"{usage}_{number:08d}.png"), image
        except (KeyError, ValueError, csv.Error):
            raise InputError(
                f"{table.name}, line {rows.line_num}: expected columns emotion (0 to 6), Usage ({', '.join(USAGES)}) "
                "and pixels (2304 from 0 to 255); download it again"
            ) from None


def format_counts(counts: Counter) -> str:
    """A table of the number of images per split and class, with totals."""
    totals = Counter(counts)
    for (split, class_name), count in counts.items():
        totals.update({(split, "total"): count, ("total", class_name): count, ("total", "total"): count})
    columns = [split for split in ("train", "val", "test", "total") if totals[split, "total"]]
    lines = [" " * 8 + "".join(f"{column:>8}" for column in columns)]
    for class_name in [*sorted({class_name for _, class_name in counts}), "total"]:
        lines.append(f"{class_name:8}" + "".join(f"{totals[column, class_name]:8,}" for column in columns))
    return "\n".join(lines)


def download_fer2013() -> Path:
    """The folder to which kagglehub downloads the archive; InputError if it can't."""
    try:
        import kagglehub

        return Path(kagglehub.dataset_download("msambare/fer2013"))
    except Exception as error:  # kagglehub's own, those of requests, OSError: not installed, no network, no login
        reason = f"{type(error).__name__}: {reason_of(error)}"
        raise InputError(f"--download failed ({reason}); pip install kagglehub, or {BY_HAND}") from error
