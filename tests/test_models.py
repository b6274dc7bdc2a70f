import urllib.error

import pytest
import torch
from torch import nn

from checkpoints import load_initial_weights
from engine.pretrained import freeze, list_stages, load_backbone, load_imagenet_weights, train_mode
from errors import InputError
from models import (
    ARCHS,
    Dropout,
    InputSpec,
    Recipe,
    count_parameters,
    create_model,
    get_arch,
    input_spec_for,
    list_archs,
    register,
)

SCRATCH = ["cnn6_bn", "cnn6_rgb", "cnn4_bn", "cnn4", "seresnet13"]
BACKBONES = ["mobilenet_v2", "resnet18", "efficientnet_b0", "mobilenet_v3_large"]


def small(arch, num_classes=4, **options):
    """A network at a size that is quick on the CPU."""
    torch.manual_seed(0)
    return create_model(arch, num_classes, image_size=64 if arch in BACKBONES else 48, **options)


def inputs_for(model, count=3):
    spec = model.input_spec
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, spec.channels, spec.image_size, spec.image_size, generator=generator)


def one_line(caught):
    """The message of a refusal, which must be one line."""
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def test_registry_holds_the_networks_of_the_five_systems():
    assert set(SCRATCH + BACKBONES) <= set(list_archs())
    assert [name for name in list_archs() if ARCHS[name].is_backbone] == [n for n in list_archs() if n in BACKBONES]


@pytest.mark.parametrize("arch", list_archs())
def test_forward_and_backward(arch):
    model = small(arch)
    model.train()
    logits = model(inputs_for(model, 4))
    assert logits.shape == (4, 4) and logits.dtype == torch.float32 and torch.isfinite(logits).all()
    nn.functional.cross_entropy(logits, torch.arange(4)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    assert any(parameter.grad.abs().sum() > 0 for parameter in list(model.parameters())[:4])  # it reaches the input
    assert (model.arch, model.num_classes, model.frozen) == (arch, 4, [])


@pytest.mark.parametrize(
    "arch, num_classes, count",
    [
        ("cnn6_bn", 4, 5_999_044),
        ("cnn6_rgb", 7, 581_005),
        ("cnn4_bn", 7, 1_572_551),
        ("cnn4", 7, 4_967_047),
        ("seresnet13", 7, 2_762_895),
        ("mobilenet_v2", 7, 2_553_607),
    ],
)
def test_parameter_counts_at_their_own_size(arch, num_classes, count):
    assert count_parameters(create_model(arch, num_classes)) == count


@pytest.mark.parametrize("arch", list_archs())
def test_every_network_returns_logits_not_probabilities(arch):
    model = small(arch).eval()
    with torch.no_grad():
        list(model.modules())[-1].bias.fill_(5.0)  # the last layer
        logits = model(inputs_for(model))
    assert not any(isinstance(module, nn.Softmax | nn.LogSoftmax) for module in model.modules())
    assert (logits.sum(1) - 1).abs().min() > 1 and logits.max() > 1


@pytest.mark.parametrize("arch", list_archs())
def test_eval_mode_is_deterministic_and_independent_of_the_batch(arch):
    model = small(arch).eval()
    inputs = inputs_for(model)
    with torch.no_grad():
        torch.testing.assert_close(model(inputs)[1:2], model(inputs[1:2]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", SCRATCH)
@pytest.mark.parametrize("image_size", [32, 50, 97])
def test_scratch_networks_take_other_sizes(arch, image_size):
    model = create_model(arch, 3, image_size=image_size)
    assert model.input_spec.image_size == image_size
    assert model(inputs_for(model, 2)).shape == (2, 3)


@pytest.mark.parametrize("arch", [name for name in list_archs() if ARCHS[name].takes_any_size])
def test_windows_are_taken_where_the_registry_says_so(arch):
    model = small(arch)
    inputs = inputs_for(model, 2)
    assert model(inputs[:, :, :-8, :-8]).shape == model(inputs).shape == (2, 4)


@pytest.mark.parametrize("arch", [name for name in list_archs() if not ARCHS[name].takes_any_size])
def test_windows_are_refused_elsewhere(arch):
    model = small(arch)
    with pytest.raises(RuntimeError):
        model(inputs_for(model, 2)[:, :, :-24, :-24])


def test_blocks_start_as_the_identity():
    """So that a deep network starts as a shallow one: only the shortcuts speak."""
    model = small("seresnet13").eval()
    blocks = [module for module in model if hasattr(module, "gate")]
    assert len(blocks) == 5
    for block in blocks:
        inputs = torch.rand(2, next(block.parameters()).shape[1], 12, 12)
        torch.testing.assert_close(block(inputs), torch.relu(block.shortcut(inputs)))


@pytest.mark.parametrize("arch", BACKBONES)
def test_backbones_take_small_and_odd_sizes(arch):
    model = create_model(arch, 3, image_size=33).train()
    assert model(inputs_for(model, 2)).shape == (2, 3)


@pytest.mark.parametrize("arch", list_archs())
def test_size_too_small_is_refused_with_the_least(arch):
    with pytest.raises(InputError) as caught:
        create_model(arch, 4, image_size=31)
    assert "--image-size" in one_line(caught) and "32" in str(caught.value)


def dropouts(model):
    return [module.p for module in model.modules() if isinstance(module, nn.Dropout)]


@pytest.mark.parametrize(
    "arch, before, after",
    [
        ("cnn6_bn", [0.25, 0.25, 0.25, 0.5, 0.5], [0.25, 0.25, 0.25, 0.1, 0.1]),
        ("cnn6_rgb", [0.0], [0.1]),
        ("cnn4_bn", [0.5], [0.1]),
        ("cnn4", [0.25, 0.25, 0.5], [0.25, 0.25, 0.1]),
        ("seresnet13", [0.2], [0.1]),
        ("mobilenet_v2", [0.5, 0.3], [0.1, 0.1]),
        ("resnet18", [0.5, 0.3], [0.1, 0.1]),
        ("efficientnet_b0", [0.5, 0.3], [0.1, 0.1]),
        ("mobilenet_v3_large", [0.5, 0.3], [0.1, 0.1]),
    ],
)
def test_dropout_replaces_those_of_the_head_only(arch, before, after):
    assert dropouts(small(arch)) == before
    assert dropouts(small(arch, dropout=0.1)) == after
    assert set(dropouts(small(arch, dropout=0.0))) <= {0.0, 0.25}  # zero is a value, not "by default"


@pytest.mark.parametrize("dropout", [-0.1, 1.0, 1.5, float("nan")])
def test_dropout_out_of_range_is_refused(dropout):
    with pytest.raises(InputError) as caught:
        create_model("cnn4_bn", 4, dropout=dropout)
    assert "--dropout" in one_line(caught)


@pytest.mark.parametrize("num_classes", [1, 0, -3])
def test_too_few_classes_are_refused(num_classes):
    with pytest.raises(InputError, match="at least 2 classes"):
        create_model("cnn4_bn", num_classes)


def test_unknown_arch_lists_the_names():
    for call in (lambda: create_model("resnet", 4), lambda: get_arch("resnet"), lambda: input_spec_for("resnet")):
        with pytest.raises(InputError) as caught:
            call()
        message = one_line(caught)
        assert "'resnet'" in message and all(name in message for name in list_archs())


def test_a_name_can_be_registered_once():
    with pytest.raises(ValueError, match="cnn4"):
        register("cnn4", Recipe(epochs=1, batch_size=2))(lambda **_: None)
    assert ARCHS["cnn4"].recipe.epochs == 65  # the first one stays


def test_recipes_are_those_of_the_five_systems():
    rows = {
        "cnn6_bn": ("adam", 0.001, "plateau", 64, 30, 0.0, "none"),
        "cnn6_rgb": ("adam", 0.001, "none", 64, 60, 0.0, "balanced"),
        "cnn4_bn": ("adam", 0.001, "none", 32, 20, 0.0, "none"),
        "cnn4": ("adam", 0.001, "none", 500, 65, 1e-4, "none"),
        "mobilenet_v2": ("adam", 0.001, "plateau", 32, 30, 0.0, "none"),
    }
    for arch, row in rows.items():
        r = ARCHS[arch].recipe
        got = (r.optimizer, r.lr, r.schedule, r.batch_size, r.epochs, r.weight_decay, r.class_weights)
        assert got == row, arch


# InputSpec


@pytest.mark.parametrize("arch", list_archs())
def test_spec_round_trip_is_of_plain_values(arch):
    spec = input_spec_for(arch, 96)
    values = spec.to_dict()
    assert all(type(value) in (int, bool, list) for value in values.values())
    assert InputSpec.from_dict(values) == spec and spec.image_size == 96
    assert input_spec_for(arch) == get_arch(arch).input_spec


def test_spec_keeps_gray_and_stored_channels():
    rgb = InputSpec(channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)
    gray = InputSpec(channels=3, mean=(0.5,) * 3, std=(0.5,) * 3, gray=True)
    assert (InputSpec().stored_channels, rgb.stored_channels, gray.stored_channels) == (1, 3, 1)
    assert InputSpec.from_dict(gray.to_dict()).gray is True


GOOD = InputSpec().to_dict()


@pytest.mark.parametrize(
    "change",
    [
        {"image_size": 7},
        {"image_size": 2049},
        {"image_size": 48.0},
        {"image_size": "48"},
        {"image_size": None},
        {"channels": 2},
        {"channels": 4},
        {"channels": "1"},
        {"channels": None},
        {"channels": 3},  # of which mean and std have one only
        {"mean": [0.5, 0.5]},
        {"mean": []},
        {"mean": [float("nan")]},
        {"mean": [float("inf")]},
        {"std": [0.0]},
        {"std": [-1.0]},
        {"std": [float("inf")]},
        {"std": [0.5, 0.5, 0.5]},
        {"surplus": 1},
    ],
    ids=repr,
)
def test_spec_refuses(change):
    with pytest.raises(InputError) as caught:
        InputSpec.from_dict({**GOOD, **change})
    one_line(caught)


@pytest.mark.parametrize("change", [{"mean": None}, {"mean": 0.5}, {"mean": ["a"]}, {"std": "x"}], ids=repr)
def test_spec_refuses_values_that_are_no_numbers(change):
    with pytest.raises(InputError) as caught:
        InputSpec.from_dict({**GOOD, **change})
    one_line(caught)


@pytest.mark.parametrize("key", sorted(GOOD))
def test_spec_refuses_a_missing_key(key):
    with pytest.raises(InputError) as caught:
        InputSpec.from_dict({name: value for name, value in GOOD.items() if name != key})
    assert key in one_line(caught)


@pytest.mark.parametrize("values", [None, [], "48", 5, {}])
def test_spec_refuses_what_is_no_dict_of_its_keys(values):
    with pytest.raises(InputError) as caught:
        InputSpec.from_dict(values)
    one_line(caught)


# Freezing


@pytest.mark.parametrize("arch", BACKBONES)
def test_freeze_stops_gradients_and_statistics_up_to_the_stage(arch):
    model = small(arch)
    stages = list_stages(model)
    stage = stages[len(stages) // 2]
    freeze(model, stage)
    frozen = tuple(name + "." for name in stages[: stages.index(stage) + 1])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train_mode(model)
    assert model.training
    nn.functional.cross_entropy(model(inputs_for(model, 4)), torch.arange(4)).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith(frozen), name
    statistics = [name for name in before if "running_" in name or name.endswith("num_batches_tracked")]
    moved = {name for name in statistics if not torch.equal(before[name], model.state_dict()[name])}
    assert moved == {name for name in statistics if not name.startswith(frozen)} and moved


@pytest.mark.parametrize("arch", BACKBONES)
def test_freeze_all_leaves_the_head_to_learn(arch):
    model = small(arch)
    freeze(model, "all")
    train_mode(model)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    head = "fc" if arch == "resnet18" else "classifier"
    assert learning == {f"{head}.{layer}.{kind}" for layer in (1, 4) for kind in ("weight", "bias")}
    before = {name: value.clone() for name, value in model.state_dict().items() if "running_" in name}
    model(inputs_for(model, 4))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_stages_stand_in_order_from_the_input():
    assert list_stages(small("resnet18")) == ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"]
    assert list_stages(small("mobilenet_v2")) == [f"features.{number}" for number in range(19)]
    assert list_stages(small("cnn6_bn")) == []


def test_freeze_of_an_unknown_stage_lists_those_there_are():
    model = small("resnet18")
    with pytest.raises(InputError) as caught:
        freeze(model, "layer9")
    message = one_line(caught)
    assert "--freeze" in message and "'layer9'" in message
    assert all(stage in message for stage in ["all", *list_stages(model)])
    assert model.frozen == [] and all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("stage", ["all", "0"])
def test_freeze_of_a_scratch_network_is_refused(stage):
    with pytest.raises(InputError) as caught:
        freeze(small("cnn6_bn"), stage)
    assert "--freeze" in one_line(caught) and "cnn6_bn" in str(caught.value)


# ImageNet weights


def imagenet_file(arch, path):
    """A file such as torchvision's: a plain state_dict with a head for 1000 classes."""
    from torchvision.models import get_model

    torch.manual_seed(7)
    state_dict = get_model(arch, weights=None).state_dict()
    torch.save(state_dict, path)
    return state_dict


def assert_backbone_loaded(model, state_dict, own_head):
    for name, value in model.state_dict().items():
        expected = own_head[name] if name in own_head else state_dict[name]
        assert torch.equal(value, expected), name


def head_of(model):
    return {name: v.clone() for name, v in model.state_dict().items() if name.startswith(("fc.", "classifier."))}


@pytest.mark.parametrize("arch", BACKBONES)
def test_weights_of_torchvision_go_under_the_head(arch, tmp_path):
    state_dict = imagenet_file(arch, tmp_path / "imagenet.pth")
    model = small(arch)
    head = head_of(model)
    line = load_initial_weights(model, tmp_path / "imagenet.pth")
    assert_backbone_loaded(model, state_dict, head)
    assert "imagenet.pth" in line and "head" in line and "\n" not in line


def test_weights_of_another_backbone_are_refused(tmp_path):
    imagenet_file("resnet18", tmp_path / "imagenet.pth")
    model = small("mobilenet_v2")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError) as caught:
        load_initial_weights(model, tmp_path / "imagenet.pth")
    assert "mobilenet_v2" in one_line(caught) and "imagenet.pth" in one_line(caught)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_load_backbone_of_a_scratch_network_is_refused_as_misfit():
    with pytest.raises(InputError) as caught:
        load_backbone(small("cnn4_bn"), {"features.0.weight": torch.zeros(1)})
    assert "cnn4_bn" in one_line(caught)


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


@pytest.mark.parametrize("arch", BACKBONES)
def test_pretrained_without_a_network_says_what_to_do(arch, no_network):
    with pytest.raises(InputError) as caught:
        load_imagenet_weights(create_model(arch, 4, image_size=64))
    message = one_line(caught)
    assert len(no_network) == 1 and no_network[0].startswith("https://") and no_network[0] in message
    assert "--weights" in message and "--no-pretrained" in message and arch in message


def test_pretrained_takes_the_file_that_torchvision_keeps(no_network, tmp_path):
    from torchvision.models import get_model_weights

    name = get_model_weights("resnet18").DEFAULT.url.rpartition("/")[2]
    kept = tmp_path / "torch" / "hub" / "checkpoints" / name
    kept.parent.mkdir(parents=True)
    state_dict = imagenet_file("resnet18", kept)
    head = head_of(small("resnet18"))
    model = small("resnet18")
    load_imagenet_weights(model)
    assert_backbone_loaded(model, state_dict, head)
    assert no_network == []


@pytest.mark.parametrize("content", [b"", b"<html>moved</html>", b"PK\x03\x04 cut short"], ids=["empty", "text", "cut"])
def test_pretrained_with_a_damaged_kept_file_is_one_line(content, no_network, tmp_path):
    from torchvision.models import get_model_weights

    name = get_model_weights("resnet18").DEFAULT.url.rpartition("/")[2]
    kept = tmp_path / "torch" / "hub" / "checkpoints" / name
    kept.parent.mkdir(parents=True)
    kept.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_imagenet_weights(small("resnet18"))
    assert "--weights" in one_line(caught)


@pytest.mark.parametrize("arch", SCRATCH)
def test_pretrained_scratch_network_is_refused(arch):
    with pytest.raises(InputError) as caught:
        load_imagenet_weights(create_model(arch, 4))
    assert "--pretrained" in one_line(caught) and arch in str(caught.value)


# What makes a step fast must not change what it computes


def pool_last(model):
    """The same layers as the five systems order them: ReLU, then max-pool."""
    layers = list(model)
    for index in range(len(layers) - 1):
        if isinstance(layers[index], nn.MaxPool2d) and isinstance(layers[index + 1], nn.ReLU):
            layers[index : index + 2] = layers[index + 1], layers[index]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("arch", ["cnn6_bn", "cnn6_rgb", "cnn4_bn", "cnn4"])
def test_pooling_before_relu_is_the_same_function(arch):
    torch.manual_seed(0)
    model = create_model(arch, 7, dropout=0.0)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    images = torch.randn(3, model.input_spec.channels, 48, 48)
    found = []
    for network in (model, pool_last(model)):
        network.train().zero_grad()
        logits = network(images)
        logits.sum().backward()
        found.append([logits, *(parameter.grad.clone() for parameter in network.parameters())])
    assert list(pool_last(model)) != list(model)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("p", [0.25, 0.3, 0.5])
def test_dropout_drops_the_share_it_should_and_scales_the_rest(p):
    torch.manual_seed(0)
    inputs = torch.ones(64, 32, 24, 24).contiguous(memory_format=torch.channels_last).requires_grad_()
    outputs = Dropout(p)(inputs)
    share = (outputs == 0).float().mean().item()
    assert share == pytest.approx(p, abs=0.004)
    assert outputs.mean().item() == pytest.approx(1, abs=0.005)
    assert len(outputs.unique()) == 2 and outputs.is_contiguous(memory_format=torch.channels_last)
    by_place = (outputs == 0).float().mean(0)  # no place in the picture is favoured
    assert by_place.min() > 0 and by_place.max() < 1
    outputs.sum().backward()
    assert torch.equal(inputs.grad, outputs.detach())


def test_dropout_follows_the_seed_and_does_nothing_in_evaluation():
    inputs, layer = torch.randn(5, 7), Dropout(0.5)
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masks.append(layer(inputs.expand(40, 5, 7)))
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    assert torch.equal(layer.eval()(inputs), inputs)
    assert torch.equal(Dropout(0.0)(inputs), inputs)
    assert torch.equal(Dropout(1.0)(inputs), torch.zeros(5, 7))
    assert set(Dropout(0.5)(inputs.new_ones(9, 9).bfloat16()).unique().tolist()) == {0.0, 2.0}


def test_strided_depthwise_convolutions_are_the_same_and_float32_under_autocast():
    model = create_model("mobilenet_v2", 7, image_size=32)
    found = [module for module in model.modules() if isinstance(module, nn.Conv2d) and type(module) is not nn.Conv2d]
    assert len(found) == 4 and all(module.groups > 1 and module.stride == (2, 2) for module in found)
    inputs = torch.randn(2, found[0].in_channels, 8, 8)
    expected = nn.Conv2d.forward(found[0], inputs)
    assert torch.equal(found[0](inputs), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert nn.Conv2d.forward(found[0], inputs).dtype == torch.bfloat16
        outputs = found[0](inputs)
    assert torch.equal(outputs, expected)
    outputs.sum().backward()
    under_autocast = found[0].weight.grad.clone()
    found[0].weight.grad = None
    expected.sum().backward()
    assert torch.equal(under_autocast, found[0].weight.grad)
