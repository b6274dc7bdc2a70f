"""Folders, their splits, and the cache: whatever happens to it, the pixels are those of read_image."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import draw_folder, draw_image, refusal, run_as_user
from PIL import Image

import data
from data import FolderImages, default_cache_dir, find_classes, find_splits, is_sample_set, walk_images
from models import InputSpec
from preprocessing import read_image

GRAY = InputSpec(image_size=24)
COLOR = InputSpec(24, 3, (0.5,) * 3, (0.5,) * 3)
GRAY3 = InputSpec(24, 3, (0.5,) * 3, (0.5,) * 3, gray=True)


# Folders


def test_find_classes_is_sorted_and_leaves_out_the_hidden(tmp_path):
    for name in ("sad", "Angry", "happy face", ".git", "__MACOSX", ".ipynb_checkpoints"):
        (tmp_path / name).mkdir()
    (tmp_path / "notes.txt").write_text("no class")
    assert find_classes(tmp_path) == ["Angry", "happy face", "sad"]
    for folder in ("missing", "notes.txt", "sad"):
        assert str(tmp_path / folder) in refusal(find_classes, tmp_path / folder)
    (tmp_path / "sad\nder").mkdir()
    assert r"sad\nder" in refusal(find_classes, tmp_path)


@pytest.mark.parametrize("names", [("train", "val", "test"), ("TEST", "Train", "Validation"), ("valid",), ()])
def test_splits_are_found_whatever_their_names(names, tmp_path, monkeypatch):
    for name in ("angry", "tests", ".val", "elsewhere"):
        (tmp_path / name).mkdir()
    for name in names:
        (tmp_path / name).symlink_to("elsewhere")
    if not names:
        (tmp_path / "train").write_text("a file is no split")
        (tmp_path / "test").symlink_to("test")  # to itself
    splits = {"train": "train", "val": "val", "validation": "val", "valid": "val", "test": "test"}
    expected = {split: name for low, split in splits.items() for name in names if name.lower() == low}
    assert list(find_splits(tmp_path).items()) == [(split, tmp_path / name) for split, name in expected.items()]
    monkeypatch.chdir(tmp_path)
    assert find_splits(".") == {split: Path(name) for split, name in expected.items()}
    assert find_splits("missing") == find_splits(tmp_path / "elsewhere") == {}


@pytest.mark.parametrize("names", [("val", "valid"), ("validation", "val"), ("Train", "train")])
def test_two_folders_of_one_split_are_refused(names, tmp_path):
    for name in names:
        (tmp_path / name).mkdir(exist_ok=True)
    if len(os.listdir(tmp_path)) == 2:  # the file system tells Train from train
        message = refusal(find_splits, tmp_path)
        assert all(f"{name}/" in message for name in names) and "keep one" in message


def test_walk_finds_nested_and_linked_images_and_leaves_out_the_hidden(tmp_path):
    root, outside = tmp_path / "train" / "happy", tmp_path / "other"
    shown = ["b.PNG", "a.jpeg", "deep/er/c.webp", "_f.png"]
    hidden = [".h.png", "__MACOSX/d.png", ".t/e.png", "n.txt"]
    for path in [*(root / name for name in shown + hidden), outside / "g.png"]:
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_image(1, 8).save(path, "PNG")
    for name, target in (("linked", outside), ("loop", root), ("single.png", outside / "g.png"), ("round", "round")):
        (root / name).symlink_to(target)
    found = [os.path.relpath(entry.path, root) for entry in walk_images(root)]
    assert found == sorted([*shown, "linked/g.png", "single.png"])
    (root / "round.png").symlink_to("round.png")
    images = FolderImages(root.parent, GRAY)
    assert len(images) == 6 and list(images.unreadable) == [str(root / "round.png")]


def test_classes_are_matched_by_name_and_others_refused(tmp_path):
    root = draw_folder(tmp_path / "val", {"happy": 2, "sad": 1}, 8)
    message = refusal(FolderImages, root, GRAY, class_names=["angry", "happy"])
    assert all(name in message for name in ("'angry'", "'happy'", "'sad'", str(root)))
    for class_names, labels in ((["angry", "happy", "neutral", "sad"], [1, 1, 3]), (["sad", "happy"], [1, 1, 0])):
        images = FolderImages(root, GRAY, class_names=class_names)
        assert images.labels.tolist() == labels and images.class_names == class_names
    (root / "sad" / "sad_000.png").rename(root / "sad" / "notes.txt")
    assert str(root / "sad") in refusal(FolderImages, root, GRAY)


def test_sample_set_is_told_by_its_names():
    assert is_sample_set(["a/drawing_1.png", "b/drawing_2.png"])
    assert not is_sample_set(["a/drawing_1.png", "drawing_b/photo.png"])


# The whole of a folder


def assert_like_read_image(images, spec):
    """Every image equals what `read_image` makes of its file, expanded if the set is gray."""
    assert images.images.dtype == np.uint8 and images.labels.dtype == np.int64
    assert len(images) == len(images.images) == len(images.labels) == len(images.digests) == len(images.paths)
    for pixels, path, label in zip(images.images, images.paths, images.labels, strict=True):
        expected = read_image(path, spec)
        assert np.array_equal(np.broadcast_to(pixels, expected.shape), expected), path
        assert os.path.relpath(path, images.folder).split(os.sep)[0] == images.class_names[label]


@pytest.mark.parametrize("spec", [GRAY, COLOR, GRAY3], ids=["gray", "color", "gray of three"])
@pytest.mark.parametrize("modes", [["L", "LA", "1", "I;16"], ["RGB"], ["L", "RGB", "RGBA", "LA", "P"]], ids=" ".join)
def test_pixels_are_those_of_read_image(spec, modes, tmp_path):
    """Built, from the cache, and in memory if there can be no cache."""
    root = tmp_path / "train"
    for number in range(12):
        folder, mode = root / ("happy", "sad")[number % 2] / ("deep" if number % 3 else ""), modes[number % len(modes)]
        folder.mkdir(parents=True, exist_ok=True)
        image = draw_image(number, 31, "L" if mode == "I;16" else mode)
        if mode == "I;16":
            image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
        image.save(folder / f"{number}.png")
    file = root / "happy" / "0.png"
    for cache_dir in (None, None, file, file / "below"):
        images = FolderImages(root, spec, cache_dir=cache_dir)
        assert_like_read_image(images, spec)
        assert images.images.shape == (12, 3 if spec is COLOR and "RGB" in modes else 1, 24, 24)
        assert len(set(images.digests)) == 12 and images.class_names == ["happy", "sad"]
        assert images.labels.tolist() == sorted(images.labels.tolist())
        assert [str(cache_dir) in note and "in memory" in note for note in images.notes] == [True] * bool(cache_dir)


def test_more_images_than_a_chunk_stay_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_CHUNK_BYTES", 2 * 16 * 16)
    root = draw_folder(tmp_path / "train", {"happy": 20, "sad": 18}, 16)
    draw_image(1, 16, "RGB").save(root / "sad" / "sad_010.png")  # color turns up late
    (root / "happy" / "happy_007.png").write_bytes(b"broken")
    images = FolderImages(root, COLOR)
    assert len(images) == 37 and images.images.shape[1] == 3
    assert_like_read_image(images, COLOR)


# Images that can't be read


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="makes files that other systems have not")
def test_whatever_lies_in_a_folder_is_read_or_named(tmp_path):
    root = draw_folder(tmp_path / "caf\udce9" / "train", {"happy": 1, "sad": 1}, 24)
    folder, image = root / "happy", (root / "sad" / "sad_000.png").read_bytes()
    for name in ("🙂.png", "new\nline.png", "caf\udce9.png", "\x1b[31mred.png"):
        (folder / name).write_bytes(image)
        (folder / f"bad {name}").write_bytes(b"")
    for number, size in enumerate([(1, 1), (20_000, 1), (1, 20_000)]):
        Image.new("L", size, 7).save(folder / f"{number}.png")
    (folder / "bad page.jpg").write_text("<!DOCTYPE html><html><body>404 Not Found</body></html>")
    (folder / "bad half.png").write_bytes(image[: len(image) // 2])
    (folder / "bad nowhere.png").symlink_to("nowhere")
    os.mkfifo(folder / "bad pipe.png")
    for spec in (GRAY, COLOR, COLOR):
        images = FolderImages(root, spec)
        assert_like_read_image(images, spec)
        assert len(images) == 9 and len(images.unreadable) == len(images.notes) - 1 == 8
        assert all(os.path.basename(path).startswith("bad ") for path in images.unreadable)
        assert "left out 8 of 17" in images.notes[-1] and all(note.isprintable() for note in images.notes)
        assert "bad " in refusal(FolderImages, root, spec, strict=True)


@pytest.mark.parametrize("classes", [["sad"], ["happy", "sad"]])
def test_a_class_that_damage_leaves_empty_is_an_error_and_many_images_are_counted(classes, tmp_path):
    root = draw_folder(tmp_path / "train", {"happy": 4, "sad": 3}, 24)
    for number in range(60):
        (root / "happy" / f"a{number}.png").write_bytes(b"x")
    notes = FolderImages(root, GRAY).notes
    assert len(notes) == 52 and "10 more" in notes[50] and "60 of 67" in notes[51]
    for path in (path for name in classes for path in (root / name).iterdir()):
        path.write_bytes(b"x")
    for _ in range(2):
        message = refusal(FolderImages, root, GRAY)
        assert "empty" in message and message.count(str(root / classes[0])) == 2  # the folder, one of its files


# The cache


@pytest.fixture
def root(tmp_path):
    return draw_folder(tmp_path / "train", {"happy": 3, "sad": 2}, 24)


def cache_files(folder):
    """All files there; a cache is two, a .json and a .npy."""
    return sorted(folder.iterdir()) if folder.exists() else []


def state(folder):
    return [(path, path.stat().st_ino, path.stat().st_mtime_ns) for path in cache_files(folder)]


def replace_content(path, content):
    """A new file, because the old one is mapped to memory."""
    path.unlink()
    if content is not None:
        path.write_bytes(content)


def test_the_second_run_decodes_nothing_and_reads_no_pixels(root, own_cache):
    first = FolderImages(root, GRAY)
    info, pixels = cache_files(own_cache)
    assert (info.suffix, pixels.suffix) == (".json", ".npy") and np.array_equal(np.load(pixels), first.images)
    replace_content(pixels, pixels.read_bytes()[:128] + bytes(5 * 576))
    before = state(own_cache)
    second = FolderImages(root, GRAY)
    assert second.digests == first.digests and second.paths == first.paths and not second.images.any()
    assert state(own_cache) == before
    shutil.rmtree(root)
    assert isinstance(second.images, np.memmap) and not second.images.any()


@pytest.mark.parametrize("change", ["content", "touched", "added", "removed", "renamed", "moved to another class"])
def test_a_changed_folder_is_read_anew_and_its_old_cache_removed(change, root, own_cache):
    first = FolderImages(root, GRAY)
    old, pixels = cache_files(own_cache), np.array(first.images)
    path = root / "sad" / "sad_000.png"
    if change in ("content", "added"):
        draw_image(99, 24).save(path if change == "content" else root / "sad" / "new.png")
    if change in ("content", "touched"):
        os.utime(path, ns=(1, 1))
    elif change == "removed":
        path.unlink()
    elif change != "added":
        path.rename(root / ("sad" if change == "renamed" else "happy") / "zzz.png")
    assert_like_read_image(FolderImages(root, GRAY), GRAY)
    assert len(cache_files(own_cache)) == 2 and not {*cache_files(own_cache)} & {*old}
    assert np.array_equal(first.images, pixels)  # whoever has the old one mapped keeps it


def test_every_folder_and_spec_has_a_cache_of_its_own(tmp_path, own_cache):
    one, two = (draw_folder(tmp_path / name / "train", {"happy": 2}, 24, ending=".bmp") for name in ("one", "two"))
    draw_image(99, 24).save(two / "happy" / "happy_000.bmp")
    for path in tmp_path.rglob("*.bmp"):
        os.utime(path, ns=(5, 5))  # names, sizes and times are equal
    for folder, spec in ((one, GRAY), (two, GRAY), (one, COLOR), (one, InputSpec(image_size=16))):
        assert_like_read_image(FolderImages(folder, spec), spec)
    assert len(cache_files(own_cache)) == 8
    draw_image(99, 24).save(one / "happy" / "new.png")
    for spec in (GRAY, InputSpec(24, 1, (0.1,), (2.0,)), GRAY3):  # normalization is not decoding
        FolderImages(one, spec)
    assert len(cache_files(own_cache)) == 8


def with_info(**changes):
    return lambda content: json.dumps({**json.loads(content), **changes}).encode()


DAMAGES = {
    ".npy": {
        "missing": lambda content: None,
        "half": lambda content: content[: len(content) // 2],
        "longer": lambda content: content + b"\0",
        "zeros": lambda content: bytes(len(content)),
        "header": lambda content: content[:60] + b"\xff" + content[61:],
        "shape": lambda content: content.replace(b"(5, 1, 24, 24)", b"(5, 24, 1, 24)"),
    },
    ".json": {
        "missing": lambda content: None,
        "half": lambda content: content[: len(content) // 2],
        "list": lambda content: b"[]",
        "deep": lambda content: b"[" * 100_000,
        "no keys": lambda content: b"{}",
        "shape a number": with_info(shape=5),
        "another shape": with_info(shape=[5, 24, 24, 1]),
        "few digests": with_info(digests=["0123456789abcdef"] * 4),
        "unreadable a list": with_info(unreadable=[]),
        "unreadable beyond": with_info(unreadable={"99": "a reason"}),
        "unreadable text": with_info(unreadable={"x": "a reason"}),
        "unreadable two": with_info(unreadable={"1": "a reason", "3": "a reason"}),
    },
}


@pytest.mark.parametrize(("suffix", "damage"), [(suffix, name) for suffix in DAMAGES for name in DAMAGES[suffix]])
def test_a_damaged_cache_is_rebuilt(suffix, damage, root, own_cache):
    (root / "sad" / "bad.png").write_bytes(b"x")
    first = FolderImages(root, GRAY)
    good = {path: path.read_bytes() for path in cache_files(own_cache)}
    (path,) = (path for path in good if path.suffix == suffix)
    bad = DAMAGES[suffix][damage](good[path])
    assert bad != good[path]
    replace_content(path, bad)
    images = FolderImages(root, GRAY)
    assert_like_read_image(images, GRAY)
    assert images.digests == first.digests and images.notes == first.notes and len(images.notes) == 2
    assert {path: path.read_bytes() for path in cache_files(own_cache)} == good


def test_a_cache_of_another_version_is_replaced(root, own_cache, monkeypatch):
    with monkeypatch.context() as earlier:
        earlier.setattr(data, "CACHE_VERSION", data.CACHE_VERSION - 1)
        FolderImages(root, GRAY)
    old = cache_files(own_cache)[1]
    old.with_suffix(".cache").write_text("as versions up to 4 called it")
    assert_like_read_image(FolderImages(root, GRAY), GRAY)
    assert len(cache_files(own_cache)) == 2 and old not in cache_files(own_cache)


BUILD = """if True:
    import sys
    from data import FolderImages
    from models import InputSpec

    print("ready", flush=True)
    sys.stdin.readline()
    images = FolderImages(sys.argv[1], InputSpec(image_size=24))
    print(*images.digests, images.images.tobytes().hex(), images.notes)
"""


def start_building(root, count):
    """Processes that decode `root` at the same time."""
    env, pipe = {**os.environ, "PYTHONPATH": os.path.dirname(data.__file__)}, subprocess.PIPE
    command = [sys.executable, "-c", BUILD, root]
    processes = [subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, text=True) for _ in range(count)]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * count
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    return processes


def test_processes_build_one_cache_at_once(tmp_path, own_cache):
    root = draw_folder(tmp_path / "train", {"happy": 150, "sad": 150}, 24)
    found = {process.communicate(timeout=300)[0] for process in start_building(root, 3)}
    built = state(own_cache)
    images = FolderImages(root, GRAY)
    assert_like_read_image(images, GRAY)
    assert found == {" ".join([*images.digests, images.images.tobytes().hex(), "[]\n"])}
    assert state(own_cache) == built and len(built) == 2


@pytest.mark.skipif(os.name != "posix", reason="kills a process")
def test_a_run_that_is_killed_half_way_leaves_no_cache(tmp_path, own_cache):
    root = draw_folder(tmp_path / "train", {"happy": 300, "sad": 300}, 24)
    (process,) = start_building(root, 1)
    while not cache_files(own_cache):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=300)
    (rest,) = cache_files(own_cache)
    assert rest.suffix == ".tmp"
    assert_like_read_image(FolderImages(root, GRAY), GRAY)
    assert len(cache_files(own_cache)) == 3  # another run could still be writing it
    other, yesterday = own_cache / "notes.txt", time.time() - 100_000
    other.write_text("of somebody else")
    for path in (rest, other):
        os.utime(path, (yesterday, yesterday))
    draw_image(99, 24).save(root / "happy" / "new.png")
    FolderImages(root, GRAY)
    assert rest not in cache_files(own_cache) and other in cache_files(own_cache)


@pytest.mark.parametrize("room", [0, 100, 2000, 3010, 9000])  # 3008 bytes of pixels and header, and more of JSON
def test_a_full_disk_means_memory_and_leaves_nothing(room, root, tmp_path):
    resource = pytest.importorskip("resource")
    for number in range(100):
        (root / "sad" / f"bad{number}.png").write_bytes(b"x")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))  # a longer file can't be written
    try:
        images = FolderImages(root, GRAY, cache_dir=tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_like_read_image(images, GRAY)
    assert sum("in memory" in note for note in images.notes) == (room < 9000)
    assert all(note.isprintable() for note in images.notes)
    assert len(os.listdir(tmp_path / "cache")) == (0 if room < 9000 else 2)


def test_the_given_cache_folder_is_made_and_a_relative_folder_shares_it(root, tmp_path, own_cache, monkeypatch):
    cache_dir = tmp_path / "deep" / "cache"
    FolderImages(root, GRAY, cache_dir=cache_dir)
    for place, folder in ((tmp_path, "train"), (root, "."), (root / "sad", "..")):
        monkeypatch.chdir(place)
        images = FolderImages(folder, GRAY, cache_dir=cache_dir)
        assert images.paths[0] == str(Path(folder) / "happy" / "happy_000.png")
    assert len(cache_files(cache_dir)) == 2 and cache_files(own_cache) == []


def test_the_cache_folder_of_each_system(tmp_path, monkeypatch):
    for system, default, variable in (
        ("win32", "AppData/Local", "LOCALAPPDATA"),
        ("darwin", "Library/Caches", None),
        ("linux", ".cache", "XDG_CACHE_HOME"),
    ):
        for name, value in {"HOME": tmp_path, "XDG_CACHE_HOME": "", "LOCALAPPDATA": "", variable or "X": "own"}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(sys, "platform", system)
        assert default_cache_dir() == (Path("own") if variable else tmp_path / default) / "emotion_cnn"
        monkeypatch.delenv(variable or "X")
        assert default_cache_dir() == tmp_path / default / "emotion_cnn"


def test_permissions():
    code = """
        import pathlib
        import numpy as np
        from PIL import Image
        from data import FolderImages, find_splits
        from errors import InputError
        from models import InputSpec

        Image.init()
        become_user()
        for name in ("a", "b"):
            for number in range(2):
                path = pathlib.Path("train", name, f"{number}.png")
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("L", (8, 8), 10 * number).save(path)
        spec, victim, closed = InputSpec(image_size=8), pathlib.Path("train/a/1.png"), pathlib.Path("closed")
        closed.mkdir()
        closed.chmod(0o555)
        images = FolderImages("train", spec, cache_dir=closed)
        print(len(images), len(images.notes), "memory" in images.notes[0], os.listdir(closed))
        for mode in (0, 0o644):
            victim.chmod(mode)
            os.utime(victim, ns=(1, 1))
            print(sorted(FolderImages("train", spec).unreadable))
        pathlib.Path("train/b").chmod(0)
        closed.chmod(0)
        for attempt in (lambda: FolderImages("train", spec), lambda: find_splits(closed)):
            try:
                attempt()
            except InputError as error:
                print(error)
        pathlib.Path("train/b").chmod(0o755)
    """
    closed, forbidden, mended, folder, splits = run_as_user(code).splitlines()
    assert closed == "4 1 True []"
    assert forbidden == "['train/a/1.png']"
    assert mended == "[]"  # a permission that was given is no reason to leave an image out for good
    assert "can't read the folder train/b" in folder and "can't read the folder closed" in splits
