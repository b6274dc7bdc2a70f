"""The networks and their registry: what each takes as input (InputSpec) and how it is trained by default (Recipe).

    model = create_model("cnn4_bn", num_classes=7)      # logits = model(images normalized by model.info.input_spec)
    list_archs()                                        # the names

Every model returns logits. Five earlier systems are rebuilt here; the docstrings call them by these names:
S0 "Emotion Recognition CNN Model" (four classes), S1 "Emotion Recognition with CNN from Scratch", S2 "Facial Emotion
Recognition using CNN (PyTorch)", S3 "Emotion Recognition Model", S4 "Facial Expression Recognition".
"""

import reprlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial

import torch
from torch import nn

from errors import InputError


@dataclass(frozen=True)
class InputSpec:
    """What a model takes as input. Saved with the weights; nothing else decides preprocessing.

    Images are resized to `image_size` x `image_size` pixels; values 0-255 are scaled to 0-1, then normalized by `mean`
    and `std`, one number per channel. `gray` means that a model with three channels was trained on gray images: color
    images are then converted to gray first, so that the model sees them as in training.
    """

    image_size: int = 48
    channels: int = 1
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    gray: bool = False

    def __post_init__(self):
        if type(self.image_size) is not int or not 8 <= self.image_size <= 2048:
            raise InputError(f"image_size must be an integer from 8 to 2048, not {reprlib.repr(self.image_size)}")
        if type(self.channels) is not int or self.channels not in (1, 3):
            raise InputError(f"channels must be 1 (gray) or 3 (RGB), not {reprlib.repr(self.channels)}")
        if type(self.gray) is not bool:
            raise InputError(f"gray must be True or False, not {reprlib.repr(self.gray)}")
        for name, low, high in (("mean", -1000, 1000), ("std", 0.001, 1000)):
            values = getattr(self, name)
            is_list = isinstance(values, list | tuple) and len(values) == self.channels
            if not is_list or not all(isinstance(value, int | float) and low <= value <= high for value in values):
                limits = f"{low:g} to {high:g}, one for each channel"
                raise InputError(f"{name} must be {self.channels} numbers from {limits}, not {reprlib.repr(values)}")
            object.__setattr__(self, name, tuple(map(float, values)))

    def to_dict(self) -> dict:
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: dict) -> "InputSpec":
        """Raises InputError if keys are missing, unknown or out of range."""
        names = {field.name for field in fields(cls)}
        keys = list(values) if isinstance(values, dict) else values
        if not isinstance(values, dict) or set(keys) != names:
            raise InputError(f"an input_spec has the keys {sorted(names)}, not {reprlib.repr(keys)}")
        return cls(**values)

    @property
    def stored_channels(self) -> int:
        """Channels of an image before it is expanded to `channels`: 1 if color plays no part."""
        return 1 if self.gray else self.channels


@dataclass(frozen=True)
class ModelInfo:
    """What a model is, and what its inputs and outputs mean. Saved with the weights."""

    arch: str
    class_names: list[str]  # in the order of the logits
    input_spec: InputSpec
    temperature: float = 1.0  # logits are divided by it before the softmax
    trained_on: str = ""  # name of the data set

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def to_dict(self) -> dict:
        """The keys of a checkpoint that from_dict reads, and num_classes."""
        return {**asdict(self), "num_classes": self.num_classes, "input_spec": self.input_spec.to_dict()}

    @classmethod
    def from_dict(cls, checkpoint: dict) -> "ModelInfo":
        """Raises InputError if the checkpoint's input_spec is not valid."""
        spec = InputSpec.from_dict(checkpoint["input_spec"])
        names = list(checkpoint["class_names"])
        return cls(checkpoint["arch"], names, spec, checkpoint["temperature"], checkpoint["trained_on"])


@dataclass(frozen=True)
class Recipe:
    """Default hyperparameters of an arch; any flag of train_emotion_cnn.py overrides. `lr` is for `batch_size`."""

    epochs: int
    batch_size: int
    augment: str = "none"
    optimizer: str = "adam"
    lr: float = 1e-3
    weight_decay: float = 0.0
    schedule: str = "none"
    class_weights: str = "none"
    logit_adjustment: float = 0.0
    label_smoothing: float = 0.0
    mixup: float = 0.0
    ema: float = 0.0
    backbone_lr: float = 1.0  # learning rate of trained layers before the classifier, as a share of `lr`


@dataclass(frozen=True)
class Arch:
    name: str
    build: Callable[[int, int], nn.Module]
    recipe: Recipe
    input_spec: InputSpec = InputSpec()
    is_backbone: bool = False  # a torchvision network under our classifier, with ImageNet weights to start from
    takes_any_size: bool = False  # whether it may be trained on windows smaller than the images
    head: str = "classifier"  # name of the child that holds the linear layers; its last one makes the logits


ARCHS: dict[str, Arch] = {}


def register(name: str, recipe: Recipe, **options):
    """Decorator: `build(num_classes, image_size) -> nn.Module` becomes the arch `name`; `options` are Arch's fields."""

    def add(build):
        if name in ARCHS:
            raise ValueError(f"arch {name!r} is registered twice")
        ARCHS[name] = Arch(name, build, recipe, **options)
        return build

    return add


def list_archs() -> list[str]:
    return list(ARCHS)


def get_arch(name: str) -> Arch:
    """Raises InputError that lists the known names."""
    if name not in ARCHS:
        raise InputError(f"unknown arch {name!r}; choose from: {', '.join(ARCHS)}")
    return ARCHS[name]


def input_spec_for(arch: str, image_size: int | None = None) -> InputSpec:
    """The input of `arch`, at its own size or at `image_size` pixels; InputError for a size too small."""
    spec = get_arch(arch).input_spec
    if image_size is not None and image_size < 32:
        raise InputError(f"--image-size {image_size} is too small for {arch}: 32 is the least")
    return spec if image_size is None else replace(spec, image_size=image_size)


def create_model(
    arch: str, num_classes: int, *, image_size: int | None = None, dropout: float | None = None
) -> nn.Module:
    """A model with random weights that maps float32 (N, channels, H, W) to logits (N, num_classes).

    `dropout` replaces every dropout probability of the classifier. `model.info` is its ModelInfo, with the classes
    called "0", "1", ... Raises InputError for an unknown arch or a size too small.
    """
    entry, spec = get_arch(arch), input_spec_for(arch, image_size)
    if num_classes < 2:
        raise InputError(f"a model needs at least 2 classes, not {num_classes}")
    if dropout is not None and not 0 <= dropout < 1:
        raise InputError(f"--dropout must be at least 0 and below 1, not {dropout}")
    model = entry.build(num_classes, spec.image_size)
    for module in model.get_submodule(entry.head).modules() if dropout is not None else ():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    model.info = ModelInfo(arch, [str(label) for label in range(num_classes)], spec)
    return model


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are; the CPU for an exported file, which has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def last_layer_name(model: nn.Module) -> str:
    """The name of the layer that makes the logits, such as "classifier.5"."""
    head = get_arch(model.info.arch).head
    return f"{head}.{len(model.get_submodule(head)) - 1}"


def last_layer(model: nn.Module) -> nn.Linear:
    """The layer that makes the logits."""
    return model.get_submodule(last_layer_name(model))


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, without buffers such as batch-norm's running statistics."""
    return sum(parameter.numel() for parameter in model.parameters())


# The scratch networks


class Dropout(nn.Dropout):
    """nn.Dropout, several times faster on the CPU: a byte is drawn for each value, so `p` counts in steps of 1/256."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        count, dropped = inputs.numel(), round(256 * self.p)
        if not (self.training and inputs.device.type == "cpu" and 0 < dropped < 256):
            return super().forward(inputs)
        draws = torch.empty((count + 7) // 8, dtype=torch.int64).random_(-(2**63), None)  # nn.Dropout draws floats
        keep = draws.view(torch.uint8)[:count] >= dropped
        scale = torch.tensor(256 / (256 - dropped), dtype=inputs.dtype)
        return inputs * (keep.as_strided(inputs.shape, torch.empty_like(inputs).stride()) * scale)


def _conv(in_channels: int, out_channels: int, *, batch_norm: bool = True, pool: int = 0) -> list[nn.Module]:
    """Convolution, batch-norm, max-pool, ReLU. The five systems pool after ReLU: the same numbers for more work."""
    norm = [nn.BatchNorm2d(out_channels)] if batch_norm else []
    pooling = [nn.MaxPool2d(pool)] if pool else []
    return [nn.Conv2d(in_channels, out_channels, 3, padding=1), *norm, *pooling, nn.ReLU()]


def _network(features: list[nn.Module], classifier: list[nn.Module]) -> nn.Sequential:
    """A model of two named children, as torchvision's are."""
    return nn.Sequential(OrderedDict(features=nn.Sequential(*features), classifier=nn.Sequential(*classifier)))


@register("cnn6_bn", Recipe(epochs=30, batch_size=64, schedule="plateau", augment="flip,rotation=10,translate=0.1"))
def cnn6_bn(num_classes: int, image_size: int) -> nn.Module:
    """S0's network: six convolutions with batch-norm in three blocks, three linear layers.

    6.0 M parameters, where S0's document has about 12.5 M.
    """
    layers, head = [], [nn.Flatten()]
    for a, b in ((1, 64), (64, 128), (128, 256)):
        layers += [*_conv(a, b), *_conv(b, b, pool=2), Dropout(0.25)]
    for a, b in ((256 * (image_size // 8) ** 2, 512), (512, 256)):  # 9216 at 48 pixels
        head += [nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU(), Dropout(0.5)]
    return _network(layers, [*head, nn.Linear(256, num_classes)])


@register(
    "cnn6_rgb",
    Recipe(epochs=60, batch_size=64, augment="flip,rotation=20,brightness=0.5", class_weights="balanced"),
    input_spec=InputSpec(channels=3, mean=(0.5,) * 3, std=(0.5,) * 3),
)
def cnn6_rgb(num_classes: int, image_size: int) -> nn.Module:
    """S1's network: six convolutions on RGB, batch-norm on the input and after each pooling (0.6 M parameters)."""
    layers, side = [nn.BatchNorm2d(3)], image_size
    for a, b, c, pool in ((3, 32, 64, 3), (64, 64, 128, 2), (128, 128, 256, 3)):
        layers += [*_conv(a, b, batch_norm=False), *_conv(b, c, batch_norm=False, pool=pool), nn.BatchNorm2d(c)]
        side //= pool
    return _network(layers, [nn.Flatten(), Dropout(0.0), nn.Linear(256 * side**2, num_classes)])


@register("cnn4_bn", Recipe(epochs=20, batch_size=32))
def cnn4_bn(num_classes: int, image_size: int) -> nn.Module:
    """S2's network: four convolutions with batch-norm, each before a pooling, two linear layers (1.6 M parameters)."""
    layers = [*_conv(1, 32, pool=2), *_conv(32, 64, pool=2), *_conv(64, 128, pool=2), *_conv(128, 256, pool=2)]
    head = [nn.Flatten(), nn.Linear(256 * (image_size // 16) ** 2, 512), nn.ReLU(), Dropout(0.5)]
    return _network(layers, [*head, nn.Linear(512, num_classes)])


@register("cnn4", Recipe(epochs=65, batch_size=500, weight_decay=1e-4, augment="flip,rotation=10,crop=0.8"))
def cnn4(num_classes: int, image_size: int) -> nn.Module:
    """S3's network: four convolutions, two linear layers (5.0 M parameters); without S3's softmax before the loss."""
    layers = [*_conv(1, 32, batch_norm=False), *_conv(32, 64, batch_norm=False, pool=2), Dropout(0.25)]
    layers += [*_conv(64, 128, batch_norm=False, pool=2), *_conv(128, 128, batch_norm=False, pool=2), Dropout(0.25)]
    head = [nn.Flatten(), nn.Linear(128 * (image_size // 8) ** 2, 1024), nn.ReLU(), Dropout(0.5)]
    return _network(layers, [*head, nn.Linear(1024, num_classes)])


# Our own network


def _conv_norm(in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False)
    return [convolution, nn.BatchNorm2d(out_channels)]


class _SEBlock(nn.Module):
    """A residual block whose channels are weighted by what the whole image shows (squeeze-and-excitation).

    (N, in_channels, H, W) -> (N, out_channels, H / stride, W / stride), sides rounded up. The block starts as the
    identity (its last batch-norm at zero, Goyal et al. 2017, arXiv:1706.02677); with stride 2 the shortcut averages
    before it convolves (He et al. 2019, arXiv:1812.01187).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        first, second = _conv_norm(in_channels, out_channels, stride=stride), _conv_norm(out_channels, out_channels)
        self.convolutions = nn.Sequential(*first, nn.ReLU(), *second)
        nn.init.zeros_(second[-1].weight)
        squeezed = out_channels // 8  # half of the paper's reduction: the blocks are narrower than its
        squeeze = [nn.AdaptiveAvgPool2d(1), nn.Conv2d(out_channels, squeezed, 1), nn.ReLU()]
        excite = [nn.Conv2d(squeezed, out_channels, 1), nn.Sigmoid()]
        self.gate = nn.Sequential(*squeeze, *excite)
        pool = [nn.AvgPool2d(2, ceil_mode=True)] if stride == 2 else []
        project = _conv_norm(in_channels, out_channels, kernel_size=1) if in_channels != out_channels else []
        self.shortcut = nn.Sequential(*pool, *project)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs = self.convolutions(inputs)
        return torch.relu(outputs * self.gate(outputs) + self.shortcut(inputs))


@register(
    "seresnet13",
    Recipe(
        epochs=40,
        batch_size=160,
        optimizer="muon",
        lr=0.03,
        weight_decay=0.05,
        schedule="linear",
        augment="flip,rotation=12,translate=0.06,scale=0.15,window=0.83,brightness=0.2,contrast=0.4,gamma=0.4,blur=1.2,"
        "noise=0.06,erase=0.25",
        logit_adjustment=0.5,
        label_smoothing=0.1,
        ema=0.999,
    ),
    takes_any_size=True,
)
def seresnet13(num_classes: int, image_size: int) -> nn.Module:
    """Our own network for 48x48 faces: two convolutions, five residual blocks, one linear layer (2.8 M parameters).

    Residual blocks after He et al. 2015, arXiv:1512.03385, with squeeze-and-excitation after Hu et al. 2017,
    arXiv:1709.01507. Images are small, so the sides are halved three times only, 48 to 6 pixels.
    """
    layers = [*_conv_norm(1, 32), nn.ReLU(), *_conv_norm(32, 64, stride=2), nn.ReLU()]
    blocks = ((64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1))
    layers += [_SEBlock(*block) for block in blocks]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), Dropout(0.2), nn.Linear(256, num_classes)]
    return _network(layers, head)


# The torchvision backbones under S4's classifier


class _StridedDepthwise(nn.Conv2d):
    """A depthwise convolution with a stride, in float32 on the CPU also under autocast.

    In bfloat16 the backward pass takes four times as long (torch 2.15, AVX-512); float32 makes training twice as fast.
    """

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if not torch.is_autocast_enabled("cpu"):
            return super().forward(inputs)
        with torch.autocast("cpu", enabled=False):
            return super().forward(inputs.float())


def _backbone(name: str, head: str, in_features: int, num_classes: int, image_size: int) -> nn.Module:
    """torchvision's network `name` with random weights and S4's classifier as its child `head`."""
    from torchvision.models import get_model

    model = get_model(name, weights=None)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.groups == module.in_channels and module.stride != (1, 1):
            module.__class__ = _StridedDepthwise
    layers = [Dropout(0.5), nn.Linear(in_features, 256), nn.ReLU(), Dropout(0.3), nn.Linear(256, num_classes)]
    setattr(model, head, nn.Sequential(*layers))
    return model


_AUGMENT = "flip,rotation=10,brightness=0.2,contrast=0.2"
_RECIPE = Recipe(epochs=30, batch_size=32, schedule="plateau", lr=3e-4, backbone_lr=0.1, augment=_AUGMENT)
_IMAGENET_SPEC = InputSpec(224, 3, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

for _name, _head, _in_features in (
    ("mobilenet_v2", "classifier", 1280),
    ("resnet18", "fc", 512),
    ("efficientnet_b0", "classifier", 1280),
    ("mobilenet_v3_large", "classifier", 960),
):
    _build = partial(_backbone, _name, _head, _in_features)
    register(_name, _RECIPE, input_spec=_IMAGENET_SPEC, is_backbone=True, takes_any_size=True, head=_head)(_build)
