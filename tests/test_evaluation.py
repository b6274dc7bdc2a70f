"""engine/evaluation.py: logits of a split in order, averaged views, the temperature, the metrics."""

from dataclasses import replace

import pytest
import torch
from test_step import CPU, augment, draw_images, norm_model, plain_model, state_of, to_batches
from torch.nn import functional as F

from engine.evaluation import evaluate, fit_temperature, loss_and_accuracy, measure, to_log_probs


def test_evaluation_is_in_order_and_changes_nothing():
    model, (images, labels) = norm_model().train(), draw_images(10)
    before = state_of(model)
    logits, targets = evaluate(model, to_batches(images, labels), batch_size=4)
    assert not model.training and all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    expected = model(augment(images)).detach()
    torch.testing.assert_close(logits, expected[None])
    assert torch.equal(targets, labels) and logits.dtype == torch.float32 and logits.device == CPU
    loss, accuracy = loss_and_accuracy(logits, targets)
    assert loss == pytest.approx(F.cross_entropy(expected, labels).item(), rel=1e-5)
    assert accuracy == pytest.approx((expected.argmax(1) == labels).float().mean().item())


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_tta_is_the_mean_over_the_mirrored_image(temperature):
    model, (images, labels) = plain_model().eval(), draw_images(6)
    logits, _ = evaluate(model, to_batches(images, labels), batch_size=4, tta=True)
    plain, mirrored = (F.softmax(model(augment(view)) / temperature, 1) for view in (images, images.flip(-1)))
    torch.testing.assert_close(to_log_probs(logits, temperature).exp(), ((plain + mirrored) / 2).detach())


def test_bfloat16_gives_float32_probabilities():
    logits, _ = evaluate(norm_model(), to_batches(*draw_images(12)), batch_size=6, precision=torch.bfloat16)
    torch.testing.assert_close(to_log_probs(logits).exp().sum(1), torch.ones(12))  # of this dtype


@pytest.mark.parametrize("true", [0.7, 2.6])
def test_temperature_is_found_again(true):
    """Labels drawn from softmax(logits / true) have the lowest loss at that temperature."""
    logits, _ = 3 * torch.randn(1, 10_000, 5, generator=torch.Generator().manual_seed(0)), torch.manual_seed(0)
    labels = torch.multinomial((logits[0] / true).softmax(1), 1)[:, 0]
    assert fit_temperature(logits, labels) == pytest.approx(true, rel=0.04)


def test_temperature_stays_in_bounds():
    logits, labels = 4 * torch.eye(4).repeat(1, 25, 1), torch.arange(4).repeat(25)
    assert fit_temperature(logits, labels) == pytest.approx(0.5, rel=0.01)  # all right: lower would always be better
    assert fit_temperature(logits, (labels + 1) % 4) == pytest.approx(5, rel=0.01)  # all wrong
    assert fit_temperature(logits[:, 1:], labels[1:]) == 1.0  # too few to tell


def test_measured_by_the_temperature_of_the_model():
    model, (images, labels) = plain_model(), draw_images(9)
    model.info = replace(model.info, temperature=2.0)
    metrics = measure(model, to_batches(images, labels), split="val", batch_size=4)
    logits = model(augment(images)).detach()
    for key, temperature in (("calibration", 2.0), ("uncalibrated", 1.0)):
        assert metrics[key]["loss"] == pytest.approx(F.cross_entropy(logits / temperature, labels).item(), rel=1e-5)
    assert metrics["accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert (metrics["split"], metrics["temperature"], metrics["arch"], metrics["count"]) == ("val", 2.0, "small", 9)
