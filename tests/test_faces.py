"""Faces in photos, those of examples/astronaut.jpg: found, cropped, predicted, annotated; and without OpenCV."""

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_refused, draw_image, open_faceless, open_portrait, refusal, run
from PIL import Image
from test_predict import NAMES, rows_of

from faces import detector
from faces.detector import Face, crop_face, find_faces
from inference import classify, classify_on_cores, make_finder
from predict_emotion import load_model, main, predict_faces, predict_image

cv2 = pytest.importorskip("cv2", reason="needs OpenCV")
ASTRONAUT = open_portrait()
FACE = (176, 65, 98, 98)  # of the astronaut, as the cascade frames it: left, top, width, height


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_model(checkpoint, "cpu")[0]


@pytest.fixture
def predict(checkpoint):
    return partial(run, main, "--checkpoint", checkpoint)


def scaled(side, angle=0):
    """The astronaut with a face of about `side` pixels, tilted by `angle` degrees."""
    image = ASTRONAUT.rotate(angle, resample=Image.Resampling.BICUBIC)
    size = round(512 * side / FACE[2])
    return image.resize((size, size), Image.Resampling.LANCZOS)


def group(*sides):
    """The astronaut several times side by side, with faces of `sides` pixels."""
    parts, left = list(map(scaled, sides)), 0
    canvas = Image.new("RGB", (sum(part.width for part in parts), scaled(max(sides)).height), "gray")
    for part in parts:
        canvas.paste(part, (left, 0))
        left += part.width
    return canvas


def test_the_face_of_the_portrait(tmp_path):
    ASTRONAUT.save(tmp_path / "portrait.png")
    (face,) = find_faces(ASTRONAUT)
    assert np.abs(np.array(face.box) - FACE).max() <= 8
    assert np.isfinite(face.score) and type(face.score) is float and all(type(edge) is int for edge in face.box)
    assert find_faces(np.asarray(ASTRONAUT)) == find_faces(tmp_path / "portrait.png") == [face]
    assert len(find_faces(ASTRONAUT.convert("L"))) == 1


@pytest.mark.parametrize(("side", "angle"), [(98, -10), (98, 10), (40, 0), (400, 0)])
def test_tilted_heads_small_and_large_faces(side, angle):
    (face,) = find_faces(scaled(side, angle))
    assert face.width == pytest.approx(side, rel=0.2)


def test_a_group_is_found_largest_first():
    found = find_faces(group(60, 120, 80))
    assert [round(face.width / 20) for face in found] == [6, 4, 3]
    assert found[0].left > found[2].left and found[1].left > found[0].left  # not in the order of the image
    assert len(find_faces(group(50, 120), min_size=80)) == 1
    assert "at least 1" in refusal(find_faces, ASTRONAUT, min_size=0)


def test_no_face_is_an_empty_list():
    assert find_faces(open_faceless()) == []
    for size in ((1, 1), (20, 1), (5, 4000), (30, 30)):
        assert find_faces(Image.new("RGB", size)) == []


def test_large_images_are_searched_on_a_copy():
    wide = Image.new("RGB", (4000, 3000), "gray")
    wide.paste(scaled(60), (700, 900))
    assert find_faces(wide) == []  # 60 pixels of 4,000 are 19 of 1,280
    (face,) = find_faces(wide, min_size=50)
    assert face.width == pytest.approx(60, rel=0.2)


def write_yunet(path):
    """A file with YuNet's inputs and outputs whose "faces" are red cells of 32 pixels, boxed with 64 x 64."""
    onnx = pytest.importorskip("onnx", reason="needs onnx to build a detector")
    to_value, to_node, nodes, arrays, outputs = onnx.helper.make_tensor_value_info, onnx.helper.make_node, [], {}, []
    for stride in (8, 16, 32):
        red = np.full((1, 3, stride, stride), (stride == 32) * -10 / (255 * stride**2))
        red[0, 2] *= -1  # images come as BGR
        score = (red, [-9 * (stride == 32)])
        box = (np.zeros((4, 3, stride, stride)), [0.5, 0.5, np.log(2), np.log(2)])
        layers = {"cls": score, "obj": score, "bbox": box, "kps": (np.zeros((10, 3, stride, stride)), np.zeros(10))}
        for kind, (weight, bias) in layers.items():
            name, sides = f"{kind}_{stride}", [stride, stride]
            arrays |= {f"{name}.weight": np.float32(weight), f"{name}.bias": np.float32(bias)}
            arrays[f"{name}.shape"] = np.array([1, -1, len(weight)])
            inputs = ["input", f"{name}.weight", f"{name}.bias"]
            nodes.append(to_node("Conv", inputs, [f"{name}.cells"], kernel_shape=sides, strides=sides))
            nodes.append(to_node("Transpose", [f"{name}.cells"], [f"{name}.last"], perm=[0, 2, 3, 1]))
            nodes.append(to_node("Reshape", [f"{name}.last", f"{name}.shape"], [name]))
            outputs.append(to_value(name, onnx.TensorProto.FLOAT, [1, (640 // stride) ** 2, len(weight)]))
    image = to_value("input", onnx.TensorProto.FLOAT, [1, 3, 640, 640])
    weights = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = onnx.helper.make_graph(nodes, "yunet", [image], outputs, weights)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 11)], ir_version=7), str(path))
    return path


def test_yunet(predict, tmp_path):
    """The way to YuNet and back: colors, sizes, boxes in pixels of the image, scores, the row of the prediction."""

    def red_at(left, top, size=(640, 480), side=32):
        image = Image.new("RGB", size, "blue")
        image.paste("red", (left, top, left + side, top + side))
        return image

    net, image = write_yunet(tmp_path / "yunet.onnx"), red_at(160, 96)
    (face,) = find_faces(image, yunet=net)
    assert face.box == (144, 80, 64, 64) and face.detector == "yunet" and face.score == pytest.approx(1, abs=0.01)
    assert find_faces(red_at(0, 0, side=0), yunet=net) == find_faces(image, yunet=net, min_size=100) == []
    for image, box in (
        (red_at(640, 384, (2560, 1920), 64), (608, 352, 128, 128)),  # searched at half its size
        (red_at(0, 0, (600, 470)), (0, 0, 48, 48)),  # no multiple of 32; clipped at left and top
        (red_at(608, 448), (592, 432, 48, 48)),  # clipped at right and bottom
    ):
        assert [face.box for face in find_faces(image, yunet=net)] == [box]
    red_at(160, 96).save(tmp_path / "red.png")
    code, _, err = predict(tmp_path / "red.png", "--yunet", net, "--output", tmp_path / "p.csv")
    (row,) = rows_of(tmp_path / "p.csv")
    assert code == 0 and (row["face"], row["left"], row["top"], row["width"]) == ("1", "144", "80", "64"), err


def test_a_file_that_is_no_yunet_is_refused(checkpoint, photos, tmp_path):
    (tmp_path / "net.onnx").write_bytes(b"nothing")
    for path in (tmp_path / "net.onnx", tmp_path / "missing.onnx"):
        assert_refused(main, [photos, "--yunet", path, "--checkpoint", checkpoint], path)


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
    assert all(torch.allclose(a, b, atol=1e-6) for (_, a), (_, b) in zip(found, alone, strict=True))


def test_crops_are_square_and_centered_and_repeat_the_edge_beyond_the_image():
    crop = crop_face(ASTRONAUT, Face(100, 150, 60, 80, 1.0), margin=0.25)
    assert crop.dtype == np.uint8 and np.array_equal(crop, np.asarray(ASTRONAUT)[130:250, 70:190])
    (face,) = find_faces(ASTRONAUT)
    assert len(crop_face(ASTRONAUT, face)) == round(face.width * (1 + 2 * detector.MARGIN["haar"]))
    pixels = np.arange(100, dtype=np.uint8).reshape(10, 10)
    crop = crop_face(pixels, Face(0, 0, 4, 4, 1.0), margin=0.5)
    assert crop.shape == (8, 8, 3) and (crop[:3, :3] == pixels[0, 0]).all() and crop[-1, -1, 0] == pixels[5, 5]


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    group(60, 120).save(folder / "group.png")
    open_faceless().save(folder / "arms.png")
    draw_image(3).save(folder / "crop.png")
    ASTRONAUT.save(folder / "portrait.jpg", quality=95)
    return folder


def test_predict_faces_is_a_list(model):
    (result,), (face,) = predict_faces(model, ASTRONAUT, NAMES), find_faces(ASTRONAUT)
    expected = predict_image(model, crop_face(ASTRONAUT, face), NAMES)
    assert (result["box"], result["score"]) == (face.box, face.score)
    assert (result["emotion"], result["confidence"], result["probs"]) == expected
    assert predict_faces(model, open_faceless(), NAMES) == []


def test_every_face_gets_a_row(photos, predict, model, tmp_path):
    code, out, err = predict(photos, "--output", tmp_path / "p.csv", "--batch-size", 2)
    assert code == 0 and err.splitlines()[-1] == "4 images, 3 faces, 1 without a face"
    assert out.count("face 1 at") == 2 and out.count("no face found") == 1
    arms, crop, first, second, last = rows_of(tmp_path / "p.csv")
    names = [Path(row["file"]).name for row in (arms, crop, first, second, last)]
    assert names == ["arms.png", "crop.png", "group.png", "group.png", "portrait.jpg"]
    assert arms["emotion"] == arms["confidence"] == arms["left"] == arms["happy"] == ""
    assert crop["left"] == "" and crop["emotion"] == predict_image(model, photos / "crop.png", NAMES)[0]
    for row, result in zip((first, second), predict_faces(model, photos / "group.png", NAMES), strict=True):
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
    assert [row["emotion"] for row in rows] == [predict_image(model, row["file"], NAMES)[0] for row in rows]
    assert predict(photos / "crop.png", "--faces", "on", "--output", tmp_path / "p.csv")[:2] == (0, "No face found\n")
    assert rows_of(tmp_path / "p.csv")[0]["face"] == "none"


def test_a_single_photo_is_a_block_per_face(photos, predict):
    code, out, err = predict(photos / "group.png", "--show-all")
    assert (code, err) == (0, "")
    assert out.count("Predicted Emotion: ") == 2 and out.index("Face 1 at") < out.index("Face 2 at")
    assert predict(photos / "group.png", "--min-face", 90)[1].count("Predicted") == 1


def write_opencv(monkeypatch, folder, code):
    """A module of this code is what `import cv2` finds."""
    (folder / "cv2.py").write_text(code)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "cv2")


@pytest.fixture
def without_opencv(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    detector.load_opencv.cache_clear()
    detector.opencv_problem.cache_clear()
    yield
    detector.load_opencv.cache_clear()
    detector.opencv_problem.cache_clear()


@pytest.mark.parametrize("code", ["x = 1", "raise OSError('libGL.so.1')", "raise ImportError()"])
def test_opencv_that_is_broken(tmp_path, monkeypatch, code):
    write_opencv(monkeypatch, tmp_path, code)
    assert "opencv-python-headless" in refusal(detector.load_opencv.__wrapped__)  # which keeps no result


def test_whole_images_with_one_hint_that_crops_do_not_need(without_opencv, photos, predict, tmp_path):
    code, out, err = predict(photos, "--output", tmp_path / "p.csv")
    assert code == 0 and err.count("pip install") == err.count("opencv-python-headless") == 1, err
    assert {row["face"] for row in rows_of(tmp_path / "p.csv")} == {"whole"}
    assert out.count("whole image") == 3  # the crop would have been taken whole anyway
    assert predict(photos / "crop.png")[::2] == (0, "")


@pytest.mark.parametrize("words", ["arms.png --faces on", "arms.png --yunet net.onnx", "clip.mp4"])
def test_what_needs_opencv_tells_how_to_install_it(without_opencv, checkpoint, photos, monkeypatch, words):
    monkeypatch.chdir(photos)
    Path("clip.mp4").touch()
    assert_refused(main, [*words.split(), "--checkpoint", checkpoint], "pip install")


def test_a_thread_waits_until_another_has_imported_opencv(tmp_path, monkeypatch):
    """OpenCV stands half loaded under its name while it imports its compiled part."""
    (tmp_path / detector.CASCADE).touch()
    code = f"""
import sys, time, types
whole, sys.modules["cv2"] = sys.modules["cv2"], types.ModuleType("cv2")
time.sleep(1)
data, CascadeClassifier = types.SimpleNamespace(haarcascades={f"{tmp_path}/"!r}), None
sys.modules["cv2"] = whole
"""
    write_opencv(monkeypatch, tmp_path, code)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(detector.load_opencv.__wrapped__)
        while not first.done() and hasattr(sys.modules.get("cv2", pytest), "__file__"):
            time.sleep(0.01)
        assert detector.load_opencv.__wrapped__() is first.result()
