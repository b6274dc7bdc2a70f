"""Folders, their splits, and the cache: whatever happens to it, the pixels are those of read_image."""

import json
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL, draw_folder, draw_image, refusal, start
from PIL import Image

import data
import train_emotion_cnn
from data import FolderImages, default_cache_dir, describe_others, find_classes, find_splits, walk_images
from models import InputSpec
from preprocessing import read_image

GRAY = InputSpec(image_size=24)
COLOR = InputSpec(24, 3, (0.5,) * 3, (0.5,) * 3)
GRAY3 = replace(COLOR, gray=True)


@pytest.fixture
def root(tmp_path):
    return draw_folder(tmp_path / "train", {"happy": 3, "sad": 2}, 24)


@pytest.fixture(autouse=True)
def chunks_of_three(monkeypatch):
    monkeypatch.setattr(data, "_CHUNK_BYTES", 2 * 24 * 24)  # so that all tests see the order kept over several


def test_find_classes_is_sorted_and_leaves_out_the_hidden(tmp_path):
    for name in ("sad", "Angry", "happy face", ".git", "__MACOSX", ".ipynb_checkpoints"):
        (tmp_path / name).mkdir()
    (tmp_path / "notes.txt").write_text("no class")
    assert find_classes(tmp_path) == ["Angry", "happy face", "sad"]
    for folder in ("missing", "notes.txt", "sad"):
        assert str(tmp_path / folder) in refusal(find_classes, tmp_path / folder)
    (tmp_path / "sad\nder").mkdir()
    assert r"sad\nder" in refusal(find_classes, tmp_path)


def test_splits_are_found_whatever_the_case_and_order_of_their_names(tmp_path, monkeypatch):
    for name in ("TEST", "Validation", "angry", "tests", ".val", "elsewhere"):
        (tmp_path / name).mkdir()
    (tmp_path / "Train").symlink_to("elsewhere")
    (tmp_path / "val").symlink_to("val")  # to itself
    (tmp_path / "train.png").write_text("a file is no split")
    monkeypatch.chdir(tmp_path)
    expected = {"train": Path("Train"), "val": Path("Validation"), "test": Path("TEST")}
    assert list(find_splits(".").items()) == list(expected.items())
    assert find_splits(tmp_path) == {split: tmp_path / path for split, path in expected.items()}
    assert find_splits("missing") == find_splits("elsewhere") == {}
    (tmp_path / "VALID").mkdir()
    message = refusal(find_splits, tmp_path)
    assert "VALID/" in message and "Validation/" in message and "keep one" in message


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
    assert sorted(describe_others(root).split(", ")) == ["1 .txt", "1 without an ending"]  # the link that is a loop
    (root / "photo.HEIC").touch()
    assert "1 .heic" in describe_others(root) and "pip install pillow-heif" in describe_others(root)


def test_classes_are_matched_by_name_and_others_refused(tmp_path):
    root = draw_folder(tmp_path / "val", {"happy": 2, "sad": 1}, 8)
    message = refusal(FolderImages, root, GRAY, class_names=["angry", "happy"])
    assert all(name in message for name in ("'angry'", "'happy'", "'sad'", str(root)))
    for class_names, labels in ((["angry", "happy", "neutral", "sad"], [1, 1, 3]), (["sad", "happy"], [1, 1, 0])):
        images = FolderImages(root, GRAY, class_names=class_names)
        assert images.labels.tolist() == labels and images.class_names == class_names
    (root / "sad" / "sad_000.png").unlink()
    assert str(root / "sad") in refusal(FolderImages, root, GRAY)


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
    for number in range(10):
        file, mode = root / f"{number % 2}/{number % 3}/{number}.png", modes[number % len(modes)]
        file.parent.mkdir(parents=True, exist_ok=True)
        image = draw_image(number, 31, "L" if mode == "I;16" else mode)
        (Image.fromarray(np.asarray(image).astype(np.uint16) * 257) if mode == "I;16" else image).save(file)
    for cache_dir in (None, None, file, file / "below"):
        images = FolderImages(root, spec, cache_dir=cache_dir)
        assert_like_read_image(images, spec)
        assert images.images.shape == (10, 3 if spec is COLOR and "RGB" in modes else 1, 24, 24)
        assert len(set(images.digests)) == 10 and images.labels.tolist() == [0] * 5 + [1] * 5
        assert [str(cache_dir) in note and "in memory" in note for note in images.notes] == [True] * bool(cache_dir)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="makes files that other systems have not")
def test_whatever_lies_in_a_folder_is_read_or_named(tmp_path):
    root = draw_folder(tmp_path / "caf\udce9" / "train", {"happy": 1, "sad": 1}, 24)
    folder, image = root / "happy", (root / "sad" / "sad_000.png").read_bytes()
    for name in ("🙂.png", "new\nline.png", "caf\udce9.png", "\x1b[31mred.png"):
        (folder / name).write_bytes(image)
        (folder / f"bad {name}").write_bytes(b"")
    for size in ((1, 1), (20_000, 1), (1, 20_000)):
        Image.new("L", size, 7).save(folder / f"{size}.png")
    (folder / "bad page.jpg").write_text("<!DOCTYPE html><html><body>404 Not Found</body></html>")
    (folder / "bad half.png").write_bytes(image[: len(image) // 2])
    (folder / "bad nowhere.png").symlink_to("nowhere")
    (folder / "bad round.png").symlink_to("bad round.png")
    os.mkfifo(folder / "bad pipe.png")
    for spec in (GRAY, COLOR, COLOR):
        images = FolderImages(root, spec)
        assert_like_read_image(images, spec)
        assert len(images) == 9 and len(images.unreadable) == len(images.notes) - 1 == 9
        assert all(os.path.basename(path).startswith("bad ") for path in images.unreadable)
        assert "left out 9 of 18" in images.notes[-1] and all(note.isprintable() for note in images.notes)
        assert "bad " in refusal(FolderImages, root, spec, strict=True)


def test_a_class_that_damage_leaves_empty_is_an_error_and_many_images_are_counted(root):
    for number in range(60):
        (root / "happy" / f"a{number}.png").write_bytes(b"x")
    notes = FolderImages(root, GRAY).notes
    assert len(notes) == 52 and "10 more" in notes[50] and "60 of 65" in notes[51]
    for path in (root / "sad").iterdir():
        path.write_bytes(b"x")
    message = refusal(FolderImages, root, GRAY)
    assert "empty" in message and message.count(str(root / "sad")) == 2  # the folder, one of its files
    assert refusal(FolderImages, root, GRAY) == message  # from the cache


def cache_files(folder):
    return sorted(folder.glob("*"))  # a cache is two, a .json and a .npy


def test_the_second_run_decodes_nothing_and_reads_no_pixels(root, own_cache):
    first = FolderImages(root, GRAY)
    info, pixels = cache_files(own_cache)
    assert (info.suffix, pixels.suffix) == (".json", ".npy") and np.array_equal(np.load(pixels), first.images)
    zeros = pixels.read_bytes()[:128] + bytes(5 * 576)
    pixels.unlink()  # rather than change what is mapped to memory
    pixels.write_bytes(zeros)
    second = FolderImages(root, GRAY)
    assert second.digests == first.digests and second.paths == first.paths
    assert isinstance(second.images, np.memmap) and not second.images.any()


@pytest.mark.parametrize(
    "change",
    [
        lambda path: draw_image(99, 24).save(path),
        lambda path: draw_image(99, 24).save(path.with_name("new.png")),
        lambda path: path.unlink(),
        lambda path: path.rename(path.parents[1] / "happy" / "zzz.png"),  # to another class
    ],
)
def test_a_changed_folder_is_read_anew_and_its_old_cache_removed(change, root, own_cache):
    first = FolderImages(root, GRAY)
    old, pixels = cache_files(own_cache), np.array(first.images)
    change(root / "sad" / "sad_000.png")
    assert_like_read_image(FolderImages(root, GRAY), GRAY)
    assert len(cache_files(own_cache)) == 2 and not {*cache_files(own_cache)} & {*old}
    assert np.array_equal(first.images, pixels)  # whoever has the old one mapped keeps it


def test_two_images_that_are_swapped_are_read_anew(tmp_path):
    """Though names, sizes and times of change are as before."""
    root = draw_folder(tmp_path, {"happy": 1, "sad": 1}, 24, ending=".bmp")
    one, two = sorted(root.glob("*/*.bmp"))
    for swaps in range(2):
        for path in (one, two):
            os.utime(path, ns=(5, 5))
        assert_like_read_image(FolderImages(root, GRAY), GRAY)
        for source, target in ((one, tmp_path / "x"), (two, one), (tmp_path / "x", two)) if swaps == 0 else ():
            os.replace(source, target)


def test_every_folder_and_spec_has_a_cache_of_its_own(tmp_path, own_cache):
    one, two = (draw_folder(tmp_path / name / "train", {"happy": 2}, 24, ending=".bmp") for name in ("one", "two"))
    draw_image(99, 24).save(two / "happy" / "happy_000.bmp")
    for path in tmp_path.rglob("*.bmp"):
        os.utime(path, ns=(5, 5))  # names, sizes and times are equal
    for folder, spec in ((one, GRAY), (two, GRAY), (one, COLOR), (one, InputSpec(image_size=16))):
        assert_like_read_image(FolderImages(folder, spec), spec)
    assert len(cache_files(own_cache)) == 8
    for spec in (replace(GRAY, mean=(0.1,)), GRAY3):  # normalization is not decoding, and gray is gray
        FolderImages(one, spec)
    assert len(cache_files(own_cache)) == 8


def with_info(**changes):
    return lambda content: json.dumps({**json.loads(content), **changes}).encode()


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        (".npy", lambda content: content + b"\0"),
        (".json", lambda content: b"[" * 100_000),
        (".json", with_info(shape=[5, 24, 24, 1])),
        (".json", with_info(digests=["0123456789abcdef"] * 4)),
        (".json", with_info(unreadable={"99": "a reason"})),
        (".json", with_info(unreadable={"1": "a reason", "3": "a reason"})),
        *((suffix, None) for suffix in (".npy", ".json")),
    ],
)
def test_a_damaged_cache_is_rebuilt(suffix, damage, root, own_cache):
    (root / "sad" / "bad.png").write_bytes(b"x")
    first = FolderImages(root, GRAY)
    good = {path.suffix: path.read_bytes() for path in cache_files(own_cache)}
    path = cache_files(own_cache)[suffix == ".npy"]
    path.unlink()
    if damage:
        path.write_bytes(damage(good[suffix]))
    images = FolderImages(root, GRAY)
    assert_like_read_image(images, GRAY)
    assert images.digests == first.digests and images.notes == first.notes and len(images.notes) == 2
    assert {path.suffix: path.read_bytes() for path in cache_files(own_cache)} == good


def test_runs_build_one_cache_at_once(tmp_path, own_cache):
    """Threads have one process number, as runs in containers may have."""
    root = draw_folder(tmp_path / "train", {"happy": 80, "sad": 80}, 24)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: FolderImages(root, GRAY), range(3)))
    for images in found:
        assert_like_read_image(images, GRAY)
        assert images.notes == []
    assert len(cache_files(own_cache)) == 2


@pytest.mark.skipif(os.name != "posix", reason="kills a process")
def test_a_run_that_is_killed_half_way_leaves_no_cache(tmp_path, own_cache):
    root, spec = draw_folder(tmp_path / "train", {"happy": 300, "sad": 300}, 24), InputSpec()
    process = start(train_emotion_cnn.main, *SMALL, "--data-dir", tmp_path, "--output-dir", tmp_path / "out")
    while not cache_files(own_cache) and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    process.communicate(timeout=300)
    (rest,) = cache_files(own_cache)
    assert rest.suffix == ".tmp"
    assert_like_read_image(FolderImages(root, spec), spec)
    assert len(cache_files(own_cache)) == 3  # another run could still be writing it
    yesterday = time.time() - 100_000
    os.utime(rest, (yesterday, yesterday))
    draw_image(99, 24).save(root / "happy" / "new.png")
    FolderImages(root, spec)
    assert rest not in cache_files(own_cache)


@pytest.mark.parametrize("room", [0, 2000, 3010, 9000])  # 3008 bytes of pixels and header, and more of JSON
def test_a_full_disk_means_memory_and_leaves_nothing(room, root, own_cache):
    resource = pytest.importorskip("resource")
    for number in range(100):
        (root / "sad" / f"bad{number}.png").write_bytes(b"x")
    before, fits = resource.getrlimit(resource.RLIMIT_FSIZE), room == 9000
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))  # a longer file can't be written
    try:
        images = FolderImages(root, GRAY)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_like_read_image(images, GRAY)
    assert any("in memory" in note for note in images.notes) != fits and len(cache_files(own_cache)) == 2 * fits


def test_the_given_cache_folder_is_made_and_relative_folders_share_it(root, tmp_path, own_cache, monkeypatch):
    for place, folder in ((tmp_path, root), (tmp_path, "train"), (root, "."), (root / "sad", "..")):
        monkeypatch.chdir(place)
        images = FolderImages(folder, GRAY, cache_dir=tmp_path / "deep" / "cache")
        assert images.paths[0] == str(Path(folder) / "happy" / "happy_000.png")
    assert len(cache_files(tmp_path / "deep" / "cache")) == 2 and cache_files(own_cache) == []


def test_the_cache_folder_of_each_system(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for local, cache in (("", ""), ("one", "two")):
        monkeypatch.setenv("LOCALAPPDATA", local)
        monkeypatch.setenv("XDG_CACHE_HOME", cache)
        systems = {"win32": (local, "AppData/Local"), "darwin": ("", "Library/Caches"), "linux": (cache, ".cache")}
        for system, (own, default) in systems.items():
            monkeypatch.setattr(sys, "platform", system)
            assert default_cache_dir() == Path(own or tmp_path / default, "emotion_cnn")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(Path, "home", Path("~nobody.here").expanduser)  # as for a user without a home
    assert default_cache_dir() == Path(tempfile.gettempdir(), "emotion_cnn")


def test_an_image_that_was_mended_is_read_though_size_and_time_are_the_same(root):
    path = root / "sad" / "sad_000.png"
    good = path.read_bytes()
    for content, count in ((bytes(len(good)), 4), (good, 5)):
        path.write_bytes(content)
        os.utime(path, ns=(5, 5))
        images = FolderImages(root, GRAY)
        assert_like_read_image(images, GRAY)
        assert len(images) == count
