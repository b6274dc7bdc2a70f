"""Faces in photos and frames, found by YuNet, a network of 53,104 parameters (Wu, Peng, Yu 2023, "YuNet: A Tiny
Millisecond-level Face Detector", Machine Intelligence Research 20).

Example::

    faces = find_faces(image)                       # largest first
    crop = align_face(image, faces[0])              # faces/align.py: upright and square, framed as FER2013's images are
"""

import cmath
import contextlib
import math
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from data import walk_images
from device import one_thread
from errors import InputError, printable
from faces.align import Face, cut_square
from preprocessing import read_whole

WEIGHTS = Path(__file__).resolve().parent.parent / "weights" / "face_detector.pth"
CROP_SIZE = 100  # pixels; an image of no longer side is taken for the crop of a face
LONGEST = 960  # pixels; larger images are searched on a copy of this longer side
OVERVIEW = 240  # pixels; the longer side of the copy on which faces that fill the image are found
SMALLEST = 16  # pixels of a face's box, in the copy that is searched
COPY = 112  # pixels; of the copies of a face that show its tilt
MIN_SCORE, MAX_OVERLAP = 0.7, 0.3
STRIDES = (8, 16, 32)


# The network


def _separable(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 1), nn.Conv2d(outputs, outputs, 3, padding=1, groups=outputs)]


def _unit(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(*_separable(inputs, outputs), nn.ReLU(inplace=True))


def _stage(*widths: int) -> nn.Sequential:
    """Halves the resolution, then two units."""
    return nn.Sequential(nn.MaxPool2d(2), _unit(widths[0], widths[1]), _unit(widths[1], widths[2]))


class YuNet(nn.Module):
    """float32 (N, 3, H, W), RGB from 0 to 255, sides divisible by 32 -> a map (N, 16, H / stride, W / stride) for each
    of STRIDES: logits of "a face" and "an object", four numbers of the box, x and y of five landmarks."""

    def __init__(self):
        super().__init__()
        stem = [nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU(inplace=True), _unit(16, 16)]
        fine = nn.Sequential(*stem, _stage(16, 16, 32), _unit(32, 32), _unit(32, 64), _stage(64, 64, 64))
        self.features = nn.ModuleList([fine, _stage(64, 64, 64), _stage(64, 64, 64)])
        self.lateral = nn.ModuleList(_unit(64, 64) for _ in STRIDES)
        self.heads = nn.ModuleList(nn.Sequential(*_separable(64, 16)) for _ in STRIDES)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        maps = []
        for stage in self.features:
            images = stage(images)
            maps.append(images)
        maps[2] = self.lateral[2](maps[2])
        for level in (1, 0):
            maps[level] = self.lateral[level](maps[level] + F.interpolate(maps[level + 1], scale_factor=2.0))
        return [head(features) for head, features in zip(self.heads, maps, strict=True)]


@cache
def load_detector() -> YuNet:
    """The network with its weights, on the CPU. Raises InputError if the file is missing or broken."""
    detector = YuNet()
    try:
        detector.load_state_dict(torch.load(WEIGHTS, weights_only=True))
    except Exception as error:  # torch.load raises anything on a broken file
        raise InputError(f"can't load the face detector {WEIGHTS}: {error}; restore it from the repository") from None
    return detector.eval().to(memory_format=torch.channels_last)


# Finding


@one_thread()  # the layers are small, and threads would mostly wait for each other
@torch.inference_mode()
def detect(images: np.ndarray, min_score: float = MIN_SCORE) -> list[np.ndarray]:
    """uint8 (N, H, W, 3), RGB -> for each image float32 (faces, 15), the best first: left, top, width, height, x and y
    of five landmarks, score. Of overlapping boxes only the best is kept."""
    inputs = torch.tensor(images).permute(0, 3, 1, 2).float()
    inputs = F.pad(inputs, (0, -inputs.shape[3] % 32, 0, -inputs.shape[2] % 32))
    outputs = load_detector()(inputs.contiguous(memory_format=torch.channels_last))
    rows, owners = [], []
    for maps, stride in zip(outputs, STRIDES, strict=True):
        maps = maps.permute(0, 2, 3, 1)
        scores = (maps[..., 0].sigmoid() * maps[..., 1].sigmoid()).sqrt()
        n, y, x = torch.where(scores >= min_score)
        cells, found = torch.stack([x, y], 1), maps[n, y, x]
        sizes = found[:, 4:6].exp()
        corners = cells + found[:, 2:4] - sizes / 2
        landmarks = (cells[:, None] + found[:, 6:].view(-1, 5, 2)).flatten(1)
        rows.append(torch.cat([stride * torch.cat([corners, sizes, landmarks], 1), scores[n, y, x, None]], 1))
        owners.append(n)
    rows, owners = torch.cat(rows).numpy(), torch.cat(owners).numpy()
    return [keep_best(rows[owners == number]) for number in range(len(images))]


def keep_best(rows: np.ndarray) -> np.ndarray:
    """Non-maximum suppression: rows as of `detect`, the best first, without those that overlap a better one."""
    rows, kept = rows[np.argsort(-rows[:, -1], kind="stable")], []
    start, end = rows[:, :2], rows[:, :2] + rows[:, 2:4]
    areas, alive = rows[:, 2:4].prod(1), np.ones(len(rows), bool)
    for index in range(len(rows)):
        if alive[index]:
            kept.append(index)
            common = (np.minimum(end, end[index]) - np.maximum(start, start[index])).clip(0).prod(1)
            alive &= common <= MAX_OVERLAP * (areas + areas[index] - common)
    return rows[kept]


def find_faces(image, *, min_size: int | None = None, turns: bool = True) -> list[Face]:
    """The faces in an image, the largest first.

    `image` is a path, a PIL image, or a uint8 array (H, W, 3) in RGB order or (H, W). `min_size` is the smallest side
    of a face's box, in pixels of the image; by default 16, or if the image's longer side is over 960 pixels, a 60th of
    it. A smaller `min_size` takes longer. With `turns`, an image in which no face is found is searched again rotated by
    30 degrees either way and by quarter turns, and faces may be tilted by any angle; without, by at most 45 degrees.
    Raises InputError.
    """
    if min_size is not None and min_size < 1:
        raise InputError(f"the least size of a face must be at least 1 pixel, not {min_size}")
    pixels = read_whole(image)
    scale = min(1.0, 1.5 * SMALLEST / min_size if min_size else LONGEST / max(pixels.shape[:2]))
    copy = _reduce(pixels, min(1.0, 2 * scale))  # twice what is searched, to look at faces again
    ratio = copy.shape[1] / pixels.shape[1]
    for turn in (0, 30, -30, 90, -90, 180) if turns else (0,):
        most = LONGEST / 2 / max(copy.shape[:2]) if turn else 1.0  # turned, only larger faces are looked for
        rows = _search(copy, min(scale / ratio, most), turn)
        rows = rows[rows[:, 2:4].min(1) >= (min_size or SMALLEST / scale) * ratio]
        if len(rows):
            tilts = range(-180, 180, 15) if turns else range(-45, 60, 15)
            faces = [_to_face(_look_again(copy, row, tilts), pixels.shape, ratio) for row in rows]
            faces = [face for face in faces if face.width and face.height]
            return sorted(faces, key=lambda face: (face.width * face.height, face.score), reverse=True)
    return []


def _reduce(pixels: np.ndarray, scale: float) -> np.ndarray:
    if scale == 1:
        return pixels
    size = max(1, round(scale * pixels.shape[1])), max(1, round(scale * pixels.shape[0]))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0))


def _search(pixels: np.ndarray, scale: float, turn: int) -> np.ndarray:
    """Rows as of `detect` of the faces in a copy of `pixels` turned counterclockwise by `turn` degrees.

    YuNet finds faces of up to about 300 pixels, so a face that fills the image is looked for in a small copy. Such a
    face is cut off at the border, so the copy is padded with its edge pixels.
    """
    overview = min(1.0, OVERVIEW / max(pixels.shape[:2]))
    found = [_search_copy(pixels, overview, turn, padding=1 / 6)]
    if scale > overview:
        found.append(_search_copy(pixels, scale, turn))
    return keep_best(np.concatenate(found))


def _search_copy(pixels: np.ndarray, scale: float, turn: int, padding: float = 0.0) -> np.ndarray:
    """Rows in pixels of the image before it was reduced, padded and turned; the boxes are not turned with it."""
    copy = _reduce(pixels, scale)
    edge = round(padding * min(copy.shape[:2]))
    image = Image.fromarray(np.pad(copy, ((edge, edge), (edge, edge), (0, 0)), mode="edge"))
    turned = image.rotate(turn, Image.Resampling.BILINEAR, expand=True)
    rows = detect(np.asarray(turned)[None])[0]
    angle = math.radians(turn)
    centers = rows[:, :2] + rows[:, 2:4] / 2
    points = np.concatenate([centers, rows[:, 4:14]], 1).reshape(-1, 6, 2) - np.array(turned.size) / 2
    points = points @ [[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]
    ratios = np.array([pixels.shape[1] / copy.shape[1], pixels.shape[0] / copy.shape[0]])
    points = (points + np.array(image.size) / 2 - edge) * ratios
    sides = _turn_sides(rows[:, 2:4], angle) * ratios[0]
    return np.concatenate([points[:, 0] - sides / 2, sides, points[:, 1:].reshape(-1, 10), rows[:, 14:]], 1)


def _look_again(pixels: np.ndarray, row: np.ndarray, tilts: range) -> np.ndarray:
    """A row as of `detect`, with box and landmarks at the tilt at which YuNet is surest of the face.

    YuNet finds tilted faces, but its landmarks follow the tilt by half at most, and in small faces not at all. Its
    score falls to nothing within 45 degrees, so copies turned by `tilts` (degrees, clockwise) are compared.
    """
    center = complex(*(row[:2] + row[2:4] / 2))
    step = 1.75 * float(row[2:4].max()) / COPY
    around = cut_square(pixels, center, step, 3 * COPY // 2)  # turned, this still covers a copy
    turns = [cmath.rect(1, math.radians(tilt)) for tilt in tilts]
    found = []  # the row of the face in the middle, at each tilt
    for copy in detect(np.stack([cut_square(around, 0.75 * COPY * (1 + 1j), turn, COPY) for turn in turns]), 0.3):
        offsets = abs((copy[:, :2] + copy[:, 2:4] / 2 - COPY / 2) @ [1, 1j])
        found.append(copy[offsets.argmin()] if len(copy) and offsets.min() < COPY / 4 else None)
    scores = np.array([0.0 if one is None else one[14] for one in found])
    best = int(scores.argmax())
    if found[best] is None:
        return row
    away = (np.array(tilts) - tilts[best] + 180) % 360 - 180
    rest = float(np.average(away, weights=scores * (abs(away) <= 45)))
    points = np.concatenate([found[best][None, :2] + found[best][None, 2:4] / 2, found[best][4:14].reshape(5, 2)])
    points = center + (points @ [1, 1j] - COPY / 2 * (1 + 1j)) * step * turns[best]
    points = points[0] + (points - points[0]) * cmath.rect(1, math.radians(rest))
    sides = _turn_sides(found[best][None, 2:4] * step, math.radians(tilts[best] + rest))[0]
    corner = np.array([points[0].real, points[0].imag]) - sides / 2
    landmarks = np.stack([points[1:].real, points[1:].imag], 1).ravel()
    return np.concatenate([corner, sides, landmarks, row[14:]])


def _turn_sides(sides: np.ndarray, angle: float) -> np.ndarray:
    """(faces, 2) widths and heights of boxes as tight as before around faces turned by `angle`, in radians."""
    cos, sin = abs(math.cos(angle)), abs(math.sin(angle))
    return (cos * sides + sin * sides[:, ::-1]) / (cos + sin)


def _to_face(row: np.ndarray, shape: tuple[int, ...], ratio: float) -> Face:
    """The Face of a row as of `detect` in a copy scaled by `ratio`; the box is clipped to the image, of `shape`."""
    row = np.append(row[:14] / ratio, row[14])
    left, right = (min(max(round(end), 0), shape[1]) for end in (row[0], row[0] + row[2]))
    top, bottom = (min(max(round(end), 0), shape[0]) for end in (row[1], row[1] + row[3]))
    landmarks = tuple((float(x), float(y)) for x, y in row[4:14].reshape(5, 2))
    return Face(left, top, right - left, bottom - top, float(row[14]), landmarks)


def warn_of_photos(folder: str | Path) -> list[str]:
    """A warning if a sample of the images below `folder` are whole photos rather than crops of faces, else no line."""
    files, images = walk_images(folder), []
    for file in files[:: 1 + len(files) // 12]:
        with contextlib.suppress(InputError):
            images.append(read_whole(file.path))
    if not images or np.median([max(image.shape) for image in images]) <= 200:
        return []
    found = [(faces[0], image) for image in images if (faces := find_faces(image, turns=False))]
    shares = [max(face.width, face.height) / max(image.shape) for face, image in found]
    if not shares or np.median(shares) >= 0.5:
        return []
    name = printable(folder)
    return [f"warning: {name} holds whole photos, and faces are a small part of them; use prepare_data.py crop"]
