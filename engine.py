"""The loops: one training step, one epoch, evaluation; EMA, schedules, device and precision.

Nothing here knows about pictures' files or about networks: pictures come as batches (uint8 images, int64 labels), and
a function `prepare` turns images into what the network eats.
"""

import contextlib
import copy
import ctypes
import itertools
import math
import os
import random
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from distributed import ALONE, Group
from models import InputError

OPTIMIZERS = ("adam", "adamw", "sgd")
SCHEDULES = ("none", "plateau", "cosine", "onecycle")
TEACHER_SHARE = 0.8  # of the loss, where there are teachers
PRECISIONS = ("auto", "fp32", "bf16", "fp16")


def pick_device(name: str = "auto") -> torch.device:
    """"auto" is CUDA, then MPS, then the CPU. Raises InputError for a device that isn't there."""
    rank = int(os.environ.get("LOCAL_RANK", -1))  # of torchrun, whose processes would all use the first GPU too
    if name in ("auto", "cuda") and 0 <= rank < torch.cuda.device_count():
        torch.cuda.set_device(rank)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        raise InputError(f"--device {name}: this machine or this build of PyTorch has no such device") from None
    return device


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """"auto" is bfloat16 where the hardware multiplies in it, else float32. Raises InputError for what can't be."""
    if name == "auto":
        name = "bf16" if _has_bf16(device) else "fp32"
    if name == "fp16" and device.type != "cuda":
        raise InputError(f"--precision fp16 needs a CUDA device, and this is {device.type}; bf16 and fp32 work here")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu" and torch.backends.mkldnn.is_available():  # what else there is, is slower than float32
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))
    return False


def limit_threads(processes: int = 1) -> None:
    """Keeps torch to its share of the CPUs that the machine and a container (cgroup v2) allow.

    More threads stand in each other's way. OMP_NUM_THREADS decides for a process alone; torchrun sets it to 1.
    """
    if processes == 1 and "OMP_NUM_THREADS" in os.environ:
        return
    cpus = torch.get_num_threads() if processes == 1 else _count_cpus()
    with contextlib.suppress(OSError, ValueError):  # no such cgroup
        cpus = min(cpus, cpu_limit(Path("/sys/fs/cgroup/cpu.max").read_text()) or cpus)
    torch.set_num_threads(max(1, cpus // processes))


def _count_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_freed_memory() -> None:
    """Lets glibc keep what is freed, for the whole process; does nothing with another C library.

    By default it returns large blocks to the system and fetches them anew, page by page, at every step: a tenth
    (cnn6_bn) to a quarter (cnn4_bn) of a step on two cores.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped on its own
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the top of the heap stays


def cpu_limit(text: str) -> int | None:
    """The CPUs that a cgroup's cpu.max ("QUOTA PERIOD" in microseconds) allows, rounded up; None: all."""
    quota, period = text.split()
    return None if quota == "max" else math.ceil(int(quota) / int(period))


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32)


def memory_format(device: torch.device) -> torch.memory_format:
    """channels_last is what convolutions run fastest in; MPS wants plain contiguous tensors."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def seed_for(purpose: str, seed: int, epoch: int, rank: int = 0) -> int:
    """The seed of one generator for one epoch; other purposes ("order", "dropout", ...) get unrelated ones.

    Everything random in an epoch follows from (seed, epoch, rank), so a resumed run needs no generator's state.
    """
    return random.Random(f"{purpose} {seed} {epoch} {rank}").getrandbits(63)


def make_optimizer(name: str, model: nn.Module, *, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Adam, AdamW, or SGD with Nesterov momentum 0.9, over the parameters that learn."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fused = parameters[0].device.type in ("cpu", "cuda", "mps")
    if name == "sgd":
        options = {"momentum": 0.9, "nesterov": True, "fused": fused}
        return torch.optim.SGD(parameters, lr=lr, weight_decay=weight_decay, **options)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    return kind(parameters, lr=lr, weight_decay=weight_decay, fused=fused)


def make_scheduler(name: str, optimizer: torch.optim.Optimizer, *, total_steps: int):
    """torch's scheduler, or None. cosine and onecycle step after every batch, plateau after every epoch.

    plateau halves the learning rate at the fourth epoch in a row without a lower validation loss. onecycle is Smith
    & Topin 2017, arXiv:1708.07120; its peak is the optimiser's lr, and SGD's momentum and Adam's beta1 go from 0.95 to
    0.85 and back meanwhile.
    """
    schedulers = torch.optim.lr_scheduler
    if name == "plateau":
        return schedulers.ReduceLROnPlateau(optimizer, factor=0.5, patience=3)
    if name == "cosine":
        return schedulers.CosineAnnealingLR(optimizer, T_max=total_steps)
    if name == "onecycle":
        return schedulers.OneCycleLR(optimizer, max_lr=optimizer.param_groups[0]["lr"], total_steps=total_steps)
    return None


def steps_per_batch(scheduler) -> bool:
    return scheduler is not None and not isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)


class Ema:
    """Exponential moving average of a network, batch-norm's running statistics included.

    The decay warms up as (1 + n) / (10 + n) over the updates n, so that short runs aren't held at their start.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        averaged, current = self.model.state_dict(), model.state_dict()
        floats = [key for key, value in averaged.items() if value.is_floating_point()]
        torch._foreach_lerp_([averaged[key] for key in floats], [current[key] for key in floats], 1 - decay)
        for key in averaged.keys() - set(floats):  # counters
            averaged[key].copy_(current[key])

    def state_dict(self) -> dict:
        return {"updates": self.updates, "state_dict": self.model.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.updates = state["updates"]
        self.model.load_state_dict(state["state_dict"])


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is what torch or Python raise where memory, of the device or the machine, is used up."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        text in str(error) for text in ("can't allocate memory", "not enough memory", "out of memory")
    )


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
    device = next(model.parameters()).device
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
