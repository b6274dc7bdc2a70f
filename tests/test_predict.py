"""predict_emotion.py: the import API, the command line, and that prediction sees what training saw."""

import csv
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_refused, draw_folder, draw_image, run_as_user
from conftest import run as run_main
from PIL import Image

import predict_emotion
from checkpoints import BEST_NAME, make_checkpoint, read_checkpoint, save_checkpoint
from data import SAMPLE_SET, FolderImages
from engine.augment import Strengths, augment
from errors import InputError
from inference import BUNDLED, classify_on_cores, make_finder
from models import count_parameters, create_model, last_layer
from predict_emotion import TableWriter, format_bars, load_model, predict_image, predict_images
from preprocessing import to_input

REPO = Path(__file__).resolve().parent.parent
MAIN, SCRIPT = predict_emotion.main, REPO / "predict_emotion.py"
NAMES = ["angry", "happy", "sad"]
COLUMNS = ["file", "time", "face", "left", "top", "width", "height", "score", "emotion", "confidence", *NAMES]


def write_checkpoint(
    path, *, arch="cnn4_bn", names=NAMES, gray=False, trained_on="faces", temperature=1.0, seed=0, image_size=None
):
    """A checkpoint of an untrained model whose predictions differ clearly from image to image."""
    torch.manual_seed(seed)
    model = create_model(arch, len(names), image_size=image_size)
    with torch.no_grad():
        last_layer(model).weight.mul_(40)
    spec = replace(model.info.input_spec, gray=gray)
    model.info = replace(model.info, class_names=names, input_spec=spec, trained_on=trained_on, temperature=temperature)
    metrics = {"val_loss": 0.5, "val_acc": 0.875, "train_loss": 0.25, "train_acc": 0.9375}
    save_checkpoint(make_checkpoint(model, epoch=3, metrics=metrics, config={"epochs": 4}), path)
    return path


def run_python(*args, cwd=REPO, **variables):
    """(exit code, standard output, standard error) of Python in a process of its own; None removes a variable."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8", **variables}
    env = {name: value for name, value in env.items() if value is not None}
    words = [sys.executable, *map(str, args)]
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, encoding="utf-8", timeout=300)
    return done.returncode, done.stdout, done.stderr


def rows_of(path):
    """The rows of a table, as dicts."""
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return json.load(file) if path.suffix == ".json" else list(csv.DictReader(file))


def values(prediction):
    return np.array(list(prediction[2].values())) / 100


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "model.pth")


@pytest.fixture
def loaded(checkpoint):
    """(model, class names)"""
    return load_model(checkpoint, device="cpu")


@pytest.fixture
def photo(tmp_path):
    draw_image(5, 100, "RGB").resize((100, 75)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def run(checkpoint):
    return lambda *args, model=checkpoint: run_main(MAIN, *args, "--checkpoint", model)


# The import API


def test_prediction_is_a_class_its_confidence_and_all_probabilities(loaded, photo):
    model, class_names = loaded
    assert class_names == NAMES and not model.training
    emotion, confidence, all_probs = predict_image(model, photo, class_names)
    assert list(all_probs) == NAMES
    assert all(type(value) is float for value in all_probs.values())
    assert sum(all_probs.values()) == pytest.approx(100, abs=1e-3)
    assert all_probs[emotion] == confidence == max(all_probs.values()) > 34
    renamed = predict_image(model, photo, ["c", "b", "a"])
    assert list(renamed[2].items()) == list(zip("cba", all_probs.values(), strict=True))
    with pytest.raises(ValueError, match="3.*2"):
        predict_image(model, photo, ["a", "b"])


def kinds(folder):
    """Images of every kind that people have, as files in one class folder."""
    folder.mkdir(parents=True)
    base = draw_image(9, 96, "RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned
    base.resize((64, 48)).save(folder / "turned.jpg", exif=exif)
    base.resize((200, 77)).save(folder / "wide.png")
    base.resize((20, 31)).save(folder / "small.bmp")
    for mode, name in (("P", "palette.gif"), ("CMYK", "cmyk.jpg"), ("L", "gray.webp"), ("1", "bits.tiff")):
        base.convert(mode).save(folder / name)
    see_through = base.convert("RGBA")
    see_through.putalpha(base.convert("L"))
    see_through.save(folder / "alpha.png")
    Image.fromarray(np.asarray(base.convert("L")).astype(np.uint16) * 257).save(folder / "deep.png")
    return sorted(folder.iterdir())


@pytest.mark.parametrize(("arch", "gray"), [("cnn4_bn", False), ("cnn6_rgb", False), ("cnn6_rgb", True)])
def test_training_and_prediction_see_the_same_tensors(tmp_path, arch, gray):
    model, names = load_model(write_checkpoint(tmp_path / "m.pth", arch=arch, gray=gray), device="cpu")
    paths, spec = kinds(tmp_path / "images" / "angry"), model.info.input_spec
    data = FolderImages(tmp_path / "images", spec)
    assert data.paths == [str(path) for path in paths] and not data.unreadable
    images = torch.from_numpy(np.array(data.images))
    measured, trained = to_input(images, spec), augment(images, spec, Strengths(), torch.Generator())
    seen = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    for path in paths:
        predict_image(model, str(path), names)
    predicted = torch.cat(seen)
    assert predicted.shape == (len(paths), spec.channels, 48, 48)
    for row, path in enumerate(paths):
        assert torch.equal(predicted[row], measured[row].expand_as(predicted[row])), path.name
        assert torch.equal(predicted[row], trained[row]), path.name
    assert len({image.numpy().tobytes() for image in predicted}) > 5  # the kinds do differ


def test_one_equals_many(loaded, tmp_path):
    model, class_names = loaded
    paths = sorted(draw_folder(tmp_path / "p", {"a": 7}).glob("*/*"))
    single = [predict_image(model, path, class_names) for path in paths]
    for batch_size in (1, 3, 64):
        many = predict_images(model, iter(paths), class_names, batch_size=batch_size)
        assert [prediction[0] for prediction in many] == [prediction[0] for prediction in single]
        np.testing.assert_allclose([*map(values, many)], [*map(values, single)], atol=1e-5)
    assert predict_images(model, [], class_names) == []
    assert len({prediction[1] for prediction in single}) == 7


def test_kinds_of_input_agree(photo, tmp_path):
    model, class_names = load_model(write_checkpoint(tmp_path / "rgb.pth", arch="cnn6_rgb"), device="cpu")
    with Image.open(photo) as image:
        image = image.convert("RGB")
    expected, array = values(predict_image(model, str(photo), class_names)), np.asarray(image)
    for same in (photo, image, array, array[:, ::-1][:, ::-1]):
        np.testing.assert_allclose(values(predict_image(model, same, class_names)), expected, atol=1e-6)
    assert np.abs(values(predict_image(model, array[:, :, ::-1], class_names)) - expected).max() > 1e-3  # BGR


def test_temperature_of_the_checkpoint_is_applied(tmp_path, loaded, photo):
    expected = values(predict_image(*loaded[:1], photo, NAMES)) ** (1 / 2.5)
    model, _ = load_model(write_checkpoint(tmp_path / "soft.pth", temperature=2.5), device="cpu")
    assert model.info.temperature == 2.5
    np.testing.assert_allclose(values(predict_image(model, photo, NAMES)), expected / expected.sum(), atol=1e-5)


def test_what_cannot_be_read_raises_value_error(loaded, tmp_path, photo):
    model, class_names = loaded
    files = {"broken.png": b"no image", "cut.png": photo.read_bytes()[:200], "empty.png": b""}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    for source in (*(tmp_path / name for name in files), tmp_path / "missing.png", tmp_path):
        with pytest.raises(ValueError, match=re.escape(str(source))):
            predict_image(model, source, class_names)
    with pytest.raises(ValueError, match="broken.png"):
        predict_images(model, [photo, tmp_path / "broken.png", photo], class_names)
    for array in (np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 4), np.uint8), np.zeros(4, np.uint8)):
        with pytest.raises(ValueError, match="uint8"):
            predict_image(model, array, class_names)
    for other in (None, b"bytes", 3, torch.zeros(48, 48)):
        with pytest.raises(InputError, match=f"it is {type(other).__name__}"):
            predict_image(model, other, class_names)
    for image in (str(photo), photo, np.zeros((48, 48), np.uint8), Image.new("L", (48, 48))):
        with pytest.raises(InputError, match="predict_image$"):
            predict_images(model, image, class_names)


def test_stream_keeps_order_and_threads(loaded, tmp_path):
    model, names = loaded
    draw_folder(tmp_path / "many", {"happy": 41})
    paths = sorted(str(path) for path in (tmp_path / "many" / "happy").iterdir())
    Path(paths[7]).write_bytes(b"broken")
    threads, bad = torch.get_num_threads(), []
    finder = make_finder(model.info.input_spec)
    found = list(classify_on_cores(model, paths, finder, 8, lambda source, _: bad.append(source)))
    assert torch.get_num_threads() == threads
    assert bad == [paths[7]] and [view.source for view, _ in found] == paths[:7] + paths[8:]
    for view, probs in found:
        np.testing.assert_allclose(probs, values(predict_image(model, view.source, names)), atol=1e-6)


def test_load_model_takes_the_best_of_the_current_folder(tmp_path, checkpoint, monkeypatch, capsys):
    shutil.copy(checkpoint, tmp_path / BEST_NAME)
    monkeypatch.chdir(tmp_path)
    assert load_model()[1] == NAMES
    assert capsys.readouterr() == ("", f"using {BEST_NAME}\n")
    load_model(checkpoint)
    assert capsys.readouterr() == ("", "")


def test_the_bundled_model_is_the_last_resort(tmp_path):
    """A copy of the modules, first without a model next to them, then with one."""
    repo, elsewhere = tmp_path / "repo", tmp_path / "elsewhere"
    elsewhere.mkdir()
    for folder in (".", "faces", "export"):
        (repo / folder).mkdir()
        for file in (REPO / folder).glob("*.py"):
            shutil.copy(file, repo / folder)
    run_there = partial(run_python, cwd=elsewhere)
    assert_refused(repo / "predict_emotion.py", ["--info"], BEST_NAME, "--checkpoint", run=run_there)
    (repo / "weights").mkdir()
    bundled = write_checkpoint(repo / "weights" / "emotion_model.pth", names=["one", "two"])
    code, out, err = run_there(repo / "predict_emotion.py", "--info")
    assert (code, err) == (0, f"using {bundled}\n") and "one, two" in out


def test_the_model_in_this_repository():
    """It is of the default arch, small, of known bytes, and tells nothing of the machine that trained it."""
    from train_emotion_cnn import DEFAULT_ARCH

    content = BUNDLED.read_bytes()
    checkpoint, card = read_checkpoint(BUNDLED), BUNDLED.with_name("README.md").read_text(encoding="utf-8")
    assert hashlib.sha256(content).hexdigest() in card
    assert len(content) <= 12e6 and b"/tmp/" not in content and b"/home/" not in content
    model, class_names = load_model(BUNDLED, device="cpu")
    assert class_names == ["angry", "disgust", "fear", "happy", "neutral", "sad", "surprise"]
    assert model.info.arch == DEFAULT_ARCH and count_parameters(model) <= 2.9e6
    assert checkpoint["config"]["seed"] == 0 and checkpoint["temperature"] != 1.0
    assert {path.name for path in BUNDLED.parent.glob("*.pth")} == {BUNDLED.name}


def test_torch_hub_loads_the_bundled_model_and_others(checkpoint, photo):
    for path, options in ((BUNDLED, {}), (checkpoint, {"checkpoint": str(checkpoint), "device": "cpu"})):
        model = torch.hub.load(str(REPO), "emotion_model", source="local", **options)
        expected, names = load_model(path)
        assert not model.training and model.info == expected.info
        assert predict_image(model, photo, names) == predict_image(expected, photo, names)


@pytest.mark.parametrize(("trained_on", "expected"), [(SAMPLE_SET, 1), ("faces", 0), ("drawings of mine", 0)])
def test_a_model_of_the_sample_set_is_named(tmp_path, run, photo, trained_on, expected):
    path = write_checkpoint(tmp_path / "m.pth", trained_on=trained_on)
    code, out, err = run(photo, model=path)
    assert code == 0 and "drawings" not in out
    assert err.count("\n") == err.count("sample set of drawings") == expected
    assert load_model(path)[0].info.trained_on == trained_on


def test_weights_of_another_tool_load_if_they_are_named(photo, checkpoint, tmp_path):
    good, other = torch.load(checkpoint, weights_only=True), tmp_path / "other.pth"
    torch.save({"model": good["state_dict"], "class_to_idx": {"angry": 0, "happy": 1, "sad": 2}}, other)
    expected = predict_image(load_model(checkpoint)[0], photo, NAMES)
    for words in ([photo], ["--info"]):
        assert_refused(MAIN, [*words, "--checkpoint", other], "other.pth", "--weights")
    model, names = load_model(other, arch=good["arch"], class_names=NAMES)
    assert names == NAMES and predict_image(model, photo, names) == expected
    for path, arch, names, words in (
        (other, "cnn4", NAMES, "cnn4"),
        (other, "nothing", NAMES, "nothing"),
        (checkpoint, good["arch"], NAMES, "its own arch"),
        (other, "cnn4_bn", NAMES[:-1], "cnn4_bn"),
    ):
        with pytest.raises(ValueError, match=words):
            load_model(path, arch=arch, class_names=names)


# The command line: what is printed


def block(prediction):
    emotion, confidence, _ = prediction
    return f"{'=' * 50}\nPredicted Emotion: {emotion.upper()}\nConfidence: {confidence:.2f}%\n{'=' * 50}\n"


def test_output_for_one_image(run, loaded, photo):
    prediction = predict_image(loaded[0], photo, NAMES)
    assert run(photo) == (0, block(prediction), "")
    bars = "".join(line + "\n" for line in format_bars(prediction[2]))
    assert run(photo, "--show-all") == (0, f"{block(prediction)}\nAll emotion probabilities:\n{bars}", "")


def test_bars_look_as_they_always_did():
    probs = {"angry": 1.23, "disgust": 0.87, "happy": 92.45, "surprise": 5.45}
    assert format_bars(probs) == [
        "angry     :  1.23% █",
        "disgust   :  0.87% █",
        "happy     : 92.45% " + "█" * 47,
        "surprise  :  5.45% ███",
    ]
    assert format_bars({"a": 100.0, "b": 0.0}) == ["a         : 100.00% " + "█" * 50, "b         :  0.00%"]


def test_the_script_itself(checkpoint, loaded, tmp_path, photo):
    """In a folder with spaces and letters that ASCII lacks, on a terminal that cannot show them."""
    folder = tmp_path / "schöne Bilder"
    folder.mkdir()
    shutil.copy(checkpoint, folder / BEST_NAME)
    for name in ("Müller 1.png", "Müller 2.png"):
        shutil.copy(photo, folder / name)
    prediction = predict_image(loaded[0], photo, NAMES)
    code, out, err = run_python(SCRIPT, "Müller 1.png", "--show-all", cwd=folder)
    assert (code, err) == (0, f"using {BEST_NAME}\n")
    assert out.startswith(block(prediction)) and out.count("█") >= 50
    names = ("Müller 1.png", "Müller 2.png")
    code, out, err = run_python(SCRIPT, *names, "--show-all", cwd=folder, PYTHONIOENCODING="ascii")
    assert code == 0 and out.count(prediction[0]) == 4, err


def predicted_lines(out):
    return {line.rpartition(": ")[0]: line.rpartition(": ")[2].split()[0] for line in out.splitlines()}


def test_folders_patterns_and_several_files(run, loaded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw_folder("images", {"a": 3, "b": 2})
    (Path("images") / "notes.txt").write_text("no image")
    shutil.copy("images/b/b_000.png", "images/b/odd[1].png")
    paths = sorted(map(str, Path("images").glob("*/*.png")))
    expected = dict(zip(paths, (p[0] for p in predict_images(loaded[0], paths, NAMES)), strict=True))
    code, out, err = run("images")
    assert (code, predicted_lines(out), err) == (0, expected, "6 images\n")
    several = [os.path.join("images", "a", "a_001.png"), os.path.join("images", "b", "odd[1].png")]
    for inputs, found in (
        (["images/**/*.png"], paths),
        ([os.path.join("images", "*", "a_*.png")], paths[:3]),
        (several, several),
    ):
        assert predicted_lines(run(*inputs)[1]) == {path: expected[path] for path in found}
    assert run(several[1])[1].startswith("=" * 50)
    assert run("images", *several)[2] == "6 images\n"  # named twice, predicted once
    code, out, _ = run("images", "--show-all", "--batch-size", "2")
    assert code == 0 and out.count("%") == 6 * (1 + len(NAMES))


def test_unreadable_among_good_ones(run, photo, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    other = shutil.copy(photo, tmp_path / "other.png")
    code, out, err = run(photo, tmp_path / "broken.jpg", other, "--output", tmp_path / "p.csv")
    assert code == 0
    assert list(predicted_lines(out)) == [str(photo), str(other)]
    assert str(tmp_path / "broken.jpg") in err and "2 images, 1 could not be read" in err
    assert len(rows_of(tmp_path / "p.csv")) == 2


def test_nothing_but_unreadable(run, checkpoint, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    assert_refused(MAIN, [tmp_path / "broken.jpg", "--checkpoint", checkpoint], tmp_path / "broken.jpg")
    shutil.copy(tmp_path / "broken.jpg", tmp_path / "other.jpg")
    code, out, err = run(tmp_path, "--output", tmp_path / "p.csv")
    assert (code, out) == (2, "") and "other.jpg" in err and "p.csv was not written" in err
    assert not (tmp_path / "p.csv").exists()


def test_info(run, photo):
    code, out, err = run("--info", photo)
    assert (code, err) == (0, "")
    for part in ("cnn4_bn", "1,570,499", "angry, happy, sad", "48 x 48 gray", "faces", "epoch 3", "0.8750", "val_acc"):
        assert part in out
    assert "Predicted" not in out


def test_a_sample_of_test_is_drawn(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw_folder("test", {"angry": 8, "happy": 9, "sad": 7, "zeal": 2})  # a class that the model doesn't know
    code, out, _ = run()
    assert code == 0 and re.search(r"\d+ of 20 ", out)
    with Image.open("prediction_samples.png") as image:
        image.load()
        assert min(image.size) > 400
    draw_folder("other/Test", {"happy": 5})
    Path("other/Test/happy/broken.png").write_bytes(b"no image")
    model, names = load_model(tmp_path / "model.pth")
    predictions = predict_images(model, sorted(Path("other/Test/happy").glob("h*.png")), names)
    right = sum(emotion == "happy" for emotion, _, _ in predictions)
    code, out, _ = run("--data-dir", "other", "--output-dir", "drawn here")
    assert code == 0 and f"{right} of 5 " in out and "broken.png" in out
    assert os.listdir("drawn here") == ["prediction_samples.png"]


# Tables


def test_tables(run, loaded, tmp_path):
    paths = [str(path) for path in sorted(draw_folder(tmp_path / "größe, klein", {"a": 3}).glob("*/*"))]
    expected = predict_images(loaded[0], paths, NAMES)
    for name, empty in (("p.CSV", ""), ("p.json", None)):
        assert run(tmp_path / "größe, klein", "--output", tmp_path / name)[0] == 0
        rows = rows_of(tmp_path / name)
        assert [row["file"] for row in rows] == paths
        for row, (emotion, confidence, all_probs) in zip(rows, expected, strict=True):
            assert list(row) == COLUMNS
            assert (row["emotion"], row["face"]) == (emotion, "whole")
            assert float(row["confidence"]) == pytest.approx(confidence, abs=1e-3)
            assert {name: float(row[name]) for name in NAMES} == pytest.approx(all_probs, abs=1e-3)
            assert {row[name] for name in COLUMNS[1:8] if name != "face"} == {empty}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["größe, klein", "model.pth", "p.CSV", "p.json"]


@pytest.mark.parametrize("error", [BrokenPipeError, RuntimeError, InputError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["p.csv", "p.json"])
def test_an_error_while_predicting_is_not_one_of_writing(tmp_path, error, name):
    (tmp_path / name).write_text("earlier")
    with pytest.raises(error, match="^of the model$"), TableWriter(tmp_path / name, ["file"]) as table:
        table.add({"file": "a"})
        raise error("of the model")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "earlier")]


@pytest.mark.parametrize("rows", [3, 5000])  # fails at the end, and in between
def test_a_table_that_cannot_be_written_is_named(tmp_path, rows):
    resource = pytest.importorskip("resource", reason="needs POSIX limits")
    (tmp_path / "p.csv").write_text("earlier")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with (
            pytest.raises(InputError, match=r"can't write .*p\.csv: File"),
            TableWriter(tmp_path / "p.csv", ["x"]) as table,
        ):
            for _ in range(rows):
                table.add({"x": "x" * 100})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("p.csv", "earlier")]


def test_rows_are_on_the_disk_before_the_last_has_come(tmp_path):
    with TableWriter(tmp_path / "p.json", ["x"]) as table:
        for _ in range(5000):
            table.add({"x": "x" * 100})
        (unfinished,) = tmp_path.iterdir()
        assert unfinished.name != "p.json" and unfinished.stat().st_size > 400_000
    assert len(rows_of(tmp_path / "p.json")) == 5000 and not unfinished.exists()
    with TableWriter(tmp_path / "none.csv", ["x"]):
        pass
    assert os.listdir(tmp_path) == ["p.json"]


def test_names_of_every_kind_are_read_back_from_a_table_and_are_no_formulas(run, tmp_path, monkeypatch):
    """A spreadsheet would run what begins with =, +, - or @; a name from outside stays text."""
    names = ["=1+1.png", "@sum.png", "plain.png", "🙂.png"]
    if sys.platform.startswith("linux"):  # which has names that other systems have not
        names += ['a;b,c".png', "new\nline.png", os.fsdecode(b"caf\xe9.png"), "\x1b[31mred.png", "a\r\nb'.png"]
    (tmp_path / "images").mkdir()
    monkeypatch.chdir(tmp_path / "images")
    for number, name in enumerate(names):
        draw_image(number).save(name)
    classes = ['a;b,c"', "=cmd()", "＋y", "'z", "+1"]
    model = write_checkpoint(tmp_path / "classes.pth", names=classes)
    for table in ("p.csv", "p.json"):
        code, out, err = run(*names, "--output", table, model=model)
        assert code == 0 and len(out.splitlines()) == len(names) and (out + err).replace("\n", "").isprintable()
    cells = [f"'{name}" if name[0] in "=@" else name for name in names]
    assert [row["file"] for row in rows_of(Path("p.csv"))] == cells
    assert list(rows_of(Path("p.csv"))[0])[-5:] == ['a;b,c"', "'=cmd()", "'＋y", "'z", "'+1"]
    assert [row["file"] for row in rows_of(Path("p.json"))] == names
    assert list(rows_of(Path("p.json"))[0])[-5:] == classes


# Mistakes


MISTAKES = """--output p.xlsx, --output none/p.csv, --output photo.png/p.csv, --annotate photo.png, --device warp,
--device meta, --batch-size 0, --batch-size many, --min-face 0, --every 0, --no-such-flag, missing.png, *.nothing,
hollow"""


@pytest.mark.parametrize("words", [*map(str.split, MISTAKES.split(","))])
def test_mistakes_are_one_line_that_names_them(checkpoint, photo, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hollow").mkdir()
    assert_refused(MAIN, ["photo.png", *words, "--checkpoint", checkpoint], *words)


@pytest.mark.parametrize("folder", ["nothing", "test/strange", "test/happy"])
def test_nothing_to_sample(checkpoint, tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    Path(folder).mkdir(parents=True)
    if folder == "test/happy":
        (Path(folder) / "broken.png").write_bytes(b"no image")
    assert_refused(MAIN, ["--checkpoint", checkpoint], "test")


def test_wrong_checkpoints(photo, checkpoint, tmp_path):
    cut, other, missing = (tmp_path / f"{name}.pth" for name in ("cut", "other", "missing"))
    cut.write_bytes(checkpoint.read_bytes()[:5000])
    torch.save(torch.load(checkpoint, weights_only=True) | {"arch": "cnn4"}, other)
    for path in (cut, other, missing, tmp_path):
        assert_refused(MAIN, [photo, "--checkpoint", path], path)


def test_missing_permissions_are_one_line():
    """As an ordinary user, for whom permissions count."""
    out = run_as_user("""
        import sys
        from pathlib import Path

        sys.path += [os.environ["PYTHONPATH"], os.path.join(os.environ["PYTHONPATH"], "tests")]
        import predict_emotion
        from conftest import draw_image
        from test_predict import write_checkpoint

        for name, mode in (("model", 0o644), ("secret", 0)):
            write_checkpoint(Path(f"{name}.pth")).chmod(mode)
            draw_image(1).save(f"{name}.png")
            Path(f"{name}.png").chmod(mode)
        Path("closed").mkdir(mode=0o555)
        Path("hidden").mkdir(mode=0)
        predict_emotion.load_model("model.pth", "cpu")  # for what is imported late
        become_user()
        os.dup2(1, 2)
        model, secret = ["--checkpoint", "model.pth"], ["--checkpoint", "secret.pth"]
        table = [*model, "--output", "closed/p.csv"]
        for words in (["model.png", *secret], ["secret.png", *model], ["hidden", *model], ["model.png", *table]):
            try:
                predict_emotion.run_script(lambda: predict_emotion.main([*words, "--device", "cpu"]))
            except SystemExit as stop:
                print("exit", stop.code, flush=True)
    """)
    lines = out.splitlines()
    assert [line for line in lines if line.startswith("exit")] == ["exit 2"] * 4
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 4 and "Traceback" not in out
    for line, name in zip(errors, ("secret.pth", "secret.png", "hidden", "p.csv"), strict=True):
        assert name in line
