"""predict_emotion.py: the import API, the command line, and that prediction sees what training saw."""

import copy
import csv
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO, assert_refused, draw_folder, draw_image, refusal, run, run_process
from PIL import Image

import inference
from checkpoints import BEST_NAME, make_checkpoint, read_checkpoint, save_checkpoint
from console import run_script
from data import SAMPLE_SET, FolderImages
from engine.augment import Strengths, augment
from inference import BUNDLED
from models import count_parameters, create_model, last_layer
from predict_emotion import TableWriter, format_bars, load_model, main, predict_image, predict_images
from preprocessing import read_image, to_input

NAMES = ["angry", "happy", "sad"]
COLUMNS = ["file", "time", "face", "left", "top", "width", "height", "score", "emotion", "confidence", *NAMES]


def write_checkpoint(path, *, arch="cnn4_bn", names=NAMES, image_size=None, gray=False, **info):
    """A checkpoint of an untrained model whose predictions differ clearly from image to image."""
    torch.manual_seed(0)
    model = create_model(arch, len(names), image_size=image_size)
    with torch.no_grad():
        last_layer(model).weight.mul_(40)
    spec = replace(model.info.input_spec, gray=gray)
    model.info = replace(model.info, class_names=names, input_spec=spec, **{"trained_on": "faces", **info})
    config = {"epochs": 4, "data_dir": "/home/me/faces"}
    save_checkpoint(make_checkpoint(model, epoch=3, metrics={"val_acc": 0.875}, config=config), path)
    return path


def rows_of(path):
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return json.load(file) if path.suffix == ".json" else list(csv.DictReader(file))


def values(prediction):
    return np.array(list(prediction[2].values())) / 100


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_model(checkpoint, device="cpu")[0]


@pytest.fixture
def predict(checkpoint):
    return partial(run, main, "--checkpoint", checkpoint)


@pytest.fixture
def photo(tmp_path):
    draw_image(5, 100, "RGB").resize((100, 75)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_prediction_is_a_class_its_confidence_and_all_probabilities(model, photo):
    emotion, confidence, all_probs = predict_image(model, photo, NAMES)
    assert list(all_probs) == NAMES and {type(value) for value in all_probs.values()} == {float}
    assert sum(all_probs.values()) == pytest.approx(100, abs=1e-3)
    assert all_probs[emotion] == confidence == max(all_probs.values()) > 34
    renamed = predict_image(model, photo, ["c", "b", "a"])[2]
    assert list(renamed.items()) == list(zip("cba", all_probs.values(), strict=True))


def draw_kinds(folder):
    """Images of every kind that people have, as files in one class folder; their sorted paths."""
    folder.mkdir(parents=True)
    base, exif = draw_image(9, 96, "RGB"), Image.Exif()
    exif[0x0112] = 6  # to be turned
    base.resize((64, 48)).save(folder / "turned.jpg", exif=exif)
    base.resize((200, 77)).save(folder / "wide.png")
    base.resize((20, 31)).save(folder / "small.bmp")
    modes = {"P": "palette.gif", "CMYK": "cmyk.jpg", "L": "gray.webp", "1": "bits.tiff"}
    for mode, name in modes.items():
        base.convert(mode).save(folder / name)
    Image.fromarray(np.asarray(base.convert("L")).astype(np.uint16) * 257).save(folder / "deep.png")
    Image.merge("RGBA", [*base.split(), base.convert("L")]).save(folder / "alpha.png")
    return sorted(folder.iterdir())


@pytest.mark.parametrize(("arch", "gray"), [("cnn4_bn", False), ("cnn6_rgb", False), ("cnn6_rgb", True)])
def test_training_and_prediction_see_the_same_tensors(tmp_path, arch, gray):
    model, _ = load_model(write_checkpoint(tmp_path / "m.pth", arch=arch, gray=gray), device="cpu")
    paths, spec = draw_kinds(tmp_path / "images" / "angry"), model.info.input_spec
    data = FolderImages(tmp_path / "images", spec)
    assert data.paths == [str(path) for path in paths] and not data.unreadable
    images = torch.from_numpy(np.array(data.images))
    measured, trained = to_input(images, spec), augment(images, spec, Strengths(), torch.Generator())
    seen = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    for path in paths:
        predict_image(model, str(path), NAMES)
    predicted = torch.cat(seen)
    assert predicted.shape == (len(paths), spec.channels, 48, 48)
    assert torch.equal(predicted, measured.expand_as(predicted)) and torch.equal(predicted, trained)
    assert len({image.numpy().tobytes() for image in predicted}) > 5  # the kinds do differ


def test_one_equals_many(model, tmp_path):
    paths = sorted(draw_folder(tmp_path, {"a": 7}).glob("*/*"))
    single = [predict_image(model, path, NAMES) for path in paths]
    for batch_size in (1, 3, 64):
        many = predict_images(model, iter(paths), NAMES, batch_size=batch_size)
        assert [prediction[0] for prediction in many] == [prediction[0] for prediction in single]
        np.testing.assert_allclose([*map(values, many)], [*map(values, single)], atol=1e-5)
    assert predict_images(model, [], NAMES) == []
    assert len({prediction[1] for prediction in single}) == 7


def test_temperature_of_the_checkpoint_is_applied(model, photo, tmp_path):
    expected = values(predict_image(model, photo, NAMES)) ** (1 / 2.5)
    soft, _ = load_model(write_checkpoint(tmp_path / "soft.pth", temperature=2.5), device="cpu")
    np.testing.assert_allclose(values(predict_image(soft, photo, NAMES)), expected / expected.sum(), atol=1e-5)


def test_what_the_functions_refuse(model, photo, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    assert str(broken) in refusal(predict_images, model, [photo, broken, photo], NAMES)
    assert "3 classes, but class_names has 2" in refusal(predict_image, model, photo, ["a", "b"])
    for image in (str(photo), photo, np.zeros((48, 48), np.uint8), Image.new("L", (48, 48))):
        assert refusal(predict_images, model, image, NAMES).endswith("call predict_image")
    for size in (0, -1):
        assert "batch_size" in refusal(predict_images, model, [photo], NAMES, batch_size=size)
    large = copy.deepcopy(model)
    for value in large.parameters():  # finite, but sums of them are not
        value.data.fill_(1e38)
    assert "NaN" in refusal(predict_image, large, photo, NAMES)


def test_the_bundled_model_is_the_last_resort(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(inference, "BUNDLED", tmp_path / "bundled.pth")
    assert_refused(main, ["--info"], BEST_NAME, "--checkpoint")
    write_checkpoint(tmp_path / "bundled.pth", names=["one", "two"])
    code, out, err = run(main, "--info")
    assert (code, err) == (0, f"using {tmp_path / 'bundled.pth'}\n") and "one, two" in out


def test_the_model_in_this_repository():
    """It is of the default arch, small, of known bytes, and tells nothing of the machine that trained it."""
    from train_emotion_cnn import DEFAULT_ARCH

    content, checkpoint = BUNDLED.read_bytes(), read_checkpoint(BUNDLED)
    assert hashlib.sha256(content).hexdigest() in BUNDLED.with_name("README.md").read_text(encoding="utf-8")
    assert len(content) <= 12e6 and b"/tmp/" not in content and b"/home/" not in content
    model, class_names = load_model(BUNDLED, device="cpu")
    assert class_names == ["angry", "disgust", "fear", "happy", "neutral", "sad", "surprise"]
    assert model.info.arch == DEFAULT_ARCH and count_parameters(model) <= 2.9e6
    assert checkpoint["config"]["seed"] == 0 and checkpoint["temperature"] != 1.0


def test_torch_hub_loads_the_bundled_model_and_others(checkpoint, photo):
    for path, options in ((BUNDLED, {}), (checkpoint, {"checkpoint": str(checkpoint), "device": "cpu"})):
        model = torch.hub.load(str(REPO), "emotion_model", source="local", **options)
        expected, names = load_model(path)
        assert not model.training and model.info == expected.info
        assert predict_image(model, photo, names) == predict_image(expected, photo, names)


@pytest.mark.parametrize(("trained_on", "notes"), [(SAMPLE_SET, 1), ("drawings of mine", 0)])
def test_a_model_of_the_sample_set_is_named(predict, photo, tmp_path, trained_on, notes):
    code, _, err = predict(photo, "--checkpoint", write_checkpoint(tmp_path / "m.pth", trained_on=trained_on))
    assert (code, err.count("\n"), err.count("sample set of drawings")) == (0, notes, notes)


def test_a_model_of_drawings_is_skipped_for_photos(checkpoint, photo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(inference, "BUNDLED", checkpoint)
    write_checkpoint(Path(BEST_NAME), trained_on=SAMPLE_SET)
    draw_image(1).save("drawing_1.png")
    for words in ("photo.png", "photo.png drawing_1.png"):
        assert run(main, *words.split())[2].startswith(f"using {checkpoint}, since {BEST_NAME} was trained on drawings")
    for words in ("drawing_1.png", "--info", "drawing_1.png --info"):
        assert run(main, *words.split())[2].startswith(f"using {BEST_NAME}\n")
    assert "since" not in run(main, "photo.png", "--checkpoint", BEST_NAME)[2]
    assert load_model()[0].info.trained_on == "faces"


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
def test_a_table_is_written_whole_though_its_reader_has_gone(checkpoint, tmp_path):
    draw_folder(tmp_path, {"images": 30})
    words = f"-u {REPO}/predict_emotion.py images --checkpoint {checkpoint} --output p.csv"
    done = subprocess.run(["bash", "-c", f"{sys.executable} {words} | head -1"], cwd=tmp_path, capture_output=True)
    assert done.stdout.count(b"\n") == 1 and b"Traceback" not in done.stderr
    assert len(rows_of(tmp_path / "p.csv")) == 30


def test_weights_of_another_tool_load_if_they_are_named(model, checkpoint, photo, tmp_path):
    other = tmp_path / "other.pth"
    torch.save({"model": model.state_dict(), "class_to_idx": {"angry": 0, "happy": 1, "sad": 2}}, other)
    assert_refused(main, [photo, "--checkpoint", other], "other.pth", "--weights")
    loaded, names = load_model(other, arch="cnn4_bn", class_names=NAMES)
    assert names == NAMES and predict_image(loaded, photo, names) == predict_image(model, photo, names)
    assert "go together" in refusal(load_model, other, arch="cnn4_bn")
    assert "cnn4" in refusal(load_model, other, arch="cnn4", class_names=NAMES)
    assert "its own arch" in refusal(load_model, checkpoint, arch="cnn4_bn", class_names=NAMES)


def block(prediction):
    emotion, confidence, _ = prediction
    return f"{'=' * 50}\nPredicted Emotion: {emotion.upper()}\nConfidence: {confidence:.2f}%\n{'=' * 50}\n"


def test_output_for_one_image(predict, model, photo):
    prediction = predict_image(model, photo, NAMES)
    assert predict(photo) == (0, block(prediction), "")
    bars = "".join(line + "\n" for line in format_bars(prediction[2]))
    assert predict(photo, "--show-all") == (0, f"{block(prediction)}\nAll emotion probabilities:\n{bars}", "")


def test_bars_look_as_they_always_did():
    probs = {"angry": 1.23, "disgust": 0.87, "happy": 92.45, "surprise": 5.45}
    lines = ["angry     :  1.23% █", "disgust   :  0.87% █", "happy     : 92.45% " + "█" * 47, "surprise  :  5.45% ███"]
    assert format_bars(probs) == lines
    assert format_bars({"a": 100.0, "b": 0.0}) == ["a         : 100.00% " + "█" * 50, "b         :  0.00%"]


def test_the_script_itself(checkpoint, model, photo, tmp_path):
    """In a folder with spaces and letters that ASCII lacks; then on a terminal that cannot show them."""
    folder = tmp_path / "schöne Bilder"
    folder.mkdir()
    shutil.copy(checkpoint, folder / BEST_NAME)
    shutil.copy(photo, folder / "Müller 1.png")
    prediction = predict_image(model, photo, NAMES)
    code, out, err = run_process(main, "Müller 1.png", "--show-all", cwd=folder)
    assert (code, err) == (0, f"using {BEST_NAME}\n")
    assert out.startswith(block(prediction)) and out.count("█") >= 50
    words = ["--checkpoint", str(checkpoint), "--show-all", str(photo), str(folder / "Müller 1.png")]
    with redirect_stdout(io.TextIOWrapper(io.BytesIO(), "ascii")) as terminal, pytest.raises(SystemExit, match="0"):
        run_script(lambda: main(words))
    terminal.flush()
    assert terminal.buffer.getvalue().count(b"M?ller 1.png: ") == 1


def predicted_lines(out):
    return {line.rpartition(": ")[0]: line.rpartition(": ")[2].split()[0] for line in out.splitlines()}


def test_folders_patterns_and_several_files(predict, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw_folder("images", {"a": 3, "b": 2})
    Path("images", "notes.txt").write_text("no image")
    shutil.copy("images/b/b_000.png", "images/b/odd[1].png")
    paths = sorted(map(str, Path("images").glob("*/*.png")))
    expected = dict(zip(paths, (p[0] for p in predict_images(model, paths, NAMES)), strict=True))
    code, out, err = predict("images")
    assert (code, predicted_lines(out), err) == (0, expected, "not read: 1 .txt\n6 images\n")
    several = [str(Path("images", "a", "a_001.png")), str(Path("images", "b", "odd[1].png"))]
    for inputs, found in (["images/**/*.png"], paths), (["images/*/a_*.png"], paths[:3]), (several, several):
        assert predicted_lines(predict(*inputs)[1]) == {path: expected[path] for path in found}
    assert predict(several[1])[1].startswith("=" * 50)
    assert predict("images", *several)[2].endswith("\n6 images\n")  # named twice, predicted once
    code, out, _ = predict("images", "--show-all", "--batch-size", "2")
    assert code == 0 and out.count("%") == 6 * (1 + len(NAMES))


def test_unreadable_images_among_good_ones_and_alone(predict, checkpoint, photo, tmp_path):
    (tmp_path / "bad").mkdir()
    for name in ("one.jpg", "two.jpg"):
        (tmp_path / "bad" / name).write_bytes(b"no image")
    one, table = tmp_path / "bad" / "one.jpg", tmp_path / "p.csv"
    assert_refused(main, [one, "--checkpoint", checkpoint], one)
    code, out, err = predict(tmp_path / "bad", "--output", table)
    assert (code, out) == (2, "") and "two.jpg" in err and "p.csv was not written" in err and not table.exists()
    code, out, err = predict(photo, one, photo, "--output", table)
    assert code == 0 and list(predicted_lines(out)) == [str(photo)] and len(rows_of(table)) == 1
    assert str(one) in err and "1 image, 1 could not be read" in err


def test_one_odd_image_does_not_end_annotation(predict, tmp_path, monkeypatch):
    """Nor are the copies inputs of the next run."""
    folder = draw_folder(tmp_path / "in", {"a": 3})
    Image.new("1", (19_000, 1)).save(folder / "a" / "thin.png")
    draw_image(8).save(folder / "a" / f"{'long' * 60}.png")
    gone = folder / "a" / "a_001.png"
    words = [folder, "--annotate", folder, "--faces", "off", "--output", tmp_path / "p.csv"]

    def read_and_lose(source, spec):
        image = read_image(source, spec)
        if str(source) == str(gone):
            gone.unlink()
        return image

    monkeypatch.setattr(inference, "read_image", read_and_lose)
    code, out, err = predict(*words)
    assert code == 0 and len(out.splitlines()) == len(rows_of(tmp_path / "p.csv")) == 5
    assert err.count(str(gone)) == 1 and len(list(folder.glob("*.faces.jpg"))) == 4
    assert len(predict(*words)[1].splitlines()) == len(predict(f"{folder}/**/*.*", *words[1:])[1].splitlines()) == 4


def test_info(predict, photo):
    code, out, err = predict("--info", photo)
    assert (code, err) == (0, "") and "Predicted" not in out
    for part in ("cnn4_bn", "1,570,499", "angry, happy, sad", "48 x 48 gray", "faces", "epoch 3", "val_acc 0.8750"):
        assert part in out


def test_a_sample_of_test_is_drawn(predict, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw_folder("test", {"angry": 8, "happy": 9, "sad": 7, "zeal": 2})  # a class that the model doesn't know
    code, out, _ = predict()
    assert code == 0 and re.search(r"\d+ of 20 ", out)
    assert min(Image.open("prediction_samples.png").size) > 400
    draw_folder("other/Test", {"happy": 5})
    Path("other/Test/happy/broken.png").write_bytes(b"no image")
    predictions = predict_images(model, sorted(Path("other/Test/happy").glob("h*.png")), NAMES)
    right = sum(emotion == "happy" for emotion, _, _ in predictions)
    code, out, _ = predict("--data-dir", "other", "--output-dir", "drawn here")
    assert code == 0 and f"{right} of 5 " in out and "broken.png" in out
    assert os.listdir("drawn here") == ["prediction_samples.png"]


def test_tables(predict, model, tmp_path):
    folder = draw_folder(tmp_path / "größe, klein", {"a": 3})
    paths = [str(path) for path in sorted(folder.glob("*/*"))]
    for name, empty in (("p.CSV", ""), ("p.json", None)):
        assert predict(folder, "--output", tmp_path / name)[0] == 0
        rows = rows_of(tmp_path / name)
        assert [row["file"] for row in rows] == paths
        for row, (emotion, confidence, all_probs) in zip(rows, predict_images(model, paths, NAMES), strict=True):
            assert list(row) == COLUMNS and (row["emotion"], row["face"]) == (emotion, "whole")
            assert float(row["confidence"]) == pytest.approx(confidence, abs=1e-3)
            assert {name: float(row[name]) for name in NAMES} == pytest.approx(all_probs, abs=1e-3)
            assert {row[name] for name in COLUMNS[1:8] if name != "face"} == {empty}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["größe, klein", "p.CSV", "p.json"]


@pytest.mark.parametrize(("name", "error"), [("p.csv", KeyboardInterrupt), ("p.json", BrokenPipeError)])
def test_an_error_while_predicting_is_not_one_of_writing(tmp_path, name, error):
    (tmp_path / name).write_text("earlier")
    with pytest.raises(error, match="^of the model$"), TableWriter(tmp_path / name, ["file"]) as table:
        for _ in range(5000):
            table.add({"file": "a" * 100})
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) > 400_000  # rows don't wait in memory
        raise error("of the model")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "earlier")]


@pytest.mark.parametrize("rows", [3, 5000])  # fails at the end, and in between
def test_a_table_that_cannot_be_written_is_named(tmp_path, rows):
    resource = pytest.importorskip("resource", reason="needs POSIX limits")

    def write():
        with TableWriter(tmp_path / "p.csv", ["x"]) as table:
            for _ in range(rows):
                table.add({"x": "x" * 100})

    (tmp_path / "p.csv").write_text("earlier")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        assert f"can't write {tmp_path / 'p.csv'}: File" in refusal(write)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("p.csv", "earlier")]


def test_names_of_every_kind_are_read_back_from_a_table_and_are_no_formulas(predict, tmp_path, monkeypatch):
    """A spreadsheet would run what begins with =, +, - or @; a name from outside stays text."""
    names = ["=1+1.png", "@sum.png", "plain.png", "🙂.png", "x;=1+1;y.png"]
    if sys.platform.startswith("linux"):  # which has names that other systems have not
        names += ['a;b,c".png', "new\nline.png", os.fsdecode(b"caf\xe9.png"), "\x1b[31mred.png", "a\r\nb'.png"]
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(names):
        draw_image(number).save(name)
    classes = ['a;b,c"', "=cmd()", "＋y", "'z", "+1"]
    model = write_checkpoint(tmp_path / "classes.pth", names=classes)
    for table in ("p.csv", "p.json"):
        code, out, err = predict(*names, "--output", table, "--checkpoint", model)
        assert code == 0 and len(out.splitlines()) == len(names) and (out + err).replace("\n", "").isprintable()
    cells, rows = rows_of(Path("p.csv")), rows_of(Path("p.json"))
    assert '"x;=1+1;y.png",' in Path("p.csv").read_text(errors="replace")  # one cell also if semicolons separate
    assert [row["file"] for row in cells] == [f"'{name}" if name[0] in "=@" else name for name in names]
    assert list(cells[0])[-5:] == ['a;b,c"', "'=cmd()", "'＋y", "'z", "'+1"]
    assert [row["file"] for row in rows] == names and list(rows[0])[-5:] == classes


MISTAKES = """--output p.xlsx, --output none/p.csv, --output photo.png/p.csv, --annotate photo.png, --device warp,
--device meta, --batch-size 0, --batch-size many, --min-face 0, --every 0, --no-such-flag, missing.png, *.nothing,
hollow"""


@pytest.mark.parametrize("words", [*map(str.split, MISTAKES.split(","))], ids=" ".join)
def test_mistakes_are_one_line_that_names_them(checkpoint, photo, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    Path("hollow").mkdir()
    assert_refused(main, ["photo.png", *words, "--checkpoint", checkpoint], *words)


@pytest.mark.parametrize("folder", ["nothing", "test/strange", "test/happy"])
def test_nothing_to_sample(checkpoint, tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    Path(folder).mkdir(parents=True)
    Path(folder, "broken.png").write_bytes(b"no image")
    assert_refused(main, ["--checkpoint", checkpoint], "test")
