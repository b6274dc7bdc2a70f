"""A trained model at work: from a checkpoint to the emotions in images. predict_emotion.py hands this on to users."""

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from checkpoints import BEST_NAME, adopt_checkpoint, build_model, read_checkpoint
from data import SAMPLE_SET
from device import memory_format, one_thread, pick_device
from errors import InputError, printable
from export.formats import ExportedModel, is_exported, read_exported
from faces.align import Face, align_face
from faces.detector import CROP_SIZE, find_faces
from models import InputSpec, device_of
from preprocessing import in_chunks, read_image, read_whole, reduction_of, to_input

BUNDLED = Path(__file__).resolve().parent / "weights" / "emotion_model.pth"
Prediction = tuple[str, float, dict[str, float]]


def find_checkpoint(*, photos: bool = False) -> Path:
    """The best checkpoint in the current folder, else the bundled model.

    For `photos` a best checkpoint that was trained on the sample set of drawings is skipped. Prints on standard error
    which one was found; raises InputError if there is none.
    """
    best, reason = Path(BEST_NAME), ""
    if photos and os.path.isfile(best) and read_checkpoint(best)["trained_on"] == SAMPLE_SET:
        reason = f", since {BEST_NAME} was trained on drawings (to use it, name it with --checkpoint)"
    found = best if os.path.isfile(best) and not reason else BUNDLED
    if not os.path.isfile(found):
        missing = f"no model{reason}" if reason else f"no {BEST_NAME} here"
        raise InputError(f"{missing}: train one with train_emotion_cnn.py, or name one with --checkpoint PATH")
    print(f"using {printable(found)}{reason}", file=sys.stderr)
    return found


def load_model(
    path: str | Path | None = None,
    device: str = "auto",
    *,
    trust: bool = False,
    arch: str | None = None,
    class_names: list[str] | None = None,
) -> tuple[nn.Module, list[str]]:
    """The model of a checkpoint or an exported file, in evaluation mode on `device`, and its class names.

    Without `path`: best_emotion_model.pth in the current folder, unless it was trained on the sample set of drawings,
    else weights/emotion_model.pth. `model.info` is its ModelInfo. TorchScript and torch.export files can carry code,
    and are loaded only with `trust`. For another tool's weights of one of our architectures, pass their `arch`, and
    `class_names` in the order of the logits; images are preprocessed as for ours. Raises InputError (a ValueError).
    """
    model, _ = open_model(path, device, trust=trust, arch=arch, class_names=class_names, photos=True)
    return model, model.info.class_names


def open_model(
    path: str | Path | None = None,
    device: str = "auto",
    *,
    trust: bool = False,
    arch: str | None = None,
    class_names: list[str] | None = None,
    photos: bool = False,
) -> tuple[nn.Module, dict]:
    """As load_model, but returns the model and the whole checkpoint or the exported file's info, a dict.

    `photos` as for find_checkpoint. Prints a note on standard error if the model was trained on drawings.
    """
    if (arch is None) != (class_names is None):
        raise InputError("arch and class_names go together: they tell what another tool's weights are")
    path = find_checkpoint(photos=photos) if path is None else Path(path)
    if is_exported(path):
        if arch is not None:
            raise InputError(f"{path} is an exported file, which has its own arch and class names")
        model, info = read_exported(path, trust=trust)
        if isinstance(model, ExportedModel):
            if device not in ("auto", "cpu"):
                raise InputError(f"--device {device}: {path} runs on the CPU; use the checkpoint for other devices")
            device = "cpu"
    else:
        info = adopt_checkpoint(path, arch, class_names) if arch is not None else read_checkpoint(path)
        model = build_model(info, path)
    target = pick_device(device)
    model = model.to(target, memory_format=memory_format(target))
    if model.info.trained_on == SAMPLE_SET:
        advice = "for photos, train on real faces or pass --checkpoint weights/emotion_model.pth"
        print(f"note: this model was trained on {SAMPLE_SET}; {advice}", file=sys.stderr)
    return model, info


def predict_image(model: nn.Module, image, class_names: list[str] | None = None, *, faces: str = "auto") -> Prediction:
    """(predicted class, its confidence in percent, dict of class name to percent in class order).

    `image` is a path, a PIL image, or a uint8 array in RGB order (H, W, 3) or gray (H, W). With `faces` "auto" an image
    whose longer side is at most the larger of 100 and the model's image_size is taken whole, as a crop; in larger
    images, the largest face is classified, or if none is found, the whole image, with a UserWarning. "on" looks for a
    face in small images too; "off" always takes the whole image. `class_names` defaults to the model's own. Raises
    ValueError that names an image which can't be read.
    """
    return predict_images(model, [image], class_names, faces=faces)[0]


def predict_images(
    model: nn.Module,
    images: Iterable,
    class_names: list[str] | None = None,
    batch_size: int = 64,
    *,
    faces: str = "auto",
) -> list[Prediction]:
    """`predict_image` for many images, in batches; the same three for each, in the order given."""
    if isinstance(images, str | os.PathLike | np.ndarray) or not isinstance(images, Iterable):  # a PIL image is none
        raise InputError("predict_images takes a list of images; for one, call predict_image")
    class_names, spec = _check_classes(model, class_names), model.info.input_spec
    find, faceless = make_finder(spec, faces), []

    def find_one(source) -> Iterator[Found]:
        view, pixels = next(find(source))  # of the largest face
        if pixels is None:
            faceless.append(printable(source) if isinstance(source, str | os.PathLike) else "an image")
            pixels = read_image(source, spec)
        yield view, pixels

    found = list(classify(model, list(images), find_one, batch_size))
    if faceless:
        warnings.warn(f"no face found in {', '.join(faceless[:5])}: {len(faceless)} classified whole", stacklevel=2)
    return [to_prediction(probs, class_names) for _, probs in found]


def predict_faces(
    model: nn.Module, image, class_names: list[str] | None = None, *, min_size: int | None = None
) -> list[dict]:
    """Every face in an image, the largest first; an empty list if there is none.

    Each is {"box": (left, top, width, height) in pixels, "score": the detector's, from 0 to 1, "emotion", "confidence"
    in percent, "probs": class name to percent}. `image` and `class_names` as for predict_image, `min_size` as for
    faces.detector.find_faces. Raises ValueError if the image can't be read.
    """
    class_names = _check_classes(model, class_names)
    found = classify(model, [image], make_finder(model.info.input_spec, "on", min_size))
    faces = [(view, to_prediction(probs, class_names)) for view, probs in found if view.face]
    return [
        {"box": view.box, "score": view.face.score, "emotion": emotion, "confidence": confidence, "probs": all_probs}
        for view, (emotion, confidence, all_probs) in faces
    ]


def crop_largest_face(path: str | Path, min_size: int | None = None) -> np.ndarray:
    """What predictions see of a photo: its largest face, uint8 (S, S, 3), or all of an image of at most 100 pixels.

    `min_size` as for find_faces. Raises InputError if there is no face, or if the file can't be read.
    """
    pixels = read_whole(path)
    if max(pixels.shape[:2]) <= CROP_SIZE:
        return pixels
    found = find_faces(pixels, min_size=min_size)
    if not found:
        raise InputError(f"no face is found in {path}")
    return align_face(pixels, found[0])


def _check_classes(model: nn.Module, class_names: list[str] | None) -> list[str]:
    class_names = model.info.class_names if class_names is None else class_names
    if len(class_names) != model.info.num_classes:
        raise InputError(f"the model has {model.info.num_classes} classes, but class_names has {len(class_names)}")
    return class_names


@torch.inference_mode()
def predict_probs(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """uint8 (N, C, H, W) as `read_image` makes them -> probabilities float32 (N, num_classes) on the CPU."""
    device = device_of(model)
    inputs = to_input(images.to(device), model.info.input_spec).contiguous(memory_format=memory_format(device))
    probs = torch.softmax(model(inputs).float() / model.info.temperature, dim=1).cpu()
    if not probs.isfinite().all():  # of weights so large that sums of them are infinite
        raise InputError("the model's probabilities are NaN: its weights are damaged")
    return probs


def to_prediction(probs: torch.Tensor | None, class_names: list[str]) -> Prediction | None:
    """What predict_image returns, from probs (num_classes,); None if `probs` is None (no face found)."""
    if probs is None:
        return None
    all_probs = {name: 100 * value for name, value in zip(class_names, probs.tolist(), strict=True)}
    best = max(all_probs, key=all_probs.get)
    return best, all_probs[best], all_probs


# What is classified in an image: the whole of it, or its faces


@dataclass(frozen=True)
class View:
    """The part of `source` to classify. `kind` is "face" (number 1 is the largest face), "whole" (the whole image),
    "crop" (the whole image, because it is small) or "none" (no face found). `time`, in seconds, is a video frame's.
    """

    source: object
    kind: str = "whole"
    number: int = 0
    face: Face | None = None
    time: float | None = None
    reduction: int = 1  # the face is where it was found, in a large JPEG that was decoded at a half or a quarter

    @property
    def box(self) -> tuple[int, int, int, int]:
        """(left, top, width, height) of the face in pixels of the file."""
        return tuple(self.reduction * edge for edge in self.face.box)


Found = tuple[View, np.ndarray | None]  # with its pixels; None: no face was found
Classified = tuple[View, torch.Tensor | None]  # with probs (num_classes,); None as above
Finder = Callable[[object], Iterator[Found]]
OnError = Callable[[object, str], None]  # gets a source that can't be read, and a message that names it


def make_finder(spec: InputSpec, faces: str = "off", min_size: int | None = None, *, turns: bool = True) -> Finder:
    """A function from an image to its views, each with pixels uint8 (C, H, W) as read_image makes them.

    faces "off" takes the whole image, "on" every face in it, "auto" every face, except that it takes the whole of
    images whose longer side is at most the larger of 100 pixels and spec.image_size: they are crops already. An image
    without a face is one view without pixels. `min_size` and `turns` as for find_faces.
    """
    if faces not in ("auto", "on", "off"):
        raise InputError(f'faces must be "auto", "on" or "off", not {faces!r}')

    def find(source) -> Iterator[Found]:
        if faces == "off":
            yield View(source), read_image(source, spec)
            return
        pixels = read_whole(source)
        if faces == "auto" and max(pixels.shape[:2]) <= max(CROP_SIZE, spec.image_size):
            yield View(source, "crop"), read_image(pixels, spec)
            return
        found = find_faces(pixels, min_size=min_size, turns=turns)
        reduction = reduction_of(source) if found else 1
        for number, face in enumerate(found, 1):
            view = View(source, "face", number, face, reduction=reduction)
            yield view, read_image(align_face(pixels, face), spec)
        if not found:
            yield View(source, "none"), None

    return find


def _find_all(sources: list, find: Finder) -> tuple[list[Found], list[tuple[object, str]]]:
    """The views of all that can be read, and (source, message) of the rest."""
    views, unreadable = [], []
    for source in sources:
        try:
            views += list(find(source))
        except InputError as error:
            unreadable.append((source, str(error)))
    return views, unreadable


def classify_batch(model: nn.Module, views: list[Found]) -> list[Classified]:
    """(view, probs (num_classes,)) of each; None instead of probs if the view has no pixels."""
    pixels = [pixels for _, pixels in views if pixels is not None]
    probs = iter(predict_probs(model, torch.from_numpy(np.stack(pixels)))) if pixels else None
    return [(view, None if pixels is None else next(probs)) for view, pixels in views]


def classify(
    model: nn.Module, sources: list, find: Finder, batch_size: int = 64, on_error: OnError | None = None
) -> Iterator[Classified]:
    """Yields (view, probs (num_classes,)) in order, None instead of probs for an image without a face.

    Faces of several images share a batch, and the next batch is decoded and searched while the model works. An image
    that can't be read goes to `on_error(source, message)` and is left out; without `on_error`, InputError is raised.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, not {batch_size}")
    waiting = []
    for _, (views, unreadable) in in_chunks(sources, lambda part: _find_all(part, find), 8, ahead=2 * batch_size):
        for source, message in unreadable:
            if on_error is None:
                raise InputError(message)
            on_error(source, message)
        waiting += views
        while len(waiting) >= batch_size:
            yield from classify_batch(model, waiting[:batch_size])
            del waiting[:batch_size]
    yield from classify_batch(model, waiting)


def classify_on_cores(
    model: nn.Module, sources: list, find: Finder, batch_size: int, on_error: OnError
) -> Iterator[Classified]:
    """As `classify`; for scripts, since it sets torch's threads.

    On the CPU every core takes a share of the batch and works it through on its own, decoding included: with a small
    model cores that share one batch wait for each other, and for whichever of them decodes.
    """
    if len(sources) == 1 or device_of(model).type != "cpu":
        yield from classify(model, sources, find, batch_size, on_error)
        return

    def work(chunk: list) -> tuple[list[Classified], list[tuple[object, str]]]:
        views, unreadable = _find_all(chunk, find)
        parts = [views[start : start + batch_size] for start in range(0, len(views), batch_size)]  # of many faces
        return [result for part in parts for result in classify_batch(model, part)], unreadable

    with one_thread() as threads:
        size = max(1, min(batch_size // threads, len(sources) // (4 * threads)))  # or one core works, the others wait
        for _, (results, unreadable) in in_chunks(sources, work, size, workers=threads):
            for source, message in unreadable:
                on_error(source, message)
            yield from results
