"""Optimizers, learning-rate schedules and the moving average of the weights."""

import copy

import torch
from torch import nn

OPTIMIZERS = ("adam", "adamw", "sgd")
SCHEDULES = ("none", "plateau", "cosine", "onecycle")


def make_optimizer(name: str, model: nn.Module, *, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Adam, AdamW, or SGD with Nesterov momentum 0.9, over the parameters that require a gradient."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    options = {"lr": lr, "weight_decay": weight_decay, "fused": parameters[0].device.type in ("cpu", "cuda", "mps")}
    if name == "sgd":
        return torch.optim.SGD(parameters, momentum=0.9, nesterov=True, **options)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name](parameters, **options)


def make_scheduler(name: str, optimizer: torch.optim.Optimizer, *, total_steps: int):
    """torch's scheduler, or None. cosine and onecycle step after every batch, plateau after every epoch.

    plateau halves the learning rate at the fourth epoch in a row without a lower validation loss. onecycle is Smith
    & Topin 2017, arXiv:1708.07120; its peak is the optimizer's lr, and SGD's momentum and Adam's beta1 go from 0.95 to
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
