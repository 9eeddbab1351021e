"""Arrays of several processes: which rows of a batch are this process's, and how all rows become one array.

Batch i holds the same rows in the same order whatever the number of processes.
"""

from typing import Any

import jax
import numpy as np


def local_rows(sharding: jax.sharding.Sharding, batch_size: int) -> np.ndarray:
    """Rows of a batch that lie on devices of this process, ascending."""
    slices = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in slices if index is not None]))


def joined(arrays: Any, sharding: jax.sharding.Sharding | None, batch_size: int) -> Any:
    """A tree of this process's shares as arrays of the whole batch; unchanged if it is alone."""
    if sharding is None or sharding.is_fully_addressable:
        return arrays
    rows = local_rows(sharding, batch_size)

    def join(mine: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            # A device's rows are consecutive, and all of them are here.
            start, stop, _ = index[0].indices(batch_size)
            first = int(np.searchsorted(rows, start))
            return mine[first : first + stop - start]

        return jax.make_array_from_callback((batch_size, *mine.shape[1:]), sharding, part)

    return jax.tree.map(join, arrays)


def put(array: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array that every process has as a whole, on the devices of all of them."""
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def place(arrays: Any, sharding: jax.sharding.Sharding | None) -> Any:
    """A tree of arrays onto the devices. What is numpy, every process has as a whole; what is not, is there already."""
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(arrays, sharding)
    return jax.tree.map(lambda x: x if isinstance(x, jax.Array) else put(x, sharding), arrays)
