"""A training run: all that changes from epoch to epoch, and how it is saved to disk and taken up again."""

import contextlib
import csv
import hashlib
import math
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

import reports
from checkpoints import (
    BEST_NAME,
    FINAL_NAME,
    build_model,
    load_initial_weights,
    make_checkpoint,
    read_checkpoint,
    replace_file,
    save_checkpoint,
    to_deployed,
)
from device import memory_format, pick_precision
from engine.augment import augment, parse_augment
from engine.distributed import ALONE, Group
from engine.loop import TrainStep, evaluate, loss_and_accuracy, seed_for, to_log_probs, train_one_epoch
from engine.optim import Ema, make_optimizer, make_scheduler
from engine.pretrained import freeze, load_imagenet_weights, train_mode
from errors import InputError, printable
from models import create_model, get_arch
from preprocessing import to_input
from splits import Batches, Splits, draw_order

HISTORY_NAME = "training_history.csv"
REPORTS = (HISTORY_NAME, "training_history.png", *reports.result_files({}))
# Settings that may differ from the resumed run's. data_dir is among them because the pictures themselves are compared;
# so are the teachers.
FREE_ON_RESUME = {
    "epochs",
    "device",
    "output_dir",
    "resume",
    "data_dir",
    "cache_dir",
    "tensorboard",
    "strict",
    "teacher",
}
PREVIOUS = ".previous.pth"  # in the place of .pth: the checkpoints of the run before in the same folder
CHECKPOINTS = (BEST_NAME, FINAL_NAME, *(str(Path(name).with_suffix(PREVIOUS)) for name in (BEST_NAME, FINAL_NAME)))


def make_class_weights(kind: str, counts: list[int]) -> list[float] | None:
    """balanced: n / (classes * n_class), as S1 has it; sqrt: its square root, scaled to mean 1 over the pictures."""
    if kind == "none":
        return None
    counts = np.array(counts, dtype=float)
    if counts.min() == 0:
        raise InputError("--class-weights needs a picture of every class to train on")
    weights = counts.sum() / (len(counts) * counts)
    if kind == "sqrt":
        weights = np.sqrt(weights)
        weights *= counts.sum() / (weights * counts).sum()
    return weights.tolist()


class Run:
    """All that changes while training. `settings` are train_emotion_cnn.py's flags, `config` what is saved of them.

    Making one builds the network, with its starting weights unless `is_resumed`; `notes` says what they were. In a
    `group` of processes every one makes the same run of its own, and rank 0 alone writes.
    """

    def __init__(
        self,
        settings: dict,
        config: dict,
        splits: Splits,
        device: torch.device,
        *,
        is_resumed: bool,
        group: Group = ALONE,
    ):
        self.settings, self.config, self.splits, self.device, self.notes = settings, config, splits, device, []
        self.group = group
        if settings["batch_size"] < 2 * group.size or len(splits.train) < 2 * group.size:
            raise InputError(
                f"--batch-size {settings['batch_size']} of {len(splits.train)} pictures to train on is too few for "
                f"{group.size} processes: each needs two a step"
            )
        group.check_same((splits.split_hash, splits.class_names), "pictures to train on")
        group.check_same(to_deployed(config), "flags")
        # cuDNN tries which convolutions are fastest, since every batch has the same shape; its choice may vary
        torch.backends.cudnn.benchmark = not settings["deterministic"]
        if settings["deterministic"]:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)  # torch names what it has no such algorithm for
        self.output_dir, self.is_resumed = Path(settings["output_dir"]), is_resumed
        self.model = self._make_model()
        self.generator = torch.Generator(device)
        self.step = self._make_step()
        self.epoch, self.saved_epoch, self.history, self.since_best = 0, 0, [], 0
        self.best = {"val_acc": -1.0, "val_loss": math.inf, "epoch": 0}

    def _make_model(self) -> nn.Module:
        settings, spec = self.settings, self.splits.spec
        torch.manual_seed(settings["seed"])
        model = create_model(
            settings["arch"],
            len(self.splits.class_names),
            image_size=spec.image_size,
            dropout=settings["dropout"],
        )
        if settings["pretrained"] and not self.is_resumed:
            load_imagenet_weights(model)
        model.input_spec = spec
        if settings["weights"] and not self.is_resumed:
            self.notes.append(load_initial_weights(model, settings["weights"], self.splits.class_names))
        if settings["freeze"]:
            freeze(model, settings["freeze"])
        return model.to(self.device, memory_format=memory_format(self.device))

    def _make_step(self) -> TrainStep:
        settings, splits = self.settings, self.splits
        optimizer = make_optimizer(
            settings["optimizer"], self.model, lr=settings["lr"], weight_decay=settings["weight_decay"]
        )
        total_steps = settings["epochs"] * len(splits.train.bounds(settings["batch_size"]))  # at most, in a group
        counts = splits.train.class_counts(len(splits.class_names))
        self.class_weights = make_class_weights(settings["class_weights"], counts)
        strengths = parse_augment(settings["augment"])
        teachers = [self._load_teacher(path) for path in settings["teacher"] or ()]
        self.teacher_hashes = [_hash_file(path) for path in settings["teacher"] or ()]
        self.group.check_same(self.teacher_hashes, "teachers")
        return TrainStep(
            self.model,
            optimizer,
            lambda images: augment(images, splits.spec, strengths, self.generator),
            precision=pick_precision(settings["precision"], self.device),
            scheduler=make_scheduler(settings["schedule"], optimizer, total_steps=total_steps),
            class_weights=self.class_weights and torch.tensor(self.class_weights, device=self.device),
            label_smoothing=settings["label_smoothing"],
            mixup=settings["mixup"],
            teachers=teachers,
            grad_accum=settings["grad_accum"],
            clip_grad=settings["clip_grad"],
            ema=Ema(self.model, settings["ema"]) if settings["ema"] else None,
            group=self.group,
        )

    def _load_teacher(self, path: str) -> nn.Module:
        if os.path.realpath(path) in {os.path.realpath(self.output_dir / name) for name in CHECKPOINTS}:
            raise InputError(f"--teacher {path} would be written over by this run; copy it, or change --output-dir")
        checkpoint = read_checkpoint(path)
        model = build_model(checkpoint, path)
        if parse_augment(self.settings["augment"]).window < 1 and not get_arch(model.arch).takes_any_size:
            raise InputError(
                f"--teacher {path}: {model.arch} takes pictures of one size only; pass --augment without window"
            )
        for name, its, own in (
            ("classes", checkpoint["class_names"], self.splits.class_names),
            ("input", model.input_spec.to_dict(), self.splits.spec.to_dict()),
        ):
            if its != own:
                raise InputError(
                    f"--teacher {path}: its {name} must be those of the network that learns; it has "
                    f"{its}, and here are {own}"
                )
        self.notes.append(f"{printable(path)}: {model.arch} teaches")
        return model.to(self.device, memory_format=memory_format(self.device)).requires_grad_(False)

    @property
    def validated_model(self) -> nn.Module:
        """The network that is measured and deployed: the EMA's, where EMA is on."""
        return self.step.ema.model if self.step.ema else self.model

    @property
    def is_finished(self) -> bool:
        patience = self.settings["early_stopping"]
        return self.epoch >= self.settings["epochs"] or bool(patience and self.since_best >= patience)

    def train_epoch(self) -> dict:
        """One epoch and its validation, saved to disk; returns its row of the history.

        Raises InputError where the loss stops being a number or the checkpoints can't be written.
        """
        start, number = time.perf_counter(), self.epoch + 1
        lr = self.step.optimizer.param_groups[0]["lr"]
        try:
            done = self._train(number)
        except FloatingPointError as error:
            raise InputError(
                f"epoch {number}: {error}; try a lower --lr or --clip-grad 1 (checkpoints of earlier epochs stay)"
            ) from None
        logits, labels = self.measure(self.validated_model, self.splits.val, self.group)
        val_loss, val_acc = loss_and_accuracy(to_log_probs(logits), labels)
        if not math.isfinite(val_loss):  # by the epoch's last update, which no training loss saw
            raise InputError(
                f"epoch {number}: the validation loss became {val_loss} at learning rate {lr:g}; try a "
                "lower --lr or --clip-grad 1 (checkpoints of earlier epochs stay)"
            )
        if self.settings["schedule"] == "plateau":
            self.step.scheduler.step(val_loss)
        row = {"epoch": number, "lr": lr, "train_loss": done["loss"], "train_acc": done["acc"]}
        row |= {"val_loss": val_loss, "val_acc": val_acc}
        row |= {"images_per_s": done["images_per_s"], "seconds": time.perf_counter() - start}
        self.epoch = number
        self.history.append(row)
        score, best_score = (val_acc, -val_loss), (self.best["val_acc"], -self.best["val_loss"])
        is_best = score > best_score or (score == best_score and self.best["epoch"] == number)  # see restore
        self.since_best = 0 if is_best else self.since_best + 1
        if is_best:
            self.best = {"val_acc": val_acc, "val_loss": val_loss, "epoch": number}
        if self.group.is_main:
            self.save(is_best)
        self.saved_epoch = number
        return row

    def _train(self, number: int) -> dict:
        settings, train, group = self.settings, self.splits.train, self.group
        torch.manual_seed(seed_for("dropout", settings["seed"], number, group.rank))
        self.generator.manual_seed(seed_for("augmentation", settings["seed"], number, group.rank))
        generator = torch.Generator().manual_seed(seed_for("order", settings["seed"], number))
        order = draw_order(train.labels, balanced=settings["sampler"] == "balanced", generator=generator)
        train_mode(self.model)
        counts = [stop - start for start, stop in train.bounds(settings["batch_size"], group)]
        batches = train.iterate(settings["batch_size"], order, group)
        title = f"epoch {number}/{settings['epochs']}"
        done = train_one_epoch(self.step, batches, total=len(order), counts=counts, title=title)
        group.average_statistics(self.model, *filter(None, [self.step.ema and self.step.ema.model]))
        return done

    def measure(self, model: nn.Module, batches: Batches, group: Group = ALONE) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (1, N, num_classes) and labels (N,), in float32 and without augmentation.

        In a group each process takes a part, and every one gets the whole; a part may be empty only of fewer
        pictures than processes, which each then measures itself.
        """
        if len(batches) < group.size:
            group = ALONE
        size = max(1, self.settings["batch_size"] // (self.settings["grad_accum"] * group.size))
        own = torch.arange(*group.share(0, len(batches)))
        parts = group.gather(
            evaluate(model, batches.iterate(size, own), lambda images: to_input(images, self.splits.spec))
        )
        return torch.cat([logits for logits, _ in parts], 1), torch.cat([labels for _, labels in parts])

    def save(self, is_best: bool) -> None:
        """Writes the best checkpoint where this epoch is it, the final one, and the history as CSV."""
        metrics = {key: self.history[-1][key] for key in ("val_loss", "val_acc", "train_loss", "train_acc")}
        checkpoint = make_checkpoint(
            self.validated_model,
            self.splits.class_names,
            trained_on=self.splits.trained_on,
            epoch=self.epoch,
            metrics=metrics,
            config=to_deployed(self.config),
        )
        step = self.step
        whole = checkpoint | {
            "config": self.config,
            "train_state_dict": self.model.state_dict(),
            "optimizer": step.optimizer.state_dict(),
            "scheduler": step.scheduler.state_dict() if step.scheduler else None,
            "scaler": step.scaler.state_dict(),
            "ema": step.ema.state_dict() if step.ema else None,
            "rng": {"seed": self.settings["seed"], "next_epoch": self.epoch + 1},
            "history": self.history,
            "best_metric": self.best,
            "early_stopping": {"since_best": self.since_best},
            "class_weights": self.class_weights,
            "split_hash": self.splits.split_hash,
            "teacher_hashes": self.teacher_hashes,
        }
        files = {BEST_NAME: checkpoint, FINAL_NAME: whole} if is_best else {FINAL_NAME: whole}
        if len(self.history) == 1:
            self._keep_previous()
            if (self.output_dir / FINAL_NAME).exists():  # a full disk leaves that run as it was
                files = {FINAL_NAME: whole, BEST_NAME: checkpoint}
        for name, content in files.items():
            save_checkpoint(content, self.output_dir / name)
        with contextlib.suppress(InputError):  # Excel locks what it shows; the next epoch and the report write it again
            replace_file(self.output_dir / HISTORY_NAME, lambda path: write_history(self.history, path))

    def earlier_results(self) -> list[str]:
        """A line where the output folder holds another run's results, which are kept once."""
        if self.is_resumed or not (self.output_dir / BEST_NAME).exists():
            return []
        return [
            f"when the first epoch has ended, the earlier results in {printable(self.output_dir)} are kept as "
            "best_emotion_model.previous.pth and so on"
        ]

    def _keep_previous(self) -> None:
        for path in (self.output_dir / BEST_NAME, self.output_dir / FINAL_NAME):
            if path.exists():
                copy_file(path, path.with_suffix(PREVIOUS))
        for name in REPORTS:  # of a network that has another name from now on
            path = self.output_dir / name
            with contextlib.suppress(OSError):  # not there, or open in a program that locks it
                os.replace(path, path.with_suffix(f".previous{path.suffix}"))

    def remove_left_overs(self) -> None:
        """Removes the temporary files of an earlier process that was killed while it wrote them."""
        for name in (*CHECKPOINTS, HISTORY_NAME):
            for path in self.output_dir.glob(f".{name}.*.tmp"):
                with contextlib.suppress(OSError):
                    path.unlink()

    def restore(self, checkpoint: dict, path: Path) -> None:
        """Puts the state of the final checkpoint in `path` back; the output folder then holds all that a run writes.

        Raises InputError where the pictures have changed since, or the best checkpoint beside it is not of this run.
        """
        splits = self.splits
        if (checkpoint["split_hash"], checkpoint["class_names"]) != (splits.split_hash, splits.class_names):
            raise InputError(f"--resume: the pictures or their split have changed since {path} was written; train anew")
        if checkpoint.get("teacher_hashes", []) != self.teacher_hashes:
            raise InputError(f"--resume: --teacher must name the networks that taught the run in {path}, in that order")
        if path.name.endswith(PREVIOUS):
            raise InputError(
                f"--resume: copy {path} and the best checkpoint that ends so too, as {FINAL_NAME} and "
                f"{BEST_NAME}, into a folder of their own, and resume there"
            )
        best = path.with_name(BEST_NAME)
        if not best.exists():
            raise InputError(f"--resume: {BEST_NAME} is missing beside {path}; put it back or train anew")
        best_checkpoint = read_checkpoint(best)
        if not _is_same_run(best_checkpoint, checkpoint):
            raise InputError(
                f"--resume: {best} is of another run than {path}, or of later epochs; put the right one "
                "back or train anew"
            )
        try:
            self._load(checkpoint)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"--resume: {path} is damaged, or of another version of torch: {reason}") from None
        if best_checkpoint["epoch"] > self.epoch:  # killed while saving; elsewhere the epoch may come out otherwise
            scores = {name: best_checkpoint["metrics"][name] for name in ("val_acc", "val_loss")}
            self.best = scores | {"epoch": best_checkpoint["epoch"]}
        self.group.check_same((self.epoch, self.best), "checkpoint to resume")
        if not self.group.is_main:
            return
        if path.resolve() != (self.output_dir / FINAL_NAME).resolve():
            self._keep_previous()
            if best.parent.resolve() != self.output_dir.resolve():
                copy_file(best, self.output_dir / BEST_NAME)
            copy_file(path, self.output_dir / FINAL_NAME)

    def _load(self, checkpoint: dict) -> None:
        step = self.step
        self.model.load_state_dict(checkpoint["train_state_dict"])
        step.optimizer.load_state_dict(checkpoint["optimizer"])
        step.scaler.load_state_dict(checkpoint["scaler"])
        for part, name in ((step.scheduler, "scheduler"), (step.ema, "ema")):
            if part:
                part.load_state_dict(checkpoint[name])
        self.epoch, self.history, self.best = checkpoint["epoch"], checkpoint["history"], checkpoint["best_metric"]
        self.saved_epoch, self.since_best = self.epoch, checkpoint["early_stopping"]["since_best"]


def _hash_file(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_same_run(best: dict, final: dict) -> bool:
    """Whether two checkpoints are of one run. One that is killed while saving has a best ahead of its final."""
    if best["epoch"] not in (final["best_metric"]["epoch"], final["epoch"] + 1):
        return False
    parts = []
    for checkpoint in (best, final):
        config = to_deployed(checkpoint["config"])
        config = {key: value for key, value in config.items() if key not in FREE_ON_RESUME}
        parts.append((checkpoint["arch"], checkpoint["class_names"], config))
    return parts[0] == parts[1]


def copy_file(source: Path, target: Path) -> None:
    replace_file(target, lambda temporary: shutil.copyfile(source, temporary))


def write_history(history: list[dict], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(history[0]))
        writer.writeheader()
        writer.writerows(history)
