"""What holds for any input: InputSpec through a file, classes by name, augmentation at strength zero, decoding."""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data import list_images
from engine.augment import Strengths, augment
from errors import printable
from models import InputSpec
from preprocessing import normalize, read_image, to_input, to_uint8

NUMBERS = st.floats(-10, 10, allow_nan=False)
POSITIVE = st.floats(0.01, 10)
SIDES = st.integers(8, 64)
FOLDER_NAMES = st.lists(
    st.text("abcxyzÄß ", min_size=1, max_size=5).map(str.strip).filter(bool),
    min_size=1,
    max_size=6,
    unique_by=str.casefold,
)
fast = settings(deadline=None, max_examples=50)


@st.composite
def specs(draw, sizes=SIDES):
    channels = draw(st.sampled_from((1, 3)))
    mean, std = (tuple(draw(st.lists(kind, min_size=channels, max_size=channels))) for kind in (NUMBERS, POSITIVE))
    return InputSpec(draw(sizes), channels, mean, std, draw(st.booleans()) and channels == 3)


@fast
@given(specs(st.integers(8, 2048)))
def test_spec_survives_a_file(spec):
    assert InputSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def random_images(spec, seed):
    """uint8 (2, C, S, S), and the generator that drew them."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, spec.stored_channels, spec.image_size, spec.image_size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator), generator


@fast
@given(specs(), st.integers(0, 2**31))
def test_augmentation_of_no_strength_is_preprocessing_and_two_mirrors_are_none(spec, seed):
    images, generator = random_images(spec, seed)
    inputs = to_input(images, spec)
    assert torch.equal(augment(images, spec, Strengths(), generator), inputs)
    once = augment(images, spec, Strengths(flip=1.0), generator)
    largest = 1e-3 * (1 + max(map(abs, spec.mean))) / min(spec.std)
    assert torch.allclose(once.flip(-1), inputs, atol=largest)


@fast
@given(specs(), st.integers(0, 2**31))
def test_normalize_is_undone_by_its_inverse(spec, seed):
    images, _ = random_images(spec, seed)
    values = images / 255
    mean, std = (torch.tensor(numbers).view(1, -1, 1, 1) for numbers in (spec.mean, spec.std))
    assert torch.allclose(normalize(values, spec) * std + mean, values.expand(-1, spec.channels, -1, -1), atol=1e-4)
    assert torch.equal(to_uint8(to_input(images, spec), spec), images)


@fast
@given(FOLDER_NAMES, st.randoms(use_true_random=False))
def test_classes_are_matched_by_name_in_any_order(names, rng):
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            Path(folder, name).mkdir()
            Image.new("L", (8, 8)).save(Path(folder, name, "a.png"))
        order = rng.sample(names, len(names))
        found = {Path(image.path).parent.name: order[image.label] for image in list_images(folder, order)}
        assert found == {name: name for name in names}


@fast
@given(st.integers(1, 80), st.integers(1, 80), st.sampled_from(["L", "RGB", "RGBA", "LA", "P", "CMYK", "1"]), specs())
def test_any_image_becomes_what_the_spec_stores(width, height, mode, spec):
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 4), dtype=np.uint8)
    image = Image.fromarray(pixels, "RGBA")
    read = read_image((image.convert("RGB") if mode == "CMYK" else image).convert(mode), spec)
    assert read.shape == (spec.stored_channels, spec.image_size, spec.image_size) and read.dtype == np.uint8


@fast
@given(st.text())
def test_what_is_printed_has_no_control_characters(text):
    assert printable(text).isprintable()
