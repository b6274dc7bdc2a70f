"""The checkpoint file: plain dicts of tensors, numbers, strings, lists and dicts, written whole or not at all.

Example::

    checkpoint = read_checkpoint("best_emotion_model.pth")      # a dict; refuses files that carry code
    model = build_model(checkpoint)                             # in evaluation mode
"""

import contextlib
import io
import math
import os
import pickle
import pickletools
import re
import reprlib
import time
import uuid
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from errors import InputError, printable, reason_of
from models import InputSpec, ModelInfo, create_model, input_spec_for

FORMAT_VERSION = 2
# Version 1 kept a scratch network as one nn.Sequential. Its first layers are `features` now, the rest `classifier`.
V1_FEATURES = {"cnn6_bn": 24, "cnn6_rgb": 19, "cnn4_bn": 16, "cnn4": 13, "seresnet13": 11}
PATHS = ("data_dir", "weights", "teacher", "cache_dir", "tensorboard")  # settings that name places on the machine
BEST_NAME, FINAL_NAME = "best_emotion_model.pth", "final_emotion_model.pth"
PREVIOUS_NAME = "best_emotion_model.previous.pth"  # the best checkpoint of an earlier run in the same folder
# What the pickle in a checkpoint may refer to. torch.load allows more, of which some makes any amount of memory of a
# number: bytearray, UntypedStorage, the classes of tensors.
_HARMLESS = re.compile(
    r"torch\.(\w+Storage|b?float\w+|u?int\d+|bool|complex\d+|Size|device)|torch\._utils\._rebuild_(tensor(_v2)?|parameter)"
    r"|torch\.nn\.parameter\.Parameter|collections\.(OrderedDict|Counter)|(__builtin__|builtins)\.set"
)


def _is_text(value) -> bool:
    return isinstance(value, str) and value.isprintable()


def is_number(value) -> bool:
    return (isinstance(value, float) and math.isfinite(value)) or (type(value) is int and abs(value) < 2**53)


def _is_plain(value) -> bool:
    is_list = isinstance(value, list) and all(isinstance(part, str) for part in value)
    return value is None or isinstance(value, bool | str) or is_number(value) or is_list


def is_table(value, is_valid: Callable) -> bool:
    return isinstance(value, dict) and all(map(_is_text, value)) and all(map(is_valid, value.values()))


# What a checkpoint holds next to its weights: the keys of ModelInfo.to_dict, then those of the run. A value that comes
# from a file is checked here, and nowhere else.
_SCHEMA: dict[str, tuple[str, Callable]] = {
    "arch": ("the name of an arch", lambda value: isinstance(value, str) and re.fullmatch(r"\w+", value)),
    "class_names": (
        "a list of 2 to 10,000 different names",
        lambda value: isinstance(value, list) and all(map(_is_text, value)) and 2 <= len({*value}) == len(value) <= 1e4,
    ),
    "num_classes": ("the number of class_names", lambda value: type(value) is int),
    "input_spec": ("an input_spec", lambda value: InputSpec.from_dict(value)),
    "temperature": ("a number from 0.01 to 100", lambda value: isinstance(value, float) and 0.01 <= value <= 100),
    "trained_on": ("text", lambda value: isinstance(value, str)),
    "epoch": ("a number of epochs", lambda value: type(value) is int and 0 <= value < 2**31),
    "metrics": ("a dict of finite numbers", lambda value: is_table(value, is_number)),
    "config": ("a dict of plain values", lambda value: is_table(value, _is_plain)),
}


def make_checkpoint(model: nn.Module, *, epoch: int, metrics: dict, config: dict) -> dict:
    """The checkpoint of `model` (bare, not wrapped) as a dict; `metrics` and `config` must hold plain values.

    engine.resume.save adds what resuming needs, to the final checkpoint alone. On the CPU the tensors are the model's
    own, not copies, so that a file that names them twice stores them once.
    """
    return {
        "format_version": FORMAT_VERSION,
        **model.info.to_dict(),
        "state_dict": {key: value.detach().cpu() for key, value in model.state_dict().items()},
        "epoch": epoch,
        "metrics": metrics,
        "config": config,
    }


def without_folders(config: dict) -> dict:
    """A copy of `config` to share: without folders, and with only the file names of --weights and --teacher."""

    def name_of(path):
        return [name_of(each) for each in path] if isinstance(path, list) else path and Path(str(path)).name

    kept = {name: value for name, value in config.items() if name not in PATHS}
    return kept | {name: name_of(config.get(name)) for name in ("weights", "teacher")}


def replace_file(path: str | Path, write) -> None:
    """Calls `write(temporary_path)` and moves the result onto `path`, which is either as before or whole and new.

    Raises InputError that names `path` if it can't be written; no temporary file is left behind.
    """
    path = Path(path)
    unique = uuid.uuid4().hex[:8]  # containers that share a folder also share the numbers of processes
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{unique}.tmp")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        _replace(temporary, path)
        flush_folder(path.parent)
    except (OSError, RuntimeError) as error:  # some libraries report a failed write as a RuntimeError
        raise InputError(f"can't write {path}: {getattr(error, 'strerror', None) or reason_of(error)}") from None
    finally:
        with contextlib.suppress(OSError):  # gone already, or never made
            temporary.unlink()


def flush_folder(folder: Path) -> None:
    """Makes the names of new files in `folder` outlive a power cut, where the system can."""
    with contextlib.suppress(OSError):  # Windows opens no folders
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _replace(source: Path, target: Path) -> None:
    """os.replace, tried again if Windows refuses because a virus scanner or a reader has `target` open."""
    for seconds in (0.1, 0.5, 2) if os.name == "nt" else ():
        with contextlib.suppress(PermissionError):
            return os.replace(source, target)
        time.sleep(seconds)
    return os.replace(source, target)


def save_checkpoint(checkpoint: dict, path: str | Path) -> None:
    """Writes `checkpoint` atomically; raises InputError if `path` can't be written."""

    content = io.BytesIO()  # torch would report a full disk as a failed assertion
    torch.save(checkpoint, content)
    replace_file(path, lambda temporary: temporary.write_bytes(content.getbuffer()))


def load_file(path: Path):
    """What torch.load makes of `path` without running code; InputError with one line if it refuses.

    What is allocated is bounded by the size of the file.
    """
    try:
        if not path.is_file():
            raise InputError(f"{path} is not a file" if path.exists() else f"no checkpoint at {path}")
        _check_pickles(path)
        with warnings.catch_warnings(action="ignore"):  # about files that are refused right after
            return torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except PermissionError:
        raise InputError(f"no permission to read {path}") from None
    except Exception:  # what torch.load raises on foreign or damaged bytes is not documented, and varies
        raise InputError(f"{path} is no checkpoint: {_what_is_wrong(path)}") from None


def _check_pickles(path: Path) -> None:
    """InputError for an archive that is larger inside than outside, and for a pickle that refers to what it should not.

    Raises anything for damaged files.
    """
    with path.open("rb") as file:
        if file.read(4) == b"PK\3\4":
            reader = torch._C.PyTorchFileReader(str(path))  # torch.load's own: zipfile may see other entries
            names = reader.get_all_records()
            if "constants.pkl" in names:
                raise ValueError("TorchScript")
            if len({name.lower() for name in names}) < len(names):  # the reader does not tell them apart
                raise InputError(f"{path} is refused: it holds a name twice")
            if sum(map(reader.get_record_size, names)) > path.stat().st_size:
                raise InputError(f"{path} is compressed; save it with torch.save, so that its size tells what it takes")
            pickles = [io.BytesIO(reader.get_record("data.pkl"))]
        else:
            file.seek(0)
            pickles = [file] * 5  # of torch before 1.6: a number, a version, the system, the content, names of storages
        for part, stream in enumerate(pickles):
            for operation, value, _ in pickletools.genops(stream):
                if part == 3 and isinstance(value, int) and value > path.stat().st_size:  # elements of a storage
                    raise ValueError("larger than the file")
                name = value.replace(" ", ".") if operation.name == "GLOBAL" else ""
                if name and not _HARMLESS.fullmatch(name):
                    raise InputError(
                        f"{path} is no checkpoint: it refers to {name}, which could run code or fill the memory; only "
                        "tensors and plain values are read"
                    )


def _names_in_zip(path: Path) -> set[str]:
    """The names of the files in a zip archive, without folders; none if it is damaged or something else."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.rpartition("/")[2] for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError):
        return set()


def is_torchscript(path: Path) -> bool:
    return path.is_file() and "constants.pkl" in _names_in_zip(path)


def _what_is_wrong(path: Path) -> str:
    if path.stat().st_size == 0:
        return "the file is empty"
    with path.open("rb") as file:
        head = file.read(9)
    if head.startswith(b"PK"):
        names = _names_in_zip(path)
        if "constants.pkl" in names:
            return "it is a TorchScript file; give it a name that ends in .pt"
        if "data.pkl" in names:
            return "it is damaged"
        return "it is a zip archive of something else" if names else "it is damaged"
    if head[:1] == pickle.PROTO:
        return "it is a bare pickle, which could run code; save a state_dict or a checkpoint with torch.save"
    if re.match(rb"\x08[\x01-\x1f][\x12:]", head):  # the fields that ONNX files begin with
        return "it is an ONNX file; give it a name that ends in .onnx"
    if head[8:] == b"{":  # after the length of its header
        return "it is a safetensors file; give it a name that ends in .safetensors, with its config.json next to it"
    return "it is damaged, cut short or of another kind"


def read_checkpoint(path: str | Path) -> dict:
    """A checkpoint of this project on the CPU, its parts checked for presence and type.

    Raises InputError with one line for anything else, a file that would run code when loaded among them.
    """
    return parse_checkpoint(load_file(Path(path)), path)


def adopt_checkpoint(path: str | Path, arch: str, class_names: list[str]) -> dict:
    """A checkpoint, as read_checkpoint returns it, of another tool's state_dict of `arch`, bare or in a usual layout.

    `class_names` are in the order of its logits; images are preprocessed as for our models of that arch. If its keys
    differ from ours, tensors are taken in order, provided their shapes agree. Raises InputError with one line if the
    file holds no state_dict.
    """
    if not isinstance(class_names, list | tuple) or not all(isinstance(name, str) for name in class_names):
        raise InputError(f"class_names must be a list of names, in the order of the logits, not {class_names!r:.100}")
    loaded = load_file(Path(path))
    if is_checkpoint(loaded):
        raise InputError(f"{path} is a checkpoint of this project, which has its own arch and class names")
    state_dict = find_state_dict(loaded)
    if state_dict is None:
        raise InputError(f"{path} holds no state_dict")
    info = ModelInfo(arch, list(class_names), input_spec_for(arch), trained_on="what another tool had")
    with torch.device("meta"):
        own = create_model(arch, len(class_names)).state_dict()
    weights = {"state_dict": match_keys(state_dict, own), "epoch": 0, "metrics": {}, "config": {}}
    return check_info({"format_version": FORMAT_VERSION, **info.to_dict(), **weights}, path)


def is_checkpoint(loaded) -> bool:
    return isinstance(loaded, dict) and "format_version" in loaded


def parse_checkpoint(loaded, path: str | Path) -> dict:
    """What load_file returned for `path` as a checkpoint in the current format; raises InputError if it is none."""
    if not is_checkpoint(loaded):
        raise InputError(
            f"{path} is not a checkpoint of this project (bare weights go to training, with --weights, "
            "or to load_model, with arch and class_names)"
        )
    check_info(loaded, path)
    if not isinstance(loaded.get("state_dict"), dict):
        raise InputError(f"{path} is damaged: its 'state_dict' is missing or no dict")
    return upgrade(loaded)


def upgrade(checkpoint: dict) -> dict:
    """`checkpoint`, of any version that is read, in the current format."""
    features = V1_FEATURES.get(checkpoint["arch"])
    if checkpoint["format_version"] == FORMAT_VERSION or features is None:
        return checkpoint | {"format_version": FORMAT_VERSION}

    def rename(key):
        found = re.fullmatch(r"(\d{1,3})\.(.+)", key) if isinstance(key, str) else None
        if found is None:
            return key
        layer, rest = int(found[1]), found[2]
        return f"features.{layer}.{rest}" if layer < features else f"classifier.{layer - features}.{rest}"

    def renamed(weights):
        return {rename(key): value for key, value in weights.items()} if isinstance(weights, dict) else weights

    parts = {name: renamed(checkpoint[name]) for name in ("state_dict", "train_state_dict") if name in checkpoint}
    if isinstance(checkpoint.get("ema"), dict):
        parts["ema"] = checkpoint["ema"] | {"state_dict": renamed(checkpoint["ema"].get("state_dict"))}
    return checkpoint | parts | {"format_version": FORMAT_VERSION}


def get_info(checkpoint: dict) -> dict:
    """What an exported file carries next to the weights: all of the checkpoint, without the folders of its config."""
    info = {key: checkpoint[key] for key in ("format_version", *_SCHEMA)}
    return info | {"config": without_folders(info["config"])}


def check_info(checkpoint: dict, path: str | Path) -> dict:
    """`checkpoint`, if all except its weights is present and valid; else raises InputError that names `path`."""
    version = checkpoint.get("format_version")
    if type(version) is not int or version not in (1, FORMAT_VERSION):  # comparing a tensor may raise
        raise InputError(
            f"{path} has checkpoint format {reprlib.repr(version)}, and this version reads 1 and {FORMAT_VERSION}: use "
            "the version of this project that wrote it"
        )
    for key, (kind, is_valid) in _SCHEMA.items():
        try:
            valid = key in checkpoint and is_valid(checkpoint[key])
        except InputError as error:  # of InputSpec
            raise InputError(f"{path} is damaged: {error}") from None
        if not valid:
            raise InputError(f"{path} is damaged: its {key!r} is missing or not {kind}")
    if checkpoint["num_classes"] != len(checkpoint["class_names"]):
        raise InputError(f"{path} is damaged: its 'num_classes' is not {len(checkpoint['class_names'])}")
    return checkpoint


def build_model(checkpoint: dict, path: str | Path = "the checkpoint") -> nn.Module:
    """The model of a checkpoint on the CPU in float32, in evaluation mode, with its `info`.

    Raises InputError that names `path` if arch, weights and shapes don't belong together.
    """
    try:
        info, state_dict = ModelInfo.from_dict(checkpoint), checkpoint["state_dict"]
        with torch.device("meta"):  # without memory: a large model is allocated only if the file is that large itself
            model = create_model(info.arch, checkpoint["num_classes"], image_size=info.input_spec.image_size)
        with warnings.catch_warnings(action="ignore"):  # that nothing is copied yet
            model.load_state_dict(state_dict)
        for key, value in state_dict.items():
            if value.nbytes > value.untyped_storage().nbytes():  # a few numbers expanded to any size
                raise InputError(f"its weights are damaged: {printable(key)} is larger than what is stored of it")
        channels, expected = info.input_spec.channels, model.info.input_spec.channels
        if channels != expected:
            raise InputError(f"its input_spec has {channels} channels, not {expected}")
        dtypes = {key: value.dtype for key, value in model.state_dict().items()}
        weights = {key: value.to(dtypes[key], copy=True) for key, value in state_dict.items()}
        model.load_state_dict(weights, assign=True)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (RuntimeError, AttributeError, TypeError) as error:
        raise InputError(f"{path}: its weights don't fit {checkpoint['arch']}: {reason_of(error, 300)}") from None
    check_weights(weights, path)
    model.info = info
    return model.eval()


def check_weights(state_dict: dict[str, torch.Tensor], path: str | Path) -> None:
    """Raises InputError that names `path` for values that no training leaves."""
    for key, value in state_dict.items():
        if not value.isfinite().all() or (key.endswith("running_var") and (value < 0).any()):
            raise InputError(f"{path} is damaged: {printable(key)} holds NaN, infinite or negative values")


def find_state_dict(loaded) -> dict[str, torch.Tensor] | None:
    """The state_dict in what was loaded, also in the usual layouts of other tools; None if there is none."""
    if not isinstance(loaded, dict):
        return None
    for name in ("model_state_dict", "state_dict", "model"):
        if isinstance(loaded.get(name), dict):
            loaded = loaded[name]
    if not all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in loaded.items()):
        return None
    for prefix in ("module.", "_orig_mod.", "model."):  # DataParallel's, torch.compile's, Lightning's
        if all(key.startswith(prefix) for key in loaded):
            loaded = {key.removeprefix(prefix): value for key, value in loaded.items()}
    return loaded or None


def match_keys(state_dict: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state_dict` under the names of `own`, in order, if it has other names but tensors of the same shapes.

    The last layer's shapes may differ. A state_dict that can't be renamed is returned as it is.
    """
    shapes, expected = ([value.shape for value in weights.values()] for weights in (state_dict, own))
    if state_dict.keys() == own.keys() or len(shapes) != len(expected) or shapes[:-2] != expected[:-2]:
        return state_dict
    return dict(zip(own, state_dict.values(), strict=True))
