"""The settings of a training run: every flag of train_emotion_cnn.py, resolved once."""

import os
from dataclasses import asdict, dataclass, fields

from checkpoints import BEST_NAME, FINAL_NAME, PATHS, PREVIOUS_NAME
from engine.augment import parse_augment
from errors import InputError
from models import get_arch


@dataclass(frozen=True)
class Settings:
    """Each value is the flag's, else the resumed run's, else the arch's recipe's, else the default of the parser.

    train_emotion_cnn.get_args_parser explains them.
    """

    data_dir: str
    val_fraction: float
    cache_dir: str | None
    strict: bool
    sampler: str

    arch: str
    image_size: int
    pretrained: bool
    weights: str | None
    freeze: str | None
    dropout: float | None

    epochs: int
    batch_size: int
    augment: str
    optimizer: str
    lr: float
    backbone_lr: float
    weight_decay: float
    schedule: str
    class_weights: str
    logit_adjustment: float
    label_smoothing: float
    mixup: float
    ema: float

    teacher: list[str] | None
    grad_accum: int
    clip_grad: float
    early_stopping: int

    output_dir: str
    resume: str | None
    seed: int
    device: str
    precision: str
    deterministic: bool
    tensorboard: str | None

    def __post_init__(self):
        for field in fields(self):
            if getattr(self, field.name) is None and field.type in (str, bool, int, float):
                raise InputError(f"--{field.name.replace('_', '-')} is missing")

    @property
    def is_from_scratch(self) -> bool:
        return not (self.pretrained or self.weights)

    @property
    def eval_batch_size(self) -> int:
        """Images per forward pass of validation: as many as training has in one."""
        return max(1, self.batch_size // self.grad_accum)

    def to_config(self) -> dict:
        """The settings without output_dir and resume, as checkpoints keep them; paths are made absolute."""

        def absolute(path):
            return [absolute(each) for each in path] if isinstance(path, list) else path and os.path.abspath(path)

        config = {name: value for name, value in asdict(self).items() if name not in ("output_dir", "resume")}
        return config | {name: absolute(config[name]) for name in PATHS}

    def check(self) -> None:
        """Raises InputError for flags that contradict each other and for files that are missing."""
        arch, strengths = get_arch(self.arch), parse_augment(self.augment)
        if self.pretrained and self.weights:
            raise InputError("--pretrained and --weights both name weights to start from; give one")
        if self.weights is not None and not os.path.exists(self.weights):
            raise InputError(f"--weights: no file {self.weights!r}")
        self.check_teachers()
        if arch.is_backbone and self.freeze and self.is_from_scratch:
            raise InputError("--freeze keeps trained weights, and with --no-pretrained there are none; leave one out")
        if strengths.window < 1 and not arch.takes_any_size:
            raise InputError(f"--augment: {arch.name} takes images of one size only; leave window out, or use crop")

    def check_teachers(self) -> None:
        """Raises InputError for teachers that are missing, or that this run would overwrite."""
        names = (BEST_NAME, FINAL_NAME, PREVIOUS_NAME)
        written = {os.path.realpath(os.path.join(self.output_dir, name)) for name in names}
        for path in self.teacher or ():
            if not os.path.exists(path):
                raise InputError(f"--teacher: no file {path!r}")
            if os.path.realpath(path) in written:
                raise InputError(f"--teacher {path} would be overwritten by this run; copy it, or change --output-dir")
