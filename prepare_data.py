"""Make a folder to train on: draw the sample set, import FER2013, crop photos to faces, or see what is wrong in one.

    python prepare_data.py sample                                   # draws train/ and test/ into the current folder
    python prepare_data.py fer2013 archive.zip --output-dir FOLDER  # writes FOLDER/train/, FOLDER/val/, FOLDER/test/
    python prepare_data.py fer2013 fer2013.csv --output-dir FOLDER
    python prepare_data.py fer2013 --download --output-dir FOLDER   # fetches the archive with kagglehub
    python prepare_data.py crop FOLDER --output-dir NEW             # the largest face of every photo (needs OpenCV)
    python prepare_data.py audit FOLDER                             # unreadable, blank, copied, mislabelled pictures

The challenge's PublicTest half becomes val/, its PrivateTest half test/. The archive may also be its unpacked folder,
fer2013.csv, icml_face_data.csv, a zip or tar.gz with one of those tables, or a folder with one of all these.
"""

import argparse
import contextlib
import csv
import gzip
import lzma
import os
import re
import shutil
import stat
import sys
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from io import BufferedIOBase, BytesIO, TextIOWrapper
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from checkpoints import replace_file
from console import ArgumentParser, make_output_dir, run_script
from data import EXTENSIONS, walk_pictures
from errors import InputError, printable
from faces.detector import SMALLEST, crop_largest, find_faces

CSV_CLASSES = {"0": "angry", "1": "disgust", "2": "fear", "3": "happy", "4": "sad", "5": "surprise", "6": "neutral"}
SPELLINGS = {name: name for name in CSV_CLASSES.values()} | {
    "anger": "angry",
    "disgusted": "disgust",
    "fearful": "fear",
    "happiness": "happy",
    "sadness": "sad",
    "surprised": "surprise",
}
SPLITS = {"train": "train", "val": "val", "validation": "val", "test": "test"}
USAGES = {"Training": "train", "PublicTest": "val", "PrivateTest": "test"}
HALVES = "PublicTest|PrivateTest"
TABLE_NAMES = ("fer2013.csv", "icml_face_data.csv")
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")

# FER2013 has 35,887 pictures: 60 MB of JPEGs, 300 MB of CSV. What unpacks to far more is a mistake or an attack.
MAX_MEMBERS = 200_000
MAX_TOTAL_BYTES = 4 * 2**30
MAX_PICTURE_BYTES = 64 * 2**20

# what a file that can't be read or written and a damaged or encrypted archive or table raise
FILE_ERRORS = (
    OSError,
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    csv.Error,
    EOFError,
    RuntimeError,
    ValueError,
)
BY_HAND = "download https://www.kaggle.com/datasets/msambare/fer2013 by hand and pass the zip"


def _check_limit(count: int, limit: int, unit: str, name: str | Path) -> None:
    if count > limit:
        raise InputError(f"{name} holds more than {limit:,} {unit}: this is not FER2013")


class _SmallReadsGzip(gzip.GzipFile):
    def read(self, size: int = -1) -> bytes:  # tarfile reads an extended header at once, however large it unpacks
        return super().read(min(size, 2 * MAX_PICTURE_BYTES))


def _check_member(source: Path, name: str, *, is_plain: bool) -> None:
    if not is_plain or re.search(r"^/|[\\\0]|(^|/)(\.\.(/|$)|.:)", name):  # absolute, backslash, NUL, .., drive letter
        raise InputError(
            f"{source} is refused: its member '{name}' is a link or leads out of "
            "the target folder; get the archive from a source you trust"
        )


def list_members(source: Path) -> Iterator[tuple[str, Callable[[], BufferedIOBase]]]:
    """Yield (name, function that opens it) of each file in a folder or archive. InputError refuses unsafe members."""
    file_name = source.name.lower()
    if source.is_dir():
        for path in sorted(source.iterdir()):
            if path.is_dir():
                yield from ((f"{path.name}/{name}", open_member) for name, open_member in list_members(path))
            elif path.is_file():  # a pipe would be waited for
                yield path.name, lambda path=path: path.open("rb")
    elif file_name.endswith(".csv"):
        yield source.name, lambda: source.open("rb")
    elif file_name.endswith(".zip"):
        with zipfile.ZipFile(source) as archive:
            for info in archive.infolist():
                for name in (info.orig_filename, info.filename):  # an extra field or a NUL makes them differ
                    _check_member(source, name, is_plain=not stat.S_ISLNK(info.external_attr >> 16))
                if not info.is_dir():
                    yield info.filename, lambda info=info: archive.open(info)
    elif file_name.endswith(ARCHIVE_SUFFIXES):
        open_file = open if file_name.endswith(".tar") else _SmallReadsGzip
        with open_file(source, "rb") as file, tarfile.TarFile(fileobj=file) as archive:
            for member in archive:
                # checked before tarfile unpacks the member or skips over it, at the position where it really ends
                _check_limit(member.offset_data + member.size, MAX_TOTAL_BYTES, "bytes", source)
                is_file = member.isfile() and not member.issparse()
                _check_member(source, member.name, is_plain=is_file or member.isdir())
                if is_file:
                    yield member.name, lambda member=member: archive.extractfile(member)
    else:
        raise InputError(f"{source} is no folder, .csv, .zip, .tar or .tar.gz; {BY_HAND}")


def find_set(source: Path) -> tuple[Path, str | None, list[str]]:
    """Look for FER2013 in `source`, without writing, and return (source, table, pictures).

    `pictures` are the names of the members in <split>/<class>/; where there are none, `table` is the name of the CSV;
    where there is none, the one archive in a folder is looked into. Raises InputError where nothing is found.
    """
    pictures, strays, tables, archives = [], [], [], []
    for count, (name, _) in enumerate(list_members(source), start=1):
        _check_limit(count, MAX_MEMBERS, "files", source)
        *folders, file_name = name.split("/")
        if "__MACOSX" in folders or file_name.startswith("."):
            continue
        if file_name.lower() in TABLE_NAMES or name == source.name and file_name.lower().endswith(".csv"):
            tables.append(name)
        elif Path(file_name).suffix.lower() in EXTENSIONS:
            (pictures if len(folders) > 1 and folders[-2].lower() in SPLITS else strays).append(name)
        elif source.is_dir() and file_name.lower().endswith(ARCHIVE_SUFFIXES):
            archives.append(name)
    if pictures and strays:
        print(f"Skipped {len(strays)} pictures outside of <split>/<class>/, such as {printable(strays[0])}.")
    if pictures or tables:
        table = min(tables, key=lambda name: name.lower().split("/")[::-1], default=None)  # fer2013.csv comes first
        return source, None if pictures else table, pictures
    if len(archives) == 1:
        return find_set(source / archives[0])
    raise InputError(
        f"{source} holds no train/<class>/*.jpg, neither {' nor '.join(TABLE_NAMES)}, and "
        f"{len(archives)} archives instead of one; pass the archive itself, or {BY_HAND}"
    )


def place_pictures(source: Path, pictures: list[str]) -> tuple[dict[str, str], str | None]:
    """Return ({member name: "<split>/<class>/<file name>"}, undecided).

    `undecided` names a file of test/ that is of neither half; then test/ stays whole, as it does where the source has
    a val/. Raises InputError for an unknown class and for two sets in one source.
    """
    roots = sorted({printable("/".join(name.split("/")[:-3])) or "." for name in pictures})
    if len(roots) > 1:
        raise InputError(f"{source} holds more than one set, in {' and '.join(roots[:2])}; pass one")
    places = {}
    for name in pictures:
        split, class_name, file_name = name.split("/")[-3:]
        if class_name.lower() not in SPELLINGS:
            raise InputError(
                f"{source} holds the unknown class '{class_name}'; rename or remove "
                f"it, the known ones are {', '.join(sorted(CSV_CLASSES.values()))}"
            )
        places[name] = [SPLITS[split.lower()], SPELLINGS[class_name.lower()], file_name]
    undecided = None
    if "val" not in {split for split, _, _ in places.values()}:
        halves = {name: re.search(HALVES, place[2]) for name, place in places.items() if place[0] == "test"}
        undecided = next((name for name, half in halves.items() if half is None), None)
        for name, half in halves.items() if undecided is None else ():
            places[name][0] = USAGES[half[0]]
    return {name: "/".join(place) for name, place in places.items()}, undecided


def read_table(stream: BufferedIOBase, table: str) -> Iterator[tuple[str, bytes]]:
    """Yield ("<split>/<class>/<Usage>_<row>.png", file content) of each row of a CSV; row 1 follows the header.

    The PNGs are 8-bit gray, 48x48. Raises InputError with the number of a malformed row.
    """
    text = TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    rows = csv.reader(iter(lambda: text.readline(2**16), ""))  # an endless line comes in pieces: bad rows
    header = [name.strip().lower() for name in next(rows, [])]
    if not {"emotion", "usage", "pixels"} <= set(header):
        raise InputError(f"{table} has no columns emotion, Usage, pixels; pass {' or '.join(TABLE_NAMES)}")
    for number, row in enumerate(filter(None, rows), start=1):
        try:
            cells = dict(zip(header, map(str.strip, row), strict=True))
            place = f"{USAGES[cells['usage']]}/{CSV_CLASSES[cells['emotion']]}/{cells['usage']}_{number:08d}.png"
            pixels = np.frombuffer(bytes(map(int, cells["pixels"].split())), np.uint8)
            image = Image.fromarray(np.reshape(pixels, (48, 48)))
        except (KeyError, ValueError):  # bytes() refuses what is outside of 0 to 255
            raise InputError(
                f"{table}, row {number}: expected emotion 0 to 6, Usage {', '.join(USAGES)}, "
                "2304 pixels from 0 to 255; download it again"
            ) from None
        content = BytesIO()
        image.save(content, "png")
        yield place, content.getvalue()


def write_set(source: Path, table: str | None, places: dict[str, str], folder: Path) -> Counter:
    """Write the rows of `table` or, byte for byte, the members in `places` below `folder`.

    Returns a Counter of (split, class name). Raises InputError beyond a limit, counted in the bytes that arrive.
    """
    counts, total_bytes, one_too_many = Counter(), 0, MAX_PICTURE_BYTES + 1
    with tqdm(total=len(places) or None, unit="picture", leave=False, disable=None) as progress:
        for name, open_member in list_members(source):
            if name != table and name not in places:
                continue
            with open_member() as stream:
                rows = read_table(stream, name) if name == table else [(places[name], stream.read(one_too_many))]
                for place, content in rows:
                    total_bytes += len(content)
                    _check_limit(len(content), MAX_PICTURE_BYTES, "bytes", name)
                    _check_limit(total_bytes, MAX_TOTAL_BYTES, "bytes", source)
                    _check_limit(counts.total() + 1, MAX_MEMBERS, "pictures", source)
                    path = folder / place
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with path.open("xb") as file:
                        file.write(content)
                    counts[tuple(place.split("/")[:2])] += 1
                    progress.update()
    return counts


def download_fer2013() -> Path:
    """Fetch the Kaggle archive with kagglehub and return its folder. Raises InputError where that can't be done."""
    try:
        import kagglehub

        return Path(kagglehub.dataset_download("msambare/fer2013"))
    except Exception as error:  # kagglehub's own, those of requests, OSError: not installed, no network, no login
        reason = printable(" ".join(f"{type(error).__name__}: {error}".split()))
        raise InputError(f"--download failed ({reason}); pip install kagglehub, or {BY_HAND}") from error


def check_new(target: Path) -> None:
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(f"--output-dir {target} is there and not empty; choose a new folder")


@contextlib.contextmanager
def fill(target: Path) -> Iterator[Path]:
    """A folder beside or in `target` to write to; what is in it moves to `target` at the end, or nothing does.

    A target that is there is empty. It may be a mount point or the current folder, so it is filled and not replaced.
    """
    is_there = target.is_dir()
    partial = Path(f"{target}{'/' if is_there else ''}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
        for folder in list(partial.iterdir()) if is_there else [partial]:
            folder.rename(target / folder.name if is_there else target)
    finally:  # of an error or Ctrl-C; after success no picture is left in it
        shutil.rmtree(partial, ignore_errors=True)


def import_fer2013(source: Path | None, target: Path) -> tuple[Counter, str | None]:
    """Write FER2013 from `source` (None downloads it) to `target`/<split>/<class>/, or nothing where that fails.

    Returns (Counter of (split, class name), undecided). Raises InputError for whatever can't be read or written.
    """
    try:
        check_new(target)
        if source and not os.path.exists(source):
            raise InputError(f"No such file or folder: {source}; {BY_HAND}")
        source, table, pictures = find_set(source or download_fer2013())
        places, undecided = place_pictures(source, pictures)
        with fill(target) as partial:
            counts = write_set(source, table, places, partial)
            if "train" not in {split for split, _ in counts}:
                raise InputError(f"{source} holds no training pictures; {BY_HAND}")
        return counts, undecided
    except InputError:
        raise
    except FILE_ERRORS as error:
        raise InputError(f"can't import {source} into {target}: {error}") from error


def print_counts(counts: Counter, undecided: str | None) -> None:
    """Print a table of pictures per split and class, and a line for val/ or test/ where that was not made."""
    totals = Counter(counts)
    for (split, class_name), count in counts.items():
        totals.update({(split, "total"): count, ("total", class_name): count, ("total", "total"): count})
    columns = [split for split in ("train", "val", "test", "total") if totals[split, "total"]]
    print(" " * 8 + "".join(f"{column:>8}" for column in columns))
    for class_name in [*sorted({class_name for _, class_name in counts}), "total"]:
        print(f"{class_name:8}" + "".join(f"{totals[column, class_name]:8,}" for column in columns))
    for split, half in (("val", "PublicTest"), ("test", "PrivateTest")):
        if split not in columns:
            reason = f"{printable(undecided)} is of neither half" if undecided else f"there are no {half} pictures"
            print(f"No {split}/ was made: {reason}.")


def draw_sample(output_dir: Path, seed: int) -> None:
    """Draw train/ and test/ into `output_dir` and print what was written. Raises InputError where files are in them."""
    from prepare import drawings as drawing

    try:
        drawing.draw_sample_set(output_dir, seed=seed)
    except (OSError, ValueError) as error:
        raise InputError(f"can't draw the sample set: {error}") from error
    for folder in (output_dir / "train", output_dir / "test"):
        print(f"{printable(folder)}: {len(list(folder.glob('*/*')))} pictures, {len(list(folder.iterdir()))} classes")


def crop_photos(source: Path, target: Path, min_size: int | None = None) -> None:
    """Writes the largest face of every photo below `source` to the same place in `target`, as PNG.

    Names and leaves out what has no face or can't be read; InputError where nothing is left or OpenCV is missing.
    """
    places = [os.path.realpath(folder) + os.sep for folder in (source, target)]
    if places[1].startswith(places[0]):
        raise InputError(f"--output-dir {target} is inside of {source}; choose another folder")
    if source.is_file():
        raise InputError(f"{source} is a file; name the folder of your photos")
    pictures, kept = [Path(entry.path) for entry in walk_pictures(source)], []
    if not pictures:
        raise InputError(f"{source} holds no pictures; name the folder of your photos")
    find_faces(np.zeros((32, 32), np.uint8), min_size=min_size)  # so that a missing OpenCV shows once, and first
    try:
        check_new(target)
        with fill(target) as partial:
            for path in tqdm(pictures, unit="picture", leave=False, disable=None):
                try:
                    face = crop_largest(path, min_size)
                except InputError as error:
                    tqdm.write(f"left out: {error}", file=sys.stderr)
                    continue
                place, number = partial / path.relative_to(source).with_suffix(".png"), 1
                place.parent.mkdir(parents=True, exist_ok=True)
                while place.exists():  # of another ending
                    number += 1
                    place = place.with_name(f"{path.stem}-{number}.png")
                Image.fromarray(face[..., 0] if (face == face[..., :1]).all() else face).save(place)  # gray stays gray
                kept.append(path)
            if not kept:
                raise InputError(f"none of the {len(pictures):,} pictures in {source} shows a face that is found")
    except OSError as error:
        raise InputError(f"can't crop {source} into {target}: {error}") from error
    for folder in sorted({path.parent for path in pictures} - {path.parent for path in kept}):
        print(f"warning: no picture in {printable(folder)} shows a face that is found", file=sys.stderr)
    print(f"{len(kept):,} faces of {len(pictures):,} pictures written, {len(pictures) - len(kept):,} left out")


def audit_folder(folder: Path, output_dir: Path) -> None:
    """Prints what is wrong with the pictures in `folder`, and writes it to `output_dir`."""
    import json

    from prepare.audit import audit, draw_groups, format_audit

    if output_dir.resolve().parent == folder.resolve() and not any((folder / name).is_dir() for name in SPLITS):
        raise InputError(f"--output-dir {output_dir} would be taken for a class of {folder}; choose another")
    found = audit(folder)
    make_output_dir(output_dir)
    report = format_audit(found)
    files = {
        "audit.txt": lambda path: path.write_text(report, encoding="utf-8"),
        "audit.json": lambda path: path.write_text(json.dumps(found, indent=1), encoding="utf-8"),
        "audit.png": lambda path: draw_groups(found, path),
    }
    for name, write in files.items():
        replace_file(output_dir / name, write)
    print(f"{report}In {printable(output_dir.resolve())}: {', '.join(files)}")


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", metavar="{sample,fer2013,crop,audit}", required=True)
    sample = commands.add_parser("sample", help="draw train/ and test/")
    sample.add_argument("--output-dir", type=Path, default=".", help="folder for train/ and test/ (default: current)")
    sample.add_argument("--seed", type=int, default=0, help="same seed, same pictures (default: 0)")
    fer2013 = commands.add_parser("fer2013", help="import FER2013")
    fer2013.add_argument("source", type=Path, nargs="?", metavar="SOURCE", help="zip, tar.gz, CSV or folder of FER2013")
    fer2013.add_argument("--download", action="store_true", help="fetch msambare/fer2013 with kagglehub instead")
    fer2013.add_argument("--output-dir", type=Path, required=True, help="new folder for train/, val/ and test/")
    crop = commands.add_parser("crop", help="cut the largest face out of every photo")
    crop.add_argument("folder", type=Path, metavar="FOLDER", help="holds photos, in folders of any depth")
    crop.add_argument("--output-dir", type=Path, required=True, help="new folder for the faces")
    crop.add_argument("--min-face", type=int, metavar="PIXELS", help=f"the smallest face (default: {SMALLEST})")
    check = commands.add_parser("audit", help="look for what is wrong in a folder of pictures")
    check.add_argument("folder", type=Path, metavar="FOLDER", help="holds train/, val/, test/, or class folders")
    check.add_argument("--output-dir", type=Path, default="audit", help="for its files (default: audit)")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = get_args_parser().parse_args(argv)
    if args.command == "sample":
        draw_sample(args.output_dir, args.seed)
    elif args.command == "crop":
        crop_photos(args.folder, args.output_dir, args.min_face)
    elif args.command == "audit":
        audit_folder(args.folder, args.output_dir)
    elif args.download == (args.source is not None):
        raise InputError("pass either SOURCE (a zip, tar.gz, CSV or folder) or --download")
    else:
        print_counts(*import_fer2013(args.source, args.output_dir))
        print(f"Next: python train_emotion_cnn.py --data-dir {printable(args.output_dir)}")


if __name__ == "__main__":
    run_script(main)
