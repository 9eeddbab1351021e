"""Normalisation of states and actions, forward beside inverse, and openpi's `norm_stats.json`.

The formulas are openpi's (`src/openpi/transforms.py`, Normalize and Unnormalize), with nothing added when they are
applied: what a checkpoint was trained with is what it gets. The floor for dimensions that do not move is put into the
statistics when they are computed, so openpi reads the same numbers out of our file as we do.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from openpi_ar.errors import UserError
from openpi_ar.files import replace_text
from openpi_ar.lookup import nearest
from openpi_ar.textfile import read_object

FILE = "norm_stats.json"
ASSETS = "assets"
Mode = Literal["quantile", "z_score"]
_ARRAYS = ("mean", "std", "q01", "q99")
_MODE_ARRAYS: dict[Mode, tuple[str, str]] = {"quantile": ("q01", "q99"), "z_score": ("mean", "std")}

# openpi's guard against division by zero; added so that its statistics give its numbers.
_EPSILON = 1e-6
# A dimension that moves less than this (0.1 mm, 0.1 mrad) over the whole training set carries sensor noise only.
# Stretching that to [-1, 1] would feed the model pure noise, so such a dimension is centred and left in its own unit.
NEAR_CONSTANT = 1e-4


@dataclasses.dataclass(frozen=True, eq=False)
class NormStats:
    """Per-dimension statistics of one quantity, each an array [dims] (float64 as computed and as read from a file).

    `quantile` maps [q01, q99] to [-1, 1] (pi0.5: the state must lie there to be discretised); `z_score` maps to zero
    mean and unit deviation (pi0). Values outside the quantiles are not clipped.
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
            return self.mean.astype(np.float64), self.std.astype(np.float64) + _EPSILON
        low = self.q01.astype(np.float64)
        half = (self.q99.astype(np.float64) - low + _EPSILON) / 2
        return low + half, half

    def normalize(self, x: np.ndarray) -> np.ndarray:
        """Real units [... dims] to normalised float32 [... dims]."""
        offset, scale = self.offset_scale
        return ((np.asarray(x, np.float64) - offset) / scale).astype(np.float32)

    def unnormalize(self, x: np.ndarray) -> np.ndarray:
        """Inverse of `normalize`; float32 [... dims]."""
        offset, scale = self.offset_scale
        return (np.asarray(x, np.float64) * scale + offset).astype(np.float32)

    def floored(self) -> "NormStats":
        """The same with every near-constant dimension centred and left in its own unit (deviation 1, quantiles -+1).

        For statistics that a new run will train with. Not for a released checkpoint's: its model has learnt the
        stretched numbers, and would move such a dimension by whole units.
        """
        still, flat = self.std < NEAR_CONSTANT, self.q99 - self.q01 < NEAR_CONSTANT
        middle = (self.q01 + self.q99) / 2
        # Less _EPSILON: what the formulas add to a deviation of 1 and a span of 2.
        return dataclasses.replace(
            self,
            std=np.where(still, 1 - _EPSILON, self.std),
            q01=np.where(flat, middle - 1 + _EPSILON / 2, self.q01),
            q99=np.where(flat, middle + 1 - _EPSILON / 2, self.q99),
        )

    def is_close(self, other: "NormStats") -> bool:
        """Whether both are of the same numbers, added up in whatever order."""
        pairs = [(getattr(self, key), getattr(other, key)) for key in _ARRAYS]
        return all(a.shape == b.shape and np.allclose(a, b, rtol=1e-6, atol=1e-9) for a, b in pairs)

    def first(self, dims: int, what: str) -> "NormStats":
        """The first `dims` dimensions, 0: all; more are padding, as in openpi. Raises UserError if there are fewer."""
        dims = dims or self.dims
        if self.dims < dims:
            raise UserError(
                f"the statistics of the {what} have {self.dims} dimensions but the robot has {dims}: they are of "
                "another robot; pick others with --asset-id, or another --robot"
            )
        return dataclasses.replace(self, **{key: getattr(self, key)[:dims] for key in _ARRAYS})


def compute_stats(
    columns: Sequence[np.ndarray] | np.ndarray, mode: Mode = "quantile", weights: Sequence[np.ndarray] | None = None
) -> NormStats:
    """Statistics of the values [rows] of each dimension, finite and in real units, near-constant dimensions floored.

    `weights`, of the same shapes, are how much each value counts; quantiles are then values that occur. Raises
    UserError if a dimension has no values or one that is not finite.
    """
    rows = []
    for i, column in enumerate(columns):
        x = np.asarray(column, np.float64)
        if not len(x) or not np.isfinite(x).all():
            raise UserError(f"normalisation statistics: dimension {i} must have values, all finite, found {x}")
        if weights is None:
            rows.append((x.mean(), x.std(), *np.quantile(x, [0.01, 0.99])))
        else:
            w = weights[i]
            mean = np.average(x, weights=w)
            quantiles = np.quantile(x, [0.01, 0.99], weights=w, method="inverted_cdf")
            rows.append((mean, np.sqrt(np.average((x - mean) ** 2, weights=w)), *quantiles))
    return NormStats(*np.array(rows).T, mode=mode).floored()


def check_mode(path: Path, mode: Mode, required: Mode | None) -> None:
    """Raises UserError if the file's mode is not the one that the model was trained with."""
    if required is not None and mode != required:
        model = "pi0.5" if required == "quantile" else "pi0"
        raise UserError(
            f"{path}: these statistics are for mode {mode}, but {model} is trained with {required}; put the "
            "checkpoint's "
            f'own file there, or, if its arrays are right and only its mode is not, write "mode": "{required}" into it'
        )


def save_norm_stats(directory: str | Path, stats: Mapping[str, NormStats]) -> None:
    """Writes `norm_stats.json` in openpi's format, with the mode beside it; complete or not at all.

    openpi's reader takes it: `src/openpi/shared/normalize.py` parses the top level with a pydantic model of the one
    field `norm_stats`, and pydantic ignores fields it does not know unless told otherwise.
    """
    body = {
        "mode": next(iter(stats.values())).mode,
        "norm_stats": {name: {key: getattr(s, key).tolist() for key in _ARRAYS} for name, s in stats.items()},
    }
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / FILE, json.dumps(body, indent=2) + "\n")


def load_norm_stats(
    directory: str | Path, *, default_mode: Mode = "quantile", required_mode: Mode | None = None
) -> dict[str, NormStats]:
    """Reads `norm_stats.json`, ours or openpi's.

    Args:
        directory: that holds the file.
        default_mode: of a file that does not name its mode, as openpi's.
        required_mode: what the model needs (`ModelConfig.norm_mode`); also the default then.

    Raises:
        UserError: the file, a quantity or an array is missing or does not fit, or the stored mode is not the required
            one.
    """
    path = Path(directory) / FILE
    body = read_object(path)
    try:
        mode = body.get("mode", required_mode or default_mode)
        if mode not in _MODE_ARRAYS:
            raise UserError(f"{path}: mode must be quantile or z_score, found {mode!r}")
        check_mode(path, mode, required_mode)
        entries = body["norm_stats"]
        stats = {name: parse_stats(str(path), name, entries[name], mode) for name in ("state", "actions")}
    except (KeyError, TypeError, AttributeError) as e:
        raise UserError(f'{path}: expected {{"norm_stats": {{"state": ..., "actions": ...}}}}, found {e!r}') from e
    return stats


def find_norm_stats(checkpoint: str | Path, *, asset_id: str | None = None, known: Sequence[str] = ()) -> Path:
    """The directory of a checkpoint's `norm_stats.json`.

    openpi's place is `<checkpoint>/assets/<asset id>/`, where an id may contain "/" (physical-intelligence/libero);
    ours is `<checkpoint>/assets/`.

    Args:
        checkpoint: directory that holds `assets/`.
        asset_id: the one to take.
        known: ids to prefer if `asset_id` is not given: the robot's in openpi's configurations.

    Raises:
        UserError: there is none, none of that id, or several and nothing tells which.
    """
    assets = Path(checkpoint) / ASSETS
    found = {path.parent.relative_to(assets).as_posix(): path.parent for path in sorted(assets.rglob(FILE))}
    if not found:
        place = assets / (asset_id or next(iter(known), "<asset id>")) / FILE
        raise UserError(
            f"{checkpoint} holds no normalisation statistics: expected {place} or {assets / FILE}; copy them there "
            "from the run that trained the model"
        )
    if asset_id is not None:
        if asset_id in found:
            return found[asset_id]
        near = ", ".join(nearest(asset_id, found))
        raise UserError(f"{assets} holds no statistics of --asset-id {asset_id}: it has {near}")
    preferred = [name for name in known if name in found]
    if len(found) == 1 or len(preferred) == 1:
        return found[(preferred or list(found))[0]]
    raise UserError(
        f"{assets} holds statistics of several robots: {', '.join(preferred or found)}; pick one with --asset-id"
    )


def parse_stats(path: str, name: str, entry: Mapping[str, Any], mode: Mode) -> NormStats:
    """Statistics from lists of numbers by `mean`, `std`, `q01`, `q99`, those that `mode` does not need optional.

    Raises UserError naming `path` and `name` if arrays are missing, differ in length or are not finite numbers.
    """
    needed = _MODE_ARRAYS[mode]
    if missing := [key for key in needed if entry.get(key) is None]:
        raise UserError(f"{path}: {name} lacks {', '.join(missing)}, which mode {mode} needs")
    # openpi writes null quantiles for z-score statistics; zeros there are never read.
    zeros = [0.0] * len(entry[needed[0]])
    try:
        arrays = {key: np.asarray(zeros if entry.get(key) is None else entry[key], np.float64) for key in _ARRAYS}
    except ValueError as e:
        raise UserError(f"{path}: {name} must hold lists of numbers, found {' '.join(str(e).split())}") from e
    if len({a.shape for a in arrays.values()}) != 1 or arrays["mean"].ndim != 1:
        raise UserError(
            f"{path}: {name} holds arrays of different lengths: { {k: a.shape for k, a in arrays.items()} }"
        )
    if bad := [key for key, a in arrays.items() if not np.isfinite(a).all()]:
        raise UserError(f"{path}: {name} holds values that are not finite in {', '.join(bad)}")
    return NormStats(**arrays, mode=mode)
