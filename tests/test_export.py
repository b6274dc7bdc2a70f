"""export_emotion.py and export/: every format gives the model's probabilities, also without this project."""

import contextlib
import io
import json
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PORTRAIT, draw_folder, draw_image
from PIL import Image
from torch import nn

import evaluate_emotion
import export_emotion
import predict_emotion
from checkpoints import make_checkpoint, save_checkpoint
from console import run_script
from export.formats import FORMATS, Deployed, write_torchscript
from inference import load_model, predict_image, predict_images
from models import create_model, last_layer
from preprocessing import read_image

for package in ("onnx", "onnxscript", "onnxruntime", "safetensors"):
    pytest.importorskip(package, reason=f"needs {package}")

REPO = Path(__file__).resolve().parent.parent
NAMES = ["angry", "happy", "sad"]
FILES = [file for file, _, _ in FORMATS.values()]


def write_model(path, arch="cnn4_bn", gray=False, image_size=None, config=None):
    """A checkpoint with temperature 1.7 whose probabilities differ clearly from image to image."""
    torch.manual_seed(0)
    model = create_model(arch, 3, image_size=image_size)
    nn.init.normal_(last_layer(model).weight, std=2)
    spec = replace(model.info.input_spec, gray=gray)
    model.info = replace(model.info, class_names=NAMES, input_spec=spec, temperature=1.7, trained_on="faces")
    save_checkpoint(make_checkpoint(model, epoch=3, metrics={}, config=config or {}), path)
    return path


@pytest.fixture
def run(capsys):
    """Runs a script's main with these words; returns (exit code, standard output, standard error)."""

    def run_main(module, *words):
        with pytest.raises(SystemExit) as stop:
            run_script(lambda: module.main([*map(str, words)]))
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return run_main


@pytest.fixture
def refusal(run):
    """Runs a script that must stop with exit code 2; returns its one line."""

    def run_main(module, *words):
        code, _, err = run(module, *words)
        assert code == 2 and err.count("\n") == 1, err
        return err

    return run_main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with model.pth, all that is exported of it, what was printed in printed.txt, and images in data/."""
    root, printed = tmp_path_factory.mktemp("exported"), io.StringIO()
    write_model(root / "model.pth")
    with contextlib.redirect_stdout(printed):
        export_emotion.main(["--checkpoint", str(root / "model.pth"), "--output-dir", str(root)])
    assert {path.name for path in root.iterdir()} == {"model.pth", *FILES, "config.json"}
    (root / "printed.txt").write_text(printed.getvalue())
    for split in ("train", "Test"):
        draw_folder(root / "data" / split, dict.fromkeys(NAMES, 4))
    return root


def assert_same_predictions(model, other, images):
    names = model.info.class_names
    assert other.info.class_names == names
    for expected, found in zip(predict_images(model, images, names), predict_images(other, images, names), strict=True):
        assert expected[0] == found[0] and found[2] == pytest.approx(expected[2], abs=0.01)


def test_every_format_is_written_and_compared(folder):
    lines = (folder / "printed.txt").read_text().splitlines()
    assert [line.partition(":")[0] for line in lines[:4]] == FILES
    for line in lines[:4]:
        assert line.endswith("over 256 images of noise")
        assert float(line.partition("probability ")[2].split()[0]) <= 1e-4


@pytest.mark.parametrize("file", FILES)
def test_exported_file_is_used_like_a_checkpoint(run, folder, file, tmp_path):
    exported, names = load_model(folder / file, trust=True)
    assert names == NAMES
    assert_same_predictions(load_model(folder / "model.pth")[0], exported, [draw_image(seed) for seed in range(5)])
    rows, reports = [], []
    for name in ("model.pth", file):
        words = ("--checkpoint", folder / name, *["--trust"] * name.endswith((".pt", ".pt2")))
        code, _, err = run(predict_emotion, folder / "data", "--output", tmp_path / "p.json", *words)
        assert code == 0, err
        rows.append(json.loads((tmp_path / "p.json").read_text()))
        code, out, err = run(evaluate_emotion, "--data-dir", folder / "data", "--tta", *words)
        assert code == 0 and "12" in out, err
        reports.append(out)
        code, out, err = run(predict_emotion, "--info", *words)
        assert code == 0 and "cnn4_bn" in out and "temperature 1.7" in out, err
    assert reports[0] == reports[1]
    assert [row["emotion"] for row in rows[0]] == [row["emotion"] for row in rows[1]]
    assert [row["happy"] for row in rows[1]] == pytest.approx([row["happy"] for row in rows[0]], abs=0.01)


BARE = {
    "onnx": """
        import onnxruntime
        session = onnxruntime.InferenceSession("emotion_model.onnx")
        info = session.get_modelmeta().custom_metadata_map["emotion.json"]
        run = lambda images: session.run(["probs"], {"images": images})[0]
    """,
    "torchscript": """
        import torch
        files = {"emotion.json": ""}
        program = torch.jit.load("emotion_model.pt", _extra_files=files)
        info, run = files["emotion.json"], lambda images: program(torch.from_numpy(images)).numpy()
    """,
    "torch_export": """
        import torch
        files = {"emotion.json": ""}
        program = torch.export.load("emotion_model.pt2", extra_files=files).module()
        info, run = files["emotion.json"], lambda images: program(torch.from_numpy(images)).numpy()
    """,
}
THEN = """
    try:
        import models
    except ImportError:
        images = numpy.load("images.npy")
        print(json.dumps([json.loads(info), [run(images[:count]).tolist() for count in (1, 2, 7)]]))
"""


@pytest.mark.parametrize("name", BARE)
def test_exported_file_runs_without_this_project(folder, name):
    """uint8 images in, probabilities out, for one, two and seven at a time."""
    model, _ = load_model(folder / "model.pth")
    images = np.stack([read_image(draw_image(seed), model.info.input_spec) for seed in range(7)])
    np.save(folder / "images.npy", images)
    code = "import json, numpy\n" + textwrap.dedent(BARE[name]) + textwrap.dedent(THEN)
    command = [sys.executable, "-I", "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    info, probs = json.loads(done.stdout)
    expected = torch.softmax(model((torch.from_numpy(images).float() / 255 - 0.5) / 0.5) / 1.7, 1).detach().numpy()
    for count, found in zip((1, 2, 7), probs, strict=True):
        assert np.abs(np.array(found) - expected[:count]).max() < 1e-4
    assert info["class_names"] == NAMES and info["arch"] == "cnn4_bn" and info["temperature"] == 1.7
    assert info["input_spec"] == model.info.input_spec.to_dict() and info["format_version"] == 2


@pytest.mark.parametrize("arch, options", [("cnn6_rgb", {"gray": True}), ("mobilenet_v2", {"image_size": 64})])
def test_other_networks(run, folder, tmp_path, arch, options):
    """Three channels, trained on gray images or on color ones, whose files take three also of gray folders."""
    path = write_model(tmp_path / "model.pth", arch, **options)
    words = ("--checkpoint", path, "--output-dir", tmp_path, "--data-dir", folder / "data")
    code, out, err = run(export_emotion, *words, "--formats", "onnx,torchscript,safetensors")
    assert code == 0, err
    models = [load_model(tmp_path / name)[0] for name in ("model.pth", "emotion_model.onnx")]
    assert_same_predictions(*models, [PORTRAIT, draw_image(1, mode="RGB")])
    reports = []
    for name in ("model.pth", "emotion_model.onnx"):
        code, out, err = run(evaluate_emotion, "--data-dir", folder / "data", "--checkpoint", tmp_path / name)
        assert code == 0, err
        reports.append(out)
    assert reports[0] == reports[1]


def test_images_of_the_user_are_compared_and_no_folder_of_the_machine_is_named(run, folder, tmp_path):
    path = write_model(tmp_path / "model.pth", config={"data_dir": "/home/me/faces", "epochs": 4})
    words = ("--checkpoint", path, "--output-dir", tmp_path, "--formats", "safetensors,safetensors")
    for data_dir, name in ((folder / "data", "Test"), (folder / "data" / "train", "train")):
        code, out, err = run(export_emotion, *words, "--data-dir", data_dir)
        assert code == 0 and f"256 images, 12 of {name}/ and noise" in out and out.count("MB") == 1, err
    text = (tmp_path / "config.json").read_text()
    assert "/home/me" not in text and json.loads(text)["config"]["epochs"] == 4


# Files of version 1


def test_files_of_version_1_are_read_and_exported_anew(run, tmp_path):
    """It kept a scratch network as one nn.Sequential: "17.weight" was of the first linear layer of cnn4_bn."""
    from safetensors.torch import load_file, save_file

    model, _ = load_model(write_model(tmp_path / "model.pth"))
    old = nn.Sequential(*model.features, *model.classifier).state_dict()
    assert "17.weight" in old and "features.0.weight" not in old
    checkpoint = torch.load(tmp_path / "model.pth", weights_only=True)
    info = {key: value for key, value in checkpoint.items() if key != "state_dict"} | {"format_version": 1}
    torch.save(info | {"state_dict": old}, tmp_path / "v1.pth")
    save_file({key: value.contiguous() for key, value in old.items()}, tmp_path / "v1.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(info))
    write_torchscript(Deployed(model), info, tmp_path / "v1.pt")
    images = [draw_image(seed) for seed in range(3)]
    for name in ("v1.pth", "v1.safetensors", "v1.pt"):
        assert_same_predictions(model, load_model(tmp_path / name, trust=True)[0], images)
    for name in ("v1.pth", "v1.safetensors"):
        out = tmp_path / name.replace(".", "_")
        words = ("--checkpoint", tmp_path / name, "--output-dir", out, "--formats", "safetensors")
        assert run(export_emotion, *words)[0] == 0
        assert json.loads((out / "config.json").read_text())["format_version"] == 2
        assert load_file(out / "emotion_model.safetensors").keys() == model.state_dict().keys()
        assert_same_predictions(model, load_model(out / "emotion_model.safetensors")[0], images)


# What is refused


def test_nothing_of_others_is_overwritten(refusal, folder, tmp_path, monkeypatch):
    words = ("--checkpoint", folder / "model.pth", "--output-dir", tmp_path, "--formats")
    (tmp_path / "config.json").write_text('{"port": 80}')
    assert "config.json" in refusal(export_emotion, *words, "safetensors")
    assert (tmp_path / "config.json").read_text() == '{"port": 80}' and len(list(tmp_path.iterdir())) == 1
    content = (folder / "model.pth").read_bytes()
    (tmp_path / "emotion_model.pt").write_bytes(content)
    assert load_model(tmp_path / "emotion_model.pt")[1] == NAMES  # a checkpoint may be called .pt
    monkeypatch.chdir(tmp_path)
    words = ("--checkpoint", "emotion_model.pt", "--formats", "torchscript")
    assert "--output-dir" in refusal(export_emotion, *words)
    assert (tmp_path / "emotion_model.pt").read_bytes() == content and len(list(tmp_path.iterdir())) == 2


def test_other_probabilities_leave_no_file(refusal, folder, tmp_path, monkeypatch):
    """A file whose model was changed on the way is not kept, and an earlier one stays."""

    def write_wrong(deployed, info, path):
        wrong = Deployed(deployed.model)
        wrong.info = replace(wrong.info, temperature=2.5)
        write_torchscript(wrong, info, path)

    monkeypatch.setitem(FORMATS, "torchscript", ("emotion_model.pt", (), write_wrong))
    (tmp_path / "emotion_model.pt").write_bytes(b"earlier")
    words = ("--checkpoint", folder / "model.pth", "--output-dir", tmp_path, "--formats", "torchscript")
    assert "other probabilities" in refusal(export_emotion, *words)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("emotion_model.pt", b"earlier")]


def test_a_missing_package_is_named(run, refusal, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # as if it were not installed
    words = ("--checkpoint", folder / "model.pth", "--output-dir", tmp_path)
    assert "pip install onnxscript" in refusal(export_emotion, *words, "--formats", "onnx")
    code, out, err = run(export_emotion, *words)
    assert code == 0 and "onnx is left out: pip install onnxscript" in out, err
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"emotion_model.pt", "emotion_model.pt2", "emotion_model.safetensors", "config.json"}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--formats", "tflite"], ["--formats", "tflite"]),
        (["--int8"], ["--data-dir"]),
        (["--int8", "--data-dir", "data/train"], ["--data-dir", "train/"]),
        (["--int8", "--data-dir", "nowhere", "--formats", "torchscript"], ["onnx"]),
        (["--data-dir", "nowhere"], ["nowhere"]),
        (["--int8", "--data-dir", "data", "--max-drop", "-1"], ["--max-drop"]),
        (["--int8", "--data-dir", "data", "--max-drop", "nan"], ["--max-drop"]),
        (["--checkpoint", "emotion_model.onnx"], ["emotion_model.onnx", "exported"]),
        (["--checkpoint", "missing.pth"], ["missing.pth"]),
    ],
)
def test_mistakes_are_one_line(refusal, folder, tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(folder)
    err = refusal(export_emotion, "--checkpoint", "model.pth", "--output-dir", tmp_path / "out", *args)
    assert all(word in err for word in words), err
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["cut", "empty", "text", "missing"])
def test_damaged_files_are_one_line(refusal, folder, tmp_path, file, damage):
    target, content = tmp_path / file, (folder / file).read_bytes()
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    if damage != "missing":
        target.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "text": b"<html>"}[damage])
    assert file in refusal(predict_emotion, PORTRAIT, "--trust", "--checkpoint", target)


def test_foreign_files_are_one_line(refusal, folder, tmp_path):
    """Of another program, without its config, of a later version, or whose metadata promise a fourth class."""
    import onnx

    class Scale(nn.Module):
        def forward(self, images):
            return images * 2

    def refusal_of(name):
        return refusal(predict_emotion, PORTRAIT, "--trust", "--checkpoint", tmp_path / name)

    torch.jit.save(torch.jit.trace(Scale(), torch.ones(1)), tmp_path / "foreign.pt")
    err = refusal_of("foreign.pt")
    assert "foreign.pt" in err and "export_emotion.py" in err
    (tmp_path / "lone.safetensors").write_bytes((folder / "emotion_model.safetensors").read_bytes())
    assert "config.json" in refusal_of("lone.safetensors")
    info = json.loads((folder / "config.json").read_text())
    for content, word in ((info | {"format_version": 3}, "format 3"), ([1], "export_emotion.py")):
        (tmp_path / "config.json").write_text(json.dumps(content))
        assert word in refusal_of("lone.safetensors")
    program = onnx.load(folder / "emotion_model.onnx")
    info |= {"num_classes": 4, "class_names": [*NAMES, "surprise"]}
    onnx.helper.set_model_props(program, {"emotion.json": json.dumps(info)})
    onnx.save(program, tmp_path / "emotion_model.onnx")
    assert "4 classes" in refusal_of("emotion_model.onnx")


def test_what_an_exported_file_can_not_do(refusal, folder):
    words = ("--checkpoint", folder / "emotion_model.onnx", "--device", "cuda")
    assert "--device cuda" in refusal(predict_emotion, PORTRAIT, *words)
    with pytest.raises(ValueError, match="its own arch"):
        load_model(folder / "emotion_model.onnx", arch="cnn4_bn", class_names=NAMES)
    for file in ("emotion_model.pt", "emotion_model.pt2"):  # they can carry code
        assert "--trust" in refusal(predict_emotion, PORTRAIT, "--checkpoint", folder / file)
        with pytest.raises(ValueError, match="trust=True"):
            load_model(folder / file)


# Quantization and torch.hub


def test_int8_is_smaller_and_measured(run, refusal, tmp_path):
    """The bundled model on the drawings; and calibrated on black images, which ruins it."""
    words = ("--checkpoint", REPO / "weights" / "emotion_model.pth", "--int8", "--output-dir", tmp_path, "--formats")
    code, out, err = run(export_emotion, *words, "onnx,torchscript", "--data-dir", REPO, "--max-drop", 5)
    assert code == 0, err
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert set(sizes) == {"emotion_model.onnx", "emotion_model.pt", "emotion_model.int8.onnx"}
    assert sizes["emotion_model.int8.onnx"] < sizes["emotion_model.onnx"] / 3
    lines = [line for line in out.splitlines() if "accuracy" in line]
    original, quantized = (float(line.partition("accuracy ")[2].partition("%")[0]) for line in lines)
    assert original > 25 and abs(original - quantized) <= 5
    model, names = load_model(REPO / "weights" / "emotion_model.pth")
    int8, _ = load_model(tmp_path / "emotion_model.int8.onnx")
    assert predict_image(int8, PORTRAIT, names)[0] == predict_image(model, PORTRAIT, names)[0]
    assert_same_predictions(model, load_model(tmp_path / "emotion_model.onnx")[0], [PORTRAIT, draw_image(1)])

    for split in ("train", "Validation"):
        for name in names:
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for number, source in enumerate(sorted((REPO / "test" / name).iterdir())[:12]):
                image = Image.open(source) if split != "train" else Image.new("L", (48, 48), number % 3)
                image.save(tmp_path / "data" / split / name / f"{number}.png")
    before = sorted(path.name for path in tmp_path.iterdir())
    assert "--max-drop" in refusal(export_emotion, *words, "onnx", "--data-dir", tmp_path / "data")
    assert sorted(path.name for path in tmp_path.iterdir()) == before  # the float32 model is kept


def test_torch_hub_from_another_folder(tmp_path):
    code = f"""
        import torch
        model = torch.hub.load({str(REPO)!r}, "emotion_model", source="local", device="cpu")
        print(model.info.arch, len(model.info.class_names), model.training)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["seresnet13", "7", "False"]
