import gzip
import io
import os
import re
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import draw_folder, interrupt, open_faceless, open_portrait
from PIL import Image

import prepare_data
from console import run_script
from predict_emotion import BUNDLED, load_model, predict_faces, predict_image
from prepare import fer2013
from prepare.drawings import draw_sample_set
from preprocessing import read_whole

REPO = Path(__file__).resolve().parent.parent
CLASSES = ["angry", "disgust", "fear", "happy", "sad", "surprise", "neutral"]  # in the order of the CSV's numbers


def noise(seed, kind="JPEG"):
    """Bytes of a 48x48 gray image of noise, another for every seed."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (48, 48), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def kaggle_files(root=""):
    """{name: content} as in the Kaggle zip, with one file per half and two of train/ in every class."""
    files = {}
    for index, class_name in enumerate(CLASSES):
        files[f"{root}train/{class_name}/Training_{index}1.jpg"] = noise(4 * index)
        files[f"{root}train/{class_name}/Training_{index}2.png"] = noise(4 * index + 1, "PNG")
        files[f"{root}test/{class_name}/PublicTest_{index}.jpg"] = noise(4 * index + 2)
        files[f"{root}test/{class_name}/PrivateTest_{index}.jpg"] = noise(4 * index + 3)
    return files


FILES = kaggle_files()
IMPORTED = {name.replace("test/", "val/") if "PublicTest" in name else name: FILES[name] for name in FILES}


def write_zip(path, files, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_tar(path, files, extra=()):
    with tarfile.open(path, "w" if path.suffix == ".tar" else "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for member in extra:
            archive.addfile(member)
    return path


def write_folder(path, files):
    for name, content in files.items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return path


def write_source(path, files):
    if isinstance(files, bytes):
        return write_folder(path.parent, {path.name: files}) / path.name
    write = write_zip if path.suffix == ".zip" else write_tar if path.suffix else write_folder
    return write(path, files)


def zip_bytes(files):
    buffer = io.BytesIO()
    write_zip(buffer, files)
    return buffer.getvalue()


def pixels_of(row):
    return np.random.default_rng(100 + row).integers(0, 256, 48 * 48)


def table_rows():
    """(emotion, Usage, pixels) of 14 rows: every class in train, the halves alternating."""
    usages = ["Training"] * 7 + ["PublicTest", "PrivateTest"] * 4
    return [(row % 7, usage, " ".join(map(str, pixels_of(row)))) for row, usage in enumerate(usages[:14])]


FER2013_CSV = "".join(["emotion,pixels,Usage\n", *(f"{e},{p},{u}\n" for e, u, p in table_rows())]).encode()
ICML_CSV = "".join(["emotion, Usage, pixels\n", *(f"{e},{u},{p}\n" for e, u, p in table_rows())]).encode()


def read_tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def run(capsys):
    """Runs main as the script does; returns (exit code, standard output, standard error)."""

    def run_main(*args):
        with pytest.raises(SystemExit) as stop:
            run_script(lambda: prepare_data.main([str(arg) for arg in args]))
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return run_main


@pytest.fixture
def take(run, tmp_path):
    """Imports a source into out/ and asserts that all is well; returns (the written files, standard output)."""

    def run_import(source):
        code, out, err = run("fer2013", source, "--output-dir", tmp_path / "out")
        assert (code, err) == (0, "")
        assert not list(tmp_path.rglob(".partial*"))
        return read_tree(tmp_path / "out"), out

    return run_import


@pytest.fixture
def refuse(run, tmp_path):
    """Asserts that an import ends with 2 and one line with `words`, and that nothing is left but what was there."""

    def run_refused(source, *words, target=None):
        before = sorted(tmp_path.rglob("*"))
        code, out, err = run("fer2013", source, "--output-dir", target or tmp_path / "out")
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
        assert [word for word in words if word not in err] == [], err
        assert "Next:" not in out and sorted(tmp_path.rglob("*")) == before

    return run_refused


def run_command(*args, **options):
    command = [sys.executable, "prepare_data.py", *map(str, args)]
    return subprocess.run(command, cwd=REPO, text=True, timeout=120, capture_output=True, **options)


# Sources


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz", "A.TGZ", "folder"])
@pytest.mark.parametrize("root", ["", "fer2013/", "./archive/data/"])
def test_images_are_copied_byte_for_byte(take, tmp_path, name, root):
    source = write_source(tmp_path / name, kaggle_files(root))
    before = read_tree(tmp_path)
    assert take(source)[0] == IMPORTED
    assert {name: content for name, content in read_tree(tmp_path).items() if not name.startswith("out/")} == before


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("fer2013.csv", FER2013_CSV),
        ("icml_face_data.csv", ICML_CSV),
        ("Renamed.CSV", b"\xef\xbb\xbf" + FER2013_CSV),
        ("blank_lines.csv", FER2013_CSV.replace(b"\n", b"\r\n\r\n")),
        ("folder", {"sub/icml_face_data.csv": ICML_CSV, "sub/train.csv": b"emotion,pixels\n"}),
        ("both", {"a/icml_face_data.csv": b"emotion, Usage, pixels\nbroken\n", "b/fer2013.csv": FER2013_CSV}),
        ("a.zip", {"fer2013.csv": FER2013_CSV, "train.csv": b"emotion,pixels\n"}),
        ("a.tar.gz", {"fer2013/README": b"?", "fer2013/fer2013.csv": FER2013_CSV}),
        ("a.tar", {"fer2013/._fer2013.csv": b"?", "fer2013/fer2013.csv": FER2013_CSV}),
        ("with_zip", {"fer2013.zip": zip_bytes({"fer2013.csv": FER2013_CSV})}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tables(take, tmp_path, name, files):
    source = write_source(tmp_path / name, files)
    expected = {}
    for row, (emotion, usage, _) in enumerate(table_rows()):
        split = {"Training": "train", "PublicTest": "val", "PrivateTest": "test"}[usage]
        expected[f"{split}/{CLASSES[emotion]}/{usage}_{row + 1:08d}.png"] = pixels_of(row).reshape(48, 48)
    written, out = take(source)
    assert set(written) == set(expected) and "was made" not in out
    for place, pixels in expected.items():
        with Image.open(tmp_path / "out" / place) as image:
            assert (image.format, image.mode) == ("PNG", "L")
            np.testing.assert_array_equal(np.asarray(image), pixels)


JUNK = ["README.md", "__MACOSX/train/happy/._x.jpg", "__MACOSX/train/happy/x.jpg", "train/happy/.hidden.jpg", "train/x"]


@pytest.mark.parametrize(
    ("name", "files", "skipped"),
    [
        ("holds_the_zip", {"notes.txt": b"?", "sub/archive.zip": zip_bytes(FILES)}, None),
        ("images_win", {**FILES, "archive.zip": b"not looked into", "fer2013.csv": b"not either"}, None),
        ("junk.zip", dict.fromkeys(JUNK, b"?") | FILES, None),
        ("strays.zip", {"banner.jpg": noise(1), "valid2/happy/x.jpg": noise(2)} | FILES, "2 images"),
    ],
)
def test_what_else_a_source_holds(take, tmp_path, name, files, skipped):
    written, out = take(write_source(tmp_path / name, files))
    assert written == IMPORTED
    assert (f"Skipped {skipped}" in out and "banner.jpg" in out) if skipped else "Skipped" not in out


# Classes and splits


def test_spellings_of_classes(take, tmp_path):
    spellings = dict(anger="angry", Angry="angry", disgusted="disgust", fearful="fear", happiness="happy")
    spellings |= dict(HAPPY="happy", sadness="sad", surprised="surprise", Neutral="neutral")
    source = write_folder(tmp_path / "source", {f"TRAIN/{name}/{name}.jpg": noise(1) for name in spellings})
    assert set(take(source)[0]) == {f"train/{class_name}/{name}.jpg" for name, class_name in spellings.items()}


@pytest.mark.parametrize("class_name", ["contempt", "0", "7"])
def test_unknown_class_is_named_with_the_known_ones(refuse, tmp_path, class_name):
    refuse(write_zip(tmp_path / "a.zip", FILES | {f"train/{class_name}/a.jpg": noise(1)}), f"'{class_name}'", *CLASSES)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("PrivateTest", "No test/ was made: there are no PrivateTest images."),
        ("PublicTest", "No val/ was made: there are no PublicTest images."),
        ("test/sad/im7.png", "No val/ was made: test/sad/im7.png is of neither half."),
        ("val/sad/one.jpg", None),
        ("valid/sad/one.jpg", None),
        ("Validation/sad/one.jpg", None),
    ],
)
def test_halves(take, tmp_path, name, line):
    """Without the half `name`; with a file of neither, or one in a val/ of its own, where test/ stays whole."""
    if "/" in name:
        files, expected = FILES | {name: noise(99)}, FILES | {re.sub("(?i)^valid(ation)?/", "val/", name): noise(99)}
    else:
        files, expected = ({key: files[key] for key in files if name not in key} for files in (FILES, IMPORTED))
    written, out = take(write_zip(tmp_path / "a.zip", files))
    assert written == expected
    assert [text for text in out.splitlines() if "was made" in text] == ([line] if line else [])


def test_an_import_can_be_imported_again(run, take, tmp_path):
    run("fer2013", write_zip(tmp_path / "a.zip", FILES), "--output-dir", tmp_path / "once")
    assert take(tmp_path / "once")[0] == read_tree(tmp_path / "once") == IMPORTED


def test_table_of_counts_and_next_command(take, tmp_path):
    _, out = take(write_zip(tmp_path / "a.zip", FILES | {"train/happy/Training_more.jpg": noise(99)}))
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["train", "val", "test", "total"]
    more = {name: int(name == "happy") for name in sorted(CLASSES)}
    assert lines[1:8] == [[name, str(2 + one), "1", "1", str(4 + one)] for name, one in more.items()]
    assert lines[8] == ["total", "15", "7", "7", "29"]
    assert out.splitlines()[9:] == [f"Next: python train_emotion_cnn.py --data-dir {tmp_path / 'out'}"]


# Refused sources


BAD_ROWS = (
    "7,Training,{pixels} | -1,Training,{pixels} | happy,Training,{pixels} | 3,Validation,{pixels} | 3,Training | "
    "3,Training, | 3,Training,{pixels} 0 | 3,Training,{pixels},3 | 3,Training,0 {short} | 3,Training,256 {short} 0 | "
    "3,Training,-1 {short} 0 | 3,Training,1.5 {short} 0 | 3,Training,x {short} 0 | 3,Training,\udcff | "
    '3,Training,{endless} | 3,Training,"{endless}'
)


@pytest.mark.parametrize("text", BAD_ROWS.split(" | "))
def test_malformed_rows(refuse, tmp_path, text):
    good = " ".join(map(str, pixels_of(0)))
    row = text.format(pixels=good, short=" ".join(["0"] * 2302), endless="0 " * 100_000)
    content = f"emotion,Usage,pixels\n0,Training,{good}\n1,PublicTest,{good}\n{row}\n2,Training,{good}\n"
    (tmp_path / "bad.csv").write_bytes(content.encode(errors="surrogateescape"))
    line = "" if "endless" in text else "line 4"  # an endless one is read in pieces
    refuse(tmp_path / "bad.csv", f"bad.csv, {line}", "emotion (0 to 6)", "Usage (Training,", "2304 from 0 to 255")


def test_the_good_ends_of_the_ranges_are_accepted(take, tmp_path):
    pixels = " ".join(["0", "255"] * 1152)
    (tmp_path / "good.csv").write_text(f"emotion,pixels,Usage\n6,{pixels},Training\n0,{pixels},Training\n")
    written, _ = take(tmp_path / "good.csv")
    assert sorted(written) == ["train/angry/Training_00000002.png", "train/neutral/Training_00000001.png"]


@pytest.mark.parametrize(
    ("name", "files", "words"),
    [
        ("missing.zip", None, ["missing.zip", "no file or folder"]),
        ("missing", None, ["missing", "no file or folder"]),
        ("a.txt", b"?", ["a.txt", ".zip"]),
        ("a.csv", b"emotion,pixels\n0,0\n", ["a.csv", "columns"]),
        ("a.csv", b"", ["a.csv", "training images"]),
        ("a.csv", b"emotion,pixels,Usage\n", ["a.csv", "training images"]),
        ("f", {"notes": b""}, ["0 archives", "kaggle.com"]),
        ("f", {"a.zip": zip_bytes({}), "b.zip": zip_bytes({})}, ["2 archives"]),
        ("a.zip", {"happy/a.jpg": noise(1)}, ["a.zip", "train/<class>"]),
        ("a.zip", {"test/sad/PublicTest_1.jpg": noise(1)}, ["a.zip", "no training images"]),
        ("a.zip", kaggle_files("one/") | kaggle_files("two/"), ["more than one set", "one and two"]),
        ("a.zip", FILES | {"train/happiness/Training_31.jpg": noise(9)}, ["train/happy/Training_31.jpg"]),
        ("a.zip", {"train/ha\x1b[31m\nppy/a.jpg": noise(1)}, [r"ha\x1b[31m\nppy"]),
        ("a.zip", FILES | {f"train/happy/{'x' * 300}.jpg": noise(1)}, ["too long"]),  # after 28 that can be written
    ],
)
def test_sources_that_hold_no_set(refuse, tmp_path, name, files, words):
    if files is not None:
        write_source(tmp_path / name, files)
    refuse(tmp_path / name, *words)


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz", "a.tar", "a.csv"])
@pytest.mark.parametrize("damage", ["empty", "text", "cut", "flipped"])
def test_damaged_sources(refuse, tmp_path, name, damage):
    source = tmp_path / name
    write_source(source, FER2013_CSV if name == "a.csv" else FILES)
    content = source.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + b"\xff" * 2000 + content[middle + 2000 :]
    if name == "a.tar" and damage == "flipped":
        flipped = b"\xff" * 512 + content[512:]  # a tar has checksums of its headers only
    source.write_bytes({"empty": b"", "text": b"x" * 3000, "cut": content[:middle], "flipped": flipped}[damage])
    refuse(source, name)


def test_encrypted_zip(refuse, tmp_path):
    source = write_zip(tmp_path / "a.zip", {"train/happy/a.jpg": noise(1)}, zipfile.ZIP_STORED)
    content = bytearray(source.read_bytes())
    content[6] |= 1  # the encryption bit of the local header
    content[content.index(b"PK\x01\x02") + 8] |= 1
    source.write_bytes(content)
    refuse(source, "a.zip", "encrypted")


# Hostile archives


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
@pytest.mark.parametrize("name", ["../evil.jpg", "train/happy/../../../evil.jpg", "train/..", "/tmp/happy/evil.jpg"])
def test_members_that_lead_out_of_the_target(refuse, tmp_path, name, kind):
    refuse(write_source(tmp_path / f"a.{kind}", FILES | {name: noise(99)}), f"'{name}'", "leads out")


@pytest.mark.parametrize(
    ("name", "kind", "target"),
    [
        ("train/happy/link.jpg", tarfile.SYMTYPE, "Training_31.jpg"),
        ("train/happy/link.jpg", tarfile.SYMTYPE, "/etc/hostname"),
        ("train/happy/link.jpg", tarfile.LNKTYPE, "train/happy/Training_31.jpg"),
        ("train/happy/link.jpg", tarfile.FIFOTYPE, ""),
        ("train/happy/link.jpg", tarfile.CHRTYPE, ""),
        ("../evil", tarfile.DIRTYPE, ""),
    ],
)
def test_tar_links_devices_and_folders_outside(refuse, tmp_path, name, kind, target):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    refuse(write_tar(tmp_path / "a.tar.gz", FILES, extra=[member]), f"'{name}'", "is a link or leads out")


def test_zip_symlink(refuse, tmp_path):
    info = zipfile.ZipInfo("train/happy/link.jpg")
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(write_zip(tmp_path / "a.zip", FILES), "a") as archive:
        archive.writestr(info, "/etc/hostname")
    refuse(tmp_path / "a.zip", "'train/happy/link.jpg'", "is a link")


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_one_member_may_not_stand_twice(refuse, tmp_path, kind):
    source = tmp_path / f"a.{kind}"
    if kind == "zip":
        write_zip(source, FILES | {"train/happy/Training_3x.jpg": noise(99)})
        source.write_bytes(source.read_bytes().replace(b"Training_3x", b"Training_31"))
    else:
        write_tar(source, FILES, extra=[tarfile.TarInfo("train/happy/Training_31.jpg")])
    refuse(source, "'train/happy/Training_31.jpg' twice")


# Limits


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
@pytest.mark.parametrize(("limit", "value", "enough"), [("MAX_FILES", 28, 29), ("MAX_BYTES", 500_000, 10**7)])
def test_limits(take, refuse, tmp_path, monkeypatch, kind, limit, value, enough):
    source = write_source(tmp_path / f"a.{kind}", FILES | {"zeros.bin": bytes(500_000)})  # 29 files
    monkeypatch.setattr(fer2013, limit, value)
    refuse(source, f"{value:,}", "FER2013")
    monkeypatch.setattr(fer2013, limit, enough)
    assert take(source)[0] == IMPORTED


def test_headers_of_a_tar_are_neither_read_whole_nor_without_end(refuse, tmp_path, monkeypatch):
    source = tmp_path / "a.tar.gz"
    with tarfile.open(source, "w:gz", format=tarfile.PAX_FORMAT, pax_headers={"comment": "x" * 10_000_000}) as archive:
        archive.addfile(tarfile.TarInfo("a.jpg"))
    longest = []
    read = gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda file, size=-1: longest.append(size) or read(file, size))
    refuse(source, "a.tar.gz")
    assert 0 < max(longest) <= 2**20
    monkeypatch.setattr(fer2013, "MAX_BYTES", 500_000)
    refuse(source, "500,000 bytes")


def test_headers_that_lie_about_the_size(refuse, tmp_path):
    content = noise(1)
    source = write_zip(tmp_path / "a.zip", {"train/happy/a.jpg": content}, zipfile.ZIP_STORED)
    for lie in (10, 10**9):
        lying = source.read_bytes().replace(len(content).to_bytes(4, "little"), lie.to_bytes(4, "little"))
        (tmp_path / "lying.zip").write_bytes(lying)
        refuse(tmp_path / "lying.zip", "lying.zip")


# Targets


def test_targets_that_cannot_be_filled(refuse, tmp_path):
    source = write_zip(tmp_path / "a.zip", FILES)
    write_folder(tmp_path, {"file": b"mine", "full/mine.txt": b"mine"})
    refuse(source, "--output-dir", "not empty", target=tmp_path / "full")
    refuse(source, "file", "not empty", target=tmp_path / "file")
    refuse(source, "File exists", target=tmp_path / "file" / "out")
    refuse(source, "too long", target=tmp_path / ("x" * 300))
    assert (tmp_path / "file").read_text() == (tmp_path / "full" / "mine.txt").read_text() == "mine"


def test_an_empty_target_is_filled_or_stays_empty(run, refuse, tmp_path, monkeypatch):
    source = write_zip(tmp_path / "a.zip", FILES)
    (tmp_path / "a.csv").write_bytes(FER2013_CSV + b"broken\n")
    (tmp_path / "out").mkdir()
    refuse(tmp_path / "a.csv", "line 16")
    assert list((tmp_path / "out").iterdir()) == []
    monkeypatch.chdir(tmp_path / "out")
    assert run("fer2013", source, "--output-dir", ".")[0] == 0
    assert read_tree(Path.cwd()) == IMPORTED  # the current folder itself, not one that took its place
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["test", "train", "val"]


def test_parents_of_the_target_are_made_with_the_usual_permissions(run, tmp_path):
    target = tmp_path / "a" / "b" / "c"
    assert run("fer2013", write_zip(tmp_path / "a.zip", FILES), "--output-dir", target)[0] == 0
    assert read_tree(target) == IMPORTED
    assert target.stat().st_mode == target.parent.stat().st_mode


@pytest.mark.parametrize(
    ("name", "function"),
    [("a.zip", "_check_member"), ("a.tar.gz", "_check_member"), ("a.zip", "copyfile"), ("a.csv", "fromarray")],
)
@pytest.mark.parametrize("exists", [False, True])
def test_ctrl_c_leaves_nothing(tmp_path, name, function, exists):
    write_source(tmp_path / name, FER2013_CSV if name == "a.csv" else FILES)
    if exists:
        (tmp_path / "out").mkdir()
    before = sorted(tmp_path.rglob("*"))
    interrupt(prepare_data.main, ["fer2013", tmp_path / name, "--output-dir", tmp_path / "out"], function, call=10)
    assert sorted(tmp_path.rglob("*")) == before


# Command line


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["fer2013", "a.zip", "--download", "--output-dir", "out"], ["SOURCE", "--download"]),
        (["fer2013", "--output-dir", "out"], ["SOURCE", "--download"]),
        (["fer2013", "a.zip"], ["--output-dir"]),
        (["sample", "--seed", "x"], ["--seed"]),
        (["sample", "--seed", "-1"], ["--seed"]),
        (["crop", "photos", "--output-dir", "out", "--min-face", "0"], ["--min-face"]),
        ([], ["crop"]),
        (["unknown"], ["unknown"]),
    ],
)
def test_wrong_arguments(run, tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*args)
    assert (code, out, err.count("\n")) == (2, "", 1) and [word for word in words if word not in err] == []
    assert list(tmp_path.iterdir()) == []


def test_the_command_draws_a_bar_where_a_person_looks(tmp_path):
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    source = write_zip(tmp_path / "archive.zip", FILES)
    mine, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    os.set_blocking(mine, False)
    command = [sys.executable, "prepare_data.py", "fer2013", source, "--output-dir", tmp_path / "out"]
    result = subprocess.run(command, cwd=REPO, text=True, timeout=120, stdout=subprocess.PIPE, stderr=theirs)
    shown = os.read(mine, 100_000).decode()  # before the other end closes, or it is lost
    os.close(theirs)
    os.close(mine)
    assert result.returncode == 0 and "0/28" in shown
    assert result.stdout.splitlines()[-1] == f"Next: python train_emotion_cnn.py --data-dir {tmp_path / 'out'}"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (None, ["pip install kagglehub", "https://www.kaggle.com/datasets/msambare/fer2013", "pass the zip"]),
        ("raise RuntimeError('no network\\nfor ' + name)", ["no network for msambare/fer2013", "by hand"]),
    ],
    ids=["no kagglehub", "no network"],
)
def test_download_that_fails(run, tmp_path, monkeypatch, body, words):
    monkeypatch.setitem(sys.modules, "kagglehub", None)  # as if it were not installed, wherever this runs
    if body:
        monkeypatch.delitem(sys.modules, "kagglehub")
        (tmp_path / "modules").mkdir()
        (tmp_path / "modules/kagglehub.py").write_text(f"def dataset_download(name):\n    {body}\n")
        monkeypatch.syspath_prepend(tmp_path / "modules")
    before = list(tmp_path.iterdir())
    code, out, err = run("fer2013", "--download", "--output-dir", tmp_path / "out")
    assert (code, out, err.count("\n")) == (2, "", 1) and [word for word in words if word not in err] == []
    assert list(tmp_path.iterdir()) == before
    (tmp_path / "mine.txt").write_text("mine")
    code, _, err = run("fer2013", "--download", "--output-dir", tmp_path)
    assert code == 2 and "not empty" in err  # before anything is fetched


def test_download(tmp_path):
    cache = write_folder(tmp_path / "cache", FILES)
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules/kagglehub.py").write_text(
        f"def dataset_download(name):\n    assert name == 'msambare/fer2013'\n    return {str(cache)!r}\n"
    )
    path = os.pathsep.join(filter(None, [str(tmp_path / "modules"), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path}
    result = run_command("fer2013", "--download", "--output-dir", tmp_path / "out", env=environment)
    assert (result.returncode, result.stderr) == (0, "")
    assert read_tree(tmp_path / "out") == IMPORTED and read_tree(cache) == FILES


# The sample set


def test_sample(run, tmp_path):
    result = run_command("sample", "--output-dir", tmp_path / "set", "--seed", "3")
    assert (result.returncode, result.stderr) == (0, "")
    places = [(tmp_path / "set" / "train", 560), (tmp_path / "set" / "test", 140)]
    assert result.stdout.splitlines() == [f"{place}: {count} images, 7 classes" for place, count in places]
    assert [len(read_tree(place)) for place, _ in places] == [560, 140]

    before = read_tree(tmp_path)
    code, out, err = run("sample", "--output-dir", tmp_path / "set", "--seed", "4")
    assert (code, out, err.count("\n")) == (2, "", 1) and str(tmp_path / "set" / "train") in err
    assert read_tree(tmp_path) == before
    (tmp_path / "file").write_text("mine")
    code, out, err = run("sample", "--output-dir", tmp_path / "file")
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("error: can't draw the sample set")


def test_sample_depends_on_its_seed_alone(tmp_path):
    for name, seed in (("one", 3), ("same", 3), ("other", 4)):
        draw_sample_set(tmp_path / name, train_per_class=2, test_per_class=1, seed=seed)
    one, same, other = (read_tree(tmp_path / name) for name in ("one", "same", "other"))
    assert one == same and one.keys() == other.keys()
    assert len({*one.values(), *other.values()}) == 2 * 7 * 3


# Photos to faces


def test_photos_are_cropped_to_what_predictions_see(run, tmp_path):
    pytest.importorskip("cv2", reason="needs OpenCV")
    photos = draw_folder(tmp_path / "photos" / "train", {"sad": 1}, 48)  # a crop already
    (photos / "happy").mkdir()
    open_portrait().save(photos / "happy" / "photo.png")
    open_portrait().convert("L").save(photos / "happy" / "photo.bmp")
    open_faceless().save(photos / "happy" / "shirt.png")
    (photos / "angry").mkdir()
    open_faceless().save(photos / "angry" / "shirt.jpg")
    (photos / "happy" / "broken.jpg").write_bytes(b"broken")
    code, out, err = run("crop", tmp_path / "photos", "--output-dir", tmp_path / "faces")
    assert code == 0 and out == "3 faces of 6 images written, 3 left out\n"
    assert [line.partition(": ")[0] for line in err.splitlines()] == ["left out"] * 3 + ["warning"]
    assert str(photos / "angry") in err.splitlines()[-1]
    assert "broken.jpg" in err and "no upright face" in err and "shirt.png" in err
    faces = tmp_path / "faces" / "train"
    modes = {path.relative_to(faces).as_posix(): Image.open(path).mode for path in faces.glob("*/*")}
    assert modes == {"happy/photo.png": "L", "happy/photo-2.png": "RGB", "sad/sad_000.png": "L"}
    assert (read_whole(faces / "sad" / "sad_000.png") == read_whole(photos / "sad" / "sad_000.png")).all()
    model, names = load_model(BUNDLED, "cpu")
    (expected,) = predict_faces(model, photos / "happy" / "photo.png", names)
    emotion, _, probs = predict_image(model, faces / "happy" / "photo-2.png", names)
    assert emotion == expected["emotion"] and probs == pytest.approx(expected["probs"], abs=1e-3)


def test_crop_refuses_in_one_line(run, tmp_path):
    pytest.importorskip("cv2", reason="needs OpenCV")
    (tmp_path / "photos").mkdir()
    open_faceless().save(tmp_path / "photos" / "shirt.png")
    write_folder(tmp_path, {"full/mine.txt": b"mine"})
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    mistakes = [
        ("nowhere", "new", "nowhere"),
        ("empty", "new", "holds no images"),
        ("photos", "full", "full"),
        ("photos", "new", "shows a face"),
        ("photos", "photos/new", "inside"),
        ("photos", "photos", "inside"),
        ("photos/shirt.png", "new", "shirt.png"),
    ]
    for source, target, word in mistakes:
        code, out, err = run("crop", tmp_path / source, "--output-dir", tmp_path / target)
        assert (code, out) == (2, "") and err.splitlines()[-1].startswith("error: ") and word in err.splitlines()[-1]
        assert sorted(tmp_path.rglob("*")) == before


def test_small_faces_are_cropped_where_they_are_asked_for(run, tmp_path):
    pytest.importorskip("cv2", reason="needs OpenCV")
    (tmp_path / "photos").mkdir()
    open_portrait().resize((144, 144)).save(tmp_path / "photos" / "small.png")  # its face has about 28 pixels
    words = ("crop", tmp_path / "photos", "--output-dir", tmp_path / "faces")
    code, _, err = run(*words)
    assert code == 2 and "30 pixels" in err
    code, _, err = run(*words, "--min-face", "20")
    assert code == 0, err
    assert max(Image.open(tmp_path / "faces" / "small.png").size) < 32
