import math

import pytest
import torch

from engine.augment import PRESETS, Strengths, affine_matrices, augment, parse_augment
from errors import InputError
from models import InputSpec
from preprocessing import to_input

GRAY = InputSpec(image_size=24)
COLOUR = InputSpec(24, 3, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
GRAY3 = InputSpec(24, 3, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), gray=True)
UNIT = InputSpec(24, 1, (0.0,), (1.0,))  # its input is the brightness from 0 to 1


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(count=8, channels=1, size=24):
    return torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8, generator=seeded(9))


def smooth(count=64, size=24):
    """Pictures of one brightness each, from 20 to 230."""
    return torch.linspace(20, 230, count).byte().view(-1, 1, 1, 1).expand(count, 1, size, size).contiguous()


@pytest.mark.parametrize("spec, channels", [(GRAY, 1), (COLOUR, 3), (COLOUR, 1), (GRAY3, 1)])
def test_zero_strength_is_the_identity_to_the_bit(spec, channels):
    images = noise(channels=channels)
    out = augment(images, spec, Strengths(), seeded())
    assert torch.equal(out, to_input(images, spec)) and out.shape == (8, spec.channels, 24, 24)


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "none"])
@pytest.mark.parametrize("spec, channels", [(GRAY, 1), (COLOUR, 3), (COLOUR, 1)])
def test_presets_change_pictures_but_not_their_input(name, spec, channels):
    images = noise(channels=channels)
    before = images.clone()
    out = augment(images, spec, PRESETS[name], seeded())
    assert torch.equal(images, before)
    assert out.shape == (8, spec.channels, 24, 24) and out.dtype == torch.float32 and torch.isfinite(out).all()
    assert not any(torch.equal(a, b) for a, b in zip(out, to_input(images, spec), strict=True))


def test_random_numbers_come_from_the_generator_alone():
    images, strengths = noise(), PRESETS["strong"]
    torch.manual_seed(1)
    first = augment(images, GRAY, strengths, seeded(5))
    torch.manual_seed(2)
    assert torch.equal(first, augment(images, GRAY, strengths, seeded(5)))
    assert not torch.equal(first, augment(images, GRAY, strengths, seeded(6)))
    state = torch.get_rng_state()
    augment(images, GRAY, strengths, seeded(5))
    assert torch.equal(state, torch.get_rng_state())
    generator = seeded(5)
    augment(images, GRAY, strengths, generator)
    assert not torch.equal(first, augment(images, GRAY, strengths, generator))  # the next batch draws anew


def test_pictures_of_a_batch_draw_their_own_values():
    images = noise(1).expand(16, -1, -1, -1)
    for text in ("rotation=30", "translate=0.3", "scale=0.4", "crop=0.5", "brightness=0.5", "contrast=0.5"):
        out = augment(images, GRAY, parse_augment(text), seeded())
        assert len({tuple(picture.flatten().tolist()) for picture in out}) == 16, text


@pytest.mark.parametrize("size", [24, 25])
def test_flip_of_one_is_the_mirror_image(size):
    images = noise(size=size)
    out = augment(images, GRAY, Strengths(flip=1.0), seeded())
    torch.testing.assert_close(out, to_input(images, GRAY).flip(-1), rtol=0, atol=1e-5)


def test_flip_of_a_half_mirrors_about_half():
    images = noise(400)
    out, plain = augment(images, GRAY, Strengths(flip=0.5), seeded()), to_input(images, GRAY)
    mirrored = ((out - plain.flip(-1)).abs().amax((1, 2, 3)) < 1e-4).sum().item()
    same = ((out - plain).abs().amax((1, 2, 3)) < 1e-4).sum().item()
    assert mirrored + same == 400 and 150 < mirrored < 250


def test_brightness_is_a_factor_within_its_range():
    images = smooth()
    out = augment(images, UNIT, Strengths(brightness=0.3), seeded())
    factor = (out / (images / 255))[:, 0, 0, 0]
    inside = out[:, 0, 0, 0] < 1  # where nothing was cut off
    assert out.min() >= 0 and out.max() <= 1
    assert factor[inside].min() >= 0.7 - 1e-5 and factor[inside].max() <= 1.3 + 1e-5
    assert factor[inside].min() < 0.8 and factor[inside].max() > 1.2
    assert (out.amax((1, 2, 3)) == out.amin((1, 2, 3))).all()  # one factor a picture


def test_contrast_is_a_factor_about_the_mean():
    pattern = torch.tensor([100, 140], dtype=torch.uint8).repeat(12).expand(64, 1, 24, 24).contiguous()
    out = augment(pattern, UNIT, Strengths(contrast=0.5), seeded())
    torch.testing.assert_close(out.mean((1, 2, 3)), torch.full((64,), 120 / 255))
    factor = (out[:, 0, 0, 1] - out[:, 0, 0, 0]) / (40 / 255)
    assert 0.5 - 1e-4 <= factor.min() < 0.6 and 1.4 < factor.max() <= 1.5 + 1e-4


def test_contrast_and_brightness_stay_in_range():
    out = augment(noise(64), UNIT, Strengths(brightness=1.0, contrast=1.0), seeded())
    assert out.min() >= 0 and out.max() <= 1


@pytest.mark.parametrize("text", ["translate=0.3", "rotation=45", "scale=0.5"])
@pytest.mark.parametrize("spec, channels", [(GRAY, 1), (COLOUR, 3)])
def test_geometry_brings_in_exactly_the_mean(text, spec, channels):
    images = torch.full((32, channels, 24, 24), 255, dtype=torch.uint8)
    out = augment(images, spec, parse_augment(text), seeded())
    inside = to_input(images[:1], spec)[0, :, 0, 0]
    zeros = (out == 0).all(1)
    assert zeros.any((1, 2)).sum() >= 10  # pictures that show something from outside
    for channel, value in enumerate(inside):
        values = out[:, channel]
        assert values.min() >= 0 and values.max() <= value + 1e-4  # between the mean and the picture, on its edge
        assert ((values - value).abs() < 1e-4).sum() > values.numel() / 4


def test_translation_moves_by_up_to_its_share():
    images = torch.zeros(300, 1, 24, 24, dtype=torch.uint8)
    images[:, :, 11:13, 11:13] = 255
    out = augment(images, UNIT, Strengths(translate=0.25), seeded())
    position = torch.arange(24) + 0.5 - 12
    weight = out.sum((1, 2, 3))
    for axis in (2, 3):
        other = (1, 5 - axis)
        shift = (out.sum(other) * position).sum(1) / weight
        assert 5 < shift.max() <= 6.01 and -5 > shift.min() >= -6.01 and shift.mean().abs() < 1


def test_scale_zooms_both_ways():
    images = torch.zeros(300, 1, 24, 24, dtype=torch.uint8)
    images[:, :, 6:18, 6:18] = 255
    side = augment(images, UNIT, Strengths(scale=0.3), seeded()).sum((1, 2, 3)).sqrt() / 12
    assert 0.65 < side.min() < 0.75 and 1.25 < side.max() < 1.35  # sampled, so not to the last digit
    zoom = 1 / affine_matrices(torch.rand(8, 1000, generator=seeded()), Strengths(scale=0.3))[:, 0, 0]
    assert 0.7 - 1e-5 <= zoom.min() < 0.71 and 1.29 < zoom.max() <= 1.3 + 1e-5


def test_crop_shows_only_what_is_inside():
    images = torch.full((64, 1, 24, 24), 255, dtype=torch.uint8)
    out = augment(images, GRAY, Strengths(crop=0.3), seeded())
    inner = out[:, :, 1:-1, 1:-1]
    assert out.shape == (64, 1, 24, 24) and (inner - 1).abs().max() < 1e-4
    assert (out >= 0).all()


def test_crop_keeps_at_least_its_share_and_moves():
    uniform = torch.rand(8, 4000, generator=seeded())
    theta = affine_matrices(uniform, Strengths(crop=0.4))
    width, height = theta[:, 0, 0], theta[:, 1, 1]
    assert (theta[:, 0, 1] == 0).all() and (theta[:, 1, 0] == 0).all()
    assert (width * height).min() >= 0.4 - 1e-5 and width.max() <= 1 and height.max() <= 1
    ratio = width / height
    assert ratio.min() >= 3 / 4 - 1e-5 and ratio.max() <= 4 / 3 + 1e-5
    for size, shift in ((width, theta[:, 0, 2]), (height, theta[:, 1, 2])):
        assert (shift.abs() + size <= 1 + 1e-5).all()  # the window stays inside
        assert shift.min() < -0.1 and shift.max() > 0.1


def test_window_cuts_out_a_part_at_the_same_scale():
    images = torch.randint(0, 256, (64, 1, 24, 24), dtype=torch.uint8, generator=seeded())
    out = augment(images, GRAY, Strengths(window=0.75), seeded())
    assert out.shape == (64, 1, 18, 18)
    theta = affine_matrices(torch.rand(8, 500, generator=seeded()), Strengths(window=0.75))
    assert theta[:, 0, 0].allclose(torch.tensor(0.75)) and theta[:, 1, 1].allclose(torch.tensor(0.75))
    reach = theta[:, :, 2].abs()
    assert reach.max() <= 0.25 and reach.max() > 0.24 and theta[:, :, 2].min() < -0.24  # inside, up to every edge


def test_window_without_a_shift_is_the_middle():
    images = torch.randint(0, 256, (1, 1, 24, 24), dtype=torch.uint8, generator=seeded())
    half = torch.full((8, 1), 0.5)
    grid = torch.nn.functional.affine_grid(
        affine_matrices(half, Strengths(window=0.75)), [1, 1, 18, 18], align_corners=False
    )
    seen = torch.nn.functional.grid_sample(images.float(), grid, align_corners=False)
    torch.testing.assert_close(seen, images[:, :, 3:21, 3:21].float(), atol=0.01, rtol=0)


def test_crop_of_one_is_the_identity():
    theta = affine_matrices(torch.rand(8, 10, generator=seeded()), Strengths(crop=1.0))
    torch.testing.assert_close(theta, torch.tensor([[1.0, 0, 0], [0, 1, 0]]).expand(10, 2, 3))


def warped(images, theta):
    grid = torch.nn.functional.affine_grid(theta, list(images.shape), align_corners=False)
    return torch.nn.functional.grid_sample(images, grid, align_corners=False)


@pytest.mark.parametrize("drawn, quarters", [(1.0, 1), (0.0, -1), (0.5, 0)])
def test_rotation_by_a_known_angle(drawn, quarters):
    images = noise(3).float()
    uniform = torch.full((8, 3), 0.5)
    uniform[0] = drawn  # from -90 to 90 degrees
    theta = affine_matrices(uniform, Strengths(rotation=90))
    torch.testing.assert_close(warped(images, theta), torch.rot90(images, quarters, (2, 3)), rtol=0, atol=0.02)


def test_rotation_keeps_angles_and_lengths():
    theta = affine_matrices(torch.rand(8, 500, generator=seeded()), Strengths(rotation=20))[:, :, :2]
    torch.testing.assert_close(theta @ theta.transpose(1, 2), torch.eye(2).expand(500, 2, 2))
    angle = torch.atan2(theta[:, 1, 0], theta[:, 0, 0]) * 180 / math.pi
    assert -20.01 < angle.min() < -18 and 18 < angle.max() < 20.01


def test_erasing_puts_rectangles_of_the_mean():
    images = torch.full((300, 3, 24, 24), 255, dtype=torch.uint8)
    out = augment(images, COLOUR, Strengths(erase=1.0), seeded())
    kept = to_input(images[:1], COLOUR)
    erased = out == 0
    assert torch.equal(torch.where(erased, kept, out), kept.expand_as(out))  # the rest is as it was
    assert (erased.all(1) == erased.any(1)).all()  # in every channel alike
    for mask in erased[:50, 0]:
        rows, columns = mask.any(1), mask.any(0)
        assert torch.equal(mask, rows[:, None] & columns[None])
        for line in (rows, columns):
            assert line.int().diff().abs().sum() <= 2  # in one piece
    share = erased[:, 0].float().mean((1, 2))
    assert share.max() < 0.4 and (share > 0).float().mean() > 0.95 and share.mean() > 0.05


def test_erasing_happens_with_its_probability():
    images = torch.full((1000, 1, 24, 24), 255, dtype=torch.uint8)
    out = augment(images, GRAY, Strengths(erase=0.25), seeded())
    assert 190 < (out == 0).any(3).any(2).any(1).sum() < 310


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_by_name(name):
    assert parse_augment(name) is PRESETS[name]


def test_names_with_strengths():
    assert parse_augment("flip") == Strengths(flip=0.5)
    assert parse_augment(" flip , rotation=10,translate=0.1 ") == Strengths(flip=0.5, rotation=10, translate=0.1)
    every = "flip=0.4,rotation=10,translate=0.1,scale=0.1,brightness=0.2,contrast=0.2,crop=0.8,erase=0.25,window=0.9"
    assert parse_augment(every) == Strengths(0.4, 10, 0.1, 0.1, 0.8, 0.9, 0.2, 0.2, 0.25)


def test_flip_of_zero_is_zero():
    assert parse_augment("flip=0") == Strengths()


KNOWN = ("flip", "rotation", "translate", "scale", "crop", "window", "brightness", "contrast", "erase")


@pytest.mark.parametrize("text", ["", ",", "flipp", "light,flip", "flip,,erase=0.1", "hue=0.1", "Flip", "=1"])
def test_unknown_names_are_refused_with_all_that_are_known(text):
    with pytest.raises(InputError) as caught:
        parse_augment(text)
    message = str(caught.value)
    assert "--augment" in message and "\n" not in message
    assert all(name in message for name in (*KNOWN, *PRESETS))


@pytest.mark.parametrize("text", ["rotation", "rotation=", "erase=a", "crop=0.8=1", "flip=yes", "scale=0,1"])
def test_what_is_no_number_is_refused(text):
    with pytest.raises(InputError) as caught:
        parse_augment(text)
    assert "--augment" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("value", ["-0.1", "181", "nan", "inf", "-inf"])
def test_strengths_out_of_range_are_refused_with_the_range(name, value):
    with pytest.raises(InputError) as caught:
        parse_augment(f"{name}={value}")
    message = str(caught.value)
    assert name in message and "from" in message and "\n" not in message


@pytest.mark.parametrize("text", ["crop=0", "scale=1", "window=0.4", "flip=1.01", "translate=1.5"])
def test_strengths_at_which_nothing_would_be_left_are_refused(text):
    with pytest.raises(InputError, match="must be from"):
        parse_augment(text)
