"""Pillow's bilinear resize on the device, to the bit: robots' images go there as they are and become the model's in its program.

Checkpoints were trained on images that Pillow resized, and no resize of JAX gives its bytes. Its arithmetic is integers: a
triangle filter as wide as the reduction, in 22-bit fixed point, columns first, then rows, each rounded to eight bits
(Pillow's `Resample.c`).
"""

import functools

import jax.numpy as jnp
from jaxtyping import UInt8
import numpy as np

from openpi_ar.types import Array

_BITS = 22


def resize_with_pad(images: UInt8[Array, "*b h w 3"], height: int, width: int) -> UInt8[Array, "*b _ _ 3"]:
    """Images to [height width]: bilinear, aspect kept, black borders; `data.inputs.resize_with_pad` inside a program."""
    size = images.shape[-3], images.shape[-2]
    if size == (height, width):
        return images
    ratio = max(size[1] / width, size[0] / height)
    new_h, new_w = max(1, int(size[0] / ratio)), max(1, int(size[1] / ratio))
    small = _resample(_resample(images, new_w, images.ndim - 2), new_h, images.ndim - 3)
    top, left = (height - new_h) // 2, (width - new_w) // 2
    borders = [(top, height - new_h - top), (left, width - new_w - left), (0, 0)]
    return jnp.pad(small, [(0, 0)] * (images.ndim - 3) + borders)


def _resample(x: UInt8[Array, "..."], size: int, axis: int) -> UInt8[Array, "..."]:
    """One pass along one axis. Sums stay below 2^31: the weights of a pixel add up to 2^22 and pixels are eight bits."""
    starts, weights = _filter(x.shape[axis], size)
    shape = [1] * x.ndim
    shape[axis] = size
    total = jnp.int32(1 << (_BITS - 1))
    for tap in range(weights.shape[1]):
        index = np.minimum(starts + tap, x.shape[axis] - 1)  # beyond the edge the weight is 0
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
