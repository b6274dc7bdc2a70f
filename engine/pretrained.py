"""Starting from trained weights: ImageNet's, another checkpoint's, another tool's; stages that stay frozen."""

import pickle
from pathlib import Path

import torch
from torch import nn

from checkpoints import (
    build_model,
    check_weights,
    find_state_dict,
    is_checkpoint,
    load_file,
    match_keys,
    parse_checkpoint,
    read_checkpoint,
)
from device import memory_format
from errors import InputError, reason_of
from models import device_of, get_arch, last_layer_name


def load_imagenet_weights(model: nn.Module) -> None:
    """Loads torchvision's ImageNet weights under the head of a backbone, downloading them if they aren't cached.

    Raises InputError if the arch has none, or if they can't be downloaded, with the way to get them.
    """
    arch = get_arch(model.info.arch)
    if not arch.is_backbone:
        raise InputError(f"--pretrained: there are no ImageNet weights for {arch.name}; leave the flag out")
    from torchvision.models import get_model_weights

    weights = get_model_weights(arch.name).DEFAULT
    try:
        state_dict = weights.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:  # no network, or a damaged cached file
        raise InputError(
            f"can't get the ImageNet weights of {arch.name} ({reason_of(error)}): download {weights.url} and pass the "
            "file with --weights, or train from scratch with --no-pretrained"
        ) from None
    load_backbone(model, state_dict)


def load_backbone(model: nn.Module, state_dict: dict[str, torch.Tensor]) -> None:
    """Loads everything except the head from torchvision's `state_dict`; raises InputError if the two don't fit."""
    arch = get_arch(model.info.arch)
    if not arch.is_backbone:
        raise InputError(f"{arch.name} is no torchvision backbone, so these weights don't fit it")
    own = {key: value for key, value in model.state_dict().items() if key.startswith(f"{arch.head}.")}
    rest = {key: value for key, value in state_dict.items() if not key.startswith(f"{arch.head}.")}
    try:
        model.load_state_dict({**rest, **own})
    except RuntimeError as error:
        raise InputError(f"these weights don't fit {arch.name}: {reason_of(error, 300)}") from None


def load_initial_weights(model: nn.Module, path: str | Path) -> str:
    """Starts `model` from a checkpoint of the same arch, or from a state_dict, and returns one line on what was loaded.

    A state_dict may be torchvision's (the head then starts anew), lie in a dict as other tools save it, or have other
    keys than ours, if its tensors have the same shapes in the same order. The last layer is loaded only if its shape
    and, of a checkpoint, the class names are the model's. Raises InputError if the file does not fit.
    """
    arch, loaded = get_arch(model.info.arch), load_file(Path(path))
    if is_checkpoint(loaded):
        checkpoint = parse_checkpoint(loaded, path)
        if checkpoint["arch"] != arch.name:
            raise InputError(f"--weights {path} is of arch {checkpoint['arch']}, but --arch is {arch.name}")
        same_classes = checkpoint["class_names"] == model.info.class_names
        return _load_matching(model, checkpoint["state_dict"], path, keep_last=same_classes)
    state_dict = find_state_dict(loaded)
    if state_dict is None:
        raise InputError(f"--weights {path} holds neither a checkpoint nor a state_dict")
    if arch.is_backbone and last_layer_name(model) + ".weight" not in state_dict:
        try:
            load_backbone(model, state_dict)
        except InputError as error:
            raise InputError(f"--weights {path}: {error}") from None
        return f"{path}: backbone loaded, the head starts anew"
    return _load_matching(model, state_dict, path, keep_last=True)


def _load_matching(model: nn.Module, theirs: dict[str, torch.Tensor], path: str | Path, *, keep_last: bool) -> str:
    """Loads all of `theirs`, except the last layer if `keep_last` is False or its shape differs."""
    own, last = model.state_dict(), last_layer_name(model)
    try:
        state_dict = match_keys(theirs, own)
        there, here = (list(weights[f"{last}.weight"].shape) for weights in (state_dict, own))
        keep_last = keep_last and there == here
        kept = {} if keep_last else {key: own[key] for key in own if key.startswith(f"{last}.")}
        model.load_state_dict({**state_dict, **kept})
    except (RuntimeError, KeyError, AttributeError) as error:
        raise InputError(f"--weights {path} doesn't fit --arch {model.info.arch}: {reason_of(error, 300)}") from None
    check_weights(model.state_dict(), f"--weights {path}")
    how = "" if state_dict is theirs else ", in order, since their names are others"
    if not keep_last:
        how = f" but the last layer's{how}: other classes or size, {there} there and {here} here"
    return f"{path}: all weights loaded{how}"


def load_teacher(path: str, student: nn.Module, *, any_size: bool) -> nn.Module:
    """The model of a checkpoint, frozen, on the device of `student`.

    Raises InputError if it has other classes or another input, or with `any_size` if its arch takes one size only.
    """
    teacher = build_model(read_checkpoint(path), path)
    if any_size and not get_arch(teacher.info.arch).takes_any_size:
        raise InputError(
            f"--teacher {path}: {teacher.info.arch} takes images of one size only; pass --augment without window"
        )
    for name in ("class_names", "input_spec"):
        its, own = getattr(teacher.info, name), getattr(student.info, name)
        if its != own:
            raise InputError(
                f"--teacher {path}: its {name} must be those of the model that learns; it has {its}, not {own}"
            )
    device = device_of(student)
    return teacher.to(device, memory_format=memory_format(device)).requires_grad_(False)


def list_stages(model: nn.Module) -> list[str]:
    """Names of a backbone's stages from the input on, as --freeze takes them; empty for a scratch network."""
    arch = get_arch(model.info.arch)
    if not arch.is_backbone:
        return []
    if hasattr(model, "features"):
        return [f"features.{name}" for name, _ in model.features.named_children()]
    return [name for name, child in model.named_children() if name != arch.head and list(child.parameters())]


def freeze(model: nn.Module, stage: str) -> None:
    """Freezes a backbone from its input up to and including `stage`; "all" freezes everything except the head.

    Frozen stages get no gradient, and `train_mode` keeps their batch-norm statistics. Raises InputError for a stage
    that the model does not have, with the list of those that it has.
    """
    stages = list_stages(model)
    if not stages:
        raise InputError(f"--freeze: {model.info.arch} is no pretrained backbone and has no stages to freeze")
    if stage != "all" and stage not in stages:
        raise InputError(f"--freeze: {model.info.arch} has no stage {stage!r}; choose from: all, {', '.join(stages)}")
    for name in stages if stage == "all" else stages[: stages.index(stage) + 1]:
        model.get_submodule(name).requires_grad_(False)


def train_mode(model: nn.Module) -> None:
    """`model.train()`, except that modules whose parameters are all frozen stay in evaluation mode."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()
