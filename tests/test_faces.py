"""Faces in photos: found, cropped as FER2013 is, predicted, annotated; and what happens without OpenCV.

The real face is that of examples/astronaut.jpg, a public-domain portrait; group photos are built from it.
"""

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_refused, draw_image, open_faceless, open_portrait
from PIL import Image
from test_predict import MAIN, NAMES, REPO, SCRIPT, rows_of, run_main, run_python, write_checkpoint

from errors import InputError
from faces import detector
from faces.detector import Face, crop_face, find_faces
from faces.overlay import Targets, draw_faces
from inference import classify, classify_on_cores, make_finder
from predict_emotion import load_model, predict_faces, predict_image

cv2 = pytest.importorskip("cv2", reason="needs OpenCV")
FACE = (176, 65, 98, 98)  # of the portrait, as the cascade frames it: left, top, width, height


@pytest.fixture(scope="module")
def portrait():
    return open_portrait()


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """(checkpoint, model, class names)"""
    path = write_checkpoint(tmp_path_factory.mktemp("model") / "model.pth")
    return (path, *load_model(path, "cpu"))


@pytest.fixture
def run(loaded):
    return lambda *args: run_main(MAIN, *args, "--checkpoint", loaded[0])


def scaled(image, side, angle=0):
    """The portrait with a face of about `side` pixels, tilted by `angle` degrees."""
    image = image.rotate(angle, resample=Image.Resampling.BICUBIC)
    size = round(512 * side / FACE[2])
    return image.resize((size, size), Image.Resampling.LANCZOS)


def group(image, sides):
    """The portrait several times side by side, with faces of `sides` pixels."""
    parts = [scaled(image, side) for side in sides]
    canvas = Image.new("RGB", (sum(part.width + 10 for part in parts), max(part.height for part in parts)), "gray")
    left = 0
    for part in parts:
        canvas.paste(part, (left, 0))
        left += part.width + 10
    return canvas


# Finding


def test_the_face_of_the_portrait(portrait, tmp_path):
    portrait.save(tmp_path / "portrait.png")
    pixels = np.asarray(portrait)
    (face,) = find_faces(portrait)
    assert np.abs(np.array(face.box) - FACE).max() <= 8
    assert np.isfinite(face.score) and type(face.score) is float and all(type(edge) is int for edge in face.box)
    assert find_faces(pixels) == find_faces(tmp_path / "portrait.png") == [face]
    assert len(find_faces(portrait.convert("L"))) == 1


def test_tilted_heads_small_and_large_faces(portrait):
    for side, angle in [(98, -10), (98, -5), (98, 5), (98, 10), (40, 0), (48, 0), (60, 0), (200, 0), (400, 0)]:
        (face,) = find_faces(scaled(portrait, side, angle))
        assert face.width == pytest.approx(side, rel=0.2), (side, angle)


def test_a_group_is_found_largest_first(portrait):
    image = group(portrait, (60, 120, 80))
    found = find_faces(image)
    assert [round(face.width / 20) for face in found] == [6, 4, 3]
    assert found[0].left > found[2].left and found[1].left > found[0].left  # not in the order of the image
    assert len(find_faces(group(portrait, (50, 120)), min_size=80)) == 1
    with pytest.raises(InputError, match="at least 1"):
        find_faces(image, min_size=0)


def test_no_face_is_an_empty_list():
    assert find_faces(open_faceless()) == find_faces(np.zeros((300, 400), np.uint8)) == []
    for size in ((1, 1), (20, 1), (5, 400), (30, 30)):
        assert find_faces(Image.new("RGB", size)) == []


def test_boxes_are_clipped_to_the_image(portrait):
    left, top, width, height = FACE
    cut = portrait.crop((left + 6, top + 6, left + width - 4, 512))
    padded = Image.new("RGB", (cut.width + 200, cut.height), "gray")
    padded.paste(cut, (0, 0))
    assert find_faces(padded, min_size=40)
    for image in (padded, cut):
        for face in find_faces(image, min_size=40):
            assert 0 <= face.left < face.left + face.width <= image.width
            assert 0 <= face.top < face.top + face.height <= image.height
    face = detector._to_face(np.array([-5, -7, 50, 60]), 1.0, (0.5, 0.5), (80, 90), "haar")
    assert face.box == (0, 0, 80, 90)


def test_large_images_are_searched_on_a_copy(portrait):
    large = scaled(portrait, 800)
    assert max(large.size) > 4000
    (face,) = find_faces(large)
    assert face.width == pytest.approx(800, rel=0.15)
    wide = Image.new("RGB", (4000, 3000), "gray")
    wide.paste(scaled(portrait, 60), (700, 900))
    assert find_faces(wide) == []  # 60 pixels of 4,000 are 19 of 1,280
    (face,) = find_faces(wide, min_size=50)
    assert face.width == pytest.approx(60, rel=0.2)


def test_unreadable_images_raise(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"broken\.jpg"):
        find_faces(tmp_path / "broken.jpg")


def write_yunet(path):
    """A file with YuNet's inputs and outputs whose "faces" are red cells of 32 pixels, boxed with 64 x 64."""
    onnx = pytest.importorskip("onnx", reason="needs onnx to build a detector")
    helper, nodes, weights, outputs = onnx.helper, [], [], []

    def add(kind, inputs, output, **attributes):
        nodes.append(helper.make_node(kind, inputs, [output], **attributes))

    def convolve(name, weight, bias, stride):
        for part, array in (("weight", weight), ("bias", bias)):
            weights.append(onnx.numpy_helper.from_array(np.asarray(array, np.float32), f"{name}.{part}"))
        inputs = ["input", f"{name}.weight", f"{name}.bias"]
        add("Conv", inputs, f"{name}.cells", kernel_shape=[stride, stride], strides=[stride, stride])

    for stride in (8, 16, 32):
        red = np.zeros((1, 3, stride, stride))
        red[0, 2] = (stride == 32) * 10 / (255 * stride**2)  # images come as BGR
        red[0, :2] = -red[0, 2]
        values = {"cls": (red, [-9.0 * (stride == 32)]), "obj": (red, [-9.0 * (stride == 32)])}
        values["bbox"] = (np.zeros((4, 3, stride, stride)), [0.5, 0.5, np.log(2), np.log(2)])
        values["kps"] = (np.zeros((10, 3, stride, stride)), np.zeros(10))
        for kind, (weight, bias) in values.items():
            name = f"{kind}_{stride}"
            convolve(name, weight, bias, stride)
            add("Clip" if kind in ("cls", "obj") else "Identity", [f"{name}.cells"], f"{name}.clipped")
            add("Transpose", [f"{name}.clipped"], f"{name}.last", perm=[0, 2, 3, 1])
            weights.append(onnx.numpy_helper.from_array(np.array([1, -1, len(weight)]), f"{name}.shape"))
            add("Reshape", [f"{name}.last", f"{name}.shape"], name)
            shape = [1, (640 // stride) ** 2, len(weight)]
            outputs.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))
    image = helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, [1, 3, 640, 640])
    graph = helper.make_graph(nodes, "yunet", [image], outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=7), str(path))
    return path


def test_yunet(run, tmp_path):
    """The way to YuNet and back: colors, sizes, boxes in pixels of the image, scores, the row of the prediction."""
    net = write_yunet(tmp_path / "yunet.onnx")
    image = Image.new("RGB", (640, 480), "blue")
    image.paste("red", (160, 96, 192, 128))
    (face,) = find_faces(image, yunet=net)
    assert face.box == (144, 80, 64, 64) and face.detector == "yunet" and face.score == pytest.approx(1, abs=0.01)
    assert find_faces(Image.new("RGB", (640, 480), "blue"), yunet=net) == []
    assert find_faces(image, yunet=net, min_size=100) == []
    large = image.resize((2560, 1920), Image.Resampling.NEAREST)  # searched at half its size
    large.paste("blue", (0, 0, 2560, 1920))
    large.paste("red", (640, 384, 704, 448))
    (face,) = find_faces(large, yunet=net)
    assert face.box == (608, 352, 128, 128)
    edge = Image.new("RGB", (600, 470), "blue")  # no multiple of 32
    edge.paste("red", (0, 0, 32, 32))
    (face,) = find_faces(edge, yunet=net)
    assert face.box == (0, 0, 48, 48)
    image.save(tmp_path / "red.png")
    code, out, err = run(tmp_path / "red.png", "--yunet", net, "--output", tmp_path / "p.csv")
    (row,) = rows_of(tmp_path / "p.csv")
    assert code == 0 and (row["face"], row["left"], row["top"], row["width"]) == ("1", "144", "80", "64"), err


def test_a_file_that_is_no_yunet_is_refused(portrait, photos, loaded, tmp_path):
    (tmp_path / "net.onnx").write_bytes(b"nothing")
    for path in (tmp_path / "net.onnx", tmp_path / "missing.onnx"):
        with pytest.raises(InputError, match=path.name):
            find_faces(portrait, yunet=path)
        assert_refused(MAIN, [photos, "--yunet", path, "--checkpoint", loaded[0]], path)


def test_threads_find_what_one_finds(portrait, tmp_path, loaded):
    (tmp_path / "many").mkdir()
    for number in range(6):
        group(portrait, (50 + 5 * number, 100)).save(tmp_path / "many" / f"{number}.png")
    paths = sorted(map(str, (tmp_path / "many").iterdir()))
    model, finder = loaded[1], make_finder(loaded[1].info.input_spec, "on")
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        together = list(classify_on_cores(model, paths, finder, 4, pytest.fail))
    finally:
        torch.set_num_threads(threads)
    alone = [result for path in paths for result in classify(model, [path], finder)]
    assert [view for view, _ in together] == [view for view, _ in alone] and len(alone) == 12
    assert all(torch.allclose(a, b, atol=1e-6) for (_, a), (_, b) in zip(together, alone, strict=True))


# Cropping


def test_crops_are_square_and_centered(portrait):
    crop = crop_face(portrait, Face(100, 150, 60, 80, 1.0), margin=0.25)
    assert crop.shape == (120, 120, 3) and crop.dtype == np.uint8
    assert np.array_equal(crop, np.asarray(portrait)[130:250, 70:190])
    (face,) = find_faces(portrait)
    assert len(crop_face(portrait, face)) == round(face.width * (1 + 2 * detector.MARGIN["haar"]))


def test_crops_beyond_the_image_repeat_its_edge():
    pixels = np.arange(100, dtype=np.uint8).reshape(10, 10)
    crop = crop_face(pixels, Face(0, 0, 4, 4, 1.0), margin=0.5)
    assert crop.shape == (8, 8, 3)
    assert (crop[:3, :3] == pixels[0, 0]).all() and crop[-1, -1, 0] == pixels[5, 5]


# Predicting


def test_predict_faces_is_a_list(portrait, loaded):
    _, model, names = loaded
    (result,) = predict_faces(model, portrait, names)
    (face,) = find_faces(portrait)
    expected = predict_image(model, crop_face(portrait, face), names)
    assert (result["box"], result["score"]) == (face.box, face.score)
    assert (result["emotion"], result["confidence"]) == expected[:2] and result["probs"] == expected[2]
    assert predict_faces(model, open_faceless(), names) == []
    several = predict_faces(model, group(portrait, (60, 120, 80)), names)
    assert [round(result["box"][2] / 20) for result in several] == [6, 4, 3]


@pytest.fixture
def photos(portrait, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    group(portrait, (60, 120)).save(folder / "group.png")
    open_faceless().save(folder / "arms.png")
    draw_image(3).save(folder / "crop.png")
    portrait.save(folder / "portrait.jpg", quality=95)
    return folder


def test_every_face_gets_a_row(photos, run, loaded, tmp_path):
    code, out, err = run(photos, "--output", tmp_path / "p.csv", "--batch-size", 2)
    assert code == 0
    assert err.splitlines()[-1] == "4 images, 3 faces, 1 without a face"
    rows = rows_of(tmp_path / "p.csv")
    assert [(Path(row["file"]).name, row["face"]) for row in rows] == [
        ("arms.png", "none"),
        ("crop.png", "whole"),
        ("group.png", "1"),
        ("group.png", "2"),
        ("portrait.jpg", "1"),
    ]
    arms, crop, first, second, _ = rows
    assert arms["emotion"] == arms["confidence"] == arms["left"] == arms["happy"] == ""
    assert crop["left"] == "" and crop["emotion"] == predict_image(loaded[1], photos / "crop.png", NAMES)[0]
    assert int(first["width"]) > int(second["width"]) > 0 and float(first["score"])
    (one, two) = predict_faces(loaded[1], photos / "group.png", NAMES)
    for row, result in ((first, one), (second, two)):
        assert tuple(int(row[name]) for name in ("left", "top", "width", "height")) == result["box"]
        assert row["emotion"] == result["emotion"]
        assert float(row["confidence"]) == pytest.approx(result["confidence"], abs=1e-3)
    assert out.count("face 1 at") == 2 and out.count("no face found") == 1
    assert run(photos, "--output", tmp_path / "p.json")[0] == 0
    listed = rows_of(tmp_path / "p.json")
    assert [row["face"] for row in listed] == ["none", "whole", 1, 2, 1] and listed[0]["emotion"] is None


def test_faces_off_and_on(photos, run, loaded, tmp_path):
    code, out, err = run(photos, "--faces", "off", "--output", tmp_path / "p.csv")
    assert code == 0 and err.splitlines()[-1] == "4 images"
    rows = rows_of(tmp_path / "p.csv")
    assert {row["face"] for row in rows} == {"whole"} and out.count("whole image") == 4
    assert [row["emotion"] for row in rows] == [predict_image(loaded[1], row["file"], NAMES)[0] for row in rows]
    assert run(photos / "crop.png", "--faces", "on", "--output", tmp_path / "p.csv")[:2] == (0, "No face found\n")
    assert rows_of(tmp_path / "p.csv")[0]["face"] == "none"


def test_a_single_photo_is_a_block_per_face(photos, run):
    code, out, err = run(photos / "group.png", "--show-all")
    assert (code, err) == (0, "")
    assert out.count("Predicted Emotion: ") == 2 and out.index("Face 1 at") < out.index("Face 2 at")
    assert run(photos / "group.png", "--min-face", 90)[1].count("Predicted") == 1


# Annotated images


def test_annotated_images(photos, run, tmp_path):
    (photos / "again").mkdir()
    shutil.copy(photos / "arms.png", photos / "again" / "arms.png")
    before = {path: path.read_bytes() for path in photos.rglob("*") if path.is_file()}
    assert run(photos, "--annotate", tmp_path / "out")[0] == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "arms.faces.jpg",
        "arms-2.faces.jpg",
        "crop.faces.jpg",
        "group.faces.jpg",
        "portrait.faces.jpg",
    }
    assert {path: path.read_bytes() for path in before} == before
    with Image.open(tmp_path / "out" / "portrait.faces.jpg") as image, Image.open(photos / "portrait.jpg") as original:
        changed = np.abs(np.asarray(image.resize((512, 512)), int) - np.asarray(original, int)).max(2) > 60
    left, top, width, height = FACE
    assert changed[top - 30 : top + height, left : left + width].mean() > 0.05
    assert changed[400:, :].mean() < 0.01  # away from the face nothing is drawn


@pytest.mark.parametrize("size", [(48, 48), (300, 200), (4000, 3000)])
def test_labels_are_readable_at_any_size(size):
    """Letters of 13 pixels or more on what is written, and of a ninetieth of its longer side: faces may be small."""
    pixels = np.full((size[1], size[0], 3), 128, np.uint8)
    probs = {"angry": 1.5, "happy": 97.5, "sad": 1.0}
    side = min(60, size[0] // 2)
    face = Face(size[0] // 3, size[1] // 3, side, side, 1.0)
    for results in ([(face, ("happy", 97.5, probs))], [(None, ("happy", 97.5, probs))], [(None, None)]):
        image = np.asarray(draw_faces(pixels, results))
        assert max(image.shape[:2]) >= max(size[0], 120)
        assert image.shape[1] / image.shape[0] == pytest.approx(size[0] / size[1], rel=0.02)
        label = (image == (255, 208, 0)).all(2)
        rows = np.flatnonzero(label.sum(1) > 40)
        assert rows.max() - rows.min() >= max(13, max(image.shape[:2]) / 90)
        assert ((image.max(2) < 60) & np.roll(label, 3, 1)).any()  # letters


def test_bars_don_t_cover_faces():
    pixels = np.full((400, 300, 3), 128, np.uint8)
    probs = {"angry": 50.0, "happy": 50.0}
    next_to_each_other = [(Face(0, 50, 150, 150, 1.0), ("angry", 50.0, probs)), (Face(150, 50, 150, 150, 1.0), None)]
    image = np.asarray(draw_faces(pixels, next_to_each_other))
    assert (image[56:194, 156:294] == 128).all()


def test_targets_are_all_different_and_never_an_input(tmp_path):
    inputs = [tmp_path / "a" / "clip.mp4", tmp_path / "b" / "Clip.mp4", tmp_path / "out" / "x.faces.jpg"]
    targets = Targets(tmp_path / "out", list(map(str, inputs)))
    endings = [".faces.mp4", ".faces.mp4", ".faces.jpg"]
    names = [targets(path, ending).name for path, ending in zip(inputs, endings, strict=True)]
    assert names == ["clip.faces.mp4", "Clip-2.faces.mp4", "x.faces.faces.jpg"]
    assert targets("x.jpg", ".faces.jpg").name == "x-2.faces.jpg"


# Without OpenCV


def run_without_opencv(folder, *args):
    """Runs the script where `import cv2` fails."""
    (folder / "modules").mkdir(exist_ok=True)
    (folder / "modules" / "cv2.py").write_text("raise ImportError('No module named cv2')")
    return run_python(SCRIPT, *args, cwd=folder, PYTHONPATH=str(folder / "modules"))


@pytest.mark.parametrize("module", ["x = 1", "raise OSError('libGL.so.1')", "raise ImportError()"])
def test_opencv_that_is_broken(tmp_path, monkeypatch, module):
    (tmp_path / "cv2.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cv2")
    with pytest.raises(InputError, match="pip install.*opencv-python-headless"):
        detector.load_opencv.__wrapped__()  # which keeps no result


def test_whole_images_with_one_hint_that_crops_do_not_need(photos, loaded, tmp_path):
    words = ("--checkpoint", loaded[0], "--output", tmp_path / "p.csv")
    code, out, err = run_without_opencv(tmp_path, photos, *words)
    assert code == 0 and err.count("pip install") == err.count("opencv-python-headless") == 1, err
    assert {row["face"] for row in rows_of(tmp_path / "p.csv")} == {"whole"}
    assert out.count("whole image") == 3  # the crop would have been taken whole anyway
    code, _, err = run_without_opencv(tmp_path, photos / "crop.png", *words[:2])
    assert (code, err) == (0, "")


@pytest.mark.parametrize("words", [("--faces", "on"), ("--yunet", "net.onnx")])
def test_faces_on_without_opencv_is_an_error(photos, loaded, tmp_path, words):
    assert_refused(tmp_path, [photos, "--checkpoint", loaded[0], *words], "pip install", run=run_without_opencv)


def test_a_thread_waits_until_another_has_imported_opencv(tmp_path):
    """OpenCV stands half loaded under its name while it imports its compiled part."""
    (tmp_path / detector.CASCADE).touch()
    (tmp_path / "cv2.py").write_text(f"""if True:
        import sys, time, types
        whole = sys.modules.pop(__name__)
        sys.modules[__name__] = types.ModuleType(__name__)
        time.sleep(5)
        data, CascadeClassifier = types.SimpleNamespace(haarcascades={str(tmp_path) + os.sep!r}), None
        sys.modules[__name__] = whole
    """)
    code = """if True:
        import sys, threading
        from faces.detector import opencv_problem

        first = threading.Thread(target=opencv_problem)
        first.start()
        while first.is_alive() and ("cv2" not in sys.modules or hasattr(sys.modules["cv2"], "__file__")):
            pass
        print(opencv_problem())
    """
    assert run_python("-c", code, PYTHONPATH=os.pathsep.join([str(tmp_path), str(REPO)])) == (0, "None\n", "")
