"""engine/pretrained.py: weights to start from, and stages that stay frozen."""

import pytest
import torch
from conftest import refusal
from test_checkpoints import NAMES, assert_same, checkpoint_of, tiny
from torch import nn

from checkpoints import adopt_checkpoint, build_model, save_checkpoint
from engine import pretrained
from engine.pretrained import freeze, list_stages, load_imagenet_weights, load_initial_weights, train_mode
from models import create_model, last_layer_name


def copy_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("kind", ["checkpoint", "state_dict"])
@pytest.mark.parametrize("arch", ["cnn6_rgb", "mobilenet_v2"])
@pytest.mark.parametrize("names", [NAMES, ["a", "b", "c"], list("abcde")], ids=["same", "renamed", "more"])
def test_the_last_layer_is_loaded_if_its_classes_are_the_same(kind, arch, names, tmp_path):
    """Of a bare state_dict, which has no class names, if there are as many."""
    old, new = tiny(arch=arch, seed=1), tiny(names, arch=arch, seed=2)
    before, loaded, last = copy_of(new), old.state_dict(), last_layer_name(new)
    torch.save(checkpoint_of(old) if kind == "checkpoint" else loaded, tmp_path / "old.pth")
    line = load_initial_weights(new, tmp_path / "old.pth")
    is_whole = names == NAMES or (kind == "state_dict" and len(names) == 3)
    kept = () if is_whole else {f"{last}.weight", f"{last}.bias"}
    assert_same(new, {key: before[key] if key in kept else loaded[key] for key in before})
    assert "old.pth: all weights" in line and "\n" not in line and ("last layer" not in line) == is_whole
    assert is_whole or ("[3, " in line and f"[{len(names)}, " in line)


def test_weights_under_other_names_are_taken_in_order(tmp_path):
    theirs, model, other = (create_model("cnn4", count) for count in (3, 3, 2))
    renamed = {f"layer{number}": value for number, value in enumerate(theirs.state_dict().values())}
    torch.save(renamed, path := tmp_path / "s3.pth")
    assert_same(build_model(adopt_checkpoint(path, "cnn4", NAMES)), theirs.state_dict())
    assert "all weights loaded, in order" in load_initial_weights(model, path)
    assert_same(model, theirs.state_dict())
    assert "but the last layer's, in order" in load_initial_weights(other, path)
    assert torch.equal(other.features[0].weight, theirs.features[0].weight)
    torch.save(dict(reversed(renamed.items())), path)
    assert "s3.pth doesn't fit --arch cnn4" in refusal(load_initial_weights, model, path)


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod."])
@pytest.mark.parametrize("name", ["state_dict", "model_state_dict", "model", None])
def test_weights_in_the_layouts_of_other_tools(name, prefix, tmp_path):
    old, new = tiny(seed=1), tiny(seed=2)
    weights = {prefix + key: value for key, value in old.state_dict().items()}
    torch.save({name: weights, "epoch": 3, "optimizer": {"state": {}}} if name else weights, tmp_path / "old.pth")
    assert load_initial_weights(new, tmp_path / "old.pth").endswith("all weights loaded")
    assert_same(new, old.state_dict())


def test_checkpoints_that_do_not_fit_are_refused(tmp_path):
    path, model = tmp_path / "model.pth", tiny(arch="cnn4_bn")
    save_checkpoint(checkpoint_of(tiny()), path)
    message = refusal(load_initial_weights, model, path)
    assert "--weights" in message and "cnn6_rgb" in message and "cnn4_bn" in message
    checkpoint = checkpoint_of(tiny(["a", "b", "c"], arch="cnn4_bn"))
    del checkpoint["state_dict"][f"{last_layer_name(model)}.weight"]  # which other classes would not take anyway
    save_checkpoint(checkpoint, path)
    assert "model.pth doesn't fit" in refusal(load_initial_weights, model, path)


@pytest.mark.parametrize("arch", ["cnn6_rgb", "mobilenet_v2"])
@pytest.mark.parametrize("content", [{}, {"a.weight": torch.zeros(2)}, {1: torch.zeros(2)}, {"a": 1}, 5], ids=repr)
def test_files_that_hold_no_weights_for_it(arch, content, tmp_path):
    model = tiny(arch=arch)
    before = copy_of(model)
    torch.save(content, tmp_path / "other.pth")
    assert "--weights" in refusal(load_initial_weights, model, tmp_path / "other.pth")
    assert_same(model, before)


def imagenet_file(arch, path):
    """A file such as torchvision's: a plain state_dict with a head for 1000 classes."""
    from torchvision.models import get_model

    state_dict = get_model(arch, weights=None).state_dict()
    torch.save(state_dict, path)
    return state_dict


@pytest.mark.parametrize(("arch", "head"), [("resnet18", "fc."), ("mobilenet_v2", "classifier.")])
def test_weights_of_torchvision_go_under_the_head(arch, head, tmp_path):
    state_dict, model = imagenet_file(arch, tmp_path / "imagenet.pth"), tiny(arch=arch)
    own = {key: value for key, value in copy_of(model).items() if key.startswith(head)}
    line = load_initial_weights(model, tmp_path / "imagenet.pth")
    assert "imagenet.pth" in line and "head" in line and "\n" not in line
    assert_same(model, state_dict | own)


def test_scratch_networks_have_no_imagenet_weights():
    message = refusal(load_imagenet_weights, tiny())
    assert "--pretrained" in message and "cnn6_rgb" in message
    assert "cnn6_rgb" in refusal(pretrained.load_backbone, tiny(), {"features.0.weight": torch.zeros(1)})


def test_pretrained_takes_the_file_that_torchvision_cached(tmp_path, monkeypatch):
    from torchvision.models import get_model_weights

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / get_model_weights("resnet18").DEFAULT.url.rpartition("/")[2]
    path.parent.mkdir(parents=True)
    state_dict, model = imagenet_file("resnet18", path), tiny(arch="resnet18")
    load_imagenet_weights(model)
    assert torch.equal(model.layer4[1].conv2.weight, state_dict["layer4.1.conv2.weight"])
    for content in (b"", b"<html>moved</html>", b"PK\x03\x04 cut short"):
        path.write_bytes(content)
        assert "--weights" in refusal(load_imagenet_weights, tiny(arch="resnet18"))


@pytest.mark.parametrize(
    ("arch", "stage", "learning"),
    [
        ("resnet18", "layer2", ("layer3.", "layer4.", "fc.")),
        ("resnet18", "all", ("fc.",)),
        ("mobilenet_v2", "features.15", ("features.16.", "features.17.", "features.18.", "classifier.")),
        ("mobilenet_v2", "all", ("classifier.",)),
    ],
)
def test_freeze_stops_gradients_and_statistics_up_to_the_stage(arch, stage, learning):
    model = tiny(arch=arch)
    freeze(model, stage)
    before = copy_of(model)
    train_mode(model)
    assert model.training
    nn.functional.cross_entropy(model(torch.randn(4, 3, 64, 64)), torch.tensor([0, 1, 2, 0])).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith(learning), name
    for name in before:
        if name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            assert torch.equal(before[name], model.state_dict()[name]) != name.startswith(learning), name


def test_stages_stand_in_order_from_the_input_and_others_are_refused():
    assert list_stages(tiny(arch="mobilenet_v2")) == [f"features.{number}" for number in range(19)]
    model, stages = tiny(arch="resnet18"), ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"]
    assert list_stages(model) == stages and list_stages(tiny()) == []
    message = refusal(freeze, model, "layer9")
    assert "--freeze" in message and "'layer9'" in message and all(stage in message for stage in ["all", *stages])
    assert all(parameter.requires_grad for parameter in model.parameters())
    for stage in ("all", "0"):
        message = refusal(freeze, tiny(), stage)
        assert "--freeze" in message and "cnn6_rgb" in message
