"""checkpoints.py: what is saved is read back, version 1 too; any other file is one line, and runs nothing."""

import contextlib
import os
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import run_as_user
from torch import nn

import checkpoints
from checkpoints import (
    FORMAT_VERSION,
    adopt_checkpoint,
    build_model,
    make_checkpoint,
    read_checkpoint,
    replace_file,
    save_checkpoint,
)
from engine.pretrained import load_initial_weights
from errors import InputError
from inference import load_model
from models import create_model, list_archs

NAMES = ["angry", "happy", "sad"]


def tiny(names=NAMES, seed=0, arch="cnn6_rgb"):
    """A model whose file is small."""
    torch.manual_seed(seed)
    model = create_model(arch, len(names), image_size=64 if arch == "mobilenet_v2" else 32)
    model.info = replace(model.info, class_names=list(names), trained_on="faces")
    return model


def checkpoint_of(model):
    return make_checkpoint(model, epoch=3, metrics={"val_acc": 0.5}, config={"lr": 1e-3})


@pytest.fixture
def saved(tmp_path):
    """(path, checkpoint) of a model on disk."""
    checkpoint = checkpoint_of(tiny())
    save_checkpoint(checkpoint, tmp_path / "model.pth")
    return tmp_path / "model.pth", checkpoint


def one_line(caught):
    """The message of an error, which must be one printable line."""
    assert str(caught.value).isprintable()
    return str(caught.value)


def refusal(path):
    """The message with which reading and building refuse the file, which it names."""
    with pytest.raises(InputError) as caught:
        build_model(read_checkpoint(path), path)
    assert Path(path).name in one_line(caught)
    return one_line(caught)


def refusal_of(saved, **changes):
    """The message for the checkpoint with these values changed."""
    path, checkpoint = saved
    save_checkpoint({**checkpoint, **changes}, path)
    return refusal(path)


def assert_same(model, state_dict):
    for key, value in model.state_dict().items():
        assert torch.equal(value, state_dict[key]), key


@pytest.mark.parametrize("arch", list_archs())
def test_round_trip(arch, tmp_path):
    model = create_model(arch, 3, image_size=64).train()
    spec = replace(model.info.input_spec, gray=True)
    model.info = replace(model.info, class_names=NAMES, input_spec=spec, temperature=1.7, trained_on="faces")
    inputs = torch.randn(4, spec.channels, 64, 64)
    with torch.no_grad():
        model(inputs)  # batch-norm statistics that are not those of a new model
    save_checkpoint(checkpoint_of(model), tmp_path / "model.pth")
    loaded = build_model(read_checkpoint(tmp_path / "model.pth"))
    assert not loaded.training and loaded.info == model.info
    with torch.no_grad():
        assert torch.equal(loaded(inputs), model.eval()(inputs))


def test_keys_and_plain_types_only(saved):
    path, checkpoint = saved
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    info = {"arch", "num_classes", "class_names", "input_spec", "temperature", "trained_on"}
    assert set(loaded) == set(checkpoint) == info | {"format_version", "state_dict", "epoch", "metrics", "config"}

    def check(value):
        if type(value) in (dict, list):
            for part in value.values() if type(value) is dict else value:
                check(part)
        else:
            assert value is None or type(value) in (int, float, str, bool, torch.Tensor), type(value)

    check(loaded)
    assert loaded["temperature"] == 1.0 and loaded["format_version"] == FORMAT_VERSION


def test_a_file_that_names_the_weights_twice_holds_them_once(tmp_path):
    model = tiny()
    checkpoint = checkpoint_of(model)
    save_checkpoint(checkpoint, tmp_path / "once.pth")
    save_checkpoint(checkpoint | {"train_state_dict": model.state_dict()}, tmp_path / "twice.pth")
    assert (tmp_path / "twice.pth").stat().st_size < 1.2 * (tmp_path / "once.pth").stat().st_size


# Version 1


@pytest.mark.parametrize(
    "arch, last", [("cnn6_bn", 33), ("cnn6_rgb", 21), ("cnn4_bn", 20), ("cnn4", 17), ("seresnet13", 14)]
)
def test_version_1_is_read(arch, last, tmp_path):
    """It kept a scratch network as one nn.Sequential, whose layer number `last` makes the logits."""
    models = [tiny(arch=arch, seed=seed).eval() for seed in range(3)]
    layers = [nn.Sequential(*model.features, *model.classifier) for model in models]
    assert len(layers[0]) == last + 1
    old, train, ema = (sequence.state_dict() for sequence in layers)
    whole = checkpoint_of(models[0]) | {"format_version": 1, "state_dict": dict(old), "train_state_dict": train}
    torch.save(whole | {"ema": {"updates": 5, "state_dict": ema}}, tmp_path / "v1.pth")
    loaded = read_checkpoint(tmp_path / "v1.pth")
    assert loaded["format_version"] == FORMAT_VERSION and loaded["ema"]["updates"] == 5
    parts = (loaded["state_dict"], loaded["train_state_dict"], loaded["ema"]["state_dict"])
    for model, state_dict in zip(models, parts, strict=True):
        assert list(state_dict) == list(model.state_dict())
        assert_same(model, state_dict)

    torch.save(whole | {"ema": None}, tmp_path / "v1.pth")
    torch.save(old, tmp_path / "bare.pth")
    started, started_bare = tiny(arch=arch, seed=4), tiny(arch=arch, seed=4)
    assert "all weights loaded" in load_initial_weights(started, tmp_path / "v1.pth")
    assert "all weights loaded, in order" in load_initial_weights(started_bare, tmp_path / "bare.pth")
    from_api = load_model(tmp_path / "v1.pth", "cpu")[0].to(memory_format=torch.contiguous_format)
    found = [build_model(loaded), from_api, started, started_bare]
    inputs = torch.randn(2, models[0].info.input_spec.channels, 32, 32)
    with torch.no_grad():
        expected = layers[0](inputs)
        assert all(torch.equal(model.eval()(inputs), expected) for model in found)


def test_version_1_of_a_backbone_and_with_odd_parts(saved):
    path, model = saved[0], tiny(arch="mobilenet_v2")
    torch.save(checkpoint_of(model) | {"format_version": 1}, path)
    assert_same(model, build_model(read_checkpoint(path)).state_dict())  # its names were those of today
    for weights in ({}, {1: torch.zeros(1)}, {"0": 5}, {"999.weight": torch.zeros(1)}, {"0.weight": None}):
        refusal_of(saved, format_version=1, state_dict=weights, train_state_dict=5, ema={"updates": 1})


# Writing


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("failed\nto write"), KeyboardInterrupt()], ids=repr
)
def test_a_failing_write_leaves_the_old_file(saved, error):
    path, checkpoint = saved
    before = path.read_bytes()

    def write(temporary):
        temporary.write_bytes(b"half of it")
        raise error

    with pytest.raises((InputError, KeyboardInterrupt)) as caught:
        replace_file(path, write)
    assert isinstance(error, KeyboardInterrupt) or "model.pth" in one_line(caught)
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):  # torch can't save a function
        save_checkpoint({**checkpoint, "config": {"function": lambda: None}}, path)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_the_old_file_is_replaced_not_written_into(saved):
    path, checkpoint = saved
    kept = path.with_name("kept.pth")
    os.link(path, kept)
    before = kept.read_bytes()
    save_checkpoint({**checkpoint, "epoch": 4}, path)
    assert kept.read_bytes() == before and read_checkpoint(path)["epoch"] == 4
    assert sorted(os.listdir(path.parent)) == ["kept.pth", "model.pth"]


@pytest.mark.parametrize("target", ["missing/model.pth", "file/model.pth", "folder", "x" * 252 + ".pth"])
def test_a_place_that_can_not_be_written_is_one_line(target, tmp_path):
    (tmp_path / "file").write_text("a file")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError) as caught:
        save_checkpoint(checkpoint_of(tiny()), tmp_path / target)
    assert target in one_line(caught)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


# Files that are no checkpoints


class Malice:
    """Unpickles to a call that makes a file."""

    def __init__(self, touched):
        self.touched = touched

    def __reduce__(self):
        return os.system, (f"touch '{self.touched}'",)


@pytest.mark.parametrize("save", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_file_that_carries_code_is_refused_and_runs_nothing(save, whole, tmp_path):
    touched, path = tmp_path / "touched", tmp_path / "evil.pth"
    content = Malice(touched) if whole else {**checkpoint_of(tiny()), "config": {"lr": Malice(touched)}}
    if save == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=save == "zip")
    assert "code" in refusal(path)
    with pytest.raises(InputError):
        load_initial_weights(tiny(), path)
    assert not touched.exists()
    with contextlib.suppress(RuntimeError):  # torch raises it for a bare pickle after having run it
        torch.load(path, weights_only=False)  # the file is armed: read without care, it does run
    assert touched.exists()


def test_what_is_no_file(tmp_path):
    assert "no checkpoint" in refusal(tmp_path / "absent.pth")
    assert "not a file" in refusal(tmp_path)
    if hasattr(os, "mkfifo"):  # refused without waiting
        os.mkfifo(tmp_path / "pipe.pth")
        assert "not a file" in refusal(tmp_path / "pipe.pth")


@pytest.mark.parametrize(
    "content, word",
    [
        (b"", "is empty"),
        (b"\x80", "pickle"),
        *((content, "damaged") for content in (b"x", b"hello, this is no model\n" * 50, bytes(range(256)) * 20)),
        *((value, "not a checkpoint of this project") for value in (5, "text", [1, 2], {}, torch.zeros(3), {"a": 1})),
    ],
    ids=lambda value: f"{value!r:.20}",
)
def test_files_of_something_else(content, word, tmp_path):
    path = tmp_path / "other.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    assert word in refusal(path)


@pytest.mark.parametrize("damage", [0.0001, 0.01, 0.5, 0.9, 0.9999, b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"])
def test_a_damaged_archive(saved, damage):
    """Cut to a share of it, or overwritten at the first entry, the directory or the end record."""
    path, _ = saved
    content = path.read_bytes()
    if isinstance(damage, float):
        content = content[: int(damage * len(content))]
    else:
        start = content.find(damage)
        content = content[:start] + b"\xff" * 12 + content[start + 12 :]
    path.write_bytes(content)
    refusal(path)


def test_other_formats_are_told_by_their_content(tmp_path):
    onnx, safetensors = pytest.importorskip("onnx"), pytest.importorskip("safetensors.torch")
    path = tmp_path / "model.pth"
    torch.jit.script(nn.Linear(2, 2)).save(str(path))
    assert "TorchScript" in refusal(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "zip" in refusal(path)
    torch.save(tiny().state_dict(), path)
    assert "--weights" in refusal(path)
    safetensors.save_file(tiny().state_dict(), path)
    assert "name that ends in .safetensors" in refusal(path)
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", [value], [value])
    for options in ({}, {"producer_name": "pytorch"}):
        onnx.save(onnx.helper.make_model(graph, **options), path)
        assert "it is an ONNX file; give it a name that ends in .onnx" in refusal(path)


def pack_again(path, method=zipfile.ZIP_STORED, change=lambda name, content: content):
    """Writes the archive anew with its entries changed."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(name, change(name, content))


def test_a_zip_bomb_is_refused(saved):
    path, checkpoint = saved
    pack_again(path, zipfile.ZIP_DEFLATED)
    build_model(read_checkpoint(path))  # honestly compressed
    save_checkpoint({**checkpoint, "surplus": torch.zeros(2**24)}, path)
    pack_again(path, zipfile.ZIP_DEFLATED)
    assert "unpack" in refusal(path)
    with pytest.raises(InputError, match="unpack"):
        load_initial_weights(tiny(), path)


def test_a_checkpoint_saved_on_cuda_is_read_on_the_cpu(saved):
    path, checkpoint = saved
    here, there = b"X\x03\0\0\0cpu", b"X\x06\0\0\0cuda:0"

    def change(name, content):
        assert content.count(here) == name.endswith("/data.pkl")  # further tensors refer to the first one's device
        return content.replace(here, there)

    pack_again(path, change=change)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load(path, weights_only=True)
    model = build_model(read_checkpoint(path))
    assert_same(model, checkpoint["state_dict"])
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


# Checkpoints that are not right


@pytest.mark.parametrize("key", sorted(checkpoints._TYPES))
def test_missing_key_or_wrong_type(saved, key):
    path, checkpoint = saved
    save_checkpoint({name: value for name, value in checkpoint.items() if name != key}, path)
    assert repr(key) in refusal(path)
    for wrong in (None, (1, 2), torch.zeros(2)):
        assert repr(key) in refusal_of(saved, **{key: wrong})


MANY = [f"class {number}" for number in range(1_000_000)]
WRONG = [  # (what is changed, words of the message)
    *(({"format_version": version}, (repr(version), str(FORMAT_VERSION))) for version in (0, 3, "1", 1.0, True, None)),
    ({"format_version": torch.tensor([1, 2])}, ("format",)),
    *(({"class_names": names}, ("class",)) for names in ([], NAMES[:2], [*NAMES, "more"], ["sad", "happy", "happy"])),
    *(({"class_names": names}, ("class_names",)) for names in ([["a"], ["b"], ["c"]], [1, 2, 3])),
    *(({"class_names": ["angry", name, "sad"]}, ("class_names",)) for name in ("\x1b[2J", "a\nb")),
    ({"class_names": MANY, "num_classes": len(MANY)}, ("1,000,000 classes",)),
    ({"arch": "cnn9000"}, ("'cnn9000'", "cnn6_bn")),
    ({"arch": "resnet18"}, ("resnet18", "don't fit")),
    ({"arch": "\x1b[31m"}, ("arch",)),
    *(({"metrics": {"val_acc": value}}, ("metrics",)) for value in ("high", [1], None)),
    ({"metrics": {"\x1b]0;title\x07": 1.0}}, ("metrics",)),
    *(({"config": {key: 1}}, ("config",)) for key in ("\x1b[2J", 5)),
    *(({"temperature": value}, ("temperature",)) for value in (0.0, -1.0, float("nan"), float("inf"))),
    *(({"state_dict": value}, ("state_dict",)) for value in (None, [1])),
]


@pytest.mark.parametrize("change, words", WRONG, ids=lambda value: f"{value!r:.40}")
def test_values_that_are_wrong(saved, change, words):
    """They would be printed, counted or divided by."""
    message = refusal_of(saved, **change)
    assert all(word in message for word in words)


@pytest.mark.parametrize(
    "change, word",
    [
        ({"std": [0.0] * 3}, "std"),
        ({"mean": None}, "mean"),
        ({"image_size": 4}, "image_size"),
        ({"surplus": 1}, "surplus"),
        ({"image_size": 64}, "don't fit"),
        ({"channels": 1, "mean": [0.5], "std": [0.5]}, "channels"),
    ],
    ids=repr,
)
def test_input_spec_that_is_wrong(saved, change, word):
    assert word in refusal_of(saved, input_spec={**saved[1]["input_spec"], **change})


@pytest.mark.parametrize("kind", ["missing", "surplus", "wrong shape", "no tensor", "wrapped"])
def test_weights_that_do_not_fit(saved, kind):
    state_dict = dict(saved[1]["state_dict"])
    key = "surplus" if kind == "surplus" else list(state_dict)[-1]
    if kind == "missing":
        del state_dict[key]
    elif kind == "wrapped":
        state_dict = {f"module.{name}": value for name, value in state_dict.items()}
    else:
        state_dict[key] = 5 if kind == "no tensor" else torch.zeros(2, 2, 2)
    message = refusal_of(saved, state_dict=state_dict)
    assert "don't fit cnn6_rgb" in message and (key in message or kind == "wrapped")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(saved, value):
    path, checkpoint = saved
    key = next(key for key, tensor in checkpoint["state_dict"].items() if tensor.is_floating_point())
    checkpoint["state_dict"][key].flatten()[0] = value
    message = refusal_of(saved)
    assert "NaN" in message and key in message
    with pytest.raises(InputError, match="NaN"):
        load_initial_weights(tiny(), path)


@pytest.fixture
def little_memory():
    """2 GiB more than the process has."""
    resource, statm = pytest.importorskip("resource"), Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("needs Linux's /proc")
    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(statm.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2**31, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("arch", ["cnn4", "cnn6_bn"])
def test_no_model_is_allocated_that_the_file_does_not_hold(arch, tmp_path, little_memory):
    checkpoint = checkpoint_of(tiny(arch=arch))
    checkpoint["input_spec"]["image_size"] = 2048  # 32 GiB
    assert "size mismatch" in refusal_of((tmp_path / "model.pth", checkpoint))


def test_weights_of_a_few_numbers_expanded_to_any_size(tmp_path, little_memory):
    with torch.device("meta"):
        shapes = create_model("cnn6_bn", 3, image_size=2048).state_dict()
    path, checkpoint = tmp_path / "model.pth", checkpoint_of(tiny(arch="cnn6_bn"))
    checkpoint["input_spec"]["image_size"] = 2048
    expanded = {key: torch.zeros((), dtype=value.dtype).expand(value.shape) for key, value in shapes.items()}
    for weights in (expanded, shapes):
        assert "larger than what is stored" in refusal_of((path, checkpoint), state_dict=weights)
        assert path.stat().st_size < 100_000


# Another tool's weights


def test_another_tools_weights_that_can_not_be_adopted(saved):
    path, _ = saved
    torch.save({"state_dict": tiny().state_dict()}, path.with_name("bare.pth"))
    assert_same(tiny(), adopt_checkpoint(path.with_name("bare.pth"), "cnn6_rgb", NAMES)["state_dict"])
    torch.save({"a": 1}, path.with_name("none.pth"))
    for name, arch, class_names, word in [
        ("bare.pth", "cnn6_rgb", "abc", "class_names"),
        ("bare.pth", "cnn6_rgb", [1, 2, 3], "class_names"),
        ("bare.pth", "cnn6_rgb", ["a", "a", "b"], "bare.pth"),
        ("bare.pth", "cnn9000", NAMES, "cnn9000"),
        ("none.pth", "cnn6_rgb", NAMES, "none.pth holds no state_dict"),
        ("model.pth", "cnn6_rgb", NAMES, "model.pth is a checkpoint"),
    ]:
        with pytest.raises(InputError) as caught:
            adopt_checkpoint(path.with_name(name), arch, class_names)
        assert word in one_line(caught)


# Permissions, as an ordinary user


def test_files_without_permission():
    code = """
        import io, os, pathlib, torch
        from checkpoints import read_checkpoint, replace_file

        buffer = io.BytesIO()
        torch.save({}, buffer)  # torch imports a part of itself only now
        torch.load(io.BytesIO(buffer.getvalue()))
        become_user()
        closed = pathlib.Path("closed")
        closed.mkdir()
        for name in ("model.pth", "closed/model.pth", "forbidden.pth"):
            torch.save({"some": "thing"}, name)

        def attempt(function, *arguments):
            try:
                function(*arguments)
            except Exception as error:
                print(type(error).__name__, str(error).replace("|", " "), end="|")

        pathlib.Path("forbidden.pth").chmod(0)
        closed.chmod(0o555)
        attempt(read_checkpoint, "model.pth")
        attempt(read_checkpoint, "forbidden.pth")
        attempt(replace_file, "closed/model.pth", lambda path: path.write_text("new"))
        print(*os.listdir(closed), torch.load("closed/model.pth"), end="|")
        closed.chmod(0)
        attempt(read_checkpoint, "closed/model.pth")
        closed.chmod(0o755)
    """
    lines = readable, forbidden, write, rest, unreachable = run_as_user(code).split("|")[:5]
    assert all(line.startswith("InputError ") and line.isprintable() for line in lines if line is not rest)
    assert "not a checkpoint of this project" in readable
    assert "no permission" in forbidden and "forbidden.pth" in forbidden
    assert "can't write" in write and "model.pth" in write
    assert rest == "model.pth {'some': 'thing'}"
    assert "model.pth" in unreachable
