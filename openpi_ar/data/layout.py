"""What training asks of its data as a whole, whatever kind it is."""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from openpi_ar.data.normalize import Mode, NormStats


class Column(NamedTuple):
    """One dimension of a quantity over a source: values [n] before normalisation, and each one's row of the source."""

    values: np.ndarray
    rows: np.ndarray


Numbers = dict[str, list[Column]]
"""By "state" and "actions", the dimensions; they need not be of one length."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Names for people: by model camera the feature that its images are (empty: masked), and of each dimension."""

    cameras: Mapping[str, str]
    state: Sequence[str]
    actions: Sequence[str]


def held_out_mask(candidates: np.ndarray, fraction: float) -> np.ndarray:
    """What training never sees, bool [n], of n episodes or the like: that fraction of all, at least one unless it is 0,
    drawn among `candidates` (bool [n]).

    Drawn with a fixed seed, not taken from the end: the last episodes of a recording are often of one task.
    """
    mask = np.zeros(len(candidates), bool)
    if fraction:
        order = np.random.default_rng(0).permutation(np.flatnonzero(candidates))
        mask[order[: max(1, math.ceil(fraction * len(candidates)))]] = True
    return mask


@runtime_checkable
class TrainingSource(Protocol):
    """Random access to raw samples (`data/inputs.py`), and what training asks of them as a whole."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict: ...

    @property
    def name(self) -> str:
        """What it is called in messages."""
        ...

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts that occur."""
        ...

    @property
    def subtasks(self) -> tuple[str, ...]:
        """The subtasks that occur, the most frequent first; none if there are no labels."""
        ...

    @property
    def histories(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """The prompts that occur, each with every history (completed subtasks); none if samples do not tell any."""
        ...

    @property
    def layout(self) -> Layout:
        """Where samples come from."""
        ...

    def where(self, index: int) -> str:
        """ "episode E, frame F" of a row, for messages."""
        ...

    def unlabelled(self) -> list[str]:
        """Runs of frames of the data that no subtask is known of, for messages; training skips them."""
        ...

    def norm_stats(self, mode: Mode = "quantile") -> dict[str, NormStats]:
        """Statistics of `state` and `actions`, without reading an image."""
        ...


class SingleSource(TrainingSource, Protocol):
    """A source that is no mixture of others."""

    def numbers(self) -> Numbers:
        """What is normalised, without reading an image."""
        ...
