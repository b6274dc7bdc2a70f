import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from device import autocast, cpu_limit, pick_device, pick_precision
from engine.loop import TrainStep, evaluate, fit_temperature, loss_and_accuracy, seed_for, to_log_probs, train_one_epoch
from engine.optim import Ema, make_optimizer, make_scheduler, steps_per_batch
from engine.pretrained import freeze, train_mode
from errors import InputError
from models import InputSpec, create_model
from preprocessing import to_input

CPU = torch.device("cpu")
SPEC = InputSpec(image_size=8)
CLASSES = 3


def prepare(images):
    return to_input(images, SPEC)


def plain_network(seed=0):
    """Without batch-norm and dropout, so that a step does not depend on how a batch is split."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, CLASSES))


def norm_network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, CLASSES))


def pictures(count, seed=0, size=8, channels=1, classes=CLASSES):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8, generator=generator)
    return images, torch.arange(count) % classes


def split(images, labels, size):
    return list(zip(images.split(size), labels.split(size), strict=True))


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr)


def state_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


# Steps and epochs


@pytest.mark.parametrize("grad_accum", [1, 3])
def test_one_optimiser_step_for_every_batch(grad_accum):
    model = plain_network()
    optimizer = torch.optim.Adam(model.parameters())
    step = TrainStep(model, optimizer, prepare, grad_accum=grad_accum)
    seen = []
    images, labels = pictures(20)
    for batch in split(images, labels, 6):
        before = state_of(model)
        step(*batch)
        seen.append(any(not torch.equal(before[key], value) for key, value in model.state_dict().items()))
    assert seen == [True] * 4 and all(int(state["step"]) == 4 for state in optimizer.state.values())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_step_returns_the_sum_of_losses_and_the_right_ones():
    model, (images, labels) = plain_network(), pictures(7)
    logits = model(prepare(images))
    loss, right = TrainStep(model, sgd(model), prepare)(images, labels)
    assert loss.item() == pytest.approx(F.cross_entropy(logits, labels, reduction="sum").item(), rel=1e-5)
    assert right.item() == (logits.argmax(1) == labels).sum().item()
    assert not loss.requires_grad


def test_step_is_that_of_plain_pytorch():
    images, labels = pictures(6)
    ours, theirs = plain_network(), plain_network()
    optimizer = sgd(theirs)
    step = TrainStep(ours, sgd(ours), prepare)
    for _ in range(3):
        step(images, labels)
        optimizer.zero_grad()
        F.cross_entropy(theirs(prepare(images)), labels).backward()
        optimizer.step()
    for key, value in ours.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[key], msg=key)


def test_epoch_weighs_every_picture_alike():
    model, (images, labels) = plain_network(), pictures(10)
    logits = model(prepare(images)).detach()
    images_of_last = F.cross_entropy(logits[8:], labels[8:]).item()
    done = train_one_epoch(TrainStep(model, sgd(model, lr=0.0), prepare), split(images, labels, 4), total=10)
    by_picture = F.cross_entropy(logits, labels).item()
    by_batch = (F.cross_entropy(logits[:4], labels[:4]) + F.cross_entropy(logits[4:8], labels[4:8])).item()
    by_batch = (by_batch + images_of_last) / 3
    assert abs(by_picture - by_batch) > 1e-3  # the two can be told apart
    assert done["loss"] == pytest.approx(by_picture, rel=1e-5)
    assert done["acc"] == (logits.argmax(1) == labels).sum().item() / 10
    assert done["images_per_s"] > 0 and all(type(value) is float for value in done.values())


@pytest.mark.parametrize("grad_accum", [2, 3, 4, 100])
@pytest.mark.parametrize("count", [12, 7])
def test_accumulated_gradients_are_the_same_step(grad_accum, count):
    images, labels = pictures(count)
    weights = torch.tensor([0.5, 1.0, 2.0])
    models = []
    for passes in (1, grad_accum):
        model = plain_network()
        step = TrainStep(
            model, sgd(model), prepare, grad_accum=passes, class_weights=weights, label_smoothing=0.1, clip_grad=0.5
        )
        results = [step(images, labels) for _ in range(3)]
        models.append((model.state_dict(), results[-1]))
    for key, value in models[0][0].items():
        torch.testing.assert_close(value, models[1][0][key], rtol=0, atol=1e-5, msg=key)
    torch.testing.assert_close(models[0][1][0], models[1][1][0])
    assert models[0][1][1] == models[1][1][1]


def test_accumulation_never_gives_batch_norm_one_picture():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.BatchNorm1d(4), nn.Linear(4, CLASSES))
    step = TrainStep(model, sgd(model), prepare, grad_accum=8)
    for count in (2, 3, 5, 8, 9):
        step(*pictures(count))  # batch-norm raises for a single one


@pytest.mark.parametrize("most", [0.01, 0.1, 1e6])
def test_clipping_limits_the_norm_of_the_update(most):
    images, labels = pictures(6)
    free, clipped = plain_network(), plain_network()
    before = state_of(free)
    TrainStep(free, sgd(free, lr=1.0), prepare)(images, labels)
    TrainStep(clipped, sgd(clipped, lr=1.0), prepare, clip_grad=most)(images, labels)

    def update(model):
        return torch.cat([(value - before[key]).flatten() for key, value in model.state_dict().items()])

    norm = update(free).norm().item()
    assert norm > 0.2  # above both of the small limits
    assert update(clipped).norm().item() == pytest.approx(min(norm, most), rel=1e-3)
    torch.testing.assert_close(update(clipped) / min(norm, most), update(free) / norm, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [None, [0.5, 1.0, 3.0]])
def test_class_weights_and_smoothing_by_hand(weights, smoothing):
    model, (images, labels) = plain_network(), pictures(8)
    log_probs = F.log_softmax(model(prepare(images)), 1).detach()
    weights = weights and torch.tensor(weights)
    target = F.one_hot(labels, CLASSES) * (1 - smoothing) + smoothing / CLASSES
    by_hand = -(target * log_probs * (1 if weights is None else weights)).sum()
    step = TrainStep(model, sgd(model), prepare, class_weights=weights, label_smoothing=smoothing)
    assert step(images, labels)[0].item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_class_weights_divide_by_the_number_of_pictures():
    images, labels = pictures(6)
    weights = torch.tensor([0.5, 1.0, 3.0])
    ours, theirs = plain_network(), plain_network()
    TrainStep(ours, sgd(ours), prepare, class_weights=weights)(images, labels)
    (F.cross_entropy(theirs(prepare(images)), labels, weights, reduction="sum") / 6).backward()
    sgd(theirs).step()
    for key, value in ours.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[key], msg=key)


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_loss_that_is_no_number_stops_and_says_where(bad):
    model = plain_network()
    optimizer = sgd(model, lr=0.037)
    batches = split(*pictures(12), 4)
    step, steps = TrainStep(model, optimizer, prepare), []

    def feed():
        for number, batch in enumerate(batches):
            if number == bad:
                with torch.no_grad():
                    model[-1].bias.fill_(float("nan"))
            steps.append(number)
            yield batch

    with pytest.raises(FloatingPointError) as caught:
        train_one_epoch(step, feed(), total=12)
    message = str(caught.value)
    assert f"step {len(steps)}" in message and "0.037" in message and "nan" in message and "\n" not in message


def test_a_diverging_run_stops():
    model = plain_network()
    with pytest.raises(FloatingPointError):
        train_one_epoch(TrainStep(model, sgd(model, lr=1e30), prepare), split(*pictures(30), 2), total=30)


def test_frozen_stages_stay_as_they_are():
    torch.manual_seed(0)
    model = create_model("resnet18", CLASSES, image_size=32)
    freeze(model, "layer3")
    train_mode(model)
    optimizer = make_optimizer("adamw", model, lr=0.01, weight_decay=0.1)
    before = state_of(model)
    images, labels = pictures(4, size=32, channels=3)
    TrainStep(model, optimizer, lambda x: to_input(x, model.input_spec), ema=Ema(model, 0.9))(images, labels)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(before[key], value)}
    assert changed and all(key.startswith(("layer4", "fc")) for key in changed)


# EMA


def test_ema_follows_its_formula_with_the_statistics():
    model = norm_network().train()
    ema = Ema(model, 0.9)
    step = TrainStep(model, sgd(model), prepare, ema=ema)
    expected = {key: value.double() for key, value in state_of(model).items()}
    for number in range(120):
        step(*pictures(4, seed=number))
        decay = min(0.9, (1 + number) / (10 + number))
        for key, value in model.state_dict().items():
            expected[key] = value if key.endswith("tracked") else decay * expected[key] + (1 - decay) * value
    averaged = ema.model.state_dict()
    for key, value in expected.items():
        torch.testing.assert_close(averaged[key].double(), value.double(), rtol=1e-4, atol=1e-5, msg=key)
    assert averaged["1.num_batches_tracked"] == 120
    assert not torch.allclose(averaged["1.running_mean"], model.state_dict()["1.running_mean"], atol=1e-5)
    assert not ema.model.training and not any(p.requires_grad for p in ema.model.parameters())


def test_ema_shares_no_memory_and_restores():
    model = norm_network().train()
    ema = Ema(model, 0.9)
    before = state_of(ema.model)
    with torch.no_grad():
        model[0].weight.add_(1)
    assert all(torch.equal(before[key], value) for key, value in ema.model.state_dict().items())
    for _ in range(3):
        ema.update(model)
    other = Ema(norm_network(1), 0.9)
    other.load_state_dict(ema.state_dict())
    for _ in range(2):
        ema.update(model), other.update(model)
    assert other.updates == 5
    assert all(torch.equal(value, other.model.state_dict()[key]) for key, value in ema.model.state_dict().items())


# Schedules and optimisers


def rates(name, steps, values=None):
    model = plain_network()
    optimizer = make_optimizer("sgd", model, lr=0.1, weight_decay=0.0)
    scheduler = make_scheduler(name, optimizer, total_steps=steps)
    lrs = []
    for number in range(steps):
        lrs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step() if values is None else scheduler.step(values[number])
    return [*lrs, optimizer.param_groups[0]["lr"]]


def test_onecycle_peaks_at_the_learning_rate():
    lrs = rates("onecycle", 40)
    assert max(lrs) == pytest.approx(0.1, rel=1e-3)
    assert lrs[0] < 0.01 and lrs[-1] < 0.001 and lrs.index(max(lrs)) == 0.3 * 40 - 1


@pytest.mark.parametrize(
    ("optimizer", "momentum"),
    [
        ("sgd", lambda group: group["momentum"]),
        ("adamw", lambda group: group["betas"][0]),
    ],
)
def test_onecycle_lowers_the_momentum_while_it_raises_the_rate(optimizer, momentum):
    optimizer = make_optimizer(optimizer, plain_network(), lr=0.1, weight_decay=0.0)
    scheduler, seen = make_scheduler("onecycle", optimizer, total_steps=40), []
    for _ in range(40):
        seen.append(momentum(optimizer.param_groups[0]))
        optimizer.step()
        scheduler.step()
    assert [seen[0], min(seen), seen[-1]] == pytest.approx([0.95, 0.85, 0.95], abs=1e-3)
    assert seen.index(min(seen)) == 0.3 * 40 - 1


def test_cosine_falls_to_zero():
    lrs = rates("cosine", 20)
    assert lrs[0] == 0.1 and lrs[10] == pytest.approx(0.05) and lrs[-1] == pytest.approx(0, abs=1e-9)
    assert all(a > b for a, b in zip(lrs, lrs[1:], strict=False))


def test_plateau_halves_when_the_loss_stays():
    assert rates("plateau", 4, [1.0, 0.9, 0.8, 0.7]) == [0.1] * 5
    lrs = rates("plateau", 12, [1.0] * 12)
    assert lrs[:4] == [0.1] * 4 and set(lrs) == {0.1, 0.05, 0.025}


def test_steps_move_the_schedule_by_batch():
    model = plain_network()
    optimizer = sgd(model)
    scheduler = make_scheduler("cosine", optimizer, total_steps=4)
    step = TrainStep(model, optimizer, prepare, scheduler=scheduler, grad_accum=2)
    for batch in split(*pictures(16), 4):
        step(*batch)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)
    plateau = make_scheduler("plateau", optimizer, total_steps=4)
    TrainStep(model, optimizer, prepare, scheduler=plateau)(*pictures(4))
    assert plateau.last_epoch == 0
    assert make_scheduler("none", optimizer, total_steps=4) is None
    assert [steps_per_batch(s) for s in (None, scheduler, plateau)] == [False, True, False]


@pytest.mark.parametrize(
    "name, kind", [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)]
)
def test_optimisers_hold_what_learns(name, kind):
    model = plain_network()
    model[0].requires_grad_(False)
    optimizer = make_optimizer(name, model, lr=0.02, weight_decay=0.3)
    (group,) = optimizer.param_groups
    assert type(optimizer) is kind and (group["lr"], group["weight_decay"]) == (0.02, 0.3)
    assert [id(p) for p in group["params"]] == [id(p) for p in model[-1].parameters()]
    assert name != "sgd" or (group["momentum"], group["nesterov"]) == (0.9, True)


def test_the_loss_with_a_teacher():
    """0.8 of it is the cross-entropy with the teacher's probabilities, 0.2 that with the labels."""
    torch.manual_seed(0)
    model, teacher = (torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3)) for _ in range(2))
    images, labels, bias = torch.rand(6, 1, 2, 2), torch.tensor([0, 1, 2, 0, 1, 2]), model[1].bias.detach().clone()
    own, its = model(images).log_softmax(1), teacher(images).softmax(1)
    expected = -0.2 * own[range(6), labels].sum() - 0.8 * (its * own).sum()
    gradient = torch.autograd.grad(expected / 6, model[1].weight)[0]
    before = model[1].weight.detach().clone()
    for passes in (1, 3):
        optimizer = make_optimizer("sgd", model, lr=0.5, weight_decay=0)
        optimizer.param_groups[0]["momentum"], optimizer.param_groups[0]["nesterov"] = 0, False
        step = TrainStep(model, optimizer, lambda images: images, teachers=[teacher], grad_accum=passes)
        assert step(images, labels)[0].item() == pytest.approx(expected.item(), rel=1e-5)
        torch.testing.assert_close(model[1].weight, before - 0.5 * gradient)
        model[1].weight.data.copy_(before)
        model[1].bias.data.copy_(bias)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_mixup_blends_pictures_and_labels():
    """The loss of a linear network is that of the blended pictures, shared between both labels."""
    seen, (images, labels) = [], pictures(8)
    model = plain_network()
    step = TrainStep(model, make_optimizer("sgd", model, lr=0.0, weight_decay=0), prepare, mixup=0.4)
    hook = model.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    torch.manual_seed(3)
    loss, _ = step(images, labels)
    hook.remove()
    torch.manual_seed(3)
    share = torch.distributions.Beta(0.4, 0.4).sample().item()
    share, order = max(share, 1 - share), torch.randperm(8)
    assert 0.5 <= share < 1 and not torch.equal(order, torch.arange(8))
    expected = share * prepare(images) + (1 - share) * prepare(images)[order]
    torch.testing.assert_close(seen[0], expected)
    with torch.no_grad():
        logits = model(expected)
    both = [F.cross_entropy(logits, target, reduction="sum").item() for target in (labels, labels[order])]
    assert loss.item() == pytest.approx(share * both[0] + (1 - share) * both[1], rel=1e-4)


# Evaluation


def test_evaluation_is_in_order_and_normalised():
    model, (images, labels) = norm_network().train(), pictures(10)
    logits, targets = evaluate(model, split(images, labels, 4), prepare)
    assert not model.training
    with torch.no_grad():
        expected = model(prepare(images))
    torch.testing.assert_close(logits, expected[None])
    assert torch.equal(targets, labels) and logits.dtype == torch.float32 and logits.device == CPU
    loss, acc = loss_and_accuracy(to_log_probs(logits), targets)
    assert loss == pytest.approx(F.cross_entropy(expected, labels).item(), rel=1e-5)
    assert acc == pytest.approx((expected.argmax(1) == labels).float().mean().item())


def test_evaluation_changes_no_weights_or_statistics():
    model = norm_network().train()
    before = state_of(model)
    evaluate(model, split(*pictures(10), 4), prepare, tta=True)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_tta_is_the_mean_over_the_mirrored_picture(temperature):
    model, (images, labels) = plain_network().eval(), pictures(6)
    log_probs = to_log_probs(evaluate(model, split(images, labels, 4), prepare, tta=True)[0], temperature)
    with torch.no_grad():
        plain, mirrored = (F.softmax(model(prepare(view)) / temperature, 1) for view in (images, images.flip(-1)))
    assert (plain - mirrored).abs().max() > 0.01
    torch.testing.assert_close(log_probs.exp(), (plain + mirrored) / 2)


def test_temperature_divides_the_logits():
    model, batches = plain_network(), split(*pictures(6), 4)
    logits, _ = evaluate(model, batches, prepare)
    one, two = (to_log_probs(logits, t) for t in (1.0, 2.0))
    torch.testing.assert_close(two, F.log_softmax(one / 2, 1))
    assert torch.equal(one.argmax(1), two.argmax(1))


def test_loss_and_accuracy_by_hand():
    log_probs = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]))
    loss, acc = loss_and_accuracy(log_probs, torch.tensor([0, 2]))
    assert loss == pytest.approx(-(math.log(0.5) + math.log(0.1)) / 2) and acc == 0.5


@pytest.mark.parametrize("true", [0.7, 1.0, 2.6])
def test_temperature_is_found_again(true):
    """Labels drawn from softmax(logits / true) are best told by that temperature."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(1, 20_000, 5, generator=generator)
    labels = torch.multinomial((logits[0] / true).softmax(1), 1, generator=generator)[:, 0]
    assert fit_temperature(logits, labels) == pytest.approx(true, rel=0.04)


def test_temperature_stays_in_bounds():
    logits, labels = 4 * torch.eye(4).repeat(1, 25, 1), torch.arange(4).repeat(25)
    assert fit_temperature(logits, labels) == pytest.approx(0.5, rel=0.01)  # all right: sharper were always better
    assert fit_temperature(logits, (labels + 1) % 4) == pytest.approx(5, rel=0.01)  # all wrong
    assert fit_temperature(logits[:, 1:], labels[1:]) == 1.0  # too few to tell


def test_temperature_of_a_calibrated_network_is_one():
    probs = torch.tensor([0.75, 0.25]).log().repeat(100, 1)[None]
    assert fit_temperature(probs, (torch.arange(100) % 4 == 0).long()) == 1.0


# Device, precision, seeds


def test_devices():
    assert pick_device("cpu") == CPU
    expected = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert pick_device("auto").type == expected


@pytest.mark.parametrize("name", ["banana", "", "cuda:99", "cpu:x", "xpu", "hpu", "mtia", "vulkan", "xla", "cuda:-1"])
def test_devices_that_are_not_there(name):
    with pytest.raises(InputError) as caught:
        pick_device(name)
    assert f"--device {name}" in str(caught.value) and "\n" not in str(caught.value)


def test_a_device_that_holds_no_numbers_is_refused():
    with pytest.raises(InputError, match="--device meta"):
        pick_device("meta")


def test_precisions():
    assert pick_precision("fp32", CPU) == torch.float32 and pick_precision("bf16", CPU) == torch.bfloat16
    multiplies = {name for name, there in torch.cpu.get_capabilities().items() if there}
    has_bf16 = torch.backends.mkldnn.is_available() and multiplies & {"avx512_bf16", "amx_bf16", "bf16"}
    assert pick_precision("auto", CPU) == (torch.bfloat16 if has_bf16 else torch.float32)
    assert pick_precision("auto", torch.device("mps")) == torch.float32
    assert pick_precision("fp16", torch.device("cuda")) == torch.float16
    for device in ("cpu", "mps"):
        with pytest.raises(InputError) as caught:
            pick_precision("fp16", torch.device(device))
        assert "--precision fp16" in str(caught.value) and "\n" not in str(caught.value)


def test_autocast_is_off_in_float32():
    a = torch.randn(4, 4)
    with autocast(CPU, torch.float32):
        assert (a @ a).dtype == torch.float32
    with autocast(CPU, torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16


def test_bfloat16_trains_float32_weights():
    model, (images, labels) = norm_network().train(), pictures(12)
    seen = []
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    step = TrainStep(model, make_optimizer("adam", model, lr=0.01, weight_decay=0), prepare, precision=torch.bfloat16)
    losses = [train_one_epoch(step, split(images, labels, 6), total=12)["loss"] for _ in range(15)]
    assert set(seen) == {torch.bfloat16} and all(p.dtype == torch.float32 for p in model.parameters())
    assert losses[-1] < losses[0] / 2
    log_probs = to_log_probs(evaluate(model, split(images, labels, 6), prepare, precision=torch.bfloat16)[0])
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(12))


def test_seeds_tell_epochs_and_ranks_apart():
    drawn = {}
    for seed in range(3):
        for epoch in range(1, 5):
            for rank in range(3):
                for purpose in ("order", "augmentation", "dropout"):
                    value = seed_for(purpose, seed, epoch, rank)
                    drawn[value] = torch.rand(1, generator=torch.Generator().manual_seed(value)).item()
    assert len(drawn) == 108 and len(set(drawn.values())) == 108
    assert seed_for("order", 1, 2, 0) in drawn


def test_the_largest_seed_works():
    torch.Generator().manual_seed(seed_for("order", 2**31 - 1, 10_000, 7))


# Networks learn


@pytest.mark.parametrize("arch", ["cnn6_bn", "cnn6_rgb", "cnn4_bn", "cnn4", "seresnet13"])
def test_sixteen_pictures_are_learnt_by_heart(arch):
    torch.manual_seed(0)
    model = create_model(arch, 4, image_size=32, dropout=0.0)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # between convolutions the flag leaves it, and with it statistics shift (arXiv:1801.05134)
    spec = model.input_spec
    images, labels = pictures(16, size=32, channels=spec.channels, classes=4)
    optimizer = make_optimizer("adam", model, lr=1e-3, weight_decay=0)
    step = TrainStep(model, optimizer, lambda x: to_input(x, spec))
    train_mode(model)
    right = [0]
    while right[-3:] != [16] * 3 and len(right) < 60:
        right.append(step(images, labels)[1].item())
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]
    for norm in norms:  # the running statistics lag behind so few steps
        norm.reset_running_stats()
        norm.momentum = None
    with torch.no_grad():
        for _ in range(8 if norms else 0):
            model(to_input(images, spec))
    logits, _ = evaluate(model, [(images, labels)], lambda x: to_input(x, spec))
    acc = loss_and_accuracy(to_log_probs(logits), labels)[1]
    assert right[-3:] == [16] * 3 and acc == 1.0


@pytest.mark.parametrize(
    ("text", "threads"), [("200000 100000", 2), ("150000 100000", 2), ("50000 100000", 1), ("max 100000", None)]
)
def test_share_of_the_cpus_that_a_container_has(text, threads):
    assert cpu_limit(text) == threads
