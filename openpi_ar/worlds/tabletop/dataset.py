"""The tabletop's demonstrations as a LeRobot v3.0 dataset: what training on the tabletop reads.

Every episode has its own seed, so the dataset does not depend on the number of processes that record it.
"""

from collections.abc import Iterable, Iterator
import dataclasses
import functools
from pathlib import Path
import time
from typing import Literal

import numpy as np

from openpi_ar.data.lerobot.meta import SUPERVISE
from openpi_ar.data.lerobot.write import Images, LeRobotWriter, Spec, Subtasks
from openpi_ar.errors import UserError
from openpi_ar.files import ANOTHER_CACHE, atomic_directory, cache_root, cores, digest
from openpi_ar.tables import progress_bar
from openpi_ar.worlds.processes import map_in_processes
from openpi_ar.worlds.tabletop.record import Episode, record_episode
from openpi_ar.worlds.tabletop.scene import COLORS
from openpi_ar.worlds.tabletop.world import ACTIONS, CAMERAS, FPS, STATES, Tabletop

GENERATOR_VERSION = 7
"""Raise when the scene, the expert or the recording changes: datasets in the cache are then left alone and not read."""

POSES = "observation.environment_state"
"""Feature with every block's true place: x, y, z in metres and whether it is there (0 or 1). Never a policy's input."""

_CHUNK = 4
"""Episodes sent at a time: small enough for an even load and a lively progress bar."""
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
    split: Literal["train", "back"] = "train"
    """`back`: a block into the other bin and back instead, which cannot be done without a memory (`text.memory`)."""

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
        if self.split == "back" and self.commanded:
            wrong.append(f"commanded must be 0 with split=back, whose plan is its prompt's, found {self.commanded}")
        if wrong:
            raise UserError(f"tabletop demonstrations: {'; '.join(wrong)}")


def cache_path(demos: Demonstrations, cache_dir: str | None = None) -> Path:
    """Where the dataset of these demonstrations is or will be; `cache_dir`: see `files.cache_root`."""
    floats = {name: float(getattr(demos, name)) for name in ("noise", "commanded", "pairs")}
    content = {**dataclasses.asdict(demos), **floats, "cameras": CAMERAS, "version": GENERATOR_VERSION}
    if demos.split == "train":  # as it was called before there was another
        del content["split"]
    return cache_root(cache_dir) / "worlds" / "tabletop" / digest(content) / "dataset"


def cached_dataset(demos: Demonstrations, cache_dir: str | None = None) -> Path:
    """The dataset's directory in the cache, recorded with a progress bar if it is not there.

    Images are lossless. A half-written dataset is never seen, and of two processes that record the same one the first
    to end provides it. Raises UserError for values out of range.
    """
    demos.check()
    path = cache_path(demos, cache_dir)
    if not path.is_dir():
        with atomic_directory(path.parent, instead=ANOTHER_CACHE) as scratch:
            record_dataset(scratch / path.name, demos, images="png", subtasks="index", questions=True)
    return path


def record_dataset(
    out: str | Path,
    demos: Demonstrations,
    *,
    images: Images = "h264",
    subtasks: Subtasks = "both",
    questions: bool = False,
    workers: int | None = None,
) -> Path:
    """Records the demonstrations and returns the dataset's directory, which appears when it is complete.

    States and actions are exact, images with `png` too. `supervise_text` is False on commanded episodes, `POSES` holds
    where the blocks are.

    `images`, `subtasks` and `questions` are those of `Spec`; `workers` are processes, None: one per core, 0: this
    process alone. Raises UserError for values out of range, an `out` that exists, or images of a size that the codec
    cannot take.
    """
    demos.check()
    if workers is None:
        workers = 0 if demos.episodes <= _IN_PROCESS else cores()
    episodes = map_in_processes(functools.partial(_record, demos), range(demos.episodes), workers, _CHUNK)
    shown = _shown(episodes, demos.episodes)
    return write_dataset(out, shown, demos.image_size, images=images, subtasks=subtasks, questions=questions)


def write_dataset(
    out: str | Path,
    episodes: Iterable[Episode],
    image_size: tuple[int, int],
    *,
    images: Images = "h264",
    subtasks: Subtasks = "both",
    questions: bool = False,
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
        questions=questions,
    )
    with LeRobotWriter(out, spec) as writer:
        for episode in episodes:
            writer.add(
                episode.prompt,
                {key: episode.images[:, c] for c, key in enumerate(spec.cameras)},
                {"observation.state": episode.state, POSES: encode_blocks(episode.blocks), "action": episode.action},
                subtasks=episode.subtasks,
                flags={SUPERVISE: np.full(len(episode.state), not episode.commanded)},
                questions=episode.questions if questions else {},
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


def _record(demos: Demonstrations, i: int) -> Episode:
    how = {"commanded": demos.commanded, "asked": demos.asked, "pairs": demos.pairs, "split": demos.split}
    return record_episode(_world(demos.image_size), (demos.seed, i), demos.noise, **how)


_world = functools.lru_cache(1)(Tabletop)


def _shown(episodes: Iterator[Episode], total: int) -> Iterator[Episode]:
    """The episodes, with a progress bar."""
    began, frames = time.perf_counter(), 0
    with progress_bar("demonstrations", total) as update:
        for done, episode in enumerate(episodes, 1):
            yield episode
            frames += len(episode.state)
            update(done, f"{frames / (time.perf_counter() - began):.0f} frames/s")
