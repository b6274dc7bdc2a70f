"""Starting from what a network has learnt before: ImageNet weights under a new head, stages that stay frozen."""

import pickle

import torch
from torch import nn

from errors import InputError
from models import head_prefix


def load_imagenet_weights(model: nn.Module) -> None:
    """Puts torchvision's ImageNet weights under the head of a backbone, downloaded where they aren't cached yet.

    Raises InputError where the arch has none or they can't be downloaded, and says how to get them.
    """
    if head_prefix(model.arch) is None:
        raise InputError(f"--pretrained: there are no ImageNet weights for {model.arch}; leave the flag out")
    from torchvision.models import get_model_weights

    weights = get_model_weights(model.arch).DEFAULT
    try:
        state_dict = weights.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:  # no network, or a damaged kept file
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(
            f"the ImageNet weights of {model.arch} can't be had ({reason}): download {weights.url} and pass the file "
            "with --weights, or train from nothing with --no-pretrained"
        ) from None
    load_backbone(model, state_dict)


def load_backbone(model: nn.Module, state_dict: dict[str, torch.Tensor]) -> None:
    """Loads all but the head from torchvision's `state_dict`; raises InputError where the two don't fit."""
    prefix = head_prefix(model.arch)
    if prefix is None:
        raise InputError(f"{model.arch} is no torchvision backbone, so these weights don't fit it")
    own = {key: value for key, value in model.state_dict().items() if key.startswith(prefix)}
    rest = {key: value for key, value in state_dict.items() if not key.startswith(prefix)}
    try:
        model.load_state_dict({**rest, **own})
    except RuntimeError as error:
        raise InputError(f"these weights don't fit {model.arch}: {' '.join(str(error).split())[:300]}") from None


def list_stages(model: nn.Module) -> list[str]:
    """Names of a backbone's stages from the input on, as --freeze takes them; empty for a scratch network."""
    if head_prefix(model.arch) is None:
        return []
    if hasattr(model, "features"):
        return [f"features.{name}" for name, _ in model.features.named_children()]
    return [name for name, child in model.named_children() if name != "fc" and any(True for _ in child.parameters())]


def freeze(model: nn.Module, stage: str) -> None:
    """Freezes a backbone from its input up to and with `stage` ("all": the whole of it, only the head learns).

    Frozen stages get no gradient, and `train_mode` keeps their batch-norm statistics. Raises InputError for a stage
    that the network does not have, with the list of those that it has.
    """
    stages = list_stages(model)
    if not stages:
        raise InputError(f"--freeze: {model.arch} is no pretrained backbone and has no stages to freeze")
    if stage != "all" and stage not in stages:
        raise InputError(f"--freeze: {model.arch} has no stage {stage!r}; choose from: all, {', '.join(stages)}")
    model.frozen = stages if stage == "all" else stages[: stages.index(stage) + 1]
    for name in model.frozen:
        model.get_submodule(name).requires_grad_(False)


def train_mode(model: nn.Module) -> None:
    """`model.train()`, except that frozen stages stay in evaluation mode."""
    model.train()
    for name in model.frozen:
        model.get_submodule(name).eval()
