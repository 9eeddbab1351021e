"""Broken if this fails: the model sees other pixels than openpi's client would have sent it."""

from pathlib import Path

import jax
import matplotlib.cbook
import numpy as np
from PIL import Image
import pytest

from openpi_ar.data.robot import to_uint8_image
from openpi_ar.errors import UserError
from openpi_ar.images import resize_with_pad, resize_with_pad_on_device

GOLDEN = Path(__file__).parents[1] / "golden" / "resize.npz"


def photograph() -> np.ndarray:
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
        return np.asarray(Image.open(file).convert("RGB"))


def resample(x: np.ndarray, size: int) -> np.ndarray:
    """Pillow's bilinear filter along axis 0, in its 22-bit fixed point: triangle as wide as the reduction, 8-bit
    result."""
    scale = len(x) / size
    width = max(scale, 1.0)
    out = np.empty((size, *x.shape[1:]), np.uint8)
    for i in range(size):
        center = (i + 0.5) * scale
        low, high = max(int(center - width + 0.5), 0), min(int(center + width + 0.5), len(x))
        weights = np.maximum(0, 1 - np.abs((np.arange(low, high) - center + 0.5) / width))
        fixed = np.floor(weights / weights.sum() * 2**22 + 0.5).astype(np.int64)
        out[i] = np.clip((np.tensordot(fixed, x[low:high].astype(np.int64), 1) + 2**21) >> 22, 0, 255)
    return out


def oracle(x: np.ndarray, height: int, width: int) -> np.ndarray:
    """Columns, then rows, then black borders, the odd one right and below."""
    ratio = max(x.shape[1] / width, x.shape[0] / height)
    h, w = int(x.shape[0] / ratio), int(x.shape[1] / ratio)
    small = resample(resample(x.swapaxes(0, 1), w).swapaxes(0, 1), h)
    top, left = (height - h) // 2, (width - w) // 2
    return np.pad(small, [(top, height - h - top), (left, width - w - left), (0, 0)])


@pytest.mark.parametrize("size", [(224, 224), (384, 384), (64, 64), (120, 200), (37, 53), (640, 700)])
@pytest.mark.parametrize("view", ["portrait", "landscape", "square"])
def test_photograph_to_the_bit(view, size):
    image = photograph()
    image = {"portrait": image, "landscape": image[40:340], "square": image[:512]}[view]
    np.testing.assert_array_equal(resize_with_pad(image, *size), oracle(image, *size))


def test_openpi_clients_own_pixels():
    golden = np.load(GOLDEN)
    names = [name for name in golden.files if name.startswith("client_")]
    assert len(names) == 3
    for name in names:
        want = golden[name]
        np.testing.assert_array_equal(resize_with_pad(golden["photo"], *want.shape[:2]), want)


def test_openpis_jax_version_is_a_rounding_away():
    """openpi resizes on the client and the server with Pillow; its jax version, never reached at the right size, rounds
    once."""
    golden = np.load(GOLDEN)
    ours, want = resize_with_pad(golden["jax_in"], 28, 28).astype(int), golden["jax_28x28"]
    assert 0 < np.abs(ours - want).max() <= 1


def test_other_ways_to_shrink_are_far_off():
    image = photograph()[:512]
    ours = resize_with_pad(image, 224, 224).astype(int)
    for filt in (Image.Resampling.NEAREST, Image.Resampling.BICUBIC):
        other = np.asarray(Image.fromarray(image).resize((224, 224), filt)).astype(int)
        assert np.abs(ours - other).max() > 15


SLIVERS = [(1, 500), (500, 1), (1, 1)]


@pytest.mark.parametrize("shape", SLIVERS)
def test_slivers_keep_at_least_a_pixel(shape):
    out = resize_with_pad(np.full((*shape, 3), 255, np.uint8), 32, 32)
    assert out.shape == (32, 32, 3) and out.any()


def test_resize_keeps_the_aspect_and_centres():
    image = np.full((20, 40, 3), 200, np.uint8)
    out = resize_with_pad(image, 32, 32)
    assert out.shape == (32, 32, 3)
    assert (out[8:24] == 200).all() and not out[:8].any() and not out[24:].any()
    assert resize_with_pad(image, 20, 40) is image


@pytest.mark.parametrize("size", [(480, 640), (600, 300), (30, 50), *SLIVERS])
def test_the_device_makes_the_same_bytes(size):
    """Reduced and enlarged, both aspects, two images at once."""
    images = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
    ours = jax.jit(lambda x: resize_with_pad_on_device(x, 56, 84))(images)
    assert ours.dtype == np.uint8
    np.testing.assert_array_equal(ours, [resize_with_pad(image, 56, 84) for image in images])


def test_floats_and_channels_first_are_what_openpi_makes_of_them():
    image = photograph()[:40, :50]
    chw = image.transpose(2, 0, 1)
    np.testing.assert_array_equal(to_uint8_image(image, "front"), image)
    np.testing.assert_array_equal(to_uint8_image(chw, "front"), image)
    unit = chw.astype(np.float32) / 255
    # Cut off, not rounded, as openpi: 255 * (n / 255) may fall just short of n.
    np.testing.assert_array_equal(to_uint8_image(unit, "front"), (255 * unit).astype(np.uint8).transpose(1, 2, 0))
    assert np.abs(to_uint8_image(unit, "front").astype(int) - image).max() <= 1
    assert to_uint8_image(np.full((4, 4, 3), 1 + 1e-6), "front").min() == 255


@pytest.mark.parametrize("bad", [-0.2, 1.5, 255.0, np.nan])
def test_floats_of_another_scale_are_refused_by_camera(bad):
    """openpi would wrap them around to noise."""
    image = np.full((4, 4, 3), 0.5, np.float32)
    image[0, 0] = bad
    with pytest.raises(UserError, match=r"^front: .*\[0, 1\].*divide by 255"):
        to_uint8_image(image, "front")
