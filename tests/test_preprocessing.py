"""Decoding: every kind of file becomes the same pixels everywhere, and what is damaged is refused by name."""

import os
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import draw_image, refusal
from PIL import Image

import preprocessing
from errors import printable
from models import InputSpec
from preprocessing import READABLE, read_image, read_whole, reduction_of

GRAY = InputSpec(image_size=24)
COLOR = InputSpec(24, 3, (0.5,) * 3, (0.5,) * 3)
WHITE = (255,) * 3
EXACT = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}


def saved(image, path, **options):
    image.save(path, **options)
    return path


@pytest.mark.parametrize("ending", ["png", "bmp", "tif", "webp", "ppm"])
def test_an_image_at_its_size_is_unchanged(ending, tmp_path):
    images = [draw_image(1, 24, mode) for mode in ("L", "RGB")]
    gray, color = (saved(image, tmp_path / f"{image.mode}.{ending}", **EXACT.get(ending, {})) for image in images)
    pixels = read_image(gray, GRAY)
    assert pixels.dtype == np.uint8 and pixels.shape == (1, 24, 24)
    assert np.abs(pixels - np.asarray(images[0])[None].astype(int)).max() <= (ending == "webp")
    assert np.array_equal(read_image(gray, COLOR), pixels.repeat(3, 0))
    pixels = read_image(color, COLOR)
    assert pixels.flags.c_contiguous and np.array_equal(pixels, np.asarray(images[1]).transpose(2, 0, 1))  # not BGR


@pytest.mark.parametrize("spec", [GRAY, replace(COLOR, gray=True)], ids=["one channel", "gray of three"])
def test_a_gray_model_sees_a_color_image_as_pillow_grays_and_stretches_it(spec, tmp_path):
    for size in ((24, 24), (80, 10), (1, 500)):
        image = draw_image(3, 24, "RGB").resize(size)
        expected = image.convert("L").resize((24, 24), Image.Resampling.BILINEAR)
        assert np.array_equal(read_image(saved(image, tmp_path / "a.png"), spec), np.asarray(expected)[None])


def halves(left, right, mode="RGB", palette=None):
    image = Image.new(mode, (24, 24), left)
    image.paste(right, (12, 0, 24, 24))
    if palette:
        image.putpalette(palette)
    return image


FRAMES = {"save_all": True, "append_images": [Image.new("RGB", (24, 24), "lime")], "lossless": True}
PALETTE = halves(1, 2, "P", [0, 0, 0, 10, 200, 30, 50, 60, 70])


@pytest.mark.parametrize(
    ("name", "image", "options", "left", "right"),
    [
        ("transparent.png", halves((200, 0, 0, 255), (0, 0, 0, 0), "RGBA"), {}, (200, 0, 0), WHITE),
        ("translucent.png", halves((0, 0, 0, 127), (0, 0, 0, 51), "RGBA"), {}, (128,) * 3, (204,) * 3),
        ("gray_alpha.png", halves((77, 255), (77, 0), "LA"), {}, (77,) * 3, WHITE),
        ("palette.png", PALETTE, {}, (10, 200, 30), (50, 60, 70)),
        ("palette_alpha.gif", PALETTE, {"transparency": 2}, (10, 200, 30), WHITE),
        ("key.png", halves((10, 20, 30), (50, 60, 70)), {"transparency": (50, 60, 70)}, (10, 20, 30), WHITE),
        *[(f"frames.{ending}", halves(0, WHITE), FRAMES, (0,) * 3, WHITE) for ending in ("gif", "webp", "tif", "png")],
        *[(f"bits.{ending}", halves(0, 1, "1"), {}, (0,) * 3, WHITE) for ending in ("png", "tif", "bmp", "pbm")],
        ("cmyk.jpg", halves((0, 255, 255, 0), (255, 255, 0, 0), "CMYK"), {"quality": 100}, (255, 0, 0), (0, 0, 255)),
    ],
)
def test_transparency_palettes_animations_bits_and_cmyk(name, image, options, left, right, tmp_path):
    path = saved(image, tmp_path / name, **options)
    for spec in (COLOR, GRAY):
        pixels = read_image(path, spec).astype(int)
        for half, color in ((pixels[:, :, :10], left), (pixels[:, :, 14:], right)):
            expected = read_image(Image.new("RGB", (24, 24), color), spec)[:, :, :10]
            assert np.abs(half - expected).max() <= (12 if name.endswith("jpg") else 0), half[:, 0, 0]


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_sixteen_bits_are_scaled_not_clipped(ending, tmp_path):
    values = np.repeat(np.array([[0, 128 * 257, 65535]], np.uint16), 8, 1).repeat(24, 0)
    values[0] = 300  # a clip at 255 would make it white
    big_endian = Image.frombytes("I;16B", (24, 24), values.astype(">u2").tobytes())
    for image in (Image.fromarray(values), *([big_endian] if ending == "tif" else [])):
        for spec in (GRAY, COLOR):
            pixels = read_image(saved(image, tmp_path / f"a.{ending}"), spec)
            assert (pixels[:, 0] == 1).all() and pixels[0, 5, [3, 11, 20]].tolist() == [0, 128, 255]


@pytest.mark.parametrize(
    ("orientation", "undo", "ending"),
    [(2, 0, "png"), (3, 3, "png"), (4, 1, "tif"), (5, 5, "webp"), (6, 2, "jpg"), (7, 6, "png"), (8, 4, "png")],
)
def test_every_exif_orientation(orientation, undo, ending, tmp_path):
    upright = draw_image(5, 24, "RGB").resize((40, 24), Image.Resampling.NEAREST)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = EXACT.get(ending, {}) | {"exif": exif}
    pixels = read_image(saved(upright.transpose(Image.Transpose(undo)), tmp_path / f"a.{ending}", **options), COLOR)
    assert np.abs(pixels.astype(int) - read_image(upright, COLOR)).max() <= (8 if ending == "jpg" else 0)


def test_arrays_and_pil_images_are_read_as_files_are_and_left_alone(tmp_path):
    image = draw_image(4, 31, "RGB")
    array, gray, path = np.array(image), image.convert("L"), saved(image, tmp_path / "a.png")
    for spec in (GRAY, COLOR):
        assert all(np.array_equal(read_image(source, spec), read_image(path, spec)) for source in (image, array))
        assert np.array_equal(read_image(np.asarray(gray), spec), read_image(gray, spec))
    flipped = array[:, ::-1]  # a view that is not contiguous
    assert np.array_equal(read_image(flipped, COLOR), read_image(flipped.copy(), COLOR))
    assert np.array_equal(array, np.asarray(image)) and image.mode == "RGB" and image.size == (31, 31)


def refused(source):
    message = refusal(read_image, source, GRAY)
    assert "can't read" in message and "object at 0x" not in message
    if isinstance(source, str | os.PathLike):
        assert printable(os.path.basename(source)) in message
    return message


@pytest.mark.parametrize("kind", READABLE)
@pytest.mark.parametrize("share", [0, 0.1, 0.8])
def test_truncated_files_are_refused(kind, share, tmp_path):
    path = saved(draw_image(9, 64, "RGB"), tmp_path / "cut.png", format=kind)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert ("empty" in refused(path)) == (share == 0)


def test_what_phones_write(tmp_path, monkeypatch):
    saved(Image.new("RGB", (64, 48), (200, 100, 50)), tmp_path / "a.avif")
    assert np.abs(read_whole(tmp_path / "a.avif").astype(int) - (200, 100, 50)).max() < 8
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "a.heic").write_bytes(bytes(4) + b"ftypheic" + bytes(4) + b"mif1heic" + bytes(100))
    assert "pip install pillow-heif" in refused(tmp_path / "a.heic")


def test_what_is_no_image_is_refused(tmp_path):
    with open(tmp_path / "huge.png", "wb") as file:
        file.truncate(2**40)  # sparse: it takes no room, and nothing of it is read
    (tmp_path / "eps.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 48 48\n%%EndComments\n%%EOF\n")
    (tmp_path / "folder.png").mkdir()
    saved(Image.fromarray(np.ones((24, 24), np.float32)), tmp_path / "float.tif")
    words = {"huge.png": "bytes", "folder.png": "regular file", "float.tif": "floating-point"}
    words |= {"eps.jpg": "cannot identify"}  # Pillow starts Ghostscript to read it
    for name, word in words.items():
        assert word in refused(tmp_path / name)
    assert refused(tmp_path / "missing.png").endswith("missing.png: No such file or directory")
    for name in ("Mümmé 日本.png", "a'b\"c  $.png", "-\n\x1b[31m.png"):
        read_image(saved(draw_image(1, 24), tmp_path / name), GRAY)
        (tmp_path / name).write_bytes(b"x")
        refused(str(tmp_path / name))
    shapes = ((24, 24, 4), (3, 24, 24), (1, 24, 24, 3), (24,), (0, 5, 3))
    arrays = [np.zeros(shape, np.uint8) for shape in shapes] + [np.zeros((24, 24), kind) for kind in (np.float32, bool)]
    for source in (*arrays, None, b"bytes.png", [1, 2], torch.zeros(24, 24)):
        refused(source)


@pytest.mark.filterwarnings("ignore:Image size")  # Pillow's own
def test_more_pixels_than_allowed_are_refused_before_decoding(tmp_path):
    """However small the file is; but a JPEG is decoded at a half or a quarter."""
    sizes = {"many.png": (6_500, 6_500), "wide.png": (20_001, 1), "high.png": (1, 20_001)}
    for name, size in sizes.items():
        path = saved(Image.new("1", size), tmp_path / name)
        path.write_bytes(path.read_bytes()[:60])  # decoding would find it truncated
        assert f"{size[0]} x {size[1]} pixels are more" in refused(path)
    for side, shown in ((6_000, 6_000), (10_000, 5_000), (13_200, 3_300)):
        image = Image.new("L", (side, side), 255)
        image.paste(0, (side // 2, 0, side, side))
        path = saved(image, tmp_path / "large.jpg", **({"format": "MPO"} if side == 10_000 else {}))  # as phones do
        assert reduction_of(path) == side // shown
        assert read_whole(path).shape == (shown, shown, 3)
        assert np.abs(read_image(path, GRAY)[0] - read_image(image.reduce(side // 100), GRAY)[0].astype(int)).max() < 4


def test_printable_escapes_what_a_terminal_would_obey():
    assert printable("plain é 日本.png") == "plain é 日本.png"
    assert printable("\n\x00\x1b[31m caf\udce9\u202egnp.exe") == r"\n\x00\x1b[31m caf\udce9\u202egnp.exe"


@pytest.mark.parametrize("count", [0, 1, 7, 50])
def test_chunks_come_in_order_and_whole(count):
    chunks = list(preprocessing.in_chunks(list(range(count)), list, 7, workers=3))
    assert [start for start, _ in chunks] == list(range(0, count, 7))
    assert [source for _, sources in chunks for source in sources] == list(range(count))


def test_small_files_are_decoded_by_one_thread(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)  # whatever machine this is
    for size, decoders in ((1_600, 1), (20_000, 4)):
        (tmp_path / "file").write_bytes(bytes(size))
        assert preprocessing._count_decoders([tmp_path / "file"] * 150) == decoders
    assert preprocessing._count_decoders([np.zeros((4, 4), np.uint8)] * 5) == 4


@pytest.mark.parametrize(("ahead", "expected"), [(0, 3), (9, 10)])
def test_chunks_are_decoded_ahead_but_not_all_at_once(ahead, expected):
    decoded, enough = [], threading.Event()

    def decode(chunk):
        decoded.extend(chunk)
        if len(decoded) == expected:
            enough.set()

    chunks = preprocessing.in_chunks(list(range(40)), decode, 1, ahead=ahead, workers=1)
    next(chunks)
    next(chunks)
    assert enough.wait(60)
    chunks.close()
    assert len(decoded) == expected
