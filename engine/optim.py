"""Optimizers, learning-rate schedules and the moving average of the weights."""

import copy

import torch
from torch import nn

from models import get_arch

OPTIMIZERS = {"adam": 1e-3, "adamw": 3e-3, "muon": 0.02, "sgd": 0.05}  # learning rates to start from
SCHEDULES = ("none", "plateau", "cosine", "onecycle", "linear")


def make_optimizer(
    name: str,
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    backbone_lr: float = 1.0,
    precision: torch.dtype = torch.float32,
) -> torch.optim.Optimizer:
    """Adam, AdamW, Muon, or SGD with Nesterov momentum 0.9, over the parameters that require a gradient.

    Layers before the classifier have `backbone_lr` times the learning rate. With Muon, 0.15 times the learning rate is
    AdamW's, which has everything but the `hidden_matrices`. `precision` is that of Muon's matrix products.
    """
    classifier = model if backbone_lr == 1 else model.get_submodule(get_arch(model.info.arch).head)
    at_full_rate = set(classifier.parameters())
    matrices = hidden_matrices(model) if name == "muon" else set()
    parts: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            parts.setdefault((parameter in at_full_rate, parameter in matrices), []).append(parameter)
    groups = []
    for (is_full, is_matrix), parameters in parts.items():
        rate = lr * (1 if is_full else backbone_lr) * (0.15 if name == "muon" and not is_matrix else 1)
        groups.append({"params": parameters, "lr": rate, "muon": is_matrix})
    if name == "muon":
        return Muon(groups, weight_decay=weight_decay, precision=precision)
    options = {"weight_decay": weight_decay, "fused": parameters[0].device.type in ("cpu", "cuda", "mps")}
    if name == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True, **options)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name](groups, **options)


def hidden_matrices(model: nn.Module) -> set[nn.Parameter]:
    """The weights of convolutions and linear layers, except those of the first and the last, and grouped ones."""
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    return {layer.weight for layer in layers[1:-1] if getattr(layer, "groups", 1) == 1}


class Muon(torch.optim.AdamW):
    """Muon for the parameter groups that have "muon": True, AdamW for the others.

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) replaces the update of a weight, as a matrix of
    (outputs, inputs times kernel), by the nearest orthogonal one. Nesterov momentum is betas[0], so that a schedule
    that cycles it cycles that of both.
    """

    def __init__(self, groups: list[dict], *, weight_decay: float, precision: torch.dtype):
        super().__init__(groups, weight_decay=weight_decay)
        self.precision = precision

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            if group["muon"]:
                self._step_matrices(group)
        super().step()  # passes over the matrices, which have no gradient any more

    def _step_matrices(self, group: dict) -> None:
        momentum, by_shape = group["betas"][0], {}
        for weight in group["params"]:
            if weight.grad is None:
                continue
            state = self.state[weight]
            if not state:  # AdamW's names, and the step that its __setstate__ looks for
                state |= {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(weight)}
            state["exp_avg"].lerp_(weight.grad, 1 - momentum)
            update = weight.grad.lerp(state["exp_avg"], momentum).flatten(1)
            by_shape.setdefault(update.shape, []).append((weight, update))
            weight.grad = None
        for (rows, columns), pairs in by_shape.items():  # equal shapes in one batch
            updates = orthogonalize(torch.stack([update for _, update in pairs]).to(self.precision))
            for (weight, _), update in zip(pairs, updates, strict=True):
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.sub_(update.view(weight.shape), alpha=group["lr"] * max(1, rows / columns) ** 0.5)


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """(N, rows, columns) -> the same singular vectors, and singular values near 1 (0.7 to 1.2).

    Four Newton-Schulz steps, with the coefficients of Jordan et al. 2024, whose fifth lifts only values below 0.005 of
    the matrix's norm.
    """
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(4):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if is_tall else x


def make_scheduler(name: str, optimizer: torch.optim.Optimizer, *, total_steps: int):
    """torch's scheduler, or None. plateau steps after every epoch, the others after every batch.

    plateau halves the learning rate at the fourth epoch in a row without a lower validation loss. onecycle is Smith
    & Topin 2017, arXiv:1708.07120; its peak is the optimizer's lr, and SGD's momentum and Adam's beta1 go from 0.95 to
    0.85 and back meanwhile. linear rises over the first 5% of the steps, and falls to nearly zero.
    """
    schedulers, peaks = torch.optim.lr_scheduler, [group["lr"] for group in optimizer.param_groups]
    if name == "plateau":
        return schedulers.ReduceLROnPlateau(optimizer, factor=0.5, patience=3)
    if name == "cosine":
        return schedulers.CosineAnnealingLR(optimizer, T_max=total_steps)
    if name == "onecycle":
        return schedulers.OneCycleLR(optimizer, peaks, total_steps=total_steps)
    if name == "linear":
        rise = max(1, total_steps // 20)
        fall = max(1, total_steps - rise)
        return schedulers.LambdaLR(optimizer, lambda step: min((step + 1) / rise, (total_steps - step) / fall))
    return None


def steps_per_batch(scheduler) -> bool:
    return scheduler is not None and not isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)


class Ema:
    """Exponential moving average of a model's weights and batch-norm statistics, in `model`.

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
