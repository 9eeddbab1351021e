"""The embedded tabletop's demonstrations as a LeRobot v3.0 dataset, with everything that training on them uses."""

import itertools
from pathlib import Path
from typing import Literal

import numpy as np
from rich.progress import track

from openpi_ar.data.lerobot.load import SUPERVISE
from openpi_ar.data.lerobot.source import POSES
from openpi_ar.data.lerobot.write import LeRobotWriter, Spec
from openpi_ar.errors import UserError
from openpi_ar.worlds.tabletop.demos import DemoConfig, Demos, load_or_generate
from openpi_ar.worlds.tabletop.scene import COLORS
from openpi_ar.worlds.tabletop.source import ACTION, STATE
from openpi_ar.worlds.video import FPS

# Starting worker processes costs more than a few episodes do.
_IN_PROCESS = 8


def export_tabletop(
    out: str | Path,
    demos: DemoConfig,
    *,
    images: Literal["png", "h264", "av1"] = "h264",
    subtasks: Literal["both", "index", "language"] = "both",
) -> Path:
    """Writes the demonstrations of this config (generated and cached on first use) and returns the dataset's directory.

    Raises UserError if `out` exists already or the codec cannot take images of this size.
    """
    if Path(out).expanduser().exists():
        raise UserError(f"{out} exists already: remove it or choose another directory")  # before minutes of generating
    return write_demos(out, load_or_generate(demos, 0 if demos.episodes <= _IN_PROCESS else None), images, subtasks)


def write_demos(
    out: str | Path,
    data: Demos,
    images: Literal["png", "h264", "av1"] = "h264",
    subtasks: Literal["both", "index", "language"] = "both",
) -> Path:
    """As `export_tabletop`, of demonstrations at hand.

    States and actions are exact, images with `png` too. `supervise_text` is False on commanded episodes;
    `observation.environment_state` holds where the blocks are.
    """
    spec = Spec(
        fps=FPS,
        robot_type="tabletop",
        cameras=tuple(f"observation.images.{name}" for name in data.camera_names),
        image_size=(data.images.shape[2], data.images.shape[3]),
        vectors={
            "observation.state": STATE,
            POSES: tuple(f"{color}.{axis}" for color in COLORS for axis in ("x", "y", "z", "present")),
            "action": ACTION,
        },
        flags=(SUPERVISE,),
        images=images,
        subtasks=subtasks,
    )
    starts = np.flatnonzero(np.r_[True, np.diff(data.episode_index) != 0, True])
    with LeRobotWriter(out, spec) as writer:
        for start, stop in track(list(itertools.pairwise(starts)), "exporting"):
            _add(writer, data, slice(int(start), int(stop)))
    return writer.root


def _add(writer: LeRobotWriter, data: Demos, rows: slice) -> None:
    keys = writer.spec.cameras
    writer.add(
        data.prompts[int(data.prompt_id[rows.start])],
        {key: np.asarray(data.images[rows, c]) for c, key in enumerate(keys)},
        {"observation.state": data.state[rows], POSES: encode_blocks(data.blocks[rows]), "action": data.action[rows]},
        subtasks=[data.subtasks[int(i)] for i in data.subtask_id[rows]],
        flags={SUPERVISE: ~np.asarray(data.commanded[rows])},
    )


def encode_blocks(blocks: np.ndarray) -> np.ndarray:
    """Positions [T O 3], NaN where absent, to x, y, z, present of each [T 4 O]: statistics cannot hold NaN."""
    present = np.isfinite(blocks).all(-1, keepdims=True)
    return np.concatenate([np.where(present, blocks, 0.0), present], -1).reshape(len(blocks), -1).astype(np.float32)
