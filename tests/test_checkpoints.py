"""checkpoints.py: what is saved is read back, version 1 too; any other file is one line, and runs nothing."""

import codecs
import contextlib
import os
import pickle
import reprlib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import refusal
from torch import nn

import checkpoints
from checkpoints import adopt_checkpoint, build_model, make_checkpoint, read_checkpoint, replace_file, save_checkpoint
from engine.pretrained import load_initial_weights
from models import create_model

NAMES, LAST = ["angry", "happy", "sad"], "classifier.2.bias"


def tiny(names=NAMES, seed=0, arch="cnn6_rgb"):
    torch.manual_seed(seed)
    model = create_model(arch, len(names), image_size=64 if arch in ("mobilenet_v2", "resnet18") else 32)
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


def file_refusal(path):
    message = refusal(lambda: build_model(read_checkpoint(path), path))
    assert path.name in message
    return message


def refusal_of(saved, **changes):
    path, checkpoint = saved
    save_checkpoint({**checkpoint, **changes}, path)
    return file_refusal(path)


def assert_same(model, state_dict):
    for key, value in model.state_dict().items():
        assert torch.equal(value, state_dict[key]), key


def test_round_trip(tmp_path):
    model = tiny(arch="cnn4_bn").train()
    spec = replace(model.info.input_spec, gray=True)
    model.info = replace(model.info, input_spec=spec, temperature=1.7)
    save_checkpoint(checkpoint_of(model), tmp_path / "model.pth")
    odd = {"weights": "we\u00a0ights.pth", "teacher": ["\u3000", os.fsdecode(b"\xff")]}  # as names of files may be
    save_checkpoint(checkpoint_of(model) | {"config": odd}, tmp_path / "model.pth")
    assert read_checkpoint(tmp_path / "model.pth")["config"] == odd
    loaded = build_model(read_checkpoint(tmp_path / "model.pth"))
    assert not loaded.training and loaded.info == model.info
    assert_same(loaded, model.state_dict())


@pytest.mark.parametrize("arch, last", dict(cnn6_bn=33, cnn6_rgb=21, cnn4_bn=20, cnn4=17, seresnet13=14).items())
def test_version_1_is_read(arch, last, tmp_path):
    """It kept a scratch network as one nn.Sequential, whose layer number `last` makes the logits."""
    models = [tiny(arch=arch, seed=seed).eval() for seed in range(3)]
    layers = [nn.Sequential(*model.features, *model.classifier) for model in models]
    assert len(layers[0]) == last + 1
    old, train, ema = (sequence.state_dict() for sequence in layers)
    parts = {"state_dict": old, "train_state_dict": train, "ema": {"updates": 5, "state_dict": ema}}
    torch.save(checkpoint_of(models[0]) | parts | {"format_version": 1}, tmp_path / "v1.pth")
    loaded = read_checkpoint(tmp_path / "v1.pth")
    assert loaded["format_version"] == 2 and loaded["ema"]["updates"] == 5
    parts = (loaded["state_dict"], loaded["train_state_dict"], loaded["ema"]["state_dict"])
    for model, state_dict in zip(models, parts, strict=True):
        assert list(state_dict) == list(model.state_dict())
        assert_same(model, state_dict)


def test_version_1_of_a_backbone_and_with_odd_parts(saved):
    path, model = saved[0], tiny(arch="mobilenet_v2")
    torch.save(checkpoint_of(model) | {"format_version": 1}, path)
    assert_same(model, build_model(read_checkpoint(path)).state_dict())  # its names were those of today
    for weights in ({}, {1: torch.zeros(1)}, {"0": 5}, {"999.weight": torch.zeros(1)}, {"0.weight": None}):
        refusal_of(saved, format_version=1, state_dict=weights, train_state_dict=5, ema={"updates": 1})


@pytest.mark.parametrize("error", [OSError(28, "full"), RuntimeError("not\nwritten"), KeyboardInterrupt()], ids=repr)
def test_a_failing_write_leaves_the_old_file(saved, error):
    path, checkpoint = saved
    before = path.read_bytes()

    def write(temporary):
        temporary.write_bytes(b"half of it")
        raise error

    if isinstance(error, Exception):
        assert "model.pth" in refusal(replace_file, path, write)
    else:
        with pytest.raises(KeyboardInterrupt):
            replace_file(path, write)
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):  # torch can't save a function
        save_checkpoint({**checkpoint, "config": {"function": lambda: None}}, path)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


@pytest.mark.skipif(os.name != "posix", reason="flushes folders")
def test_what_is_written_outlives_a_power_cut(saved, monkeypatch):
    """The content is flushed before it gets its name, and the name after that."""
    calls, fsync, replace_name = [], os.fsync, os.replace

    def keep_fsync(number):
        calls.append(("flush", os.path.realpath(f"/proc/self/fd/{number}")))
        fsync(number)

    def keep_replace(source, target):
        calls.append(("move", str(source), str(target)))
        replace_name(source, target)

    monkeypatch.setattr(os, "fsync", keep_fsync)
    monkeypatch.setattr(os, "replace", keep_replace)
    path, checkpoint = saved
    save_checkpoint(checkpoint, path)
    temporary = calls[0][1]
    assert calls == [("flush", temporary), ("move", temporary, str(path)), ("flush", str(path.parent))]


class Malice:
    """Unpickles to a call that makes a file in the current folder."""

    def __reduce__(self):
        return os.system, ("touch touched",)


@pytest.mark.parametrize("save", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_file_that_carries_code_is_refused_and_runs_nothing(save, whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pth"
    content = Malice() if whole else {**checkpoint_of(tiny()), "config": {"lr": Malice()}}
    if save == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=save == "zip")
    assert "code" in file_refusal(path) and "code" in refusal(load_initial_weights, tiny(), path)
    assert os.listdir() == ["evil.pth"]
    with contextlib.suppress(RuntimeError):  # torch raises it for a bare pickle after having run it
        torch.load(path, weights_only=False)  # the file is armed: read without care, it does run
    assert sorted(os.listdir()) == ["evil.pth", "touched"]


@pytest.mark.skipif(os.name != "posix", reason="makes a pipe")
def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")  # refused without waiting
    for name, words in (("absent.pth", "no checkpoint"), ("", "not a file"), ("pipe.pth", "not a file")):
        assert words in file_refusal(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "word"),
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
    assert word in file_refusal(path)


@pytest.mark.parametrize("damage", [0.0001, 0.01, 0.5, 0.9, 0.9999, b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"])
def test_a_damaged_archive(saved, damage):
    """Cut to a share of it, or overwritten at the first entry, the directory or the end record."""
    path, _ = saved
    content = path.read_bytes()
    if isinstance(damage, float):
        path.write_bytes(content[: int(damage * len(content))])
    else:
        start = content.find(damage)
        path.write_bytes(content[:start] + b"\xff" * 12 + content[start + 12 :])
    file_refusal(path)


def test_other_formats_are_told_by_their_content(tmp_path):
    onnx, safetensors = pytest.importorskip("onnx"), pytest.importorskip("safetensors.torch")
    path = tmp_path / "model.pth"
    torch.jit.script(nn.Linear(2, 2)).save(str(path))
    assert "TorchScript" in file_refusal(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "zip" in file_refusal(path)
    safetensors.save_file(tiny().state_dict(), path)
    assert "name that ends in .safetensors" in file_refusal(path)
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", [value], [value])
    for options in ({}, {"producer_name": "pytorch"}):
        onnx.save(onnx.helper.make_model(graph, **options), path)
        assert "it is an ONNX file; give it a name that ends in .onnx" in file_refusal(path)


def pack_again(path, method=zipfile.ZIP_STORED, change=lambda name, content: content):
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(name, change(name, content))


def test_a_file_takes_no_more_memory_than_it_is_large(saved):
    """Not by compression, not by two names that torch does not tell apart, not by what makes memory of a number."""
    path, checkpoint = saved
    save_checkpoint({**checkpoint, "surplus": torch.zeros(2**20)}, path)
    pack_again(path, zipfile.ZIP_DEFLATED)
    assert "compressed" in file_refusal(path) and "compressed" in refusal(load_initial_weights, tiny(), path)
    save_checkpoint(checkpoint, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/DATA.pkl", b"")
    assert "a name twice" in file_refusal(path)

    class Greedy:
        def __init__(self, kind):
            self.kind = kind

        def __reduce__(self):
            return self.kind, (10**12,)

    for kind in (bytearray, torch.UntypedStorage, torch.Tensor, torch.FloatTensor, codecs.encode):
        for zipped in (True, False):
            torch.save({**checkpoint, "surplus": Greedy(kind)}, path, _use_new_zipfile_serialization=zipped)
            assert kind.__name__ in file_refusal(path)
    torch.save({**checkpoint, "surplus": torch.zeros(12_345)}, path, _use_new_zipfile_serialization=False)
    build_model(read_checkpoint(path))  # the format of torch before 1.6
    content, old, new = path.read_bytes(), (12_345).to_bytes(2, "little"), (2**31 - 1).to_bytes(4, "little")
    assert content.count(b"M" + old) == 2  # elements of the storage, then of the tensor
    path.write_bytes(content.replace(b"M" + old, b"J" + new, 1))
    assert "no checkpoint" in file_refusal(path)


def test_a_checkpoint_saved_on_cuda_is_read_on_the_cpu(saved):
    path, checkpoint = saved
    here, there = b"X\x03\0\0\0cpu", b"X\x06\0\0\0cuda:0"

    def change(name, content):
        assert content.count(here) == name.endswith("/data.pkl")  # further tensors refer to the first one's device
        return content.replace(here, there)

    pack_again(path, change=change)
    model = build_model(read_checkpoint(path))
    assert_same(model, checkpoint["state_dict"])
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


@pytest.mark.parametrize("key", checkpoints._SCHEMA)
def test_missing_key_or_wrong_type(saved, key):
    path, checkpoint = saved
    save_checkpoint({name: value for name, value in checkpoint.items() if name != key}, path)
    assert key in file_refusal(path)
    for wrong in (None, (1, 2), torch.zeros(2), 10**400, float("nan"), [[[]]]):
        assert key in refusal_of(saved, **{key: wrong})


SHARED = [[]]
for _ in range(60):  # few lists in the file, 2**60 as a tree
    SHARED = [SHARED, SHARED]
MANY = [f"class {number}" for number in range(10_001)]
WRONG = [  # (what is changed, words of the message)
    *(({"format_version": version}, (repr(version), str(2))) for version in (0, 3, "1", 1.0, True, None)),
    *(
        ({"format_version": SHARED, "config": {"lr": SHARED}, "input_spec": {"mean": SHARED}} | good, words)
        for good, words in (
            ({}, ("format",)),
            ({"format_version": 2}, ("mean",)),
            ({"format_version": 2, "input_spec": {}}, ("config",)),
        )
    ),
    ({"format_version": torch.tensor([1, 2])}, ("format",)),
    *(({"class_names": names}, ("class",)) for names in ([], NAMES[:2], [*NAMES, "more"], ["sad", "happy", "happy"])),
    *(({"input_spec": {"mean": value}}, ("mean",)) for value in (10**400, [1e30] * 3, [torch.zeros(2)] * 3, "abc")),
    *(({"input_spec": {key: torch.ones(2)}}, (key,)) for key in ("image_size", "channels", "gray")),
    *(({"config": {"lr": value}}, ("config",)) for value in (float("inf"), 10**400, {}, [1], torch.zeros(1))),
    *(({"class_names": ["angry", name, "sad"]}, ("class_names",)) for name in (2, "\x1b[2J", "a\nb")),
    ({"class_names": MANY, "num_classes": len(MANY)}, ("10,000",)),
    ({"arch": "cnn9000"}, ("'cnn9000'", "cnn6_bn")),
    ({"arch": "resnet18"}, ("resnet18", "don't fit")),
    ({"arch": "\x1b[31m"}, ("arch",)),
    *(({"metrics": {"val_acc": value}}, ("metrics",)) for value in ("high", [1], None, float("nan"), 2**60)),
    *(({part: {key: 1}}, (part,)) for part in ("metrics", "config") for key in ("\x1b[2J", 5)),
    *(({"temperature": value}, ("temperature",)) for value in (0.0, -1.0, 1e-300, float("inf"))),
    ({"state_dict": [1]}, ("state_dict",)),
    ({"input_spec": {"std": [0.0] * 3}}, ("std",)),
    ({"input_spec": {"image_size": 64}}, ("don't fit",)),
    ({"input_spec": {"channels": 1, "mean": [0.5], "std": [0.5]}}, ("channels",)),
]


@pytest.mark.parametrize(("change", "words"), WRONG, ids=lambda value: reprlib.repr(value)[:40])
def test_values_that_are_wrong(saved, change, words):
    spec = saved[1]["input_spec"] | change.get("input_spec", {})
    message = refusal_of(saved, **change | {"input_spec": spec})
    assert all(word in message for word in words)


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        (LAST, None, "fit"),
        ("surplus", torch.zeros(1), "fit"),
        (LAST, torch.zeros(2, 2, 2), "fit"),
        (LAST, 5, "fit"),
        *((LAST, torch.tensor([0, 0, float(value)]), "NaN") for value in ("nan", "inf")),
        ("features.0.running_var", torch.tensor([1.0, -1.0, 1.0]), "negative"),
    ],
)
def test_weights_that_do_not_fit(saved, key, value, word):
    weights = saved[1]["state_dict"] | {key: value}
    if value is None:
        del weights[key]
    message = refusal_of(saved, state_dict=weights)
    assert key in message and word in message
    assert word in refusal(load_initial_weights, tiny(), saved[0])


def test_no_model_is_allocated_that_the_file_does_not_hold(tmp_path):
    """Not even with weights of a few numbers, expanded to any size, or of none."""
    resource, statm = pytest.importorskip("resource"), Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("needs Linux's /proc")
    path, checkpoint = tmp_path / "model.pth", checkpoint_of(tiny(arch="cnn6_bn"))
    checkpoint["input_spec"]["image_size"] = 2048  # 32 GiB
    with torch.device("meta"):
        shapes = create_model("cnn6_bn", 3, image_size=2048).state_dict()  # which torch.save keeps as shapes alone
    expanded = {key: torch.zeros((), dtype=value.dtype).expand(value.shape) for key, value in shapes.items()}
    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(statm.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2**31, before[1]))
    try:
        assert "size mismatch" in refusal_of((path, checkpoint))
        for weights, words in ((expanded, "larger than what is stored"), (shapes, "_rebuild_meta_tensor")):
            assert words in refusal_of((path, checkpoint), state_dict=weights)
            assert path.stat().st_size < 100_000
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_another_tools_weights_that_can_not_be_adopted(saved, tmp_path):
    torch.save({"state_dict": tiny().state_dict()}, tmp_path / "bare.pth")
    torch.save({"a": 1}, tmp_path / "none.pth")
    for class_names, word in (("abc", "class_names"), ([1, 2, 3], "class_names"), (["a", "a", "b"], "bare.pth")):
        assert word in refusal(adopt_checkpoint, tmp_path / "bare.pth", "cnn6_rgb", class_names)
    assert "cnn9000" in refusal(adopt_checkpoint, tmp_path / "bare.pth", "cnn9000", NAMES)
    assert "none.pth holds no state_dict" in refusal(adopt_checkpoint, tmp_path / "none.pth", "cnn6_rgb", NAMES)
    assert "model.pth is a checkpoint" in refusal(adopt_checkpoint, saved[0], "cnn6_rgb", NAMES)
