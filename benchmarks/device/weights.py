"""Random parameters, made on the device by one program: no host fills billions of values in the minutes there are."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from openpi_ar.compilation import run_once


def random_tree(abstract: Any, dtype: str | None = None) -> Any:
    """Arrays for a tree of shapes: every parameter is random, norms and gates too, so that nothing is hidden by a zero.

    One block of noise, repeated from another place for each leaf and scaled by its fan-in. In `dtype`, or each leaf in
    its own.
    """
    block = np.random.default_rng(0).standard_normal(1_000_003).astype(np.float32)
    leaves, structure = jax.tree.flatten(abstract)

    def fill(block: jax.Array) -> list[jax.Array]:
        filled = []
        for i, a in enumerate(leaves):
            scale = 0.02 if len(a.shape) < 2 else a.shape[-2] ** -0.5
            times, size = -(-math.prod(a.shape) // block.size), math.prod(a.shape)
            # One fused kernel a leaf. `jnp.resize` joins a copy of the block for each time that it repeats.
            noise = jnp.broadcast_to(jnp.roll(block, i * 7919), (times, block.size)).reshape(-1)[:size]
            filled.append((noise.reshape(a.shape) * scale).astype(dtype or a.dtype))
        return filled

    return jax.tree.unflatten(structure, run_once(fill, block))


def zeros(abstract: Any) -> Any:
    """Arrays of zeros for a tree of shapes."""
    return run_once(lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), abstract))
