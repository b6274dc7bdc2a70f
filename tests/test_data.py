import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from conftest import draw_folder, draw_picture, run_as_user
from PIL import Image

import data
import preprocessing
from data import FolderImages, find_classes, is_sample_set, printable, walk_pictures
from errors import InputError
from models import InputSpec
from preprocessing import normalize, read_image, to_input

GRAY = InputSpec(image_size=24)
COLOUR = InputSpec(24, 3, (0.5,) * 3, (0.5,) * 3)
GRAY3 = InputSpec(24, 3, (0.5,) * 3, (0.5,) * 3, gray=True)


def refusal(source, spec=GRAY):
    """The message with which a picture is refused: one line that names its file."""
    with pytest.raises(InputError, match="can't read") as caught:
        read_image(source, spec)
    message = str(caught.value)
    assert "\n" not in message and "object at 0x" not in message
    if isinstance(source, str | os.PathLike):
        assert os.path.basename(source) in message
    return message


def saved(image, path, **options):
    image.save(path, **options)
    return path


# Kinds of pictures


@pytest.mark.parametrize("ending", ["png", "bmp", "tif", "webp", "pgm"])
def test_gray_picture_at_its_size_is_unchanged(ending, tmp_path):
    image = draw_picture(1, 24)
    path = saved(image, tmp_path / f"a.{ending}", **({"lossless": True} if ending == "webp" else {}))
    pixels = read_image(path, GRAY)
    assert pixels.dtype == np.uint8 and pixels.shape == (1, 24, 24)
    assert np.abs(pixels[0].astype(int) - np.asarray(image)).max() <= (1 if ending == "webp" else 0)
    assert np.array_equal(read_image(path, COLOUR), pixels.repeat(3, 0))


def test_colour_keeps_its_channels_in_rgb_order(tmp_path):
    image = draw_picture(2, 24, "RGB")
    pixels = read_image(saved(image, tmp_path / "a.png"), COLOUR)
    assert pixels.shape == (3, 24, 24) and pixels.flags.c_contiguous
    assert np.array_equal(pixels, np.asarray(image).transpose(2, 0, 1))


@pytest.mark.parametrize("spec", [GRAY, GRAY3], ids=["one channel", "gray of three"])
def test_a_gray_network_sees_a_colour_picture_as_pillow_grays_it(spec, tmp_path):
    image = draw_picture(3, 24, "RGB")
    pixels = read_image(saved(image, tmp_path / "a.png"), spec)
    assert np.array_equal(pixels, np.asarray(image.convert("L"))[None])
    images = to_input(torch.tensor(pixels[None]), spec)
    assert images.shape == (1, spec.channels, 24, 24)
    assert all(torch.equal(images[:, 0], images[:, channel]) for channel in range(spec.channels))


def test_pictures_are_squeezed_to_the_size(tmp_path):
    image = Image.fromarray(np.repeat(np.array([[0, 255]], np.uint8), 40, 1).repeat(10, 0))  # 80 x 10, left half black
    pixels = read_image(saved(image, tmp_path / "a.png"), GRAY)[0]
    assert pixels[:, :11].max() == 0 and pixels[:, 13:].min() == 255
    assert np.array_equal(pixels, np.asarray(image.resize((24, 24), Image.Resampling.BILINEAR)))


def halves(left, right, mode="RGB"):
    """24 x 24, each half of one colour."""
    image = Image.new(mode, (24, 24), left)
    image.paste(right, (12, 0, 24, 24))
    return image


def assert_halves(path, left, right, spec=COLOUR, atol=0):
    pixels = read_image(path, spec)
    for half, value in ((pixels[:, :, :10], left), (pixels[:, :, 14:], right)):
        assert np.abs(half - np.reshape(value, (-1, 1, 1)).astype(int)).max() <= atol, (half[:, 0, 0], value)


def test_transparent_rgba_is_laid_on_white(tmp_path):
    path = saved(halves((200, 0, 0, 255), (0, 0, 0, 0), "RGBA"), tmp_path / "a.png")
    assert_halves(path, (200, 0, 0), (255, 255, 255))
    assert_halves(path, (60,), (255,), GRAY)
    path = saved(halves((0, 0, 0, 127), (0, 0, 0, 51), "RGBA"), tmp_path / "half.png")
    assert_halves(path, (128,) * 3, (204,) * 3)


def test_transparent_gray_is_laid_on_white(tmp_path):
    path = saved(halves((77, 255), (77, 0), "LA"), tmp_path / "a.png")
    assert_halves(path, (77,) * 3, (255,) * 3)
    assert_halves(path, (77,), (255,), GRAY)


def test_palette_with_transparency(tmp_path):
    image = halves(1, 2, "P")
    image.putpalette([0, 0, 0, 10, 200, 30, 50, 60, 70])
    assert_halves(saved(image, tmp_path / "a.png"), (10, 200, 30), (50, 60, 70))
    assert_halves(saved(image, tmp_path / "b.png", transparency=2), (10, 200, 30), (255,) * 3)
    assert_halves(saved(image, tmp_path / "c.gif", transparency=2), (10, 200, 30), (255,) * 3)


def test_colour_key_transparency(tmp_path):
    path = saved(halves((10, 20, 30), (50, 60, 70)), tmp_path / "a.png", transparency=(50, 60, 70))
    assert_halves(path, (10, 20, 30), (255,) * 3)
    assert_halves(saved(halves(10, 50, "L"), tmp_path / "b.png", transparency=50), (10,), (255,), GRAY)


def test_one_bit(tmp_path):
    for ending in ("png", "tif", "bmp", "pbm"):
        assert_halves(saved(halves(0, 1, "1"), tmp_path / f"a.{ending}"), (0,), (255,), GRAY)


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_sixteen_bits_are_scaled_not_clipped(ending, tmp_path):
    values = np.zeros((24, 24), np.uint16)
    values[:, :8], values[:, 8:16], values[:, 16:] = 0, 128 * 257, 65535
    values[0] = 300  # a clip at 255 would make it white
    path = saved(Image.fromarray(values), tmp_path / f"a.{ending}")
    for spec in (GRAY, COLOUR):
        pixels = read_image(path, spec)
        assert (pixels[:, 0] == 1).all()
        assert [pixels[0, 5, column] for column in (3, 11, 20)] == [0, 128, 255]


def test_sixteen_bits_big_endian(tmp_path):
    with (tmp_path / "a.tif").open("wb") as file:
        Image.frombytes("I;16B", (24, 24), np.full((24, 24), 128 * 257, ">u2").tobytes()).save(file, "TIFF")
    assert (read_image(tmp_path / "a.tif", GRAY) == 128).all()


def test_cmyk_jpeg(tmp_path):
    path = saved(halves((0, 255, 255, 0), (255, 255, 0, 0), "CMYK"), tmp_path / "a.jpg", quality=100)
    assert_halves(path, (255, 0, 0), (0, 0, 255), atol=12)
    assert_halves(path, (76,), (29,), GRAY, atol=12)


@pytest.mark.parametrize("mode", ["YCbCr", "HSV", "RGBX", "RGBa", "PA"])
@pytest.mark.parametrize("spec", [GRAY, COLOUR], ids=["gray", "colour"])
def test_pil_images_of_rare_modes(mode, spec):
    image = draw_picture(1, 24, {"RGBa": "RGBA", "PA": "P"}.get(mode, "RGB"))
    expected = read_image(image, spec)
    pixels = read_image(image.convert(mode), spec)
    assert np.abs(pixels.astype(int) - expected).mean() < 4  # HSV and YCbCr round


def test_floating_point_picture_is_refused(tmp_path):
    path = saved(Image.fromarray(np.ones((24, 24), np.float32)), tmp_path / "a.tif")
    assert "floating-point" in refusal(path)


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
def test_exif_orientation_six_turns_the_picture(ending, tmp_path):
    image = Image.new("L", (40, 24), 0)
    image.paste(255, (0, 0, 20, 24))  # the left half is white; turned clockwise it is the upper one
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = read_image(saved(image, tmp_path / f"a.{ending}", exif=exif), GRAY)[0]
    assert pixels[:10].min() > 245 and pixels[14:].max() < 10


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation(orientation, tmp_path):
    upright = draw_picture(5, 24, "RGB")
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that stores `upright` so that it is turned
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = read_image(saved(stored, tmp_path / "a.png", exif=exif), COLOUR)
    assert np.array_equal(pixels.transpose(1, 2, 0), np.asarray(upright))


@pytest.mark.parametrize("exif", [b"Exif\0\0rubbish", b"Exif\0\0", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"])
def test_damaged_exif_does_not_cost_the_picture(exif, tmp_path):
    image = draw_picture(5, 24)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pixels = read_image(saved(image, tmp_path / "a.jpg", exif=exif, quality=100), GRAY)
    assert np.abs(pixels[0].astype(int) - np.asarray(image)).mean() < 4


@pytest.mark.parametrize("ending", ["gif", "webp", "tif", "png"])
def test_an_animation_counts_as_its_first_frame(ending, tmp_path):
    frames = [Image.new("RGB", (24, 24), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if ending == "webp" else {}
    path = saved(frames[0], tmp_path / f"a.{ending}", save_all=True, append_images=frames[1:], **options)
    assert_halves(path, (255, 0, 0), (255, 0, 0))


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1)])
def test_tiny_and_thin(size, tmp_path):
    path = saved(Image.new("RGB", size, (10, 20, 30)), tmp_path / "a.png")
    assert (read_image(path, COLOUR) == np.array([10, 20, 30]).reshape(3, 1, 1)).all()


@pytest.mark.parametrize("name", ["Mümmé é.png", "a b  c.png", "日本.png", "-x.png", "a'b\"c$.png", "new\nline.png"])
def test_names_of_every_kind(name, tmp_path):
    path = saved(draw_picture(1, 24), tmp_path / name)
    assert np.array_equal(read_image(path, GRAY), read_image(str(path), GRAY))
    path.write_bytes(b"")
    with pytest.raises(InputError) as caught:
        read_image(path, GRAY)
    assert printable(name) in str(caught.value) and "\n" not in str(caught.value)


def test_arrays_and_pil_images_are_read_as_files_are(tmp_path):
    image = draw_picture(4, 31, "RGB")
    expected = read_image(saved(image, tmp_path / "a.png"), COLOUR)
    assert np.array_equal(read_image(image, COLOUR), expected)
    assert np.array_equal(read_image(np.asarray(image), COLOUR), expected)
    gray = image.convert("L")
    assert np.array_equal(read_image(np.asarray(gray), GRAY), read_image(gray, GRAY))
    assert np.array_equal(read_image(np.asarray(gray), COLOUR), read_image(gray, COLOUR))
    flipped = np.asarray(image)[:, ::-1]  # a view that is not contiguous
    assert np.array_equal(read_image(flipped, COLOUR), read_image(flipped.copy(), COLOUR))


def test_reading_leaves_its_source_alone():
    array = np.asarray(draw_picture(4, 24, "RGB")).copy()
    before, image = array.copy(), Image.fromarray(array)
    for spec in (GRAY, COLOUR, InputSpec(16)):
        read_image(array, spec)
        read_image(image, spec)
    assert np.array_equal(array, before) and np.array_equal(np.asarray(image), before) and image.mode == "RGB"


# Refusals


def picture_bytes(kind, size=64):
    buffer = io.BytesIO()
    draw_picture(9, size, "RGB").save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_truncated_files_are_refused(kind, share, tmp_path):
    content = picture_bytes(kind)
    path = tmp_path / "cut.png"
    path.write_bytes(content[: int(share * len(content))])
    refusal(path)


def test_empty_text_folder_and_missing(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    assert "empty" in refusal(tmp_path / "empty.png")
    (tmp_path / "text.jpg").write_text("no picture\nat all")
    refusal(tmp_path / "text.jpg")
    (tmp_path / "folder.png").mkdir()
    assert "regular file" in refusal(tmp_path / "folder.png")
    assert "No such file" in refusal(tmp_path / "missing.png")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere")
    refusal(tmp_path / "dangling.png")
    (tmp_path / "round.png").symlink_to(tmp_path / "round.png")
    refusal(tmp_path / "round.png")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_named_pipe_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    assert "regular file" in refusal(tmp_path / "pipe.png")


@pytest.mark.parametrize(
    "source",
    [
        np.zeros((24, 24, 3)),
        np.zeros((24, 24, 3), np.float32),
        np.zeros((24, 24), bool),
        np.zeros((24, 24, 4), np.uint8),
        np.zeros((3, 24, 24), np.uint8),
        np.zeros((1, 24, 24, 3), np.uint8),
        np.zeros((24,), np.uint8),
        np.zeros((0, 0), np.uint8),
        np.zeros((0, 5, 3), np.uint8),
        None,
        b"bytes.png",
        [1, 2],
        torch.zeros(24, 24),
    ],
    ids=lambda source: f"{type(source).__name__}{getattr(source, 'shape', '')}",
)
def test_other_sources_are_refused(source):
    refusal(source)


def test_more_pixels_than_allowed_are_refused_before_decoding(tmp_path, monkeypatch):
    monkeypatch.setattr(preprocessing, "MAX_PIXELS", 500)
    read_image(saved(draw_picture(1, 22), tmp_path / "ok.png"), GRAY)
    path = saved(draw_picture(1, 23), tmp_path / "large.png")
    path.write_bytes(path.read_bytes()[:60])  # decoding would find it truncated
    message = refusal(path)
    assert "23 x 23" in message and "500" in message


def test_a_bomb_is_refused(tmp_path):
    path = saved(Image.new("1", (10_001, 10_000)), tmp_path / "bomb.png")
    assert path.stat().st_size < 100_000
    assert "100,000,000" in refusal(path)


# To the network


def test_to_input_scales_and_normalises_by_channel():
    spec = InputSpec(8, 3, (0.1, 0.2, 0.3), (0.5, 0.25, 2.0))
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([(images[:, c].double() / 255 - spec.mean[c]) / spec.std[c] for c in range(3)], 1)
    got = to_input(images, spec)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected.float())
    torch.testing.assert_close(normalize(images.float() / 255, spec), expected.float())
    one = images[:, :1]
    torch.testing.assert_close(to_input(one, spec), to_input(one.expand(-1, 3, -1, -1), spec))


@pytest.mark.parametrize(
    "text, shown",
    [
        ("plain é 日本.png", "plain é 日本.png"),
        ("a\nb", r"a\nb"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("caf\udce9.png", r"caf\udce9.png"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("\x00", r"\x00"),
    ],
)
def test_printable_escapes_what_a_terminal_would_obey(text, shown):
    assert printable(text) == shown
    printable(text).encode("utf-8")


def test_printable_takes_paths(tmp_path):
    assert printable(tmp_path) == str(tmp_path)


# Folders


def test_find_classes_is_sorted_and_leaves_out_the_hidden(tmp_path):
    for name in ("sad", "Angry", "happy face", ".git", "__MACOSX", ".ipynb_checkpoints"):
        (tmp_path / name).mkdir()
    (tmp_path / "notes.txt").write_text("no class")
    assert find_classes(tmp_path) == ["Angry", "happy face", "sad"]


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.write_text("x"), lambda p: p.mkdir()])
def test_find_classes_refuses_what_holds_none(make, tmp_path):
    make(tmp_path / "train")
    with pytest.raises(InputError) as caught:
        find_classes(tmp_path / "train")
    assert "train" in str(caught.value) and "\n" not in str(caught.value)


def test_walk_finds_nested_pictures_and_leaves_out_the_hidden(tmp_path):
    shown = ["b.PNG", "a.jpeg", "deep/er/c.webp", "_f.png"]
    for name in [*shown, ".hidden.png", "__MACOSX/d.png", ".thumbs/e.png", "notes.txt"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = [os.path.relpath(entry.path, tmp_path) for entry in walk_pictures(tmp_path)]
    assert found == sorted(shown)


def test_links_are_followed_and_loops_end(tmp_path):
    root = draw_folder(tmp_path / "train", {"happy": 2, "sad": 1}, 8)
    outside = draw_folder(tmp_path / "other", {"more": 2}, 8) / "more"
    (root / "happy" / "linked").symlink_to(outside)
    (root / "happy" / "loop").symlink_to(root / "happy")
    (root / "happy" / "single.png").symlink_to(outside / "more_000.png")
    names = [os.path.relpath(entry.path, root) for entry in walk_pictures(root / "happy")]
    assert names == [
        f"happy/{name}"
        for name in ("happy_000.png", "happy_001.png", "linked/more_000.png", "linked/more_001.png", "single.png")
    ]


@pytest.mark.parametrize("name", ["round.png", "round"])
def test_a_link_to_itself_is_no_end(name, tmp_path):
    root = draw_folder(tmp_path / "train", {"happy": 2, "sad": 1}, 8)
    (root / "happy" / name).symlink_to(root / "happy" / name)
    images = FolderImages(root, GRAY)
    assert len(images) == 3 and list(images.unreadable) == [str(root / "happy" / name)] * (name == "round.png")


def test_an_empty_class_folder_is_named(tmp_path):
    root = draw_folder(tmp_path / "train", {"happy": 2, "sad": 0}, 8)
    (root / "sad" / "notes.txt").write_text("x")
    with pytest.raises(InputError) as caught:
        FolderImages(root, GRAY)
    assert str(root / "sad") in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_class_lists_both_and_a_missing_one_is_fine(tmp_path):
    root = draw_folder(tmp_path / "val", {"happy": 2, "sad": 1}, 8)
    with pytest.raises(InputError) as caught:
        FolderImages(root, GRAY, class_names=["angry", "happy"])
    message = str(caught.value)
    assert all(name in message for name in ("'angry'", "'happy'", "'sad'", str(root))) and "\n" not in message
    images = FolderImages(root, GRAY, class_names=["angry", "happy", "neutral", "sad"])
    assert images.labels.tolist() == [1, 1, 3] and images.class_names == ["angry", "happy", "neutral", "sad"]


def test_class_names_are_told_by_name_whatever_their_order(tmp_path):
    root = draw_folder(tmp_path / "val", {"happy": 2, "sad": 1}, 8)
    images = FolderImages(root, GRAY, class_names=["sad", "happy"])
    assert [images.class_names[label] for label in images.labels] == [
        os.path.basename(os.path.dirname(path)) for path in images.paths
    ]


# The whole of a folder


def assert_like_read_image(images, spec):
    """Every picture equals what `read_image` makes of its file, expanded where the set is gray."""
    assert images.images.dtype == np.uint8 and images.labels.dtype == np.int64
    assert len(images) == len(images.images) == len(images.labels) == len(images.digests) == len(images.paths)
    for pixels, path, label in zip(images.images, images.paths, images.labels, strict=True):
        expected = read_image(path, spec)
        assert np.array_equal(np.broadcast_to(pixels, expected.shape), expected), path
        assert os.path.relpath(path, images.folder).split(os.sep)[0] == images.class_names[label]


@pytest.mark.parametrize("spec", [GRAY, COLOUR, GRAY3], ids=["gray", "colour", "gray of three"])
@pytest.mark.parametrize("modes", [["L"], ["RGB"], ["L", "RGB", "RGBA", "LA", "P", "1"]], ids=["L", "RGB", "mixed"])
def test_pixels_are_those_of_read_image(spec, modes, tmp_path):
    root = tmp_path / "train"
    for number in range(12):
        folder = root / ("happy", "sad")[number % 2] / ("deep" if number % 3 else "")
        folder.mkdir(parents=True, exist_ok=True)
        draw_picture(number, 31, modes[number % len(modes)]).save(folder / f"{number}.png")
    for _ in range(2):  # built, then from the cache
        images = FolderImages(root, spec)
        assert_like_read_image(images, spec)
        assert images.images.shape == (12, 3 if spec is COLOUR and modes != ["L"] else 1, 24, 24)
        assert len(set(images.digests)) == 12 and images.class_names == ["happy", "sad"]
        assert images.labels.tolist() == sorted(images.labels.tolist()) and images.notes == []


def test_more_pictures_than_a_chunk_stay_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_CHUNK_BYTES", 2 * 16 * 16)
    root = draw_folder(tmp_path / "train", {"happy": 20, "sad": 18}, 16)
    draw_picture(1, 16, "RGB").save(root / "sad" / "sad_010.png")  # colour turns up late
    (root / "happy" / "happy_007.png").write_bytes(b"broken")
    images = FolderImages(root, COLOUR)
    assert len(images) == 37 and images.images.shape[1] == 3
    assert_like_read_image(images, COLOUR)


def test_a_picture_that_the_system_gives_again_is_taken_up(tmp_path, monkeypatch):
    root = draw_folder(tmp_path / "train", {"happy": 3, "sad": 2}, 16)
    victim = str(root / "sad" / "sad_001.png")

    def refuse_one(source, *args, **options):
        if source == victim:
            raise OSError(24, "Too many open files")
        return open(source, *args, **options)

    monkeypatch.setattr(preprocessing, "open", refuse_one, raising=False)  # the operating system's
    assert list(FolderImages(root, GRAY).unreadable) == [victim]
    assert list(FolderImages(root, GRAY).unreadable) == [victim]
    monkeypatch.delattr(preprocessing, "open")
    images = FolderImages(root, GRAY)
    assert images.unreadable == {} and len(images) == 5


def test_all_gray_set_keeps_one_channel_whatever_its_files_are(tmp_path):
    root = tmp_path / "train"
    for number, mode in enumerate(["L", "LA", "1", "I;16"]):
        (root / "happy").mkdir(parents=True, exist_ok=True)
        image = draw_picture(number, 24, "L" if mode == "I;16" else mode)
        if mode == "I;16":
            image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
        image.save(root / "happy" / f"{number}.png")
    images = FolderImages(root, COLOUR)
    assert images.images.shape == (4, 1, 24, 24)
    assert_like_read_image(images, COLOUR)


def test_equal_pixels_have_equal_digests(tmp_path):
    root = draw_folder(tmp_path / "train", {"happy": 3, "sad": 2}, 24)
    Image.open(root / "happy" / "happy_001.png").save(root / "sad" / "copy.bmp")
    images = FolderImages(root, GRAY)
    digest = {os.path.basename(path): value for path, value in zip(images.paths, images.digests, strict=True)}
    assert digest["copy.bmp"] == digest["happy_001.png"] and len(set(images.digests)) == 5


# Pictures that can't be read


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="makes files that other systems have not")
def test_whatever_stands_in_a_folder_is_read_or_named(tmp_path):
    root = draw_folder(tmp_path / "train", {"happy": 1, "sad": 1}, 24)
    folder, dot = root / "happy", picture_bytes("PNG", 24)
    for name in ("🙂.png".encode(), b"new\nline.png", b"caf\xe9.png", b"\x1b[31mred.png"):
        for bad in (b"", b"bad "):
            with open(os.path.join(os.fsencode(folder), bad + name), "wb") as file:
                file.write(bad or dot)
    for number, size in enumerate([(1, 1), (20_000, 1), (1, 20_000)]):
        Image.new("L", size, 7).save(folder / f"{number}.png")
    halves(1, 2, "P").save(folder / "palette.png", transparency=2)
    halves((0, 255, 255, 0), (255, 255, 0, 0), "CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(np.full((24, 24), 300, np.uint16)).save(folder / "deep.png")
    halves(0, 1, "1").save(folder / "bits.png")
    draw_picture(1, 24, "P").save(folder / "moving.gif", save_all=True, append_images=[draw_picture(2, 24, "P")])
    (folder / "bad page.jpg").write_text("<!DOCTYPE html><html><body>404 Not Found</body></html>")
    (folder / "bad nowhere.png").symlink_to("nowhere")
    (folder / "bad round.png").symlink_to("bad round.png")
    (folder / "loop").symlink_to(".")
    os.mkfifo(folder / "bad pipe.png")
    for spec in (GRAY, COLOUR):
        images = FolderImages(root, spec)
        assert_like_read_image(images, spec)
        assert len(images) == 14 and len(images.unreadable) == 8
        assert all(os.path.basename(path).startswith("bad ") for path in images.unreadable)
        assert "left out 8 of 22" in images.notes[-1] and all(note.isprintable() for note in images.notes)


@pytest.fixture
def damaged(tmp_path):
    root = draw_folder(tmp_path / "train", {"happy": 4, "sad": 3}, 24)
    (root / "happy" / "happy_001.png").write_bytes(b"no picture")
    content = (root / "sad" / "sad_002.png").read_bytes()
    (root / "sad" / "sad_002.png").write_bytes(content[: len(content) // 2])
    (root / "sad" / "dangling.png").symlink_to(root / "nowhere")
    return root


def test_unreadable_pictures_are_named_on_every_run(damaged):
    for _ in range(2):
        images = FolderImages(damaged, GRAY)
        assert sorted(map(os.path.basename, images.unreadable)) == ["dangling.png", "happy_001.png", "sad_002.png"]
        assert len(images) == 5 and images.labels.tolist() == [0, 0, 0, 1, 1]
        assert_like_read_image(images, GRAY)
        assert all(any(name in note for note in images.notes) for name in ("dangling", "happy_001", "sad_002"))
        assert "3 of 8" in images.notes[-1] and not any("\n" in note for note in images.notes)


def test_strict_stops_at_an_unreadable_picture(damaged):
    FolderImages(damaged, GRAY)
    for _ in range(2):
        with pytest.raises(InputError, match="happy_001.png") as caught:
            FolderImages(damaged, GRAY, strict=True)
        assert "\n" not in str(caught.value)


def test_a_class_that_damage_leaves_empty_is_an_error(damaged):
    for number in range(3):
        (damaged / "sad" / f"sad_{number:03}.png").write_bytes(b"x")
    for _ in range(2):
        with pytest.raises(InputError, match="sad") as caught:
            FolderImages(damaged, GRAY)
        assert "empty" in str(caught.value) and "\n" not in str(caught.value)


def test_many_unreadable_pictures_are_counted_not_all_listed(tmp_path):
    root = draw_folder(tmp_path / "train", {"happy": 2}, 8)
    for number in range(60):
        (root / "happy" / f"x{number}.png").write_bytes(b"x")
    notes = FolderImages(root, GRAY).notes
    assert len(notes) == 52 and "10 more" in notes[50] and "60 of 62" in notes[51]


# The cache


def cache_files(folder):
    return sorted(folder.iterdir()) if folder.exists() else []


def swap_content(path, other):
    """Gives `path` the content of `other`, padded to the same size, with its time as before."""
    info, content = path.stat(), other.read_bytes()
    path.write_bytes(content + bytes(info.st_size - len(content)))
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (info.st_size, info.st_mtime_ns)


def test_the_second_run_reads_the_cache_and_decodes_nothing(tmp_path, own_cache):
    root = draw_folder(tmp_path / "train", {"happy": 3, "sad": 2}, 24)
    first = FolderImages(root, GRAY)
    (cache,) = cache_files(own_cache)
    before, pixels = cache.stat(), np.array(first.images)
    victim, small = root / "sad" / "sad_000.png", tmp_path / "small.png"
    Image.new("L", (24, 24)).save(small)
    swap_content(victim, small)
    assert (read_image(victim, GRAY) == 0).all()
    second = FolderImages(root, GRAY)
    assert np.array_equal(second.images, pixels) and second.digests == first.digests
    after = cache.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert cache_files(own_cache) == [cache]
    assert isinstance(second.images.base, np.memmap) or isinstance(second.images, np.memmap)


@pytest.mark.parametrize("change", ["content", "touched", "added", "removed", "renamed", "moved to another class"])
def test_a_changed_folder_is_read_anew_and_its_old_cache_removed(change, tmp_path, own_cache):
    root = draw_folder(tmp_path / "train", {"happy": 3, "sad": 3}, 24)
    FolderImages(root, GRAY)
    (old,) = cache_files(own_cache)
    path = root / "sad" / "sad_000.png"
    if change == "content":
        draw_picture(99, 24).save(path)
        os.utime(path, ns=(1, 1))
    elif change == "touched":
        os.utime(path, ns=(1, 1))
    elif change == "added":
        draw_picture(99, 24).save(root / "sad" / "new.png")
    elif change == "removed":
        path.unlink()
    else:
        path.rename(root / "sad" / "zzz.png" if change == "renamed" else root / "happy" / "zzz.png")
    assert_like_read_image(FolderImages(root, GRAY), GRAY)
    (new,) = cache_files(own_cache)
    assert new != old


def test_caches_of_other_folders_and_specs_stay(tmp_path, own_cache):
    one = draw_folder(tmp_path / "one", {"happy": 2}, 24)
    two = draw_folder(tmp_path / "two", {"happy": 2}, 24)
    for root, spec in ((one, GRAY), (two, GRAY), (one, COLOUR), (one, InputSpec(image_size=16))):
        FolderImages(root, spec)
    assert len(cache_files(own_cache)) == 4
    draw_picture(99, 24).save(one / "happy" / "new.png")
    FolderImages(one, GRAY)
    assert len(cache_files(own_cache)) == 4
    FolderImages(one, InputSpec(24, 1, (0.1,), (2.0,)))  # normalising is not decoding
    assert len(cache_files(own_cache)) == 4


def test_two_folders_of_equal_names_do_not_share_a_cache(tmp_path):
    for name in ("a", "b"):
        draw_folder(tmp_path / name / "train", {"happy": 2}, 24)
    draw_picture(99, 24).save(tmp_path / "b" / "train" / "happy" / "happy_000.png")
    for path in (tmp_path / "a").rglob("*.png"):
        os.utime(path, ns=(5, 5))
        twin = tmp_path / "b" / path.relative_to(tmp_path / "a")
        os.utime(twin, ns=(5, 5))
        size = max(path.stat().st_size, twin.stat().st_size)
        for file in (path, twin):
            file.write_bytes(file.read_bytes().ljust(size, b"\0"))
            os.utime(file, ns=(5, 5))
    for name in ("a", "b"):
        assert_like_read_image(FolderImages(tmp_path / name / "train", GRAY), GRAY)


def trailer_of(content):
    return json.loads(content[-12 - int.from_bytes(content[-12:-4], "little") : -12])


DAMAGES = {
    "pixels": lambda c: c[:100] + bytes([c[100] ^ 1]) + c[101:],
    "last pixel": lambda c: c[: 5 * 576 - 1] + bytes([c[5 * 576 - 1] ^ 128]) + c[5 * 576 :],
    "digest": lambda c: c.replace(trailer_of(c)["digests"][2].encode(), b"0123456789abcdef"),
    "trailer": lambda c: c[:-20] + b"\0" + c[-19:],
    "length": lambda c: c[:-5] + b"\xff" + c[-4:],
    "checksum": lambda c: c[:-1] + bytes([c[-1] ^ 1]),
    "half": lambda c: c[: len(c) // 2],
    "end": lambda c: c[:-8],
    "few bytes": lambda c: c[:5],
    "empty": lambda c: b"",
    "zeros": lambda c: bytes(len(c)),
    "foreign": lambda c: b"hello " * 999,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_rebuilt(damage, tmp_path, own_cache):
    root = draw_folder(tmp_path / "train", {"happy": 3, "sad": 2}, 24)
    digests = list(FolderImages(root, GRAY).digests)
    (cache,) = cache_files(own_cache)
    good = cache.read_bytes()
    bad = DAMAGES[damage](good)
    assert bad != good
    cache.unlink()
    cache.write_bytes(bad)
    images = FolderImages(root, GRAY)
    assert_like_read_image(images, GRAY)
    assert images.digests == digests and images.notes == []
    assert cache_files(own_cache) == [cache] and cache.read_bytes() == good


def test_a_cache_of_another_version_is_replaced(tmp_path, own_cache, monkeypatch):
    root = draw_folder(tmp_path / "train", {"happy": 3, "sad": 2}, 24)
    with monkeypatch.context() as earlier:
        earlier.setattr(data, "CACHE_VERSION", data.CACHE_VERSION - 1)
        FolderImages(root, GRAY)
    (old,) = cache_files(own_cache)
    old.write_bytes(old.read_bytes()[::-1])
    assert_like_read_image(FolderImages(root, GRAY), GRAY)
    (new,) = cache_files(own_cache)
    assert new.name != old.name


def test_two_processes_build_one_cache_at_once(tmp_path, own_cache):
    root = draw_folder(tmp_path / "train", {"happy": 150, "sad": 150}, 24)
    code = f"""if True:
        import sys
        from data import FolderImages
        from models import InputSpec

        print("ready", flush=True)
        sys.stdin.readline()
        images = FolderImages({str(root)!r}, InputSpec(image_size=24))
        print(*images.digests, images.images.tobytes().hex(), images.notes)
    """
    command, env = [sys.executable, "-c", code], {**os.environ, "PYTHONPATH": os.path.dirname(data.__file__)}
    pipe = subprocess.PIPE
    processes = [subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, text=True) for _ in range(2)]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 2
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    found = {process.communicate(timeout=300)[0] for process in processes}
    (cache,) = cache_files(own_cache)
    images = FolderImages(root, GRAY)
    assert_like_read_image(images, GRAY)
    assert found == {" ".join([*images.digests, images.images.tobytes().hex(), "[]\n"])}
    assert cache_files(own_cache) == [cache]


def test_a_rebuilt_cache_leaves_a_mapped_one_alone(tmp_path, own_cache):
    root = draw_folder(tmp_path / "train", {"happy": 3}, 24)
    first = FolderImages(root, GRAY)
    pixels = np.array(first.images)
    draw_picture(99, 24).save(root / "happy" / "happy_000.png")
    os.utime(root / "happy" / "happy_000.png", ns=(1, 1))
    second = FolderImages(root, GRAY)
    assert np.array_equal(first.images, pixels) and not np.array_equal(second.images, pixels)


def test_what_killed_runs_left_is_removed_after_a_day(tmp_path, own_cache):
    root = draw_folder(tmp_path / "train", {"happy": 2}, 24)
    FolderImages(root, GRAY)
    (cache,) = cache_files(own_cache)
    old, young = cache.with_suffix(".1.tmp"), cache.with_suffix(".2.tmp")
    other = own_cache / "notes.txt"
    for path in (old, young, other):
        path.write_bytes(b"rest")
    yesterday = time.time() - 100_000
    os.utime(old, (yesterday, yesterday))
    os.utime(other, (yesterday, yesterday))
    draw_picture(99, 24).save(root / "happy" / "new.png")
    FolderImages(root, GRAY)
    left = {path.name for path in cache_files(own_cache)}
    assert old.name not in left and {young.name, "notes.txt"} <= left and cache.name not in left


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_without_a_cache_folder_pictures_stay_in_memory(place, tmp_path):
    (tmp_path / "file").write_text("a file")
    root = draw_folder(tmp_path / "train", {"happy": 3, "sad": 2}, 24)
    draw_picture(5, 24, "RGB").save(root / "sad" / "colour.png")  # decoding starts again, in memory too
    images = FolderImages(root, COLOUR, cache_dir=tmp_path / place)
    assert_like_read_image(images, COLOUR)
    assert len(images.notes) == 1 and "memory" in images.notes[0] and "\n" not in images.notes[0]
    assert (tmp_path / "file").read_text() == "a file" and sorted(os.listdir(tmp_path)) == ["file", "train"]


@pytest.mark.parametrize("room", [0, 1000, 2000, 4000])
def test_a_full_disk_means_memory_and_leaves_nothing(room, tmp_path):
    resource = pytest.importorskip("resource")
    root = draw_folder(tmp_path / "train", {"happy": 3, "sad": 2}, 24)  # 2880 bytes of pixels
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))  # a longer file can't be written
    try:
        images = FolderImages(root, GRAY, cache_dir=tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_like_read_image(images, GRAY)
    if room < 4000:
        assert len(images.notes) == 1 and "memory" in images.notes[0] and "\n" not in images.notes[0]
    assert len(os.listdir(tmp_path / "cache")) == (room == 4000)


def test_the_given_cache_folder_is_made_and_used(tmp_path, own_cache):
    root = draw_folder(tmp_path / "train", {"happy": 2}, 24)
    FolderImages(root, GRAY, cache_dir=tmp_path / "deep" / "cache")
    assert len(os.listdir(tmp_path / "deep" / "cache")) == 1 and cache_files(own_cache) == []


def test_a_relative_folder_shares_the_cache(tmp_path, own_cache, monkeypatch):
    root = draw_folder(tmp_path / "train", {"happy": 2}, 24)
    FolderImages(root, GRAY)
    monkeypatch.chdir(tmp_path)
    images = FolderImages("train", GRAY)
    assert len(cache_files(own_cache)) == 1 and images.paths[0] == os.path.join("train", "happy", "happy_000.png")


def test_sample_set_is_told_by_its_names():
    assert is_sample_set(["a/drawing_1.png", "b/drawing_2.png"])
    assert not is_sample_set(["a/drawing_1.png", "drawing_b/photo.png"])


def test_permissions():
    code = """
        import pathlib
        import numpy as np
        from PIL import Image
        from data import FolderImages
        from errors import InputError
        from models import InputSpec

        Image.init()
        become_user()
        for name in ("a", "b"):
            for number in range(2):
                path = pathlib.Path("train", name, f"{number}.png")
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("L", (8, 8), 10 * number).save(path)
        spec, victim = InputSpec(image_size=8), pathlib.Path("train/a/1.png")
        pathlib.Path("closed").mkdir()
        pathlib.Path("closed").chmod(0o555)
        images = FolderImages("train", spec, cache_dir="closed")
        print(len(images), len(images.notes), "memory" in images.notes[0], os.listdir("closed"))
        victim.chmod(0)
        os.utime(victim, ns=(1, 1))
        print(sorted(FolderImages("train", spec).unreadable))
        victim.chmod(0o644)
        print(sorted(FolderImages("train", spec).unreadable))
        pathlib.Path("train/b").chmod(0)
        try:
            FolderImages("train", spec)
        except InputError as error:
            print(error)
        pathlib.Path("train/b").chmod(0o755)
    """
    closed, forbidden, mended, folder = run_as_user(code).splitlines()
    assert closed == "4 1 True []"
    assert forbidden == "['train/a/1.png']"
    assert "can't read the folder train/b" in folder
    assert mended == "[]"  # a permission that was given is no reason to leave a picture out for good


def test_the_source_may_be_gone_while_the_cache_serves(tmp_path):
    root = draw_folder(tmp_path / "train", {"happy": 2}, 24)
    images = FolderImages(root, GRAY)
    expected = np.array(images.images)
    shutil.rmtree(root)
    assert np.array_equal(images.images, expected)


# Decoding ahead


def write_files(folder, count, size):
    paths = [folder / str(number) for number in range(count)]
    for path in paths:
        path.write_bytes(bytes(size))
    return [str(path) for path in paths]


@pytest.mark.parametrize("size", [10, 20_000])  # of a file: one decoder, or one for each CPU
@pytest.mark.parametrize("count", [0, 1, 7, 8, 50])
def test_chunks_come_in_order_and_whole(tmp_path, count, size):
    sources = write_files(tmp_path, count, size)
    chunks = list(preprocessing.in_chunks(sources, lambda chunk: [os.path.basename(path) for path in chunk], 7))
    assert [start for start, _ in chunks] == list(range(0, count, 7))
    assert [int(name) for _, names in chunks for name in names] == list(range(count))


@pytest.mark.parametrize(("ahead", "expected"), [(0, 3), (9, 10)])
def test_chunks_are_decoded_ahead_but_not_all_at_once(tmp_path, ahead, expected):
    decoded, enough = [], threading.Event()

    def decode(chunk):
        decoded.extend(chunk)
        if len(decoded) == expected:
            enough.set()

    chunks = preprocessing.in_chunks(write_files(tmp_path, 40, 10), decode, 1, ahead=ahead)
    next(chunks)
    next(chunks)
    assert enough.wait(60)
    chunks.close()
    assert len(decoded) == expected


def test_small_files_get_one_decoder_and_large_ones_many(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)  # whatever machine this is
    for size, decoders in ((1_600, 1), (50_000, 4)):
        folder = tmp_path / str(size)
        folder.mkdir()
        assert preprocessing._count_decoders(write_files(folder, 20, size)) == decoders
    assert preprocessing._count_decoders([np.zeros((4, 4), np.uint8)] * 5) == 4


@pytest.mark.parametrize(("stored", "channels"), [(1, 1), (1, 3), (3, 3)])
def test_normalise_is_mean_and_std_of_each_channel(stored, channels):
    spec = InputSpec(48, channels, (0.4, 0.5, 0.6)[:channels], (0.2, 0.3, 0.25)[:channels])
    images = torch.rand(4, stored, 48, 48)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (spec.mean, spec.std))
    assert torch.equal(normalize(images, spec), (images - mean) / std)


@pytest.mark.skipif(os.name != "posix", reason="puts a program on the path")
def test_no_decoder_starts_a_program(tmp_path, monkeypatch):
    """Pillow reads EPS by Ghostscript, whatever the file is called."""
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {tmp_path / 'started'}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 48 48\n%%EndComments\n{} loop\n%%EOF\n"
    (tmp_path / "photo.jpg").write_bytes(content)
    with pytest.raises(InputError, match="photo.jpg"):
        read_image(tmp_path / "photo.jpg", InputSpec())
    assert not (tmp_path / "started").exists()


def test_huge_files_are_refused_before_they_are_read(tmp_path):
    with open(tmp_path / "huge.png", "wb") as file:
        file.truncate(2**40)  # sparse: it takes no room
    with pytest.raises(InputError, match="huge.png"):
        read_image(tmp_path / "huge.png", InputSpec())
