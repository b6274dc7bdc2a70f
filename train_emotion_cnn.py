"""Trains a facial-emotion model on a folder of images sorted by emotion.

    python train_emotion_cnn.py                                         # train/ and test/ of the current folder
    python train_emotion_cnn.py --data-dir DIR --arch cnn4_bn --epochs 20
    python train_emotion_cnn.py --resume                                # go on with a run that was stopped
    torchrun --standalone --nproc-per-node 4 train_emotion_cnn.py ...   # one process per GPU

Writes to --output-dir after every epoch: final_emotion_model.pth (for --resume), training_history.csv, and, if the
validation accuracy is the highest so far (of equals, the loss the lowest), best_emotion_model.pth (for inference). At
the end: the best checkpoint again, with temperature and test metrics, metrics.json, classification_report.txt,
training_history.png, confusion_matrix.png and reliability.png.
"""

import os
import sys
import time
from argparse import BooleanOptionalAction
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

import reports
from checkpoints import (
    BEST_NAME,
    FINAL_NAME,
    PREVIOUS_NAME,
    build_model,
    save_checkpoint,
    without_folders,
)
from console import ArgumentParser, make_output_dir, number, own_output_dir, run_script, to_flags
from data import SAMPLE_SET, find_splits
from device import PRECISIONS, keep_freed_memory, memory_format, pick_device, pick_precision, torchrun_ranks
from engine import distributed, resume
from engine.augment import EXAMPLE, PRESETS, augment, parse_augment
from engine.distributed import ProcessGroup
from engine.evaluation import evaluate, fit_temperature, loss_and_accuracy, measure
from engine.optim import OPTIMIZERS, SCHEDULES, Ema, make_optimizer, make_scheduler
from engine.pretrained import freeze, load_imagenet_weights, load_initial_weights, load_teacher
from engine.settings import Settings
from engine.step import (
    CLASS_WEIGHTS,
    TrainStep,
    check_finite,
    make_class_weights,
    make_logit_adjustment,
    seed_for,
    train_one_epoch,
)
from errors import InputError, printable
from faces.detector import warn_of_photos
from models import count_parameters, create_model, device_of, get_arch, input_spec_for, list_archs
from splits import SAMPLERS, Splits, batch_bounds, draw_order, load_splits

DEFAULT_ARCH = "seresnet13"
SHARE = number(float, 0, 1, below=True)  # an argparse type


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])

    add = parser.add_argument_group("data").add_argument
    add("--data-dir", default=".", metavar="DIR", help="holds train/, and val/ and test/ if there are any")
    add("--val-fraction", default=0.1, type=number(float, 0.01, 0.9), help="of train/, to validate on without val/")
    add("--cache-dir", metavar="DIR", help="for decoded images (default: the user's cache folder)")
    add("--strict", action="store_true", help="stop at an image that can't be read, instead of leaving it out")
    add("--sampler", default="shuffle", choices=SAMPLERS, help="balanced: draw every class equally often")

    add = parser.add_argument_group("model").add_argument
    add("--arch", default=DEFAULT_ARCH, help=f"one of {', '.join(list_archs())}")
    add("--image-size", type=number(int, 32, 1024), metavar="PIXELS", help="side of the input (default: the arch's)")
    add("--pretrained", action=BooleanOptionalAction, help="start from ImageNet weights (default: backbones do)")
    add("--weights", metavar="PATH", help="start from a checkpoint or a state_dict file")
    add("--freeze", metavar="STAGE", help="freeze a backbone up to this stage; all: train the head only")
    add("--dropout", type=SHARE, help="of each dropout in the classifier (default: the arch's)")

    add_training_flags(parser)

    add = parser.add_argument_group("run").add_argument
    add("--output-dir", default=".", metavar="DIR", help="where everything is written")
    add("--resume", nargs="?", const="", metavar="PATH", help=f"go on from PATH or {FINAL_NAME}, with its flags")
    add("--seed", default=0, type=number(int, 0, 2**31 - 1), help="of everything random")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--precision", default="auto", choices=PRECISIONS, help="auto is bf16 if the hardware has it, else fp32")
    add("--deterministic", action="store_true", help="use torch's deterministic algorithms on CUDA; slower")
    add("--tensorboard", metavar="DIR", help="also log to DIR, if tensorboard is installed")
    return parser


def add_training_flags(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("recipe", "The defaults are the recipe of the arch.").add_argument
    add("--epochs", type=number(int, 1), help="passes over the training images")
    add("--batch-size", type=number(int, 2), help="images per optimizer step, of all processes")
    add("--augment", help=f"{', '.join(PRESETS)}, or strengths such as {EXAMPLE}")
    add("--optimizer", choices=OPTIMIZERS, help="muon and sgd have Nesterov momentum 0.9")
    add("--lr", type=number(float, 1e-9), help="learning rate; of onecycle and linear the peak")
    add("--backbone-lr", type=number(float, 0, 1), help="share of --lr for trained layers below the head")
    add("--weight-decay", type=number(float, 0), help="L2 penalty of adam and sgd; decoupled for adamw and muon")
    add("--schedule", choices=SCHEDULES, help="of the learning rate")
    add("--class-weights", choices=CLASS_WEIGHTS, help="weigh rare classes more in the loss")
    add("--logit-adjustment", type=number(float, 0), help="add this * log(class share) in the loss")
    add("--label-smoothing", type=SHARE, help="share of the target spread over all classes")
    add("--mixup", type=number(float, 0), metavar="ALPHA", help="blend pairs of images, such as 0.2; 0 is off")
    add("--ema", type=SHARE, metavar="DECAY", help="average the weights, such as 0.999; 0 is off")

    add = parser.add_argument_group("training").add_argument
    add("--teacher", nargs="+", action="extend", metavar="PATH", help="checkpoints to learn from, too")
    add("--grad-accum", default=1, type=number(int, 1), metavar="N", help="split a batch into N passes: less memory")
    add("--clip-grad", default=0.0, type=number(float, 0), metavar="NORM", help="clip the gradient's norm; 0 is off")
    add("--early-stopping", default=0, type=number(int, 0), metavar="N", help="stop after N epochs without a best")


def parse_settings(argv: list[str] | None) -> tuple[Settings, dict | None]:
    """The settings of the run, and with --resume the checkpoint to go on from.

    The flags are parsed twice: what the first pass finds in --arch supplies the defaults of the second, and what it
    finds in --resume the flags that come before them.
    """
    parser = get_args_parser()
    args = parser.parse_args(argv)
    if args.resume is None:
        arch = get_arch(args.arch)
        pretrained = args.pretrained if args.pretrained is not None else arch.is_backbone and args.weights is None
        from_scratch = arch.is_backbone and not (pretrained or args.weights)
        recipe = get_arch(DEFAULT_ARCH).recipe if from_scratch else arch.recipe
        if args.optimizer not in (None, recipe.optimizer):
            recipe = replace(recipe, optimizer=args.optimizer, lr=OPTIMIZERS[args.optimizer])
        parser.set_defaults(**asdict(recipe), image_size=arch.input_spec.image_size, pretrained=pretrained)
        settings = Settings(**vars(parser.parse_args(argv)))
        settings.check()
        return settings, None
    path = Path(args.resume or os.path.join(args.output_dir, FINAL_NAME))
    checkpoint = resume.read_resumable(path)
    parser.set_defaults(output_dir=str(path.parent), pretrained=False, logit_adjustment=0.0, backbone_lr=1.0)
    names = {field.name for field in fields(Settings)} - {"output_dir", "resume"}
    saved = {name: value for name, value in checkpoint["config"].items() if name in names}
    try:
        Settings(**vars(parser.parse_args(to_flags(saved))))
    except InputError as error:
        raise InputError(f"--resume: {path} is damaged: {error}") from None
    if args.teacher:  # argparse would add them to those of the file
        saved["teacher"] = None
    flags = to_flags(saved) + list(sys.argv[1:] if argv is None else argv)
    settings = replace(Settings(**vars(parser.parse_args(flags))), resume=str(path))
    resume.check_unchanged(settings, checkpoint)
    settings.check_teachers()
    resume.check_folder(settings)
    return settings, checkpoint


def main(argv: list[str] | None = None) -> None:
    settings, resumed = parse_settings(argv)
    group, device = distributed.init(pick_device(settings.device))
    print_main = partial(print, flush=True) if group.is_main else lambda *_: None
    own_folder = own_output_dir if group.is_main else nullcontext
    with own_folder(Path(settings.output_dir)) as output_dir:
        set_up_torch(settings)
        with group.main_first():  # the first process fills the cache of decoded images
            splits = load_data(settings, device)
        fingerprint = resume.fingerprint(splits.split_hash, settings.teacher)
        check_group(settings, splits, fingerprint, group)
        model = make_model(settings, splits, device)
        step = make_step(settings, splits, model, group)
        progress = resume.Progress()
        if resumed:
            progress = resume.restore(resumed, settings.resume, step, fingerprint)
            if group.is_main:
                resume.copy_run(settings.resume, output_dir)
        print_main(describe(settings, splits, step, progress))

        with resume_hint(output_dir, progress, group), tensorboard_log(settings.tensorboard, group) as log:
            for epoch in range(progress.epoch + 1, settings.epochs + 1):
                if progress.is_stalled(settings.early_stopping):
                    break
                start, lr, title = time.perf_counter(), step.lr, f"epoch {epoch}/{settings.epochs}"
                step.seed(settings.seed, epoch)
                order = draw_order(splits.train.labels, settings.sampler, seed=seed_for("order", settings.seed, epoch))
                means = train_one_epoch(step, splits.train, order, batch_size=settings.batch_size, title=title)

                logits, labels = evaluate(step.eval_model, splits.val, batch_size=settings.eval_batch_size, group=group)
                val_loss, val_acc = loss_and_accuracy(logits, labels)
                check_finite(val_loss, title, lr)  # the loss of a batch precedes its update, so the last one shows here
                if settings.schedule == "plateau":  # the other schedules go on with every step
                    step.scheduler.step(val_loss)

                row = {"epoch": epoch, "lr": lr, "train_loss": means["loss"], "train_acc": means["acc"]}
                row |= {"val_loss": val_loss, "val_acc": val_acc, "images_per_s": means["images_per_s"]}
                row |= {"seconds": time.perf_counter() - start}
                is_best = progress.record(row)
                if group.is_main:
                    resume.save(output_dir, step, progress, settings.to_config(), fingerprint, is_best=is_best)
                progress.epoch = epoch
                print_main(format_row(row, title, is_best))
                log(row)

            if group.is_main:  # the report: the best epoch, calibrated on validation, measured once on test
                best = resume.read_best(output_dir, progress)
                model = build_model(best, output_dir / BEST_NAME).to(device, memory_format=memory_format(device))
                temperature = fit_temperature(*evaluate(model, splits.val, batch_size=settings.eval_batch_size))
                model.info = replace(model.info, temperature=temperature)
                split, batches = ("test", splits.test) if splits.test else ("val", splits.val)
                metrics = measure(
                    model, batches, split=split, batch_size=settings.eval_batch_size, in_train=splits.in_train
                )
                finish_run(settings, best, metrics, progress, splits)
    distributed.shutdown()


def set_up_torch(settings: Settings) -> None:
    keep_freed_memory()
    torch.manual_seed(settings.seed)
    # cuDNN tries which convolutions are fastest, since every batch has the same shape; its choice may vary
    torch.backends.cudnn.benchmark = not settings.deterministic
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)  # torch names what it has no such algorithm for


def load_data(settings: Settings, device: torch.device) -> Splits:
    return load_splits(
        settings.data_dir,
        input_spec_for(settings.arch, settings.image_size),
        device,
        val_fraction=settings.val_fraction,
        seed=settings.seed,
        cache_dir=settings.cache_dir,
        strict=settings.strict,
    )


def check_group(settings: Settings, splits: Splits, fingerprint: dict, group: ProcessGroup) -> None:
    """Raises InputError if there is too little for every process, or if they were given different things."""
    if torchrun_ranks() and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and settings.resume is None:
        raise InputError("torchrun's restart would train anew over the last checkpoint; pass --resume, or 0 restarts")
    if min(settings.batch_size, len(splits.train)) < 2 * group.world_size:
        raise InputError(
            f"--batch-size {settings.batch_size} of {len(splits.train)} images to train on is too few for "
            f"{group.world_size} processes: each needs two per step"
        )
    group.check_same((fingerprint, splits.class_names), "images to train on, or teachers")
    group.check_same(without_folders(settings.to_config()), "flags")


def make_model(settings: Settings, splits: Splits, device: torch.device) -> nn.Module:
    """The model to train, with its starting weights; appends a line on --weights to `splits.notes`."""
    model = create_model(
        settings.arch, len(splits.class_names), image_size=settings.image_size, dropout=settings.dropout
    )
    model.info = replace(
        model.info, class_names=splits.class_names, input_spec=splits.spec, trained_on=splits.trained_on
    )
    if settings.resume is None and settings.pretrained:
        load_imagenet_weights(model)
    if settings.resume is None and settings.weights:
        splits.notes.append(load_initial_weights(model, settings.weights))
    if settings.freeze:
        freeze(model, settings.freeze)
    return model.to(device, memory_format=memory_format(device))


def make_step(settings: Settings, splits: Splits, model: nn.Module, group: ProcessGroup) -> TrainStep:
    precision = pick_precision(settings.precision, device_of(model))
    optimizer = make_optimizer(
        settings.optimizer,
        model,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        backbone_lr=1.0 if settings.is_from_scratch else settings.backbone_lr,
        precision=precision,
    )
    total_steps = settings.epochs * len(batch_bounds(len(splits.train), settings.batch_size))
    strengths = parse_augment(settings.augment)
    class_counts = splits.train.class_counts(len(splits.class_names))
    return TrainStep(
        model,
        optimizer,
        partial(augment, spec=splits.spec, strengths=strengths),
        precision=precision,
        scheduler=make_scheduler(settings.schedule, optimizer, total_steps=total_steps),
        class_weights=make_class_weights(settings.class_weights, class_counts),
        logit_adjustment=make_logit_adjustment(settings.logit_adjustment, class_counts),
        label_smoothing=settings.label_smoothing,
        mixup=settings.mixup,
        teachers=[load_teacher(path, model, any_size=strengths.window < 1) for path in settings.teacher or ()],
        grad_accum=settings.grad_accum,
        clip_grad=settings.clip_grad,
        ema=Ema(model, settings.ema) if settings.ema else None,
        group=group,
    )


def describe(settings: Settings, splits: Splits, step: TrainStep, progress: resume.Progress) -> str:
    """What is trained on what, line by line."""
    lines = splits.notes + warn_of_photos(find_splits(settings.data_dir)["train"])
    best_path = Path(settings.output_dir, BEST_NAME)
    if progress.epoch == 0 and best_path.exists():
        lines.append(f"the earlier {printable(best_path)} will be kept as {PREVIOUS_NAME}")
    test = f"{len(splits.test):,} to test" if splits.test else "none to test"
    threads, world_size = torch.get_num_threads(), step.group.world_size
    precision = str(step.precision).removeprefix("torch.")
    lines += [
        f"{len(splits.train):,} images to train, {len(splits.val):,} to validate ({splits.val_source}), {test}",
        f"{len(splits.class_names)} classes: {', '.join(splits.class_names)}",
        f"{settings.arch}: {count_parameters(step.model):,} parameters, {precision} on {step.device}, {threads} CPU "
        f"thread{'s' * (threads > 1)}" + (f", {world_size} processes" if world_size > 1 else ""),
    ]
    if step.teachers:
        lines.append(f"teachers: {', '.join(teacher.info.arch for teacher in step.teachers)}")
    if progress.epoch:
        run = f"seed {settings.seed}, {settings.epochs} epochs"
        is_finished = progress.epoch >= settings.epochs or progress.is_stalled(settings.early_stopping)
        resumed = f"resumed after epoch {progress.epoch} ({run})"
        lines.append(f"this run ({run}) is finished; its reports follow" if is_finished else resumed)
    return "\n".join(lines)


def format_row(row: dict, title: str, is_best: bool) -> str:
    return (
        f"{title}  train loss {row['train_loss']:.4f}, {100 * row['train_acc']:.2f}%"
        f"  val loss {row['val_loss']:.4f}, {100 * row['val_acc']:.2f}%  lr {row['lr']:.2g}"
        f"  {row['images_per_s']:,.0f} img/s  {row['seconds']:.1f} s{'  best' * is_best}"
    )


@contextmanager
def resume_hint(output_dir: Path, progress: resume.Progress, group: ProcessGroup) -> Iterator[None]:
    """On Ctrl-C, prints how to go on with the run."""
    try:
        yield
    except KeyboardInterrupt:
        launch = "python" if group.world_size == 1 else f"torchrun --standalone --nproc-per-node {group.world_size}"
        hint = f'go on with: {launch} train_emotion_cnn.py --resume "{printable(output_dir / FINAL_NAME)}"'
        if progress.epoch == 0:
            hint = "no epoch had ended, so there is nothing to resume"
        if group.is_main:
            with suppress(OSError):  # the terminal may be closed
                print(f"\nstopped; {hint}", file=sys.stderr, flush=True)
        raise


@contextmanager
def tensorboard_log(folder: str | None, group: ProcessGroup) -> Iterator[Callable[[dict], None]]:
    """A function that logs the row of an epoch to the TensorBoard `folder`; without one it does nothing."""
    if folder is None or not group.is_main:
        yield lambda row: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("--tensorboard needs a package that isn't installed: pip install tensorboard") from None

    def log(row: dict) -> None:
        for tag, name in (("Loss", "loss"), ("Accuracy", "acc")):
            for split in ("train", "val"):
                writer.add_scalar(f"{tag}/{split}", row[f"{split}_{name}"], row["epoch"])
        writer.add_scalar("lr", row["lr"], row["epoch"])

    with SummaryWriter(make_output_dir(folder, "--tensorboard")) as writer:
        yield log


def finish_run(settings: Settings, best: dict, metrics: dict, progress: resume.Progress, splits: Splits) -> None:
    """Adds temperature and test metrics to the best checkpoint, writes the report's files and prints the report."""
    output_dir = Path(settings.output_dir)
    val_metrics = {name: value for name, value in best["metrics"].items() if not name.startswith("test_")}
    test_metrics = {f"test_{name}": metrics[name] for name in ("accuracy", "macro_f1", "count") if splits.test}
    best |= {"temperature": metrics["temperature"], "metrics": val_metrics | test_metrics}
    save_checkpoint(best, output_dir / BEST_NAME)
    metrics |= {"epoch": best["epoch"], "val": val_metrics}
    title = f"{best['arch']} on {splits.trained_on}"
    files = reports.write_report(metrics, output_dir, progress.history, title=title)
    if not splits.test:
        print("\nThere is no test/: this report is on validation, which also chose the epoch.")
    print(f"\nBest epoch: {best['epoch']} of {progress.epoch}\n{reports.format_report(metrics)}")
    print(f"In {printable(output_dir.resolve())}: {', '.join((BEST_NAME, FINAL_NAME, *files))}")
    script = Path(__file__).resolve().with_name("predict_emotion.py")
    script = script.name if script.parent == Path.cwd() else script
    images = f'--data-dir "{printable(settings.data_dir)}"' if splits.trained_on == SAMPLE_SET else "photo.jpg"
    print(f'Next: python {printable(script)} {images} --checkpoint "{printable(output_dir / BEST_NAME)}"')


if __name__ == "__main__":
    run_script(main)
