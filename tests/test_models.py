"""models.py: the networks to the letter, their registry and recipes, InputSpec, and the fast layers."""

import contextlib

import pytest
import torch
from conftest import refusal
from torch import nn

from models import (
    ARCHS,
    Dropout,
    InputSpec,
    ModelInfo,
    Recipe,
    create_model,
    input_spec_for,
    last_layer,
    list_archs,
    register,
)

BACKBONES = ["mobilenet_v2", "resnet18", "efficientnet_b0", "mobilenet_v3_large"]


def small(arch, num_classes=4, **options):
    """A model at a size that is quick on the CPU."""
    torch.manual_seed(0)
    return create_model(arch, num_classes, image_size=64 if arch in BACKBONES else 48, **options)


def inputs_for(model, count=3):
    spec = model.info.input_spec
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, spec.channels, spec.image_size, spec.image_size, generator=generator)


def test_registry_holds_the_networks_of_the_five_systems():
    assert {"cnn6_bn", "cnn6_rgb", "cnn4_bn", "cnn4", "seresnet13"} <= set(list_archs())
    assert {name for name in list_archs() if ARCHS[name].is_backbone} == set(BACKBONES)
    with pytest.raises(ValueError, match="cnn4"):
        register("cnn4", Recipe(epochs=1, batch_size=2))(lambda *_: None)
    assert ARCHS["cnn4"].recipe.epochs == 65  # the first one stays


@pytest.mark.parametrize("arch", list_archs())
def test_logits_of_the_last_layer_and_gradients_down_to_the_input(arch):
    model = small(arch).eval()
    assert model.info == ModelInfo(arch, ["0", "1", "2", "3"], input_spec_for(arch, model.info.input_spec.image_size))
    inputs = inputs_for(model, 4)
    with torch.no_grad():
        last_layer(model).bias.fill_(5.0)
        logits = model(inputs)
        torch.testing.assert_close(logits[1:2], model(inputs[1:2]), rtol=1e-4, atol=1e-5)  # each image on its own
    assert logits.shape == (4, 4) and logits.dtype == torch.float32
    assert (logits.sum(1) - 1).abs().min() > 1 and logits.max() > 1  # no softmax
    nn.functional.cross_entropy(model.train()(inputs), torch.arange(4)).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
    assert any(parameter.grad.abs().sum() > 0 for parameter in list(model.parameters())[:4])


@pytest.mark.parametrize("arch", list_archs())
def test_other_sizes_and_windows_if_the_registry_says_so(arch):
    for image_size in (32, 97):
        model = create_model(arch, 4, image_size=image_size)
        assert model(inputs_for(model, 2)).shape == (2, 4)
    inputs = inputs_for(model, 2)[:, :, :-24, :-24]
    with contextlib.nullcontext() if ARCHS[arch].takes_any_size else pytest.raises(RuntimeError):
        assert model(inputs).shape == (2, 4)


def test_blocks_start_as_the_identity():
    """So that a deep network starts as a shallow one: the output is that of the shortcuts."""
    blocks = [module for module in small("seresnet13").eval().features if hasattr(module, "gate")]
    assert len(blocks) == 5
    for block in blocks:
        inputs = torch.rand(2, next(block.parameters()).shape[1], 12, 12)
        torch.testing.assert_close(block(inputs), torch.relu(block.shortcut(inputs)))


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
        *((arch, [0.5, 0.3], [0.1, 0.1]) for arch in BACKBONES),
    ],
)
def test_dropout_replaces_those_of_the_classifier_only(arch, before, after):
    assert dropouts(small(arch)) == before
    assert dropouts(small(arch, dropout=0.1)) == after
    assert set(dropouts(small(arch, dropout=0.0))) <= {0.0, 0.25}  # zero is a value, not "by default"


@pytest.mark.parametrize(
    "arch, num_classes, options, words",
    [
        *(("cnn4_bn", 4, {"dropout": value}, ["--dropout"]) for value in (-0.1, 1.0, float("nan"))),
        ("cnn4_bn", 1, {}, ["at least 2 classes"]),
        ("cnn4_bn", 4, {"image_size": 31}, ["--image-size 31", "32"]),
        ("resnet", 4, {}, ["'resnet'", *list_archs()]),
    ],
)
def test_what_create_model_refuses(arch, num_classes, options, words):
    message = refusal(create_model, arch, num_classes, **options)
    assert all(word in message for word in words)


def test_spec_round_trip_is_of_plain_values():
    spec = input_spec_for("cnn6_rgb", 96)
    values = spec.to_dict()
    assert all(type(value) in (int, bool, list) for value in values.values())
    assert InputSpec.from_dict(values) == spec and spec.image_size == 96
    gray = InputSpec.from_dict(values | {"gray": True})
    assert (spec.stored_channels, gray.stored_channels, gray.gray) == (spec.channels, 1, True)


@pytest.mark.parametrize(
    "key, values",
    [
        ("image_size", (7, 2049, 48.0, "48")),
        ("channels", (2, None)),
        ("mean", ([0.5, 0.5], [], [float("nan")], [float("inf")], None, 0.5, ["a"])),
        ("std", ([0.0], [-1.0], "x")),
        ("surplus", (1,)),
    ],
)
def test_spec_refuses_values(key, values):
    for value in values:
        assert key in refusal(InputSpec.from_dict, InputSpec().to_dict() | {key: value})
    for value in (None, {}, {"image_size": 48}):
        assert "image_size" in refusal(InputSpec.from_dict, value)


@pytest.mark.parametrize("arch", ["cnn6_bn", "cnn6_rgb", "cnn4_bn", "cnn4"])
def test_pooling_before_relu_is_the_same_function(arch):
    """The five systems pool after ReLU."""
    model, found = small(arch, 7).eval(), []
    layers = list(model.features)
    for index in [index for index, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d)]:
        layers[index : index + 2] = layers[index + 1], layers[index]
    assert layers != list(model.features)
    for network in (model, nn.Sequential(*layers, *model.classifier).eval()):
        logits = network(inputs_for(model))
        found += [[logits, *torch.autograd.grad(logits.sum(), list(network.parameters()))]]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("p", [0.3, 0.5])
def test_dropout_drops_the_share_it_should_and_scales_the_rest(p):
    torch.manual_seed(0)
    inputs = torch.ones(64, 32, 24, 24).contiguous(memory_format=torch.channels_last).requires_grad_()
    outputs = Dropout(p)(inputs)
    assert (outputs == 0).float().mean().item() == pytest.approx(p, abs=0.004)
    assert outputs.mean().item() == pytest.approx(1, abs=0.005) and len(outputs.unique()) == 2
    assert outputs.is_contiguous(memory_format=torch.channels_last)
    by_place = (outputs == 0).float().mean(0)  # no place in the image is favored
    assert by_place.min() > 0 and by_place.max() < 1
    outputs.sum().backward()
    assert torch.equal(inputs.grad, outputs.detach())


def test_dropout_follows_the_seed_and_does_nothing_in_evaluation():
    inputs, layer = torch.randn(5, 7), Dropout(0.5)
    masks = [torch.manual_seed(seed) and layer(inputs.expand(40, 5, 7)) for seed in (1, 1, 2)]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    assert torch.equal(layer.eval()(inputs), inputs) and torch.equal(Dropout(0.0)(inputs), inputs)
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
    gradients = [torch.autograd.grad(result.sum(), found[0].weight)[0] for result in (outputs, expected)]
    assert torch.equal(*gradients)
