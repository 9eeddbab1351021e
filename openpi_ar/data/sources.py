"""The one place that knows every kind of training data: from a config to (training, held-out) sources of raw samples."""

import dataclasses

from openpi_ar.config import LeRobotData, RobotConfig, TabletopData, TrainConfig
from openpi_ar.data.layout import SingleSource, TrainingSource
from openpi_ar.data.lerobot.load import load_lerobot
from openpi_ar.data.mixture import Mixture
from openpi_ar.errors import UserError
from openpi_ar.text.templates import get_template
from openpi_ar.worlds.tabletop.source import load_tabletop

TABLETOP = "tabletop"
"""In `data.mix`: the embedded demonstrations."""

Loaded = tuple[SingleSource, SingleSource, list[str]]
"""Training source, held-out source, remarks."""


def load_sources(cfg: TrainConfig) -> tuple[TrainingSource, TrainingSource, list[str]]:
    """(training, held-out, remarks for the user). Generates or decodes what is not cached yet, with a progress bar.

    Raises UserError in one line for anything that does not fit.
    """
    model, data = cfg.model, cfg.data
    if isinstance(data, TabletopData):
        return *load_tabletop(data, model.action_horizon, model.cameras), []
    loaded = [_lerobot(cfg, data)]
    weights = [1.0]
    for entry in data.mix:
        name, weight = _mixed_in(entry)
        if name == TABLETOP:
            loaded.append(_tabletop(cfg, data))
        else:
            loaded.append(_lerobot(cfg, dataclasses.replace(data, path=name, episodes=())))
        weights.append(weight)
    train, held_out, remarks = zip(*loaded, strict=True)
    if not data.mix:
        return train[0], held_out[0], remarks[0]
    parts = [f"{part.name}: {len(part)} training frames, weight {w:g}" for part, w in zip(train, weights, strict=True)]
    return (
        Mixture(train, tuple(weights)),
        Mixture(held_out, tuple(weights)),
        [*parts, *(f"{part.name}: {r}" for part, rs in zip(train, remarks, strict=True) for r in rs)],
    )


def _lerobot(cfg: TrainConfig, data: LeRobotData) -> Loaded:
    says_text = get_template(cfg.text.template).target is not None
    model = cfg.model
    return load_lerobot(data, model.action_horizon, model.cameras, model.siglip.image_size, says_text=says_text)


def _tabletop(cfg: TrainConfig, data: LeRobotData) -> Loaded:
    if data.robot != RobotConfig():
        raise UserError("data.mix: the embedded tabletop is a robot of its own: leave it out, or data.robot")
    own = TabletopData(image_size=cfg.model.siglip.image_size, cache_dir=data.cache_dir)
    return *load_tabletop(own, cfg.model.action_horizon, cfg.model.cameras), []


def _mixed_in(entry: str) -> tuple[str, float]:
    """ "PATH=WEIGHT" """
    name, _, weight = entry.rpartition("=")
    try:
        value = float(weight)
    except ValueError:
        value = 0.0
    if not name or not 0 < value < float("inf"):
        raise UserError(f"data.mix takes PATH=WEIGHT with a positive weight, found {entry!r}")
    return name, value
