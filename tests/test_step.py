"""engine/step.py: the step against plain PyTorch, the epoch, and the seeds."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import refusal
from torch import nn
from torch.nn import functional as F

from engine.evaluation import evaluate, loss_and_accuracy
from engine.step import TrainStep, make_class_weights, make_logit_adjustment, seed_for, train_one_epoch
from models import InputSpec, ModelInfo, create_model, last_layer
from preprocessing import to_input
from splits import Batches

CPU = torch.device("cpu")
SPEC = InputSpec(image_size=8)
CLASSES = 3


def augment(images, generator=None):
    return to_input(images, SPEC)  # none


def with_info(*layers):
    model = nn.Sequential(*layers)
    model.info = ModelInfo("small", ["angry", "happy", "sad"], SPEC)
    return model


def plain_model(seed=0):
    """Without batch-norm, so that a step does not depend on how a batch is split."""
    torch.manual_seed(seed)
    return with_info(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, CLASSES))


def norm_model(seed=0):
    torch.manual_seed(seed)
    return with_info(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, CLASSES))


def draw_images(count, seed=0, size=8, channels=1, classes=CLASSES):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8, generator=generator)
    return images, torch.arange(count) % classes


def to_batches(images, labels):
    data = SimpleNamespace(images=images.numpy(), labels=labels.numpy())  # as of FolderImages
    return Batches(data, np.arange(len(labels)), CPU)


def train_epoch(step, images, labels, batch_size=4, **options):
    order = torch.arange(len(labels))
    return train_one_epoch(step, to_batches(images, labels), order, batch_size=batch_size, **options)


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr)


def state_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_close(one, other, **tolerances):
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], msg=key, **tolerances)


@pytest.mark.parametrize(("smoothing", "weights"), [(0.0, None), (0.2, [0.5, 1.0, 3.0])])
def test_steps_are_those_of_plain_pytorch(smoothing, weights):
    """Its cross-entropy with hard labels, divided by the number of images, whatever the class weights sum to."""
    images, labels = draw_images(8)
    ours, theirs = plain_model(), plain_model()
    optimizer, tensor = sgd(theirs), weights and torch.tensor(weights)
    step = TrainStep(ours, sgd(ours), augment, class_weights=weights, label_smoothing=smoothing)
    for _ in range(3):
        logits = theirs(augment(images))
        expected = F.cross_entropy(logits, labels, tensor, label_smoothing=smoothing, reduction="sum")
        loss, correct = step(images, labels)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6) and not loss.requires_grad
        assert correct.item() == (logits.argmax(1) == labels).sum().item()
        optimizer.zero_grad()
        (expected / 8).backward()
        optimizer.step()
        assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-6, atol=1e-6)


def test_balanced_and_sqrt_class_weights():
    assert make_class_weights("none", [5, 0]) == [1.0, 1.0]
    assert make_class_weights("balanced", [10, 30, 20]) == pytest.approx([2, 2 / 3, 1])
    assert make_class_weights("sqrt", [10, 40]) == pytest.approx([5 / 3, 5 / 6])  # 50 in all, as the images
    assert "--class-weights" in refusal(make_class_weights, "balanced", [5, 0])


def test_logit_adjustment_is_in_the_loss_alone():
    offsets = make_logit_adjustment(0.5, [1, 4, 5])
    assert offsets == pytest.approx([0.5 * np.log(share) for share in (0.1, 0.4, 0.5)])
    assert make_logit_adjustment(0.0, [0, 5]) == [0.0, 0.0]
    assert "--logit-adjustment" in refusal(make_logit_adjustment, 0.5, [0, 5])
    model, (images, labels) = plain_model(), draw_images(8)
    logits = model(augment(images)).detach()
    loss, correct = TrainStep(model, sgd(model), augment, logit_adjustment=offsets)(images, labels)
    expected = F.cross_entropy(logits + torch.tensor(offsets), labels, reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert correct.item() == (logits.argmax(1) == labels).sum().item()


def test_mixup_blends_images_and_losses():
    """The loss is that of the blended images, shared between the labels of both."""
    seen, (images, labels), model = [], draw_images(8), plain_model()
    step = TrainStep(model, sgd(model, lr=0.0), augment, mixup=0.4)
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    torch.manual_seed(3)
    loss, correct = step(images, labels)
    torch.manual_seed(3)
    share = torch.distributions.Beta(0.4, 0.4).sample().item()
    share, order = max(share, 1 - share), torch.randperm(8)
    torch.testing.assert_close(seen[0], share * augment(images) + (1 - share) * augment(images)[order])
    logits = model(seen[0]).detach()
    one, other = (F.cross_entropy(logits, target, reduction="sum") for target in (labels, labels[order]))
    assert loss.item() == pytest.approx((share * one + (1 - share) * other).item(), rel=1e-6)
    assert correct.item() == (logits.argmax(1) == labels).sum().item()


@pytest.mark.parametrize("passes", [1, 3])
def test_a_teacher_gives_its_share_of_the_loss(passes):
    """0.8 of it is the cross-entropy with the teacher's probabilities, 0.2 that with the labels."""
    model, teacher, (images, labels) = plain_model(), plain_model(1), draw_images(6)
    own, its = model(augment(images)).log_softmax(1), teacher(augment(images)).softmax(1)
    expected = -0.2 * own[range(6), labels].sum() - 0.8 * (its * own).sum()
    gradients = torch.autograd.grad(expected / 6, list(model.parameters()))
    updated = [parameter.detach() - 0.5 * grad for parameter, grad in zip(model.parameters(), gradients, strict=True)]
    step = TrainStep(model, sgd(model, lr=0.5), augment, teachers=[teacher], grad_accum=passes)
    assert step(images, labels)[0].item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close([parameter.detach() for parameter in model.parameters()], updated)
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize(("grad_accum", "count"), [(3, 12), (3, 7), (100, 7)])
def test_accumulated_gradients_are_the_same_step(grad_accum, count):
    found = []
    for passes in (1, grad_accum):
        model = plain_model()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, eps=1e-3)
        options = {"class_weights": [0.5, 1.0, 2.0], "label_smoothing": 0.1, "clip_grad": 0.5, "mixup": 0.3}
        step = TrainStep(model, optimizer, augment, grad_accum=passes, **options)
        step.seed(0, 1)
        results = [step(*draw_images(count)) for _ in range(3)]
        assert all(parameter.grad is None for parameter in model.parameters())
        found.append((results, list(model.state_dict().values())))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_accumulation_never_gives_batch_norm_one_image():
    model = norm_model()
    optimizer = torch.optim.Adam(model.parameters())
    step = TrainStep(model, optimizer, augment, grad_accum=3)
    for count, batches in ((2, 1), (3, 2), (5, 4), (8, 7), (9, 10)):
        step(*draw_images(count))
        assert model[1].num_batches_tracked == batches
    assert all(int(state["step"]) == 5 for state in optimizer.state.values())


def test_clipping_limits_the_norm_of_the_update():
    updates = []
    for clip_grad in (0.0, 0.1, 1e6):
        model = plain_model()
        TrainStep(model, sgd(model, lr=1.0), augment, clip_grad=clip_grad)(*draw_images(6))
        after, before = (nn.utils.parameters_to_vector(each.parameters()) for each in (model, plain_model()))
        updates.append((after - before).detach())
    free, clipped, below = updates
    assert free.norm() > 0.2 and torch.equal(free, below)
    torch.testing.assert_close(clipped, 0.1 * free / free.norm(), rtol=1e-2, atol=1e-4)


def test_an_epoch_averages_over_the_images_of_its_order():
    model, (images, labels) = plain_model().eval(), draw_images(12)
    order = torch.tensor([3, 0, 11, 7, 7, 1, 2, 10, 5, 4])  # not a mean over batches: the last has two
    logits = model(augment(images[order])).detach()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
    found = train_one_epoch(TrainStep(model, optimizer, augment), to_batches(images, labels), order, batch_size=4)
    assert found["loss"] == pytest.approx(F.cross_entropy(logits, labels[order]).item(), rel=1e-5)
    assert found["acc"] == (logits.argmax(1) == labels[order]).sum().item() / 10
    assert found["images_per_s"] > 0 and all(type(value) is float for value in found.values())
    assert model.training and all(int(state["step"]) == 3 for state in optimizer.state.values())


def test_a_diverging_run_ends_with_one_line():
    model = plain_model()
    step = TrainStep(model, sgd(model, lr=1e30), augment)
    message = refusal(train_epoch, step, *draw_images(30), 2, title="epoch 3/9")
    assert message.startswith("epoch 3/9: the loss became ") and "at learning rate 1e+30; try a lower --lr" in message


@pytest.mark.parametrize("source", ["augmentation", "dropout", "mixup", "teachers"])
def test_all_randomness_of_an_epoch_follows_from_its_seed(source):
    def noisy(images, generator):
        return augment(images) + torch.randn(images.shape, generator=generator) * (source == "augmentation")

    model = with_info(nn.Flatten(), nn.Dropout(0.5 * (source == "dropout")), nn.Linear(64, CLASSES))
    teachers = [plain_model(1), plain_model(2)] if source == "teachers" else ()
    step = TrainStep(model, sgd(model, lr=0.0), noisy, mixup=0.4 * (source == "mixup"), teachers=teachers)

    def losses(seed, epoch):
        step.seed(seed, epoch)
        return [step(*draw_images(6))[0].item() for _ in range(16)]

    assert losses(0, 1) == losses(0, 1) and len(set(losses(0, 1))) > 1
    assert losses(0, 1) != losses(0, 2) != losses(1, 1) != losses(0, 1)
    parts = itertools.product(("order", "dropout"), (0, 1, 2), (1, 2, 3), (0, 1))  # purposes, seeds, epochs, ranks
    assert len({seed_for(*part) for part in parts}) == 36


@pytest.mark.parametrize("arch, precision", [("cnn4_bn", "bfloat16"), ("seresnet13", "float32")])
def test_twelve_images_are_learned_by_heart(arch, precision):
    torch.manual_seed(0)
    model, seen, precision = create_model(arch, 4, image_size=32, dropout=0.0), set(), getattr(torch, precision)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # running statistics would lag behind so few steps
    last_layer(model).register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    spec, adam = model.info.input_spec, torch.optim.Adam(model.parameters())
    images, labels = draw_images(12, size=32, channels=spec.channels, classes=4)
    step = TrainStep(model, adam, lambda images, generator: to_input(images, spec), precision=precision)
    for _ in range(15):
        step(images, labels)
    assert seen == {precision} and all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert loss_and_accuracy(*evaluate(model, to_batches(images, labels), batch_size=12))[1] == 1.0
