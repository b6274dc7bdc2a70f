"""Trains a facial-emotion network on a folder of pictures sorted by emotion.

    python train_emotion_cnn.py                                         # train/ and test/ of the current folder
    python train_emotion_cnn.py --data-dir DIR --arch cnn4_bn --epochs 20
    python train_emotion_cnn.py --resume                                # go on where a stopped run was

Writes to --output-dir: best_emotion_model.pth (the best epoch on validation; what deploys), final_emotion_model.pth
(the last epoch; what resumes), training_history.csv, training_history.png, confusion_matrix.png, reliability.png,
classification_report.txt and metrics.json.
"""

import argparse
import math
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

import reports
from checkpoints import BEST_NAME, FINAL_NAME, PATHS, build_model, read_checkpoint, replace_file, save_checkpoint
from console import ArgumentParser, make_output_dir, run_script
from data import SAMPLE_SET
from device import PRECISIONS, limit_threads, memory_format, pick_device
from engine.augment import parse_augment
from engine.distributed import Group, is_loss_of_others, join, leave, when_terminated
from engine.loop import fit_temperature, to_log_probs
from engine.optim import OPTIMIZERS, SCHEDULES
from engine.resume import FREE_ON_RESUME, HISTORY_NAME, Run, write_history
from errors import InputError, printable
from models import count_parameters, get_arch, input_spec_for, list_archs
from splits import load_splits

DEFAULT_ARCH = "seresnet13"


def _number(kind, low: float, high: float = math.inf, *, below: bool = False):
    """An argparse type: a finite number from `low` to `high`, or with `below` only up to it."""

    def parse(text: str):
        value = kind(text)
        if not (low <= value <= high and math.isfinite(value)) or (below and value == high):
            end = "" if high == math.inf else f" and {'below' if below else 'at most'} {high:g}"
            raise argparse.ArgumentTypeError(f"must be at least {low:g}{end}, not {text}")
        return value

    parse.__name__ = "whole number" if kind is int else "number"  # what argparse calls it in its message
    return parse


_COUNT, _SHARE = _number(int, 0), _number(float, 0, 1, below=True)
BY_ARCH = "by arch"  # the default is the recipe's
FLAGS = {  # group: (flag, default, argparse's options, help)
    "data": [
        ("--data-dir", ".", {"metavar": "DIR"}, "holds train/ and, where there are, val/ and test/"),
        ("--val-fraction", 0.1, {"type": _number(float, 0.01, 0.9)}, "of train/ that validates where there is no val/"),
        ("--cache-dir", None, {"metavar": "DIR"}, "for decoded pictures; else the user's cache folder"),
        ("--strict", False, {"action": "store_true"}, "stop at a picture that can't be read; else it is left out"),
        (
            "--augment",
            BY_ARCH,
            {},
            "none, light, medium, strong, or strengths such as flip,rotation=10,translate=0.1,"
            "scale=0.1,brightness=0.2,contrast=0.2,crop=0.8,window=0.83,erase=0.25",
        ),
        ("--class-weights", BY_ARCH, {"choices": ("none", "balanced", "sqrt")}, "count rare classes more in the loss"),
        ("--sampler", "shuffle", {"choices": ("shuffle", "balanced")}, "balanced draws every class equally often"),
    ],
    "network": [
        ("--arch", DEFAULT_ARCH, {}, f"one of {', '.join(list_archs())}"),
        ("--image-size", BY_ARCH, {"type": _number(int, 32, 1024), "metavar": "PIXELS"}, "side of the network's input"),
        (
            "--pretrained",
            None,
            {"action": argparse.BooleanOptionalAction},
            "start from ImageNet weights; torchvision backbones do, unless --weights is given",
        ),
        ("--weights", None, {"metavar": "PATH"}, "start from a checkpoint or a state_dict file"),
        (
            "--freeze",
            None,
            {"metavar": "STAGE"},
            "freeze a backbone up to and with this stage; all leaves the head to learn",
        ),
        ("--dropout", BY_ARCH, {"type": _SHARE}, "of the classifier head, each of its dropouts"),
    ],
    "optimisation": [
        ("--epochs", BY_ARCH, {"type": _number(int, 1)}, "how often every training picture is seen"),
        ("--batch-size", BY_ARCH, {"type": _number(int, 2)}, "pictures per optimiser step"),
        ("--optimizer", BY_ARCH, {"choices": OPTIMIZERS}, ""),
        ("--lr", BY_ARCH, {"type": _number(float, 1e-9)}, "learning rate; of onecycle the peak"),
        ("--weight-decay", BY_ARCH, {"type": _number(float, 0)}, "L2 penalty of adam and sgd; of adamw decoupled"),
        ("--schedule", BY_ARCH, {"choices": SCHEDULES}, "of the learning rate"),
        ("--label-smoothing", BY_ARCH, {"type": _SHARE}, "share of the target spread over all classes"),
        (
            "--mixup",
            BY_ARCH,
            {"type": _number(float, 0), "metavar": "ALPHA"},
            "blend pairs of pictures and their labels, 0.2 say; 0 is off",
        ),
        (
            "--teacher",
            None,
            {"nargs": "+", "action": "extend", "metavar": "PATH"},
            "learn from the answers of these checkpoints too",
        ),
        (
            "--grad-accum",
            1,
            {"type": _number(int, 1), "metavar": "N"},
            "split each batch into N passes: less memory, and the same step but for batch-norm and dropout",
        ),
        ("--clip-grad", 0.0, {"type": _number(float, 0), "metavar": "NORM"}, "clip the gradient's norm; 0 is off"),
        ("--ema", BY_ARCH, {"type": _SHARE, "metavar": "DECAY"}, "average the weights, 0.999 say; 0 is off"),
        (
            "--early-stopping",
            0,
            {"type": _COUNT, "metavar": "EPOCHS"},
            "stop after so many without a better validation accuracy; 0 is off",
        ),
    ],
    "run": [
        ("--output-dir", ".", {"metavar": "DIR"}, "where everything is written"),
        (
            "--resume",
            None,
            {"nargs": "?", "const": "", "metavar": "PATH"},
            f"go on from PATH, or from {FINAL_NAME} in --output-dir; it brings its own flags",
        ),
        ("--seed", 0, {"type": _number(int, 0, 2**31 - 1)}, "of everything random"),
        ("--device", "auto", {}, "auto, cpu, cuda, cuda:1, mps"),
        (
            "--precision",
            "auto",
            {"choices": PRECISIONS},
            "of training; auto is bf16 where the hardware has it, else fp32",
        ),
        (
            "--deterministic",
            False,
            {"action": "store_true"},
            "take torch's deterministic algorithms on CUDA, more slowly; on the CPU it is so anyway",
        ),
        ("--tensorboard", None, {"metavar": "DIR"}, "also log to DIR, where tensorboard is installed"),
    ],
}
DEFAULTS = {flag[2:].replace("-", "_"): default for rows in FLAGS.values() for flag, default, _, _ in rows}


def get_args_parser() -> ArgumentParser:
    """Flags that are not given stay out of the result, so that a recipe or a resumed run can supply them."""
    parser = ArgumentParser(
        description=__doc__.partition("\n")[0],
        epilog=f"Where the default is {BY_ARCH!r}, it is the recipe of the network; the README has a table of them.",
        argument_default=argparse.SUPPRESS,
    )
    for title, rows in FLAGS.items():
        group = parser.add_argument_group(title)
        for flag, default, options, text in rows:
            shown = "" if default is None or default is False else f"(default: {default})"
            group.add_argument(flag, **options, help=f"{text} {shown}".strip())
    return parser


# Settings


def resume_path(settings: dict) -> Path:
    """The file that --resume names; bare, it is the final checkpoint in --output-dir."""
    return Path(settings["resume"] or Path(settings["output_dir"]) / FINAL_NAME)


def settle(given: dict) -> tuple[dict, dict | None]:
    """Flags that were given -> all settings, and the checkpoint to resume where --resume was among them.

    Raises InputError for flags that contradict each other or the resumed run.
    """
    if "resume" in given:
        return settle_resumed(given, resume_path({**DEFAULTS, **given}))
    arch = get_arch(given.get("arch", DEFAULT_ARCH))
    by_arch = {**asdict(arch.recipe), "image_size": arch.input_spec.image_size, "dropout": None}
    settings = {**DEFAULTS, **by_arch, **given}
    if settings["pretrained"] is None:
        settings["pretrained"] = arch.is_backbone and settings["weights"] is None
    if settings["pretrained"] and settings["weights"]:
        raise InputError("--pretrained and --weights both say where to start from; give one")
    for flag, paths in (("--weights", [settings["weights"]]), ("--teacher", settings["teacher"] or ())):
        for path in paths:
            if path is not None and not os.path.exists(path):
                raise InputError(f"{flag}: no file {path!r}")
    if arch.is_backbone and settings["freeze"] and not (settings["pretrained"] or settings["weights"]):
        raise InputError("--freeze keeps what was learnt, and with --no-pretrained nothing was; leave one out")
    strengths = parse_augment(settings["augment"])  # a mistake in it should show before the pictures are read
    if strengths.window < 1 and not arch.takes_any_size:
        raise InputError(f"--augment: {arch.name} takes pictures of one size only; leave window out, or use crop")
    return settings, None


def settle_resumed(given: dict, path: Path) -> tuple[dict, dict]:
    """The settings of the run in `path` with what may be changed, and its checkpoint."""
    if not os.path.exists(path):
        raise InputError(f"--resume: no {path}; a run can be resumed once its first epoch has ended")
    checkpoint = read_checkpoint(path)
    if "optimizer" not in checkpoint:
        raise InputError(f"--resume: {path} can't be resumed; pass the {FINAL_NAME} that stands beside it")
    kept = {name: value for name, value in checkpoint["config"].items() if name in DEFAULTS}
    config = {**DEFAULTS, **kept, "output_dir": str(path.parent)}
    for name, value in given.items():
        if name in FREE_ON_RESUME:
            continue
        value = _absolute(value) if name in PATHS else value
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
    return {**config, **given}, checkpoint


def _absolute(path: str | list[str] | None) -> str | list[str] | None:
    return [_absolute(each) for each in path] if isinstance(path, list) else path and os.path.abspath(path)


def to_config(settings: dict) -> dict:
    """What the checkpoint keeps of the settings, so that a resumed run brings them back; paths are made absolute."""
    config = {name: value for name, value in settings.items() if name not in ("output_dir", "resume")}
    for name in PATHS:
        config[name] = _absolute(config[name])
    return config


# The run


def report(run: Run) -> None:
    """Fits the best checkpoint's temperature on validation, measures it, writes report and plots.

    It is measured on test or, where there is none, on validation.
    """
    path, splits = run.output_dir / BEST_NAME, run.splits
    checkpoint = read_checkpoint(path)
    model = build_model(checkpoint, path).to(run.device, memory_format=memory_format(run.device))
    temperature = fit_temperature(*run.measure(model, splits.val))
    split = "test" if splits.test else "val"
    logits, labels = run.measure(model, splits.test or splits.val)
    metrics = reports.compute_metrics(
        labels.numpy(),
        to_log_probs(logits, temperature).numpy(),
        splits.class_names,
        split=split,
        temperature=temperature,
        uncalibrated=to_log_probs(logits).numpy(),
        copies=splits.copies[split],
    )
    selected = {name: value for name, value in checkpoint["metrics"].items() if not name.startswith("test_")}
    metrics |= {"arch": model.arch, "epoch": checkpoint["epoch"], "val": selected}
    tested = {f"test_{name}": metrics[name] for name in ("accuracy", "macro_f1", "count") if split == "test"}
    measured = checkpoint | {"temperature": temperature, "metrics": selected | tested}
    if measured != checkpoint:
        save_checkpoint(measured, path)
    files = reports.result_files(metrics)
    title = f"{model.arch} on {splits.trained_on}"
    files[HISTORY_NAME] = lambda path: write_history(run.history, path)
    files["training_history.png"] = lambda path: reports.plot_history(run.history, path, title=title)
    for name, write in files.items():
        replace_file(run.output_dir / name, write)
    if split == "val":
        print("\nThere is no test/: this report is on validation, which also chose epoch and temperature.")
    print(f"\nBest epoch: {checkpoint['epoch']} of {run.epoch}\n{reports.format_report(metrics)}")
    warning = reports.one_class_warning(metrics)
    if warning:
        print(warning)
    written = ", ".join((BEST_NAME, FINAL_NAME, *files))
    print(f"In {printable(run.output_dir.resolve())}: {written}")
    photo = "" if splits.trained_on == SAMPLE_SET else "photo.jpg "
    print(f'Next: python predict_emotion.py {photo}--checkpoint "{printable(path)}"')


def make_writer(folder: str | None):
    """A TensorBoard writer, or None without --tensorboard; InputError where tensorboard isn't installed."""
    if folder is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("--tensorboard needs a package that isn't there: pip install tensorboard") from None
    return SummaryWriter(make_output_dir(folder, "--tensorboard"))


def log_scalars(writer, row: dict) -> None:
    for tag, name in (("Loss", "loss"), ("Accuracy", "acc")):
        for split in ("train", "val"):
            writer.add_scalar(f"{tag}/{split}", row[f"{split}_{name}"], row["epoch"])
    writer.add_scalar("lr", row["lr"], row["epoch"])


def format_row(row: dict, run: Run) -> str:
    mark = "  best" if run.best["epoch"] == row["epoch"] else ""
    return (
        f"epoch {row['epoch']}/{run.settings['epochs']}"
        f"  train loss {row['train_loss']:.4f}, {100 * row['train_acc']:.2f}%"
        f"  val loss {row['val_loss']:.4f}, {100 * row['val_acc']:.2f}%  lr {row['lr']:.2g}"
        f"  {row['images_per_s']:,.0f} img/s  {row['seconds']:.1f} s{mark}"
    )


def train(run: Run, writer, say) -> None:
    while not run.is_finished:
        row = run.train_epoch()
        say(format_row(row, run), flush=True)
        if writer:
            log_scalars(writer, row)


def say_how_to_resume(run: Run | None, why: str = "stopped") -> None:
    hint = "no epoch had ended, so there is nothing to resume"
    if run and not run.history and run.earlier_results():
        hint += f"; what {printable(run.output_dir)} held before is as it was"
    if run and run.saved_epoch:
        launch = "python" if run.group.size == 1 else f"torchrun --standalone --nproc-per-node {run.group.size}"
        hint = f'go on with: {launch} train_emotion_cnn.py --resume "{printable(run.output_dir / FINAL_NAME)}"'
    print(f"\n{why}; {hint}", file=sys.stderr, flush=True)


def _threads() -> str:
    return f"{torch.get_num_threads()} CPU thread{'s' * (torch.get_num_threads() > 1)}"


def describe(run: Run) -> str:
    splits = run.splits
    test = f"{len(splits.test):,} to test" if splits.test else "none to test"
    lines = [
        *splits.notes,
        *run.notes,
        *run.earlier_results(),
        f"{len(splits.train):,} pictures to train, {len(splits.val):,} to validate ({splits.where_val}), {test}",
        f"{len(splits.class_names)} classes: {', '.join(splits.class_names)}",
        f"{run.model.arch}: {count_parameters(run.model):,} parameters, "
        f"{str(run.step.precision).removeprefix('torch.')} on {run.device}, {_threads()}",
    ]
    if run.group.size > 1:
        lines[-1] += f", {run.group.size} processes"
    return "\n".join(lines)


def load(settings: dict, group: Group, device: torch.device):
    """The pictures; the first process of each machine fills the cache for its others."""
    if group.is_main:
        make_output_dir(settings["output_dir"])
    spec = input_spec_for(settings["arch"], settings["image_size"])
    options = {name: settings[name] for name in ("val_fraction", "seed", "cache_dir", "strict")}
    return load_splits(settings["data_dir"], spec, device, **options)


def run_training(run: Run, resumed: dict | None) -> None:
    say = print if run.group.is_main else lambda *_, **__: None
    say(describe(run), flush=True)
    if resumed:
        run.restore(resumed, resume_path(run.settings))
        what = f"seed {run.settings['seed']}, {run.settings['epochs']} epochs"
        say(
            f"this run ({what}) is finished; its reports follow"
            if run.is_finished
            else f"resumed after epoch {run.epoch} ({what})"
        )
    if run.group.is_main:
        run.remove_left_overs()
    writer = make_writer(run.settings["tensorboard"]) if run.group.is_main else None
    try:
        train(run, writer, say)
        if run.group.is_main:
            report(run)
    except KeyboardInterrupt:
        if run.group.is_main:
            say_how_to_resume(run)
        raise
    finally:
        if writer:
            writer.close()


def main(argv: list[str] | None = None) -> None:
    given = vars(get_args_parser().parse_args(argv))
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0 and "resume" not in given:
        raise InputError("torchrun's restart would train anew over the last checkpoint; pass --resume, or 0 restarts")
    group, device = join(pick_device(given.get("device", "auto")))
    run = None

    def say_the_end(why: str = "") -> None:
        if group.is_lowest_alive():
            say_how_to_resume(run, f"another process of this run has ended{why}")

    if group.size > 1:
        limit_threads(group.local_size)
        when_terminated(say_the_end)
    try:
        settings, resumed = group.together(lambda: settle(given))
        splits = group.together(lambda: load(settings, group, device), one_first=True)
        run = Run(settings, to_config(settings), splits, device, is_resumed=resumed is not None, group=group)
        run_training(run, resumed)
    except Exception as error:
        if group.size == 1 or not is_loss_of_others(error):
            raise
        time.sleep(30)  # torchrun mostly ends this process now, and when_terminated speaks
        say_the_end(f" ({str(error).strip().partition(chr(10))[0][:200]})")
        os._exit(1)
    leave()


if __name__ == "__main__":
    run_script(main)
