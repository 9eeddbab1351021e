"""The tabletop's demonstrations as a LeRobot v3.0 dataset: what training on the tabletop reads.

Every episode has its own seed, so the dataset does not depend on the number of processes that record it.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
import dataclasses
import hashlib
import json
import multiprocessing
import os
from pathlib import Path
from typing import Literal

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from openpi_ar.data.lerobot.meta import SUPERVISE
from openpi_ar.data.lerobot.write import LeRobotWriter, Spec
from openpi_ar.errors import UserError
from openpi_ar.files import cache_root, when_whole
from openpi_ar.worlds.tabletop.record import Episode, record_episode
from openpi_ar.worlds.tabletop.scene import COLORS
from openpi_ar.worlds.tabletop.world import ACTIONS, CAMERAS, STATES, Tabletop
from openpi_ar.worlds.video import FPS

GENERATOR_VERSION = 6
"""Raise when the scene, the expert or the recording changes: datasets in the cache are then left alone and not read."""

POSES = "observation.environment_state"
"""Feature with the true place of every block: x, y, z in metres and whether it is there (0 or 1). Never a policy's
input."""

_CHUNK = 4
"""Episodes per job: small enough for an even load and a lively progress bar, large enough that sending is cheap."""
_IN_PROCESS = 8
"""Up to this many episodes are recorded by this process: starting others costs more."""


@dataclasses.dataclass(frozen=True)
class Demonstrations:
    """Which demonstrations to record; the parameters of `world://tabletop?episodes=1000&...`."""

    episodes: int = 1000
    """Successful demonstrations."""
    seed: int = 0
    """Different seeds share no episode."""
    image_size: tuple[int, int] = (64, 64)
    """Height and width in pixels."""
    noise: float = 1.0
    """Strength of the disturbances that the expert recovers from; 1 is the usual amount, 0 none."""
    commanded: float = 0.0
    """Fraction of the episodes in which the expert follows a random plan that the prompt does not tell. Their text is
    not supervised: their actions follow from the subtask alone, which teaches a model to obey it."""
    asked: tuple[str, ...] = COLORS
    """Colours of the blocks that tasks ask for; others only stand by."""
    pairs: float = 1 / 3
    """Fraction of the tasks that name two blocks and their order, the hardest kind."""

    def check(self) -> None:
        """Raises UserError that names every value out of range."""
        least = {"episodes": 1, "seed": 0, "noise": 0}
        wrong = [
            f"{k} must be {low} or more, found {v}" for k, low in least.items() if not (v := getattr(self, k)) >= low
        ]
        if min(self.image_size) < 1:
            wrong.append(f"image_size must be positive, found {'x'.join(map(str, self.image_size))}")
        fractions = {"commanded": self.commanded, "pairs": self.pairs}
        wrong += [f"{name} must lie in [0, 1], found {v}" for name, v in fractions.items() if not 0 <= v <= 1]
        if len(set(self.asked)) < 2 or not set(self.asked) <= set(COLORS):
            wrong.append(f"asked must be two or more of {', '.join(COLORS)}, found {', '.join(self.asked) or 'none'}")
        if wrong:
            raise UserError(f"tabletop demonstrations: {'; '.join(wrong)}")


def cache_path(demos: Demonstrations, cache_dir: str | None = None) -> Path:
    """Where the dataset of these demonstrations is or will be; `cache_dir`: see `files.cache_root`."""
    content = {
        **dataclasses.asdict(demos),
        "noise": float(demos.noise),
        "commanded": float(demos.commanded),
        "pairs": float(demos.pairs),
        "cameras": CAMERAS,
        "version": GENERATOR_VERSION,
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    return cache_root(cache_dir) / "worlds" / "tabletop" / digest / "dataset"


def cached_dataset(demos: Demonstrations, cache_dir: str | None = None) -> Path:
    """The dataset's directory in the cache, recorded with a progress bar if it is not there.

    Images are lossless. A half-written dataset is never seen, and of two processes that record the same one the first
    to end provides it. Raises UserError for values out of range.
    """
    demos.check()
    path = cache_path(demos, cache_dir)
    if not path.is_dir():
        with when_whole(path.parent) as scratch:
            record_dataset(scratch / path.name, demos, images="png", subtasks="index")
    return path


def record_dataset(
    out: str | Path,
    demos: Demonstrations,
    *,
    images: Literal["png", "h264", "av1"] = "h264",
    subtasks: Literal["both", "index", "language"] = "both",
    workers: int | None = None,
) -> Path:
    """Records the demonstrations and returns the dataset's directory, which appears when it is complete.

    States and actions are exact, images with `png` too. `supervise_text` is False on commanded episodes, `POSES` holds
    where the blocks are.

    Args:
        out: must not exist.
        demos: what to record.
        images: `png`: in the parquet files; else the codec of the videos.
        subtasks: LeRobot's conventions for them, see `Spec`.
        workers: processes; None: one per core available to this process; 0: this process.

    Raises:
        UserError: values out of range, `out` exists, or the codec cannot take images of this size.
    """
    demos.check()
    return write_dataset(
        out, _shown(demos, _episodes(demos, workers)), demos.image_size, images=images, subtasks=subtasks
    )


def write_dataset(
    out: str | Path,
    episodes: Iterable[Episode],
    image_size: tuple[int, int],
    *,
    images: Literal["png", "h264", "av1"] = "h264",
    subtasks: Literal["both", "index", "language"] = "both",
) -> Path:
    """Writes the episodes as they come; otherwise as `record_dataset`."""
    spec = Spec(
        fps=FPS,
        robot_type="tabletop",
        cameras=tuple(f"observation.images.{name}" for name in CAMERAS),
        image_size=image_size,
        vectors={
            "observation.state": STATES,
            POSES: tuple(f"{color}.{axis}" for color in COLORS for axis in ("x", "y", "z", "present")),
            "action": ACTIONS,
        },
        flags=(SUPERVISE,),
        images=images,
        subtasks=subtasks,
    )
    with LeRobotWriter(out, spec) as writer:
        for episode in episodes:
            writer.add(
                episode.prompt,
                {key: episode.images[:, c] for c, key in enumerate(spec.cameras)},
                {"observation.state": episode.state, POSES: encode_blocks(episode.blocks), "action": episode.action},
                subtasks=episode.subtasks,
                flags={SUPERVISE: np.full(len(episode.state), not episode.commanded)},
            )
    return writer.root


def encode_blocks(blocks: np.ndarray) -> np.ndarray:
    """Positions [T O 3], NaN where absent, to x, y, z, present of each [T 4 O]: statistics cannot hold NaN."""
    present = np.isfinite(blocks).all(-1, keepdims=True)
    return np.concatenate([np.where(present, blocks, 0.0), present], -1).reshape(len(blocks), -1).astype(np.float32)


def decode_blocks(encoded: np.ndarray) -> np.ndarray:
    """Inverse of `encode_blocks`: float32 [T O 3]."""
    objects = encoded.reshape(len(encoded), -1, 4)
    return np.where(objects[..., 3:] > 0.5, objects[..., :3], np.nan).astype(np.float32)


def _episodes(demos: Demonstrations, workers: int | None) -> Iterator[Episode]:
    """All episodes in order of their index."""
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = 0 if demos.episodes <= _IN_PROCESS else cores
    chunks = [range(i, min(i + _CHUNK, demos.episodes)) for i in range(0, demos.episodes, _CHUNK)]
    if workers == 0:
        for chunk in chunks:
            yield from _record_chunk(demos, chunk)
        return
    # Never fork: the parent may hold the threads of an accelerator runtime.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for episodes in pool.map(_record_chunk, [demos] * len(chunks), chunks):
            yield from episodes


def _record_chunk(demos: Demonstrations, indices: range) -> list[Episode]:
    world = Tabletop(demos.image_size)
    how = {"commanded": demos.commanded, "asked": demos.asked, "pairs": demos.pairs}
    return [record_episode(world, (demos.seed, i), demos.noise, **how) for i in indices]


def _shown(demos: Demonstrations, episodes: Iterator[Episode]) -> Iterator[Episode]:
    """The episodes, with a progress bar."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    frames = 0
    with Progress(*columns, TextColumn("{task.fields[speed]:.0f} frames/s"), TimeRemainingColumn()) as progress:
        bar = progress.add_task("demonstrations", total=demos.episodes, speed=0.0)
        for episode in episodes:
            yield episode
            frames += len(episode.state)
            elapsed = max(progress.tasks[bar].elapsed or 0.0, 1e-6)
            progress.update(bar, advance=1, speed=frames / elapsed)
