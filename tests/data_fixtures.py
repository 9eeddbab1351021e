"""Small demonstrations with recognisable values, and the transform that reads them."""

import dataclasses
from pathlib import Path

import numpy as np

from configs.debug import DEBUG
from openpi_ar.config import LeRobotData, TrainConfig
from openpi_ar.data.inputs import InputTransform
from openpi_ar.data.layout import Layout
from openpi_ar.data.lerobot.columns import Frames
from openpi_ar.data.lerobot.meta import Episode, Meta
from openpi_ar.data.lerobot.source import LeRobotSource, Table
from openpi_ar.text.tokenizer import load_tokenizer

LENGTHS = (7, 5, 9, 6)
PROMPTS = ("put the red block in the left bin", "put the blue block in the right bin", "put all blocks in the left bin")
SUBTASKS = ("pick up the red block", "place the red block in the left bin", "done")
HORIZON = DEBUG.model.action_horizon
PLAIN = dataclasses.replace(DEBUG, data=LeRobotData())
"""Without a dataset there is no robot of its own: observations are in the model's form."""


def table(shift: int = 0) -> Table:
    """Frame i of all has action [i, 0, 0, +-1] and pixels that spell i; episode e has prompt e mod 3. `shift`: 10 times this is
    added to the actions, and itself to the pixels."""
    n = sum(LENGTHS)
    rng = np.random.default_rng(0)
    index = np.arange(n)
    front = np.broadcast_to((index + shift)[:, None, None, None].astype(np.uint8), (n, 32, 32, 3)).copy()
    action = np.stack([index, rng.normal(size=n), rng.normal(size=n), np.where(index % 2, 1, -1)], -1)
    episode = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    starts = np.concatenate([[0], np.cumsum(LENGTHS)])
    episodes = tuple(Episode(e, length, Path("file"), (), {}) for e, length in enumerate(LENGTHS))
    meta = Meta(Path("/data/demos"), "v3.0", 10.0, "toy", {}, episodes)
    return Table(
        frames=Frames(meta, episodes, {}, starts, np.zeros(n, np.float32), ()),
        images={"front": front.__getitem__, "wrist": (front + np.uint8(100)).__getitem__},
        masked=(),
        state=rng.normal(size=(n, 4)).astype(np.float32),
        actions=(action + 10 * shift).astype(np.float32),
        prompts=PROMPTS,
        prompt_id=episode % len(PROMPTS),
        subtasks=SUBTASKS,
        subtask_id=index % len(SUBTASKS),
        supervise=np.ones(n, bool),
        last=np.repeat(starts[1:] - 1, LENGTHS),
        layout=Layout({"front": "front", "wrist": "wrist"}, "xyzo", "xyzg"),
    )


def in_runs() -> Table:
    """The same with every label on two frames in a row."""
    return dataclasses.replace(table(), subtask_id=np.arange(sum(LENGTHS)) // 2 % len(SUBTASKS))


def sources(data: Table | None = None) -> tuple[LeRobotSource, LeRobotSource]:
    """(training, held-out): three episodes and one."""
    data = data or table()
    robot = DEBUG.data.reader(DEBUG.model.cameras)
    split = sum(LENGTHS[:-1])
    parts = np.arange(split), np.arange(split, sum(LENGTHS))
    train, held_out = (LeRobotSource(data, rows, HORIZON, robot) for rows in parts)
    return train, held_out


def transform(cfg: TrainConfig = PLAIN, **model: object) -> InputTransform:
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, **model))
    return InputTransform.for_training(cfg, load_tokenizer("embedded"), sources()[0].norm_stats())
