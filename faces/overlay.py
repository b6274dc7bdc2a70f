"""Boxes, labels and bars on images and frames.

Example::

    image = draw_faces(pixels, [(view, prediction), ...])           # a PIL image, no smaller than `pixels`
"""

import math
import os
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from checkpoints import replace_file
from errors import printable
from faces.align import Face
from inference import Prediction, View
from preprocessing import read_whole

COLORS = ("#ffd000", "#00c8ff", "#ff6ec7", "#7dff5a", "#ff8c42", "#b18cff", "#ffffff", "#ff6060")
LEAST_FACE, LONGEST = 120, 1600  # pixels; small images are enlarged until faces have the one or they the other
LEAST_FONT = 9  # pixels of the letters next to bars that are short of room
SHADE = (0, 0, 0, 150)

Area = tuple[float, float, float, float]  # left, top, right, bottom in pixels


def draw_faces(
    pixels: np.ndarray, results: list[tuple[View, Prediction | None]], *, enlarge: bool = True
) -> Image.Image:
    """`pixels` uint8 (H, W, 3) with a box, a label and bars for each (view, prediction).

    Small images are enlarged, so that letters and bars have room, unless `enlarge` is False. A label has the number of
    the view, except for a face that is the only one. Bars are shrunk until they cover no face, label or other bars; if
    they still do, they go where they cover least. A prediction of None stands for an image without a face.
    """
    scale = _enlargement(pixels, [view.face for view, _ in results if view.face]) if enlarge else 1.0
    image = Image.fromarray(pixels)
    if scale > 1:
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    layer = Image.new("RGBA", image.size)
    draw, items, taken = ImageDraw.Draw(layer), [], []
    for view, prediction in results:
        left, top, width, height = view.face.box if view.face else (0, 0, *pixels.shape[1::-1])
        box = tuple(scale * edge for edge in (left, top, left + width, top + height))
        color = _pick_color(box, view.number, items)
        letters = max(13, max(image.size) / 90, min((box[2] - box[0]) / 7, max(image.size) / 28))  # pixels
        items.append((box, color, letters, view, prediction))
        if view.face:
            draw.rectangle(box, outline=color, width=max(2, round(letters / 6)))
            taken.append(box)
    is_numbered = len(results) > 1 or any(view.number > 1 for view, _ in results)
    for box, color, letters, view, prediction in items:
        text = f"{prediction[0]} {prediction[1]:.0f}%" if prediction else "no face found"
        text = f"{view.number}: {text}" if view.face and is_numbered else text
        taken.append(_draw_label(draw, image.size, box, text, letters, color, taken))
    for box, color, letters, view, prediction in items:  # after all labels, which matter more
        if prediction:
            taken.append(_draw_bars(draw, image.size, box, prediction[2], letters, color, taken, bool(view.face)))
    return Image.alpha_composite(image.convert("RGBA"), layer).convert("RGB")


@cache
def _load_font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _enlargement(pixels: np.ndarray, faces: list[Face]) -> float:
    height, width = pixels.shape[:2]
    smallest = min((face.width for face in faces), default=width / 3)
    return max(1.0, min(LEAST_FACE / smallest, LONGEST / max(height, width)))


def _pick_color(box: Area, number: int, items: list) -> str:
    """That of the number, or if another box has it, the color whose nearest box is farthest away."""

    def distance(color: str) -> float:
        return min((_gap(box, other) for other, its_color, *_ in items if its_color == color), default=math.inf)

    start = (number - 1) % len(COLORS)
    return max(COLORS[start:] + COLORS[:start], key=distance)


def _gap(a: Area, b: Area) -> float:
    """Pixels between two areas, along the axis on which they are farther apart; below 0 if they overlap."""
    return max(a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3])


def _place(size: tuple[int, int], wanted: list[tuple], taken: list[Area]) -> tuple:
    """Of `wanted`, each (left, top, width, height, ...), the first that covers none of `taken`, or the one that covers
    least; with its area, moved into the image, instead of the first four."""
    others, best = np.array(taken).reshape(-1, 4), None
    for left, top, width, height, *rest in wanted:
        left, top = max(0, min(left, size[0] - width)), max(0, min(top, size[1] - height))
        area = (left, top, left + width, top + height)
        sides = np.minimum(others[:, 2:], area[2:]) - np.maximum(others[:, :2], area[:2])
        covered = sides.clip(0).prod(1).sum()
        if best is None or covered < best[0]:
            best = covered, area, *rest
        if not covered:
            break
    return best[1:]


def _draw_label(draw, size, box: Area, text: str, letters: float, color: str, taken: list[Area]) -> Area:
    """Above the box, below it or inside at its top, smaller if that is all there is room for. Returns what it covers."""
    text, wanted = printable(text), []
    for shrink in (1.0, 0.85, 0.7):
        font = _load_font(round(shrink * letters))
        width, height = draw.textlength(text, font=font) + font.size * 0.6, font.size * 1.35
        tops = [box[1] - height, box[3], box[1]]
        wanted += [(box[0], top, width, height, font) for top in tops if 0 <= top <= size[1] - height]
    area, font = _place(size, wanted, taken)
    draw.rectangle(area, fill=color)
    draw.text((area[0] + font.size * 0.3, area[1] + font.size * 0.1), text, font=font, fill="black")
    return area


def _draw_bars(draw, size, box: Area, all_probs: dict, letters: float, color: str, taken: list[Area], is_face) -> Area:
    """A bar for each class next to the box, or in the corner of a whole image. Returns what they cover."""
    names, wanted = [printable(name) for name in all_probs], []
    for shrink, bar in ((0.75, 5), (0.6, 5), (0.5, 5), (0.5, 2.5)):
        least = min(LEAST_FONT, size[1] / (1.25 * len(names) + 0.4))  # all rows are inside the image
        font = _load_font(max(1, int(max(least, shrink * letters))))
        name_width = max(draw.textlength(name, font=font) for name in names) + font.size * 0.6
        width, height = name_width + bar * font.size, font.size * (1.25 * len(names) + 0.4)
        places = [(box[2] + 4, box[1]), (box[0] - width - 4, box[1]), (box[0], box[3] + 4)]
        places += [(box[0], box[1] - height - 1.35 * letters - 4), (box[0], box[3] - height)]  # above; inside
        if not is_face:
            places = [(size[0] - width, size[1] - height)]
        wanted += [(*place, width, height, font, name_width) for place in places]
    area, font, name_width = _place(size, wanted, taken)
    draw.rectangle(area, fill=SHADE)
    for row, (name, percent) in enumerate(zip(names, all_probs.values(), strict=True)):
        y = area[1] + font.size * (0.2 + 1.25 * row)
        draw.text((area[0] + font.size * 0.3, y), name, font=font, fill="white")
        start, full = area[0] + name_width, area[2] - area[0] - name_width - font.size * 0.3
        bar = (start, y + font.size * 0.25, start + full * percent / 100, y + font.size)
        draw.rectangle(bar, fill=color)
    return area


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
        for result in found:
            yield result
            results.append(result)
        image = draw_faces(read_whole(source), results)
        replace_file(targets(source, ".faces.jpg"), lambda path, image=image: image.save(path, "JPEG", quality=92))
