"""Image file -> uint8 pixels -> model input: the one path that training, prediction and export share.

Example::

    image = read_image("photo.jpg", InputSpec())                    # uint8 (C, H, W)
    inputs = to_input(torch.from_numpy(image)[None], InputSpec())   # float32 (1, C, H, W), normalized
"""

import contextlib
import io
import math
import os
import stat
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps

from errors import InputError, printable
from models import InputSpec

READABLE = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "AVIF", "TIFF", "PPM")  # of Pillow's others some start programs
MAX_BYTES = 512 * 2**20
MAX_PIXELS, MAX_SIDE = 40_000_000, 20_000  # larger images are refused, or, of JPEG, decoded at a reduced scale
_GRAY_MODES = {"1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N"}
_SMALL_FILE = 5_000  # bytes; measured: two threads decode smaller files slower than one


def read_image(source, spec: InputSpec) -> np.ndarray:
    """An image as uint8 (C, H, W), 0-255, resized to `spec`; C is `spec.stored_channels`.

    `source` is a path, a PIL image, or a uint8 array (H, W, 3) in RGB order or (H, W). EXIF rotation is applied,
    transparency becomes white, 16 bits are reduced to 8, an animation counts as its first frame. Raises
    InputError (a ValueError) with the file's name for whatever can't be decoded in full.
    """
    with _named_errors(source):
        return _to_pixels(_open(source), spec, spec.stored_channels)


def read_whole(source) -> np.ndarray:
    """An image at its own size as uint8 (H, W, 3) in RGB order; `source` and errors are those of read_image."""
    with _named_errors(source):
        if isinstance(source, np.ndarray) and source.ndim == 3:
            return _check_array(source)
        return np.asarray(_to_upright(_open(source), channels=3))


@contextlib.contextmanager
def _named_errors(source):
    """Makes an InputError of whatever goes wrong, with the name of `source` if it is a file."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:  # decoders raise anything from SyntaxError to struct.error on damaged files
        name = printable(source) if isinstance(source, str | os.PathLike) else "the image"
        raise InputError(f"can't read {name}: {_reason_of(error)}") from None


def _reason_of(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)  # without the number and the name again
    return printable(text).split(" <", 1)[0] or type(error).__name__


def _open(source) -> Image.Image:
    if isinstance(source, Image.Image):
        if 0 in source.size:
            raise ValueError("it has no pixels")
        return source
    if isinstance(source, np.ndarray):
        return Image.fromarray(_check_array(source))
    if not isinstance(source, str | os.PathLike):
        raise ValueError(f"it is {type(source).__name__}, where a path, a PIL image or a uint8 array was expected")
    info = os.stat(source)
    if not stat.S_ISREG(info.st_mode):
        raise ValueError("it is not a regular file")
    if info.st_size == 0:
        raise ValueError("the file is empty")
    if info.st_size > MAX_BYTES:
        raise ValueError(f"its {info.st_size:,} bytes are more than the {MAX_BYTES:,} that are allowed")
    with open(source, "rb", buffering=0) as file:
        content = file.read()
    formats = READABLE
    if content[4:8] == b"ftyp" and b"hei" in content[8:40]:  # the brands heic, heix, ...
        formats = _load_heif()
    image = Image.open(io.BytesIO(content), formats=formats)
    width, height = image.size
    if (scale := _reduction(image)) > 1:
        image.draft(None, (max(1, width // scale), max(1, height // scale)))
    if image.width * image.height > MAX_PIXELS or max(image.size) > MAX_SIDE:
        raise ValueError(f"{width} x {height} pixels are more than {MAX_PIXELS:,}, or than {MAX_SIDE:,} on a side")
    if image.format == "PNG":  # whose checksums Pillow does not check when it decodes
        Image.open(io.BytesIO(content), formats=("PNG",)).verify()
    return image


def _reduction(image: Image.Image) -> int:
    """By what the sides of a large JPEG are divided while it is decoded: 1, 2 or 4. (MPO is JPEG with more to it.)"""
    scale = max(math.sqrt(image.width * image.height / MAX_PIXELS), max(image.size) / MAX_SIDE)
    return (1 if scale <= 1 else 2 if scale <= 2 else 4) if image.format in ("JPEG", "MPO") else 1


def reduction_of(source) -> int:
    """By what read_whole divides the sides of `source`: 1, except for large JPEGs."""
    if isinstance(source, str | os.PathLike):
        with contextlib.suppress(OSError), Image.open(source, formats=("JPEG",)) as image:  # refuses other formats
            return _reduction(image)
    return 1


def _load_heif() -> tuple[str, ...]:
    """The format that pillow-heif adds to Pillow's."""
    try:
        import pillow_heif
    except ImportError:
        raise ValueError("HEIC images need: pip install pillow-heif") from None
    pillow_heif.register_heif_opener()
    return ("HEIF",)


def _check_array(array: np.ndarray) -> np.ndarray:
    if array.size == 0:
        raise ValueError("it has no pixels")
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)):
        raise ValueError(f"an array must be uint8 (H, W, 3) or (H, W), not {array.dtype} {array.shape}")
    return array


def _to_upright(image: Image.Image, channels: int) -> Image.Image:
    """Decoded in full, in mode L or RGB, turned by its EXIF rotation."""
    image.load()
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits, which Pillow's own conversion would clip at 255 instead of scaling
        pixels = np.asarray(image)
        pixels = (pixels if pixels.dtype.itemsize == 2 else pixels.clip(0, 65535)) >> 8
        image = Image.fromarray(pixels.astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range; save it with 8 bits a channel")
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if channels == 1 else "RGB")


def _to_pixels(image: Image.Image, spec: InputSpec, channels: int) -> np.ndarray:
    image = _to_upright(image, channels)
    if image.size != (spec.image_size, spec.image_size):
        image = image.resize((spec.image_size, spec.image_size), Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def normalize(images: torch.Tensor, spec: InputSpec) -> torch.Tensor:
    """float32 (N, C, H, W) in 0-1 -> float32 (N, spec.channels, H, W), normalized; one gray channel becomes three."""
    channels = images.unbind(1) * (spec.channels // images.shape[1])
    # Plain numbers, because a tensor of them would have to be copied to the device for every batch.
    parts = [(part - mean) / std for part, mean, std in zip(channels, spec.mean, spec.std, strict=True)]
    return torch.stack(parts, 1) if len(parts) > 1 else parts[0][:, None]


def to_input(images: torch.Tensor, spec: InputSpec) -> torch.Tensor:
    """uint8 (N, C, H, W), 0-255 -> float32 (N, spec.channels, H, W), scaled to 0-1 and normalized."""
    return normalize(images.float() / 255, spec)


def to_uint8(inputs: torch.Tensor, spec: InputSpec) -> torch.Tensor:
    """The inverse of to_input: float32 (N, spec.channels, H, W) -> uint8 (N, spec.stored_channels, H, W)."""
    channels = zip(inputs.unbind(1)[: spec.stored_channels], spec.mean, spec.std, strict=False)
    return torch.stack([(255 * (part * std + mean)).round() for part, mean, std in channels], 1).to(torch.uint8)


# Many at a time


def decode_paths(paths: list[str], spec: InputSpec, channels: int) -> list:
    """For each image its pixels, or a str, the reason why it can't be read; [None] if one needs more `channels`."""
    results = []
    for path in paths:
        try:
            image = _open(path)
            if channels < spec.stored_channels and image.mode not in _GRAY_MODES:
                return [None]
            results.append(_to_pixels(image, spec, channels))
        except MemoryError:
            raise
        except Exception as error:  # as in read_image
            results.append(_reason_of(error))
    return results


def in_chunks(
    sources: list, decode: Callable[[list], Any], size: int, *, ahead: int = 0, workers: int = 0
) -> Iterator[tuple[int, Any]]:
    """Yields (start, decode(sources[start : start + size])) in order; threads decode a few chunks ahead.

    `ahead` is the least number of sources decoded ahead, so that decoding goes on while the caller works; `workers` is
    the number of threads, by default chosen by the size of the files.
    """
    if len(sources) <= 1:
        yield from [(0, decode(sources))] * len(sources)
        return
    workers = workers or _count_decoders(sources)
    starts, running = deque(range(0, len(sources), size)), deque()
    pool = ThreadPoolExecutor(workers)
    try:
        while starts or running:
            while starts and len(running) < max(2 * workers, ahead // size):
                start = starts.popleft()
                running.append((start, pool.submit(decode, sources[start : start + size])))
            start, future = running.popleft()
            yield start, future.result()
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C should not wait for what is queued


def _count_decoders(sources: list) -> int:
    """Threads to decode with: small files spend most of their time in Python, which runs one thread at a time."""
    paths = [source for source in sources[:: 1 + len(sources) // 100] if isinstance(source, str | os.PathLike)]
    sizes = [os.path.getsize(path) for path in paths if os.path.isfile(path)]
    return 1 if sizes and sum(sizes) < _SMALL_FILE * len(sizes) else torch.get_num_threads()
