"""Normalisation of states and actions, forward beside inverse, and openpi's `norm_stats.json`."""

import dataclasses
import json
from pathlib import Path
from typing import Literal

import numpy as np

from openpi_ar.errors import UserError

FILE = "norm_stats.json"
Mode = Literal["quantile", "z_score"]
_ARRAYS = ("mean", "std", "q01", "q99")

# openpi's guard against division by zero; kept so that its statistics give its numbers.
_EPSILON = 1e-6
# A dimension that moves less than this (0.1 mm, 0.1 mrad) over the whole training set carries sensor noise only. Stretching
# that to [-1, 1] would feed the model pure noise, so such a dimension is centred and left in its own unit.
NEAR_CONSTANT = 1e-4


@dataclasses.dataclass(frozen=True, eq=False)
class NormStats:
    """Per-dimension statistics of one quantity, each a float32 array [dims].

    `quantile` maps [q01, q99] to [-1, 1] (pi0.5: the state must lie there to be discretised); `z_score` maps to zero mean
    and unit deviation (pi0). Values outside the quantiles are not clipped.
    """

    mean: np.ndarray
    std: np.ndarray
    q01: np.ndarray
    q99: np.ndarray
    mode: Mode = "quantile"

    @property
    def dims(self) -> int:
        """Real dimensions of the robot, before padding to the model's."""
        return self.mean.shape[0]

    @property
    def offset_scale(self) -> tuple[np.ndarray, np.ndarray]:
        """The map as `normalised = (x - offset) / scale`, both float64 [dims]."""
        if self.mode == "z_score":
            std = self.std.astype(np.float64)
            return self.mean.astype(np.float64), np.where(std < NEAR_CONSTANT, 1.0, std + _EPSILON)
        low, span = self.q01.astype(np.float64), self.q99.astype(np.float64) - self.q01
        flat = span < NEAR_CONSTANT
        half = (span + _EPSILON) / 2
        return np.where(flat, low + span / 2, low + half), np.where(flat, 1.0, half)

    def normalize(self, x: np.ndarray) -> np.ndarray:
        """Real units [... dims] to normalised float32 [... dims]."""
        offset, scale = self.offset_scale
        return ((np.asarray(x, np.float64) - offset) / scale).astype(np.float32)

    def unnormalize(self, x: np.ndarray) -> np.ndarray:
        """Inverse of `normalize`, float32 [... dims]."""
        offset, scale = self.offset_scale
        return (np.asarray(x, np.float64) * scale + offset).astype(np.float32)


def compute_stats(x: np.ndarray, mode: Mode = "quantile") -> NormStats:
    """Statistics of x [rows dims] in real units. Raises UserError if there is no row or a value is not finite."""
    x = np.asarray(x, np.float64)
    if x.ndim != 2 or not len(x):
        raise UserError(f"normalisation statistics need an array [rows dims] with at least one row, found {x.shape}")
    if not np.isfinite(x).all():
        row = int(np.argwhere(~np.isfinite(x))[0, 0])
        raise UserError(f"normalisation statistics: row {row} holds a value that is not finite: {x[row].tolist()}")
    q01, q99 = np.quantile(x, [0.01, 0.99], axis=0)
    return NormStats(*(a.astype(np.float32) for a in (x.mean(0), x.std(0), q01, q99)), mode=mode)


def save_norm_stats(directory: str | Path, stats: dict[str, NormStats]) -> None:
    """Writes `norm_stats.json` in openpi's format, with the mode beside it."""
    body = {
        "mode": next(iter(stats.values())).mode,
        "norm_stats": {name: {key: getattr(s, key).tolist() for key in _ARRAYS} for name, s in stats.items()},
    }
    (Path(directory) / FILE).write_text(json.dumps(body, indent=2) + "\n")


def load_norm_stats(directory: str | Path, *, default_mode: Mode = "quantile") -> dict[str, NormStats]:
    """Reads `norm_stats.json`, ours or openpi's (which does not say its mode: `default_mode`).

    Raises UserError if the file, a quantity or an array is missing or does not fit.
    """
    path = Path(directory) / FILE
    if not path.is_file():
        raise UserError(f"{path} is missing: expected the normalisation statistics of the checkpoint there")
    try:
        body = json.loads(path.read_text())
        mode = body.get("mode", default_mode)
        entries = body["norm_stats"]
        stats = {name: _parse(path, name, entries[name], mode) for name in ("state", "actions")}
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f'{path}: expected {{"norm_stats": {{"state": ..., "actions": ...}}}}, found {e!r}') from e
    return stats


def _parse(path: Path, name: str, entry: dict, mode: Mode) -> NormStats:
    if mode not in ("quantile", "z_score"):
        raise UserError(f"{path}: mode must be quantile or z_score, found {mode!r}")
    needed = ("q01", "q99") if mode == "quantile" else ("mean", "std")
    if missing := [key for key in needed if entry.get(key) is None]:
        raise UserError(f"{path}: {name} lacks {', '.join(missing)}, which mode {mode} needs")
    # openpi writes null quantiles for z-score statistics; zeros there are never read.
    zeros = [0.0] * len(entry[needed[0]])
    arrays = {key: np.asarray(zeros if entry.get(key) is None else entry[key], np.float32) for key in _ARRAYS}
    if len({a.shape for a in arrays.values()}) != 1 or arrays["mean"].ndim != 1:
        raise UserError(
            f"{path}: {name} holds arrays of different lengths: { {k: a.shape for k, a in arrays.items()} }"
        )
    return NormStats(**arrays, mode=mode)
