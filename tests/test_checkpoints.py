import contextlib
import os
import pickle
import zipfile
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
    load_initial_weights,
    make_checkpoint,
    read_checkpoint,
    replace_file,
    save_checkpoint,
)
from errors import InputError
from models import create_model, list_archs

NAMES = ["angry", "happy", "sad"]


def tiny(num_classes=3, seed=0, arch="cnn6_rgb", **options):
    """A network of a small file."""
    torch.manual_seed(seed)
    return create_model(arch, num_classes, image_size=64 if arch == "mobilenet_v2" else 32, **options)


def checkpoint_of(model, names=NAMES):
    return make_checkpoint(model, names, trained_on="faces", epoch=3, metrics={"val_acc": 0.5}, config={"lr": 1e-3})


@pytest.fixture
def saved(tmp_path):
    """(path, checkpoint) of a network on disk."""
    checkpoint = checkpoint_of(tiny())
    save_checkpoint(checkpoint, tmp_path / "model.pth")
    return tmp_path / "model.pth", checkpoint


def refusal(path):
    """The message with which reading and building refuse the file: one line that names it."""
    with pytest.raises(InputError) as caught:
        build_model(read_checkpoint(path), path)
    message = str(caught.value)
    assert "\n" not in message and Path(path).name in message
    return message


@pytest.mark.parametrize("arch", list_archs())
def test_round_trip(arch, tmp_path):
    torch.manual_seed(3)
    model = create_model(arch, 3, image_size=64)
    model.train()
    spec = model.input_spec
    inputs = torch.randn(4, spec.channels, 64, 64)
    with torch.no_grad():
        model(inputs)  # batch-norm statistics that are not those of a new network
    save_checkpoint(checkpoint_of(model), tmp_path / "model.pth")
    loaded = build_model(read_checkpoint(tmp_path / "model.pth"))
    assert not loaded.training
    assert (loaded.arch, loaded.num_classes, loaded.class_names) == (arch, 3, NAMES)
    assert (loaded.input_spec, loaded.temperature, loaded.trained_on) == (spec, 1.0, "faces")
    with torch.no_grad():
        assert torch.equal(loaded(inputs), model.eval()(inputs))


def test_keys_and_plain_types_only(saved):
    path, checkpoint = saved
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    assert (
        set(loaded)
        == set(checkpoint)
        == {
            "format_version",
            "arch",
            "num_classes",
            "class_names",
            "input_spec",
            "temperature",
            "trained_on",
            "state_dict",
            "epoch",
            "metrics",
            "config",
        }
    )

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


def test_gray_spec_and_temperature_survive(saved):
    path, checkpoint = saved
    checkpoint["input_spec"]["gray"], checkpoint["temperature"] = True, 1.7
    save_checkpoint(checkpoint, path)
    model = build_model(read_checkpoint(path))
    assert model.input_spec.gray and model.temperature == 1.7


# Writing


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("failed\nto write")])
def test_a_failing_write_leaves_the_old_file(saved, error):
    path, _ = saved
    before = path.read_bytes()

    def write(temporary):
        temporary.write_bytes(b"half of it")
        raise error

    with pytest.raises(InputError) as caught:
        replace_file(path, write)
    assert "model.pth" in str(caught.value) and "\n" not in str(caught.value)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("error", [KeyboardInterrupt, pickle.PicklingError])
def test_an_interrupted_write_leaves_the_old_file(saved, error):
    path, _ = saved
    before = path.read_bytes()

    def write(temporary):
        temporary.write_bytes(b"half of it")
        raise error

    with pytest.raises(error):
        replace_file(path, write)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_what_torch_cannot_write_leaves_the_old_file(saved):
    path, checkpoint = saved
    before = path.read_bytes()
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
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
    assert target in str(caught.value) and "\n" not in str(caught.value)
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
    with contextlib.suppress(RuntimeError):  # of a bare pickle torch says so after having run it
        torch.load(path, weights_only=False)  # the file is armed: read without care, it does run
    assert touched.exists()


def test_absent_and_folder(tmp_path):
    assert "no checkpoint" in refusal(tmp_path / "absent.pth")
    assert "not a file" in refusal(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_named_pipe_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    assert "not a file" in refusal(tmp_path / "pipe.pth")


@pytest.mark.parametrize("content", [b"", b"x", b"\x80", b"hello, this is no network\n" * 50, bytes(range(256)) * 20])
def test_foreign_bytes(content, tmp_path):
    (tmp_path / "foreign.pth").write_bytes(content)
    message = refusal(tmp_path / "foreign.pth")
    assert ("empty" in message) == (content == b"")


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.5, 0.9, 0.9999])
def test_truncated(saved, share):
    path, _ = saved
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refusal(path)


@pytest.mark.parametrize("where", ["first entry", "directory", "end record"])
def test_damaged_archive(saved, where):
    path, _ = saved
    content = bytearray(path.read_bytes())
    start = {"first entry": 0, "directory": content.rfind(b"PK\x01\x02"), "end record": content.rfind(b"PK\x05\x06")}
    content[start[where] : start[where] + 12] = b"\xff" * 12
    path.write_bytes(content)
    refusal(path)


def test_torchscript(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "script.pth"))
    assert "TorchScript" in refusal(tmp_path / "script.pth")


def test_an_onnx_file_is_told_as_one(tmp_path):
    onnx = pytest.importorskip("onnx")
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", [value], [value])
    for number, options in enumerate(({}, {"producer_name": "pytorch"})):
        onnx.save(onnx.helper.make_model(graph, **options), tmp_path / f"{number}.pth")
        assert "ONNX file" in refusal(tmp_path / f"{number}.pth") and ".onnx" in refusal(tmp_path / f"{number}.pth")


def test_a_safetensors_file_is_told_as_one(tmp_path):
    pytest.importorskip("safetensors.torch").save_file(tiny().state_dict(), tmp_path / "weights.pth")
    assert "name that ends in .safetensors" in refusal(tmp_path / "weights.pth")


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
        assert content.count(here) == name.endswith("/data.pkl")  # further tensors refer to the first one's place
        return content.replace(here, there)

    pack_again(path, change=change)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load(path, weights_only=True)
    model = build_model(read_checkpoint(path))
    assert_same(model, checkpoint["state_dict"])
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_zip_of_something_else(tmp_path):
    with zipfile.ZipFile(tmp_path / "zip.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "zip" in refusal(tmp_path / "zip.pth")


@pytest.mark.parametrize("content", [5, "text", [1, 2], {}, torch.zeros(3), {"a": 1}])
def test_other_saved_values(content, tmp_path):
    torch.save(content, tmp_path / "other.pth")
    assert "not a checkpoint of this project" in refusal(tmp_path / "other.pth")
    with pytest.raises(InputError) as caught:
        load_initial_weights(tiny(), tmp_path / "other.pth")
    assert "\n" not in str(caught.value)


def test_bare_state_dict_is_sent_to_weights(tmp_path):
    torch.save(tiny().state_dict(), tmp_path / "bare.pth")
    assert "--weights" in refusal(tmp_path / "bare.pth")


# Checkpoints that are not right


@pytest.mark.parametrize("version", [0, FORMAT_VERSION + 1, "1", None])
def test_other_format_version(saved, version):
    path, checkpoint = saved
    save_checkpoint({**checkpoint, "format_version": version}, path)
    message = refusal(path)
    assert repr(version) in message and str(FORMAT_VERSION) in message


@pytest.mark.parametrize("key", sorted(set(checkpoints._TYPES) - {"format_version"}))
def test_missing_key_or_wrong_type(saved, key):
    path, checkpoint = saved
    save_checkpoint({name: value for name, value in checkpoint.items() if name != key}, path)
    assert repr(key) in refusal(path)
    for wrong in (None, (1, 2), torch.zeros(2)):
        save_checkpoint({**checkpoint, key: wrong}, path)
        assert repr(key) in refusal(path)


@pytest.mark.parametrize("names", [[], NAMES[:2], [*NAMES, "more"], ["angry", "happy", "happy"]])
def test_class_names_that_do_not_fit_their_count(saved, names):
    path, checkpoint = saved
    save_checkpoint({**checkpoint, "class_names": names}, path)
    assert "class" in refusal(path)


@pytest.mark.parametrize("names", [[["a"], ["b"], ["c"]], [1, 2, 3]], ids=["lists", "numbers"])
def test_class_names_that_are_no_text(saved, names):
    path, checkpoint = saved
    save_checkpoint({**checkpoint, "class_names": names}, path)
    assert "class_names" in refusal(path)


def test_unknown_arch(saved):
    path, checkpoint = saved
    save_checkpoint({**checkpoint, "arch": "cnn9000"}, path)
    message = refusal(path)
    assert "'cnn9000'" in message and "cnn6_bn" in message


def test_another_arch_than_the_weights(saved):
    path, checkpoint = saved
    save_checkpoint({**checkpoint, "arch": "resnet18"}, path)
    assert "resnet18" in refusal(path)


@pytest.mark.parametrize("kind", ["missing", "surplus", "wrong shape", "no tensor"])
def test_weights_that_do_not_fit(saved, kind):
    path, checkpoint = saved
    state_dict = dict(checkpoint["state_dict"])
    key = list(state_dict)[-1]
    if kind == "missing":
        del state_dict[key]
    else:
        name = "surplus" if kind == "surplus" else key
        state_dict[name] = 5 if kind == "no tensor" else torch.zeros(2, 2, 2)
    save_checkpoint({**checkpoint, "state_dict": state_dict}, path)
    message = refusal(path)
    assert "don't fit cnn6_rgb" in message and ("surplus" if kind == "surplus" else key) in message


def test_keys_of_a_wrapped_network_are_refused(saved):
    path, checkpoint = saved
    wrapped = {f"module.{key}": value for key, value in checkpoint["state_dict"].items()}
    save_checkpoint({**checkpoint, "state_dict": wrapped}, path)
    assert "don't fit" in refusal(path)


def test_image_size_of_another_network(saved):
    path, checkpoint = saved
    checkpoint["input_spec"]["image_size"] = 64
    save_checkpoint(checkpoint, path)
    assert "don't fit" in refusal(path)


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
def test_no_network_is_allocated_that_the_file_does_not_hold(arch, saved, little_memory):
    path, _ = saved
    checkpoint = checkpoint_of(tiny(arch=arch))
    checkpoint["input_spec"]["image_size"] = 2048  # 32 GiB
    save_checkpoint(checkpoint, path)
    assert "size mismatch" in refusal(path)


def test_weights_of_a_few_numbers_stretched_to_any_size(saved, little_memory):
    path, _ = saved
    with torch.device("meta"):
        shapes = create_model("cnn6_bn", 3, image_size=2048).state_dict()
    checkpoint = checkpoint_of(tiny(arch="cnn6_bn"))
    checkpoint["input_spec"]["image_size"] = 2048
    stretched = {key: torch.zeros((), dtype=value.dtype).expand(value.shape) for key, value in shapes.items()}
    for weights in (stretched, shapes):
        save_checkpoint({**checkpoint, "state_dict": weights}, path)
        assert path.stat().st_size < 100_000
        assert "larger than what is stored" in refusal(path)


@pytest.mark.parametrize("change", [{"image_size": 4}, {"std": [0.0] * 3}, {"mean": None}, {"surplus": 1}], ids=repr)
def test_broken_input_spec_names_the_file(saved, change):
    path, checkpoint = saved
    save_checkpoint({**checkpoint, "input_spec": {**checkpoint["input_spec"], **change}}, path)
    refusal(path)


def test_input_spec_with_other_channels_than_the_network(saved):
    path, checkpoint = saved
    spec = {"image_size": 32, "channels": 1, "mean": [0.5], "std": [0.5], "gray": False}
    save_checkpoint({**checkpoint, "input_spec": spec}, path)
    assert "channels" in refusal(path)


# Starting weights


def assert_same(model, state_dict):
    for key, value in model.state_dict().items():
        assert torch.equal(value, state_dict[key]), key


class EmotionCNN(nn.Module):
    """S3's network under S3's names."""

    def __init__(self, num_classes):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1)
        self.conv3, self.conv4 = nn.Conv2d(64, 128, 3, padding=1), nn.Conv2d(128, 128, 3, padding=1)
        self.pool, self.fc1, self.fc2 = nn.MaxPool2d(2), nn.Linear(4608, 1024), nn.Linear(1024, num_classes)

    def forward(self, x):
        x = self.pool(self.conv2(self.conv1(x).relu()).relu())
        x = self.pool(self.conv4(self.pool(self.conv3(x).relu())).relu())
        return self.fc2(self.fc1(x.flatten(1)).relu())


def test_weights_under_other_names_are_taken_in_order(tmp_path):
    torch.manual_seed(0)
    theirs, inputs = EmotionCNN(5).eval(), torch.randn(3, 1, 48, 48)
    torch.save(theirs.state_dict(), tmp_path / "s3.pth")
    names = ["a", "b", "c", "d", "e"]
    model = build_model(adopt_checkpoint(tmp_path / "s3.pth", "cnn4", names))
    torch.testing.assert_close(model(inputs), theirs(inputs))
    start = create_model("cnn4", 5).eval()
    line = load_initial_weights(start, tmp_path / "s3.pth")
    assert "all weights loaded, in order" in line
    torch.testing.assert_close(start(inputs), theirs(inputs))
    other = create_model("cnn4", 2)
    assert "but the last layer" in load_initial_weights(other, tmp_path / "s3.pth")
    assert torch.equal(other[0].weight, theirs.conv1.weight)


def test_weights_under_other_names_and_in_another_order_are_refused(tmp_path):
    state_dict = EmotionCNN(5).state_dict()
    torch.save(dict(sorted(state_dict.items())), tmp_path / "sorted.pth")  # bias before weight
    with pytest.raises(InputError) as caught:
        build_model(adopt_checkpoint(tmp_path / "sorted.pth", "cnn4", ["a", "b", "c", "d", "e"]), "sorted.pth")
    assert "sorted.pth" in str(caught.value) and "cnn4" in str(caught.value)


@pytest.mark.parametrize("kind", ["checkpoint", "state_dict"])
@pytest.mark.parametrize("arch", ["cnn6_rgb", "cnn6_bn", "mobilenet_v2"])
def test_all_weights_of_an_equal_network(kind, arch, tmp_path):
    old, new = tiny(arch=arch, seed=1), tiny(arch=arch, seed=2)
    torch.save(checkpoint_of(old) if kind == "checkpoint" else old.state_dict(), tmp_path / "old.pth")
    line = load_initial_weights(new, tmp_path / "old.pth")
    assert_same(new, old.state_dict())
    assert "all weights" in line and "old.pth" in line and "\n" not in line


@pytest.mark.parametrize("kind", ["checkpoint", "state_dict"])
@pytest.mark.parametrize("arch", ["cnn6_rgb", "cnn4_bn", "mobilenet_v2"])
def test_other_number_of_classes_replaces_the_last_layer(kind, arch, tmp_path):
    old, new = tiny(3, 1, arch), tiny(5, 2, arch)
    before = {key: value.clone() for key, value in new.state_dict().items()}
    torch.save(checkpoint_of(old) if kind == "checkpoint" else old.state_dict(), tmp_path / "old.pth")
    line = load_initial_weights(new, tmp_path / "old.pth")
    last = list(before)[-2:]  # weight and bias
    for key, value in new.state_dict().items():
        assert torch.equal(value, before[key] if key in last else old.state_dict()[key]), key
    assert "last layer" in line and "[3, " in line and "[5, " in line and "\n" not in line


def test_another_arch_is_refused_and_loads_nothing(saved):
    path, _ = saved
    model = tiny(arch="cnn4_bn")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(InputError) as caught:
        load_initial_weights(model, path)
    message = str(caught.value)
    assert "--weights" in message and "cnn6_rgb" in message and "cnn4_bn" in message and "\n" not in message
    assert_same(model, before)


@pytest.mark.parametrize("arch", ["cnn6_rgb", "mobilenet_v2"])
@pytest.mark.parametrize(
    "content",
    [{}, {"other.weight": torch.zeros(2)}, {1: torch.zeros(2)}, {"a": 1}, {"state_dict": {}}, 5],
    ids=["empty", "other", "numbered", "numbers", "nested", "number"],
)
def test_weights_that_are_of_nothing(arch, content, tmp_path):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(InputError) as caught:
        load_initial_weights(tiny(arch=arch), tmp_path / "other.pth")
    assert "\n" not in str(caught.value)


def test_weights_at_another_image_size_are_refused(tmp_path):
    save_checkpoint(checkpoint_of(tiny(arch="cnn4_bn")), tmp_path / "model.pth")
    with pytest.raises(InputError, match="--weights") as caught:
        load_initial_weights(create_model("cnn4_bn", 3, image_size=64), tmp_path / "model.pth")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "layout",
    [
        lambda weights: {"state_dict": weights, "epoch": 3},
        lambda weights: {"model_state_dict": weights, "optimizer_state_dict": {"state": {}}},
        lambda weights: {"model": weights},
        lambda weights: {f"module.{key}": value for key, value in weights.items()},
        lambda weights: {"state_dict": {f"module.{key}": value for key, value in weights.items()}},
        lambda weights: {"state_dict": {f"model.{key}": value for key, value in weights.items()}},
        lambda weights: {f"_orig_mod.{key}": value for key, value in weights.items()},
    ],
)
def test_weights_in_the_layouts_of_other_tools(layout, tmp_path):
    old, new = tiny(seed=1), tiny(seed=2)
    torch.save(layout(old.state_dict()), tmp_path / "old.pth")
    assert "all weights" in load_initial_weights(new, tmp_path / "old.pth")
    assert_same(new, old.state_dict())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(saved, value):
    path, checkpoint = saved
    key = next(key for key, tensor in checkpoint["state_dict"].items() if tensor.is_floating_point())
    checkpoint["state_dict"][key].flatten()[0] = value
    save_checkpoint(checkpoint, path)
    assert "no finite numbers" in refusal(path) and key in refusal(path)


def test_a_million_classes_are_refused(saved):
    path, checkpoint = saved
    names = [f"class {number}" for number in range(1_000_000)]
    save_checkpoint(checkpoint | {"class_names": names, "num_classes": len(names)}, path)
    assert "1,000,000 classes" in refusal(path)


@pytest.mark.parametrize("metrics", [{"val_acc": "high"}, {"val_acc": [1]}, {"val_acc": None}])
def test_metrics_that_are_no_numbers_are_refused(saved, metrics):
    path, checkpoint = saved
    save_checkpoint(checkpoint | {"metrics": metrics}, path)
    assert "metrics" in refusal(path)


# Permissions, as an ordinary user


def test_files_without_permission():
    code = """
        import io, os, pathlib, torch
        from checkpoints import read_checkpoint, replace_file
        from errors import InputError

        buffer = io.BytesIO()
        torch.save({}, buffer)  # torch imports a part of itself only now
        torch.load(io.BytesIO(buffer.getvalue()))
        become_user()
        closed = pathlib.Path("closed")
        closed.mkdir()
        for name in ("model.pth", "closed/model.pth", "forbidden.pth"):
            torch.save({"some": "thing"}, name)
        pathlib.Path("forbidden.pth").chmod(0)
        closed.chmod(0o555)

        def attempt(function, *arguments):
            try:
                function(*arguments)
                print("done", end="|")
            except InputError as error:
                print(str(error).replace("|", " "), end="|")
            except Exception as error:
                print(type(error).__name__, end="|")

        attempt(read_checkpoint, "model.pth")
        attempt(read_checkpoint, "forbidden.pth")
        attempt(replace_file, "closed/model.pth", lambda path: path.write_text("new"))
        print(*os.listdir(closed), torch.load("closed/model.pth"), end="|")
        closed.chmod(0)
        attempt(read_checkpoint, "closed/model.pth")
        closed.chmod(0o755)
    """
    readable, forbidden, write, rest, unreachable = run_as_user(code).split("|")[:5]
    assert "not a checkpoint of this project" in readable
    assert "no permission" in forbidden and "forbidden.pth" in forbidden
    assert "can't write" in write and "model.pth" in write
    assert rest == "model.pth {'some': 'thing'}"
    assert "model.pth" in unreachable and "\n" not in unreachable


@pytest.mark.parametrize(
    "change",
    [
        {"metrics": {"\x1b]0;title\x07": 1.0}},
        {"config": {"\x1b[2J": 1}},
        {"config": {5: 1}},
        {"arch": "\x1b[31m"},
        {"temperature": 0.0},
        {"temperature": float("nan")},
        {"temperature": -1.0},
        {"temperature": float("inf")},
        {"class_names": ["angry", "\x1b[2J", "sad"]},
        {"class_names": ["angry", "a\nb", "sad"]},
    ],
)
def test_what_would_be_printed_or_divided_by_is_checked(saved, change):
    path, checkpoint = saved
    save_checkpoint(checkpoint | change, path)
    assert "\x1b" not in refusal(path)


def test_weights_for_training_that_are_no_numbers_are_refused(saved):
    path, checkpoint = saved
    next(iter(checkpoint["state_dict"].values())).fill_(float("nan"))
    save_checkpoint(checkpoint, path)
    with pytest.raises(InputError, match="no finite numbers"):
        load_initial_weights(tiny(), path)
