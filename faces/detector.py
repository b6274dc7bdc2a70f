"""Faces in photos and frames, found by OpenCV's detectors; OpenCV is an optional package.

Example::

    faces = find_faces(image)                       # largest first
    crop = crop_face(image, faces[0])               # square, framed as FER2013's images are
"""

import os
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from errors import InputError
from preprocessing import read_whole

LONGEST = 1280  # pixels; larger images are searched on a copy of this longer side
CROP_SIZE = 100  # pixels; an image of no longer side is taken for the crop of a face
SMALLEST = 30  # pixels of the box, in what is searched; the cascade was trained on 20
MARGIN = {"haar": 0.02, "yunet": 0.0}  # on each side; benchmarks.faces measures the cascade's, YuNet's is a guess
CASCADE = "haarcascade_frontalface_alt2.xml"
INSTALL = 'faces and videos need OpenCV: pip install "opencv-python-headless>=4.10,<5"'
_local = threading.local()  # a detector holds state while it searches, so each thread has its own
_importing = threading.Lock()


@dataclass(frozen=True)
class Face:
    """A box in pixels of the image, inside it, and the detector's own score: of YuNet from 0 to 1, of the cascade a sum
    that is good for ranking only."""

    left: int
    top: int
    width: int
    height: int
    score: float
    detector: str = "haar"

    @property
    def box(self) -> tuple[int, int, int, int]:
        return self.left, self.top, self.width, self.height


@cache
def load_opencv():
    """The module cv2. Raises InputError with what to install if it is missing, broken, or without cascades."""
    os.environ.setdefault("OPENCV_LOG_LEVEL", "OFF")  # broken videos are reported in one line of ours
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    os.environ.setdefault("OPENCV_VIDEOIO_MSMF_ENABLE_HW_TRANSFORMS", "0")  # or Windows takes a minute per camera
    try:
        with _importing:  # cv2 imports itself a second time, and another thread would meanwhile get a half of it
            import cv2

        if not os.path.isfile(cv2.data.haarcascades + CASCADE) or not hasattr(cv2, "CascadeClassifier"):
            raise ImportError("this build of OpenCV has no cascades")
    except Exception as error:  # a broken build raises anything
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(f"{INSTALL} ({reason})") from None
    return cv2


@cache
def opencv_problem() -> str | None:
    """Why faces can't be looked for, and what to do; None if they can."""
    try:
        load_opencv()
    except InputError as error:
        return str(error)
    return None


def find_faces(image, *, min_size: int | None = None, yunet: str | Path | None = None) -> list[Face]:
    """The faces in an image, the largest first.

    `image` is a path, a PIL image, or a uint8 array (H, W, 3) in RGB order or (H, W). By default it is searched for
    faces from 30 pixels on, and if its longer side is over 1280 pixels, on a copy of that size. `min_size`, in pixels
    of the image, asks for smaller ones (down to 20, slower) or spares small ones (faster). `yunet` is the .onnx file of
    OpenCV's YuNet (Wu et al. 2023), used instead of the cascade of Viola & Jones 2001. Raises InputError.
    """
    if min_size is not None and min_size < 1:
        raise InputError(f"the least size of a face must be at least 1 pixel, not {min_size}")
    cv2, pixels = load_opencv(), read_whole(image)
    height, width = pixels.shape[:2]
    scale = min(1.0, LONGEST / max(height, width))
    if min_size is not None:
        scale = min(1.0, max(scale, 20 / min_size))
    least = max(20, round(scale * min_size)) if min_size is not None else SMALLEST
    if scale < 1:
        size = (max(1, round(scale * width)), max(1, round(scale * height)))
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    boxes = _search_yunet(cv2, pixels, least, str(yunet)) if yunet else _search_cascade(cv2, pixels, least)
    scales = pixels.shape[1] / width, pixels.shape[0] / height
    faces = [_to_face(box, score, scales, (width, height), "yunet" if yunet else "haar") for box, score in boxes]
    faces = [face for face in faces if face.width > 0 and face.height > 0]
    return sorted(faces, key=lambda face: (face.width * face.height, face.score), reverse=True)


def _search_cascade(cv2, pixels: np.ndarray, least: int) -> list[tuple[np.ndarray, float]]:
    if not hasattr(_local, "cascade"):
        _local.cascade = cv2.CascadeClassifier(cv2.data.haarcascades + CASCADE)
    gray = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    boxes, _, scores = _local.cascade.detectMultiScale3(gray, 1.1, 5, minSize=(least, least), outputRejectLevels=True)
    return list(zip(np.reshape(boxes, (-1, 4)), np.ravel(scores), strict=True))


def _search_yunet(cv2, pixels: np.ndarray, least: int, path: str) -> list[tuple[np.ndarray, float]]:
    if not os.path.isfile(path):
        raise InputError(f"no file {path}, which should be YuNet's .onnx file")
    detectors = _local.__dict__.setdefault("yunet", {})
    try:
        if path not in detectors:
            detectors[path] = cv2.FaceDetectorYN.create(path, "", (320, 320), score_threshold=0.7)
        detectors[path].setInputSize(pixels.shape[1::-1])
        _, rows = detectors[path].detect(cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
    except cv2.error as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} can't be used as YuNet's .onnx file: {reason}") from None
    rows = [] if rows is None else rows
    return [(row[:4], float(row[-1])) for row in rows if min(row[2:4]) >= least]


def _to_face(box, score: float, scales: tuple[float, float], size: tuple[int, int], detector: str) -> Face:
    """`box` (left, top, width, height) in pixels of what was searched, clipped to the image of `size`."""
    sides = []
    for start, length, scale, limit in zip(box[:2], box[2:4], scales, size, strict=True):
        ends = (float(start) / scale, float(start + length) / scale)
        sides.append([min(max(round(end), 0), limit) for end in ends])
    (left, right), (top, bottom) = sides
    return Face(left, top, right - left, bottom - top, float(score), detector)


def crop_face(image, face: Face, margin: float | None = None) -> np.ndarray:
    """The square around `face` as uint8 (S, S, 3), with `margin` (a share of its longer side) on each side.

    The margin is what makes it look like FER2013's images, unless given. What lies outside the image repeats its edge.
    `image` as for find_faces; InputError for one that can't be read.
    """
    pixels = read_whole(image)
    margin = MARGIN[face.detector] if margin is None else margin
    side = max(1, round(max(face.width, face.height) * (1 + 2 * margin)))
    left, top = round(face.left + face.width / 2 - side / 2), round(face.top + face.height / 2 - side / 2)
    rows = np.arange(top, top + side).clip(0, pixels.shape[0] - 1)
    columns = np.arange(left, left + side).clip(0, pixels.shape[1] - 1)
    return pixels[rows[:, None], columns]
