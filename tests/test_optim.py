"""engine/optim.py: optimizers, schedules, and the moving average of the weights."""

import copy

import pytest
import torch
from test_step import assert_close, augment, draw_images, norm_model, plain_model, sgd, state_of, train_epoch
from torch import nn, optim

from engine.optim import Ema, hidden_matrices, make_optimizer, make_scheduler, orthogonalize, steps_per_batch
from engine.pretrained import freeze
from engine.step import TrainStep
from models import create_model


@pytest.mark.parametrize("name, kind", [("adam", optim.Adam), ("adamw", optim.AdamW), ("sgd", optim.SGD)])
def test_optimizers_hold_what_is_trained(name, kind):
    model = plain_model()
    model[0].requires_grad_(False)
    optimizer = make_optimizer(name, model, lr=0.02, weight_decay=0.3)
    (group,) = optimizer.param_groups
    assert type(optimizer) is kind and (group["lr"], group["weight_decay"]) == (0.02, 0.3)
    assert [id(p) for p in group["params"]] == [id(p) for p in model[-1].parameters()]
    assert name != "sgd" or (group["momentum"], group["nesterov"]) == (0.9, True)


@pytest.mark.parametrize("shape", [(2, 16, 144), (1, 64, 8), (3, 12, 12)])
def test_orthogonalize_keeps_the_singular_vectors_and_makes_the_values_alike(shape):
    torch.manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    matrices = u * torch.linspace(0.5, 7, min(shape[1:])) @ vh
    for precision, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.03)):
        found = u.mT @ orthogonalize(matrices.to(precision)).float() @ vh.mT
        values = found.diagonal(dim1=1, dim2=2)
        assert values.min() > 0.6 and values.max() < 1.25
        torch.testing.assert_close(found, torch.diag_embed(values), atol=tolerance, rtol=0)


def test_muon_has_the_hidden_matrices_and_adamw_the_rest():
    model = create_model("mobilenet_v2", 3)
    hidden = hidden_matrices(model)
    names = {name for name, parameter in model.named_parameters() if parameter in hidden}
    assert {"features.1.conv.1.weight", "features.18.0.weight", "classifier.1.weight"} <= names
    assert not names & {"features.0.0.weight", "classifier.4.weight", "features.18.1.weight", "classifier.1.bias"}
    assert "features.1.conv.0.0.weight" not in names  # depthwise: a small matrix for each channel
    optimizer = make_optimizer("muon", model, lr=0.02, weight_decay=0.05)
    assert sorted((group["muon"], group["lr"]) for group in optimizer.param_groups) == [(False, 0.003), (True, 0.02)]
    assert {each for group in optimizer.param_groups if group["muon"] for each in group["params"]} == hidden
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_muon_steps_are_its_formula():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.Conv2d(4, 12, 3), nn.Conv2d(12, 4, 1), nn.Flatten(), nn.Linear(64, 3)]
    model = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    expected, others = [layer.weight.detach().clone() for layer in layers[1:3]], copy.deepcopy(model)
    optimizer = make_optimizer("muon", model, lr=0.02, weight_decay=0.1)
    adamw = optim.AdamW(others.parameters(), lr=0.003, weight_decay=0.1)
    momenta = [torch.zeros_like(weight) for weight in expected]
    for _ in range(3):
        gradients = [torch.randn_like(parameter) for parameter in model.parameters()]
        for each in (model, others):
            for parameter, gradient in zip(each.parameters(), gradients, strict=True):
                parameter.grad = gradient.clone()
        for index, (weight, momentum) in enumerate(zip(expected, momenta, strict=True)):
            gradient = gradients[2 * index + 2]
            momentum.mul_(0.9).add_(gradient, alpha=0.1)
            rows, columns = len(weight), weight[0].numel()
            update = orthogonalize((0.1 * gradient + 0.9 * momentum).reshape(1, rows, columns)).view_as(weight)
            weight.mul_(1 - 0.02 * 0.1).sub_(0.02 * max(1, rows / columns) ** 0.5 * update)
        optimizer.step()
        adamw.step()
    for layer, weight in zip(layers[1:3], expected, strict=True):
        torch.testing.assert_close(layer.weight, weight)
    for name, parameter in others.named_parameters():
        if name not in ("1.weight", "2.weight"):
            torch.testing.assert_close(model.get_parameter(name), parameter)


@pytest.mark.parametrize("name", ["adam", "muon"])
def test_layers_before_the_classifier_get_their_share_of_the_learning_rate(name):
    model = create_model("resnet18", 3)
    freeze(model, "layer1")
    optimizer = make_optimizer(name, model, lr=2e-3, weight_decay=0.0, backbone_lr=0.1)
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {names[each]: group["lr"] for group in optimizer.param_groups for each in group["params"]}
    assert found.keys() == {name for name in names.values() if name.startswith(("layer2", "layer3", "layer4", "fc"))}
    for parameter_name, rate in found.items():
        is_muon = name == "muon" and parameter_name.endswith(
            ("conv1.weight", "conv2.weight", "0.weight", "fc.1.weight")
        )
        share = (1 if parameter_name.startswith("fc") else 0.1) * (1 if is_muon or name == "adam" else 0.15)
        assert rate == pytest.approx(2e-3 * share), parameter_name


def schedule(name, steps, losses=None):
    """The optimizer's group before each step and after the last."""
    optimizer = make_optimizer("sgd", plain_model(), lr=0.1, weight_decay=0.0)
    scheduler = make_scheduler(name, optimizer, total_steps=steps)
    groups = [dict(optimizer.param_groups[0])]
    for number in range(steps):
        optimizer.step()
        scheduler.step(*[losses[number]] if losses else [])
        groups.append(dict(optimizer.param_groups[0]))
    return groups


def test_onecycle_peaks_at_the_learning_rate_where_momentum_is_lowest():
    groups = schedule("onecycle", 40)
    lrs, momenta = ([group[name] for group in groups] for name in ("lr", "momentum"))
    assert max(lrs) == pytest.approx(0.1, rel=1e-3) and lrs[0] < 0.01 and lrs[-1] < 0.001
    assert [momenta[0], min(momenta), momenta[-1]] == pytest.approx([0.95, 0.85, 0.95], abs=1e-3)
    assert lrs.index(max(lrs)) == momenta.index(min(momenta)) == 0.3 * 40 - 1


@pytest.mark.parametrize("steps", [1, 2, 19, 20, 21, 100])
def test_linear_rises_briefly_and_falls_in_every_group(steps):
    optimizer = make_optimizer("muon", create_model("cnn4_bn", 3), lr=0.02, weight_decay=0.0)
    scheduler, rows = make_scheduler("linear", optimizer, total_steps=steps), []
    for _ in range(steps):
        rows.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    lrs, top = torch.tensor(rows).sort(dim=1).values, max(1, steps // 20) - 1
    assert lrs[top].tolist() == pytest.approx([0.003, 0.02]) and lrs.min() > 0
    assert optimizer.param_groups[0]["lr"] == 0 and lrs[:, 1].argmax() == top
    torch.testing.assert_close(lrs[:, 0], 0.15 * lrs[:, 1])
    for part in (lrs[: top + 1, 1], lrs[top + 1 :, 1]):
        torch.testing.assert_close(part.diff().diff(), torch.zeros(max(0, len(part) - 2)), atol=1e-7, rtol=0)


def test_cosine_falls_to_zero():
    lrs = [group["lr"] for group in schedule("cosine", 20)]
    assert lrs[0] == 0.1 and lrs[10] == pytest.approx(0.05) and lrs[-1] == pytest.approx(0, abs=1e-9)
    assert lrs == sorted(lrs, reverse=True) and len(set(lrs)) == 21


def test_plateau_halves_at_the_fourth_epoch_without_a_lower_loss():
    lrs = [group["lr"] for group in schedule("plateau", 10, losses=[2.0] + [1.0] * 9)]
    assert lrs == [0.1] * 6 + [0.05] * 4 + [0.025]


def test_the_step_moves_schedules_that_go_by_batch():
    model = plain_model()
    optimizer = sgd(model)
    cosine, plateau = (make_scheduler(name, optimizer, total_steps=4) for name in ("cosine", "plateau"))
    train_epoch(TrainStep(model, optimizer, augment, scheduler=cosine, grad_accum=2), *draw_images(16))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)
    TrainStep(model, optimizer, augment, scheduler=plateau)(*draw_images(4))
    assert plateau.last_epoch == 0 and make_scheduler("none", optimizer, total_steps=4) is None
    assert [steps_per_batch(scheduler) for scheduler in (None, cosine, plateau)] == [False, True, False]


def test_ema_follows_its_formula_with_the_statistics():
    model = norm_model().train()
    step = TrainStep(model, sgd(model), augment, ema=Ema(model, 0.5))
    expected = {key: value.double() for key, value in state_of(model).items()}
    for number in range(20):  # from 8 on the decay is 0.5
        step(*draw_images(4, seed=number))
        decay = min(0.5, (1 + number) / (10 + number))
        for key, value in model.state_dict().items():
            expected[key] = value if key.endswith("tracked") else decay * expected[key] + (1 - decay) * value
        assert_close(expected, step.eval_model.state_dict(), rtol=1e-4, atol=1e-5, check_dtype=False)
    assert expected["1.num_batches_tracked"] == 20
    assert not step.eval_model.training and not any(p.requires_grad for p in step.eval_model.parameters())


def test_ema_shares_no_memory_and_restores():
    model = norm_model()
    ema = Ema(model, 0.9)
    before = state_of(ema.model)
    with torch.no_grad():
        model[0].weight.add_(1)
    assert_close(before, ema.model.state_dict(), rtol=0, atol=0)
    ema.update(model)
    other = Ema(norm_model(1), 0.9)
    other.load_state_dict(ema.state_dict())
    for each in (ema, other):
        each.update(model)
    assert other.updates == 2
    assert_close(ema.model.state_dict(), other.model.state_dict(), rtol=0, atol=0)
