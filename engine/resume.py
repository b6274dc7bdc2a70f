"""Saving a run after every epoch, and taking it up again: `--resume`."""

import contextlib
import hashlib
import math
import os
import shutil
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from checkpoints import (
    BEST_NAME,
    FINAL_NAME,
    PREVIOUS_NAME,
    check_weights,
    is_number,
    is_table,
    make_checkpoint,
    read_checkpoint,
    replace_file,
    save_checkpoint,
    without_folders,
)
from engine.settings import Settings
from engine.step import TrainStep
from errors import InputError, reason_of
from reports import HISTORY_NAME, write_history

# Settings that may differ from the resumed run's: they don't change the result, or are compared by content.
MAY_CHANGE = {"epochs", "device", "output_dir", "resume", "data_dir", "cache_dir", "tensorboard", "strict", "teacher"}


@dataclass
class Progress:
    """How far a run has come: what is saved of a run besides the state of its TrainStep."""

    epoch: int = 0  # the last one saved; 0: none yet
    history: list[dict] = field(default_factory=list)  # one row per epoch
    best: dict = field(default_factory=lambda: {"epoch": 0, "val_acc": -1.0, "val_loss": math.inf})

    def record(self, row: dict) -> bool:
        """Appends the row of an epoch; True if it is the best so far, by accuracy, then by loss."""
        self.history.append(row)
        is_best = (row["val_acc"], -row["val_loss"]) > (self.best["val_acc"], -self.best["val_loss"])
        if is_best:
            self.best = {name: row[name] for name in self.best}
        return is_best

    def is_stalled(self, patience: int) -> bool:
        """Whether the last `patience` epochs brought no better one; 0 means never."""
        return bool(patience) and self.epoch - self.best["epoch"] >= patience


# Saving


def save(
    output_dir: Path, step: TrainStep, progress: Progress, config: dict, fingerprint: dict, *, is_best: bool
) -> None:
    """Writes the best checkpoint if the last epoch `is_best`, then the final one and the history.

    The first save of a new run moves an earlier run's best aside.
    """
    row = progress.history[-1]
    metrics = {name: row[name] for name in ("val_loss", "val_acc", "train_loss", "train_acc")}
    checkpoint = make_checkpoint(step.eval_model, epoch=row["epoch"], metrics=metrics, config=without_folders(config))
    resumable = {
        "config": config,
        "train_state_dict": step.model.state_dict(),
        "optimizer": step.optimizer.state_dict(),
        "scheduler": step.scheduler.state_dict() if step.scheduler else None,
        "scaler": step.scaler.state_dict(),
        "ema": step.ema.state_dict() if step.ema else None,
        "history": progress.history,
        "best_metric": progress.best,
    }
    final = checkpoint | resumable | fingerprint
    if len(progress.history) == 1:
        if (output_dir / FINAL_NAME).exists():  # first, so that a full disk fails before the earlier best is moved
            save_checkpoint(final, output_dir / FINAL_NAME)
        keep_previous(output_dir)
    if is_best:
        save_checkpoint(checkpoint, output_dir / BEST_NAME)
    save_checkpoint(final, output_dir / FINAL_NAME)
    with contextlib.suppress(InputError):  # Excel locks what it shows; the report writes it again
        replace_file(output_dir / HISTORY_NAME, lambda path: write_history(progress.history, path))


def keep_previous(output_dir: Path) -> None:
    """Moves an earlier run's best checkpoint aside."""
    with contextlib.suppress(FileNotFoundError):
        os.replace(output_dir / BEST_NAME, output_dir / PREVIOUS_NAME)


def read_best(output_dir: Path, progress: Progress) -> dict:
    """The best checkpoint of the run; InputError if another run's is in its place."""
    best = read_checkpoint(output_dir / BEST_NAME)
    if _score(best) != progress.best:
        raise InputError(f"{output_dir / BEST_NAME} is of another run by now: give each its own --output-dir")
    return best


def _score(best: dict) -> dict:
    return {"epoch": best["epoch"], **{name: best["metrics"].get(name) for name in ("val_acc", "val_loss")}}


# Resuming


def fingerprint(split_hash: str, teachers: list[str] | None) -> dict:
    """What must be the same when a run is resumed, apart from its flags: the images and the teachers."""
    return {"split_hash": split_hash, "teacher_hashes": [_hash_file(path) for path in teachers or ()]}


def _hash_file(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_resumable(path: Path) -> dict:
    """The final checkpoint in `path`; raises InputError if it is missing or is none."""
    if not os.path.exists(path):
        raise InputError(f"--resume: no {path}; a run can be resumed once its first epoch has ended")
    checkpoint = read_checkpoint(path)
    if "optimizer" not in checkpoint:
        raise InputError(f"--resume: {path} can't be resumed; pass the {FINAL_NAME} next to it")
    rows, best = checkpoint.get("history"), checkpoint.get("best_metric")
    columns = {"epoch", "val_acc", "val_loss"}
    is_valid = isinstance(rows, list) and len(rows) == checkpoint["epoch"] > 0 and is_table(best, is_number)
    if not is_valid or not columns <= best.keys() or not all(is_table(row, is_number) for row in rows):
        raise InputError(f"--resume: {path} is damaged: its history or 'best_metric' is not what training writes")
    if not columns | {"train_acc", "train_loss"} <= rows[0].keys() or any(row.keys() != rows[0].keys() for row in rows):
        raise InputError(f"--resume: {path} is damaged: columns of its history are missing")
    return checkpoint


def check_unchanged(settings: Settings, checkpoint: dict) -> None:
    """Raises InputError if a flag contradicts the run in `checkpoint`."""
    config, path = checkpoint["config"], settings.resume
    for name, value in settings.to_config().items():
        if name not in MAY_CHANGE and value != config.get(name, value):
            flag = "--" + name.replace("_", "-")
            raise InputError(f"--resume: {flag} {value} contradicts the run in {path}, which has {config[name]}")
    if settings.epochs != config["epochs"] and settings.schedule not in ("none", "plateau"):
        raise InputError(
            f"--resume: the {settings.schedule} schedule of this run ends after {config['epochs']} epochs; "
            "--epochs can't be changed"
        )
    if settings.epochs < checkpoint["epoch"]:
        raise InputError(
            f"--resume: --epochs {settings.epochs} is less than the {checkpoint['epoch']} epochs that are done"
        )


def check_folder(settings: Settings) -> None:
    """Raises InputError if --output-dir holds another final checkpoint than the resumed one."""
    final = Path(settings.output_dir, FINAL_NAME)
    if final.exists() and not final.samefile(settings.resume):
        raise InputError(
            f"--resume: {settings.output_dir} holds the final checkpoint of a run already; go on with that, or choose "
            "another --output-dir"
        )


def restore(checkpoint: dict, path: str, step: TrainStep, fingerprint: dict) -> Progress:
    """Loads the final checkpoint, read from `path`, into `step` and returns how far it had come.

    Raises InputError if the images have changed since, or if the best checkpoint next to it is of another run.
    """
    same_classes = checkpoint["class_names"] == step.model.info.class_names
    if not same_classes or checkpoint.get("split_hash") != fingerprint["split_hash"]:
        raise InputError(f"--resume: the images or their split have changed since {path} was written; train anew")
    if checkpoint.get("teacher_hashes", []) != fingerprint["teacher_hashes"]:
        raise InputError(f"--resume: --teacher must name the models that taught the run in {path}, in that order")
    best_path = Path(path).with_name(BEST_NAME)
    if not best_path.exists():
        raise InputError(f"--resume: {BEST_NAME} is missing next to {path}; put it back or train anew")
    best = read_checkpoint(best_path)
    if not is_number(_score(best)["val_acc"]) or not is_number(_score(best)["val_loss"]):
        raise InputError(f"--resume: {best_path} is damaged: its metrics are missing")
    if not _is_same_run(best, checkpoint):
        raise InputError(
            f"--resume: {best_path} is of another run than {path}, or of later epochs; put the right one back or "
            "train anew"
        )
    try:
        _load_state(checkpoint, step)
        progress = Progress(checkpoint["epoch"], checkpoint["history"], _score(best))
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        raise InputError(f"--resume: {path} is damaged, or of another version of torch: {reason_of(error)}") from None
    step.group.check_same((progress.epoch, progress.best), "checkpoint to resume")
    return progress


def _load_state(checkpoint: dict, step: TrainStep) -> None:
    check_weights(checkpoint["train_state_dict"], "train_state_dict")
    step.model.load_state_dict(checkpoint["train_state_dict"])
    for saved, own in zip(checkpoint["optimizer"]["param_groups"], step.optimizer.param_groups, strict=True):
        if any(type(saved[name]) is not type(value) for name, value in own.items()):
            raise TypeError("a setting of the optimizer is of another type")
    step.optimizer.load_state_dict(checkpoint["optimizer"])
    for parameter, state in step.optimizer.state.items():
        if any(value.shape not in (parameter.shape, ()) for value in state.values()):
            raise ValueError("the state of the optimizer does not fit")
    step.scaler.load_state_dict(checkpoint["scaler"])
    for part, name in ((step.scheduler, "scheduler"), (step.ema, "ema")):
        if part:
            part.load_state_dict(checkpoint[name])


def _is_same_run(best: dict, final: dict) -> bool:
    """Whether two checkpoints are of one run. If it was killed while saving, best is one epoch ahead of final."""
    if best["epoch"] not in (final["best_metric"]["epoch"], final["epoch"] + 1):
        return False
    parts = []
    for checkpoint in (best, final):
        config = without_folders(checkpoint["config"])
        config = {name: value for name, value in config.items() if name not in MAY_CHANGE}
        parts.append((checkpoint["arch"], checkpoint["class_names"], config))
    return parts[0] == parts[1]


def copy_run(path: str, output_dir: Path) -> None:
    """Copies a resumed run's two checkpoints to another folder, in which an earlier best is kept."""
    path = Path(path)
    if path.parent.resolve() != output_dir.resolve():
        keep_previous(output_dir)
    for source, name in ((path.with_name(BEST_NAME), BEST_NAME), (path, FINAL_NAME)):
        if source.resolve() != (output_dir / name).resolve():
            replace_file(output_dir / name, partial(shutil.copyfile, source))
