"""Random changes of training batches inside the jitted step, which gets uint8 and makes what the model sees."""

from collections.abc import Sequence
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Float
import numpy as np

from openpi_ar.config import AugmentConfig
from openpi_ar.types import Array, Batch, Kind, Observation, Tokens

_MISTAKEN = 1 / 3
"""Fraction of the tokens of a row that is fed mistakes."""
_GREY = np.array([0.299, 0.587, 0.114], np.float32)
"""Weights of red, green and blue in a pixel's brightness (ITU-R BT.601)."""


def augment(obs: Observation, key: Array, cfg: AugmentConfig, cameras: Sequence[str]) -> Observation:
    """The observation with its images changed, every image on its own. Returned unchanged if augmentation is off.

    Images come back float32 in [-1, 1]. `cameras` are the names of the observation's, those in `cfg.uncropped` keep
    all.
    """
    if not (cfg.crop or cfg.brightness or cfg.contrast or cfg.saturation):
        return obs
    images = jnp.asarray(obs.images)
    images = images.astype(jnp.float32) / 255.0 if images.dtype == jnp.uint8 else (images + 1.0) / 2.0
    batch = images.shape[0]
    window_key, colour_key = jax.random.split(key)
    if cfg.crop:
        moved = [i for i, name in enumerate(cameras) if name not in cfg.uncropped]
        flat = images[:, moved].reshape(-1, *images.shape[2:])
        cropped = jax.vmap(_random_window, in_axes=(0, 0, None))(
            flat, jax.random.split(window_key, flat.shape[0]), cfg.crop
        )
        images = images.at[:, moved].set(cropped.reshape(batch, len(moved), *images.shape[2:]))
    flat = images.reshape(-1, *images.shape[2:])
    flat = jax.vmap(_colours, in_axes=(0, 0, None))(flat, jax.random.split(colour_key, flat.shape[0]), cfg)
    return dataclasses.replace(obs, images=flat.reshape(images.shape) * 2.0 - 1.0)


def with_mistakes(batch: Batch, key: Array, fraction: float) -> tuple[Batch, Tokens]:
    """The batch, and the text to feed in place of its target: in this fraction of rows some tokens of another row's
    subtask.

    Those rows have no action in the loss any more: their actions do not follow from such a text. Rows without a subtask
    (questions) stay as they are and lend no tokens. Similar to word dropout (S. Bowman et al., "Generating Sentences
    from a Continuous Space", CoNLL 2016, section 3.1).
    """
    target = batch.target
    if not fraction:
        return batch, target
    ids = jnp.asarray(target.ids)
    row_key, token_key = jax.random.split(key)
    subtask = jnp.asarray(target.valid) & (jnp.asarray(target.kind) == Kind.SUBTASK)
    has = subtask.any(-1)
    # The row before among those with a subtask; before the first comes the last.
    order, rank = jnp.argsort(~has, stable=True), jnp.cumsum(has) - 1
    lender = order[(rank - 1) % jnp.maximum(has.sum(), 1)]
    rows = (jax.random.uniform(row_key, (ids.shape[0], 1)) < fraction) & has[:, None]
    swapped = rows & (jax.random.uniform(token_key, ids.shape) < _MISTAKEN) & subtask & subtask[lender]
    fed = dataclasses.replace(target, ids=jnp.where(swapped, ids[lender], ids))
    return dataclasses.replace(batch, action_mask=batch.action_mask & ~rows[:, :, None]), fed


def _random_window(image: Float[Array, "h w 3"], key: Array, crop: float) -> Float[Array, "h w 3"]:
    """A window of the image at a random place, by up to `crop` smaller on each side, resized (bilinear) to its size."""
    size_key, place_key = jax.random.split(key)
    size = jnp.array(image.shape[:2], jnp.float32)
    scale = 1.0 / (1.0 - crop * jax.random.uniform(size_key))
    room = size * (1.0 - 1.0 / scale)
    corner = room * jax.random.uniform(place_key, (2,))
    return jax.image.scale_and_translate(
        image, image.shape, (0, 1), jnp.full((2,), scale), -corner * scale, method="linear", antialias=False
    )


def _colours(image: Float[Array, "h w 3"], key: Array, cfg: AugmentConfig) -> Float[Array, "h w 3"]:
    """Brightness, contrast, saturation, in this order; values in [0, 1] are clipped to it."""
    spread = jnp.array([cfg.brightness, cfg.contrast, cfg.saturation])
    brightness, contrast, saturation = 1.0 + spread * jax.random.uniform(key, (3,), minval=-1.0)
    image = image * brightness
    mean = (image @ _GREY).mean()
    image = mean + contrast * (image - mean)
    grey = (image @ _GREY)[..., None]
    return jnp.clip(grey + saturation * (image - grey), 0.0, 1.0)
