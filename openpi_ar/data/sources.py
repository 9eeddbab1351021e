"""The one place that knows every kind of training data: from a config to (training, held-out) sources of raw samples."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from openpi_ar.config import LeRobotData, TrainConfig
from openpi_ar.data.lerobot import load_lerobot
from openpi_ar.data.normalize import Mode, NormStats
from openpi_ar.data.tabletop import load_tabletop
from openpi_ar.text.prompts import TEMPLATES


@runtime_checkable
class TrainingSource(Protocol):
    """Random access to raw samples (`data/inputs.py`), and what training asks of them as a whole."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict: ...

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts that occur."""
        ...

    def norm_stats(self, mode: Mode = "quantile") -> dict[str, NormStats]:
        """Statistics of `state` and `actions`, without reading an image."""
        ...

    def poses(self, index: np.ndarray, cameras: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(images uint8 [B C h w 3], objects [B O 3], NaN where absent, tool [B 3]): for `training/vision.py`."""
        ...


def load_sources(cfg: TrainConfig) -> tuple[TrainingSource, TrainingSource, list[str]]:
    """(training, held-out, remarks for the user). Generates or decodes what is not cached yet, with a progress bar.

    Raises UserError in one line for anything that does not fit.
    """
    model = cfg.model
    if isinstance(cfg.data, LeRobotData):
        # A robot's own mapping (slices, delta actions, gripper) belongs here, around the two sources: statistics and samples
        # then see the same numbers.
        says_text = TEMPLATES[cfg.text.template].target is not None
        size = model.siglip.image_size
        return load_lerobot(cfg.data, model.action_horizon, model.cameras, size, says_text=says_text)
    train, held_out = load_tabletop(cfg.data, model.action_horizon, model.cameras)
    return train, held_out, []
