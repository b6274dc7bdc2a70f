"""Augmentation of whole batches on the device, with named strengths.

Each arch's default strengths are in its Recipe in models.py.

Example::

    strengths = parse_augment("flip,rotation=10,translate=0.1")
    inputs = augment(images, spec, strengths, generator)        # uint8 (N, C, H, W) -> normalized float32
"""

from dataclasses import dataclass, fields

import torch
from torch.nn import functional as F

from errors import InputError
from models import InputSpec
from preprocessing import normalize


@dataclass(frozen=True)
class Strengths:
    """How strong each augmentation is; all zero (crop, window: 1) changes nothing."""

    flip: float = 0.0  # probability of mirroring
    rotation: float = 0.0  # in degrees, up to this, either way
    translate: float = 0.0  # up to this share of the side, in x and y
    scale: float = 0.0  # zoom by a factor from 1 - scale to 1 + scale
    crop: float = 1.0  # random resized crop: the least share of the area that stays
    window: float = 1.0  # share of the side that the model sees, cut out at random: smaller inputs, faster steps
    brightness: float = 0.0  # factor from 1 - brightness to 1 + brightness
    contrast: float = 0.0  # likewise, about the image's mean
    gamma: float = 0.0  # exponent from exp(-gamma) to exp(gamma)
    blur: float = 0.0  # standard deviation up to this many pixels, small ones more often
    noise: float = 0.0  # standard deviation up to this share of the range from black to white, likewise
    erase: float = 0.0  # probability of erasing a rectangle

    def __post_init__(self):
        limits = {"rotation": (0, 180), "crop": (0.05, 1), "window": (0.5, 1), "scale": (0, 0.9), "blur": (0, 3)}
        for field in fields(self):
            low, high = limits.get(field.name, (0, 1))
            if not low <= getattr(self, field.name) <= high:
                raise InputError(f"--augment: {field.name} must be from {low} to {high}")

    @property
    def has_geometry(self) -> bool:
        return max(self.flip, self.rotation, self.translate, self.scale, 1 - self.crop, 1 - self.window) > 0


PRESETS = {
    "none": Strengths(),
    "light": Strengths(flip=0.5, rotation=10, translate=0.1),
    "medium": Strengths(flip=0.5, rotation=10, translate=0.1, scale=0.1, brightness=0.2, contrast=0.2),
    "strong": Strengths(
        flip=0.5, rotation=15, translate=0.12, scale=0.15, crop=0.8, brightness=0.3, contrast=0.3, erase=0.25
    ),
}
EXAMPLE = "flip,rotation=10,translate=0.1,scale=0.1,crop=0.8,window=0.83,brightness=0.2,contrast=0.2,gamma=0.4,"
EXAMPLE += "blur=1,noise=0.05,erase=0.25"


def parse_augment(text: str) -> Strengths:
    """A preset's name, or `name=strength` separated by commas; `flip` alone means flip=0.5. Raises InputError."""
    if text in PRESETS:
        return PRESETS[text]
    known = [field.name for field in fields(Strengths)]
    values = {}
    for item in text.split(","):
        name, _, value = item.strip().partition("=")
        if name not in known:
            raise InputError(
                f"--augment: {name!r} is neither a preset ({', '.join(PRESETS)}) nor one of {', '.join(known)}"
            )
        try:
            values[name] = float(value) if value or name != "flip" else 0.5
        except ValueError:
            raise InputError(f"--augment: {item.strip()!r} needs a number, as in {name}=0.1") from None
    return Strengths(**values)


def augment(images: torch.Tensor, spec: InputSpec, strengths: Strengths, generator: torch.Generator) -> torch.Tensor:
    """uint8 (N, C, H, W), 0-255 -> float32 (N, spec.channels, H, W), augmented and normalized.

    Every image draws its own values from `generator`, which must be on the device of `images`. Areas from outside the
    image and erased areas are filled with the mean (0 once normalized). A `window` below 1 returns images of that
    share of H and W, rounded to pixels (Krizhevsky et al. 2012 trained so at 224 of 256).
    """
    uniform = torch.rand(18, len(images), generator=generator, device=images.device)  # one row for each draw below
    inputs = images.float() / 255
    if strengths.gamma:
        inputs = inputs ** (strengths.gamma * (2 * uniform[15] - 1)).exp().view(-1, 1, 1, 1)
    if strengths.brightness:
        inputs = (inputs * _factor(uniform[0], strengths.brightness)).clamp(0, 1)
    if strengths.contrast:
        mean = inputs.mean((1, 2, 3), keepdim=True)
        inputs = ((inputs - mean) * _factor(uniform[1], strengths.contrast) + mean).clamp(0, 1)
    inputs = normalize(inputs, spec)
    if strengths.has_geometry:
        theta = affine_matrices(uniform[2:10], strengths)
        height, width = (round(strengths.window * side) for side in inputs.shape[2:])
        grid = F.affine_grid(theta, [len(inputs), 1, height, width], align_corners=False)
        inputs = F.grid_sample(inputs, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    if strengths.blur:
        inputs = _blur(inputs, strengths.blur * uniform[16] ** 2)
    if strengths.noise:
        shape = (len(inputs), images.shape[1], *inputs.shape[2:])  # a gray image stays gray
        noise = torch.randn(shape, generator=generator, device=inputs.device)
        std = torch.tensor(spec.std, device=inputs.device).view(-1, 1, 1)
        inputs = inputs + noise * (strengths.noise * uniform[17] ** 2).view(-1, 1, 1, 1) / std
    if strengths.erase:
        inputs = inputs * ~_rectangles(uniform[10:15], strengths.erase, inputs.shape[-1])
    return inputs


def _factor(uniform: torch.Tensor, strength: float) -> torch.Tensor:
    return (1 + strength * (2 * uniform - 1)).view(-1, 1, 1, 1)


def affine_matrices(uniform: torch.Tensor, strengths: Strengths) -> torch.Tensor:
    """(8, N) uniform numbers -> (N, 2, 3) matrices from output to input coordinates, both from -1 to 1.

    Mirroring, rotation, zoom and shift, the random resized crop of torchvision (area from `crop` to 1, aspect ratio
    from 3/4 to 4/3) and the window, in one matrix, so that an image is resampled once.
    """
    signed = 2 * uniform - 1
    angle = signed[0] * (strengths.rotation * torch.pi / 180)
    zoom = 1 + signed[1] * strengths.scale
    mirror = torch.where(uniform[2] < strengths.flip, -1.0, 1.0)
    area = strengths.crop + (1 - strengths.crop) * uniform[3]
    ratio = (4 / 3) ** (signed[4] * (strengths.crop < 1))
    ratio = torch.minimum(torch.maximum(ratio, area), 1 / area)  # so that neither side is longer than the image's
    width, height = (strengths.window * side.sqrt() for side in (area * ratio, area / ratio))
    shift_x = signed[5] * (2 * strengths.translate + (1 - width))
    shift_y = signed[6] * (2 * strengths.translate + (1 - height))
    scale_x, scale_y = mirror * width / zoom, height / zoom
    cos, sin = angle.cos(), angle.sin()
    rows = torch.stack([cos * scale_x, -sin * scale_y, shift_x, sin * scale_x, cos * scale_y, shift_y])
    return rows.t().reshape(-1, 2, 3)


def _blur(inputs: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Blurs each image of float32 (N, C, H, W) by a Gaussian of its own `sigma` (N,) in pixels, cut off after three."""
    batch, channels, height, width = inputs.shape
    offsets = torch.arange(-3, 4, device=inputs.device)
    kernels = torch.exp(-((offsets / sigma.clamp(min=0.1)[:, None]) ** 2) / 2)
    kernels = (kernels / kernels.sum(1, keepdim=True)).repeat_interleave(channels, 0)
    planes = F.pad(inputs, (3, 3, 3, 3), mode="replicate").reshape(1, batch * channels, height + 6, width + 6)
    for shape in ((-1, 1, 7, 1), (-1, 1, 1, 7)):
        planes = F.conv2d(planes, kernels.view(shape), groups=batch * channels)
    return planes.view(batch, channels, height, width)


def _rectangles(uniform: torch.Tensor, probability: float, side: int) -> torch.Tensor:
    """(5, N) uniform numbers -> bool (N, 1, side, side), True where an image is erased.

    Random erasing, Zhong et al. 2017, arXiv:1708.04896, with torchvision's shares: 2 to 33% of the area, aspect
    ratio 0.3 to 3.3. A rectangle may stand partly outside, where the paper draws again.
    """
    area = 0.02 + 0.31 * uniform[0]
    ratio = 0.3 * 11 ** uniform[1]
    half_width, half_height = (area * ratio).sqrt() * side / 2, (area / ratio).sqrt() * side / 2
    position = torch.arange(side, device=uniform.device) + 0.5
    in_x = (position - (uniform[2] * side)[:, None]).abs() <= half_width[:, None]  # (N, side)
    in_y = (position - (uniform[3] * side)[:, None]).abs() <= half_height[:, None]
    erased = in_y[:, :, None] & in_x[:, None, :] & (uniform[4] < probability)[:, None, None]
    return erased[:, None]
