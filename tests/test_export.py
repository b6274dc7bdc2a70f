"""export_emotion.py: every format answers as the network does, also where this project can't be imported."""

import contextlib
import io
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PORTRAIT, draw_folder, draw_picture
from PIL import Image
from test_predict import write_checkpoint

import evaluate_emotion
import export_emotion
import predict_emotion
from console import run_script
from export import formats as exporting
from export.formats import FORMATS
from predict_emotion import load_model, predict_image, predict_images
from preprocessing import read_image

for package in ("onnx", "onnxscript", "onnxruntime", "safetensors"):
    pytest.importorskip(package, reason=f"needs {package}")

REPO = Path(__file__).resolve().parent.parent
NAMES = ["angry", "happy", "sad"]
FILES = [file for file, _, _ in FORMATS.values()]


@pytest.fixture
def run(capsys):
    def run_main(module, *args):
        with pytest.raises(SystemExit) as stop:
            run_script(lambda: module.main([*map(str, args)]))
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return run_main


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(folder with model.pth, whose temperature is 1.7, and all that is exported of it, what was printed)."""
    root, printed = tmp_path_factory.mktemp("exported"), io.StringIO()
    write_checkpoint(root / "model.pth", names=NAMES, temperature=1.7)
    with contextlib.redirect_stdout(printed):
        export_emotion.main(["--checkpoint", str(root / "model.pth"), "--output-dir", str(root)])
    assert {path.name for path in root.iterdir()} == {"model.pth", *FILES, "config.json"}
    return root, printed.getvalue()


@pytest.fixture(scope="module")
def folder(exported):
    """That folder, with pictures: data/test/<class>/ and data/train/<class>/."""
    draw_folder(exported[0] / "data" / "test", dict.fromkeys(NAMES, 4))
    draw_folder(exported[0] / "data" / "train", dict.fromkeys(NAMES, 4))
    return exported[0]


def test_every_format_is_written_and_compared(exported):
    lines = exported[1].splitlines()
    assert [line.partition(":")[0] for line in lines[:4]] == FILES
    for line in lines[:4]:
        assert line.endswith("over 256 pictures of noise")
        assert float(line.partition("probability ")[2].split()[0]) <= 1e-4


@pytest.mark.parametrize("file", FILES)
def test_exported_file_is_used_like_a_checkpoint(run, folder, file, tmp_path):
    model, names = load_model(folder / "model.pth")
    exported, exported_names = load_model(folder / file, trust=True)
    pictures = [draw_picture(seed) for seed in range(5)]
    assert names == exported_names
    for expected, found in zip(
        predict_images(model, pictures, names), predict_images(exported, pictures, names), strict=True
    ):
        assert expected[0] == found[0]
        assert found[2] == pytest.approx(expected[2], abs=0.01)
    assert predict_image(exported, pictures[0], names)[1] == pytest.approx(
        predict_image(model, pictures[0], names)[1], abs=0.01
    )
    trust = ["--trust"] if file.endswith((".pt", ".pt2")) else []
    rows = []
    for name, more in (("model.pth", []), (file, trust)):
        words = ("--checkpoint", folder / name, *more)
        code, _, err = run(predict_emotion, folder / "data", "--output", tmp_path / "p.json", *words)
        assert code == 0, err
        rows.append(json.loads((tmp_path / "p.json").read_text()))
        code, out, err = run(evaluate_emotion, "--data-dir", folder / "data", "--tta", *words)
        assert code == 0 and "12 pictures" in out, err
        rows[-1].append({"report": out})
        code, out, err = run(predict_emotion, "--info", *words)
        assert code == 0 and "cnn4_bn" in out and "temperature 1.7" in out, err
    *expected, report = rows[0]
    *found, same_report = rows[1]
    assert report == same_report
    assert [row["emotion"] for row in expected] == [row["emotion"] for row in found]
    assert [row["happy"] for row in found] == pytest.approx([row["happy"] for row in expected], abs=0.01)


BARE = {
    "onnx": """
        import onnxruntime
        session = onnxruntime.InferenceSession("emotion_model.onnx")
        info = json.loads(session.get_modelmeta().custom_metadata_map["emotion.json"])
        run = lambda images: session.run(["probs"], {"images": images})[0]
    """,
    "torchscript": """
        import torch
        files = {"emotion.json": ""}
        program = torch.jit.load("emotion_model.pt", _extra_files=files)
        info = json.loads(files["emotion.json"])
        run = lambda images: program(torch.from_numpy(images)).numpy()
    """,
    "torch_export": """
        import torch
        files = {"emotion.json": ""}
        program = torch.export.load("emotion_model.pt2", extra_files=files).module()
        info = json.loads(files["emotion.json"])
        run = lambda images: program(torch.from_numpy(images)).numpy()
    """,
}


@pytest.mark.parametrize("name", BARE)
def test_exported_file_runs_without_this_project(folder, name):
    """Pictures as raw uint8 in, probabilities out, for one, two and seven at a time."""
    model, _ = load_model(folder / "model.pth")
    images = np.stack([read_image(draw_picture(seed), model.input_spec) for seed in range(7)])
    np.save(folder / "images.npy", images)
    code = (
        "import json, numpy, sys\n"
        + textwrap.dedent(BARE[name])
        + textwrap.dedent("""
        try:
            import models
        except ImportError:
            images = numpy.load("images.npy")
            probs = [run(images[:count]).tolist() for count in (1, 2, 7)]
            print(json.dumps([info, probs]))
    """)
    )
    done = subprocess.run(
        [sys.executable, "-I", "-W", "ignore", "-c", code], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    info, probs = json.loads(done.stdout)
    expected = torch.softmax(model((torch.from_numpy(images).float() / 255 - 0.5) / 0.5) / 1.7, 1).detach().numpy()
    for count, found in zip((1, 2, 7), probs, strict=True):
        assert np.abs(np.array(found) - expected[:count]).max() < 1e-4
    assert info["class_names"] == NAMES and info["arch"] == "cnn4_bn" and info["temperature"] == 1.7
    assert info["input_spec"] == model.input_spec.to_dict() and info["format_version"] == 1


@pytest.mark.parametrize("arch", ["cnn6_rgb", "mobilenet_v2"])
def test_other_networks(run, folder, tmp_path, arch):
    """Three channels trained on gray pictures; a torchvision backbone, of colours, whose files eat three channels also
    of gray folders, which are kept with one."""
    options = {"gray": True} if arch == "cnn6_rgb" else {"image_size": 64}
    write_checkpoint(tmp_path / "model.pth", arch=arch, names=NAMES, **options)
    words = ("--checkpoint", tmp_path / "model.pth", "--output-dir", tmp_path, "--data-dir", folder / "data")
    code, out, err = run(export_emotion, *words, "--formats", "onnx,torchscript,safetensors")
    assert code == 0, err
    model, names = load_model(tmp_path / "model.pth")
    exported, _ = load_model(tmp_path / "emotion_model.onnx")
    for picture in (PORTRAIT, draw_picture(1, mode="RGB")):
        expected, found = (predict_image(one, picture, names)[2] for one in (model, exported))
        assert found == pytest.approx(expected, abs=0.01)
    reports = []
    for name in ("model.pth", "emotion_model.onnx"):
        code, out, err = run(evaluate_emotion, "--data-dir", folder / "data", "--checkpoint", tmp_path / name)
        assert code == 0, err
        reports.append(out)
    assert reports[0] == reports[1]


def test_pictures_of_the_user_are_compared(run, folder, tmp_path):
    words = ("--checkpoint", folder / "model.pth", "--output-dir", tmp_path, "--formats", "torchscript")
    code, out, err = run(export_emotion, *words, "--data-dir", folder / "data")
    assert code == 0 and "256 pictures, 12 of test/ and noise" in out, err


def test_config_of_another_program_stays(run, folder, tmp_path):
    (tmp_path / "config.json").write_text('{"port": 80}')
    words = ("--checkpoint", folder / "model.pth", "--output-dir", tmp_path, "--formats", "safetensors")
    code, _, err = run(export_emotion, *words)
    assert code == 2 and "config.json" in err and err.count("\n") == 1
    assert (tmp_path / "config.json").read_text() == '{"port": 80}' and len(list(tmp_path.iterdir())) == 1


def test_the_checkpoint_is_not_written_over(run, folder, tmp_path, monkeypatch):
    content = (folder / "model.pth").read_bytes()
    (tmp_path / "emotion_model.pt").write_bytes(content)
    monkeypatch.chdir(tmp_path)
    code, _, err = run(export_emotion, "--checkpoint", "emotion_model.pt", "--formats", "torchscript")
    assert code == 2 and "--output-dir" in err and err.count("\n") == 1
    assert (tmp_path / "emotion_model.pt").read_bytes() == content and len(list(tmp_path.iterdir())) == 1


def test_what_is_exported_names_no_folder_of_the_machine(run, tmp_path):
    write_checkpoint(tmp_path / "model.pth", names=NAMES)
    checkpoint = torch.load(tmp_path / "model.pth", weights_only=True)
    torch.save(checkpoint | {"config": {"data_dir": "/home/me/faces", "epochs": 4}}, tmp_path / "model.pth")
    words = ("--checkpoint", tmp_path / "model.pth", "--output-dir", tmp_path, "--formats", "safetensors")
    assert run(export_emotion, *words)[0] == 0
    assert "/home/me" not in (tmp_path / "config.json").read_text()


def test_another_format_version_is_refused(run, folder, tmp_path):
    content = (folder / "emotion_model.safetensors").read_bytes()
    (tmp_path / "emotion_model.safetensors").write_bytes(content)
    info = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(info | {"format_version": 2}))
    code, _, err = run(predict_emotion, PORTRAIT, "--checkpoint", tmp_path / "emotion_model.safetensors")
    assert code == 2 and err.count("\n") == 1 and "format 2" in err


def test_different_answers_leave_no_file(run, folder, tmp_path, monkeypatch):
    """A file whose network was changed on the way is not kept, and an earlier one stays."""

    def write_wrong(deployed, info, path):
        wrong = exporting.Deployed(deployed.model)
        wrong.temperature = 2.5
        exporting.write_torchscript(wrong, info, path)

    monkeypatch.setitem(FORMATS, "torchscript", ("emotion_model.pt", (), write_wrong))
    (tmp_path / "emotion_model.pt").write_bytes(b"earlier")
    words = ("--checkpoint", folder / "model.pth", "--output-dir", tmp_path, "--formats", "torchscript")
    code, _, err = run(export_emotion, *words)
    assert code == 2 and err.count("\n") == 1 and "answers differently" in err
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("emotion_model.pt", b"earlier")]


def test_a_missing_package_is_named(run, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # as if it were not installed
    words = ("--checkpoint", folder / "model.pth", "--output-dir", tmp_path)
    code, out, err = run(export_emotion, *words, "--formats", "onnx")
    assert code == 2 and "pip install onnxscript" in err
    code, out, err = run(export_emotion, *words)
    assert code == 0 and "onnx is left out: pip install onnxscript" in out, err
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"emotion_model.pt", "emotion_model.pt2", "emotion_model.safetensors", "config.json"}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--formats", "tflite"], ["--formats", "tflite"]),
        (["--int8"], ["--data-dir"]),
        (["--int8", "--data-dir", "nowhere", "--formats", "torchscript"], ["onnx"]),
        (["--data-dir", "nowhere"], ["nowhere"]),
        (["--int8", "--data-dir", ".", "--max-drop", "-1"], ["--max-drop"]),
        (["--checkpoint", "emotion_model.onnx"], ["emotion_model.onnx", "exported"]),
        (["--checkpoint", "missing.pth"], ["missing.pth"]),
    ],
)
def test_mistakes_are_one_line(run, folder, tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(folder)
    code, _, err = run(export_emotion, "--checkpoint", "model.pth", "--output-dir", tmp_path / "out", *args)
    assert code == 2 and err.count("\n") == 1 and all(word in err for word in words), err
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("file", ["emotion_model.pt", "emotion_model.pt2"])
def test_files_that_carry_code_need_trust(run, folder, file):
    code, _, err = run(predict_emotion, PORTRAIT, "--checkpoint", folder / file)
    assert code == 2 and err.count("\n") == 1 and "--trust" in err
    with pytest.raises(ValueError, match="trust=True"):
        load_model(folder / file)


def test_exported_files_have_their_own_class_names(folder):
    with pytest.raises(ValueError, match="its own arch"):
        load_model(folder / "emotion_model.onnx", arch="cnn4_bn", class_names=NAMES)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["cut", "empty", "text", "missing"])
def test_damaged_files_are_one_line(run, folder, tmp_path, file, damage):
    target = tmp_path / file
    content = (folder / file).read_bytes()
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    if damage != "missing":
        target.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "text": b"<html>"}[damage])
    code, _, err = run(predict_emotion, PORTRAIT, "--trust", "--checkpoint", target)
    assert code == 2 and err.count("\n") == 1 and file in err, err


def test_foreign_and_half_files(run, folder, tmp_path):
    class Scale(torch.nn.Module):
        def forward(self, images):
            return images * 2

    torch.jit.save(torch.jit.trace(Scale(), torch.ones(1)), tmp_path / "foreign.pt")
    code, _, err = run(predict_emotion, PORTRAIT, "--trust", "--checkpoint", tmp_path / "foreign.pt")
    assert code == 2 and "foreign.pt" in err and "export_emotion.py" in err
    (tmp_path / "lone.safetensors").write_bytes((folder / "emotion_model.safetensors").read_bytes())
    code, _, err = run(predict_emotion, PORTRAIT, "--checkpoint", tmp_path / "lone.safetensors")
    assert code == 2 and err.count("\n") == 1 and "config.json" in err


def test_a_checkpoint_may_be_called_pt(folder, tmp_path):
    (tmp_path / "best.pt").write_bytes((folder / "model.pth").read_bytes())
    assert load_model(tmp_path / "best.pt")[1] == NAMES


def test_device_of_an_exported_file(run, folder):
    code, _, err = run(predict_emotion, PORTRAIT, "--checkpoint", folder / "emotion_model.onnx", "--device", "cuda")
    assert code == 2 and "--device cuda" in err


def test_int8_is_smaller_and_measured(run, tmp_path):
    """The network that comes along on the drawings; and calibrated on black pictures, which ruins it."""
    words = ("--checkpoint", REPO / "weights" / "emotion_model.pth", "--int8", "--output-dir", tmp_path, "--formats")
    code, out, err = run(export_emotion, *words, "onnx,torchscript", "--data-dir", REPO, "--max-drop", 5)
    assert code == 0, err
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert set(sizes) == {"emotion_model.onnx", "emotion_model.pt", "emotion_model.int8.onnx"}
    assert sizes["emotion_model.int8.onnx"] < sizes["emotion_model.onnx"] / 3
    lines = [line for line in out.splitlines() if "accuracy" in line]
    original, whole = (float(line.partition("accuracy ")[2].partition("%")[0]) for line in lines)
    assert original > 25 and abs(original - whole) <= 5
    quantised, names = load_model(tmp_path / "emotion_model.int8.onnx")
    model, _ = load_model(REPO / "weights" / "emotion_model.pth")
    assert predict_image(quantised, PORTRAIT, names)[0] == predict_image(model, PORTRAIT, names)[0]
    exported, _ = load_model(tmp_path / "emotion_model.onnx")
    for picture in (PORTRAIT, draw_picture(1, mode="RGB")):
        expected, found = (predict_image(one, picture, names)[2] for one in (model, exported))
        assert found == pytest.approx(expected, abs=0.01)

    for split in ("train", "test"):
        for name in names:
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for number, source in enumerate(sorted((REPO / "test" / name).iterdir())[:12]):
                picture = Image.open(source) if split == "test" else Image.new("L", (48, 48), number % 3)
                picture.save(tmp_path / "data" / split / name / f"{number}.png")
    before = sorted(path.name for path in tmp_path.iterdir())
    code, out, err = run(export_emotion, *words, "onnx", "--data-dir", tmp_path / "data")
    assert code == 2 and err.count("\n") == 1 and "--max-drop" in err, (out, err)
    assert sorted(path.name for path in tmp_path.iterdir()) == before  # the network itself is kept


def test_torch_hub(tmp_path):
    code = f"""
        import torch
        model = torch.hub.load({str(REPO)!r}, "emotion_model", source="local", device="cpu")
        print(model.arch, len(model.class_names), model.training)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["seresnet13", "7", "False"]


def test_a_file_that_gives_something_else_is_refused(run, folder, tmp_path):
    """Its metadata promise four classes, its network has three."""
    import onnx

    program = onnx.load(folder / "emotion_model.onnx")
    info = json.loads(next(prop.value for prop in program.metadata_props if prop.key == "emotion.json"))
    info |= {"num_classes": 4, "class_names": [*NAMES, "surprise"]}
    onnx.helper.set_model_props(program, {"emotion.json": json.dumps(info)})
    onnx.save(program, tmp_path / "emotion_model.onnx")
    code, _, err = run(predict_emotion, PORTRAIT, "--checkpoint", tmp_path / "emotion_model.onnx")
    assert code == 2 and err.count("\n") == 1 and "4 classes" in err
