"""models.py: the networks to the letter, their registry and recipes, InputSpec, and the fast layers."""

import contextlib

import pytest
import torch
from conftest import refusal
from torch import nn

import models
from models import ARCHS, Dropout, InputSpec, ModelInfo, create_model, input_spec_for, last_layer, list_archs

BACKBONES = [name for name in list_archs() if ARCHS[name].is_backbone]


def small(arch, num_classes=4, **options):
    torch.manual_seed(0)
    return create_model(arch, num_classes, image_size=64 if arch in BACKBONES else 48, **options)


def inputs_for(model, count=3):
    spec = model.info.input_spec
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, spec.channels, spec.image_size, spec.image_size, generator=generator)


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
        *((arch, [0.5, 0.3], [0.1, 0.1]) for arch in ("mobilenet_v2", "resnet18", "efficientnet_b0")),
    ],
)
def test_dropout_replaces_those_of_the_classifier_only(arch, before, after):
    assert dropouts(small(arch)) == before
    assert dropouts(small(arch, dropout=0.1)) == after
    assert set(dropouts(small(arch, dropout=0.0))) <= {0.0, 0.25}  # zero is a value, not "by default"


def test_what_the_registry_refuses():
    for dropout in (-0.1, 1.0, float("nan")):
        assert "--dropout" in refusal(small, "cnn4_bn", dropout=dropout)
    assert "at least 2 classes" in refusal(small, "cnn4_bn", 1)
    assert "--image-size 31 is too small" in refusal(create_model, "cnn4_bn", 4, image_size=31)
    message = refusal(small, "resnet")
    assert all(name in message for name in ["'resnet'", *list_archs()])
    with pytest.raises(ValueError, match="cnn4"):  # a name is registered once
        models.register("cnn4", models.Recipe(epochs=1, batch_size=2))(lambda *_: None)


def test_spec_refuses_values():
    wrong = {"image_size": (7, 2049, 48.0, "48"), "channels": (2, None), "std": ([0.0], [-1.0], "x"), "surplus": (1,)}
    wrong["mean"] = ([0.5, 0.5], [], [float("nan")], [float("inf")], None, 0.5, ["a"])
    for key, value in [(key, value) for key, values in wrong.items() for value in values]:
        assert key in refusal(InputSpec.from_dict, InputSpec().to_dict() | {key: value})
    for value in (None, {}, {"image_size": 48}):
        assert "image_size" in refusal(InputSpec.from_dict, value)


@pytest.mark.parametrize("arch", ["cnn6_bn", "cnn6_rgb", "cnn4_bn", "cnn4"])
def test_pooling_is_right_before_relu(arch):
    """Which is the same function as right after it, where the five systems pool."""
    layers = [type(layer) for layer in small(arch).features]
    around = {(layers[index - 1], layers[index + 1]) for index, kind in enumerate(layers) if kind is nn.MaxPool2d}
    assert around and around <= {(nn.Conv2d, nn.ReLU), (nn.BatchNorm2d, nn.ReLU)}


def test_dropout_by_share_scale_and_seed():
    torch.manual_seed(0)
    inputs = torch.ones(64, 32, 24, 24).contiguous(memory_format=torch.channels_last).requires_grad_()
    outputs = Dropout(0.3)(inputs)
    assert (outputs == 0).float().mean().item() == pytest.approx(0.3, abs=0.004)
    assert outputs.mean().item() == pytest.approx(1, abs=0.005) and len(outputs.unique()) == 2
    assert outputs.is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0, 0], outputs[0, 1])
    outputs.sum().backward()
    assert torch.equal(inputs.grad, outputs.detach())
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
