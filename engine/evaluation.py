"""Measuring a model: its logits on a split, the temperature that calibrates them, the metrics of a report."""

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import reports
from device import autocast, memory_format
from engine.distributed import ALONE, ProcessGroup
from models import device_of
from preprocessing import to_input
from splits import Batches, shard


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Batches,
    *,
    batch_size: int,
    tta: bool = False,
    precision: torch.dtype = torch.float32,
    group: ProcessGroup = ALONE,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits float32 (views, N, num_classes) and labels int64 (N,) of all images, in order, on the CPU.

    One view per image, or with `tta` (test-time augmentation) two: the image and its mirror image. Each process of the
    group takes a shard, and every one gets all logits. Puts the model in evaluation mode.
    """
    model.eval()
    if len(batches) < group.world_size:
        group = ALONE  # too few to share: every process evaluates all
    device, logits, labels = device_of(model), [], []
    positions = torch.arange(*shard(0, len(batches), group.rank, group.world_size))
    for images, targets in batches.iterate(batch_size, positions):
        inputs = to_input(images, model.info.input_spec).contiguous(memory_format=memory_format(device))
        with autocast(device, precision):
            views = [model(view) for view in ([inputs, inputs.flip(-1)] if tta else [inputs])]
        logits.append(torch.stack(views).float())
        labels.append(targets)
    parts = group.gather((torch.cat(logits, 1).cpu(), torch.cat(labels).cpu()))
    return torch.cat([part for part, _ in parts], 1), torch.cat([part for _, part in parts])


def to_log_probs(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Logits (views, N, num_classes) -> logarithms (N, num_classes) of the probabilities, averaged over the views."""
    return F.log_softmax(logits / temperature, dim=2).logsumexp(0) - math.log(len(logits))


def loss_and_accuracy(logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Cross-entropy per image and accuracy (a fraction) of logits (views, N, num_classes)."""
    log_probs = to_log_probs(logits)
    return F.nll_loss(log_probs, labels).item(), (log_probs.argmax(1) == labels).float().mean().item()


def fit_temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The temperature by which logits (views, N, num_classes) have the lowest cross-entropy, from 0.5 to 5.

    Guo et al. 2017, arXiv:1706.04599; searched in steps of 1%. It stays 1 for fewer than 100 images: if all of a few
    are correct, the lowest one always wins.
    """
    if len(labels) < 100:
        return 1.0
    candidates = [1.01**step for step in range(-70, 163)]
    return min(candidates, key=lambda temperature: F.nll_loss(to_log_probs(logits, temperature), labels).item())


def measure(
    model: nn.Module,
    batches: Batches,
    *,
    split: str,
    batch_size: int,
    tta: bool = False,
    precision: torch.dtype = torch.float32,
    in_train: np.ndarray | None = None,
) -> dict:
    """The metrics of `model` on `batches`, as reports.compute_metrics returns them, with its arch."""
    info = model.info
    logits, labels = evaluate(model, batches, batch_size=batch_size, tta=tta, precision=precision)
    metrics = reports.compute_metrics(
        labels.numpy(),
        to_log_probs(logits, info.temperature).numpy(),
        info.class_names,
        split=split,
        temperature=info.temperature,
        uncalibrated=to_log_probs(logits).numpy(),
        in_train=in_train,
    )
    return metrics | {"arch": info.arch}
