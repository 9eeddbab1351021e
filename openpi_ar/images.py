"""Images of any size to the model's: bilinear, aspect kept, black borders, on the host and on the device; or stretched.

The host uses Pillow, as openpi's client does. Checkpoints were trained on its bytes and no resize of JAX gives them, so
the device version repeats its arithmetic, which is integers: a triangle filter as wide as the reduction, in 22-bit
fixed point, columns first, then rows, each rounded to eight bits (Pillow's `Resample.c`). Both give the same pixels.
"""

from collections.abc import Sequence
import functools

import jax.numpy as jnp
from jaxtyping import UInt8
import numpy as np
from PIL import Image

from openpi_ar.types import Array

_BITS = 22


def resize_with_pad(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [h w 3] to [height width 3] on the host; the image itself if it has that size already."""
    size = image.shape[0], image.shape[1]
    if size == (height, width):
        return image
    new_h, new_w, top, left = _placed(size, height, width)
    out = np.zeros((height, width, 3), np.uint8)
    small = Image.fromarray(image).resize((new_w, new_h), resample=Image.Resampling.BILINEAR)
    out[top : top + new_h, left : left + new_w] = np.asarray(small)
    return out


def fit(image: np.ndarray, height: int, width: int, *, keeps_aspect: bool) -> np.ndarray:
    """uint8 [h w 3] to [height width 3] on the host: with black borders, or stretched (bilinear, antialiased)."""
    if keeps_aspect or image.shape[:2] == (height, width):
        return resize_with_pad(image, height, width)
    return np.asarray(Image.fromarray(image).resize((width, height), resample=Image.Resampling.BILINEAR))


def unfit(
    box: Sequence[float], size: tuple[int, int], height: int, width: int, *, keeps_aspect: bool
) -> tuple[float, float, float, float]:
    """A box of the image that `fit` gives (top, left, bottom, right, as fractions of it) in pixels of the original one,
    which is of `size`. What lies on the borders is moved to the edge."""
    new_h, new_w, top, left = _placed(size, height, width) if keeps_aspect else (height, width, 0, 0)

    def back(fraction: float, whole: int, start: int, length: int, original: int) -> float:
        return min(max((fraction * whole - start) * original / length, 0.0), float(original))

    y0, x0, y1, x1 = box
    y0, y1 = (back(y, height, top, new_h, size[0]) for y in (y0, y1))
    x0, x1 = (back(x, width, left, new_w, size[1]) for x in (x0, x1))
    return y0, x0, y1, x1


def resize_with_pad_on_device(images: UInt8[Array, "*b h w 3"], height: int, width: int) -> UInt8[Array, "*b _ _ 3"]:
    """`resize_with_pad` of a batch of images inside a compiled program, to the same pixels."""
    size = images.shape[-3], images.shape[-2]
    if size == (height, width):
        return images
    new_h, new_w, top, left = _placed(size, height, width)
    small = _resample(_resample(images, new_w, images.ndim - 2), new_h, images.ndim - 3)
    borders = [(top, height - new_h - top), (left, width - new_w - left), (0, 0)]
    return jnp.pad(small, [(0, 0)] * (images.ndim - 3) + borders)


def _placed(size: tuple[int, int], height: int, width: int) -> tuple[int, int, int, int]:
    """(height, width, top, left) of the resized image within [height width] (openpi's `resize_with_pad`)."""
    ratio = max(size[1] / width, size[0] / height)
    new_h, new_w = max(1, int(size[0] / ratio)), max(1, int(size[1] / ratio))
    return new_h, new_w, (height - new_h) // 2, (width - new_w) // 2


def _resample(x: UInt8[Array, "..."], size: int, axis: int) -> UInt8[Array, "..."]:
    """One pass along one axis. Sums stay below 2^31: a pixel's weights add up to 2^22 and pixels are eight bits."""
    starts, weights = _filter(x.shape[axis], size)
    shape = [1] * x.ndim
    shape[axis] = size
    total = jnp.int32(1 << (_BITS - 1))
    for tap in range(weights.shape[1]):
        index = np.minimum(starts + tap, x.shape[axis] - 1)  # past the edge the weight is 0
        total += jnp.take(x, index, axis=axis).astype(jnp.int32) * weights[:, tap].reshape(shape)
    return jnp.clip(total >> _BITS, 0, 255).astype(jnp.uint8)


@functools.cache
def _filter(length: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """First source pixel [size] and fixed-point weights int32 [size taps] of every output pixel."""
    scale = length / size
    reach = max(scale, 1.0)
    centers = (np.arange(size) + 0.5) * scale
    starts = np.maximum((centers - reach + 0.5).astype(int), 0)
    stops = np.minimum((centers + reach + 0.5).astype(int), length)
    at = starts[:, None] + np.arange((stops - starts).max())
    weights = np.maximum(0.0, 1 - np.abs((at - centers[:, None] + 0.5) / reach)) * (at < stops[:, None])
    weights /= weights.sum(1, keepdims=True)
    return starts, np.floor(weights * (1 << _BITS) + 0.5).astype(np.int32)
