"""A face in an image, and its crop: turned upright, and framed as FER2013's images are.

Example::

    crop = align_face(image, find_faces(image)[0])  # uint8 (S, S, 3)
"""

import cmath
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from preprocessing import read_whole


@dataclass(frozen=True)
class Face:
    """A face in an image: its box, inside the image, and its landmarks, in pixels; its score from 0 to 1.

    The landmarks are (x, y) of the right and left eye, the tip of the nose, and the right and left corner of the
    mouth; right and left are the person's own.
    """

    left: int
    top: int
    width: int
    height: int
    score: float
    landmarks: tuple[tuple[float, float], ...]

    @property
    def box(self) -> tuple[int, int, int, int]:
        return self.left, self.top, self.width, self.height

    @property
    def center(self) -> complex:
        """x + y i."""
        return self.left + self.width / 2 + 1j * (self.top + self.height / 2)

    @property
    def tilt(self) -> float:
        """Degrees, from -180 to 180, by which the face is turned clockwise: the slope of the line between the eyes."""
        (x1, y1), (x2, y2) = self.landmarks[:2]
        return math.degrees(math.atan2(y2 - y1, x2 - x1))


def align_face(image, face: Face) -> np.ndarray:
    """The square of the box's longer side, turned upright, as uint8 (S, S, 3) at the resolution of the image.

    Outside the image, its edge pixels are repeated. `image` as for find_faces; InputError for one that can't be read.
    """
    side = max(1, face.width, face.height)
    return cut_square(read_whole(image), face.center, cmath.rect(1, math.radians(face.tilt)), side)


def cut_square(pixels: np.ndarray, center: complex, step: complex, side: int) -> np.ndarray:
    """uint8 (side, side, 3) from `pixels`, uint8 (H, W, 3), around `center`, x + y i.

    `step`, complex, is the offset in `pixels` from one pixel of the square to the next in its row: its length scales,
    its angle rotates. Outside of `pixels`, the edge pixels are repeated.
    """
    start = center - step * side / 2 * (1 + 1j)
    corners = start + step * side * np.array([0, 1, 1j, 1 + 1j])
    parts, sizes, margins, scales, offsets = [], [], [], [], []  # by x and y
    for places, length in ((corners.real, pixels.shape[1]), (corners.imag, pixels.shape[0])):
        low, high = math.floor(places.min()), math.ceil(places.max()) + 1
        first, last = min(max(low, 0), length - 1), min(max(high, 1), length)
        sizes.append(max(1, math.ceil((last - first) / max(1, abs(step)))))
        scales.append(sizes[-1] / (last - first))
        margins.append([max(0, math.ceil(scales[-1] * outside)) for outside in (first - low, high - last)])
        offsets.append(margins[-1][0] - scales[-1] * first)
        parts.append(slice(first, last))
    region = Image.fromarray(pixels[parts[1], parts[0]])
    if abs(step) > 1:  # the transform takes single pixels; those that it would skip are averaged first
        region = region.resize(sizes, Image.Resampling.BILINEAR, reducing_gap=2.0)
    region = Image.fromarray(np.pad(region, (margins[1], margins[0], (0, 0)), mode="edge"))
    (x, y), (left, top) = scales, offsets
    matrix = (x * step.real, -x * step.imag, x * start.real + left, y * step.imag, y * step.real, y * start.imag + top)
    return np.asarray(region.transform((side, side), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR))
