"""The loops: one training step, one epoch, evaluation; EMA, schedules, device and precision.

Nothing here knows about pictures' files or about networks: pictures come as batches (uint8 images, int64 labels), and
a function `prepare` turns images into what the network eats.
"""

import contextlib
import itertools
import math
import random
import time
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from device import autocast, memory_format
from engine.distributed import ALONE, Group
from engine.optim import Ema, steps_per_batch
from models import device_of

TEACHER_SHARE = 0.8  # of the loss, where there are teachers


def seed_for(purpose: str, seed: int, epoch: int, rank: int = 0) -> int:
    """The seed of one generator for one epoch; other purposes ("order", "dropout", ...) get unrelated ones.

    Everything random in an epoch follows from (seed, epoch, rank), so a resumed run needs no generator's state.
    """
    return random.Random(f"{purpose} {seed} {epoch} {rank}").getrandbits(63)


class TrainStep:
    """One optimiser step on one batch: prepare, forward, loss, backward, clip, update, schedule, EMA.

    `prepare` maps uint8 images (N, C, H, W) to the network's float32 input. The loss is the cross-entropy summed
    over the batch, weighted by `class_weights` (num_classes,), divided by the number of pictures. `grad_accum`
    splits a batch into that many passes whose gradients add up: less memory, and the same step but for batch-norm,
    which sees a pass at a time, and the draws of dropout. `mixup` blends each picture and its label with another's,
    by a share for the batch from Beta(mixup, mixup): Zhang et al. 2018, arXiv:1710.09412. With `teachers`, networks
    in evaluation mode, TEACHER_SHARE of the loss is the cross-entropy with the softmax of the logits that one of
    them, drawn anew for each batch and process, gives the same augmented pictures: Hinton et al. 2015,
    arXiv:1503.02531, by the same views as in Beyer et al. 2021, arXiv:2106.05237; the rest is the loss above. In a
    `group` of processes the batch is shared among them, and their gradients add up.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        prepare: Callable[[torch.Tensor], torch.Tensor],
        *,
        precision: torch.dtype = torch.float32,
        scheduler=None,
        class_weights: torch.Tensor | None = None,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        teachers: Sequence[nn.Module] = (),
        grad_accum: int = 1,
        clip_grad: float = 0.0,
        ema: Ema | None = None,
        group: Group = ALONE,
    ):
        self.group, self.network = group, group.wrap(model)
        self.model, self.optimizer, self.prepare, self.precision = model, optimizer, prepare, precision
        self.scheduler, self.ema = scheduler, ema
        self.class_weights, self.label_smoothing, self.mixup = class_weights, label_smoothing, mixup
        self.teachers = teachers
        self.grad_accum, self.clip_grad = grad_accum, clip_grad
        self.device = next(model.parameters()).device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == torch.float16)

    def __call__(
        self, images: torch.Tensor, labels: torch.Tensor, count: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (loss summed over the batch, number of right predictions), still on the device.

        `count` is the number of pictures in the batch of all processes, where these are a part of it.
        """
        inputs, others, share = self._mix(self.prepare(images), labels)
        inputs = inputs.contiguous(memory_format=memory_format(self.device))
        teacher = self._draw_teacher()
        passes = max(1, min(self.grad_accum, len(labels) // 2))  # batch-norm needs two pictures a pass
        loss_sum, correct = 0.0, 0
        parts = (tensor.tensor_split(passes) for tensor in (inputs, labels, others))
        for number, (part, target, other) in enumerate(zip(*parts, strict=True), 1):
            is_shared = number == passes or self.group.size == 1  # gradients are exchanged once a step
            with contextlib.nullcontext() if is_shared else self.network.no_sync():
                with autocast(self.device, self.precision):
                    logits = self.network(part)
                loss = self._loss(logits, target)
                if share < 1:
                    loss = share * loss + (1 - share) * self._loss(logits, other)
                if teacher:
                    loss = torch.lerp(loss, self._loss_to(teacher, part, logits), TEACHER_SHARE)
                self.scaler.scale(loss * (self.group.size / (count or len(labels)))).backward()
            loss_sum = loss_sum + loss.detach()
            correct = correct + (logits.detach().argmax(1) == target).sum()
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

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        options = {"label_smoothing": self.label_smoothing, "reduction": "sum"}
        return F.cross_entropy(logits.float(), labels, self.class_weights, **options)

    def _draw_teacher(self) -> nn.Module | None:
        return self.teachers[int(torch.randint(len(self.teachers), ()))] if self.teachers else None

    def _loss_to(self, teacher: nn.Module, inputs: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), autocast(self.device, self.precision):
            answers = teacher(inputs)
        return F.cross_entropy(logits.float(), answers.float().softmax(1), reduction="sum")

    def _mix(self, inputs: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
        """The blended pictures, the labels of those that they were blended with, and the share of the first, 0.5 to 1.

        Drawn from torch's own generator, which is seeded for every epoch.
        """
        if not self.mixup:
            return inputs, labels, 1.0
        share = torch.distributions.Beta(self.mixup, self.mixup).sample().item()
        share = max(share, 1 - share)
        order = torch.randperm(len(labels)).to(labels.device)
        return torch.lerp(inputs[order], inputs, share), labels[order], share


def train_one_epoch(
    step: TrainStep,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    *,
    total: int,
    counts: Iterable[int | None] = itertools.repeat(None),
    title: str = "",
) -> dict[str, float]:
    """One epoch over `batches` of `total` pictures. Returns loss and acc per picture, and images_per_s.

    In a group, `batches` are this process's parts of those that all processes share, which have `counts` pictures;
    `total` and what is returned are of all together. The network must be in training mode. Raises FloatingPointError
    where the loss is no finite number any more.
    """
    loss_sum, correct, count, shown = 0.0, 0, 0, 0.0
    start = time.perf_counter()
    with tqdm(total=total, desc=title, unit="img", leave=False, disable=None if step.group.is_main else True) as bar:
        for number, ((images, labels), whole) in enumerate(zip(batches, counts, strict=False), 1):
            loss, right = step(images, labels, whole)
            loss_sum, correct, count = loss_sum + loss, correct + right, count + len(labels)
            now = time.perf_counter()
            if now - shown > 0.5:  # reading a sum waits for the device, so only now and then
                shown = now
                mean = float(loss_sum) / count
                if step.group.size == 1:  # a group must stop together, at the sum
                    _check_finite(mean, step, number)
                bar.update(min(total, count * step.group.size) - bar.n)
                bar.set_postfix(loss=f"{mean:.4f}", acc=f"{100 * int(correct) / count:.1f}%", refresh=False)
        sums = step.group.sum([float(loss_sum), int(correct), count], step.device)
        _check_finite(sums[0], step, number)
    seconds = time.perf_counter() - start
    return {"loss": sums[0] / sums[2], "acc": sums[1] / sums[2], "images_per_s": sums[2] / seconds}


def _check_finite(loss: float, step: TrainStep, number: int) -> None:
    if not math.isfinite(loss):
        lr = step.optimizer.param_groups[0]["lr"]
        raise FloatingPointError(f"the loss became {loss} by step {number} at learning rate {lr:g}")


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    prepare: Callable[[torch.Tensor], torch.Tensor],
    *,
    tta: bool = False,
    precision: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits float32 (views, N, num_classes) and labels int64 (N,) on the CPU, in the order of the batches.

    One view, or with `tta` (test-time augmentation) two: each picture and its mirror image. Puts the network in
    evaluation mode.
    """
    model.eval()
    device = device_of(model)
    logits, targets = [], []
    for images, labels in batches:
        inputs = prepare(images).contiguous(memory_format=memory_format(device))
        with autocast(device, precision):
            views = [model(view) for view in ([inputs, inputs.flip(-1)] if tta else [inputs])]
        logits.append(torch.stack(views).float())
        targets.append(labels)
    return torch.cat(logits, 1).cpu(), torch.cat(targets).cpu()


def to_log_probs(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """(views, N, num_classes) logits -> (N, num_classes) logarithms of the probabilities, averaged over the views."""
    return F.log_softmax(logits / temperature, dim=2).logsumexp(0) - math.log(len(logits))


def fit_temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """What to divide logits (views, N, num_classes) by for the least cross-entropy: Guo et al. 2017, arXiv:1706.04599.

    Searched from 0.5 to 5 in steps of 1%. It stays 1 for fewer than 100 pictures: of a few that are all right, the
    sharpest is always the best.
    """
    if len(labels) < 100:
        return 1.0
    candidates = [1.01**step for step in range(-70, 163)]
    return min(candidates, key=lambda temperature: F.nll_loss(to_log_probs(logits, temperature), labels).item())


def loss_and_accuracy(log_probs: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Cross-entropy and accuracy (a fraction), both means over pictures."""
    return F.nll_loss(log_probs, labels).item(), (log_probs.argmax(1) == labels).float().mean().item()
