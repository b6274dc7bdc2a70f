"""What holds for any input: InputSpec through a file, normalization and back, decoding, printed names."""

import json

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from errors import printable
from models import InputSpec
from preprocessing import normalize, read_image, to_input, to_uint8

fast = settings(deadline=None, max_examples=50)


@st.composite
def specs(draw, largest=64):
    channels = draw(st.sampled_from((1, 3)))
    kinds = (st.floats(-10, 10), st.floats(0.01, 10))
    mean, std = (tuple(draw(st.lists(kind, min_size=channels, max_size=channels))) for kind in kinds)
    return InputSpec(draw(st.integers(8, largest)), channels, mean, std, draw(st.booleans()) and channels == 3)


@fast
@given(specs(2048))
def test_spec_survives_a_file(spec):
    assert InputSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@fast
@given(specs(), st.integers(0, 2**31))
def test_normalization_is_undone_by_its_inverse(spec, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (2, spec.stored_channels, spec.image_size, spec.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    mean, std = (torch.tensor(numbers).view(1, -1, 1, 1) for numbers in (spec.mean, spec.std))
    values = (images / 255).expand(-1, spec.channels, -1, -1)
    assert torch.allclose(normalize(images / 255, spec) * std + mean, values, atol=1e-4)
    assert torch.equal(to_uint8(to_input(images, spec), spec), images)


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
