"""prepare_data.py: imports FER2013 in every form that is passed around, draws the sample set, crops photos to faces."""

import gzip
import io
import os
import stat
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import assert_refused, draw_folder, full_disk, interrupt, open_faceless, open_portrait, run
from PIL import Image

from predict_emotion import BUNDLED, load_model, predict_faces, predict_image
from prepare import fer2013
from prepare.drawings import draw_sample_set
from prepare_data import main
from preprocessing import read_whole

CLASSES = ["angry", "disgust", "fear", "happy", "sad", "surprise", "neutral"]  # in the order of the CSV's numbers


def noise(seed, kind="JPEG"):
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
JUNK = ["README.md", "__MACOSX/train/happy/._x.jpg", "__MACOSX/train/happy/x.jpg", "train/happy/.hidden.jpg", "train/x"]
IMPORTED = {name.replace("test/", "val/") if "PublicTest" in name else name: FILES[name] for name in FILES}


def zip_bytes(files, compression=zipfile.ZIP_DEFLATED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def write(path, files):
    """Writes what the path's ending asks for: a file of bytes, or an archive or folder of {name: bytes}."""
    if path.suffix == ".zip" and not isinstance(files, bytes):
        files = zip_bytes(files)
    if isinstance(files, bytes):
        path.write_bytes(files)
    elif path.suffix:
        with tarfile.open(path, "w" if path.suffix == ".tar" else "w:gz") as archive:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    else:
        for name, content in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
    return path


USAGES = ["Training"] * 7 + ["PublicTest", "PrivateTest"] * 3 + ["PublicTest"]
SPLITS = {"Training": "train", "PublicTest": "val", "PrivateTest": "test"}
PIXELS = np.random.default_rng(0).integers(0, 256, (14, 48, 48))
ROWS = [(row % 7, usage, " ".join(map(str, PIXELS[row].flat))) for row, usage in enumerate(USAGES)]
FER2013_CSV = "".join(["emotion,pixels,Usage\n", *(f"{e},{p},{u}\n" for e, u, p in ROWS)]).encode()
ICML_CSV = "".join(["emotion, Usage, pixels\n", *(f"{e},{u},{p}\n" for e, u, p in ROWS)]).encode()


def read_tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def take(source):
    """Imports a source into new/out/ next to it; returns (the written files, standard output)."""
    target = source.parent / "new" / "out"
    code, out, err = run(main, "fer2013", source, "--output-dir", target)
    assert (code, err) == (0, "") and not list(source.parent.rglob(".partial*"))
    assert target.stat().st_mode == target.parent.stat().st_mode  # the usual permissions
    return read_tree(target), out


def refuse(source, *words):
    before = sorted(source.parent.rglob("*"))
    assert_refused(main, ["fer2013", source, "--output-dir", source.parent / "out"], *words)
    assert sorted(source.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "files", "skipped"),
    [
        ("a.tar", kaggle_files("./archive/data/"), 0),
        ("A.TGZ", FILES, 0),
        ("folder", kaggle_files("fer2013/"), 0),
        ("holds_the_zip", {"notes.txt": b"?", "sub/archive.zip": zip_bytes(FILES)}, 0),
        ("images_win", {**FILES, "archive.zip": b"not looked into", "fer2013.csv": b"not either"}, 0),
        ("imported", IMPORTED, 0),
        ("junk.zip", dict.fromkeys(JUNK, b"?") | FILES, 0),
        ("strays.zip", {"banner.jpg": noise(1), "valid2/happy/x.jpg": noise(2)} | FILES, 2),
    ],
)
def test_images_are_copied_byte_for_byte(tmp_path, name, files, skipped):
    source = write(tmp_path / name, files)
    before = read_tree(tmp_path)
    written, out = take(source)
    assert written == IMPORTED
    assert {name: content for name, content in read_tree(tmp_path).items() if not name.startswith("new/")} == before
    assert ("Skipped 2 images" in out and "banner.jpg" in out) if skipped else "Skipped" not in out


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("icml_face_data.csv", ICML_CSV),
        ("Renamed.CSV", b"\xef\xbb\xbf" + FER2013_CSV),
        ("blank_lines.csv", FER2013_CSV.replace(b"\n", b"\r\n\r\n")),
        ("folder", {"sub/icml_face_data.csv": ICML_CSV, "sub/train.csv": b"emotion,pixels\n"}),
        ("both", {"a/icml_face_data.csv": b"emotion, Usage, pixels\nbroken\n", "b/fer2013.csv": FER2013_CSV}),
        ("a.zip", {"fer2013.csv": FER2013_CSV, "train.csv": b"emotion,pixels\n"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tables(tmp_path, name, files):
    expected = {}
    for row, usage in enumerate(USAGES):
        expected[f"{SPLITS[usage]}/{CLASSES[row % 7]}/{usage}_{row + 1:08d}.png"] = PIXELS[row]
    written, out = take(write(tmp_path / name, files))
    assert set(written) == set(expected) and "was made" not in out
    for place, pixels in expected.items():
        with Image.open(tmp_path / "new/out" / place) as image:
            assert (image.format, image.mode) == ("PNG", "L")
            np.testing.assert_array_equal(np.asarray(image), pixels)


def test_spellings_of_classes(tmp_path):
    spellings = dict(anger="angry", Angry="angry", disgusted="disgust", fearful="fear", happiness="happy")
    spellings |= dict(HAPPY="happy", sadness="sad", surprised="surprise", Neutral="neutral")
    source = write(tmp_path / "source", {f"TRAIN/{name}/{name}.jpg": noise(1) for name in spellings})
    assert set(take(source)[0]) == {f"train/{class_name}/{name}.jpg" for name, class_name in spellings.items()}


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("PrivateTest", "No test/ was made: there are no PrivateTest images."),
        ("PublicTest", "No val/ was made: there are no PublicTest images."),
        ("test/sad/im7.png", "No val/ was made: test/sad/im7.png is of neither half."),
        ("val/sad/one.jpg", None),
    ],
)
def test_halves(tmp_path, name, line):
    """Without the half `name`; with a file of neither, or one in a val/ of its own, where test/ stays whole."""
    files = expected = FILES | {name: noise(99)}
    if "/" not in name:
        files, expected = ({key: tree[key] for key in tree if name not in key} for tree in (FILES, IMPORTED))
    written, out = take(write(tmp_path / "a.zip", files))
    assert written == expected
    assert [text for text in out.splitlines() if "was made" in text] == ([line] if line else [])


def test_counts_and_next_command(tmp_path):
    _, out = take(write(tmp_path / "a.zip", FILES | {"train/happy/Training_more.jpg": noise(99)}))
    *table, command = out.splitlines()
    head, *rows = [line.split() for line in table]
    assert head == ["train", "val", "test", "total"]
    happy, total = ["happy", "3", "1", "1", "5"], ["total", "15", "7", "7", "29"]
    others = [[name, "2", "1", "1", "4"] for name in CLASSES if name != "happy"]
    assert rows == [*sorted([happy, *others]), total]
    assert command == f"Next: python train_emotion_cnn.py --data-dir {tmp_path / 'new' / 'out'}"


def test_download(tmp_path, monkeypatch):
    def download(name):
        if not cache.exists():
            raise RuntimeError(f"no network\nfor {name}")
        return str(cache)

    cache, arguments = tmp_path / "cache", ["fer2013", "--download", "--output-dir", tmp_path / "out"]
    monkeypatch.setitem(sys.modules, "kagglehub", None)  # as if it were not installed, wherever this runs
    assert_refused(main, arguments, "pip install kagglehub", "https://www.kaggle.com/datasets/msambare/fer2013")
    monkeypatch.setitem(sys.modules, "kagglehub", SimpleNamespace(dataset_download=download))
    assert_refused(main, arguments, "no network for msambare/fer2013", "by hand")
    assert list(tmp_path.iterdir()) == []
    write(cache, FILES)
    assert run(main, *arguments)[0] == 0
    assert read_tree(tmp_path / "out") == IMPORTED and read_tree(cache) == FILES


@pytest.mark.parametrize(
    ("name", "files", "words"),
    [
        ("missing.zip", None, ["missing.zip", "no file or folder"]),
        ("a.txt", b"?", ["a.txt", ".zip"]),
        ("a.csv", b"emotion,pixels\n0,0\n", ["a.csv", "columns"]),
        ("f", {"notes": b""}, ["0 archives", "kaggle.com"]),
        ("f", {"a.zip": zip_bytes({}), "b.zip": zip_bytes({})}, ["2 archives"]),
        ("a.zip", {"happy/a.jpg": noise(1)}, ["a.zip", "train/<class>"]),
        ("a.zip", {"test/sad/PublicTest_1.jpg": noise(1)}, ["a.zip", "no training images"]),
        ("a.zip", FILES | {"train/contempt/a.jpg": noise(1)}, ["'contempt'", *CLASSES]),
        ("a.zip", kaggle_files("one/") | kaggle_files("two/"), ["more than one set", "one and two"]),
        ("a.zip", FILES | {"train/happiness/Training_31.jpg": noise(9)}, ["train/happy/Training_31.jpg"]),
        ("a.zip", {"train/ha\x1b[31m\nppy/a.jpg": noise(1)}, [r"ha\x1b[31m\nppy"]),
        ("a.zip", FILES | {f"train/happy/{'x' * 300}.jpg": noise(1)}, ["too long"]),  # after 28 that can be written
    ],
)
def test_sources_that_hold_no_set(tmp_path, name, files, words):
    if files is not None:
        write(tmp_path / name, files)
    refuse(tmp_path / name, *words)


BAD_ROWS = (
    "7,Training,{pixels} | 3,Validation,{pixels} | 3,Training | 3,Training, | 3,Training,{pixels} 0 | "
    "3,Training,{pixels},3 | 3,Training,0 {short} | 3,Training,256 {short} 0 | 3,Training,-1 {short} 0 | "
    '3,Training,1.5 {short} 0 | 3,Training,\udcff | 3,Training,{endless} | 3,Training,"{endless}'
)


@pytest.mark.parametrize("text", BAD_ROWS.split(" | "))
def test_malformed_rows(tmp_path, text):
    good = ROWS[0][2]
    row = text.format(pixels=good, short=" ".join(["0"] * 2302), endless="0 " * 100_000)
    content = f"emotion,Usage,pixels\n0,Training,{good}\n1,PublicTest,{good}\n{row}\n2,Training,{good}\n"
    (tmp_path / "bad.csv").write_bytes(content.encode(errors="surrogateescape"))
    line = "" if "endless" in text else "line 4"  # an endless one is read in pieces
    refuse(tmp_path / "bad.csv", f"bad.csv, {line}", "emotion (0 to 6)", "Usage (Training,", "2304 from 0 to 255")


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz", "a.tar", "a.csv"])
@pytest.mark.parametrize("damage", ["empty", "text", "cut", "flipped"])
def test_damaged_sources(tmp_path, name, damage):
    source = write(tmp_path / name, FER2013_CSV if name == "a.csv" else FILES)
    content = source.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + b"\xff" * 2000 + content[middle + 2000 :]
    if name == "a.tar":
        flipped = b"\xff" * 512 + content[512:]  # a tar has checksums of its headers only
    source.write_bytes({"empty": b"", "text": b"x" * 3000, "cut": content[:middle], "flipped": flipped}[damage])
    refuse(source, name)


@pytest.mark.parametrize("compress", [lambda content: content, gzip.compress], ids=["tar", "tar.gz"])
@pytest.mark.parametrize("damage", ["cut", "header"])
def test_a_tar_does_not_end_early(tmp_path, damage, compress):
    """Cut off between two members, or with a damaged header: to tarfile both look like the end."""
    content = write(tmp_path / "whole.tar", FILES).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as archive:
        start = archive.getmembers()[5].offset
    rest = {"cut": b"", "header": b"\xff" * 512 + content[start + 512 :]}[damage]
    source = tmp_path / f"a.tar{'.gz' * (compress is gzip.compress)}"
    source.write_bytes(compress(content[:start] + rest))
    refuse(source, "cut short or damaged")


def test_what_would_take_for_ever_ends_early(tmp_path):
    """A table of blank lines, and a folder that links to itself, twice."""
    (tmp_path / "a.zip").write_bytes(zip_bytes({"fer2013.csv": b"\n" * 30_000_000}))
    refuse(tmp_path / "a.zip", "this is not FER2013")
    (tmp_path / "loop").mkdir()
    for name in ("one", "two"):
        (tmp_path / "loop" / name).symlink_to(tmp_path / "loop", target_is_directory=True)
    refuse(tmp_path / "loop", "holds no train/")


def test_headers_of_a_zip_that_lie(tmp_path):
    content = zip_bytes({"train/happy/a.jpg": noise(1)}, zipfile.ZIP_STORED)
    size, small, large = (number.to_bytes(4, "little") for number in (len(noise(1)), 10, 10**9))
    plain, encrypted = b"\x14\0\0\0", b"\x14\0\1\0"  # version and flags
    for old, new, word in ((size, small, "a.zip"), (size, large, "a.zip"), (plain, encrypted, "encrypted")):
        refuse(write(tmp_path / "a.zip", content.replace(old, new)), word)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("archive", ["a.zip", "a.tar"])
@pytest.mark.parametrize(
    ("kind", "name", "reason"),
    [
        (tarfile.REGTYPE, "train/happy/../../../evil.jpg", "leads out"),
        (tarfile.REGTYPE, "/tmp/happy/evil.jpg", "leads out"),
        (tarfile.SYMTYPE, "train/happy/link.jpg", "is a link"),
        (tarfile.LNKTYPE, "train/happy/link.jpg", "is a link"),
        (tarfile.GNUTYPE_SPARSE, "train/happy/sparse.jpg", "is a link"),
        (tarfile.REGTYPE, "train/happy/Training_31.jpg", "'train/happy/Training_31.jpg' twice"),
    ],
)
def test_hostile_members(tmp_path, archive, kind, name, reason):
    if archive == "a.zip":
        member = zipfile.ZipInfo(name)
        mode = stat.S_IFREG if kind == tarfile.REGTYPE else stat.S_IFLNK
        member.create_system, member.external_attr = 3, mode << 16
        with zipfile.ZipFile(write(tmp_path / archive, FILES), "a") as file:
            file.writestr(member, "/etc/hostname")
    else:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, "/etc/hostname"
        with tarfile.open(write(tmp_path / archive, FILES), "a") as file:
            file.addfile(member)
    refuse(tmp_path / archive, f"'{name}'", reason)


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
@pytest.mark.parametrize(("limit", "value", "enough"), [("MAX_FILES", 28, 29), ("MAX_BYTES", 500_000, 10**7)])
def test_limits(tmp_path, monkeypatch, kind, limit, value, enough):
    source = write(tmp_path / f"a.{kind}", FILES | {"zeros.bin": bytes(500_000)})  # 29 files
    monkeypatch.setattr(fer2013, limit, value)
    refuse(source, f"{value:,}", "FER2013")
    monkeypatch.setattr(fer2013, limit, enough)
    assert take(source)[0] == IMPORTED


def test_headers_of_a_tar_are_neither_read_whole_nor_without_end(tmp_path, monkeypatch):
    source, read, longest = tmp_path / "a.tar.gz", gzip.GzipFile.read, []
    with tarfile.open(source, "w:gz", format=tarfile.PAX_FORMAT, pax_headers={"comment": "x" * 10_000_000}) as archive:
        archive.addfile(tarfile.TarInfo("a.jpg"))
    monkeypatch.setattr(gzip.GzipFile, "read", lambda file, size=-1: longest.append(size) or read(file, size))
    refuse(source, "a.tar.gz")
    assert 0 < max(longest) <= 2**20
    monkeypatch.setattr(fer2013, "MAX_BYTES", 500_000)
    refuse(source, "500,000 bytes")


def test_an_empty_target_is_filled_or_stays_empty(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    refuse(write(tmp_path / "a.csv", FER2013_CSV + b"broken\n"), "line 16")
    monkeypatch.chdir(tmp_path / "out")
    assert run(main, "fer2013", write(tmp_path / "a.zip", FILES), "--output-dir", ".")[0] == 0
    assert read_tree(Path.cwd()) == IMPORTED  # the current folder itself, not one that took its place
    assert sorted(os.listdir()) == ["test", "train", "val"]


@pytest.mark.parametrize("name, function", [("a.tgz", "_check_member"), ("a.zip", "copyfile"), ("a.csv", "fromarray")])
@pytest.mark.parametrize("target", ["new", "empty"])
def test_ctrl_c_leaves_nothing(tmp_path, name, function, target):
    write(tmp_path / name, FER2013_CSV if name == "a.csv" else FILES)
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    interrupt(main, ["fer2013", tmp_path / name, "--output-dir", tmp_path / target], function, call=10)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("command", "word"),
    [
        ("", "crop"),
        ("fer2013 a.zip", "--output-dir"),
        ("fer2013 a.zip --download --output-dir out", "SOURCE"),
        ("fer2013 --download --output-dir full", "not empty"),  # before anything is fetched
        *((f"fer2013 a.zip --output-dir {place}", "not empty") for place in ("full", "full/mine.txt")),
        ("fer2013 a.zip --output-dir full/mine.txt/out", "File exists"),
        ("sample --seed -1", "--seed"),
        ("sample --output-dir full/mine.txt", "full/mine.txt"),
        ("crop nowhere --output-dir out", "nowhere"),
        ("crop empty --output-dir out", "holds no images"),
        ("crop photos --output-dir photos/out", "inside"),
        ("crop photos --output-dir out --min-face 0", "--min-face"),
    ],
)
def test_wrong_arguments_change_nothing(tmp_path, monkeypatch, command, word):
    write(tmp_path, {"full/mine.txt": b"mine", "photos/a.png": noise(1), "a.zip": zip_bytes(FILES)})
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*")), read_tree(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert_refused(main, command.split(), word)
    assert (sorted(tmp_path.rglob("*")), read_tree(tmp_path)) == before


def test_sample(tmp_path):
    arguments = ["sample", "--output-dir", tmp_path / "set", "--seed"]
    write(tmp_path, {"set/mine.txt": b"mine"})  # the folder may hold other things
    with full_disk(1500):
        assert_refused(main, [*arguments, 3], "can't fill --output-dir", "File too large")
    assert [path.name for path in (tmp_path / "set").iterdir()] == ["mine.txt"]
    code, out, err = run(main, *arguments, 3)
    assert (code, err) == (0, "")
    places = [(tmp_path / "set" / "train", 560), (tmp_path / "set" / "test", 140)]
    assert out.splitlines() == [f"{place}: {count} images, 7 classes" for place, count in places]
    assert [len(read_tree(place)) for place, _ in places] == [560, 140]
    write(tmp_path, {"other/train/.notes": b"mine"})
    assert_refused(main, ["sample", "--output-dir", tmp_path / "other"], tmp_path / "other" / "train")
    assert read_tree(tmp_path / "other") == {"train/.notes": b"mine"}
    (tmp_path / "set" / "mine.txt").unlink()
    drawn = read_tree(tmp_path / "set")
    assert_refused(main, [*arguments, 4], tmp_path / "set" / "train")
    assert read_tree(tmp_path / "set") == drawn
    for seed in (3, 4):
        draw_sample_set(tmp_path / str(seed), train_per_class=2, test_per_class=1, seed=seed)
    same, other = read_tree(tmp_path / "3"), read_tree(tmp_path / "4")
    assert same.items() <= drawn.items() and same.keys() == other.keys()  # what an image shows, its seed decides
    assert len({*same.values(), *other.values()}) == 2 * 7 * 3


def test_photos_are_cropped_to_what_predictions_see(tmp_path):
    photos = draw_folder(tmp_path / "photos" / "train", {"sad": 1, "happy": 0, "angry": 0})  # a crop already
    for name in ("happy/shirt.png", "angry/shirt.jpg"):
        open_faceless().save(photos / name)
    open_portrait().save(photos / "happy" / "photo.png")
    open_portrait().convert("L").save(photos / "happy" / "photo.bmp")
    (photos / "happy" / "broken.jpg").write_bytes(b"broken")
    code, out, err = run(main, "crop", tmp_path / "photos", "--output-dir", tmp_path / "faces")
    assert code == 0 and out == "3 faces of 6 images written, 3 left out\n"
    assert [line.partition(": ")[0] for line in err.splitlines()] == ["left out"] * 3 + ["warning"]
    assert str(photos / "angry") in err.splitlines()[-1]
    assert "broken.jpg" in err and "no face" in err and "shirt.png" in err
    faces = tmp_path / "faces" / "train"
    modes = {path.relative_to(faces).as_posix(): Image.open(path).mode for path in faces.glob("*/*")}
    assert modes == {"happy/photo.png": "L", "happy/photo-2.png": "RGB", "sad/sad_000.png": "L"}
    assert (read_whole(faces / "sad" / "sad_000.png") == read_whole(photos / "sad" / "sad_000.png")).all()
    model, names = load_model(BUNDLED, "cpu")
    (expected,) = predict_faces(model, photos / "happy" / "photo.png", names)
    emotion, _, probs = predict_image(model, faces / "happy" / "photo-2.png", faces="off")
    assert emotion == expected["emotion"] and probs == pytest.approx(expected["probs"], abs=1e-3)


def test_small_faces_are_cropped_where_they_are_asked_for(tmp_path):
    (tmp_path / "photos").mkdir()
    photo = Image.new("RGB", (2000, 1500), "gray")
    photo.paste(open_portrait().resize((144, 144)))  # whose face has about 28 pixels
    photo.save(tmp_path / "photos" / "small.png")
    words = ("crop", tmp_path / "photos", "--output-dir", tmp_path / "faces")
    code, _, err = run(main, *words)
    assert code == 2 and "no face" in err and "\nerror: none of the 1 images" in err
    assert os.listdir(tmp_path) == ["photos"]
    assert run(main, *words, "--min-face", "20")[0] == 0
    assert max(Image.open(tmp_path / "faces" / "small.png").size) < 36
