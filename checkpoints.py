"""The checkpoint file: plain dicts of tensors, numbers, strings, lists and dicts, written whole or not at all.

checkpoint = read_checkpoint("best_emotion_model.pth")      # a dict; refuses files that carry code
model = build_model(checkpoint)                             # the network, in evaluation mode
"""

import contextlib
import math
import os
import pickle
import re
import time
import warnings
import zipfile
from pathlib import Path

import torch
from torch import nn

from engine.pretrained import load_backbone
from errors import InputError, printable
from models import InputSpec, create_model, head_prefix, input_spec_for

FORMAT_VERSION = 1
MAX_CLASSES = 10_000
MAX_INFLATION = 10  # of a compressed file; float32 weights hardly shrink
PATHS = ("data_dir", "weights", "teacher", "cache_dir", "tensorboard")  # settings that name places on the machine
BEST_NAME, FINAL_NAME = "best_emotion_model.pth", "final_emotion_model.pth"
_TYPES = {
    "arch": str,
    "num_classes": int,
    "class_names": list,
    "input_spec": dict,
    "temperature": float,
    "trained_on": str,
    "epoch": int,
    "metrics": dict,
    "config": dict,
}


def make_checkpoint(
    model: nn.Module, class_names: list[str], *, trained_on: str, epoch: int, metrics: dict, config: dict
) -> dict:
    """What a checkpoint of `model` (plain, not wrapped) holds; `metrics` and `config` must be plain values.

    On the CPU the tensors are the network's own, not copies, so that a file which names them twice holds them once.
    """
    return {
        "format_version": FORMAT_VERSION,
        "arch": model.arch,
        "num_classes": model.num_classes,
        "class_names": list(class_names),
        "input_spec": model.input_spec.to_dict(),
        "temperature": 1.0,
        "trained_on": trained_on,
        "state_dict": {key: value.detach().cpu() for key, value in model.state_dict().items()},
        "epoch": epoch,
        "metrics": metrics,
        "config": config,
    }


def to_deployed(config: dict) -> dict:
    """What the checkpoint that deploys keeps of `config`: no folder; of --weights and --teacher the files' names."""
    kept = {name: value for name, value in config.items() if name not in PATHS}
    teachers = config.get("teacher")
    teachers = [Path(str(path)).name for path in teachers] if isinstance(teachers, list) else None
    return kept | {"weights": config.get("weights") and Path(str(config["weights"])).name, "teacher": teachers}


def replace_file(path: str | Path, write) -> None:
    """Calls `write(temporary_path)` and moves the result onto `path`, which is either as before or whole and new.

    Raises InputError that names `path` where it can't be written; no temporary file is left behind.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        _replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise InputError(f"can't write {path}: {reason}") from None
    finally:
        with contextlib.suppress(OSError):  # gone already, or never made
            temporary.unlink()


def _replace(source: Path, target: Path) -> None:
    """os.replace, tried again where Windows refuses because a virus scanner or a reader has `target` open."""
    for seconds in (0.1, 0.5, 2) if os.name == "nt" else ():
        try:
            return os.replace(source, target)
        except PermissionError:
            time.sleep(seconds)
    return os.replace(source, target)


def save_checkpoint(checkpoint: dict, path: str | Path) -> None:
    """Writes `checkpoint` atomically; raises InputError where `path` can't be written."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # given a path, torch writes its name into the file
            torch.save(checkpoint, file)

    replace_file(path, write)


def _read(path: Path):
    """What torch.load makes of `path` without running code; InputError with one line where it refuses."""
    try:
        if not path.exists():
            raise InputError(f"no checkpoint at {path}")
        if not path.is_file():
            raise InputError(f"{path} is not a file")
        if _unpacked_size(path) > MAX_INFLATION * path.stat().st_size:  # torch reads compressed archives too
            raise InputError(
                f"{path} would unpack to over {MAX_INFLATION} times its size, so it is not read; save it "
                "with torch.save, which does not compress"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about files that are refused right after
            return torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except PermissionError:
        raise InputError(f"no permission to read {path}") from None
    except Exception:  # what torch.load raises on foreign or damaged bytes is not documented, and varies
        raise InputError(f"{path} is no checkpoint: {_what_is_wrong(path)}") from None


def _names_in_zip(path: Path) -> set[str]:
    """The names of the files in a zip archive, without folders; none where it is damaged or something else."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.rpartition("/")[2] for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError):
        return set()


def _unpacked_size(path: Path) -> int:
    """Bytes that the entries of a zip archive hold, to the reader that torch.load has; 0 for what it refuses too."""
    try:
        reader = torch._C.PyTorchFileReader(str(path))  # zipfile may see other entries than this one does
        return sum(reader.get_record_size(name) for name in reader.get_all_records())
    except (RuntimeError, AttributeError):  # the latter where a version of torch does not tell sizes
        return 0


def is_torchscript(path: Path) -> bool:
    return path.is_file() and "constants.pkl" in _names_in_zip(path)


def _what_is_wrong(path: Path) -> str:
    if path.stat().st_size == 0:
        return "the file is empty"
    with path.open("rb") as file:
        head = file.read(9)
    if head.startswith(b"PK"):
        names = _names_in_zip(path)
        if is_torchscript(path):
            return "it is a TorchScript file; give it a name that ends in .pt"
        if "data.pkl" in names:
            return "it is damaged, or holds Python objects other than tensors and plain values, which could run code"
        return "it is a zip archive of something else" if names else "it is damaged"
    if head[:1] == pickle.PROTO:
        return "it is a bare pickle, which could run code; save a state_dict or a checkpoint with torch.save"
    if re.match(rb"\x08[\x01-\x1f][\x12:]", head):  # the fields that ONNX files begin with
        return "it is an ONNX file; give it a name that ends in .onnx"
    if head[8:] == b"{":  # after the length of its header
        return "it is a safetensors file; give it a name that ends in .safetensors, with its config.json beside it"
    return "it is damaged, cut short or of another kind"


def read_checkpoint(path: str | Path) -> dict:
    """A checkpoint of this project on the CPU, its parts checked for presence and type.

    Raises InputError with one line for anything else, a file that would run code when loaded among them.
    """
    return _check(_read(Path(path)), path)


def adopt_checkpoint(path: str | Path, arch: str, class_names: list[str]) -> dict:
    """A checkpoint made of another tool's state_dict of `arch`, bare or in a usual layout, as read_checkpoint's.

    `class_names` are in the order of its logits; pictures are prepared as for our networks of that arch. Where its
    keys are others than ours, tensors are taken in order, if their shapes agree. Raises InputError with one line where
    there is no state_dict in it.
    """
    if not isinstance(class_names, list | tuple) or not all(isinstance(name, str) for name in class_names):
        raise InputError(f"class_names must be a list of names, in the order of the logits, not {class_names!r:.100}")
    loaded = _read(Path(path))
    if isinstance(loaded, dict) and "format_version" in loaded:
        raise InputError(f"{path} is a checkpoint of this project, which has its own arch and class names")
    state_dict = _unwrap(loaded)
    if state_dict is None:
        raise InputError(f"{path} holds no state_dict")
    spec = input_spec_for(arch).to_dict()
    with torch.device("meta"):
        own = create_model(arch, len(class_names)).state_dict()
    checkpoint = {
        "format_version": FORMAT_VERSION,
        "arch": arch,
        "num_classes": len(class_names),
        "metrics": {},
        "class_names": list(class_names),
        "input_spec": spec,
        "temperature": 1.0,
        "config": {},
        "epoch": 0,
        "trained_on": "what another tool had",
        "state_dict": _rename(state_dict, own),
    }
    return check_info(checkpoint, path)


def _check(checkpoint, path: str | Path) -> dict:
    if not isinstance(checkpoint, dict) or "format_version" not in checkpoint:
        raise InputError(
            f"{path} is not a checkpoint of this project (bare weights go to training, with --weights, "
            "or to load_model, with arch and class_names)"
        )
    check_info(checkpoint, path)
    if not isinstance(checkpoint.get("state_dict"), dict):
        raise InputError(f"{path} is damaged: its 'state_dict' is missing or no dict")
    return checkpoint


def get_info(checkpoint: dict) -> dict:
    """What an exported file says of the network: all of a checkpoint that deploys, but the weights."""
    info = {key: checkpoint[key] for key in ("format_version", *_TYPES)}
    return info | {"config": to_deployed(info["config"])}


def check_info(checkpoint: dict, path: str | Path) -> dict:
    """`checkpoint` where what it says of its network is whole; raises InputError that names `path` where it isn't."""
    if checkpoint.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{path} has checkpoint format {checkpoint.get('format_version')!r}, and this version reads "
            f"{FORMAT_VERSION}: use the version of this project that wrote it"
        )
    for key, kind in _TYPES.items():
        if not isinstance(checkpoint.get(key), kind):
            raise InputError(f"{path} is damaged: its {key!r} is missing or no {kind.__name__}")
    if not re.fullmatch(r"\w+", checkpoint["arch"]):  # whether there is such a network shows when it is built
        raise InputError(f"{path} is of the unknown arch {checkpoint['arch']!r}")
    if not 0 < checkpoint["temperature"] < math.inf:
        raise InputError(f"{path} is damaged: its temperature is {checkpoint['temperature']}")
    if not all(
        isinstance(value, float) or type(value) is int and abs(value) < 2**53
        for value in checkpoint["metrics"].values()
    ):
        raise InputError(f"{path} is damaged: its metrics are not all numbers")
    if not all(isinstance(key, str) and key.isprintable() for key in (*checkpoint["metrics"], *checkpoint["config"])):
        raise InputError(f"{path} is damaged: its metrics and config are not all named by printable text")
    names = checkpoint["class_names"]
    if len(names) > MAX_CLASSES:
        raise InputError(f"{path} has {len(names):,} classes, more than the {MAX_CLASSES:,} that are allowed")
    if not all(isinstance(name, str) and name.isprintable() for name in names):
        raise InputError(f"{path} is damaged: its class_names are not all printable text")
    if len(set(names)) != checkpoint["num_classes"] or len(names) != checkpoint["num_classes"]:
        found = f"{len(names)} names, {len(set(names))} of them different"
        raise InputError(f"{path} is damaged: {checkpoint['num_classes']} classes, but {found}")
    return checkpoint


def _fit(checkpoint: dict, spec: InputSpec) -> nn.Module:
    """The network without memory, after a look whether the file holds its weights; RuntimeError where it doesn't.

    The sizes that a file asks for are thus allocated only where it is that large itself.
    """
    with torch.device("meta"):
        model = create_model(checkpoint["arch"], checkpoint["num_classes"], image_size=spec.image_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing is copied yet
        model.load_state_dict(checkpoint["state_dict"])
    for key, value in checkpoint["state_dict"].items():
        if value.is_meta or value.nbytes > value.untyped_storage().nbytes():  # a few numbers stretched to any size
            raise InputError(f"its weights are damaged: {printable(key)} is larger than what is stored of it")
    return model


def build_model(checkpoint: dict, path: str | Path = "the checkpoint") -> nn.Module:
    """The network of a checkpoint on the CPU, in evaluation mode, with `class_names`, `temperature`, `trained_on`.

    Raises InputError where arch, weights and shapes don't belong together; `path` is named in it.
    """
    try:
        spec = InputSpec.from_dict(checkpoint["input_spec"])
        model = _fit(checkpoint, spec)
        if spec.channels != model.input_spec.channels:
            raise InputError(f"its input_spec has {spec.channels} channels, not {model.input_spec.channels}")
        kinds = {key: value.dtype for key, value in model.state_dict().items()}
        weights = {key: value.to(kinds[key], copy=True) for key, value in checkpoint["state_dict"].items()}
        model.load_state_dict(weights, assign=True)
        for key, value in model.state_dict().items():
            if not value.isfinite().all():
                raise InputError(f"its weights are damaged: {printable(key)} holds values that are no finite numbers")
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{path}: its weights don't fit {checkpoint['arch']}: {reason}") from None
    model.input_spec = spec
    for key in ("class_names", "temperature", "trained_on"):
        setattr(model, key, checkpoint[key])
    return model.eval()


def load_initial_weights(model: nn.Module, path: str | Path, class_names: list[str] | None = None) -> str:
    """Starts `model` from one of our checkpoints of the same arch, or from a state_dict such as torchvision's.

    A state_dict may also stand in a dict under the names that other tools give it, its keys behind "module."; where the
    keys are others than those of our scratch network, tensors are taken in order, if their shapes agree.

    A last layer of another size, or made for other classes than `class_names`, is left as it is. Returns one line
    that says what was loaded; raises InputError where the file is of another arch or does not fit.
    """
    loaded = _read(Path(path))
    if isinstance(loaded, dict) and "format_version" in loaded:
        checkpoint = _check(loaded, path)
        if checkpoint["arch"] != model.arch:
            raise InputError(f"--weights {path} is of arch {checkpoint['arch']}, but --arch is {model.arch}")
        is_other = class_names is not None and checkpoint["class_names"] != class_names
        return _load_matching(model, checkpoint["state_dict"], path, keep_last=not is_other)
    loaded = _unwrap(loaded)
    if loaded is None:
        raise InputError(f"--weights {path} holds neither a checkpoint nor a state_dict")
    if head_prefix(model.arch):
        own_head = {key for key in model.state_dict() if key.startswith(head_prefix(model.arch))}
        if not own_head <= set(loaded):  # torchvision's file, whose head is of another make
            try:
                load_backbone(model, loaded)
            except InputError as error:
                raise InputError(f"--weights {path}: {error}") from None
            return f"{path}: backbone loaded, the head starts anew"
    return _load_matching(model, loaded, path)


def _unwrap(loaded) -> dict[str, torch.Tensor] | None:
    """The state_dict in what was loaded, also in the usual layouts of other tools; None where there is none."""
    for name in ("model_state_dict", "state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(name), dict):
            loaded = loaded[name]
    if not isinstance(loaded, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in loaded.items()
    ):
        return None
    for prefix in ("module.", "_orig_mod.", "model."):  # DataParallel's, torch.compile's, Lightning's
        if loaded and all(key.startswith(prefix) for key in loaded):
            loaded = {key.removeprefix(prefix): value for key, value in loaded.items()}
    return loaded or None


def _rename(state_dict: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state_dict` under the names of `own`, in order, where it has others and shapes agree, but for the last layer."""
    shapes, expected = ([value.shape for value in weights.values()] for weights in (state_dict, own))
    if state_dict.keys() == own.keys() or len(shapes) != len(expected) or shapes[:-2] != expected[:-2]:
        return state_dict
    return dict(zip(own, state_dict.values(), strict=True))


def _load_matching(
    model: nn.Module, state_dict: dict[str, torch.Tensor], path: str | Path, *, keep_last: bool = True
) -> str:
    """Loads all of `state_dict`; the last layer is left as it is where the file's is another, by size or by meaning."""
    own, theirs = model.state_dict(), state_dict
    last = list(own)[-1].rpartition(".")[0]  # the layer that makes logits stands last in every network here
    replaced = {key: own[key] for key in own if key.startswith(last + ".")}
    try:
        state_dict = _rename(theirs, own)
        if keep_last:
            replaced = {key: value for key, value in replaced.items() if value.shape != state_dict[key].shape}
        model.load_state_dict({**state_dict, **replaced})
        if not all(value.isfinite().all() for value in model.state_dict().values()):
            raise InputError(f"--weights {path} is damaged: it holds values that are no finite numbers")
    except (RuntimeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"--weights {path} doesn't fit --arch {model.arch}: {reason}") from None
    how = "" if state_dict is theirs else ", in order, since their names are others"
    if replaced:
        there, here = (list(weights[last + ".weight"].shape) for weights in (state_dict, own))
        how = f" but the last layer's{how}: other classes or size, {there} there and {here} here"
    return f"{path}: all weights loaded{how}"
