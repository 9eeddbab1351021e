"""From a config to training and held-out sources of raw samples: one dataset, or several mixed by weight."""

from collections.abc import Callable
import dataclasses

from openpi_ar.config import TrainConfig
from openpi_ar.data.layout import TrainingSource
from openpi_ar.data.lerobot.load import load_lerobot
from openpi_ar.data.mixture import Mixture
from openpi_ar.errors import UserError
from openpi_ar.text.templates import get_template

Locate = Callable[[str, str | None], str]
"""(path of a dataset as the config has it, `data.cache_dir`) -> its directory or its name on the Hugging Face hub."""


def load_sources(
    cfg: TrainConfig, locate: Locate = lambda path, cache_dir: path
) -> tuple[TrainingSource, TrainingSource, tuple[str, ...]]:
    """(training source, held-out source, remarks for the user). Decodes what is not cached yet, with a progress bar.

    `locate` turns the paths of the config into those of datasets. Raises UserError for anything that does not fit.
    """
    model, data = cfg.model, cfg.data
    needs_subtask = get_template(cfg.text.template).target is not None
    entries = [(data.path, 1.0), *map(_mixed_in, data.mix)]
    loaded = []
    for i, (path, _) in enumerate(entries):
        one = dataclasses.replace(data, path=locate(path, data.cache_dir), episodes=() if i else data.episodes)
        loaded.append(
            load_lerobot(one, model.action_horizon, model.cameras, model.siglip.image_size, needs_subtask=needs_subtask)
        )
    train, held_out, remarks = zip(*loaded, strict=True)
    if not data.mix:
        return train[0], held_out[0], tuple(remarks[0])
    weights = tuple(weight for _, weight in entries)
    parts = [f"{part.name}: {len(part)} training frames, weight {w:g}" for part, w in zip(train, weights, strict=True)]
    notes = [f"{part.name}: {r}" for part, rs in zip(train, remarks, strict=True) for r in rs]
    return Mixture(train, weights), Mixture(held_out, weights), (*parts, *notes)


def _mixed_in(entry: str) -> tuple[str, float]:
    """(path, weight) of "PATH=WEIGHT"."""
    path, _, weight = entry.rpartition("=")
    try:
        value = float(weight)
    except ValueError:
        value = 0.0
    if not path or not 0 < value < float("inf"):
        raise UserError(f"data.mix takes PATH=WEIGHT with a positive weight, found {entry!r}")
    return path, value
