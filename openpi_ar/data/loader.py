"""Batches as a pure function of (seed, step): shuffled, prefetched in the background, resumable at any step."""

from collections.abc import Callable, Iterator, Sequence
import time
from typing import Any

import grain
from grain.sources import RandomAccessDataSource
import jax
import numpy as np

from openpi_ar.data import shards
from openpi_ar.data.inputs import Arrays, InputTransform, stack_rows, to_device
from openpi_ar.types import Batch

# Reading a frame and tokenizing its prompt takes well under a millisecond, so few threads keep ahead of any device.
_THREADS = 2
_PREFETCHED_BATCHES = 8


Source = RandomAccessDataSource[dict]
"""Random access to raw samples: `len(source)` and `source[index]`."""


class Loader(Iterator[Batch]):
    """Endless batches. Every epoch is a fresh permutation of the source; batches run across epoch borders. Of several
    processes each makes the rows that lie on its devices (`data/shards.py`).

    Batch i depends on the seed and i alone, so `position` is all there is to save and a restored run goes on with the
    very next batch. `wait_seconds` is how long the last `next` waited for data: near zero when the device is the limit.
    """

    def __init__(
        self,
        source: Source,
        transform: InputTransform,
        *,
        batch_size: int,
        seed: int,
        augment: Callable[[dict, np.random.Generator], dict] | None = None,
        sharding: jax.sharding.Sharding | None = None,
    ):
        dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
        if augment is not None:
            dataset = dataset.random_map(augment)
        dataset, rows = shards.share(dataset, batch_size, sharding)
        self.dataset = dataset.map(transform.sample).batch(rows, batch_fn=stack_rows)
        self._sharding, self._batch_size = sharding, batch_size
        self._iterator = iter(self.dataset.to_iter_dataset(grain.ReadOptions(_THREADS, _PREFETCHED_BATCHES)))
        self.wait_seconds = 0.0

    def __next__(self) -> Batch:
        start = time.perf_counter()
        arrays: Arrays = next(self._iterator)
        self.wait_seconds = time.perf_counter() - start
        return _as_batch(shards.joined(arrays, self._sharding, self._batch_size), self._sharding)

    @property
    def position(self) -> int:
        """Number of batches handed out."""
        return int(self._iterator.get_state()["next_index"])

    @position.setter
    def position(self, batches: int) -> None:
        self._iterator.set_state({"next_index": int(batches)})


def evaluation_batches(
    source: Source,
    transform: InputTransform,
    *,
    batch_size: int,
    batches: int,
    sharding: jax.sharding.Sharding | None = None,
) -> list[tuple[Sequence[dict], Batch]]:
    """(raw samples, Batch) pairs spread evenly over the source, the same ones on every call.

    A source with fewer rows than one batch is repeated to fill it, so that every batch has one shape.
    """
    rows = np.linspace(0, len(source), batch_size * batches, endpoint=False).astype(int)
    # Strided, so that each batch alone spans all episodes.
    groups = [[source[int(i)] for i in rows[b::batches]] for b in range(batches)]
    return [(raw, _as_batch(stack_rows([transform.sample(r) for r in raw]), sharding)) for raw in groups]


def _as_batch(arrays: Any, sharding: jax.sharding.Sharding | None) -> Batch:
    batch = to_device(arrays, sharding)
    assert isinstance(batch, Batch)
    return batch
