"""Augmentation: the identity at strength zero, each strength within its range, and every wrong flag named."""

from dataclasses import replace

import pytest
import torch
from conftest import refusal
from pytest import approx
from torch.nn import functional as F

from engine.augment import PRESETS, Strengths, affine_matrices, augment, parse_augment
from models import InputSpec
from preprocessing import to_input

KNOWN = (
    *("flip", "rotation", "translate", "scale", "crop", "window"),
    *("brightness", "contrast", "gamma", "blur", "noise", "erase"),
)
GRAY = InputSpec(image_size=24)
COLOR = InputSpec(24, 3, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
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


def matrices(**strengths):
    return affine_matrices(torch.rand(8, 1000, generator=seeded()), Strengths(**strengths))


def warped(images, theta, size=24):
    grid = F.affine_grid(theta, [len(images), 1, size, size], align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


@pytest.mark.parametrize("spec, channels", [(GRAY, 1), (COLOR, 3), (COLOR, 1), (replace(COLOR, gray=True), 1)])
def test_presets_change_every_image_and_zero_strength_none(spec, channels):
    images = noise(channels=channels)
    plain = to_input(images, spec)
    assert torch.equal(augment(images, spec, Strengths(), seeded()), plain)
    for name in ("light", "medium", "strong"):
        out = augment(images, spec, PRESETS[name], seeded())
        assert out.shape == (8, spec.channels, 24, 24) and out.dtype == torch.float32 and torch.isfinite(out).all()
        assert not any(torch.equal(a, b) for a, b in zip(out, plain, strict=True))
    assert torch.equal(images, noise(channels=channels))  # their input stays
    torch.testing.assert_close(matrices(), torch.eye(2, 3).expand(1000, 2, 3))


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


def test_brightness_and_contrast_are_factors_within_their_range():
    images = torch.linspace(20, 230, 64).byte().view(-1, 1, 1, 1).expand(64, 1, 24, 24)  # each of one brightness
    out = augment(images, UNIT, Strengths(brightness=0.3), seeded())
    assert out.max() <= 1 and (out.amax((1, 2, 3)) == out.amin((1, 2, 3))).all()  # one factor per image
    factor = (out / (images / 255))[:, 0, 0, 0][out[:, 0, 0, 0] < 1]  # of those that were not clipped
    assert 0.7 - 1e-5 <= factor.min() < 0.8 and 1.2 < factor.max() <= 1.3 + 1e-5
    pattern = torch.tensor([100, 140], dtype=torch.uint8).repeat(12).expand(64, 1, 24, 24)
    out = augment(pattern, UNIT, Strengths(contrast=0.5), seeded())
    torch.testing.assert_close(out.mean((1, 2, 3)), torch.full((64,), 120 / 255))  # about the mean
    factor = (out[:, 0, 0, 1] - out[:, 0, 0, 0]) / (40 / 255)
    assert 0.5 - 1e-4 <= factor.min() < 0.6 and 1.4 < factor.max() <= 1.5 + 1e-4
    out = augment(noise(64), UNIT, Strengths(brightness=1.0, contrast=1.0), seeded())
    assert out.min() >= 0 and out.max() <= 1


def test_gamma_is_an_exponent_within_its_range():
    images = torch.full((200, 1, 24, 24), 64, dtype=torch.uint8)
    out = augment(images, UNIT, Strengths(gamma=0.5), seeded())
    assert (out.amax((1, 2, 3)) == out.amin((1, 2, 3))).all()
    gamma = out[:, 0, 0, 0].log() / torch.tensor(64 / 255).log()
    assert 0.606 < gamma.min() < 0.63 and 1.6 < gamma.max() < 1.649
    assert (gamma < 1).float().mean() == approx(0.5, abs=0.1)
    for value in (0, 255):
        assert (augment(torch.full_like(images, value), UNIT, Strengths(gamma=0.5), seeded()) == value / 255).all()


def test_blur_is_gaussian_up_to_its_strength_and_mostly_little():
    images = torch.zeros(300, 3, 24, 24, dtype=torch.uint8)
    images[:, 1, 12, 12] = 255
    out = augment(images, InputSpec(24, 3, (0.0,) * 3, (1.0,) * 3), Strengths(blur=1.0), seeded())
    assert out[:, 0].abs().max() == out[:, 2].abs().max() == 0  # channels stay apart
    torch.testing.assert_close(out.sum((1, 2, 3)), torch.ones(300))
    offsets = torch.arange(24.0) - 12
    sigma = (out[:, 1].sum(1) * offsets**2).sum(1).sqrt()
    assert 0.9 < sigma.max() <= 1 and (sigma > 0.7).float().mean() == approx(0.16, abs=0.06)
    torch.testing.assert_close(out[:, 1], out[:, 1].mT)
    flat = torch.full((8, 3, 24, 24), 255, dtype=torch.uint8)
    torch.testing.assert_close(augment(flat, COLOR, Strengths(blur=3.0), seeded()), to_input(flat, COLOR))


@pytest.mark.parametrize("spec, channels", [(UNIT, 1), (COLOR, 3), (replace(COLOR, gray=True), 1)])
def test_noise_is_up_to_its_strength_and_mostly_little(spec, channels):
    images = torch.full((400, channels, 24, 24), 128, dtype=torch.uint8)
    out = augment(images, spec, Strengths(noise=0.2), seeded())
    noise = (out - to_input(images, spec)) * torch.tensor(spec.std).view(-1, 1, 1)  # as a share of black to white
    sigma = noise.std((1, 2, 3))
    assert sigma.max() == approx(0.2, abs=0.02) and sigma.min() < 0.001 and sigma.median() == approx(0.05, abs=0.015)
    assert noise.mean().abs() < 0.001
    first, last = noise[:, 0], noise[:, -1]
    assert spec == UNIT or torch.allclose(first, last, atol=1e-6) == (channels == 1)  # a gray image stays gray


@pytest.mark.parametrize("text", ["translate=0.3", "rotation=45", "scale=0.5"])
def test_geometry_brings_in_exactly_the_mean(text):
    images = torch.full((32, 3, 24, 24), 255, dtype=torch.uint8)
    out, plain = augment(images, COLOR, parse_augment(text), seeded()), to_input(images, COLOR)
    assert (out == 0).all(1).any((1, 2)).sum() >= 10  # images that show something from outside
    assert out.min() >= 0 and (out <= plain + 1e-4).all()  # between the mean and the image, on its edge
    assert ((out - plain).abs() < 1e-4).float().mean() > 0.25


def test_translation_and_scale_go_both_ways_up_to_their_share():
    out = augment(squares(11, 13), UNIT, Strengths(translate=0.25), seeded())
    for axis in (2, 3):
        shift = (out.sum((1, 5 - axis)) * (torch.arange(24) + 0.5 - 12)).sum(1) / out.sum((1, 2, 3))
        assert 5 < shift.max() <= 6.01 and -5 > shift.min() >= -6.01 and shift.mean().abs() < 1
    side = augment(squares(6, 18), UNIT, Strengths(scale=0.3), seeded()).sum((1, 2, 3)).sqrt() / 12
    assert 0.65 < side.min() < 0.75 and 1.25 < side.max() < 1.35  # sampled, so not to the last digit


def test_crop_shows_at_least_its_share_and_nothing_from_outside():
    theta = matrices(crop=0.4)
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


def test_rotation_by_known_angles_within_its_range():
    images = noise(3).float()
    for drawn, quarters in ((1.0, 1), (0.0, -1)):  # from -90 to 90 degrees
        uniform = torch.full((8, 3), 0.5)
        uniform[0] = drawn
        out = warped(images, affine_matrices(uniform, Strengths(rotation=90)))
        torch.testing.assert_close(out, torch.rot90(images, quarters, (2, 3)), rtol=0, atol=0.02)
    theta = matrices(rotation=20)[:, :, :2]
    torch.testing.assert_close(theta @ theta.transpose(1, 2), torch.eye(2).expand(1000, 2, 2))
    angle = torch.atan2(theta[:, 1, 0], theta[:, 0, 0]).rad2deg()
    assert -20.01 < angle.min() < -18 and 18 < angle.max() < 20.01


def test_erasing_puts_rectangles_of_the_mean_with_its_probability():
    images = torch.full((300, 3, 24, 24), 255, dtype=torch.uint8)
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
    out = augment(images[:, :1], GRAY, Strengths(erase=0.25), seeded())
    assert 50 < (out == 0).any(3).any(2).sum() < 100


def test_presets_and_names_with_strengths():
    assert all(parse_augment(name) is PRESETS[name] for name in PRESETS)
    assert parse_augment("flip=0") == Strengths()
    assert parse_augment(" flip , rotation=10,translate=0.1 ") == Strengths(flip=0.5, rotation=10, translate=0.1)
    every = "flip=0.4,rotation=10,translate=0.1,scale=0.1,brightness=0.2,contrast=0.2,crop=0.8,erase=0.25,window=0.9"
    every += ",gamma=0.3,blur=0.1,noise=0.04"
    assert parse_augment(every) == Strengths(0.4, 10, 0.1, 0.1, 0.8, 0.9, 0.2, 0.2, 0.3, 0.1, 0.04, 0.25)


def test_mistakes_are_refused_with_what_is_known():
    for text in ("", "flipp", "light,flip", "flip,,erase=0.1", "Flip", "=1", "scale=0,1"):
        message = refusal(parse_augment, text)
        assert all(word in message for word in ("--augment", *KNOWN, *PRESETS))
    for text in ("rotation", "rotation=", "erase=a", "crop=0.8=1", "flip=yes"):
        assert "--augment" in refusal(parse_augment, text)
    limits = ["crop=0", "scale=1", "window=0.4", "flip=1.01", "translate=1.5"]  # nothing would be left
    for text in [*limits, *(f"{name}={value}" for name in KNOWN for value in ("-0.1", "181", "nan", "inf"))]:
        assert f"--augment: {text.partition('=')[0]} must be from" in refusal(parse_augment, text)
