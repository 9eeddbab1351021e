"""Several sources as one: rows drawn by weight, one set of statistics for all."""

import dataclasses

import grain
from grain.sources import RandomAccessDataSource
import numpy as np

from openpi_ar.data.layout import Layout, SingleSource
from openpi_ar.data.normalize import Mode, NormStats, compute_stats
from openpi_ar.errors import UserError


@dataclasses.dataclass(frozen=True)
class Mixture:
    """A `TrainingSource` of others. `endless` draws from it for training.

    By index its rows lie side by side, each part taking its weight's share of them: evenly spaced rows, as for
    evaluation, or random ones are then in these proportions too.
    """

    parts: tuple[SingleSource, ...]
    weights: tuple[float, ...]
    """How often each is drawn from, relative to the others."""

    def __post_init__(self):
        first = self.parts[0]
        for other in self.parts[1:]:
            for what in ("state", "actions"):
                a, b = (len(getattr(source.layout, what)) for source in (first, other))
                if a and b and a != b:
                    raise UserError(
                        f"{first.name} and {other.name} cannot be mixed: their {what} have {a} and {b} dimensions; "
                        f"pick the same of both with data.{what}, such as --data.{what} "
                        f"'observation.state[0:{min(a, b)}]'"
                    )

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, index: int) -> dict:
        part, row = self._at(index)
        return part[row]

    @property
    def name(self) -> str:
        """For messages."""
        return " and ".join(part.name for part in self.parts)

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts that occur in any part."""
        return tuple(dict.fromkeys(p for part in self.parts for p in part.prompts))

    @property
    def subtasks(self) -> tuple[str, ...]:
        """The subtasks that occur in any part."""
        return tuple(dict.fromkeys(s for part in self.parts for s in part.subtasks))

    @property
    def histories(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """Those that occur in any part."""
        return tuple(dict.fromkeys(pair for part in self.parts for pair in part.histories))

    @property
    def layout(self) -> Layout:
        """The first part's."""
        return self.parts[0].layout

    def where(self, index: int) -> str:
        """Part, episode and frame."""
        part, row = self._at(index)
        return part.where(row)

    def unlabelled(self) -> list[str]:
        """Those of all parts."""
        return [place for part in self.parts for place in part.unlabelled()]

    def norm_stats(self, mode: Mode = "quantile") -> dict[str, NormStats]:
        """Statistics over what is drawn: every part counts by its weight, however large it is."""
        stats = {}
        share = np.array(self.weights) / sum(self.weights)
        numbers = [(part.numbers(), s) for part, s in zip(self.parts, share, strict=True)]
        for name in ("state", "actions"):
            columns, weights = [], []
            found = [(n[name], s) for n, s in numbers if n[name]]  # questions have none
            for pieces in zip(*(n for n, _ in found), strict=True):
                columns.append(np.concatenate([p.values for p in pieces]))
                counts = [np.full(len(p.values), s / len(p.values)) for p, (_, s) in zip(pieces, found, strict=True)]
                weights.append(np.concatenate(counts))
            stats[name] = compute_stats(columns, mode, weights)
        return stats

    def _at(self, index: int) -> tuple[SingleSource, int]:
        ends = np.cumsum(self.weights) / sum(self.weights)
        at = (index + 0.5) / len(self)
        k = min(int(np.searchsorted(ends, at, side="right")), len(self.parts) - 1)
        start = float(ends[k - 1]) if k else 0.0
        part = self.parts[k]
        return part, min(int((at - start) / (ends[k] - start) * len(part)), len(part) - 1)


def parts_of(source: object) -> tuple[SingleSource, ...]:
    """What a source is made of; itself if it is no mixture."""
    return source.parts if isinstance(source, Mixture) else (source,)  # pyright: ignore[reportReturnType]


def endless(source: RandomAccessDataSource, seed: int) -> grain.MapDataset:
    """Rows without end, row i a pure function of (seed, i): every epoch of a part is a fresh permutation of it.

    Of a mixture, rows are dealt out by weight, so that every stretch of them has the same proportions.
    """
    if not isinstance(source, Mixture):
        return grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    parts = [grain.MapDataset.source(p).seed(seed + k).shuffle().repeat() for k, p in enumerate(source.parts)]
    return grain.MapDataset.mix(parts, list(source.weights)).seed(seed)
