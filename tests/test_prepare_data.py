import gzip
import io
import os
import signal
import stat
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import draw_folder, open_faceless, open_portrait
from PIL import Image

import prepare_data
from console import run_script
from predict_emotion import BUNDLED, load_model, predict_faces, predict_image
from prepare.drawings import draw_sample_set
from preprocessing import read_whole

REPO = Path(__file__).resolve().parent.parent
CLASSES = ["angry", "disgust", "fear", "happy", "sad", "surprise", "neutral"]  # in the order of the CSV's numbers


def picture(seed, kind="JPEG"):
    """Bytes of a 48x48 gray picture of noise, another for every seed."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (48, 48), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def kaggle_files(root=""):
    """{name: content} as in the Kaggle zip, with one file per half and two of train/ in every class."""
    files = {}
    for index, class_name in enumerate(CLASSES):
        files[f"{root}train/{class_name}/Training_{index}1.jpg"] = picture(4 * index)
        files[f"{root}train/{class_name}/Training_{index}2.png"] = picture(4 * index + 1, "PNG")
        files[f"{root}test/{class_name}/PublicTest_{index}.jpg"] = picture(4 * index + 2)
        files[f"{root}test/{class_name}/PrivateTest_{index}.jpg"] = picture(4 * index + 3)
    return files


def imported(files, root=""):
    """What importing `kaggle_files` must write."""
    names = {name: name.removeprefix(root) for name in files}
    return {name.replace("test/", "val/") if "PublicTest" in name else name: files[key] for key, name in names.items()}


def write_zip(path, files, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_tar(path, files, mode="w:gz", extra=()):
    with tarfile.open(path, mode) as archive:
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


def pixels_of(row):
    return np.random.default_rng(100 + row).integers(0, 256, 48 * 48)


def table_rows():
    """(emotion, Usage, pixels) of 14 rows: every class in train, the halves alternating."""
    usages = ["Training"] * 7 + ["PublicTest", "PrivateTest"] * 4
    return [(row % 7, usage, " ".join(map(str, pixels_of(row)))) for row, usage in enumerate(usages[:14])]


def fer2013_csv(rows=None):
    lines = [f"{emotion},{pixels},{usage}\n" for emotion, usage, pixels in (table_rows() if rows is None else rows)]
    return "".join(["emotion,pixels,Usage\n", *lines]).encode()


def icml_csv():
    return "".join(["emotion, Usage, pixels\n", *(f"{e},{u},{p}\n" for e, u, p in table_rows())]).encode()


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
def refuse(run, tmp_path):
    """Asserts that an import ends with 2 and one line with `words`, and that nothing is left beside what was there."""

    def run_refused(source, *words, target=None):
        before = sorted(tmp_path.rglob("*"))
        code, out, err = run("fer2013", source, "--output-dir", target or tmp_path / "out")
        assert code == 2
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert "Traceback" not in err
        for word in words:
            assert word in err
        assert "Next:" not in out
        assert sorted(tmp_path.rglob("*")) == before

    return run_refused


def run_command(*args, **options):
    return subprocess.run(
        [sys.executable, "prepare_data.py", *map(str, args)],
        cwd=REPO,
        text=True,
        timeout=120,
        capture_output=True,
        **options,
    )


# Sources


@pytest.mark.parametrize("root", ["", "fer2013/", "archive/data/"])
def test_kaggle_zip_is_copied_byte_for_byte(run, tmp_path, root):
    files = kaggle_files(root)
    source = write_zip(tmp_path / "archive.zip", files)
    code, _, err = run("fer2013", source, "--output-dir", tmp_path / "out")
    assert (code, err) == (0, "")
    assert read_tree(tmp_path / "out") == imported(files, root)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["archive.zip", "out"]


@pytest.mark.parametrize(("name", "mode"), [("a.tar", "w"), ("a.tar.gz", "w:gz"), ("A.TGZ", "w:gz")])
def test_pictures_in_a_tar(run, tmp_path, name, mode):
    files = kaggle_files("./top/")
    code, _, _ = run("fer2013", write_tar(tmp_path / name, files, mode), "--output-dir", tmp_path / "out")
    assert code == 0
    assert read_tree(tmp_path / "out") == imported(files, "./top/")


def test_unpacked_folder_is_copied_and_left_alone(run, tmp_path):
    files = kaggle_files("fer2013/")
    source = write_folder(tmp_path / "source", files)
    code, _, _ = run("fer2013", source, "--output-dir", tmp_path / "out")
    assert code == 0
    assert read_tree(tmp_path / "out") == imported(files, "fer2013/")
    assert read_tree(source) == files


def assert_table_pictures(folder):
    expected = {}
    for row, (emotion, usage, _) in enumerate(table_rows()):
        split = {"Training": "train", "PublicTest": "val", "PrivateTest": "test"}[usage]
        expected[f"{split}/{CLASSES[emotion]}/{usage}_{row + 1:08d}.png"] = pixels_of(row).reshape(48, 48)
    assert set(read_tree(folder)) == set(expected)
    for name, pixels in expected.items():
        with Image.open(folder / name) as image:
            assert (image.format, image.mode) == ("PNG", "L")
            np.testing.assert_array_equal(np.asarray(image), pixels)


def nested_zip(folder):
    return write_folder(folder, {"data/fer.zip": write_zip(folder.parent / "x.zip", kaggle_files()).read_bytes()})


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: write_folder(folder, {"fer2013.csv": fer2013_csv()}) / "fer2013.csv",
        lambda folder: write_folder(folder, {"icml_face_data.csv": icml_csv()}) / "icml_face_data.csv",
        lambda folder: write_folder(folder, {"Renamed.CSV": b"\xef\xbb\xbf" + fer2013_csv()}) / "Renamed.CSV",
        lambda folder: write_folder(folder, {"blank.csv": fer2013_csv().replace(b"\n", b"\r\n\r\n")}) / "blank.csv",
        lambda folder: write_folder(
            folder, {"sub/icml_face_data.csv": icml_csv(), "sub/train.csv": b"emotion,pixels\n"}
        ),
        lambda folder: write_zip(folder / "a.zip", {"fer2013.csv": fer2013_csv(), "train.csv": b"emotion,pixels\n"}),
        lambda folder: write_tar(
            folder / "fer2013.tar.gz", {"fer2013/README": b"?", "fer2013/fer2013.csv": fer2013_csv()}
        ),
        lambda folder: write_tar(folder / "fer2013.tar", {"fer2013/fer2013.csv": fer2013_csv()}, "w"),
        lambda folder: write_tar(folder / "fer2013.tar.gz", {"fer2013/fer2013.csv": fer2013_csv()}).parent,
    ],
    ids=["fer2013", "icml", "bom", "blank-lines", "folder", "zip", "tar.gz", "tar", "folder-with-tar.gz"],
)
def test_tables(run, tmp_path, make):
    (tmp_path / "source").mkdir()
    code, out, err = run("fer2013", make(tmp_path / "source"), "--output-dir", tmp_path / "out")
    assert (code, err) == (0, "")
    assert_table_pictures(tmp_path / "out")
    assert "was made" not in out


def test_fer2013_csv_is_taken_where_both_tables_are_there(run, tmp_path):
    files = {"a/icml_face_data.csv": b"emotion, Usage, pixels\nbroken\n", "b/fer2013.csv": fer2013_csv()}
    code, _, _ = run("fer2013", write_folder(tmp_path / "source", files), "--output-dir", tmp_path / "out")
    assert code == 0
    assert_table_pictures(tmp_path / "out")


def test_folder_that_holds_the_zip(run, tmp_path):
    files = kaggle_files()
    archive = write_zip(tmp_path / "fer.zip", files).read_bytes()
    source = write_folder(tmp_path / "source", {"notes.txt": b"?", "sub/archive.zip": archive})
    code, _, _ = run("fer2013", source, "--output-dir", tmp_path / "out")
    assert code == 0
    assert read_tree(tmp_path / "out") == imported(files)


def test_pictures_win_over_the_archive_they_came_from(run, tmp_path):
    files = kaggle_files()
    source = write_folder(tmp_path / "source", {**files, "archive.zip": b"not looked into"})
    code, _, _ = run("fer2013", source, "--output-dir", tmp_path / "out")
    assert code == 0
    assert read_tree(tmp_path / "out") == imported(files)


def test_what_is_no_picture_is_skipped(run, tmp_path):
    files = kaggle_files()
    junk = dict.fromkeys(
        [
            "README.md",
            "__MACOSX/train/happy/._Training_1.jpg",
            "__MACOSX/train/happy/Training_1.jpg",
            "train/.DS_Store",
            "train/happy/.hidden.jpg",
            "train/happy/Thumbs.db",
        ],
        b"?",
    )
    code, out, _ = run("fer2013", write_zip(tmp_path / "a.zip", junk | files), "--output-dir", tmp_path / "out")
    assert code == 0
    assert read_tree(tmp_path / "out") == imported(files)
    assert "Skipped" not in out


def test_pictures_outside_of_the_splits_are_named(run, tmp_path):
    files = kaggle_files()
    strays = {"banner.jpg": picture(1), "valid/happy/x.jpg": picture(2)}
    code, out, _ = run("fer2013", write_zip(tmp_path / "a.zip", strays | files), "--output-dir", tmp_path / "out")
    assert code == 0
    assert "Skipped 2 pictures" in out
    assert "banner.jpg" in out
    assert read_tree(tmp_path / "out") == imported(files)


# Classes and splits


@pytest.mark.parametrize(
    ("spelling", "class_name"),
    [
        ("anger", "angry"),
        ("Angry", "angry"),
        ("disgusted", "disgust"),
        ("fearful", "fear"),
        ("happiness", "happy"),
        ("HAPPY", "happy"),
        ("sadness", "sad"),
        ("surprised", "surprise"),
        ("Neutral", "neutral"),
    ],
)
def test_spellings_of_classes(run, tmp_path, spelling, class_name):
    source = write_folder(tmp_path / "source", {f"TRAIN/{spelling}/a.jpg": picture(1)})
    code, _, _ = run("fer2013", source, "--output-dir", tmp_path / "out")
    assert code == 0
    assert read_tree(tmp_path / "out") == {f"train/{class_name}/a.jpg": picture(1)}


def test_unknown_class_is_named_with_the_known_ones(refuse, tmp_path):
    source = write_zip(tmp_path / "a.zip", kaggle_files() | {"train/contempt/a.jpg": picture(1)})
    refuse(source, "'contempt'", *CLASSES)


def test_only_the_public_half(run, tmp_path):
    files = {name: content for name, content in kaggle_files().items() if "Private" not in name}
    code, out, _ = run("fer2013", write_zip(tmp_path / "a.zip", files), "--output-dir", tmp_path / "out")
    assert code == 0
    assert read_tree(tmp_path / "out") == imported(files)
    assert not (tmp_path / "out/test").exists()
    assert [line for line in out.splitlines() if "was made" in line] == [
        "No test/ was made: there are no PrivateTest pictures."
    ]


def test_only_the_private_half(run, tmp_path):
    files = {name: content for name, content in kaggle_files().items() if "Public" not in name}
    code, out, _ = run("fer2013", write_zip(tmp_path / "a.zip", files), "--output-dir", tmp_path / "out")
    assert code == 0
    assert read_tree(tmp_path / "out") == files
    assert [line for line in out.splitlines() if "was made" in line] == [
        "No val/ was made: there are no PublicTest pictures."
    ]


def test_halves_that_cannot_be_told_apart_stay_in_test(run, tmp_path):
    files = kaggle_files() | {"test/sad/im7.png": picture(99, "PNG")}
    code, out, _ = run("fer2013", write_zip(tmp_path / "a.zip", files), "--output-dir", tmp_path / "out")
    assert code == 0
    assert read_tree(tmp_path / "out") == files
    assert [line for line in out.splitlines() if "was made" in line] == [
        "No val/ was made: test/sad/im7.png is of neither half."
    ]


@pytest.mark.parametrize("folder", ["val", "validation", "Validation"])
def test_val_of_the_source_stays(run, tmp_path, folder):
    files = kaggle_files() | {f"{folder}/sad/one.jpg": picture(99)}
    code, out, _ = run("fer2013", write_zip(tmp_path / "a.zip", files), "--output-dir", tmp_path / "out")
    assert code == 0
    assert read_tree(tmp_path / "out") == {name.replace(f"{folder}/", "val/"): files[name] for name in files}
    assert "was made" not in out


def test_an_import_can_be_imported_again(run, tmp_path):
    files = kaggle_files()
    run("fer2013", write_zip(tmp_path / "a.zip", files), "--output-dir", tmp_path / "once")
    code, _, _ = run("fer2013", tmp_path / "once", "--output-dir", tmp_path / "twice")
    assert code == 0
    assert read_tree(tmp_path / "twice") == read_tree(tmp_path / "once") == imported(files)


def test_table_of_counts_and_next_command(run, tmp_path):
    files = kaggle_files() | {"train/happy/Training_more.jpg": picture(99)}
    code, out, _ = run("fer2013", write_zip(tmp_path / "a.zip", files), "--output-dir", tmp_path / "out")
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["train", "val", "test", "total"]
    assert lines[1:8] == [
        [name, str(2 + (name == "happy")), "1", "1", str(4 + (name == "happy"))] for name in sorted(CLASSES)
    ]
    assert lines[8] == ["total", "15", "7", "7", "29"]
    assert out.splitlines()[9:] == [f"Next: python train_emotion_cnn.py --data-dir {tmp_path / 'out'}"]


# Refused sources


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("7,Training,{pixels}", ["row 3", "emotion 0 to 6"]),
        ("-1,Training,{pixels}", ["row 3"]),
        ("happy,Training,{pixels}", ["row 3"]),
        ("3,Validation,{pixels}", ["row 3", "Usage Training"]),
        ("3,Training,{pixels} 0", ["row 3", "2304 pixels"]),
        ("3,Training,0 {short}", ["row 3"]),
        ("3,Training,256 {short} 0", ["row 3"]),
        ("3,Training,-1 {short} 0", ["row 3"]),
        ("3,Training,1.5 {short} 0", ["row 3"]),
        ("3,Training,x {short} 0", ["row 3"]),
        ("3,Training,", ["row 3"]),
        ("3,Training", ["row 3"]),
        ("3,Training,{pixels},3", ["row 3"]),
        ("3,Training,{endless}", ["row 3"]),
        ("3,Training,\udcff", ["bad.csv"]),
        ('3,Training,"{endless}', ["bad.csv"]),
    ],
)
def test_malformed_rows(refuse, tmp_path, text, words):
    good = " ".join(map(str, pixels_of(0)))
    row = text.format(pixels=good, short=" ".join(["0"] * 2302), endless="0 " * 100_000)
    content = f"emotion,Usage,pixels\n0,Training,{good}\n1,PublicTest,{good}\n{row}\n2,Training,{good}\n"
    source = tmp_path / "bad.csv"
    source.write_bytes(content.encode(errors="surrogateescape"))
    refuse(source, *words)


def test_the_good_ends_of_the_ranges_are_accepted(run, tmp_path):
    pixels = " ".join(["0", "255"] * 1152)
    (tmp_path / "good.csv").write_bytes(fer2013_csv([(6, "Training", pixels), (0, "Training", pixels)]))
    code, _, _ = run("fer2013", tmp_path / "good.csv", "--output-dir", tmp_path / "out")
    assert code == 0
    assert sorted(read_tree(tmp_path / "out")) == [
        "train/angry/Training_00000002.png",
        "train/neutral/Training_00000001.png",
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"emotion,pixels\n0,0\n", ["columns"]), (b"", ["columns"]), (b"emotion,pixels,Usage\n", ["training pictures"])],
)
def test_tables_without_what_is_needed(refuse, tmp_path, content, words):
    (tmp_path / "train.csv").write_bytes(content)
    refuse(tmp_path / "train.csv", "train.csv", *words)


def test_sources_that_hold_no_set(refuse, tmp_path):
    refuse(tmp_path / "missing.zip", "missing.zip", "No such file")
    refuse(tmp_path / "missing", "missing", "No such file or folder")
    (tmp_path / "a.txt").write_text("?")
    refuse(tmp_path / "a.txt", "a.txt", ".zip")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", "empty", "0 archives", "kaggle.com")
    refuse(write_zip(tmp_path / "b.zip", {"happy/a.jpg": picture(1)}), "b.zip", "train/<class>")
    refuse(write_zip(tmp_path / "c.zip", {"test/sad/PublicTest_1.jpg": picture(1)}), "c.zip", "no training pictures")
    two = {"a.zip": (tmp_path / "b.zip").read_bytes(), "b.zip": (tmp_path / "c.zip").read_bytes()}
    refuse(write_folder(tmp_path / "two", two), "2 archives")


def test_two_sets_in_one_source(refuse, tmp_path):
    files = kaggle_files("one/") | kaggle_files("two/")
    refuse(write_zip(tmp_path / "a.zip", files), "more than one set", "one and two")


def test_two_files_of_one_place(refuse, tmp_path):
    files = kaggle_files() | {"train/happiness/Training_31.jpg": picture(99)}
    refuse(write_zip(tmp_path / "a.zip", files), "train/happy/Training_31.jpg")


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz", "a.tar", "a.csv"])
@pytest.mark.parametrize("damage", ["empty", "text", "cut", "flipped"])
def test_damaged_sources(refuse, tmp_path, name, damage):
    source = tmp_path / name
    if name.endswith("zip"):
        write_zip(source, kaggle_files())
    elif name.endswith("csv"):
        source.write_bytes(fer2013_csv())
    else:
        write_tar(source, kaggle_files(), "w:gz" if name.endswith("gz") else "w")
    content = source.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + b"\xff" * 2000 + content[middle + 2000 :]
    if name == "a.tar" and damage == "flipped":
        flipped = b"\xff" * 512 + content[512:]  # a tar has checksums of its headers only
    source.write_bytes({"empty": b"", "text": b"x" * 3000, "cut": content[:middle], "flipped": flipped}[damage])
    refuse(source, name)


def test_encrypted_zip(refuse, tmp_path):
    source = write_zip(tmp_path / "a.zip", {"train/happy/a.jpg": picture(1)}, zipfile.ZIP_STORED)
    content = bytearray(source.read_bytes())
    content[6] |= 1  # the encryption bit of the local header
    content[content.index(b"PK\x01\x02") + 8] |= 1
    source.write_bytes(content)
    refuse(source, "a.zip", "encrypted")


# Hostile archives


@pytest.mark.parametrize(
    "name",
    [
        "../evil.jpg",
        "train/happy/../../../evil.jpg",
        "train/..",
        "/train/happy/evil.jpg",
        "C:/train/happy/a.jpg",
        "train/happy/C:evil.jpg",
        "train\\happy\\evil.jpg",
        "train/happy/..\\evil.jpg",
    ],
)
@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_members_that_lead_out_of_the_target(refuse, tmp_path, name, kind):
    files = kaggle_files() | {name: picture(99)}
    source = tmp_path / f"a.{kind}"
    if kind == "zip":
        write_zip(source, files)
    else:
        write_tar(source, files, "w:gz" if kind == "tar.gz" else "w")
    refuse(source, f"'{name}'", "leads out")


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE],
    ids=["symlink", "hardlink", "fifo", "device"],
)
def test_tar_links_and_devices(refuse, tmp_path, kind):
    member = tarfile.TarInfo("train/happy/link.jpg")
    member.type, member.linkname = kind, "train/happy/Training_31.jpg"
    refuse(write_tar(tmp_path / "a.tar.gz", kaggle_files(), extra=[member]), "'train/happy/link.jpg'", "is a link")


def test_tar_folder_outside(refuse, tmp_path):
    member = tarfile.TarInfo("../evil")
    member.type = tarfile.DIRTYPE
    refuse(write_tar(tmp_path / "a.tar.gz", kaggle_files(), extra=[member]), "'../evil'")


def test_zip_symlink(refuse, tmp_path):
    source = write_zip(tmp_path / "a.zip", kaggle_files())
    info = zipfile.ZipInfo("train/happy/link.jpg")
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(source, "a") as archive:
        archive.writestr(info, "/etc/hostname")
    refuse(source, "'train/happy/link.jpg'", "is a link")


def test_zip_name_with_nul(refuse, tmp_path):
    source = write_zip(tmp_path / "a.zip", {"train/happy/a.jpg#.txt": picture(1)})
    source.write_bytes(source.read_bytes().replace(b"a.jpg#.txt", b"a.jpg\0.txt"))
    refuse(source, r"a.jpg\x00.txt")


def test_control_characters_of_names_are_escaped(refuse, tmp_path):
    refuse(write_zip(tmp_path / "a.zip", {"train/ha\x1b[31m\nppy/a.jpg": picture(1)}), r"ha\x1b[31m\nppy")


def test_one_member_may_not_stand_twice(refuse, tmp_path):
    files = kaggle_files()
    source = write_zip(tmp_path / "a.zip", files)
    with zipfile.ZipFile(source, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("train/happy/Training_31.jpg", picture(99))
    refuse(source, "train/happy/Training_31.jpg")


# Limits


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "folder"])
@pytest.mark.parametrize(
    ("limit", "value"), [("MAX_MEMBERS", 27), ("MAX_TOTAL_BYTES", 30_000), ("MAX_PICTURE_BYTES", 2400)]
)
def test_limits(run, refuse, tmp_path, monkeypatch, kind, limit, value):
    files = kaggle_files()
    sizes = [len(content) for content in files.values()]
    assert len(files) == 28
    assert min(sizes) < 2400 < max(sizes) < 4000
    assert sum(sizes) > 30_000
    write = {"zip": write_zip, "tar.gz": write_tar, "folder": write_folder}[kind]
    source = write(tmp_path / f"a.{kind}", files)
    monkeypatch.setattr(prepare_data, limit, value)
    refuse(source, f"{value:,}", "FER2013")
    monkeypatch.setattr(prepare_data, limit, 28 if limit == "MAX_MEMBERS" else 4000 if "PICTURE" in limit else 10**6)
    assert run("fer2013", source, "--output-dir", tmp_path / "out")[0] == 0


def test_limit_of_rows(refuse, tmp_path, monkeypatch):
    (tmp_path / "fer2013.csv").write_bytes(fer2013_csv())
    monkeypatch.setattr(prepare_data, "MAX_MEMBERS", 13)
    refuse(tmp_path / "fer2013.csv", "13 pictures")


def test_a_tar_is_limited_by_what_it_skips_too(refuse, tmp_path, monkeypatch):
    source = write_tar(tmp_path / "a.tar.gz", kaggle_files() | {"zeros.bin": bytes(1_000_000)})
    monkeypatch.setattr(prepare_data, "MAX_TOTAL_BYTES", 500_000)
    refuse(source, "500,000 bytes")


def test_an_extended_header_is_not_read_whole(refuse, tmp_path, monkeypatch):
    source = tmp_path / "a.tar.gz"
    with tarfile.open(source, "w:gz", format=tarfile.PAX_FORMAT, pax_headers={"comment": "x" * 10_000_000}) as archive:
        archive.addfile(tarfile.TarInfo("a.jpg"))
    longest = []
    read = gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda file, size=-1: longest.append(size) or read(file, size))
    monkeypatch.setattr(prepare_data, "MAX_PICTURE_BYTES", 100_000)
    refuse(source, "a.tar.gz")
    assert max(longest) == 200_000


def test_headers_that_lie_about_the_size(refuse, tmp_path):
    content = picture(1)
    source = write_zip(tmp_path / "a.zip", {"train/happy/a.jpg": content}, zipfile.ZIP_STORED)
    size = len(content).to_bytes(4, "little")
    for lie in (10, 10**9):
        lying = source.read_bytes().replace(size, lie.to_bytes(4, "little"))
        (tmp_path / "lying.zip").write_bytes(lying)
        refuse(tmp_path / "lying.zip", "lying.zip")


# Targets


def test_a_target_that_is_not_empty_is_refused(refuse, tmp_path):
    source = write_zip(tmp_path / "a.zip", kaggle_files())
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    refuse(source, "--output-dir", "not empty")
    assert (tmp_path / "out/mine.txt").read_text() == "mine"


def test_targets_that_cannot_be_written(refuse, tmp_path):
    source = write_zip(tmp_path / "a.zip", kaggle_files())
    (tmp_path / "file").write_text("mine")
    refuse(source, "file", "not empty", target=tmp_path / "file")
    refuse(source, "Not a directory", target=tmp_path / "file" / "out")
    refuse(source, "too long", target=tmp_path / ("x" * 300))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_write_that_fails_in_the_middle(refuse, tmp_path):
    source = write_zip(tmp_path / "a.zip", kaggle_files() | {f"train/happy/{'x' * 300}.jpg": picture(1)})
    refuse(source, "too long")  # a name that no file system takes, after 28 that it takes


def test_an_empty_target_is_filled(run, tmp_path, monkeypatch):
    files = kaggle_files()
    source = write_zip(tmp_path / "a.zip", files)
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    assert run("fer2013", source, "--output-dir", ".")[0] == 0
    assert read_tree(Path.cwd()) == imported(files)  # the current folder itself, not one that took its place
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["test", "train", "val"]


def test_a_failure_leaves_an_empty_target_empty(refuse, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "a.csv").write_bytes(fer2013_csv() + b"broken\n")
    refuse(tmp_path / "a.csv", "row 15")
    assert list((tmp_path / "out").iterdir()) == []


def test_parents_of_the_target_are_made(run, tmp_path):
    files = kaggle_files()
    assert run("fer2013", write_zip(tmp_path / "a.zip", files), "--output-dir", tmp_path / "a/b/c")[0] == 0
    assert read_tree(tmp_path / "a/b/c") == imported(files)


def hear_ctrl_c():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a suite that runs in the background inherits that it is ignored


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_ctrl_c_leaves_nothing(tmp_path):
    os.mkfifo(tmp_path / "slow.csv")  # its end never comes, so the import is under way when the signal arrives
    pipe = os.open(tmp_path / "slow.csv", os.O_RDWR)
    os.write(pipe, fer2013_csv(table_rows()[:4]))
    process = subprocess.Popen(
        [sys.executable, "prepare_data.py", "fer2013", tmp_path / "slow.csv", "--output-dir", tmp_path / "out"],
        cwd=REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_ctrl_c,
    )
    try:
        deadline = time.monotonic() + 90
        while not list(tmp_path.glob("out.partial-*/train/*/*.png")):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
        os.close(pipe)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["slow.csv"]


# Command line


def test_source_and_download_or_neither(run, tmp_path):
    for args in (["a.zip", "--download"], []):
        code, out, err = run("fer2013", *args, "--output-dir", tmp_path / "out")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "SOURCE" in err
        assert "--download" in err


@pytest.mark.parametrize("args", [[], ["fer2013", "a.zip"], ["unknown"], ["sample", "--seed", "x"]])
def test_wrong_arguments(run, args):
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    assert "Traceback" not in err


def test_the_command_draws_a_bar_where_a_person_looks(tmp_path):
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    files = kaggle_files()
    source = write_zip(tmp_path / "archive.zip", files)
    mine, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    os.set_blocking(mine, False)
    result = subprocess.run(
        [sys.executable, "prepare_data.py", "fer2013", source, "--output-dir", tmp_path / "out"],
        cwd=REPO,
        text=True,
        timeout=120,
        stdout=subprocess.PIPE,
        stderr=theirs,
    )
    shown = os.read(mine, 100_000).decode()  # before the other end closes, or it is lost
    os.close(theirs)
    os.close(mine)
    assert result.returncode == 0
    assert "0/28" in shown
    assert result.stdout.splitlines()[-1] == f"Next: python train_emotion_cnn.py --data-dir {tmp_path / 'out'}"
    assert read_tree(tmp_path / "out") == imported(files)


def test_the_command_says_an_error_in_one_line(tmp_path):
    source = write_zip(tmp_path / "a.zip", kaggle_files() | {"../evil.jpg": picture(1)})
    result = run_command("fer2013", source, "--output-dir", tmp_path / "out")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert "'../evil.jpg'" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]


def test_download_without_kagglehub(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "kagglehub", None)  # as if it were not installed, wherever this runs
    code, out, err = run("fer2013", "--download", "--output-dir", tmp_path / "out")
    assert (code, out, err.count("\n")) == (2, "", 1)
    for word in ("pip install kagglehub", "https://www.kaggle.com/datasets/msambare/fer2013", "pass the zip"):
        assert word in err
    assert list(tmp_path.iterdir()) == []


def test_download_without_network(run, tmp_path, monkeypatch):
    (tmp_path / "kagglehub.py").write_text(
        "def dataset_download(name):\n    raise RuntimeError('no network\\nfor ' + name)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "kagglehub", raising=False)
    code, _, err = run("fer2013", "--download", "--output-dir", tmp_path / "out")
    assert (code, err.count("\n")) == (2, 1)
    assert "no network for msambare/fer2013" in err
    assert "by hand" in err
    assert not (tmp_path / "out").exists()
    sys.modules.pop("kagglehub", None)


def test_download_does_not_start_for_a_target_that_is_not_empty(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "kagglehub", None)
    (tmp_path / "mine.txt").write_text("mine")
    code, _, err = run("fer2013", "--download", "--output-dir", tmp_path)
    assert code == 2
    assert "not empty" in err


def test_download(tmp_path):
    files = kaggle_files()
    write_folder(tmp_path / "cache", files)
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules/kagglehub.py").write_text(
        f"def dataset_download(name):\n    assert name == 'msambare/fer2013'\n    return {str(tmp_path / 'cache')!r}\n"
    )
    path = os.pathsep.join(filter(None, [str(tmp_path / "modules"), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path}
    result = run_command("fer2013", "--download", "--output-dir", tmp_path / "out", env=environment)
    assert (result.returncode, result.stderr) == (0, "")
    assert read_tree(tmp_path / "out") == imported(files)
    assert read_tree(tmp_path / "cache") == files


# The sample set


def test_sample(run, tmp_path):
    result = run_command("sample", "--output-dir", tmp_path / "set", "--seed", "3")
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert len(lines) == 2
    for line, split in zip(lines, ("train", "test"), strict=True):
        files = [path for path in (tmp_path / "set" / split).rglob("*") if path.is_file()]
        classes = {path.parent.name for path in files}
        assert line == f"{tmp_path / 'set' / split}: {len(files)} pictures, {len(classes)} classes"
        assert len(files) > len(classes) > 1

    before = read_tree(tmp_path)
    code, out, err = run("sample", "--output-dir", tmp_path / "set", "--seed", "4")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert str(tmp_path / "set" / "train") in err
    assert read_tree(tmp_path) == before


def test_sample_depends_on_its_seed_alone(tmp_path):
    for name, seed in (("one", 3), ("same", 3), ("other", 4)):
        draw_sample_set(tmp_path / name, train_per_class=2, test_per_class=1, seed=seed)
    one, same, other = (read_tree(tmp_path / name) for name in ("one", "same", "other"))
    assert one == same and one.keys() == other.keys()
    assert len({*one.values(), *other.values()}) == 2 * 7 * 3


def test_sample_that_cannot_be_written(run, tmp_path):
    (tmp_path / "file").write_text("mine")
    for args in (["--output-dir", tmp_path / "file"], ["--output-dir", tmp_path / "new", "--seed", "-1"]):
        code, out, err = run("sample", *args)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith("error: can't draw the sample set")


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
    assert code == 0 and out == "3 faces of 6 pictures written, 3 left out\n"
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
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    before = read_tree(tmp_path)
    (tmp_path / "empty").mkdir()
    mistakes = [
        ("nowhere", "new", "nowhere"),
        ("empty", "new", "holds no pictures"),
        ("photos", "full", "full"),
        ("photos", "new", "shows a face"),
        ("photos", "photos/new", "inside"),
        ("photos", "photos", "inside"),
    ]
    for source, target, word in mistakes:
        code, out, err = run("crop", tmp_path / source, "--output-dir", tmp_path / target)
        assert (code, out) == (2, "") and err.splitlines()[-1].startswith("error: ") and word in err.splitlines()[-1]
        assert read_tree(tmp_path) == before and not (tmp_path / "new").exists()


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
    code, _, err = run("crop", tmp_path / "photos" / "small.png", "--output-dir", tmp_path / "more")
    assert code == 2 and "is a file" in err
