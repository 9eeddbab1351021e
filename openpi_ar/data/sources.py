"""From a config to training and held-out sources of raw samples: one dataset, or several mixed by weight."""

from collections.abc import Callable
import dataclasses
from typing import NamedTuple

from openpi_ar.config import TrainConfig
from openpi_ar.data import questions
from openpi_ar.data.layout import SingleSource, TrainingSource
from openpi_ar.data.lerobot.load import load_lerobot
from openpi_ar.data.lerobot.meta import EVENTS
from openpi_ar.data.lerobot.questions import questions_of
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
    if not 0 <= data.questions < float("inf"):
        raise UserError(f"data.questions is a weight of 0 or more, found {data.questions}")
    loaded: list[_Part] = []
    for i, (path, weight) in enumerate([(data.path, 1.0), *map(_mixed_in, data.mix)]):
        if questions.is_folder(path):
            if not i:
                raise UserError(f"data.path {path} holds questions alone: give it in --data.mix, beside a robot's data")
            loaded.append(_Part(*questions.load_folder(path, model.cameras, data.held_out), [], weight))
            continue
        one = dataclasses.replace(data, path=locate(path, data.cache_dir), episodes=() if i else data.episodes)
        asked = {"needs_subtask": needs_subtask, "memory": cfg.text.memory}
        sources = load_lerobot(one, model.action_horizon, model.cameras, model.siglip.image_size, **asked)
        loaded.append(_Part(*sources, weight))
        if data.questions and EVENTS in sources[0].table.frames.meta.features:
            asked = questions_of(sources[0], sources[1], model.cameras)
            loaded.append(_Part(*asked, [], weight * data.questions))
    if data.questions and len(loaded) == 1 + len(data.mix):
        raise UserError(
            f"data.questions is {data.questions:g}, but no dataset has questions (rows of style vqa in {EVENTS}): "
            "set it to 0"
        )
    train, held_out, remarks, weights = zip(*loaded, strict=True)
    if len(loaded) == 1:
        return train[0], held_out[0], tuple(remarks[0])
    parts = [f"{part.name}: {len(part)} training rows, weight {w:g}" for part, w in zip(train, weights, strict=True)]
    notes = [f"{part.name}: {r}" for part, rs in zip(train, remarks, strict=True) for r in rs]
    return Mixture(train, weights), Mixture(held_out, weights), (*parts, *notes)


class _Part(NamedTuple):
    train: SingleSource
    held_out: SingleSource
    remarks: list[str]
    weight: float


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
