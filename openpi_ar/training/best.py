"""Saves the parameters of the best evaluation, apart from the run's checkpoints, of which only the last ones stay."""

from collections.abc import Mapping
import math
from pathlib import Path
import shutil

from openpi_ar.checkpoints import store
from openpi_ar.config import TrainConfig
from openpi_ar.errors import UserError
from openpi_ar.training import distributed
from openpi_ar.training.metrics import FILE, read_metrics
from openpi_ar.training.state import TrainState
from openpi_ar.training.store import CheckpointStore

FOLDER = "best"


class KeepBest:
    """`<exp>/best/<step>`: parameters and assets of the step whose `cfg.keep_best` was best; does nothing if that is
    empty.

    A resumed run knows the earlier values from `metrics.jsonl`.
    """

    def __init__(self, cfg: TrainConfig, directory: Path, assets: store.Assets):
        self._metric, self._sign = cfg.keep_best.removeprefix("-"), -1.0 if cfg.keep_best.startswith("-") else 1.0
        self._assets, self._writer, self._best = assets, None, math.inf
        if not self._metric:
            return
        self._best = distributed.agree(self._earlier(directory) if distributed.is_primary() else math.inf)
        self._writer = CheckpointStore(directory / FOLDER, keep_last=0)

    def _earlier(self, directory: Path) -> float:
        """The value of what is saved already, infinite if there is nothing."""
        kept = store.latest_step(directory / FOLDER)
        if kept is None:
            return math.inf
        known = {r["step"]: r.get(self._metric) for r in read_metrics(directory / FILE) if r["kind"] == "eval"}
        value = known.get(kept)
        if value is None:  # of a step after the one resumed from, which will be evaluated again
            shutil.rmtree(directory / FOLDER)
            return math.inf
        return self._sign * value

    def offer(self, step: int, values: Mapping[str, float], state: TrainState) -> bool:
        """Saves the state's best parameters if these held-out values are better than any before. Returns whether it
        did.

        Raises UserError if there is no such metric.
        """
        if self._writer is None:
            return False
        if self._metric not in values:
            raise UserError(f"keep_best: no held-out metric {self._metric!r}; there are {', '.join(values)}")
        value = self._sign * values[self._metric]
        if not value < self._best:
            return False
        self._best = value
        self._writer.save_for_policy(step, state.best_model, self._assets)
        return True

    def close(self) -> None:
        """Returns when everything is on disk."""
        if self._writer is not None:
            self._writer.close()
