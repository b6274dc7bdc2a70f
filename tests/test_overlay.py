"""What is drawn on images: boxes, labels and bars."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from conftest import draw_image, open_faceless, open_portrait, run
from PIL import Image, ImageDraw

from faces.align import Face
from faces.overlay import COLORS, Targets, draw_faces
from inference import View
from predict_emotion import main
from reports import find_font

PREDICTION = ("happy", 97.5, {"happy": 97.5, "sad": 2.5})
WHOLE, NONE = (View(None, "crop"), PREDICTION), (View(None, "none"), None)


def result(number, left, top, side):
    return View(None, "face", number, Face(left, top, side, side, 1.0, ())), PREDICTION


def canvas(width, height):
    return np.full((height, width, 3), 128, np.uint8)


@pytest.fixture
def drawn(monkeypatch):
    """The texts and, by color, the areas that Pillow was asked to draw."""
    texts, areas, text, rectangle = [], {}, ImageDraw.ImageDraw.text, ImageDraw.ImageDraw.rectangle

    def keep_text(self, place, words, **options):
        texts.append(words)
        text(self, place, words, **options)

    def keep_area(self, area, fill=None, outline=None, width=1):
        areas.setdefault(fill or outline, []).append(area)
        rectangle(self, area, fill, outline, width)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", keep_text)
    monkeypatch.setattr(ImageDraw.ImageDraw, "rectangle", keep_area)
    return texts, areas


def test_annotated_copies_leave_the_images_alone(checkpoint, tmp_path):
    images = {"portrait.png": open_portrait(), "arms.png": open_faceless(), "crop.png": draw_image(3, mode="RGB")}
    for name, image in images.items():
        image.save(tmp_path / name)
    words = [*(tmp_path / name for name in images), "--annotate", tmp_path / "out", "--checkpoint", checkpoint]
    assert run(main, *words)[0] == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"{name[:-4]}.faces.jpg" for name in images}
    assert all(np.array_equal(Image.open(tmp_path / name), image) for name, image in images.items())
    image = Image.open(tmp_path / "out" / "portrait.faces.jpg").resize((512, 512))
    changed = np.abs(np.asarray(image, int) - np.asarray(images["portrait.png"], int)).max(2) > 60
    assert changed[30:170, 180:270].mean() > 0.05 and changed[400:].mean() < 0.01  # at the face, and away from it


@pytest.mark.parametrize("size", [(48, 48), (300, 200), (2000, 1500)])
@pytest.mark.parametrize("found", [result(1, 16, 16, 20), WHOLE, NONE], ids=["face", "whole", "none"])
def test_labels_are_readable_at_any_size(size, found):
    """Letters of 13 pixels or more on what is written, and of a ninetieth of its longer side: faces may be small."""
    image = np.asarray(draw_faces(canvas(*size), [found]))
    assert len(image) >= max(size[1], 120) and image.shape[1] / len(image) == pytest.approx(size[0] / size[1], rel=0.02)
    label = (image == (255, 208, 0)).all(2)
    rows = np.flatnonzero(label.sum(1) > 40)
    assert rows.max() - rows.min() >= max(13, max(image.shape[:2]) / 90)
    assert ((image.max(2) < 60) & np.roll(label, 3, 1)).any()  # letters


def test_letters_that_pillow_lacks_are_drawn():
    """Ü and ß are two boxes in its own font; what no font has is a question mark."""
    view, _ = result(1, 20, 20, 100)
    names = ["Ü" * 4, "ß" * 4, "?" * 4, "怒" * 4]
    images = [np.asarray(draw_faces(canvas(400, 300), [(view, (name, 50.0, {name: 50.0}))])) for name in names]
    assert np.array_equal(*images[2:]) == (find_font("怒") is None)
    assert not np.array_equal(*images[:2]) and not np.array_equal(*images[1:3])


@pytest.mark.parametrize(
    ("numbers", "labels"),
    [((1,), ["happy 98%"]), ((2,), ["2: happy 98%"]), ((1, 2), ["1: happy 98%", "2: happy 98%"])],
)
def test_labels_have_the_numbers_of_rows_except_for_an_only_face(drawn, numbers, labels):
    draw_faces(canvas(600, 300), [result(number, 250 * number - 200, 100, 80) for number in numbers])
    assert [text for text in drawn[0] if "%" in text] == labels


@pytest.mark.parametrize("count", [len(COLORS), 48])
def test_neighbors_differ_in_color(drawn, count):
    """Of faces in rows and columns, numbered in any order, up to many more than there are colors."""
    numbers = np.random.default_rng(0).permutation(count) + 1
    places = [(number, 100 * (place % 8), 100 * (place // 8)) for place, number in enumerate(numbers)]
    draw_faces(canvas(800, 600), [result(number, left, top, 60) for number, left, top in sorted(places)], enlarge=False)
    boxes = {number: (left, top, left + 60, top + 60) for number, left, top in places}
    colors = {number: color for number, box in boxes.items() for color in COLORS if box in drawn[1][color]}
    assert count > len(COLORS) or all(colors[number] == color for number, color in enumerate(COLORS, 1))
    for (one, *a), (other, *b) in combinations(places, 2):
        assert colors[one] != colors[other] or max(abs(a[0] - b[0]), abs(a[1] - b[1])) > 100


@pytest.mark.parametrize(
    ("size", "faces", "covers"),
    [
        ((900, 300), [(20, 100, 100), (320, 100, 100), (620, 100, 100)], 0),  # room for all
        ((600, 400), [(20, 50, 170), (200, 50, 170), (380, 50, 170)], 0),  # below them alone
        ((495, 110), [(0, 20, 90), (165, 20, 90), (330, 20, 90)], 0),  # in between, if they are narrower
        ((310, 200), [(0, 30, 150), (155, 30, 150)], 2),  # no room: each stands where it covers least
    ],
)
def test_bars_of_each_face_are_shrunk_rather_than_left_out(drawn, size, faces, covers):
    probs = dict.fromkeys(["angry", "disgust", "fear", "happy", "neutral", "sad", "surprise"], 100 / 7)
    results = [(result(number, *face)[0], ("sad", 50.0, probs)) for number, face in enumerate(faces, 1)]
    draw_faces(canvas(*size), results, enlarge=False)
    bars = drawn[1][(0, 0, 0, 150)]
    boxes = [(left, top, left + side, top + side) for left, top, side in faces]
    assert len(bars) == len(faces) and all(drawn[0].count(name) == len(faces) for name in probs)
    assert all(0 <= left < right <= size[0] and 0 <= top < bottom <= size[1] for left, top, right, bottom in bars)
    pairs = [*combinations(bars, 2), *((bar, box) for bar in bars for box in boxes)]
    covered = [a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for a, b in pairs]
    assert sum(covered) == covers and not any(covered[: len(pairs) - len(bars) * len(boxes)])


def test_targets_are_all_different_and_never_an_input(tmp_path):
    targets = Targets(tmp_path, ["a/clip.mp4", "b/Clip.mp4", str(tmp_path / "X.faces.jpg")])
    for path, name in (("a/clip.mp4", "clip.faces"), ("b/Clip.mp4", "Clip-2.faces"), ("x.jpg", "x-2.faces")):
        assert targets(path, f".faces{Path(path).suffix}") == tmp_path / f"{name}{Path(path).suffix}"
