"""Augmentation: the identity at strength zero, each strength within its range, and every wrong flag named."""

import math

import pytest
import torch
from conftest import refusal
from torch.nn import functional as F

from engine.augment import PRESETS, Strengths, affine_matrices, augment, parse_augment
from models import InputSpec
from preprocessing import to_input

GRAY = InputSpec(image_size=24)
COLOR = InputSpec(24, 3, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
GRAY3 = InputSpec(24, 3, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), gray=True)
UNIT = InputSpec(24, 1, (0.0,), (1.0,))  # its input is the brightness from 0 to 1


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(count=8, channels=1):
    return torch.randint(0, 256, (count, channels, 24, 24), dtype=torch.uint8, generator=seeded(9))


def squares(start, stop):
    """Black, and white from row and column `start` to `stop`."""
    images = torch.zeros(300, 1, 24, 24, dtype=torch.uint8)
    images[:, :, start:stop, start:stop] = 255
    return images


def white(count, channels=1):
    return torch.full((count, channels, 24, 24), 255, dtype=torch.uint8)


def matrices(count=1000, **strengths):
    return affine_matrices(torch.rand(8, count, generator=seeded()), Strengths(**strengths))


def warped(images, theta, size=24):
    grid = F.affine_grid(theta, [len(images), 1, size, size], align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


@pytest.mark.parametrize("spec, channels", [(GRAY, 1), (COLOR, 3), (COLOR, 1), (GRAY3, 1)])
def test_zero_strength_is_the_identity_to_the_bit(spec, channels):
    images = noise(channels=channels)
    out = augment(images, spec, Strengths(), seeded())
    assert torch.equal(out, to_input(images, spec)) and out.shape == (8, spec.channels, 24, 24)
    torch.testing.assert_close(matrices(10), torch.tensor([[1.0, 0, 0], [0, 1, 0]]).expand(10, 2, 3))


@pytest.mark.parametrize("name", ["light", "medium", "strong"])
@pytest.mark.parametrize("spec, channels", [(COLOR, 3), (COLOR, 1)])
def test_presets_change_images_but_not_their_input(name, spec, channels):
    images = noise(channels=channels)
    out = augment(images, spec, PRESETS[name], seeded())
    assert torch.equal(images, noise(channels=channels))
    assert out.shape == (8, spec.channels, 24, 24) and out.dtype == torch.float32 and torch.isfinite(out).all()
    assert not any(torch.equal(a, b) for a, b in zip(out, to_input(images, spec), strict=True))


def test_random_numbers_come_from_the_generator_alone():
    def draw(generator):
        return augment(noise(), GRAY, PRESETS["strong"], generator)

    state, generator = torch.get_rng_state(), seeded(5)
    first, second = draw(generator), draw(generator)
    assert torch.equal(first, draw(seeded(5))) and not torch.equal(first, draw(seeded(6)))
    assert not torch.equal(first, second)  # the next batch draws anew
    assert torch.equal(state, torch.get_rng_state())


def test_flip_mirrors_with_its_probability():
    images = noise(400)
    plain = to_input(images, GRAY)
    torch.testing.assert_close(augment(images, GRAY, Strengths(flip=1.0), seeded()), plain.flip(-1), rtol=0, atol=1e-5)
    out = augment(images, GRAY, Strengths(flip=0.5), seeded())
    mirrored, same = (((out - image).abs().amax((1, 2, 3)) < 1e-4).sum().item() for image in (plain.flip(-1), plain))
    assert mirrored + same == 400 and 150 < mirrored < 250


def test_brightness_is_a_factor_within_its_range():
    images = torch.linspace(20, 230, 64).byte().view(-1, 1, 1, 1).expand(64, 1, 24, 24)  # each of one brightness
    out = augment(images, UNIT, Strengths(brightness=0.3), seeded())
    assert out.max() <= 1 and (out.amax((1, 2, 3)) == out.amin((1, 2, 3))).all()  # one factor per image
    factor = (out / (images / 255))[:, 0, 0, 0][out[:, 0, 0, 0] < 1]  # of those that were not clipped
    assert 0.7 - 1e-5 <= factor.min() < 0.8 and 1.2 < factor.max() <= 1.3 + 1e-5


def test_contrast_is_a_factor_about_the_mean():
    pattern = torch.tensor([100, 140], dtype=torch.uint8).repeat(12).expand(64, 1, 24, 24)
    out = augment(pattern, UNIT, Strengths(contrast=0.5), seeded())
    torch.testing.assert_close(out.mean((1, 2, 3)), torch.full((64,), 120 / 255))
    factor = (out[:, 0, 0, 1] - out[:, 0, 0, 0]) / (40 / 255)
    assert 0.5 - 1e-4 <= factor.min() < 0.6 and 1.4 < factor.max() <= 1.5 + 1e-4
    out = augment(noise(64), UNIT, Strengths(brightness=1.0, contrast=1.0), seeded())
    assert out.min() >= 0 and out.max() <= 1


@pytest.mark.parametrize("text", ["translate=0.3", "rotation=45", "scale=0.5"])
def test_geometry_brings_in_exactly_the_mean(text):
    images = white(32, 3)
    out, plain = augment(images, COLOR, parse_augment(text), seeded()), to_input(images, COLOR)
    assert (out == 0).all(1).any((1, 2)).sum() >= 10  # images that show something from outside
    assert out.min() >= 0 and (out <= plain + 1e-4).all()  # between the mean and the image, on its edge
    assert ((out - plain).abs() < 1e-4).float().mean() > 0.25


def test_translation_moves_by_up_to_its_share():
    out = augment(squares(11, 13), UNIT, Strengths(translate=0.25), seeded())
    for axis in (2, 3):
        shift = (out.sum((1, 5 - axis)) * (torch.arange(24) + 0.5 - 12)).sum(1) / out.sum((1, 2, 3))
        assert 5 < shift.max() <= 6.01 and -5 > shift.min() >= -6.01 and shift.mean().abs() < 1


def test_scale_zooms_both_ways():
    side = augment(squares(6, 18), UNIT, Strengths(scale=0.3), seeded()).sum((1, 2, 3)).sqrt() / 12
    assert 0.65 < side.min() < 0.75 and 1.25 < side.max() < 1.35  # sampled, so not to the last digit


def test_crop_shows_at_least_its_share_and_nothing_from_outside():
    theta = matrices(4000, crop=0.4)
    width, height = theta[:, 0, 0], theta[:, 1, 1]
    assert (theta[:, 0, 1] == 0).all() and (theta[:, 1, 0] == 0).all()
    assert (width * height).min() >= 0.4 - 1e-5 and width.max() <= 1 and height.max() <= 1
    assert (width / height).min() >= 3 / 4 - 1e-5 and (width / height).max() <= 4 / 3 + 1e-5
    for size, shift in ((width, theta[:, 0, 2]), (height, theta[:, 1, 2])):
        assert (shift.abs() + size <= 1 + 1e-5).all() and shift.min() < -0.1 and shift.max() > 0.1


def test_window_cuts_out_a_part_at_the_same_scale():
    images = noise(64)
    assert augment(images, GRAY, Strengths(window=0.75), seeded()).shape == (64, 1, 18, 18)
    theta = matrices(window=0.75)
    assert theta[:, 0, 0].allclose(torch.tensor(0.75)) and theta[:, 1, 1].allclose(torch.tensor(0.75))
    shift = theta[:, :, 2]
    assert shift.abs().max() <= 0.25 and shift.max() > 0.24 and shift.min() < -0.24  # inside, up to every edge
    middle = affine_matrices(torch.full((8, 64), 0.5), Strengths(window=0.75))
    torch.testing.assert_close(warped(images.float(), middle, 18), images[:, :, 3:21, 3:21].float(), atol=0.01, rtol=0)


@pytest.mark.parametrize("drawn, quarters", [(1.0, 1), (0.0, -1)])
def test_rotation_by_a_known_angle(drawn, quarters):
    images, uniform = noise(3).float(), torch.full((8, 3), 0.5)
    uniform[0] = drawn  # from -90 to 90 degrees
    out = warped(images, affine_matrices(uniform, Strengths(rotation=90)))
    torch.testing.assert_close(out, torch.rot90(images, quarters, (2, 3)), rtol=0, atol=0.02)


def test_rotation_keeps_lengths_and_its_range():
    theta = matrices(rotation=20)[:, :, :2]
    torch.testing.assert_close(theta @ theta.transpose(1, 2), torch.eye(2).expand(1000, 2, 2))
    angle = torch.atan2(theta[:, 1, 0], theta[:, 0, 0]) * 180 / math.pi
    assert -20.01 < angle.min() < -18 and 18 < angle.max() < 20.01


def test_erasing_puts_rectangles_of_the_mean_with_its_probability():
    images = white(300, 3)
    out, kept = augment(images, COLOR, Strengths(erase=1.0), seeded()), to_input(images, COLOR)
    erased = out == 0
    assert torch.equal(torch.where(erased, kept, out), kept)  # the rest is as it was
    assert (erased.all(1) == erased.any(1)).all()  # in every channel alike
    for mask in erased[:50, 0]:
        rows, columns = mask.any(1), mask.any(0)
        assert torch.equal(mask, rows[:, None] & columns[None])
        assert all(line.int().diff().abs().sum() <= 2 for line in (rows, columns))  # in one piece
    share = erased[:, 0].float().mean((1, 2))
    assert share.max() < 0.4 and (share > 0).float().mean() > 0.95 and share.mean() > 0.05
    out = augment(white(1000), GRAY, Strengths(erase=0.25), seeded())
    assert 190 < (out == 0).any(3).any(2).any(1).sum() < 310


# The flag


def test_presets_and_names_with_strengths():
    assert all(parse_augment(name) is PRESETS[name] for name in PRESETS)
    assert parse_augment("flip=0") == Strengths()
    assert parse_augment(" flip , rotation=10,translate=0.1 ") == Strengths(flip=0.5, rotation=10, translate=0.1)
    every = "flip=0.4,rotation=10,translate=0.1,scale=0.1,brightness=0.2,contrast=0.2,crop=0.8,erase=0.25,window=0.9"
    assert parse_augment(every) == Strengths(0.4, 10, 0.1, 0.1, 0.8, 0.9, 0.2, 0.2, 0.25)


KNOWN = ("flip", "rotation", "translate", "scale", "crop", "window", "brightness", "contrast", "erase")
UNKNOWN_NAMES = ("", "flipp", "light,flip", "flip,,erase=0.1", "Flip", "=1", "scale=0,1")
NO_NUMBERS = ("rotation", "rotation=", "erase=a", "crop=0.8=1", "flip=yes")
OUT_OF_RANGE = [f"{name}={value}" for name in KNOWN for value in ("-0.1", "181", "nan", "inf")]
OUT_OF_RANGE += ["crop=0", "scale=1", "window=0.4", "flip=1.01", "translate=1.5"]  # nothing would be left


@pytest.mark.parametrize(
    "text, words",
    [
        *[(text, (*KNOWN, *PRESETS)) for text in UNKNOWN_NAMES],
        *[(text, ("--augment",)) for text in NO_NUMBERS],
        *[(text, (text.partition("=")[0], "must be from")) for text in OUT_OF_RANGE],
    ],
)
def test_mistakes_are_refused_with_what_is_known(text, words):
    message = refusal(parse_augment, text)
    assert all(word in message for word in ("--augment", *words))
