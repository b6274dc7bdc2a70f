"""Models in files that other programs read: written, compared with PyTorch, and read back like checkpoints.

    write_onnx(deployed, info, Path("emotion_model.onnx"))      # uint8 images in, probabilities out
    model, info = read_exported("emotion_model.onnx")           # used like the model of a checkpoint

`info` is the checkpoint without its weights: classes, InputSpec, arch, what it was trained on and how.
"""

import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from checkpoints import build_model, check_info, is_torchscript, upgrade
from data import FolderImages
from errors import InputError, reason_of
from models import ModelInfo
from preprocessing import to_input, to_uint8

INFO_NAME = "emotion.json"  # of the entry in TorchScript and torch.export files; in ONNX the key of the metadata
CONFIG_NAME = "config.json"  # next to a safetensors file
NEED_TRUST = (".pt", ".pt2", ".onnx")
TOLERANCE = 1e-4  # largest difference in probability from PyTorch, in float32


class Deployed(nn.Module):
    """uint8 (N, C, S, S), 0-255 -> probabilities float32 (N, num_classes): what an exported file computes.

    C and S are `input_spec.stored_channels` and `.image_size`; decoding and resizing stay outside.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.info = model, model.info

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.model(to_input(images, self.info.input_spec)) / self.info.temperature, dim=1)

    def example(self, count: int = 2) -> torch.Tensor:
        """`count` images of seeded noise."""
        spec, generator = self.info.input_spec, torch.Generator().manual_seed(0)
        shape = (count, spec.stored_channels, spec.image_size, spec.image_size)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def images_at(data: FolderImages, rows: np.ndarray) -> torch.Tensor:
    """These images of `data` as uint8 (N, stored_channels, S, S); gray folders are cached with one channel."""
    images = torch.from_numpy(np.array(data.images[rows]))
    return images.expand(-1, data.spec.stored_channels, -1, -1).contiguous()


def sample_images(data: FolderImages, count: int) -> torch.Tensor:
    """`count` images of `data`, drawn with a fixed seed, or all of them if there are fewer."""
    return images_at(data, np.sort(np.random.default_rng(0).permutation(len(data))[:count]))


# Writing: each takes (Deployed on the CPU, info, path)


def write_onnx(deployed: Deployed, info: dict, path: Path) -> None:
    """One file with the weights inside, for any batch size, by the exporter that is based on torch.export."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the exporter's own code
        program = torch.onnx.export(
            deployed,
            (deployed.example(),),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["probs"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        )
    program.model.metadata_props[INFO_NAME] = json.dumps(info)
    path.write_bytes(program.model_proto.SerializeToString())


def write_torchscript(deployed: Deployed, info: dict, path: Path) -> None:
    """PyTorch deprecates TorchScript; it is here for programs that read nothing else (S1 exports it)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(deployed, deployed.example(), check_trace=False)
        content = io.BytesIO()  # writing to a full disk, torch ends the process
        torch.jit.save(traced, content, _extra_files={INFO_NAME: json.dumps(info)})
    path.write_bytes(content.getbuffer())


def write_torch_export(deployed: Deployed, info: dict, path: Path) -> None:
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    program, content = torch.export.export(deployed, (deployed.example(),), dynamic_shapes=shapes), io.BytesIO()
    torch.export.save(program, content, extra_files={INFO_NAME: json.dumps(info)})
    path.write_bytes(content.getbuffer())


def write_safetensors(deployed: Deployed, info: dict, path: Path) -> None:
    """The weights alone, with `info` as config.json next to them: for exchange, not a program."""
    from safetensors.torch import save

    path.write_bytes(save({key: value.contiguous() for key, value in deployed.model.state_dict().items()}))
    path.with_name(CONFIG_NAME).write_text(json.dumps(info, indent=2), encoding="utf-8")


FORMATS = {  # name: (file, packages it needs next to torch, its function)
    "onnx": ("emotion_model.onnx", ("onnx", "onnxscript", "onnxruntime"), write_onnx),
    "torchscript": ("emotion_model.pt", (), write_torchscript),
    "torch_export": ("emotion_model.pt2", (), write_torch_export),
    "safetensors": ("emotion_model.safetensors", ("safetensors",), write_safetensors),
}


def missing_packages(name: str) -> list[str]:
    """The packages that the format needs and that aren't installed."""
    return [package for package in FORMATS[name][1] if importlib.util.find_spec(package) is None]


def export_model(
    name: str, deployed: Deployed, info: dict, images: torch.Tensor, folder: Path
) -> tuple[list[Path], float]:
    """Writes one format into `folder` and compares it with `deployed` on `images`, in batches and on the first alone.

    Returns its files and the largest difference in probability. Raises InputError if the file can't be written, or if
    the difference is larger than TOLERANCE.
    """
    file, _, write = FORMATS[name]
    path = folder / file
    try:
        write(deployed, info, path)
    except Exception as error:  # exporters raise anything
        reason = getattr(error, "strerror", None) or reason_of(error)
        raise InputError(f"{file} can't be written: {reason}") from None
    model, _ = read_exported(path, trust=True)
    predict = model.probs if isinstance(model, ExportedModel) else Deployed(model)
    with torch.inference_mode():
        gaps = [(deployed(batch) - predict(batch)).abs().max() for batch in (images[:1], *images.split(64))]
    gap = torch.stack(gaps).max().item()
    if not gap <= TOLERANCE:
        raise InputError(f"{file} gives other probabilities than PyTorch, by up to {gap:.1g}; it was not kept")
    return [path, path.with_name(CONFIG_NAME)] if name == "safetensors" else [path], gap


# Reading


class ExportedModel(nn.Module):
    """An exported file that is called as its model was: normalized float32 images -> logits, up to a constant per row.

    The file takes uint8 images and returns probabilities, so the normalization is undone before it is called, and the
    softmax and the temperature after. Runs on the CPU.
    """

    def __init__(self, run: Callable[[torch.Tensor], torch.Tensor], info: ModelInfo):
        super().__init__()
        self._run, self.info = run, info

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.info.temperature * self.probs(to_uint8(inputs, self.info.input_spec)).clamp_min(1e-30).log()

    def probs(self, images: torch.Tensor) -> torch.Tensor:
        """What the file computes: uint8 (N, C, S, S) -> probabilities float32 (N, num_classes)."""
        return self._run(images.contiguous())


def is_exported(path: str | Path) -> bool:
    """Whether `path` is an exported file, by its suffix; a .pt file may be a checkpoint, so its content decides."""
    return Path(path).suffix in (".onnx", ".pt2", ".safetensors") or (
        Path(path).suffix == ".pt" and is_torchscript(Path(path))
    )


def read_exported(path: str | Path, *, trust: bool = False) -> tuple[nn.Module, dict]:
    """The model in an exported file, on the CPU and in evaluation mode, and its info in the current format.

    An ExportedModel, or of a safetensors file the model itself. Raises InputError for a file that is damaged or not
    ours, needs a package that is missing, or could run code or fill the memory and is not trusted.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no file {path}" if not path.exists() else f"{path} is not a file")
    if path.suffix in NEED_TRUST and not trust:
        raise InputError(
            f"{path} can run code or fill the memory when it is loaded: use the .pth file, or if it is from someone "
            "you trust, pass --trust to predict_emotion.py or evaluate_emotion.py (trust=True in Python)"
        )
    read = {".onnx": _read_onnx, ".pt": _read_torchscript, ".pt2": _read_torch_export, ".safetensors": _read_tensors}
    try:
        content, text = read[path.suffix](path)  # a function or a state_dict, and JSON
        info = json.loads(text or "null")
        if not isinstance(info, dict):
            raise InputError(f"{path} was not made by export_emotion.py: it holds no class names")
        check_info(info, path)
        if isinstance(content, dict):
            checkpoint = upgrade({**info, "state_dict": content})
            return build_model(checkpoint, path), checkpoint
        model = ExportedModel(content, ModelInfo.from_dict(info)).eval()
        _try_out(model, path)
        return model, upgrade(info)
    except InputError:
        raise
    except ImportError as error:
        raise InputError(f"{path} needs a package that isn't there: pip install {error.name or error}") from None
    except Exception as error:  # what these readers raise on foreign or damaged bytes is not documented, and varies
        raise InputError(f"{path} can't be read as {path.suffix}: {reason_of(error)}") from None


@torch.inference_mode()
def _try_out(model: ExportedModel, path: Path) -> None:
    """InputError if one black image, or two, don't give the probabilities of as many."""
    spec = model.info.input_spec
    for count in (1, 2):
        shape = (count, spec.stored_channels, spec.image_size, spec.image_size)
        probs = model.probs(torch.zeros(shape, dtype=torch.uint8))
        if probs.shape != (count, model.info.num_classes) or not probs.isfinite().all():
            raise InputError(f"{path} is damaged: it gives no probabilities of {model.info.num_classes} classes")


def _read_onnx(path: Path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    text = session.get_modelmeta().custom_metadata_map.get(INFO_NAME)
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), text


def _read_torchscript(path: Path):
    files = {INFO_NAME: ""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.jit.load(str(path), map_location="cpu", _extra_files=files)
    return lambda images: program(images), files[INFO_NAME]


def _read_torch_export(path: Path):
    files = {INFO_NAME: ""}
    logging.disable(logging.WARNING)  # it prints tracebacks of what is one line here
    try:
        program = torch.export.load(str(path), extra_files=files)
    finally:
        logging.disable(logging.NOTSET)
    module = program.module()
    return lambda images: module(images), files[INFO_NAME]


def _read_tensors(path: Path):
    from safetensors.torch import load_file

    config = path.with_name(CONFIG_NAME)
    if not config.is_file():
        raise InputError(f"no {config}: it belongs next to {path.name} and holds the class names")
    return load_file(str(path)), config.read_text(encoding="utf-8")
