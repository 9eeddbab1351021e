"""The statistics that LeRobot v3.0 keeps for each feature of each episode and of the whole dataset."""

from collections.abc import Mapping
from typing import Any

import numpy as np

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}


def vector_stats(x: np.ndarray) -> dict[str, list]:
    """min, max, mean, std, count and quantiles of x [rows dims], each [dims] (count [1])."""
    floats = x.astype(np.float64)
    stats = {"min": floats.min(0), "max": floats.max(0), "mean": floats.mean(0), "std": floats.std(0)}
    out: dict[str, list] = {name: value.tolist() for name, value in stats.items()} | {"count": [len(x)]}
    quantiles = np.quantile(floats, list(QUANTILES.values()), axis=0)
    return out | {name: q.tolist() for name, q in zip(QUANTILES, quantiles, strict=True)}


def pixel_counts(images: np.ndarray) -> np.ndarray:
    """How often each value occurs in each channel of uint8 [rows h w 3]: int64 [3 256]. Counts of parts add up."""
    return np.stack([np.bincount(images[..., c].reshape(-1), minlength=256) for c in range(3)])


def pixel_stats(counts: np.ndarray, frames: int) -> dict[str, list]:
    """As `vector_stats`, of pixel values scaled to [0, 1], each [3 1 1]; count is the number of frames."""
    values = np.arange(256) / 255.0
    total = counts.sum(1)
    mean = counts @ values / total
    std = np.sqrt(np.maximum(counts @ values**2 / total - mean**2, 0.0))
    seen = counts > 0
    stats = {"min": values[seen.argmax(1)], "max": values[255 - seen[:, ::-1].argmax(1)], "mean": mean, "std": std}
    below = counts.cumsum(1)
    for name, q in QUANTILES.items():
        stats[name] = values[[int(np.searchsorted(below[c], q * (total[c] - 1), side="right")) for c in range(3)]]
    return {name: value.reshape(3, 1, 1).tolist() for name, value in stats.items()} | {"count": [frames]}


def flatten(stats: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """`stats/<feature>/<statistic>` columns, as in meta/episodes."""
    return {f"stats/{key}/{name}": value for key, entry in stats.items() for name, value in entry.items()}
