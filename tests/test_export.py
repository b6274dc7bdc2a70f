"""export_emotion.py and export/: every format gives the model's probabilities, also without this project."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import PORTRAIT, REPO, assert_refused, draw_folder, draw_image, full_disk, refusal, run
from PIL import Image
from test_predict import NAMES, write_checkpoint
from torch import nn

import evaluate_emotion
import predict_emotion
from export.formats import FORMATS, Deployed, write_torchscript
from export_emotion import main, pick_formats
from inference import BUNDLED, load_model, predict_image, predict_images
from preprocessing import read_image

for package in ("onnx", "onnxscript", "onnxruntime", "safetensors"):
    pytest.importorskip(package, reason=f"needs {package}")
FILES = [file for file, _, _ in FORMATS.values()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with model.pth, all that is exported of it, and images in data/."""
    root = tmp_path_factory.mktemp("exported")
    write_checkpoint(root / "model.pth", temperature=1.7)
    code, out, err = run(main, "--checkpoint", root / "model.pth", "--output-dir", root)
    assert code == 0, err
    assert {path.name for path in root.iterdir()} == {"model.pth", *FILES, "config.json"}
    for file, line in zip(FILES, out.splitlines(), strict=False):
        assert line.startswith(f"{file}: ") and line.endswith("over 256 images of noise")
    for split in ("train", "Test"):
        draw_folder(root / "data" / split, dict.fromkeys(NAMES, 4))
    return root


def assert_same_predictions(model, other, images):
    names = model.info.class_names
    assert other.info.class_names == names
    for expected, found in zip(predict_images(model, images, names), predict_images(other, images, names), strict=True):
        assert expected[0] == found[0] and found[2] == pytest.approx(expected[2], abs=0.01)


@pytest.mark.parametrize("file", FILES)
def test_exported_file_is_used_like_a_checkpoint(folder, file, tmp_path):
    exported, _ = load_model(folder / file, trust=True)
    assert_same_predictions(load_model(folder / "model.pth")[0], exported, [draw_image(seed) for seed in range(5)])
    tables, reports = [], []
    for words in (["--checkpoint", folder / "model.pth"], ["--checkpoint", folder / file, "--trust"]):
        assert run(predict_emotion.main, folder / "data", "--output", tmp_path / "p.json", *words)[0] == 0
        tables.append(json.loads((tmp_path / "p.json").read_text()))
        code, out, err = run(evaluate_emotion.main, "--data-dir", folder / "data", "--tta", *words)
        assert code == 0 and "12" in out, err
        reports.append(out)
    code, out, err = run(predict_emotion.main, "--info", *words)
    assert code == 0 and "cnn4_bn" in out and "temperature 1.7" in out, err
    assert reports[0] == reports[1]
    assert [row["emotion"] for row in tables[0]] == [row["emotion"] for row in tables[1]]
    assert [row["happy"] for row in tables[1]] == pytest.approx([row["happy"] for row in tables[0]], abs=0.01)


WITHOUT_THE_PROJECT = """
import importlib.util, json, numpy, onnxruntime, torch

assert importlib.util.find_spec("models") is None
session, images = onnxruntime.InferenceSession("emotion_model.onnx"), numpy.load("images.npy")
files, infos = {"emotion.json": ""}, [session.get_modelmeta().custom_metadata_map["emotion.json"]]
script = torch.jit.load("emotion_model.pt", _extra_files=files)
infos.append(files["emotion.json"])
program = torch.export.load("emotion_model.pt2", extra_files=files).module()
infos.append(files["emotion.json"])
for part in (images[:1], images[:2], images):
    found = session.run(["probs"], {"images": part})[0], script(torch.tensor(part)), program(torch.tensor(part))
    print(json.dumps([probs.tolist() for probs in found]))
print(json.dumps([json.loads(info) for info in infos]))
"""


def test_exported_files_run_without_this_project(folder):
    """uint8 images in, probabilities out, for one, two and seven at a time."""
    model, _ = load_model(folder / "model.pth")
    images = np.stack([read_image(draw_image(seed), model.info.input_spec) for seed in range(7)])
    np.save(folder / "images.npy", images)
    command = [sys.executable, "-I", "-W", "ignore", "-c", WITHOUT_THE_PROJECT]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    *found, infos = map(json.loads, done.stdout.splitlines())
    expected = torch.softmax(model((torch.from_numpy(images).float() / 255 - 0.5) / 0.5) / 1.7, 1).detach().numpy()
    for count, formats in zip((1, 2, 7), found, strict=True):
        assert np.abs(np.array(formats) - expected[:count]).max() < 1e-4
    for info in infos:
        assert (info["class_names"], info["arch"], info["temperature"]) == (NAMES, "cnn4_bn", 1.7)
        assert info["input_spec"] == model.info.input_spec.to_dict() and info["format_version"] == 2
        assert "/home/me" not in str(info) and info["config"]["epochs"] == 4  # no folder of the machine


@pytest.mark.parametrize(
    ("arch", "options", "name", "data_dir", "split"),
    [
        ("cnn6_rgb", {"gray": True}, "onnx", "data", "Test"),
        ("mobilenet_v2", {"image_size": 64}, "torchscript", "data/train", "train"),
    ],
)
def test_other_networks(folder, tmp_path, arch, options, name, data_dir, split):
    """Three channels, trained on gray images or on color ones, whose files take three also of gray folders."""
    model, file = write_checkpoint(tmp_path / "model.pth", arch=arch, **options), tmp_path / FORMATS[name][0]
    words = ["--output-dir", tmp_path, "--data-dir", folder / data_dir, "--formats", f"{name},{name}"]
    code, out, err = run(main, "--checkpoint", model, *words)
    assert code == 0 and f"256 images, 12 of {split}/ and noise" in out and out.count("MB") == 1, err
    models = [load_model(path, trust=True)[0] for path in (model, file)]
    assert_same_predictions(*models, [PORTRAIT, draw_image(1, mode="RGB")])
    words = ["--data-dir", folder / "data", "--trust", "--checkpoint"]
    assert run(evaluate_emotion.main, *words, model) == run(evaluate_emotion.main, *words, file)


def test_files_of_version_1_are_read_and_exported_anew(tmp_path):
    """It kept a scratch network as one nn.Sequential: "17.weight" was of the first linear layer of cnn4_bn."""
    from safetensors.torch import load_file, save_file

    model, _ = load_model(write_checkpoint(tmp_path / "model.pth"))
    old = nn.Sequential(*model.features, *model.classifier).state_dict()
    checkpoint = torch.load(tmp_path / "model.pth", weights_only=True)
    info = {key: value for key, value in checkpoint.items() if key != "state_dict"} | {"format_version": 1}
    torch.save(info | {"state_dict": old}, tmp_path / "v1.pth")
    save_file({key: value.contiguous() for key, value in old.items()}, tmp_path / "v1.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(info))
    write_torchscript(Deployed(model), info, tmp_path / "v1.pt")
    images, out = [draw_image(seed) for seed in range(3)], tmp_path / "out"
    for name in ("v1.pt", "v1.pth", "v1.safetensors"):
        assert_same_predictions(model, load_model(tmp_path / name, trust=True)[0], images)
    assert run(main, "--checkpoint", tmp_path / "v1.pth", "--output-dir", out, "--formats", "safetensors")[0] == 0
    assert json.loads((out / "config.json").read_text())["format_version"] == 2
    assert load_file(out / "emotion_model.safetensors").keys() == model.state_dict().keys()
    assert_same_predictions(model, load_model(out / "emotion_model.safetensors")[0], images)


def test_int8_is_smaller_and_measured(tmp_path):
    """The bundled model on drawings; but first calibrated on black images, which ruins it."""
    model, names = load_model(BUNDLED)
    for name in names:
        for place, count in (("good/train", 6), ("good/val", 12), ("black/train", 6), ("black/val", 12)):
            (tmp_path / place / name).mkdir(parents=True)
            for path in sorted((REPO / "test" / name).iterdir())[:count]:
                image = Image.new("L", (48, 48)) if place == "black/train" else Image.open(path)
                image.save(tmp_path / place / name / path.name)
    out = tmp_path / "out"
    words = ["--checkpoint", BUNDLED, "--int8", "--output-dir", out, "--formats", "onnx", "--data-dir"]
    assert_refused(main, [*words, tmp_path / "black"], "--max-drop")
    assert [path.name for path in out.iterdir()] == ["emotion_model.onnx"]  # the float32 model is kept
    code, printed, err = run(main, *words, tmp_path / "good", "--max-drop", 5)
    assert code == 0, err
    sizes = {path.name: path.stat().st_size for path in out.iterdir()}
    assert sizes.keys() == {"emotion_model.onnx", "emotion_model.int8.onnx"}
    assert sizes["emotion_model.int8.onnx"] < sizes["emotion_model.onnx"] / 3
    lines = [line for line in printed.splitlines() if "accuracy" in line]
    original, quantized = (float(line.partition("accuracy ")[2].partition("%")[0]) for line in lines)
    assert original > 25 and abs(original - quantized) <= 5
    int8, _ = load_model(out / "emotion_model.int8.onnx", trust=True)
    assert predict_image(int8, PORTRAIT, names)[0] == predict_image(model, PORTRAIT, names)[0]


def test_nothing_of_others_is_overwritten(folder, tmp_path, monkeypatch):
    words = ["--checkpoint", folder / "model.pth", "--output-dir", tmp_path, "--formats", "safetensors"]
    (tmp_path / "config.json").write_text('{"port": 80}')
    assert_refused(main, words, "config.json")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("config.json", '{"port": 80}')]
    monkeypatch.chdir(tmp_path)
    shutil.copy(folder / "model.pth", "emotion_model.pt")  # a checkpoint may be called .pt
    assert load_model("emotion_model.pt")[1] == NAMES
    assert_refused(main, ["--checkpoint", "emotion_model.pt", "--formats", "torchscript"], "--output-dir")
    assert (tmp_path / "emotion_model.pt").read_bytes() == (folder / "model.pth").read_bytes()


@pytest.mark.parametrize("name", FORMATS)
def test_a_full_disk_is_named_and_leaves_nothing(name, folder, tmp_path):
    words = ["--checkpoint", folder / "model.pth", "--output-dir", tmp_path, "--formats", name]
    with full_disk(1_000_000):
        assert_refused(main, words, "can't be written: File too large")
    assert list(tmp_path.iterdir()) == []


def test_other_probabilities_leave_no_file_but_an_earlier_one(folder, tmp_path, monkeypatch):
    def write_wrong(deployed, info, path):
        wrong = Deployed(deployed.model)
        wrong.info = replace(wrong.info, temperature=2.5)
        write_torchscript(wrong, info, path)

    monkeypatch.setitem(FORMATS, "torchscript", ("emotion_model.pt", (), write_wrong))
    (tmp_path / "emotion_model.pt").write_bytes(b"earlier")
    words = ["--checkpoint", folder / "model.pth", "--output-dir", tmp_path, "--formats", "torchscript"]
    assert_refused(main, words, "other probabilities")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("emotion_model.pt", b"earlier")]


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # as if it were not installed
    assert pick_formats(None, needs_onnx=False) == ["torchscript", "torch_export", "safetensors"]
    assert capsys.readouterr().out == "onnx is left out: pip install onnxscript\n"
    for text, needs_onnx in (("onnx", False), (None, True)):
        assert "pip install onnxscript" in refusal(pick_formats, text, needs_onnx=needs_onnx)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--formats", "tflite"], ["--formats", "tflite"]),
        (["--int8"], ["--data-dir"]),
        (["--int8", "--data-dir", "nowhere", "--formats", "torchscript"], ["onnx"]),
        (["--data-dir", "nowhere"], ["nowhere"]),
        (["--int8", "--data-dir", "data", "--max-drop", "-1"], ["--max-drop"]),
        (["--checkpoint", "emotion_model.onnx"], ["emotion_model.onnx", "exported"]),
    ],
)
def test_mistakes_are_one_line(folder, tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(folder)
    assert_refused(main, ["--checkpoint", "model.pth", "--output-dir", tmp_path / "out", *args], *words)
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["cut", "empty", "text", "missing"])
def test_damaged_files_are_one_line(folder, tmp_path, file, damage):
    target, content = tmp_path / file, (folder / file).read_bytes()
    shutil.copy(folder / "config.json", tmp_path)
    if damage != "missing":
        target.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "text": b"<html>"}[damage])
    assert_refused(predict_emotion.main, [PORTRAIT, "--trust", "--checkpoint", target], file)


def test_foreign_files_are_one_line(folder, tmp_path):
    """Of another program, without its config, of a later version, or whose metadata promise a fourth class."""
    import onnx

    torch.jit.save(torch.jit.trace(nn.ReLU(), torch.ones(1)), tmp_path / "foreign.pt")
    assert "export_emotion.py" in refusal(load_model, tmp_path / "foreign.pt", trust=True)
    lone = shutil.copy(folder / "emotion_model.safetensors", tmp_path / "lone.safetensors")
    assert "config.json" in refusal(load_model, lone)
    info = json.loads((folder / "config.json").read_text())
    for content, word in ((info | {"format_version": 3}, "format 3"), ([1], "export_emotion.py")):
        (tmp_path / "config.json").write_text(json.dumps(content))
        assert word in refusal(load_model, lone)
    program = onnx.load(folder / "emotion_model.onnx")
    info |= {"num_classes": 4, "class_names": [*NAMES, "surprise"]}
    onnx.helper.set_model_props(program, {"emotion.json": json.dumps(info)})
    onnx.save(program, tmp_path / "emotion_model.onnx")
    assert "4 classes" in refusal(load_model, tmp_path / "emotion_model.onnx", trust=True)


def test_what_an_exported_file_can_not_do(folder):
    words = [PORTRAIT, "--checkpoint", folder / "emotion_model.onnx", "--trust", "--device", "cuda"]
    assert_refused(predict_emotion.main, words, "--device cuda")
    assert "its own arch" in refusal(load_model, folder / "emotion_model.onnx", arch="cnn4_bn", class_names=NAMES)
    for file in ("emotion_model.pt", "emotion_model.pt2", "emotion_model.onnx"):  # they run code, or loops without end
        assert_refused(predict_emotion.main, [PORTRAIT, "--checkpoint", folder / file], "--trust")
