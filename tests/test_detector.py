"""Faces in photos, those of examples/astronaut.jpg: found, turned upright, cropped, predicted."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_image, open_faceless, open_portrait, refusal, run
from PIL import Image
from test_predict import NAMES, rows_of

from faces.align import Face, align_face
from faces.detector import detect, find_faces, keep_best, warn_of_photos
from inference import classify, classify_on_cores, make_finder
from predict_emotion import load_model, main, predict_faces, predict_image, predict_images

ASTRONAUT = open_portrait()
FACE = (181, 62, 90, 111)  # of the astronaut: left, top, width, height


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_model(checkpoint, "cpu")[0]


@pytest.fixture
def predict(checkpoint):
    return partial(run, main, "--checkpoint", checkpoint)


def scaled(side, angle=0):
    """The astronaut with a face of about `side` pixels, turned counterclockwise by `angle` degrees."""
    image = ASTRONAUT.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    factor = side / FACE[3]
    return image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.LANCZOS)


def group(*sides):
    """The astronaut several times side by side, with faces of `sides` pixels."""
    parts, left = list(map(scaled, sides)), 0
    canvas = Image.new("RGB", (sum(part.width for part in parts), scaled(max(sides)).height), "gray")
    for part in parts:
        canvas.paste(part, (left, 0))
        left += part.width
    return canvas


# OpenCV 4.14's FaceDetectorYN with the same weights: left, top, width, height, x and y of five landmarks, score
OPENCV = [
    (512, 0, [178.3, 62.9, 90.2, 112.8, 200.2, 101.7, 246.8, 102.4, 220.1, 124.2, 198.9, 142.4, 239.6, 143.4, 0.932]),
    (300, 20, [119.5, 91.7, 55.5, 64.1, 131.9, 114.5, 156.8, 113.5, 144.0, 126.8, 136.4, 137.8, 158.4, 137.4, 0.924]),
    (700, -45, [541.6, 250.3, 136.3, 143.4, 568.6, 301.2, 615.3, 310.6, 573.7, 332.5, 565, 351.9, 599.7, 359.9, 0.897]),
    (512, 90, [90.8, 246.7, 66.4, 86.0, 130.9, 275.7, 140.6, 275.5, 145.7, 290.3, 131.9, 309.2, 139.9, 306.6, 0.844]),
]


@pytest.mark.parametrize(("size", "angle", "expected"), OPENCV)
def test_the_network_sees_what_opencv_s_sees(size, angle, expected):
    image = np.asarray(ASTRONAUT.resize((size, size)).rotate(angle, expand=True))
    for (row,) in detect(np.stack([image, image])):  # several of a size share a batch
        assert np.abs(row[:14] - expected[:14]).max() < 0.5 and abs(row[14] - expected[14]) < 0.005


def test_the_best_of_overlapping_boxes_is_kept():
    rows = np.zeros((4, 15))
    rows[:, [0, 2, 3, 14]] = [[0, 10, 10, 0.8], [2, 10, 10, 0.9], [7.5, 10, 10, 0.7], [40, 10, 10, 0.75]]
    assert keep_best(rows)[:, 14].tolist() == [0.9, 0.75, 0.7]  # which have 8 of 12 in common with it, and 4.5 of 15.5
    assert len(keep_best(rows[:0])) == 0


def test_the_face_of_the_portrait(tmp_path):
    ASTRONAUT.save(tmp_path / "portrait.png")
    (face,) = find_faces(ASTRONAUT)
    assert np.abs(np.array(face.box) - FACE).max() <= 4 and abs(face.tilt) < 5 and 0.7 < face.score <= 1
    assert type(face.score) is float and all(type(edge) is int for edge in face.box)
    eyes, nose, mouth = face.landmarks[:2], face.landmarks[2], face.landmarks[3:]
    assert max(y for _, y in eyes) < nose[1] < min(y for _, y in mouth) and eyes[0][0] < nose[0] < eyes[1][0]
    assert find_faces(np.asarray(ASTRONAUT)) == find_faces(tmp_path / "portrait.png") == [face]
    assert len(find_faces(ASTRONAUT.convert("L"))) == 1


@pytest.mark.parametrize(("side", "angle"), [(40, 0), (400, 0), (110, 20), (110, -60), (110, 90), (60, 180)])
def test_faces_of_any_size_and_tilt_are_turned_upright(side, angle):
    image = scaled(side, angle)
    (face,) = find_faces(image)
    assert max(face.width, face.height) == pytest.approx(side, rel=0.2)
    assert abs((face.tilt + angle + 180) % 360 - 180) < 15
    crop = Image.fromarray(align_face(image, face)).convert("L").resize((24, 24))
    upright = Image.fromarray(align_face(ASTRONAUT, find_faces(ASTRONAUT)[0])).convert("L").resize((24, 24))
    assert np.corrcoef(np.ravel(crop), np.ravel(upright))[0, 1] > 0.6


def test_a_face_that_fills_the_image_is_found():
    left, top, width, height = FACE
    close = ASTRONAUT.crop((left, top + 10, left + width, top + height - 10))
    for side in (110, 480, 1500):
        assert len(find_faces(close.resize((side, side), Image.Resampling.BICUBIC))) == 1, side


def test_a_group_is_found_largest_first():
    found = find_faces(group(60, 120, 80))
    assert [round(face.height / 20) for face in found] == [3 * 2, 4, 3]
    assert found[0].left > found[2].left and found[1].left > found[0].left  # not in the order of the image
    assert len(find_faces(group(50, 120), min_size=80)) == 1
    assert "at least 1" in refusal(find_faces, ASTRONAUT, min_size=0)


def test_no_face_is_an_empty_list():
    assert find_faces(open_faceless()) == []
    for size in ((1, 1), (20, 1), (5, 4000), (30, 30)):
        assert find_faces(Image.new("RGB", size)) == []


def test_large_images_are_searched_on_a_copy():
    wide = Image.new("RGB", (4000, 3000), "gray")
    wide.paste(scaled(50), (700, 900))
    assert find_faces(wide) == []  # 50 pixels of 4,000 are 12 of 960
    (face,) = find_faces(wide, min_size=30)
    assert face.height == pytest.approx(50, rel=0.2)


def test_crops_are_square_and_repeat_the_edge_beyond_the_image():
    level = ((10.0, 0.0), (20.0, 0.0), *[(0.0, 0.0)] * 3)
    crop = align_face(ASTRONAUT, Face(100, 150, 60, 80, 1.0, level))
    assert crop.dtype == np.uint8 and np.array_equal(crop, np.asarray(ASTRONAUT)[150:230, 90:170])
    upside_down = ((20.0, 0.0), (10.0, 0.0), *[(0.0, 0.0)] * 3)
    turned = align_face(ASTRONAUT, Face(100, 150, 60, 80, 1.0, upside_down))
    assert np.abs(turned.astype(int) - crop[::-1, ::-1]).max() <= 1
    pixels = np.arange(100, dtype=np.uint8).reshape(10, 10)
    crop = align_face(pixels, Face(0, 0, 4, 8, 1.0, level))
    assert crop.shape == (8, 8, 3) and (crop[:, :3, 0] == pixels[:8, :1]).all() and crop[-1, -1, 0] == pixels[7, 5]


def test_threads_find_what_one_finds(model, tmp_path):
    paths = [str(tmp_path / f"{number}.png") for number in range(7)]
    for number, path in enumerate(paths):
        group(60, 40 + 2 * number).save(path)
    Path(paths[2]).write_bytes(b"broken")
    finder, threads, bad = make_finder(model.info.input_spec, "on"), torch.get_num_threads(), []
    torch.set_num_threads(3)
    try:
        found = list(classify_on_cores(model, paths, finder, 4, lambda path, _: bad.append(path)))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    alone = [result for path in paths if path not in bad for result in classify(model, [path], finder)]
    assert bad == [paths[2]] and [view for view, _ in found] == [view for view, _ in alone] and len(alone) == 12
    assert all(torch.allclose(a, b, atol=1e-5) for (_, a), (_, b) in zip(found, alone, strict=True))


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    group(60, 120).save(folder / "group.png")
    open_faceless().save(folder / "arms.png")
    draw_image(3).save(folder / "crop.png")
    ASTRONAUT.save(folder / "portrait.jpg", quality=95)
    (folder / "notes.txt").write_text("no image")
    return folder


def test_python_answers_as_the_shell_does(model, photos, predict):
    """The same three values for a photo, a crop of a face, and a photo without one, which Python tells by a warning."""
    (result,), (face,) = predict_faces(model, ASTRONAUT), find_faces(ASTRONAUT)
    emotion, confidence, all_probs = predict_image(model, ASTRONAUT)
    assert (result["box"], result["score"]) == (face.box, face.score)
    assert (result["emotion"], result["confidence"], result["probs"]) == (emotion, confidence, all_probs)
    assert predict_image(model, align_face(ASTRONAUT, face), NAMES, faces="off")[2] == all_probs
    for name in ("portrait.jpg", "crop.png"):
        emotion, confidence, _ = predict_image(model, photos / name)
        _, out, _ = predict(photos / name)
        assert f"Predicted Emotion: {emotion.upper()}\nConfidence: {confidence:.2f}%" in out
    assert predict(photos / "arms.png")[:2] == (0, "No face found\n")
    assert predict_faces(model, open_faceless()) == []
    with pytest.warns(UserWarning, match=r"no face found in .*arms\.png"):
        assert predict_image(model, photos / "arms.png") == predict_image(model, open_faceless(), faces="off")
    (_, _, all_probs), faces = predict_images(model, [group(60, 120)])[0], predict_faces(model, group(60, 120))
    assert all_probs == pytest.approx(faces[0]["probs"], abs=1e-3) and len(faces) == 2
    assert "auto" in refusal(predict_image, model, ASTRONAUT, faces="some")


def test_every_face_gets_a_row(photos, predict, model, tmp_path):
    code, out, err = predict(photos, "--output", tmp_path / "p.csv", "--batch-size", 2)
    assert code == 0 and err.splitlines()[-2:] == ["not read: 1 .txt", "4 images, 3 faces, 1 without a face"]
    assert out.count("face 1 at") == 2 and out.count("no face found") == 1
    arms, crop, first, second, last = rows_of(tmp_path / "p.csv")
    names = [Path(row["file"]).name for row in (arms, crop, first, second, last)]
    assert names == ["arms.png", "crop.png", "group.png", "group.png", "portrait.jpg"]
    assert arms["emotion"] == arms["confidence"] == arms["left"] == arms["happy"] == ""
    assert crop["left"] == "" and crop["emotion"] == predict_image(model, photos / "crop.png")[0]
    for row, result in zip((first, second), predict_faces(model, photos / "group.png"), strict=True):
        assert tuple(int(row[name]) for name in ("left", "top", "width", "height")) == result["box"]
        assert float(row["score"]) and row["emotion"] == result["emotion"]
        assert float(row["confidence"]) == pytest.approx(result["confidence"], abs=1e-3)
    assert predict(photos, "--output", tmp_path / "p.json")[0] == 0
    listed = rows_of(tmp_path / "p.json")
    assert [row["face"] for row in listed] == ["none", "whole", 1, 2, 1] and listed[0]["emotion"] is None


def test_faces_off_and_on(photos, predict, model, tmp_path):
    code, out, err = predict(photos, "--faces", "off", "--output", tmp_path / "p.csv")
    assert code == 0 and err.splitlines()[-1] == "4 images"
    rows = rows_of(tmp_path / "p.csv")
    assert {row["face"] for row in rows} == {"whole"} and out.count("whole image") == 4
    assert [row["emotion"] for row in rows] == [predict_image(model, row["file"], faces="off")[0] for row in rows]
    assert predict(photos / "crop.png", "--faces", "on", "--output", tmp_path / "p.csv")[:2] == (0, "No face found\n")
    assert rows_of(tmp_path / "p.csv")[0]["face"] == "none"


def test_boxes_are_in_pixels_of_the_file(tmp_path, model):
    """Also of a JPEG that is decoded at half its size."""
    open_portrait().resize((6400, 6400)).save(tmp_path / "large.jpg")
    (large,), (small,) = (predict_faces(model, image) for image in (tmp_path / "large.jpg", open_portrait()))
    assert np.array(large["box"]) / 12.5 == pytest.approx(small["box"], abs=8)


def test_a_single_photo_is_a_block_per_face(photos, predict, tmp_path):
    code, out, err = predict(photos / "group.png", "--show-all")
    assert (code, err) == (0, "")
    assert out.count("Predicted Emotion: ") == 2 and out.index("Face 1 at") < out.index("Face 2 at")
    assert predict(photos / "group.png", "--min-face", 90)[1].count("Predicted") == 1
    scaled(110, 90).save(tmp_path / "side.png")
    assert "turned by -" in predict(tmp_path / "side.png")[1]


def test_training_warns_of_whole_photos(tmp_path):
    close = align_face(scaled(300), find_faces(scaled(300))[0])
    for name, image in (("photo", ASTRONAUT), ("close", Image.fromarray(close)), ("small", draw_image(1))):
        (tmp_path / name / "happy").mkdir(parents=True)
        image.save(tmp_path / name / "happy" / "1.png")
    assert [warn_of_photos(tmp_path / name) for name in ("close", "small")] == [[], []]
    (line,) = warn_of_photos(tmp_path / "photo")
    assert "photo holds whole photos" in line and "prepare_data.py crop" in line
