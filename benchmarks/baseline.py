"""The baseline loop: training as PyTorch's tutorials have it.

ImageFolder, a PIL transform per image, a DataLoader, float32, loss.item() at every step. The network, batch size,
kinds of augmentation and optimizer are those of our recipe; AdamW stands for Muon, which PyTorch has for matrices only.
"""

from pathlib import Path

import torch
from torch import nn
from torchvision import datasets, transforms

from engine.augment import Strengths, parse_augment
from engine.settings import Settings
from models import Dropout, InputSpec, create_model, input_spec_for

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "muon": torch.optim.AdamW, "sgd": torch.optim.SGD}


def make_transform(spec: InputSpec, strengths: Strengths) -> transforms.Compose:
    """torchvision's counterparts of our augmentation, one image at a time."""
    size = spec.image_size
    steps = [transforms.Grayscale()] if spec.channels == 1 else []
    if strengths.crop < 1:
        steps.append(transforms.RandomResizedCrop(size, scale=(strengths.crop, 1), ratio=(3 / 4, 4 / 3)))
    else:
        steps.append(transforms.Resize((size, size)))
    if strengths.flip:
        steps.append(transforms.RandomHorizontalFlip(strengths.flip))
    if strengths.translate or strengths.scale:
        zoom = (1 - strengths.scale, 1 + strengths.scale)
        steps.append(transforms.RandomAffine(strengths.rotation, (strengths.translate,) * 2, zoom))
    elif strengths.rotation:
        steps.append(transforms.RandomRotation(strengths.rotation))
    if strengths.brightness or strengths.contrast:
        steps.append(transforms.ColorJitter(strengths.brightness, strengths.contrast))
    if strengths.window < 1:
        steps.append(transforms.RandomCrop(round(strengths.window * size)))
    steps += [transforms.ToTensor(), transforms.Normalize(spec.mean, spec.std)]
    return transforms.Compose(steps + [transforms.RandomErasing(strengths.erase)] * (strengths.erase > 0))


def make_loader(
    folder: Path, settings: Settings, workers: int, device: torch.device, *, is_train: bool
) -> torch.utils.data.DataLoader:
    """Batches of the images in `folder`, decoded by `workers` processes; for training shuffled and augmented."""
    strengths = parse_augment(settings.augment if is_train else "none")
    transform = make_transform(input_spec_for(settings.arch, settings.image_size), strengths)
    return torch.utils.data.DataLoader(
        datasets.ImageFolder(folder, transform),
        settings.batch_size,
        shuffle=is_train,
        drop_last=is_train,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
    )


def make_model(settings: Settings, num_classes: int, device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The network with torch's own dropout, and the optimizer of its recipe."""
    model = create_model(settings.arch, num_classes, image_size=settings.image_size).to(device).train()
    for module in model.modules():
        if isinstance(module, Dropout):
            module.__class__ = nn.Dropout
    optimizer = OPTIMIZERS[settings.optimizer]
    return model, optimizer(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: torch.Tensor,
    labels: torch.Tensor,
    device: torch.device,
) -> tuple[float, int]:
    """One step on a batch of a loader: its mean loss and the number of correct predictions."""
    inputs, labels = inputs.to(device), labels.to(device)
    optimizer.zero_grad()
    outputs = model(inputs)
    loss = nn.functional.cross_entropy(outputs, labels)
    loss.backward()
    optimizer.step()
    return loss.item(), (outputs.argmax(1) == labels).sum().item()
