"""Which rows of each batch a process makes, and how the processes' rows become one array.

Batch i holds the same rows in the same order whatever the number of processes.
"""

from typing import Any

import grain
import jax
import numpy as np


def local_rows(sharding: jax.sharding.Sharding, batch_size: int) -> np.ndarray:
    """Rows of a batch that lie on devices of this process, ascending."""
    slices = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in slices if index is not None]))


class BatchRows(grain.MapDataset):
    """Of every `batch_size` elements of `parent`, those at `rows`; batches of `len(rows)` of these are shares of batches.

    Only they are computed. Random transformations before it draw what they would without it.
    """

    def __init__(self, parent: grain.MapDataset, batch_size: int, rows: np.ndarray):
        super().__init__(parent)
        self._batch_size, self._rows = batch_size, [int(r) for r in rows]

    def __len__(self) -> int:
        return len(self._parent) // self._batch_size * len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        batch, row = divmod(index, len(self._rows))
        return self._parent[batch * self._batch_size + self._rows[row]]


def share(
    dataset: grain.MapDataset, batch_size: int, sharding: jax.sharding.Sharding | None
) -> tuple[grain.MapDataset, int]:
    """(elements of this process, how many of them are its share of a batch); all of them if it is alone."""
    if sharding is None or sharding.is_fully_addressable:
        return dataset, batch_size
    rows = local_rows(sharding, batch_size)
    return BatchRows(dataset, batch_size, rows), len(rows)


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
