"""Boxes, labels and bars on images and frames.

Example::

    image = draw_faces(pixels, [(view, prediction), ...])           # a PIL image, no smaller than `pixels`
"""

import math
import os
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import groupby, product
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from checkpoints import replace_file
from errors import InputError, printable
from inference import OnError, Prediction, View
from preprocessing import read_whole
from reports import drawable, find_font

COLORS = ("#ffd000", "#00c8ff", "#ff6ec7", "#7dff5a", "#ff8c42", "#b18cff", "#ffffff", "#00e0b0")
LEAST_FACE, LONGEST = 160, 1600  # pixels; small images are enlarged until faces have the one or they the other
SHADE = (0, 0, 0, 150)
COPY = ".faces.jpg"  # how the names of annotated images end

Result = tuple[View, Prediction | None]  # None: an image without a face
Area = tuple[float, float, float, float]  # left, top, right, bottom in pixels


_open_font, _default_font = cache(ImageFont.truetype), cache(ImageFont.load_default)


def _load_font(size: float, text: str) -> ImageFont.FreeTypeFont:
    """Pillow's own font; for letters that it lacks, one that matplotlib knows."""
    font = next((find_font(char) for char in text if not char.isascii()), None)
    return _open_font(font.fname, size) if font else _default_font(size)


def draw_faces(pixels: np.ndarray, results: list[Result], *, enlarge: bool = True) -> Image.Image:
    """`pixels` uint8 (H, W, 3) with a box, a label and bars for each (view, prediction).

    Small images are enlarged, so that letters and bars have room, unless `enlarge` is False. A label has the number of
    the view, except for a face that is the only one. Labels and bars shrink until they overlap no face, label or other
    bars; if none of their places is free, they go where they overlap least.
    """
    image, scale = Image.fromarray(pixels), 1.0
    if enlarge:
        smallest = min((view.face.width for view, _ in results if view.face), default=image.width / 3)
        scale = max(1.0, min(LEAST_FACE / smallest, LONGEST / max(image.size)))
    if scale > 1:
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    canvas, items = _Canvas(image.size), []
    for view, prediction in sorted(results, key=lambda result: result[0].face.left if result[0].face else 0):
        left, top, width, height = view.face.box if view.face else (0, 0, *pixels.shape[1::-1])
        box = tuple(scale * edge for edge in (left, top, left + width, top + height))
        color = _pick_color(box, view.number, items)
        items.append((box, color, view, prediction))
        if view.face:
            canvas.draw.rectangle(box, outline=color, width=max(2, round(canvas.letters(box) / 6)))
            canvas.taken.append((*box, 1))
    is_numbered = len(results) > 1 or any(view.number > 1 for view, _ in results)
    for box, color, view, prediction in items:
        text = f"{prediction[0]} {prediction[1]:.0f}%" if prediction else "no face found"
        canvas.add_label(box, color, f"{view.number}: {text}" if view.face and is_numbered else text)
    for box, color, _, prediction in items:  # after all labels, which matter more
        if prediction:
            canvas.add_bars(box, color, prediction[2])
    return Image.alpha_composite(image.convert("RGBA"), canvas.layer).convert("RGB")


def _pick_color(box: Area, number: int, items: list) -> str:
    """The color of `number`; if another box has it, one that no box has, else the one whose boxes are farthest away."""
    start = max(0, number - 1) % len(COLORS)
    gaps = dict.fromkeys(COLORS[start:] + COLORS[:start], math.inf)
    for other, color, *_ in items:
        gap = max(box[0] - other[2], other[0] - box[2], box[1] - other[3], other[1] - box[3])
        gaps[color] = min(gap, gaps[color])
    return max(gaps, key=gaps.get)


class _Canvas:
    """The layer with what is drawn over an image of `size`, and the areas that are taken, each with its weight."""

    def __init__(self, size: tuple[int, int]):
        self.size, self.layer, self.taken = size, Image.new("RGBA", size), []
        self.draw = ImageDraw.Draw(self.layer)

    def letters(self, box: Area) -> float:
        """The size of a label's letters in pixels."""
        return max(13, max(self.size) / 90, min((box[2] - box[0]) / 7, max(self.size) / 28))

    def take(self, wanted: Iterable[tuple]) -> tuple:
        """The first of `wanted`, (left, top, width, height, ...), that covers least, as (area in the image, ...)."""
        taken, best = np.array(self.taken).reshape(-1, 5), (math.inf,)
        for left, top, width, height, *rest in wanted:
            left, top = max(0, min(left, self.size[0] - width)), max(0, min(top, self.size[1] - height))
            area = (left, top, left + width, top + height)
            sides = np.minimum(taken[:, 2:4], area[2:]) - np.maximum(taken[:, :2], area[:2])
            covered = (sides.clip(0).prod(1) * taken[:, 4]).sum()
            best = (covered, area, *rest) if covered < best[0] else best
        self.taken.append((*best[1], 4))
        return best[1:]

    def add_label(self, box: Area, color: str, text: str) -> None:
        """Above the box, below it, or inside at its top."""
        text, wanted = drawable(printable(text)), []
        for shrink in (1.0, 0.85, 0.7):
            font = _load_font(round(shrink * self.letters(box)), text)
            width, height = self.draw.textlength(text, font=font) + font.size * 0.6, font.size * 1.35
            wanted += [(box[0], top, width, height, font) for top in (box[1] - height, box[3], box[1])]
        area, font = self.take(wanted)
        self.draw.rectangle(area, fill=color)
        self.draw.text((area[0] + font.size * 0.3, area[1] + font.size * 0.1), text, font=font, fill="black")

    def add_bars(self, box: Area, color: str, all_probs: dict[str, float]) -> None:
        """A bar for each class, next to the box, below or above it; for a whole image, inside at its right."""
        names, letters, wanted = [drawable(printable(name)) for name in all_probs], self.letters(box), []
        rows = 1.25 * len(names) + 0.4  # the height in sizes of the font
        for shrink, bar in ((0.75, 5), (0.6, 5), (0.45, 5), (0.3, 5), (0.3, 2.5)):
            least = min(max(9, max(self.size) / 160), self.size[1] / rows)  # so that all rows are inside the image
            font = _load_font(max(1, int(max(least, shrink * letters))), "".join(names))
            name_width = max(self.draw.textlength(name, font=font) for name in names) + font.size * 0.6
            width, height = name_width + bar * font.size, font.size * rows
            at_sides = product((box[2] + 4, box[0] - width - 4), (box[1], box[3] - height))
            tops = (box[3] + 4, box[3] + 1.35 * letters + 4, box[1] - 1.35 * letters - height - 4)
            places = [*at_sides, *product((box[0], box[2] - width), tops)]
            wanted += [(*place, width, height, font, name_width) for place in places]
        area, font, name_width = self.take(wanted)
        self.draw.rectangle(area, fill=SHADE)
        left, right, top = area[0] + name_width, area[2] - font.size * 0.3, area[1] + font.size * 0.2
        for name, percent in zip(names, all_probs.values(), strict=True):
            self.draw.text((area[0] + font.size * 0.3, top), name, font=font, fill="white")
            end = left + (right - left) * percent / 100
            self.draw.rectangle((left, top + font.size * 0.25, end, top + font.size), fill=color)
            top += font.size * 1.25


class Targets:
    """Names for annotated files in `folder`: all different, on any file system, and none that of an input."""

    def __init__(self, folder: Path, inputs: list[str]):
        self.folder = folder
        self.taken = {os.path.realpath(path).casefold() for path in inputs}

    def __call__(self, source, ending: str) -> Path:
        """The path for what is made of `source`, such as photo.faces.jpg; photo-2.faces.jpg for another photo."""
        stem, number = Path(source).stem, 1
        while len(os.fsencode(stem)) > 200:  # with the endings a name has room for 255 bytes
            stem = stem[:-1]
        path = self.folder / f"{stem}{ending}"
        while os.path.realpath(path).casefold() in self.taken:
            number += 1
            path = self.folder / f"{stem}-{number}{ending}"
        self.taken.add(os.path.realpath(path).casefold())
        return path


def annotate_images(predictions: Iterable[Result], targets: Targets, on_error: OnError) -> Iterator[Result]:
    """Passes (view, prediction) on, and writes an annotated copy of each image after its last one.

    All of one image come together. One that can't be read again goes to `on_error`. Raises InputError if a copy can't
    be written.
    """
    for source, found in groupby(predictions, key=lambda item: item[0].source):
        results = []
        for result in found:
            yield result
            results.append(result)
        try:
            image = draw_faces(read_whole(source), results)
        except InputError as error:
            on_error(source, str(error))
        else:
            replace_file(targets(source, COPY), lambda path, image=image: image.save(path, "JPEG", quality=92))
