"""Draw small gray cartoon faces with one of seven expressions: the sample set that everything runs on out of the box.

    from prepare.drawings import draw_sample_set
    draw_sample_set("sample")          # writes sample/train/<class>/*.png and sample/test/<class>/*.png

A face is drawn from two independent descriptions: an expression, which the class decides (brows, lids, nose, mouth;
RELAXED names its fields), and a look, which is independent of the class (head, pose, hair, glasses, light, noise;
LOOKS names its fields).

Face coordinates: the origin is the middle of the head, x to the right, y down, and 1 is half the width of the head.
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from data import SAMPLE_PREFIX

IMAGE_SIZE = 48  # pixels, the size of FER2013's images
SUPERSAMPLE = 4  # drawn four times as large, then reduced: ImageDraw doesn't smooth edges
CANVAS_SIZE = IMAGE_SIZE * SUPERSAMPLE

EYE_X, EYE_Y, EYE_HALF_WIDTH = 0.43, -0.12, 0.27  # where the features sit on the face
BROW_Y, NOSE_Y, MOUTH_Y = -0.44, 0.24, 0.64

_U = np.linspace(-1, 1, 33)  # the parameter of every curve, left to right

Ranges = dict[str, tuple]  # field: (low, high), or the strings to choose from

# fmt: off
# What the muscles of a relaxed face do; lengths are in face coordinates.
RELAXED: dict[str, float] = dict(
    brow_inner=0.0, brow_outer=0.0,  # how far the ends of the brows are raised (negative: lowered)
    brow_arch=0.05,  # how far the middle rises above the line between the ends
    brow_gap=0.2,  # from the middle of the face to the inner ends; small: drawn together
    eye_open=1.0,  # height of the upper lid, 1 is relaxed
    lid_slope=0.0,  # positive: the lid falls to the outside (tired), negative: to the inside (glare)
    lower_lid=0.0,  # 0 relaxed, 1 flat, above 1 pushed up into a crescent, below 0 pulled down
    iris=0.135,  # radius
    nose_wrinkle=0.0,  # 0 smooth, 1 wrinkled, nostrils pulled up
    furrow=0.0, cheek_fold=0.0,  # upright folds between the brows, folds from the nose around the mouth: 0 to 1
    mouth_width=0.36,  # half of it
    mouth_curve=0.0,  # how far the corners rise above the middle (negative: hang below)
    mouth_open=0.0, mouth_square=0.0,  # height of the opening, 0 is a closed line; 0 a round opening, 1 a square one
    upper_share=0.5,  # how much of the opening lies above the line between the corners
    mouth_wave=0.0,  # a trembling line
    sneer=0.0,  # the upper lip raised on one side
    teeth=0.0,  # share of the opening that shows teeth, from the top; 1 is two clenched rows
    tongue=0.0, tear=0.0,  # how far the tongue hangs out; size of a tear under one eye
)
# Brows, lids and nose of each emotion, then its mouths, which are equally likely. A field that isn't named is
# relaxed. Drawn after the action units of Ekman and Friesen, Facial Action Coding System (1978).
UPPER_FACES: dict[str, Ranges] = {
    "angry": dict(brow_inner=(-0.26, -0.12), brow_outer=(0.02, 0.16), brow_arch=(-0.02, 0.02), brow_gap=(0.08, 0.14),
                  eye_open=(0.7, 0.95), lid_slope=(-0.5, -0.2), lower_lid=(0.3, 0.8), furrow=(0, 1)),
    "disgust": dict(brow_inner=(-0.16, -0.06), brow_outer=(-0.08, 0.02), brow_arch=(0, 0.04), brow_gap=(0.13, 0.18),
                    eye_open=(0.4, 0.7), lower_lid=(0.6, 1), nose_wrinkle=(0.5, 1), cheek_fold=(0.3, 1)),
    "fear": dict(brow_inner=(0.16, 0.3), brow_outer=(-0.02, 0.08), brow_arch=(-0.03, 0.01), brow_gap=(0.1, 0.16),
                 eye_open=(1.3, 1.7), lower_lid=(-0.5, 0), iris=(0.09, 0.12)),
    "happy": dict(brow_inner=(-0.02, 0.06), brow_outer=(-0.02, 0.06), brow_arch=(0.05, 0.14),
                  eye_open=(0.75, 1.05), lower_lid=(0.4, 1.6), cheek_fold=(0, 0.6)),
    "neutral": dict(brow_inner=(-0.04, 0.04), brow_outer=(-0.04, 0.04), brow_arch=(0.02, 0.09), brow_gap=(0.17, 0.24),
                    eye_open=(0.85, 1.15), lower_lid=(0, 0.4)),
    "sad": dict(brow_inner=(0.1, 0.24), brow_outer=(-0.14, -0.03), brow_arch=(-0.03, 0.02), brow_gap=(0.14, 0.2),
                eye_open=(0.5, 0.85), lid_slope=(0.2, 0.6), lower_lid=(-0.1, 0.3)),
    "surprise": dict(brow_inner=(0.1, 0.22), brow_outer=(0.06, 0.18), brow_arch=(0.1, 0.2), brow_gap=(0.18, 0.26),
                     eye_open=(1.3, 1.7), lower_lid=(-0.5, 0), iris=(0.1, 0.125)),
}
MOUTHS: dict[str, list[Ranges]] = {
    "angry": [dict(mouth_width=(0.26, 0.38), mouth_curve=(-0.16, -0.04)),  # lips pressed together
              dict(mouth_width=(0.34, 0.46), mouth_curve=(-0.12, -0.02), mouth_open=(0.2, 0.34),  # teeth bared
                   mouth_square=(0.7, 1), teeth=(1, 1))],
    "disgust": [dict(mouth_width=(0.32, 0.42), mouth_curve=(-0.18, -0.06), mouth_open=(0.06, 0.16),  # lip raised
                     upper_share=(0.7, 0.9), sneer=(0.12, 0.24), mouth_wave=(0.02, 0.04), teeth=(0.3, 0.6)),
                dict(mouth_width=(0.32, 0.42), mouth_curve=(-0.2, -0.08), mouth_open=(0.14, 0.26),  # tongue out
                     upper_share=(0.6, 0.8), sneer=(0.02, 0.12), mouth_wave=(0.01, 0.03), tongue=(0.18, 0.3))],
    "fear": [dict(mouth_width=(0.36, 0.48), mouth_curve=(-0.14, -0.02), mouth_open=(0.18, 0.32),  # stretched open
                  mouth_square=(0.3, 0.9), mouth_wave=(0.02, 0.05), teeth=(0.2, 0.5)),
             dict(mouth_width=(0.38, 0.5), mouth_curve=(-0.12, 0), mouth_open=(0.14, 0.24),  # chattering teeth
                  mouth_square=(0.7, 1), mouth_wave=(0.03, 0.06), teeth=(1, 1))],
    "happy": [dict(mouth_width=(0.36, 0.54), mouth_curve=(0.14, 0.34)),  # a closed smile
              dict(mouth_width=(0.38, 0.54), mouth_curve=(0.14, 0.3), mouth_open=(0.14, 0.36),  # an open one
                   upper_share=(0, 0.1), teeth=(0.3, 0.7))],
    "neutral": [dict(mouth_width=(0.26, 0.42), mouth_curve=(-0.03, 0.05))],
    "sad": [dict(mouth_width=(0.26, 0.38), mouth_curve=(-0.32, -0.12), mouth_wave=(0, 0.02), tear=(0.7, 1.1)),
            dict(mouth_width=(0.26, 0.38), mouth_curve=(-0.32, -0.12), mouth_wave=(0, 0.02))],
    "surprise": [dict(mouth_width=(0.16, 0.28), mouth_open=(0.26, 0.56))],
}
# Everything that is independent of the expression. Shades are 0 (black) to 255 (white); shifts, size, widths and blur
# are in pixels of the finished image, angles in degrees, the rest in face coordinates.
LOOKS: Ranges = dict(
    shift_x=(-2.5, 2.5), shift_y=(-2, 2),  # of the head from the middle of the frame
    size=(16, 20.5),  # half the width of the head
    roll=(-13, 13), yaw=(-18, 18), pitch=(-9, 9),
    head_height=(1.08, 1.32), jaw=(0, 0.3),  # half the height; how much narrower the head is at the chin
    ear_size=(-0.2, 0.26),  # hidden if negative
    nose_style=("side", "base", "triangle"), hair_style=("bald", "short", "parted", "long", "curly", "hat"),
    hair_line=(0.64, 0.8),  # how far up the hair begins, as a share of head_height
    beard_style=("none", "none", "none", "none", "beard", "moustache"), glasses=("no", "no", "no", "no", "yes"),
    gaze=(-0.05, 0.05), brow_width=(1.3, 2.6), line_width=(0.8, 1.5), hair=(0, 255), shirt=(0, 255),
    background=(0, 255), background_style=("plain", "stripes", "blobs"), pattern=(0, 255),  # pattern: its second shade
    light_x=(-0.3, 0.3), light_y=(-0.3, 0.3),  # how much brighter the right and lower edges are than the middle
    contrast=(0.65, 1.1), brightness=(-25, 25), blur=(0, 0.55), noise=(2, 8),  # radius; standard deviation in shades
    skin=(115, 235), ink=(0, 40),  # pen on paper; the ink draws brows, lids, lips and folds
)
# fmt: on
CHALK_ON_SLATE: Ranges = dict(skin=(35, 95), ink=(180, 235))
CHALK_SHARE = 0.2  # of the images; with both, no brightness at a fixed place tells an emotion


def _draw_from(ranges: Ranges, rng: np.random.Generator) -> dict[str, float | str]:
    return {
        field: rng.choice(values) if isinstance(values[0], str) else rng.uniform(*values)
        for field, values in ranges.items()
    }


class _Pen:
    """Draws curves given in face coordinates onto an image, in the pose of a look."""

    def __init__(self, image: Image.Image, look: SimpleNamespace):
        self.draw = ImageDraw.Draw(image)
        self.look = look

    def to_pixels(self, x, y, flat: bool = False) -> list[tuple[float, float]]:
        """Features lie on an ellipsoid and turn with the head; `flat` points (outline, hair, ears) only roll."""
        look = self.look
        roll, yaw, pitch = np.radians([look.roll, look.yaw, look.pitch])
        x, y = np.asarray(x, float), np.asarray(y, float)
        if not flat:
            z = np.sqrt(np.clip(1 - x**2 - (y / look.head_height) ** 2, 0.05, 1))
            x, z = x * np.cos(yaw) + z * np.sin(yaw), z * np.cos(yaw) - x * np.sin(yaw)
            y = y * np.cos(pitch) + z * np.sin(pitch)
        x, y = x * np.cos(roll) - y * np.sin(roll), x * np.sin(roll) + y * np.cos(roll)
        x = (IMAGE_SIZE / 2 + look.shift_x + look.size * x) * SUPERSAMPLE
        y = (IMAGE_SIZE / 2 + look.shift_y + look.size * y) * SUPERSAMPLE
        return list(zip(x.tolist(), y.tolist(), strict=True))

    def line(self, x, y, shade: float, width: float, flat: bool = False) -> None:
        """A line with round ends; width in pixels of the finished image."""
        pixels = self.to_pixels(x, y, flat)
        width = round(width * SUPERSAMPLE)
        self.draw.line(pixels, fill=round(shade), width=width, joint="curve")
        for end in (pixels[0], pixels[-1]):
            self.draw.circle(end, width / 2, fill=round(shade))

    def faint_line(self, x, y, strength: float) -> None:
        """A thin line between skin (strength 0) and ink (1), for folds, noses and frames."""
        self.line(x, y, _mix(self.look.skin, self.look.ink, strength), 0.85)

    def fill(self, x, y, shade: float, outline: float = 0, flat: bool = False) -> None:
        """A filled shape; `outline` is the width of the line around it, in ink."""
        self.draw.polygon(self.to_pixels(x, y, flat), fill=round(shade))
        if outline:
            self.line(x, y, self.look.ink, outline, flat)

    def fill_between(self, x, top, bottom, shade: float) -> None:
        self.fill(np.append(x, x[::-1]), np.append(top, bottom[::-1]), shade)


def _mix(first, second, share):
    return first + (second - first) * share


def _ellipse(x: float, y: float, radius_x: float, radius_y: float) -> tuple[np.ndarray, np.ndarray]:
    angle = np.linspace(0, 2 * np.pi, 33)
    return x + radius_x * np.cos(angle), y + radius_y * np.sin(angle)


def _draw_background(draw: ImageDraw.ImageDraw, look: SimpleNamespace, rng: np.random.Generator) -> None:
    if look.background_style == "stripes":
        step = int(rng.integers(24, 48))
        for x in range(0, CANVAS_SIZE, 2 * step):
            draw.rectangle((x, 0, x + step, CANVAS_SIZE), fill=round(look.pattern))
    elif look.background_style == "blobs":
        for x, y, radius in rng.uniform((0, 0, 8), (CANVAS_SIZE, CANVAS_SIZE, 32), size=(6, 3)):
            draw.circle((x, y), radius, fill=round(look.pattern))


def _draw_head(pen: _Pen, look: SimpleNamespace) -> None:
    """Body, ears, skin, beard and hair: everything under the features."""
    angle = np.linspace(0, 2 * np.pi, 65)  # from the top clockwise
    y = -np.cos(angle)
    x, y = np.sin(angle) * (1 - look.jaw * np.clip(y, 0, None) ** 2), y * look.head_height
    pen.fill([-0.35, 0.35, 0.4, -0.4], [0.7, 0.7, 1.6, 1.6], _mix(look.skin, look.ink, 0.2), flat=True)
    pen.fill([-1.6, -0.5, 0.5, 1.6, 1.8, -1.8], [1.75, 1.4, 1.4, 1.75, 3, 3], look.shirt, flat=True)
    if look.hair_style == "long":
        pen.fill(1.2 * x, 1.2 * y, look.hair, flat=True)
        pen.fill([-1.2, 1.2, 1.1, -1.1], [0, 0, 1.2 * look.head_height, 1.2 * look.head_height], look.hair, flat=True)
    if look.hair_style == "curly":
        for i in range(-20, 21, 4):
            pen.fill(*_ellipse(x[i], y[i], 0.28, 0.28), look.hair, flat=True)
    if look.ear_size > 0:
        for side in (-1, 1):
            pen.fill(*_ellipse(side, 0.02, look.ear_size, 1.5 * look.ear_size), look.skin, look.line_width, flat=True)
    pen.fill(x, y, look.skin, flat=True)
    if look.beard_style == "beard":  # less dark than the ink, so that the mouth stays visible
        beard = np.append(x[20:45], _U * 0.85), np.append(y[20:45], 0.5 - 0.4 * _U**2)
        pen.fill(*beard, _mix(look.skin, look.ink, 0.4), flat=True)
    pen.line(x, y, _mix(look.skin, look.ink, 0.8), look.line_width, flat=True)
    if look.hair_style == "bald":
        return
    # Hair or a hat: from a little above the head down to the hair line, which turns with the head.
    line_y = -look.head_height * look.hair_line + 0.45 * np.abs(_U) ** 3
    if look.hair_style == "parted":
        line_y = line_y - 0.22 * np.exp(-(((_U - 0.35) / 0.25) ** 2)) + 0.05
    if look.hair_style == "hat":
        line_y = np.full_like(_U, -look.head_height * look.hair_line)
        pen.line([-1.3, 1.3], [line_y[0], line_y[0]], look.hair, 3, flat=True)
    top = np.r_[48:64, 0:17]  # left temple, over the top, to the right temple
    top = top[1.08 * y[top] < line_y[0]]
    hair_line = pen.to_pixels(0.97 * _U[::-1], line_y[::-1])
    pen.draw.polygon(pen.to_pixels(1.08 * x[top], 1.08 * y[top], flat=True) + hair_line, fill=round(look.hair))


def _draw_eyes(pen: _Pen, look: SimpleNamespace, expression: SimpleNamespace, tear_side: int) -> None:
    """Eyes, brows, glasses and a tear; `tear_side` is -1 or 1."""
    bump = _mix(1 - _U**2, np.sqrt(1 - _U**2), np.clip(expression.eye_open - 0.7, 0, 1))  # almond to round
    t = (_U + 1) / 2  # along the brow, inner end to outer end
    rise = _mix(expression.brow_inner, expression.brow_outer, t) + expression.brow_arch * 4 * t * (1 - t)
    for side in (-1, 1):
        x = side * EYE_X + EYE_HALF_WIDTH * _U
        bottom = EYE_Y + 0.15 * bump * (1 - expression.lower_lid)
        top = np.minimum(bottom, EYE_Y - 0.18 * bump * expression.eye_open * (1 - expression.lid_slope * side * _U))
        pen.fill_between(x, top, bottom, _mix(max(look.skin, 120), 255, 0.75))
        iris_x, iris_y = _ellipse(side * EYE_X + look.gaze, EYE_Y - 0.02, expression.iris, expression.iris)
        pen.fill(iris_x, np.clip(iris_y, np.interp(iris_x, x, top), np.interp(iris_x, x, bottom)), 15)
        pen.line(x, bottom, look.ink, 0.6 * look.line_width)
        pen.line(x, top, look.ink, 1.2 * look.line_width)
        pen.line(side * _mix(expression.brow_gap, 0.74, t), BROW_Y - rise, look.ink, look.brow_width)
        if look.glasses == "yes":
            pen.faint_line(*_ellipse(side * EYE_X, EYE_Y + 0.03, 0.38, 0.33), 0.6)
            pen.faint_line([0, side * 0.06], [EYE_Y, EYE_Y], 0.6)
    if expression.tear:
        drop = _ellipse(tear_side * (EYE_X + 0.08), EYE_Y + 0.36, 0.07 * expression.tear, 0.2 * expression.tear)
        pen.fill(*drop, 250, outline=0.5)


def _draw_nose(pen: _Pen, look: SimpleNamespace, expression: SimpleNamespace) -> None:
    """The nose and the folds around it."""
    bottom = NOSE_Y - 0.08 * expression.nose_wrinkle
    if look.nose_style == "side":
        pen.faint_line([0.0, 0.12, -0.04], [-0.05, bottom, bottom + 0.02], 0.8)
    elif look.nose_style == "triangle":
        pen.faint_line([-0.13, 0.0, 0.13, -0.13], [bottom, bottom - 0.2, bottom, bottom], 0.8)
    else:
        pen.faint_line(0.14 * _U, bottom + 0.06 * (1 - _U**2), 0.8)
    for side in (-1, 1):
        if expression.nose_wrinkle:  # flared nostrils, and folds across the bridge
            pen.faint_line([side * 0.16, side * 0.23, side * 0.2], bottom + np.array([-0.1, -0.02, 0.06]), 1)
            for y in (-0.2, -0.07):
                pen.faint_line([0, side * 0.13], [y, y - 0.1], expression.nose_wrinkle)
        if expression.furrow:
            pen.faint_line([side * 0.06, side * 0.05], [BROW_Y - 0.06, BROW_Y + 0.16], expression.furrow)
        if expression.cheek_fold:
            pen.faint_line([side * 0.26, side * 0.46, side * 0.54], [0.22, 0.36, 0.56], 0.7 * expression.cheek_fold)
        if look.beard_style == "moustache":
            pen.line([side * 0.04, side * 0.2, side * 0.4], [0.38, 0.38, 0.46], _mix(look.skin, look.ink, 0.5), 2.5)


def _draw_mouth(pen: _Pen, look: SimpleNamespace, expression: SimpleNamespace, side: int) -> None:
    """The mouth between an upper and a lower lip line; `side` (-1 or 1) is where the sneer goes."""
    x = expression.mouth_width * _U
    line = MOUTH_Y - expression.mouth_curve * (_U**2 - 0.5) + expression.mouth_wave * np.sin(3.5 * np.pi * _U)
    opening = expression.mouth_open * np.sqrt(1 - np.abs(_U) ** (2 + 4 * expression.mouth_square))
    sneer = expression.sneer * np.exp(-(((_U - 0.35 * side) / 0.35) ** 2))
    top = line - expression.upper_share * opening - sneer
    bottom = line + (1 - expression.upper_share) * opening
    if expression.mouth_open:
        pen.fill_between(x, top, bottom, 10)
        if expression.teeth:
            pen.fill_between(x, top, _mix(top, bottom, expression.teeth), 250)
        if expression.teeth >= 1:
            pen.line(x, (top + bottom) / 2, 10, 0.7)
            for i in range(4, 32, 4):
                pen.line([x[i], x[i]], [top[i], bottom[i]], 10, 0.5)
        pen.line(x, bottom, look.ink, look.line_width)
    pen.line(x, top, look.ink, 1.3 * look.line_width)
    if expression.tongue:
        tongue = _ellipse(0, MOUTH_Y + 0.06 + expression.tongue / 2, 0.17, 0.06 + expression.tongue / 2)
        pen.fill(*tongue, _mix(look.skin, 255, 0.35), outline=0.8)


def draw_face(emotion: str, rng: np.random.Generator) -> Image.Image:
    """Draw one face at random: a PIL image, mode L, 48x48. The same state of `rng` gives the same pixels."""
    mouth = MOUTHS[emotion][rng.integers(len(MOUTHS[emotion]))]
    expression = SimpleNamespace(**RELAXED | _draw_from(UPPER_FACES[emotion] | mouth, rng))
    ranges = LOOKS | CHALK_ON_SLATE if rng.random() < CHALK_SHARE else LOOKS
    look = SimpleNamespace(**_draw_from(ranges, rng))  # isn't told the emotion, so only the expression gives it away
    side = int(rng.choice([-1, 1]))  # for what is drawn on one side only
    image = Image.new("L", (CANVAS_SIZE, CANVAS_SIZE), round(look.background))
    pen = _Pen(image, look)
    _draw_background(pen.draw, look, rng)
    _draw_head(pen, look)
    _draw_nose(pen, look, expression)
    _draw_mouth(pen, look, expression, side)
    _draw_eyes(pen, look, expression, side)
    # Photograph the drawing: blur, reduce it to its final size, then light from one side, contrast and noise.
    image = image.filter(ImageFilter.GaussianBlur(look.blur * SUPERSAMPLE))
    pixels = np.asarray(image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX), dtype=np.float64)
    ramp = np.linspace(-1, 1, IMAGE_SIZE)
    pixels = pixels * (1 + look.light_x * ramp[None, :] + look.light_y * ramp[:, None])
    pixels = (pixels - 128) * look.contrast + 128 + look.brightness + rng.normal(0, look.noise, pixels.shape)
    return Image.fromarray(np.clip(pixels.round(), 0, 255).astype(np.uint8))


def draw_sample_set(
    output_dir: str | Path, *, train_per_class: int = 80, test_per_class: int = 20, seed: int = 0
) -> None:
    """Write `output_dir`/train and /test in ImageFolder form: a folder of 48x48 8-bit gray PNG files per emotion.

    Every image has a random stream of its own, made of (seed, split, class, number): the same seed gives the same
    pixels, and asking for more images doesn't change the others. Missing folders are created.
    """
    for split_index, (split, count) in enumerate({"train": train_per_class, "test": test_per_class}.items()):
        for class_index, emotion in enumerate(UPPER_FACES):
            folder = Path(output_dir, split, emotion)
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                rng = np.random.default_rng([seed, split_index, class_index, number])
                draw_face(emotion, rng).save(folder / f"{SAMPLE_PREFIX}{number:03d}.png", optimize=True)
