"""The training step and one epoch of steps. The loop over epochs, and when it stops, is in train_emotion_cnn.main.

Example::

    step = TrainStep(model, optimizer, augment)
    step.seed(0, epoch)
    means = train_one_epoch(step, splits.train, order, batch_size=64)      # {"loss": ..., "acc": ..., ...}
"""

import contextlib
import math
import random
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from device import autocast, memory_format
from engine.distributed import ALONE, ProcessGroup
from engine.optim import Ema, steps_per_batch
from engine.pretrained import train_mode
from errors import InputError
from models import device_of
from splits import Batches, batch_bounds

CLASS_WEIGHTS = ("none", "balanced", "sqrt")
TEACHER_SHARE = 0.8  # of a target that comes from a teacher


def seed_for(purpose: str, seed: int, epoch: int, rank: int = 0) -> int:
    """The seed of one generator for one epoch; each purpose ("order", "dropout", ...) gets an unrelated one.

    All randomness of an epoch follows from (seed, epoch, rank), so a resumed run needs no generator's state.
    """
    return random.Random(f"{purpose} {seed} {epoch} {rank}").getrandbits(63)


def make_class_weights(kind: str, counts: list[int]) -> list[float]:
    """balanced: n / (classes * n_class), as in scikit-learn; sqrt: its square root, with mean 1 over the images."""
    counts = np.array(counts, dtype=float)
    if kind == "none":
        return [1.0] * len(counts)
    if counts.min() == 0:
        raise InputError("--class-weights needs an image of every class to train on")
    weights = counts.sum() / (len(counts) * counts)
    if kind == "sqrt":
        weights = np.sqrt(weights)
        weights *= counts.sum() / (weights * counts).sum()
    return weights.tolist()


def make_logit_adjustment(tau: float, counts: list[int]) -> list[float]:
    """tau * log(share of the images), per class, to add to the logits in the loss: Menon et al. 2021, arXiv:2007.07314.

    Predictions go without it, so they favor rare classes: with tau 1, as if all classes were equally frequent.
    """
    if tau and min(counts) == 0:
        raise InputError("--logit-adjustment needs an image of every class to train on")
    return [tau * math.log(count / sum(counts)) if tau else 0.0 for count in counts]


class TrainStep:
    """One optimizer step on one batch: augment, mix, forward, loss, backward, clip, update, schedule, EMA.

    `augment(images, generator=...)` maps uint8 images (N, C, H, W) to normalized float32 inputs. The loss is the
    cross-entropy with soft targets (N, num_classes), divided by the number of images:

    - `logit_adjustment` (num_classes,) is added to the logits;
    - the target of a class is one-hot, smoothed by `label_smoothing`, times `class_weights` (num_classes,);
    - `mixup` blends each image and its target with another's, by a weight from Beta(mixup, mixup): Zhang et al.
      2018, arXiv:1710.09412;
    - with `teachers`, models in evaluation mode, a share TEACHER_SHARE of each target is what one of them, drawn anew
      per step, predicts for the same augmented images: Hinton et al. 2015, arXiv:1503.02531; same views as in
      Beyer et al. 2021, arXiv:2106.05237.

    `grad_accum` splits a batch into that many passes whose gradients add up: less memory and the same step, except
    for batch-norm, which sees one pass at a time, and the draws of dropout. In a `group` every process gets a shard of
    the batch, and their gradients add up.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        augment: Callable[..., torch.Tensor],
        *,
        precision: torch.dtype = torch.float32,
        scheduler=None,
        class_weights: Sequence[float] | None = None,
        logit_adjustment: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        teachers: Sequence[nn.Module] = (),
        grad_accum: int = 1,
        clip_grad: float = 0.0,
        ema: Ema | None = None,
        group: ProcessGroup = ALONE,
    ):
        self.model, self.optimizer, self.augment, self.precision = model, optimizer, augment, precision
        self.scheduler, self.ema, self.group = scheduler, ema, group
        self.mixup, self.teachers = mixup, teachers
        self.grad_accum, self.clip_grad = grad_accum, clip_grad
        self.device = device_of(model)
        self.wrapped_model = group.wrap(model)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == torch.float16)
        self.generator = torch.Generator(self.device)
        classes = torch.eye(model.info.num_classes, device=self.device)
        smoothed = (1 - label_smoothing) * classes + label_smoothing / len(classes)
        weights = torch.ones(len(classes)) if class_weights is None else torch.tensor(class_weights)
        self.logit_adjustment = torch.tensor(logit_adjustment or [0.0], device=self.device)
        self.class_targets = smoothed * weights.to(self.device)  # (num_classes, num_classes), a row per label

    @property
    def eval_model(self) -> nn.Module:
        """The model that is validated and saved: the EMA's, if EMA is on."""
        return self.ema.model if self.ema else self.model

    @property
    def lr(self) -> float:
        """The highest of the parameter groups' learning rates: --lr, as the schedule has it."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def seed(self, seed: int, epoch: int) -> None:
        """Seeds dropout, mixup and the choice of teachers (torch's own generator) and augmentation for an epoch."""
        torch.manual_seed(seed_for("dropout", seed, epoch, self.group.rank))
        self.generator.manual_seed(seed_for("augmentation", seed, epoch, self.group.rank))

    def __call__(
        self, images: torch.Tensor, labels: torch.Tensor, batch_size: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (loss summed over the images, number of correct predictions), still on the device.

        `batch_size` counts the images of all processes, if these are a shard of the batch.
        """
        inputs, targets = self.augment(images, generator=self.generator), self.class_targets[labels]
        if self.mixup:
            inputs, targets = mix(inputs, targets, self.mixup)
        inputs = inputs.contiguous(memory_format=memory_format(self.device))
        teacher = self.teachers[int(torch.randint(len(self.teachers), ()))] if self.teachers else None

        loss_scale = self.group.world_size / (batch_size or len(labels))  # a mean over the batch; DDP averages ranks
        passes = max(1, min(self.grad_accum, len(labels) // 2))  # batch-norm needs two images per pass
        loss_sum, correct = 0.0, 0
        parts = zip(*(tensor.tensor_split(passes) for tensor in (inputs, targets, labels)), strict=True)
        for number, (part, target, label) in enumerate(parts, 1):
            if teacher:
                target = torch.lerp(target, self._probs_of(teacher, part), TEACHER_SHARE)
            sync_gradients = number == passes or self.group.world_size == 1  # gradients are exchanged once per step
            with contextlib.nullcontext() if sync_gradients else self.wrapped_model.no_sync():
                with autocast(self.device, self.precision):
                    logits = self.wrapped_model(part)
                loss = F.cross_entropy(logits.float() + self.logit_adjustment, target, reduction="sum")
                self.scaler.scale(loss * loss_scale).backward()
            loss_sum = loss_sum + loss.detach()
            correct = correct + (logits.detach().argmax(1) == label).sum()

        if self.clip_grad:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if steps_per_batch(self.scheduler):
            self.scheduler.step()
        if self.ema:
            self.ema.update(self.model)
        return loss_sum, correct

    @torch.no_grad()
    def _probs_of(self, teacher: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
        with autocast(self.device, self.precision):
            return teacher(inputs).float().softmax(1)


def mix(inputs: torch.Tensor, targets: torch.Tensor, alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Blends each image and its target with another's of the batch; its own weight is from 0.5 to 1.

    The weight, one per batch, is drawn from Beta(alpha, alpha) by torch's own generator.
    """
    weight = torch.distributions.Beta(alpha, alpha).sample().item()
    weight = max(weight, 1 - weight)
    order = torch.randperm(len(inputs)).to(inputs.device)
    return torch.lerp(inputs[order], inputs, weight), torch.lerp(targets[order], targets, weight)


def train_one_epoch(
    step: TrainStep, train: Batches, order: torch.Tensor, *, batch_size: int, title: str = ""
) -> dict[str, float]:
    """One epoch over the images at the positions `order` of `train`; `batch_size` counts those of all processes.

    Returns loss and acc (a fraction), per augmented image and before its update, and images_per_s. Raises InputError if
    the loss becomes NaN or infinite.
    """
    train_mode(step.model)
    group, loss_sum, correct, count, shown = step.group, 0.0, 0, 0, 0.0
    start = time.perf_counter()
    batches = train.iterate(batch_size, order, rank=group.rank, world_size=group.world_size)
    sizes = [stop - first for first, stop in batch_bounds(len(order), batch_size, group.world_size)]
    with tqdm(total=len(order), desc=title, unit="img", leave=False, disable=None if group.is_main else True) as bar:
        for size, (images, labels) in zip(sizes, batches, strict=True):
            loss, right = step(images, labels, size)
            loss_sum, correct, count = loss_sum + loss, correct + right, count + len(labels)
            now = time.perf_counter()
            if now - shown > 0.5:  # reading a sum waits for the device, so only now and then
                shown = now
                mean = float(loss_sum) / count
                if group.world_size == 1:  # several raise together, after the sum below
                    check_finite(mean, title, step.lr)
                bar.update(min(len(order), count * group.world_size) - bar.n)
                bar.set_postfix(loss=f"{mean:.4f}", acc=f"{100 * int(correct) / count:.1f}%", refresh=False)
        loss_sum, correct, count = group.sum([float(loss_sum), int(correct), count], step.device)
    check_finite(loss_sum, title, step.lr)
    group.average_buffers(step.model, *([step.ema.model] if step.ema else []))
    return {"loss": loss_sum / count, "acc": correct / count, "images_per_s": count / (time.perf_counter() - start)}


def check_finite(loss: float, title: str, lr: float) -> None:
    """Raises InputError, with what to try, if the loss is NaN or infinite."""
    if not math.isfinite(loss):
        raise InputError(
            f"{title}: the loss became {loss} at learning rate {lr:g}; try a lower --lr or --clip-grad 1 (checkpoints "
            "of earlier epochs stay)"
        )
