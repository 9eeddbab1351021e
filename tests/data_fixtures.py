"""Small demonstrations with recognisable values, and the transform that reads them."""

import dataclasses

import numpy as np

from configs.debug import DEBUG
from openpi_ar.config import TrainConfig
from openpi_ar.data.inputs import InputTransform
from openpi_ar.text.tokenizer import load_tokenizer
from openpi_ar.worlds.tabletop.demos import Demos
from openpi_ar.worlds.tabletop.source import TabletopSource, split_sources

LENGTHS = (7, 5, 9, 6)
PROMPTS = ("put the red block in the left bin", "put the blue block in the right bin", "put all blocks in the left bin")
SUBTASKS = ("pick up the red block", "place the red block in the left bin", "done")
HORIZON = DEBUG.model.action_horizon


def demos(lengths: tuple[int, ...] = LENGTHS) -> Demos:
    """Frame i of all has action [i, 0, 0, +-1] and pixels that spell i; episode e has prompt e mod 3."""
    n = sum(lengths)
    rng = np.random.default_rng(0)
    index = np.arange(n)
    images = np.broadcast_to(index[:, None, None, None, None].astype(np.uint8), (n, 2, 32, 32, 3)).copy()
    images[:, 1] += 100
    action = np.stack([index, rng.normal(size=n), rng.normal(size=n), np.where(index % 2, 1, -1)], -1)
    episode = np.repeat(np.arange(len(lengths)), lengths).astype(np.int32)
    return Demos(
        images=images,
        state=rng.normal(size=(n, 4)).astype(np.float32),
        action=action.astype(np.float32),
        prompt_id=(episode % len(PROMPTS)).astype(np.int32),
        subtask_id=(index % len(SUBTASKS)).astype(np.int32),
        episode_index=episode,
        blocks=np.full((n, 5, 3), np.nan, np.float32),
        commanded=np.zeros(n, bool),
        prompts=PROMPTS,
        subtasks=SUBTASKS,
        camera_names=("front", "wrist"),
    )


def sources() -> tuple[TabletopSource, TabletopSource]:
    """(training, held-out): three episodes and one."""
    return split_sources(demos(), HORIZON, DEBUG.model.cameras)


def transform(cfg: TrainConfig = DEBUG, **model: object) -> InputTransform:
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, **model))
    return InputTransform(cfg, load_tokenizer("embedded"), sources()[0].norm_stats())
