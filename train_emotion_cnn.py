"""Trains a facial-emotion network on a folder of pictures sorted by emotion.

    python train_emotion_cnn.py                                         # train/ and test/ of the current folder
    python train_emotion_cnn.py --data-dir DIR --arch cnn4_bn --epochs 20
    python train_emotion_cnn.py --resume                                # go on where a stopped run was

Writes to --output-dir: best_emotion_model.pth (the best epoch on validation; what deploys), final_emotion_model.pth
(the last epoch; what resumes), training_history.csv, training_history.png, confusion_matrix.png,
classification_report.txt and metrics.json.
"""

import argparse
import csv
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

import reports
from augment import augment, parse_augment
from checkpoints import (
    BEST_NAME,
    FINAL_NAME,
    build_model,
    load_initial_weights,
    make_checkpoint,
    read_checkpoint,
    replace_file,
    save_checkpoint,
)
from data import Batches, FolderImages, draw_order, hash_split, is_sample_set, printable, split_train_val, to_input
from engine import (
    OPTIMIZERS,
    PRECISIONS,
    SCHEDULES,
    Ema,
    TrainStep,
    evaluate,
    loss_and_accuracy,
    make_optimizer,
    make_scheduler,
    memory_format,
    pick_device,
    pick_precision,
    seed_epoch,
    train_one_epoch,
)
from models import InputError, count_parameters, create_model, freeze, get_arch, list_archs, train_mode
from predict_emotion import run_script

DEFAULT_ARCH = "cnn6_bn"
DEFAULTS = {
    "data_dir": ".", "val_fraction": 0.1, "cache_dir": None, "strict": False, "arch": DEFAULT_ARCH, "image_size": None,
    "pretrained": None, "weights": None, "freeze": None, "dropout": None, "sampler": "shuffle", "grad_accum": 1,
    "clip_grad": 0.0, "early_stopping": 0, "output_dir": ".", "resume": None, "seed": 0, "device": "auto",
    "precision": "auto", "tensorboard": None,
}  # fmt: skip
FREE_ON_RESUME = {"output_dir", "device", "epochs", "resume", "cache_dir", "tensorboard", "strict"}
EVAL_BATCH = 256


def _number(kind, low: float, high: float = math.inf, *, open_ended: bool = False):
    """An argparse type: a finite number from `low` to `high`, without `high` itself where `open_ended`."""

    def parse(text: str):
        value = kind(text)
        if not (low <= value <= high and math.isfinite(value)) or (open_ended and value == high):
            end = "" if high == math.inf else f" {'and below' if open_ended else 'and at most'} {high:g}"
            raise argparse.ArgumentTypeError(f"must be at least {low:g}{end}, not {text}")
        return value

    parse.__name__ = "whole number" if kind is int else "number"  # what argparse calls it in its message
    return parse


def get_args_parser() -> argparse.ArgumentParser:
    """Flags that are not given stay out of the result, so that a recipe or a resumed run can supply them."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        epilog="'by arch' means the recipe of the network, which the README lists.",
        argument_default=argparse.SUPPRESS,
    )
    data = parser.add_argument_group("data")
    data.add_argument("--data-dir", metavar="DIR", help="holds train/ and, where there are, val/ and test/ (default: .)")
    data.add_argument("--val-fraction", type=_number(float, 0.01, 0.9), help="share of train/ that validates where there "
                      "is no val/ (default: 0.1)")  # fmt: skip
    data.add_argument("--cache-dir", metavar="DIR", help="where decoded pictures are kept (default: the user's cache)")
    data.add_argument("--strict", action="store_true", help="stop at a picture that can't be read, else it is left out")
    data.add_argument("--augment", help="none, light, medium, strong, or named strengths such as "
                      "flip,rotation=10,translate=0.1,scale=0.1,brightness=0.2,contrast=0.2,crop=0.8,erase=0.25 "
                      "(default: by arch)")  # fmt: skip
    data.add_argument("--class-weights", choices=("none", "balanced", "sqrt"), help="weights of the loss against rare "
                      "classes counting little (default: by arch)")  # fmt: skip
    data.add_argument("--sampler", choices=("shuffle", "balanced"), help="balanced draws every class equally often "
                      "(default: shuffle)")  # fmt: skip

    model = parser.add_argument_group("network")
    model.add_argument("--arch", help=f"one of {', '.join(list_archs())} (default: {DEFAULT_ARCH})")
    model.add_argument("--image-size", type=_number(int, 32, 1024), metavar="PIXELS", help="(default: by arch)")
    model.add_argument("--pretrained", action=argparse.BooleanOptionalAction, help="start a torchvision backbone from "
                       "ImageNet weights (default: yes for backbones)")  # fmt: skip
    model.add_argument("--weights", metavar="PATH", help="start from a checkpoint or a state_dict file")
    model.add_argument("--freeze", metavar="STAGE", help="freeze a backbone up to and with this stage; 'all' leaves the "
                       "head alone to learn")  # fmt: skip
    model.add_argument("--dropout", type=_number(float, 0, 1, open_ended=True), help="of the classifier head (default: "
                       "by arch)")  # fmt: skip

    optim = parser.add_argument_group("optimisation")
    optim.add_argument("--epochs", type=_number(int, 1), help="(default: by arch)")
    optim.add_argument("--batch-size", type=_number(int, 2), help="pictures per optimiser step (default: by arch)")
    optim.add_argument("--optimizer", choices=OPTIMIZERS, help="(default: by arch)")
    optim.add_argument("--lr", type=_number(float, 1e-9), help="learning rate; the peak of onecycle (default: by arch)")
    optim.add_argument("--weight-decay", type=_number(float, 0), help="(default: by arch)")
    optim.add_argument("--schedule", choices=SCHEDULES, help="of the learning rate (default: by arch)")
    optim.add_argument("--label-smoothing", type=_number(float, 0, 1, open_ended=True), help="(default: by arch)")
    optim.add_argument("--grad-accum", type=_number(int, 1), metavar="N", help="split each batch into N passes: the same "
                       "step in less memory (default: 1)")  # fmt: skip
    optim.add_argument("--clip-grad", type=_number(float, 0), metavar="NORM", help="clip the gradient's norm; 0 is off "
                       "(default: 0)")  # fmt: skip
    optim.add_argument("--ema", type=_number(float, 0, 1, open_ended=True), metavar="DECAY", help="average the weights; 0 "
                       "is off (default: by arch)")  # fmt: skip
    optim.add_argument("--early-stopping", type=_number(int, 0), metavar="EPOCHS", help="stop after so many epochs "
                       "without a better one; 0 is off (default: 0)")  # fmt: skip

    run = parser.add_argument_group("run")
    run.add_argument("--output-dir", metavar="DIR", help="(default: .)")
    run.add_argument("--resume", nargs="?", const="", metavar="PATH", help=f"go on from PATH, or from {FINAL_NAME} in "
                     "--output-dir; it brings its own flags")  # fmt: skip
    run.add_argument("--seed", type=_number(int, 0, 2**31 - 1), help="(default: 0)")
    run.add_argument("--device", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    run.add_argument("--precision", choices=PRECISIONS, help="of training; auto is bf16 where the hardware has it, else "
                     "fp32 (default: auto)")  # fmt: skip
    run.add_argument("--tensorboard", metavar="DIR", help="also log to DIR, where tensorboard is installed")
    return parser


# Settings


def settle(given: dict) -> tuple[dict, dict | None]:
    """Flags that were given -> all settings, and the checkpoint to resume where --resume was among them.

    Raises InputError for flags that contradict each other or the resumed run.
    """
    settings = {**DEFAULTS, **given}
    resumed = None
    if settings["resume"] is not None:
        settings, resumed = settle_resumed(given, Path(settings["resume"] or Path(settings["output_dir"]) / FINAL_NAME))
    else:
        arch = get_arch(settings["arch"])
        settings = {**DEFAULTS, **asdict(arch.recipe), **given}
        if settings["pretrained"] is None:
            settings["pretrained"] = arch.is_backbone and settings["weights"] is None
        if settings["pretrained"] and settings["weights"]:
            raise InputError("--pretrained and --weights both say where to start from; give one")
    parse_augment(settings["augment"])
    return settings, resumed


def settle_resumed(given: dict, path: Path) -> tuple[dict, dict]:
    """The settings of the run in `path` with what may be changed, and its checkpoint."""
    if not path.exists():
        raise InputError(f"--resume: no {path}; a run can be resumed once its first epoch has ended")
    checkpoint = read_checkpoint(path)
    if "optimizer" not in checkpoint:
        raise InputError(f"--resume: {path} can't be resumed; pass the {FINAL_NAME} that stands beside it")
    config = checkpoint["config"]
    for name, value in given.items():
        if name in FREE_ON_RESUME:
            continue
        value = os.path.abspath(value) if name in ("data_dir", "weights") else value
        if value != config[name]:
            flag = "--" + name.replace("_", "-")
            raise InputError(f"--resume: {flag} {value} contradicts the run in {path}, which has {config[name]}")
    epochs = given.get("epochs", config["epochs"])
    if epochs != config["epochs"] and config["schedule"] in ("cosine", "onecycle"):
        raise InputError(
            f"--resume: the {config['schedule']} schedule of this run ends after {config['epochs']} epochs; "
            "--epochs can't be changed"
        )
    if epochs < checkpoint["epoch"]:
        raise InputError(f"--resume: --epochs {epochs} is less than the {checkpoint['epoch']} epochs that are done")
    free = {name: given.get(name, DEFAULTS.get(name)) for name in FREE_ON_RESUME}
    return {**config, **free, "epochs": epochs, "output_dir": given.get("output_dir", str(path.parent))}, checkpoint


def to_config(settings: dict) -> dict:
    """What the checkpoint keeps of the settings: all that makes the result, as plain values."""
    config = {name: value for name, value in settings.items() if name not in FREE_ON_RESUME - {"epochs"}}
    for name in ("data_dir", "weights"):
        config[name] = config[name] and os.path.abspath(config[name])
    return config


# Data


@dataclass
class Splits:
    train: Batches
    val: Batches
    test: Batches | None
    class_names: list[str]
    spec: object  # InputSpec
    trained_on: str
    split_hash: str


def load_splits(settings: dict, spec, device: torch.device) -> Splits:
    """Reads train/, val/ or a share of train/, and test/ where there is one; prints what it found."""
    root = Path(settings["data_dir"])
    if not (root / "train").is_dir():
        raise InputError(f"no folder {printable(root / 'train')}: --data-dir must hold train/ with a folder per class")
    options = {"cache_dir": settings["cache_dir"], "strict": settings["strict"]}
    train = FolderImages(root / "train", spec, **options)
    if len(train.class_names) < 2:
        raise InputError(f"{printable(root / 'train')} holds one class only ({train.class_names[0]}); two are the least")
    if spec.channels == 3 and train.images.shape[1] == 1:
        spec = train.spec = type(spec)(**{**asdict(spec), "gray": True})
    options["class_names"] = train.class_names
    others = {
        name: FolderImages(root / name, spec, **options) for name in ("val", "test") if (root / name).is_dir()
    }
    train_rows = np.arange(len(train))
    if "val" in others:
        val, val_rows = others["val"], np.arange(len(others["val"]))
    else:
        train_rows, val_rows = split_train_val(train.labels, train.digests, settings["val_fraction"], settings["seed"])
        val = train
    if len(val_rows) == 0 or len(train_rows) < 2:
        raise InputError(f"{len(train)} pictures in {printable(root / 'train')} are too few to train and validate on")
    for images in (train, *others.values()):
        for note in images.notes:
            print(note)
    test = others.get("test")
    parts = [([data.digests[row] for row in rows], data.labels[rows]) for data, rows in ((train, train_rows), (val, val_rows))]
    where = "val/" if val is not train else f"{100 * settings['val_fraction']:g}% of train/"
    print(f"{len(train_rows):,} pictures to train, {len(val_rows):,} to validate ({where}), "
          f"{len(test) if test else 'none'} to test; {len(train.class_names)} classes: "
          f"{', '.join(map(printable, train.class_names))}")  # fmt: skip
    return Splits(
        train=Batches(train, train_rows, device),
        val=Batches(val, val_rows, device),
        test=Batches(test, np.arange(len(test)), device) if test else None,
        class_names=train.class_names,
        spec=spec,
        trained_on="the sample set of drawings" if is_sample_set(train.paths) else printable(root.resolve().name),
        split_hash=hash_split(*parts),
    )


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


# The run


class Run:
    """All that changes while training, how it is saved to the final checkpoint and restored from it."""

    def __init__(self, settings: dict, splits: Splits, device: torch.device):
        self.settings, self.splits, self.device = settings, splits, device
        self.config = to_config(settings)
        self.output_dir = Path(settings["output_dir"])
        self.model = self._make_model()
        optimizer = make_optimizer(
            settings["optimizer"], self.model, lr=settings["lr"], weight_decay=settings["weight_decay"]
        )
        steps = len(list(splits.train.bounds(settings["batch_size"])))
        scheduler = make_scheduler(settings["schedule"], optimizer, total_steps=steps * settings["epochs"])
        self.class_weights = make_class_weights(
            settings["class_weights"], splits.train.class_counts(len(splits.class_names))
        )
        self.generator = torch.Generator(device)
        strengths = parse_augment(settings["augment"])
        self.step = TrainStep(
            self.model,
            optimizer,
            lambda images: augment(images, splits.spec, strengths, self.generator),
            precision=pick_precision(settings["precision"], device),
            scheduler=scheduler,
            class_weights=self.class_weights and torch.tensor(self.class_weights, device=device),
            label_smoothing=settings["label_smoothing"],
            grad_accum=settings["grad_accum"],
            clip_grad=settings["clip_grad"],
            ema=Ema(self.model, settings["ema"]) if settings["ema"] else None,
        )
        self.epoch, self.history, self.since_best = 0, [], 0
        self.best = {"val_acc": -1.0, "val_loss": math.inf, "epoch": 0}

    def _make_model(self):
        settings, spec = self.settings, self.splits.spec
        torch.manual_seed(settings["seed"])
        model = create_model(
            settings["arch"],
            len(self.splits.class_names),
            image_size=spec.image_size,
            dropout=settings["dropout"],
            pretrained=settings["pretrained"] and settings["resume"] is None,
        )
        model.input_spec = spec
        if settings["weights"] and settings["resume"] is None:
            print(load_initial_weights(model, settings["weights"]))
        if settings["freeze"]:
            freeze(model, settings["freeze"])
        return model.to(self.device, memory_format=memory_format(self.device))

    @property
    def validated_model(self):
        """The network that is measured and deployed: the EMA's, where EMA is on."""
        return self.step.ema.model if self.step.ema else self.model

    def train_epoch(self) -> None:
        """One epoch and its validation; appends to the history and saves both checkpoints."""
        settings, number, start = self.settings, self.epoch + 1, time.perf_counter()
        seed = seed_epoch(settings["seed"], number)
        self.generator.manual_seed(seed)
        train = self.splits.train
        order = draw_order(
            train.labels, balanced=settings["sampler"] == "balanced", generator=torch.Generator().manual_seed(seed)
        )
        train_mode(self.model)
        lr = self.step.optimizer.param_groups[0]["lr"]
        title = f"epoch {number}/{settings['epochs']}"
        try:
            done = train_one_epoch(self.step, train.iterate(settings["batch_size"], order), total=len(order), title=title)
        except FloatingPointError as error:
            raise InputError(
                f"epoch {number}: {error}; try a lower --lr or --clip-grad 1 (the checkpoints of epoch {self.epoch} stay)"
            ) from None
        val_loss, val_acc = loss_and_accuracy(*self.measure(self.validated_model, self.splits.val))
        if settings["schedule"] == "plateau":
            self.step.scheduler.step(val_loss)
        self.epoch = number
        row = {"epoch": number, "lr": lr, "train_loss": done["loss"], "train_acc": done["acc"], "val_loss": val_loss,
               "val_acc": val_acc, "images_per_s": done["images_per_s"], "seconds": time.perf_counter() - start}  # fmt: skip
        self.history.append(row)
        is_best = (val_acc, -val_loss) > (self.best["val_acc"], -self.best["val_loss"])
        self.since_best = 0 if is_best else self.since_best + 1
        if is_best:
            self.best = {"val_acc": val_acc, "val_loss": val_loss, "epoch": number}
        self.save(is_best)
        print(f"epoch {number:3}/{settings['epochs']}  train loss {row['train_loss']:.4f} acc {100 * row['train_acc']:5.2f}%"
              f"  val loss {val_loss:.4f} acc {100 * val_acc:5.2f}%  lr {lr:.2g}  {row['images_per_s']:,.0f} img/s"
              f"  {row['seconds']:.1f} s{'  *' if is_best else ''}", flush=True)  # fmt: skip

    def measure(self, model, batches: Batches):
        spec = self.splits.spec
        return evaluate(model, batches.iterate(EVAL_BATCH), lambda images: to_input(images, spec))

    def save(self, is_best: bool) -> None:
        """Writes the best checkpoint where this epoch is it, then the final one, then the history as CSV."""
        metrics = {key: self.history[-1][key] for key in ("val_loss", "val_acc", "train_loss", "train_acc")}
        checkpoint = make_checkpoint(
            self.validated_model, self.splits.class_names, trained_on=self.splits.trained_on, epoch=self.epoch,
            metrics=metrics, config=self.config,
        )  # fmt: skip
        best_path = self.output_dir / BEST_NAME
        if is_best:
            if len(self.history) == 1 and best_path.exists():  # of an earlier run
                replace_file(best_path.with_suffix(".previous.pth"), lambda path: path.write_bytes(best_path.read_bytes()))
            save_checkpoint(checkpoint, best_path)
        step = self.step
        checkpoint |= {
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
        }
        save_checkpoint(checkpoint, self.output_dir / FINAL_NAME)
        write_history(self.history, self.output_dir / "training_history.csv")

    def restore(self, checkpoint: dict, path: Path) -> None:
        """Puts the state of a final checkpoint back; raises InputError where the pictures have changed since."""
        if checkpoint["split_hash"] != self.splits.split_hash:
            raise InputError(f"--resume: the pictures or their split have changed since {path} was written; train anew")
        self.model.load_state_dict(checkpoint["train_state_dict"])
        step = self.step
        step.optimizer.load_state_dict(checkpoint["optimizer"])
        step.scaler.load_state_dict(checkpoint["scaler"])
        for part, name in ((step.scheduler, "scheduler"), (step.ema, "ema")):
            if part:
                part.load_state_dict(checkpoint[name])
        self.epoch, self.history, self.best = checkpoint["epoch"], checkpoint["history"], checkpoint["best_metric"]
        self.since_best = checkpoint["early_stopping"]["since_best"]
        best_path = self.output_dir / BEST_NAME
        if not best_path.exists():
            source = path.with_name(BEST_NAME)
            if not source.exists():
                raise InputError(f"--resume: {BEST_NAME} is missing beside {path}")
            replace_file(best_path, lambda temporary: temporary.write_bytes(source.read_bytes()))

    @property
    def is_finished(self) -> bool:
        patience = self.settings["early_stopping"]
        return self.epoch >= self.settings["epochs"] or bool(patience and self.since_best >= patience)


def write_history(history: list[dict], path: Path) -> None:
    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(history[0]))
            writer.writeheader()
            writer.writerows(history)

    replace_file(path, write)


def report(run: Run) -> None:
    """Measures the best checkpoint on test, or on validation where there is no test, and writes plots and report."""
    best_path, out = run.output_dir / BEST_NAME, run.output_dir
    checkpoint = read_checkpoint(best_path)
    model = build_model(checkpoint, best_path).to(run.device, memory_format=memory_format(run.device))
    split = "test" if run.splits.test else "val"
    log_probs, labels = run.measure(model, run.splits.test or run.splits.val)
    metrics = reports.compute_metrics(labels.numpy(), log_probs.numpy(), run.splits.class_names, split=split)
    metrics |= {"arch": model.arch, "epoch": checkpoint["epoch"], "val": checkpoint["metrics"]}
    text = reports.format_report(metrics)
    title = f"{model.arch} on {run.splits.trained_on}"
    writers = {
        "training_history.png": lambda path: reports.plot_history(run.history, path, title=title),
        "confusion_matrix.png": lambda path: reports.plot_confusion_matrix(metrics, path),
        "classification_report.txt": lambda path: path.write_text(text, encoding="utf-8"),
        "metrics.json": lambda path: path.write_text(json.dumps(metrics, indent=1), encoding="utf-8"),
    }
    for name, write in writers.items():
        replace_file(out / name, write)
    if split == "val":
        print("\nThere is no test/, so this report is on validation, which also chose the epoch.")
    print(f"\nBest epoch {checkpoint['epoch']} of {run.epoch}\n{text}")
    warning = reports.one_class_warning(metrics)
    if warning:
        print(warning)
    print(f"Written to {printable(out.resolve())}: {BEST_NAME}, {FINAL_NAME}, training_history.csv, {', '.join(writers)}")
    print(f"Next: python predict_emotion.py photo.jpg --checkpoint {printable(best_path)}")


def make_writer(folder: str | None):
    """A TensorBoard writer, or None without --tensorboard; InputError where tensorboard isn't installed."""
    if folder is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("--tensorboard needs the package: pip install tensorboard") from None
    return SummaryWriter(folder)


def main(argv: list[str] | None = None) -> None:
    settings, resumed = settle(vars(get_args_parser().parse_args(argv)))
    device = pick_device(settings["device"])
    output_dir = Path(settings["output_dir"])
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        if not os.access(output_dir, os.W_OK):
            raise PermissionError(13, "no permission to write there")
    except OSError as error:
        raise InputError(f"--output-dir {printable(output_dir)}: {error.strerror}") from None
    writer = make_writer(settings["tensorboard"])
    spec = create_model(settings["arch"], 2, image_size=settings["image_size"]).input_spec
    splits = load_splits(settings, spec, device)
    run = Run(settings, splits, device)
    if resumed:
        run.restore(resumed, Path(settings["resume"] or output_dir / FINAL_NAME))
        print("this run is finished; its reports are made again" if run.is_finished else f"goes on after epoch {run.epoch}")
    precision = str(run.step.precision).removeprefix("torch.")
    print(f"{settings['arch']}: {count_parameters(run.model):,} parameters, on {device} in {precision}, "
          f"{torch.get_num_threads()} threads")  # fmt: skip
    try:
        while not run.is_finished:
            run.train_epoch()
            if writer:
                for key, value in run.history[-1].items():
                    writer.add_scalar(key, value, run.epoch)
    except KeyboardInterrupt:
        resume = f"python train_emotion_cnn.py --resume --output-dir {printable(output_dir)}"
        print(f"\nstopped; {f'go on with: {resume}' if run.epoch else 'no epoch had ended, so there is nothing to resume'}",
              file=sys.stderr)  # fmt: skip
        raise
    finally:
        if writer:
            writer.close()
    report(run)


if __name__ == "__main__":
    run_script(main)
