"""Makes a folder to train on: draws the sample set, imports FER2013, crops photos to faces, or audits a folder.

    python prepare_data.py sample                                   # draws train/ and test/ into the current folder
    python prepare_data.py fer2013 archive.zip --output-dir FOLDER  # writes FOLDER/train/, FOLDER/val/, FOLDER/test/
    python prepare_data.py fer2013 fer2013.csv --output-dir FOLDER
    python prepare_data.py fer2013 --download --output-dir FOLDER   # fetches the archive with kagglehub
    python prepare_data.py crop FOLDER --output-dir NEW             # the largest face of every photo
    python prepare_data.py audit FOLDER                             # unreadable, blank, duplicate, mislabeled images

The challenge's PublicTest half becomes val/, its PrivateTest half test/. The archive may also be its unpacked folder,
fer2013.csv, icml_face_data.csv, a zip or tar.gz with one of those tables, or a folder with one of all these.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from checkpoints import flush_folder, replace_file
from console import ArgumentParser, make_output_dir, number, run_script
from data import describe_others, find_splits, walk
from errors import InputError, printable
from faces.detector import LONGEST, SMALLEST
from prepare.audit import audit, draw_groups, format_audit
from prepare.crop import crop_photos
from prepare.drawings import draw_sample_set
from prepare.fer2013 import download_fer2013, format_counts, import_fer2013


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="{sample,fer2013,crop,audit}", required=True)

    command = commands.add_parser("sample", help="draw train/ and test/")
    command.add_argument("--output-dir", type=Path, default=".", help="folder for train/ and test/ (default: .)")
    command.add_argument("--seed", type=number(int, 0), default=0, help="same seed, same images (default: 0)")

    command = commands.add_parser("fer2013", help="import FER2013")
    command.add_argument("source", type=Path, nargs="?", metavar="SOURCE", help="zip, tar.gz, CSV or folder of FER2013")
    command.add_argument("--download", action="store_true", help="fetch msambare/fer2013 with kagglehub instead")
    command.add_argument("--output-dir", type=Path, required=True, help="new folder for train/, val/ and test/")

    command = commands.add_parser("crop", help="cut the largest face out of every photo")
    command.add_argument("folder", type=Path, metavar="FOLDER", help="holds photos, in folders of any depth")
    command.add_argument("--output-dir", type=Path, required=True, help="new folder for the faces")
    command.add_argument(
        "--min-face",
        type=number(int, 1),
        metavar="PIXELS",
        help=f"the smallest face (default: {SMALLEST}, or a 60th of an image of over {LONGEST})",
    )

    command = commands.add_parser("audit", help="look for what is wrong in a folder of images")
    command.add_argument("folder", type=Path, metavar="FOLDER", help="holds train/, val/, test/, or class folders")
    command.add_argument("--output-dir", type=Path, default="audit", help="for its files (default: audit)")
    return parser


@contextlib.contextmanager
def new_folder(target: Path, *names: str) -> Iterator[Path]:
    """Yields an empty folder; its content moves to `target`, the --output-dir, at the end, but not after an error.

    A target that exists must be empty, or with `names` only be without these. It may be a mount point or the current
    folder, so it is filled, not replaced. InputError if it holds more, and for any OSError.
    """
    target = Path(os.path.abspath(target))
    exists = os.path.isdir(target)
    try:
        for path in [target / name for name in names] or [target]:
            if os.path.lexists(path) and (names or not exists or any(path.iterdir())):
                raise InputError(
                    f"--output-dir: {path} is there{'' if names else ' and not empty'}; choose a new folder"
                )
        parent = target if exists else target.parent
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=parent) as temporary:
            partial = Path(temporary, target.name or "new")  # made by mkdir, for the usual permissions
            partial.mkdir()
            yield partial
            if hasattr(os, "sync"):
                os.sync()  # a power cut must not leave half of the images behind whole names
            for source in list(partial.iterdir()) if exists else [partial]:
                source.rename(target / source.name if exists else target)
            flush_folder(parent)
    except OSError as error:
        raise InputError(f"can't fill --output-dir {target}: {error}") from error


def run_sample(output_dir: Path, seed: int) -> None:
    with new_folder(output_dir, "train", "test") as folder:
        draw_sample_set(folder, seed=seed)
    for folder in (output_dir / "train", output_dir / "test"):
        print(f"{printable(folder)}: {len(walk(folder))} images, {len(list(folder.iterdir()))} classes")


def run_fer2013(source: Path | None, download: bool, output_dir: Path) -> None:
    if download == (source is not None):
        raise InputError("pass either SOURCE (a zip, tar.gz, CSV or folder) or --download")
    with new_folder(output_dir) as folder:
        counts, notes = import_fer2013(source or download_fer2013(), folder)
    print(format_counts(counts), *notes, sep="\n")
    print(f"Next: python train_emotion_cnn.py --data-dir {printable(output_dir)}")


def run_crop(photos: Path, output_dir: Path, min_face: int | None) -> None:
    if output_dir.resolve().is_relative_to(photos.resolve()):
        raise InputError(f"--output-dir {output_dir} is inside of {photos}; choose another folder")
    with new_folder(output_dir) as folder:
        kept, total = crop_photos(photos, folder, min_face)
    others = describe_others(photos)
    print(f"{kept:,} faces of {total:,} images written, {total - kept:,} left out{others and f', not read: {others}'}")


def run_audit(folder: Path, output_dir: Path) -> None:
    if output_dir.resolve().parent == folder.resolve() and not find_splits(folder):
        raise InputError(f"--output-dir {output_dir} would be taken for a class of {folder}; choose another")
    found = audit(folder)
    report = format_audit(found)
    files = {
        "audit.txt": lambda path: path.write_text(report, encoding="utf-8"),
        "audit.json": lambda path: path.write_text(json.dumps(found, indent=1), encoding="utf-8"),
    }
    if found["groups"]:
        files["audit.png"] = lambda path: draw_groups(found, path)
    make_output_dir(output_dir)
    (output_dir / "audit.png").unlink(missing_ok=True)  # of an earlier audit
    for name, write in files.items():
        replace_file(output_dir / name, write)
    print(f"{report}In {printable(output_dir.resolve())}: {', '.join(files)}")


def main(argv: list[str] | None = None) -> None:
    args = get_args_parser().parse_args(argv)
    if args.command == "sample":
        run_sample(args.output_dir, args.seed)
    elif args.command == "fer2013":
        run_fer2013(args.source, args.download, args.output_dir)
    elif args.command == "crop":
        run_crop(args.folder, args.output_dir, args.min_face)
    else:
        run_audit(args.folder, args.output_dir)


if __name__ == "__main__":
    run_script(main)
