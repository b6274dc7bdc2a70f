"""predict_emotion.py: the import API, the command line, and that prediction sees what training saw."""

import csv
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_folder, draw_picture, run_as_user
from PIL import Image

import predict_emotion
from checkpoints import BEST_NAME, make_checkpoint, read_checkpoint, save_checkpoint
from console import run_script
from data import SAMPLE_SET, FolderImages
from engine.augment import Strengths, augment
from errors import InputError
from inference import BUNDLED, classify_on_cores, make_finder
from models import InputSpec, count_parameters, create_model
from predict_emotion import format_bars, load_model, predict_image, predict_images
from preprocessing import to_input
from train_emotion_cnn import DEFAULT_ARCH

REPO = Path(__file__).resolve().parent.parent
SCRIPT = str(REPO / "predict_emotion.py")
NAMES = ["angry", "happy", "sad"]
COLUMNS = ["file", "time", "face", "left", "top", "width", "height", "score", "emotion", "confidence", *NAMES]


def write_checkpoint(
    path, *, arch="cnn4_bn", names=NAMES, gray=False, trained_on="faces", temperature=1.0, seed=0, image_size=None
):
    """A checkpoint of an untrained network whose answers differ clearly from picture to picture."""
    torch.manual_seed(seed)
    model = create_model(arch, len(names), **({"image_size": image_size} if image_size else {}))
    with torch.no_grad():
        list(model.parameters())[-2].mul_(40)
    if gray:
        model.input_spec = InputSpec(**{**model.input_spec.to_dict(), "gray": True})
    metrics = {"val_loss": 0.5, "val_acc": 0.875, "train_loss": 0.25, "train_acc": 0.9375}
    checkpoint = make_checkpoint(model, names, trained_on=trained_on, epoch=3, metrics=metrics, config={"epochs": 4})
    save_checkpoint(checkpoint | {"temperature": temperature}, path)
    return path


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "model.pth")


@pytest.fixture
def loaded(checkpoint):
    """(network, class names)"""
    return load_model(checkpoint, device="cpu")


@pytest.fixture
def photo(tmp_path):
    draw_picture(5, 100, "RGB").resize((100, 75)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def run(capsys, checkpoint):
    """Runs main as the script does; returns (exit code, standard output, standard error)."""

    def run_main(*args, model=checkpoint):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run_script(lambda: predict_emotion.main([*map(str, args), "--checkpoint", str(model)]))
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return run_main


def command(*args, cwd, script=SCRIPT, **variables):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8", **variables}
    return subprocess.run(
        [sys.executable, script, *map(str, args)], cwd=cwd, env=env, capture_output=True, encoding="utf-8", timeout=300
    )


def assert_one_line(err, *words):
    assert "Traceback" not in err
    assert err.count("\n") == 1 and "error: " in err, err
    for word in words:
        assert word in err


def values(prediction):
    return np.array(list(prediction[2].values())) / 100


# The import API


def test_prediction_is_a_class_its_confidence_and_all_probabilities(loaded, photo):
    model, class_names = loaded
    assert class_names == NAMES and not model.training
    emotion, confidence, all_probs = predict_image(model, photo, class_names)
    assert list(all_probs) == NAMES
    assert all(type(value) is float for value in all_probs.values())
    assert sum(all_probs.values()) == pytest.approx(100, abs=1e-3)
    assert all_probs[emotion] == confidence == max(all_probs.values())
    assert confidence > 34


def test_class_names_are_taken_in_their_order(loaded, photo):
    model, class_names = loaded
    renamed = predict_image(model, photo, ["c", "b", "a"])
    assert list(renamed[2]) == ["c", "b", "a"]
    assert list(renamed[2].values()) == list(predict_image(model, photo, class_names)[2].values())


def kinds(folder):
    """Pictures of every kind that people have, as files in one class folder."""
    folder.mkdir(parents=True)
    base = draw_picture(9, 96, "RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned
    base.resize((64, 48)).save(folder / "turned.jpg", exif=exif)
    base.resize((200, 77)).save(folder / "wide.png")
    base.resize((20, 31)).save(folder / "small.bmp")
    base.convert("P").save(folder / "palette.gif")
    base.convert("CMYK").save(folder / "cmyk.jpg")
    base.convert("L").save(folder / "gray.webp")
    base.convert("1").save(folder / "bits.tiff")
    see_through = base.convert("RGBA")
    see_through.putalpha(base.convert("L"))
    see_through.save(folder / "alpha.png")
    Image.fromarray(np.asarray(base.convert("L")).astype(np.uint16) * 257).save(folder / "deep.png")
    return sorted(folder.iterdir())


@pytest.mark.parametrize(("arch", "gray"), [("cnn4_bn", False), ("cnn6_rgb", False), ("cnn6_rgb", True)])
def test_training_and_prediction_see_the_same_tensors(tmp_path, arch, gray):
    model, names = load_model(write_checkpoint(tmp_path / "m.pth", arch=arch, gray=gray), device="cpu")
    paths = kinds(tmp_path / "pictures" / "angry")
    data = FolderImages(tmp_path / "pictures", model.input_spec)
    assert data.paths == [str(path) for path in paths] and not data.unreadable
    images = torch.from_numpy(np.array(data.images))
    measured = to_input(images, model.input_spec)
    trained = augment(images, model.input_spec, Strengths(), torch.Generator())
    seen = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    for path in paths:
        predict_image(model, str(path), names)
    predicted = torch.cat(seen)
    assert predicted.shape == (len(paths), model.input_spec.channels, 48, 48)
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
        for left, right in zip(many, single, strict=True):
            np.testing.assert_allclose(values(left), values(right), atol=1e-5)
    assert predict_images(model, [], class_names) == []
    assert len({prediction[1] for prediction in single}) == 7


def test_kinds_of_input_agree(loaded, photo):
    model, class_names = loaded
    with Image.open(photo) as image:
        image = image.convert("RGB")
    expected = values(predict_image(model, str(photo), class_names))
    for same in (photo, image, np.asarray(image), np.asarray(image.convert("L")), np.asarray(image)[:, ::-1][:, ::-1]):
        np.testing.assert_allclose(values(predict_image(model, same, class_names)), expected, atol=1e-6)


def test_arrays_are_rgb(tmp_path):
    model, names = load_model(write_checkpoint(tmp_path / "m.pth", arch="cnn6_rgb"), device="cpu")
    image = draw_picture(3, 48, "RGB")
    expected, array = values(predict_image(model, image, names)), np.asarray(image)
    np.testing.assert_allclose(values(predict_image(model, array, names)), expected, atol=1e-6)
    assert np.abs(values(predict_image(model, array[:, :, ::-1], names)) - expected).max() > 1e-3


def test_gray_network_sees_a_colour_photo_as_gray(tmp_path, photo):
    colour = load_model(write_checkpoint(tmp_path / "rgb.pth", arch="cnn6_rgb"), device="cpu")
    gray = load_model(write_checkpoint(tmp_path / "gray.pth", arch="cnn6_rgb", gray=True), device="cpu")
    with Image.open(photo) as image:
        as_gray = image.convert("L").convert("RGB")
    expected = values(predict_image(gray[0], as_gray, NAMES))
    np.testing.assert_allclose(values(predict_image(gray[0], photo, NAMES)), expected, atol=1e-5)
    assert np.abs(values(predict_image(colour[0], photo, NAMES)) - expected).max() > 1e-3


def test_temperature_of_the_checkpoint_is_applied(tmp_path, loaded, photo):
    plain = values(predict_image(*loaded[:1], photo, NAMES))
    model, _ = load_model(write_checkpoint(tmp_path / "soft.pth", temperature=2.5), device="cpu")
    assert model.temperature == 2.5
    expected = plain ** (1 / 2.5)
    np.testing.assert_allclose(values(predict_image(model, photo, NAMES)), expected / expected.sum(), atol=1e-5)


def test_what_cannot_be_read_raises_value_error(loaded, tmp_path, photo):
    model, class_names = loaded
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    cut = tmp_path / "cut.png"
    cut.write_bytes(photo.read_bytes()[:200])
    (tmp_path / "empty.png").touch()
    for source in (broken, cut, tmp_path / "empty.png", tmp_path / "missing.png", tmp_path):
        with pytest.raises(ValueError, match=re.escape(str(source))):
            predict_image(model, source, class_names)
    for array in (np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 4), np.uint8), np.zeros(4, np.uint8)):
        with pytest.raises(ValueError, match="uint8"):
            predict_image(model, array, class_names)
    with pytest.raises(ValueError, match="broken.png"):
        predict_images(model, [photo, broken, photo], class_names)


def test_one_picture_in_the_place_of_a_list(loaded, photo):
    model, names = loaded
    for picture in (str(photo), photo, np.zeros((48, 48), np.uint8), Image.new("L", (48, 48))):
        with pytest.raises(InputError, match="predict_image$"):
            predict_images(model, picture, names)


@pytest.mark.parametrize("picture", [None, b"bytes", 3, torch.zeros(48, 48)])
def test_what_is_no_picture_is_named_by_its_type(loaded, picture):
    model, names = loaded
    with pytest.raises(InputError, match=f"it is {type(picture).__name__}"):
        predict_image(model, picture, names)


def test_stream_keeps_order_and_threads(loaded, tmp_path):
    model, names = loaded
    draw_folder(tmp_path / "many", {"happy": 41})
    paths = sorted(str(path) for path in (tmp_path / "many" / "happy").iterdir())
    Path(paths[7]).write_bytes(b"broken")
    threads, bad = torch.get_num_threads(), []
    finder = make_finder(model.input_spec)
    found = list(classify_on_cores(model, paths, finder, 8, lambda source, _: bad.append(source)))
    assert torch.get_num_threads() == threads
    assert bad == [paths[7]] and [view.source for view, _ in found] == paths[:7] + paths[8:]
    for view, probs in found:
        expected = torch.tensor(list(predict_image(model, view.source, names)[2].values())) / 100
        assert torch.allclose(probs, expected, atol=1e-6)


def test_wrong_number_of_class_names(loaded, photo):
    with pytest.raises(ValueError, match="3.*2"):
        predict_image(loaded[0], photo, ["a", "b"])


def test_load_model_takes_the_best_of_the_current_folder(tmp_path, checkpoint, monkeypatch, capsys):
    shutil.copy(checkpoint, tmp_path / BEST_NAME)
    monkeypatch.chdir(tmp_path)
    _, class_names = load_model()
    out, err = capsys.readouterr()
    assert class_names == NAMES
    assert (out, err) == ("", f"using {BEST_NAME}\n")
    load_model(checkpoint)
    assert capsys.readouterr() == ("", "")


def test_network_that_comes_along_is_the_last_resort(tmp_path):
    """A copy of the modules, first without a network beside them, then with one."""
    repo, elsewhere = tmp_path / "repo", tmp_path / "elsewhere"
    elsewhere.mkdir()
    repo.mkdir()
    for file in REPO.glob("*.py"):
        shutil.copy(file, repo)
    script = str(repo / "predict_emotion.py")
    done = command("--info", cwd=elsewhere, script=script)
    assert done.returncode == 2
    assert_one_line(done.stderr, BEST_NAME, "--checkpoint")
    (repo / "weights").mkdir()
    bundled = write_checkpoint(repo / "weights" / "emotion_model.pth", names=["one", "two"])
    done = command("--info", cwd=elsewhere, script=script)
    assert (done.returncode, done.stderr) == (0, f"using {bundled}\n")
    assert "one, two" in done.stdout


def test_the_network_in_this_repository():
    """It is the default network, small, of known bytes, and tells nothing of the machine that trained it."""
    content = BUNDLED.read_bytes()
    checkpoint, card = read_checkpoint(BUNDLED), BUNDLED.with_name("README.md").read_text(encoding="utf-8")
    assert hashlib.sha256(content).hexdigest() in card
    assert len(content) <= 12e6 and b"/tmp/" not in content and b"/home/" not in content
    model, class_names = load_model(BUNDLED, device="cpu")
    assert class_names == ["angry", "disgust", "fear", "happy", "neutral", "sad", "surprise"]
    assert model.arch == DEFAULT_ARCH and count_parameters(model) <= 2.9e6
    assert checkpoint["config"]["seed"] == 0 and checkpoint["temperature"] != 1.0
    assert {path.name for path in BUNDLED.parent.glob("*.pth")} == {BUNDLED.name}


@pytest.mark.parametrize(("trained_on", "expected"), [(SAMPLE_SET, 1), ("faces", 0), ("drawings of mine", 0)])
def test_network_of_the_sample_set_says_so(tmp_path, run, photo, trained_on, expected):
    path = write_checkpoint(tmp_path / "m.pth", trained_on=trained_on)
    code, out, err = run(photo, model=path)
    assert code == 0
    assert err.count("\n") == err.count("sample set of drawings") == expected
    assert "drawings" not in out
    assert load_model(path)[0].trained_on == trained_on


# The command line: output


def block(prediction):
    emotion, confidence, _ = prediction
    return f"{'=' * 50}\nPredicted Emotion: {emotion.upper()}\nConfidence: {confidence:.2f}%\n{'=' * 50}\n"


def test_output_for_one_picture(run, loaded, photo):
    prediction = predict_image(loaded[0], photo, NAMES)
    assert run(photo) == (0, block(prediction), "")
    code, out, err = run(photo, "--show-all")
    assert (code, err) == (0, "")
    bars = "".join(line + "\n" for line in format_bars(prediction[2]))
    assert out == f"{block(prediction)}\nAll emotion probabilities:\n{bars}"


def test_bars_look_as_they_always_did():
    probs = {"angry": 1.23, "disgust": 0.87, "fear": 2.11, "happy": 92.45, "neutral": 1.56, "sad": 0.98}
    probs["surprise"] = 0.8
    lines = format_bars(probs)
    assert [line.rstrip("█") for line in lines] == [
        "angry     :  1.23% ",
        "disgust   :  0.87% ",
        "fear      :  2.11% ",
        "happy     : 92.45% ",
        "neutral   :  1.56% ",
        "sad       :  0.98% ",
        "surprise  :  0.80% ",
    ]
    bars = [line.count("█") for line in lines]
    assert min(bars) == 1
    assert all(abs(bar - percent / 2) <= 1 for bar, percent in zip(bars, probs.values(), strict=True))
    assert format_bars({"a": 100.0, "b": 0.0}) == ["a         : 100.00% " + "█" * 50, "b         :  0.00%"]


def test_the_script_itself(checkpoint, loaded, tmp_path, photo):
    """In a folder with spaces and letters that ASCII lacks, on a terminal that cannot show them."""
    folder = tmp_path / "schöne Bilder"
    folder.mkdir()
    shutil.copy(checkpoint, folder / BEST_NAME)
    target = folder / "Müller 1.png"
    shutil.copy(photo, target)
    done = command("Müller 1.png", "--show-all", cwd=folder)
    prediction = predict_image(loaded[0], target, NAMES)
    assert (done.returncode, done.stderr) == (0, f"using {BEST_NAME}\n")
    assert done.stdout.startswith(block(prediction)) and done.stdout.count("█") >= 50
    shutil.copy(target, folder / "Müller 2.png")
    done = command("Müller 1.png", "Müller 2.png", "--show-all", cwd=folder, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(prediction[0]) == 4


def predicted_lines(out):
    return {line.rpartition(": ")[0]: line.rpartition(": ")[2].split()[0] for line in out.splitlines()}


def test_folders_patterns_and_several_files(run, loaded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw_folder("pictures", {"a": 3, "b": 2})
    (Path("pictures") / "notes.txt").write_text("no picture")
    shutil.copy("pictures/b/b_000.png", "pictures/b/odd[1].png")
    paths = sorted(map(str, Path("pictures").glob("*/*.png")))
    expected = dict(zip(paths, (p[0] for p in predict_images(loaded[0], paths, NAMES)), strict=True))
    code, out, err = run("pictures")
    assert (code, predicted_lines(out)) == (0, expected)
    assert err == "6 pictures\n"
    assert predicted_lines(run(os.path.join("pictures", "*", "a_*.png"))[1]) == {
        path: emotion for path, emotion in expected.items() if "a_" in path
    }
    assert predicted_lines(run("pictures/**/*.png")[1]) == expected
    several = [os.path.join("pictures", "a", "a_001.png"), os.path.join("pictures", "b", "odd[1].png")]
    assert predicted_lines(run(*several)[1]) == {path: expected[path] for path in several}
    assert run(several[1])[1].startswith("=" * 50)
    assert run("pictures", *several)[2] == "6 pictures\n"  # named twice, predicted once
    code, out, _ = run("pictures", "--show-all", "--batch-size", "2")
    assert code == 0 and out.count("%") == 6 * (1 + len(NAMES))


def test_tables(run, loaded, tmp_path):
    paths = [str(path) for path in sorted(draw_folder(tmp_path / "größe, klein", {"a": 3}).glob("*/*"))]
    expected = predict_images(loaded[0], paths, NAMES)
    assert run(tmp_path / "größe, klein", "--output", tmp_path / "p.CSV")[0] == 0
    assert run(tmp_path / "größe, klein", "--output", tmp_path / "p.json")[0] == 0
    with (tmp_path / "p.CSV").open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        assert reader.fieldnames == COLUMNS
        table = list(reader)
    listed = json.loads((tmp_path / "p.json").read_text(encoding="utf-8"))
    for rows, empty in ((table, ""), (listed, None)):
        assert [row["file"] for row in rows] == paths
        for row, (emotion, confidence, all_probs) in zip(rows, expected, strict=True):
            assert list(row) == COLUMNS
            assert row["emotion"] == emotion
            assert float(row["confidence"]) == pytest.approx(confidence, abs=1e-3)
            assert {name: float(row[name]) for name in NAMES} == pytest.approx(all_probs, abs=1e-3)
            assert row["face"] == "whole"
            assert {row[name] for name in COLUMNS[1:8] if name != "face"} == {empty}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["größe, klein", "model.pth", "p.CSV", "p.json"]


@pytest.mark.parametrize("error", [BrokenPipeError, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["p.csv", "p.json"])
def test_an_error_while_predicting_is_not_one_of_writing(tmp_path, error, name):
    def rows():
        yield {"file": "a"}
        raise error

    (tmp_path / name).write_text("earlier")
    with pytest.raises(error):
        predict_emotion.write_rows(rows(), ["file"], tmp_path / name)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "earlier")]


def test_unreadable_among_good_ones(run, photo, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    other = shutil.copy(photo, tmp_path / "other.png")
    code, out, err = run(photo, tmp_path / "broken.jpg", other, "--output", tmp_path / "p.csv")
    assert code == 0
    assert list(predicted_lines(out)) == [str(photo), str(other)]
    assert str(tmp_path / "broken.jpg") in err and "2 pictures, 1 could not be read" in err
    assert (tmp_path / "p.csv").read_text(encoding="utf-8").count("\n") == 3


def test_nothing_but_unreadable(run, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    code, out, err = run(tmp_path / "broken.jpg")
    assert (code, out) == (2, "")
    assert_one_line(err, str(tmp_path / "broken.jpg"))
    shutil.copy(tmp_path / "broken.jpg", tmp_path / "other.jpg")
    code, out, err = run(tmp_path, "--output", tmp_path / "p.csv")
    assert (code, out) == (2, "") and "other.jpg" in err
    assert not (tmp_path / "p.csv").exists()


def test_info(run, photo):
    code, out, err = run("--info", photo)
    assert (code, err) == (0, "")
    for part in ("cnn4_bn", "1,570,499", "angry, happy, sad", "48 x 48 gray", "faces", "epoch 3", "0.8750", "val_acc"):
        assert part in out
    assert "Predicted" not in out


def test_a_sample_of_test_is_drawn(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw_folder("test", {"angry": 8, "happy": 9, "sad": 7, "zeal": 2})  # a class that the network doesn't know
    code, out, _ = run()
    assert code == 0
    assert re.search(r"\d+ of 20 ", out)
    with Image.open("prediction_samples.png") as image:
        image.load()
        assert min(image.size) > 400
    draw_folder("other/test", {"happy": 5})
    model, names = load_model(tmp_path / "model.pth")
    answers = predict_images(model, sorted(Path("other/test/happy").iterdir()), names)
    right = sum(emotion == "happy" for emotion, _, _ in answers)
    code, out, _ = run("--data-dir", "other", "--output-dir", "drawn here")
    assert code == 0 and f"{right} of 5 " in out
    assert os.listdir("drawn here") == ["prediction_samples.png"]


# The command line: mistakes


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--output", "p.xlsx"], ["--output", "p.xlsx", ".csv", ".json"]),
        (["--output", "none/p.csv"], ["p.csv"]),
        (["--output", "photo.png/p.csv"], ["p.csv"]),
        (["--device", "warp"], ["--device", "warp"]),
        (["--device", "meta"], ["--device", "meta"]),
        (["--batch-size", "0"], ["--batch-size"]),
        (["--batch-size", "many"], ["--batch-size"]),
        (["--no-such-flag"], ["--no-such-flag"]),
        (["missing.png"], ["missing.png"]),
        (["*.nothing"], ["*.nothing"]),
        (["hollow"], ["hollow"]),
    ],
)
def test_mistakes(run, photo, tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hollow").mkdir()
    code, _, err = run("photo.png", *args)
    assert code == 2
    assert_one_line(err, *words)


def test_nothing_to_sample(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run()
    assert code == 2
    assert_one_line(err, "test", "picture")


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def test_wrong_checkpoints(run, photo, checkpoint, tmp_path):
    good = torch.load(checkpoint, weights_only=True)
    files = {
        "text": b"no checkpoint",
        "empty": b"",
        "cut": checkpoint.read_bytes()[:5000],
        "bare": good["state_dict"],
        "newer": good | {"format_version": 99},
        "unknown": good | {"arch": "cnn9"},
        "other": good | {"arch": "cnn4"},
        "classes": good | {"class_names": ["a"]},
        "half": {"format_version": 1},
        "spec": good | {"input_spec": {"image_size": 48}},
        "trap": {"x": Trap(tmp_path / "sprung")},
    }
    for name, content in files.items():
        path = tmp_path / f"{name}.pth"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        code, _, err = run(photo, model=path)
        assert code == 2, name
        assert_one_line(err, str(path))
    assert not (tmp_path / "sprung").exists()
    for path in (tmp_path / "missing.pth", tmp_path):
        code, _, err = run(photo, model=path)
        assert code == 2
        assert_one_line(err, str(path))


def test_missing_permissions_are_one_line():
    """As an ordinary user, for whom permissions count."""
    out = run_as_user("""
        import sys
        from pathlib import Path

        sys.path += [os.environ["PYTHONPATH"], os.path.join(os.environ["PYTHONPATH"], "tests")]
        import predict_emotion
        from conftest import draw_picture
        from test_predict import write_checkpoint

        def attempt(*args):
            try:
                predict_emotion.run_script(lambda: predict_emotion.main([*args, "--device", "cpu"]))
            except SystemExit as stop:
                print("exit", stop.code, flush=True)

        write_checkpoint(Path("model.pth")).chmod(0o644)
        write_checkpoint(Path("secret.pth")).chmod(0)
        draw_picture(1).save("face.png")
        draw_picture(2).save("secret.png")
        Path("secret.png").chmod(0)
        Path("closed").mkdir(mode=0o555)
        Path("hidden").mkdir(mode=0)
        predict_emotion.load_model("model.pth", "cpu")  # for what is imported late
        become_user()
        os.dup2(1, 2)
        attempt("face.png", "--checkpoint", "secret.pth")
        attempt("secret.png", "--checkpoint", "model.pth")
        attempt("hidden", "--checkpoint", "model.pth")
        attempt("face.png", "--checkpoint", "model.pth", "--output", "closed/p.csv")
    """)
    lines = out.splitlines()
    assert [line for line in lines if line.startswith("exit")] == ["exit 2"] * 4
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 4 and "Traceback" not in out
    for line, name in zip(errors, ("secret.pth", "secret.png", "hidden", "p.csv"), strict=True):
        assert name in line


def test_weights_in_the_layouts_of_other_tools_load_where_they_are_named(run, photo, checkpoint, tmp_path):
    good = torch.load(checkpoint, weights_only=True)
    weights, index = good["state_dict"], {name: number for number, name in enumerate(NAMES)}
    layouts = [
        {"state_dict": weights, "class_names": NAMES},
        {"model_state_dict": weights, "classes": NAMES},
        {"model": weights, "class_to_idx": index},
        {f"module.{key}": value for key, value in weights.items()},
    ]
    for layout in layouts:
        torch.save(layout, tmp_path / "other.pth")
        for arguments in ([photo], ["--info"]):
            code, out, err = run(*arguments, model=tmp_path / "other.pth")
            assert (code, out) == (2, "")
            assert_one_line(err, "other.pth", "--weights")
        expected = predict_image(load_model(checkpoint)[0], photo, NAMES)
        model, names = load_model(tmp_path / "other.pth", arch=good["arch"], class_names=NAMES)
        assert names == NAMES and predict_image(model, photo, names) == expected
    for path, arch, words in (
        (tmp_path / "other.pth", "cnn4", "cnn4"),
        (tmp_path / "other.pth", "nothing", "nothing"),
        (checkpoint, good["arch"], "its own arch"),
    ):
        with pytest.raises(ValueError, match=words):
            load_model(path, arch=arch, class_names=NAMES)
    with pytest.raises(ValueError, match="cnn4_bn"):
        load_model(tmp_path / "other.pth", arch="cnn4_bn", class_names=NAMES[:-1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="makes names that other systems have not")
def test_names_of_every_kind_are_read_back_from_a_table(run, tmp_path):
    names = ['a;b,c".png', "new\nline.png", "🙂.png", os.fsdecode(b"caf\xe9.png"), "\x1b[31mred.png", "a\r\nb'.png"]
    paths = sorted(str(tmp_path / "p" / name) for name in names)
    (tmp_path / "p").mkdir()
    for number, path in enumerate(paths):
        draw_picture(number).save(path)
    classes = ['a;b,c"', "=x", "＋y", "'z"]
    model = write_checkpoint(tmp_path / "classes.pth", names=classes)
    for table in ("p.csv", "p.json"):
        code, out, err = run(tmp_path / "p", "--output", tmp_path / table, model=model)
        assert code == 0 and len(out.splitlines()) == len(names) and (out + err).replace("\n", "").isprintable()
    with open(tmp_path / "p.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        header, *rows = csv.reader(file)
    assert [row[0] for row in rows] == paths
    assert header[-4:] == ['a;b,c"', "'=x", "'＋y", "'z"]
    listed = json.loads((tmp_path / "p.json").read_text(encoding="utf-8"))
    assert [row["file"] for row in listed] == paths and list(listed[0])[-4:] == classes


def test_names_are_no_formulas_in_a_table(run, tmp_path, monkeypatch):
    """A spreadsheet would run what begins with =, +, - or @; a name from outside stays text."""
    path = write_checkpoint(tmp_path / "model.pth", names=["+1", "=cmd()", "sad"])
    names = ["=1+1.png", "@sum.png", "plain.png"]
    (tmp_path / "pictures").mkdir()
    for number, name in enumerate(names):
        draw_picture(number).save(tmp_path / "pictures" / name)
    monkeypatch.chdir(tmp_path / "pictures")
    code, _, err = run(*names, "--checkpoint", path, "--output", "p.csv")
    assert code == 0, err
    with open("p.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[0][-3:] == ["'+1", "'=cmd()", "sad"]
    assert [row[0] for row in rows[1:]] == ["'=1+1.png", "'@sum.png", "plain.png"]
    assert not [cell for row in rows for cell in row if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]
