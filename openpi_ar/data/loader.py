"""Batches as a pure function of (seed, step): shuffled, made in the background, resumable at any step."""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import os
import signal
import threading
import time
from typing import Any

from absl import flags
import grain
from grain.sources import RandomAccessDataSource
import jax
import numpy as np

from openpi_ar.data import shards
from openpi_ar.data.inputs import Arrays, InputTransform, stack_rows, to_device
from openpi_ar.data.mixture import endless
from openpi_ar.types import Batch

# Reading a frame and tokenizing its prompt takes well under a millisecond, so few threads keep ahead of any device.
_THREADS = 2
_PREFETCHED_BATCHES = 8
_PREFETCHED_BY_A_WORKER = 4
_WATCH_SECONDS = 2.0

# Grain's worker processes ask for its absl flags, which nobody parses here.
flags.FLAGS.mark_as_parsed()

Source = RandomAccessDataSource[dict]
"""Random access to raw samples: `len(source)` and `source[index]`."""
Augment = Callable[[dict, np.random.Generator], dict]
"""A random change of a raw sample."""


class BatchRows(grain.MapDataset):
    """Of every `batch_size` elements of `parent`, those at `rows`: this process's share of each batch.

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
    rows = shards.local_rows(sharding, batch_size)
    return BatchRows(dataset, batch_size, rows), len(rows)


class Loader(Iterator[Batch]):
    """Endless batches. Every epoch is a fresh permutation of the source; batches run across epoch borders. Of several
    processes each makes the rows that lie on its devices (`data/shards.py`).

    Batch i depends on the seed and i alone, so `position` is all there is to save and a restored run continues with the
    next batch. `wait_seconds` is how long the last `next` waited for data: near zero when the device is the limit.

    With `workers`, that many processes make the batches, in turns: the batches stay the same. They start with the first
    batch, which is when the source must be picklable. 0: threads of this process, enough for cached frames.
    """

    def __init__(
        self,
        source: Source,
        transform: InputTransform,
        *,
        batch_size: int,
        seed: int,
        augment: Augment | None = None,
        sharding: jax.sharding.Sharding | None = None,
        workers: int = 0,
    ):
        dataset = endless(source, seed)
        if augment is not None:
            dataset = dataset.random_map(augment)
        dataset, rows = share(dataset, batch_size, sharding)
        self.dataset = dataset.map(transform.sample).batch(rows, batch_fn=stack_rows)
        self._sharding, self._batch_size = sharding, batch_size
        self._workers, self._position = workers, 0
        self._iterator: Any = None
        self.wait_seconds = 0.0

    def __next__(self) -> Batch:
        start = time.perf_counter()
        if self._iterator is None:
            self._iterator = self._started()
        arrays: Arrays = next(self._iterator)
        if self._workers:
            # Out of the memory shared with the worker, which lives as long as what points into it: on a CPU, the batch.
            arrays = jax.tree.map(np.array, arrays)
        self._position += 1
        self.wait_seconds = time.perf_counter() - start
        return to_device(shards.joined(arrays, self._sharding, self._batch_size), self._sharding)

    @property
    def position(self) -> int:
        """Number of batches handed out."""
        return self._position

    @position.setter
    def position(self, batches: int) -> None:
        self.close()
        self._position = int(batches)

    def close(self) -> None:
        """Ends the workers; the next batch starts new ones."""
        if self._iterator is not None:
            self._iterator.close()
        self._iterator = None

    def _started(self) -> Any:
        rest = self.dataset.slice(slice(self._position, None))
        if not self._workers:
            return iter(rest.to_iter_dataset(grain.ReadOptions(_THREADS, _PREFETCHED_BATCHES)))
        options = grain.MultiprocessingOptions(self._workers, _PREFETCHED_BY_A_WORKER)
        return iter(rest.to_iter_dataset(grain.ReadOptions(1, 1)).mp_prefetch(options, _start_worker))


@dataclasses.dataclass(frozen=True)
class _InTurn:
    """A class, because workers get it by pickling."""

    changes: tuple[Augment, ...]

    def __call__(self, raw: dict, rng: np.random.Generator) -> dict:
        for change in self.changes:
            raw = change(raw, rng)
        return raw


def in_turn(*changes: Augment) -> Augment:
    """One change of raw samples after the other. What an earlier one draws does not depend on the later ones."""
    return _InTurn(changes)


def _start_worker(index: int, count: int) -> None:
    """Runs in each worker: ignores the signals that the trainer handles, and ends when the trainer has ended."""
    del index, count
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    trainer = os.getppid()

    def watch() -> None:
        while os.getppid() == trainer:
            time.sleep(_WATCH_SECONDS)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def evaluation_batches(
    source: Source,
    transform: InputTransform,
    *,
    batch_size: int,
    batches: int,
    sharding: jax.sharding.Sharding | None = None,
) -> list[tuple[Sequence[dict], Batch]]:
    """(raw samples, Batch) pairs spread evenly over the source, the same ones on every call.

    A source with fewer rows than one batch is repeated to fill it, so that every batch has one shape. In a batch, rows
    with actions come first: the noise of a row, drawn by its place, does not then depend on how many questions are
    among them.
    """
    rows = np.linspace(0, len(source), batch_size * batches, endpoint=False).astype(int)
    # Strided, so that each batch alone spans all episodes.
    groups = [[source[int(i)] for i in rows[b::batches]] for b in range(batches)]
    groups = [sorted(group, key=lambda raw: raw.get("actions") is None) for group in groups]
    return [(raw, to_device(stack_rows([transform.sample(r) for r in raw]), sharding)) for raw in groups]
