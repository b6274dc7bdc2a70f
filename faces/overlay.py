"""Boxes, labels and bars on images and frames.

Example::

    image = draw_faces(pixels, [(face, prediction), ...])           # a PIL image, no smaller than `pixels`
"""

import os
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from checkpoints import replace_file
from errors import printable
from faces.detector import Face
from inference import Prediction, View
from preprocessing import read_whole

COLORS = ("#ffd000", "#00c8ff", "#ff6ec7", "#7dff5a", "#ff8c42", "#b18cff")
LEAST_FACE, LONGEST = 120, 1600  # pixels: small images are enlarged until faces have the one or they the other
SHADE = (0, 0, 0, 150)


def draw_faces(
    pixels: np.ndarray, results: list[tuple[Face | None, Prediction | None]], *, enlarge: bool = True
) -> Image.Image:
    """`pixels` uint8 (H, W, 3) with a box, a label and bars for each (face, prediction).

    Small images are enlarged, so that letters and bars have room, unless `enlarge` is False. A face of None stands for
    the whole image, a prediction of None for an image without a face. Bars that would cover a face are left out.
    """
    scale = _enlargement(pixels, [face for face, _ in results if face]) if enlarge else 1.0
    image = Image.fromarray(pixels)
    if scale > 1:
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    layer = Image.new("RGBA", image.size)
    draw, boxes = ImageDraw.Draw(layer), []
    for face, _ in results:
        left, top, width, height = face.box if face else (0, 0, *pixels.shape[1::-1])
        boxes.append(tuple(scale * edge for edge in (left, top, left + width, top + height)))
    taken = [box for box, (face, _) in zip(boxes, results, strict=True) if face]
    for number, (box, (face, prediction)) in enumerate(zip(boxes, results, strict=True)):
        color = COLORS[number % len(COLORS)]
        font = _font(max(13, max(image.size) / 90, min((box[2] - box[0]) / 7, max(image.size) / 28)))
        if face:
            draw.rectangle(box, outline=color, width=max(2, round(font.size / 6)))
        text = f"{prediction[0]} {prediction[1]:.0f}%" if prediction else "no face found"
        taken.append(_draw_label(draw, image.size, box, text, font, color))
        if prediction:
            taken += _draw_bars(draw, image.size, box, prediction[2], font, color, taken, bool(face))
    return Image.alpha_composite(image.convert("RGBA"), layer).convert("RGB")


@cache
def _load_font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _font(size: float) -> ImageFont.FreeTypeFont:
    return _load_font(round(size))


def _enlargement(pixels: np.ndarray, faces: list[Face]) -> float:
    height, width = pixels.shape[:2]
    smallest = min((face.width for face in faces), default=width / 3)
    return max(1.0, min(LEAST_FACE / smallest, LONGEST / max(height, width)))


def _draw_label(draw, size, box, text: str, font, color: str) -> tuple[float, float, float, float]:
    """Above the box if there is room, else inside at its top, never cut off at the sides. Returns what it covers."""
    text = printable(text)
    width, height = draw.textlength(text, font=font) + font.size * 0.6, font.size * 1.35
    left = min(max(box[0], 0), max(0, size[0] - width))
    top = box[1] - height if box[1] >= height else box[1]
    draw.rectangle((left, top, left + width, top + height), fill=color)
    draw.text((left + font.size * 0.3, top + font.size * 0.1), text, font=font, fill="black")
    return left, top, left + width, top + height


def _draw_bars(draw, size, box, all_probs: dict[str, float], font, color: str, taken: list, is_face: bool) -> list:
    """A bar for each class next to the box, or in the corner of a whole image. Returns what they cover, if drawn."""
    small = _font(max(11, font.size * 0.75))
    line, names = small.size * 1.25, [printable(name) for name in all_probs]
    name_width = max(draw.textlength(name, font=small) for name in names) + small.size * 0.6
    width, height = name_width + 5 * small.size, line * len(names) + small.size * 0.4
    places = [(box[2] + 4, box[1]), (box[0] - width - 4, box[1]), (box[0], box[3] + 4)]
    if not is_face:
        places = [(size[0] - width, size[1] - height)]
    for left, top in places:
        area = (left, top, left + width, top + height)
        fits = min(left, top) >= 0 and area[2] <= size[0] and area[3] <= size[1]
        if fits and not any(_overlap(area, other) for other in taken):
            break
    else:
        return []
    draw.rectangle(area, fill=SHADE)
    for number, (name, percent) in enumerate(zip(names, all_probs.values(), strict=True)):
        y = top + small.size * 0.2 + line * number
        draw.text((left + small.size * 0.3, y), name, font=small, fill="white")
        start, full = left + name_width, width - name_width - small.size * 0.3
        draw.rectangle((start, y + line * 0.2, start + full * percent / 100, y + line * 0.8), fill=color)
    return [area]


def _overlap(a: tuple, b: tuple) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


class Targets:
    """Names for annotated files in `folder`: all different, on any file system, and none that of an input."""

    def __init__(self, folder: Path, inputs: list[str]):
        self.folder = folder
        self.taken = {os.path.realpath(path).casefold() for path in inputs}

    def __call__(self, source, ending: str) -> Path:
        """The path for what is made of `source`, such as photo.faces.jpg; photo-2.faces.jpg for another photo."""
        stem, number = Path(source).stem, 1
        path = self.folder / f"{stem}{ending}"
        while os.path.realpath(path).casefold() in self.taken:
            number += 1
            path = self.folder / f"{stem}-{number}{ending}"
        self.taken.add(os.path.realpath(path).casefold())
        return path


def annotate_images(
    predictions: Iterable[tuple[View, Prediction | None]], targets: Targets
) -> Iterator[tuple[View, Prediction | None]]:
    """Passes (view, prediction) on, and writes an annotated copy of each image after its last one.

    All of one image come together. Raises InputError if a copy can't be written.
    """
    for source, found in groupby(predictions, key=lambda item: item[0].source):
        results = []
        for view, prediction in found:
            yield view, prediction
            results.append((view.face, prediction))
        image = draw_faces(read_whole(source), results)
        replace_file(targets(source, ".faces.jpg"), lambda path, image=image: image.save(path, "JPEG", quality=92))
