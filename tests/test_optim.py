"""engine/optim.py: optimizers, schedules, and the moving average of the weights."""

import pytest
import torch
from test_step import assert_close, augment, draw_images, norm_model, plain_model, sgd, state_of, train_epoch
from torch import optim

from engine.optim import Ema, make_optimizer, make_scheduler, steps_per_batch
from engine.step import TrainStep


@pytest.mark.parametrize("name, kind", [("adam", optim.Adam), ("adamw", optim.AdamW), ("sgd", optim.SGD)])
def test_optimizers_hold_what_is_trained(name, kind):
    model = plain_model()
    model[0].requires_grad_(False)
    optimizer = make_optimizer(name, model, lr=0.02, weight_decay=0.3)
    (group,) = optimizer.param_groups
    assert type(optimizer) is kind and (group["lr"], group["weight_decay"]) == (0.02, 0.3)
    assert [id(p) for p in group["params"]] == [id(p) for p in model[-1].parameters()]
    assert name != "sgd" or (group["momentum"], group["nesterov"]) == (0.9, True)


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
