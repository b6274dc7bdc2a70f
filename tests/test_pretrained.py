"""engine/pretrained.py: weights to start from, and stages that stay frozen."""

import urllib.error

import pytest
import torch
from test_checkpoints import NAMES, assert_same, checkpoint_of, tiny
from test_models import BACKBONES, SCRATCH, inputs_for, refusal, small
from torch import nn

from checkpoints import adopt_checkpoint, build_model, save_checkpoint
from engine.pretrained import (
    freeze,
    list_stages,
    load_backbone,
    load_imagenet_weights,
    load_initial_weights,
    train_mode,
)
from models import create_model, last_layer_name


def copy_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


# A checkpoint or a state_dict to start from


@pytest.mark.parametrize("kind", ["checkpoint", "state_dict"])
@pytest.mark.parametrize("arch", ["cnn6_rgb", "cnn6_bn", "mobilenet_v2"])
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
    assert "old.pth: all weights" in line and "\n" not in line
    assert ("last layer" not in line) == is_whole
    assert is_whole or ("[3, " in line and f"[{len(names)}, " in line)


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
    theirs, inputs, path = EmotionCNN(5).eval(), torch.randn(3, 1, 48, 48), tmp_path / "s3.pth"
    torch.save(theirs.state_dict(), path)
    model = build_model(adopt_checkpoint(path, "cnn4", list("abcde")))
    torch.testing.assert_close(model(inputs), theirs(inputs))
    start = create_model("cnn4", 5).eval()
    assert "all weights loaded, in order" in load_initial_weights(start, path)
    torch.testing.assert_close(start(inputs), theirs(inputs))
    other = create_model("cnn4", 2)
    assert "but the last layer" in load_initial_weights(other, path)
    assert torch.equal(other.features[0].weight, theirs.conv1.weight)

    torch.save(dict(sorted(theirs.state_dict().items())), path)  # bias before weight
    for message in (
        refusal(lambda: build_model(adopt_checkpoint(path, "cnn4", list("abcde")), path)),
        refusal(load_initial_weights, start, path),
    ):
        assert "s3.pth" in message and "cnn4" in message


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod."])
@pytest.mark.parametrize("name", ["state_dict", "model_state_dict", "model", None])
def test_weights_in_the_layouts_of_other_tools(name, prefix, tmp_path):
    old, new = tiny(seed=1), tiny(seed=2)
    weights = {prefix + key: value for key, value in old.state_dict().items()}
    torch.save({name: weights, "epoch": 3, "optimizer": {"state": {}}} if name else weights, tmp_path / "old.pth")
    line = load_initial_weights(new, tmp_path / "old.pth")
    assert line.endswith("all weights loaded")
    assert_same(new, old.state_dict())


def test_checkpoints_that_do_not_fit_are_refused(tmp_path):
    path, model = tmp_path / "model.pth", tiny(arch="cnn4_bn")
    before = copy_of(model)
    save_checkpoint(checkpoint_of(tiny()), path)
    message = refusal(load_initial_weights, model, path)
    assert "--weights" in message and "cnn6_rgb" in message and "cnn4_bn" in message
    assert_same(model, before)
    save_checkpoint(checkpoint_of(model), path)
    assert "--weights" in refusal(load_initial_weights, create_model("cnn4_bn", 3, image_size=64), path)
    checkpoint = checkpoint_of(tiny(["a", "b", "c"], arch="cnn4_bn"))
    del checkpoint["state_dict"][f"{last_layer_name(model)}.weight"]  # which other classes would not take anyway
    save_checkpoint(checkpoint, path)
    assert "model.pth doesn't fit" in refusal(load_initial_weights, model, path)


@pytest.mark.parametrize("arch", ["cnn6_rgb", "mobilenet_v2"])
@pytest.mark.parametrize(
    "content",
    [{}, {"other.weight": torch.zeros(2)}, {1: torch.zeros(2)}, {"a": 1}, {"state_dict": {}}, 5, "text", torch.ones(3)],
    ids=["empty", "other", "numbered", "numbers", "nested", "number", "text", "tensor"],
)
def test_files_that_hold_no_weights_for_it(arch, content, tmp_path):
    torch.save(content, tmp_path / "other.pth")
    assert "other.pth" in refusal(load_initial_weights, tiny(arch=arch), tmp_path / "other.pth")


# ImageNet weights


def imagenet_file(arch, path):
    """A file such as torchvision's: a plain state_dict with a head for 1000 classes."""
    from torchvision.models import get_model

    torch.manual_seed(7)
    state_dict = get_model(arch, weights=None).state_dict()
    torch.save(state_dict, path)
    return state_dict


def assert_backbone_loaded(model, state_dict):
    """All but the head, which is that of small()."""
    head = {
        key: value
        for key, value in small(model.info.arch).state_dict().items()
        if key.startswith(("fc.", "classifier."))
    }
    assert head
    assert_same(model, {**state_dict, **head})


@pytest.mark.parametrize("arch", BACKBONES)
def test_weights_of_torchvision_go_under_the_head(arch, tmp_path):
    state_dict, model = imagenet_file(arch, tmp_path / "imagenet.pth"), small(arch)
    line = load_initial_weights(model, tmp_path / "imagenet.pth")
    assert_backbone_loaded(model, state_dict)
    assert "imagenet.pth" in line and "head" in line and "\n" not in line


def test_weights_of_another_backbone_are_refused(tmp_path):
    imagenet_file("resnet18", tmp_path / "imagenet.pth")
    model = small("mobilenet_v2")
    before = copy_of(model)
    message = refusal(load_initial_weights, model, tmp_path / "imagenet.pth")
    assert "mobilenet_v2" in message and "imagenet.pth" in message
    assert_same(model, before)


@pytest.mark.parametrize("arch", SCRATCH)
def test_scratch_networks_have_no_imagenet_weights(arch):
    message = refusal(load_imagenet_weights, create_model(arch, 4))
    assert "--pretrained" in message and arch in message
    assert arch in refusal(load_backbone, small(arch), {"features.0.weight": torch.zeros(1)})


@pytest.fixture
def no_network(tmp_path, monkeypatch):
    """torchvision's loader with an empty download folder and no way out."""
    tried = []

    def refuse(request, *_, **__):
        tried.append(getattr(request, "full_url", request))
        raise urllib.error.URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr("torch.hub.urlopen", refuse)
    return tried


@pytest.fixture
def cached(no_network, tmp_path):
    """The path at which torchvision caches the weights of resnet18."""
    from torchvision.models import get_model_weights

    path = tmp_path / "torch/hub/checkpoints" / get_model_weights("resnet18").DEFAULT.url.rpartition("/")[2]
    path.parent.mkdir(parents=True)
    return path


@pytest.mark.parametrize("arch", BACKBONES)
def test_pretrained_without_a_network_tells_what_to_do(arch, no_network):
    message = refusal(load_imagenet_weights, create_model(arch, 4, image_size=64))
    assert len(no_network) == 1 and no_network[0].startswith("https://") and no_network[0] in message
    assert "--weights" in message and "--no-pretrained" in message and arch in message


def test_pretrained_takes_the_file_that_torchvision_cached(cached, no_network):
    state_dict, model = imagenet_file("resnet18", cached), small("resnet18")
    load_imagenet_weights(model)
    assert_backbone_loaded(model, state_dict)
    assert no_network == []


@pytest.mark.parametrize("content", [b"", b"<html>moved</html>", b"PK\x03\x04 cut short"], ids=["empty", "text", "cut"])
def test_pretrained_with_a_damaged_cached_file_is_one_line(content, cached):
    cached.write_bytes(content)
    assert "--weights" in refusal(load_imagenet_weights, small("resnet18"))


# Freezing


@pytest.mark.parametrize("stage", ["a middle one", "all"])
@pytest.mark.parametrize("arch", BACKBONES)
def test_freeze_stops_gradients_and_statistics_up_to_the_stage(arch, stage):
    model = small(arch)
    stages = list_stages(model)
    if stage != "all":
        stage = stages[len(stages) // 2]
        stages = stages[: stages.index(stage) + 1]
    freeze(model, stage)
    frozen = tuple(name + "." for name in stages)
    before = copy_of(model)
    train_mode(model)
    assert model.training
    nn.functional.cross_entropy(model(inputs_for(model, 4)), torch.arange(4)).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith(frozen), name
    statistics = {name for name in before if "running_" in name or name.endswith("num_batches_tracked")}
    moved = {name for name in statistics if not torch.equal(before[name], model.state_dict()[name])}
    assert moved == {name for name in statistics if not name.startswith(frozen)}
    if stage == "all":  # the head learns
        learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        head = "fc" if arch == "resnet18" else "classifier"
        assert learning == {f"{head}.{layer}.{kind}" for layer in (1, 4) for kind in ("weight", "bias")}


def test_stages_stand_in_order_from_the_input_and_others_are_refused():
    assert list_stages(small("mobilenet_v2")) == [f"features.{number}" for number in range(19)]
    assert list_stages(small("cnn6_bn")) == []
    model, stages = small("resnet18"), ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"]
    assert list_stages(model) == stages
    message = refusal(freeze, model, "layer9")
    assert "--freeze" in message and "'layer9'" in message and all(stage in message for stage in ["all", *stages])
    assert all(parameter.requires_grad for parameter in model.parameters())
    for stage in ("all", "0"):
        message = refusal(freeze, small("cnn6_bn"), stage)
        assert "--freeze" in message and "cnn6_bn" in message
