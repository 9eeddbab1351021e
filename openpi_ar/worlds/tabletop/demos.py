"""Demonstrations on disk: generated once on all cores, cached, memory-mapped.

Every episode has its own seed, so the result does not depend on the number of workers. A cache directory appears by one
rename when it is complete; a half-written one is never read.
"""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
import dataclasses
import hashlib
import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from openpi_ar.files import Mapped, cache_root, when_whole
from openpi_ar.worlds.tabletop.record import Episode, record_episode
from openpi_ar.worlds.tabletop.scene import COLORS
from openpi_ar.worlds.tabletop.tasks import known_prompts, known_subtasks
from openpi_ar.worlds.tabletop.world import CAMERAS, Tabletop

GENERATOR_VERSION = 6
"""Raise when the scene, the expert or the recording changes: old caches are then left alone and not read."""

_CHUNK = 4
"""Episodes per job: small enough for an even load and a lively progress bar, large enough that sending is cheap."""


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    """What to generate.

    episodes     number of successful demonstrations.
    seed         different seeds share no episode.
    image_size   height and width in pixels.
    noise        strength of the disturbance while recording; 1 is the usual amount, 0 none.
    commanded    fraction of the episodes whose plan is random and not the prompt's.
    asked        colours of the blocks that tasks ask for; others only stand by.
    pairs        fraction of the tasks that name two blocks and their order, the hardest kind.
    cache_dir    parent of the cache; None: $OPENPI_AR_CACHE, else ~/.cache/openpi_ar.
    """

    episodes: int = 1000
    seed: int = 0
    image_size: tuple[int, int] = (64, 64)
    noise: float = 1.0
    commanded: float = 0.0
    asked: tuple[str, ...] = COLORS
    pairs: float = 1 / 3
    cache_dir: str | None = None


@dataclasses.dataclass(frozen=True)
class Demos(Mapped):
    """N frames of demonstrations, episode after episode; arrays are read-only memory maps.

    images         uint8 [N, C, H, W, 3], cameras in the order of `camera_names`.
    state          float32 [N, 4]: tool x, y, z and finger opening, metres.
    action         float32 [N, 4]: the expert's clean tool target x, y, z (metres) and grip (-1 open, +1 close).
    prompt_id      int32 [N], into `prompts`.
    subtask_id     int32 [N], into `subtasks`.
    episode_index  int32 [N], ascending from 0.
    blocks         float32 [N, colours, 3]: true block centres, metres, NaN where absent. Never an input of a policy.
    commanded      bool [N]: the subtask does not follow from the prompt.
    """

    images: np.ndarray
    state: np.ndarray
    action: np.ndarray
    prompt_id: np.ndarray
    subtask_id: np.ndarray
    episode_index: np.ndarray
    blocks: np.ndarray
    commanded: np.ndarray
    prompts: tuple[str, ...]
    subtasks: tuple[str, ...]
    camera_names: tuple[str, ...]


class TabletopDemos:
    """The demonstrations that a config stands for, as an object: `TabletopDemos(config).load()`."""

    def __init__(self, config: DemoConfig) -> None:
        self.config = config

    @property
    def path(self) -> Path:
        """Where the cache of this config is or will be."""
        return cache_path(self.config)

    def load(self, workers: int | None = None) -> Demos:
        """See `load_or_generate`."""
        return load_or_generate(self.config, workers)


def cache_path(cfg: DemoConfig) -> Path:
    """Cache directory of a config: its content, not its place, decides the name."""
    content = {
        **dataclasses.asdict(cfg),
        "noise": float(cfg.noise),
        "commanded": float(cfg.commanded),
        "pairs": float(cfg.pairs),
        "cache_dir": None,
        "cameras": CAMERAS,
        "version": GENERATOR_VERSION,
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    return cache_root(cfg.cache_dir) / "tabletop" / digest


def load_or_generate(cfg: DemoConfig, workers: int | None = None) -> Demos:
    """Open the cache, after generating it if it is not there.

    Args:
        cfg: what to generate.
        workers: processes; None for one per core available to this process, 0 to stay in this process.

    Raises:
        ValueError: no episodes, a negative seed or noise, a size that is not positive, a fraction outside [0, 1],
            colours that are not the scene's, or negative workers.
    """
    if cfg.episodes < 1 or cfg.seed < 0 or cfg.noise < 0 or min(cfg.image_size) < 1:
        raise ValueError(f"episodes and image_size must be at least 1, seed and noise at least 0; got {cfg}")
    if not 0 <= cfg.pairs <= 1:
        raise ValueError(f"pairs must be in [0, 1]; got {cfg}")
    if not 0 <= cfg.commanded <= 1 or len(set(cfg.asked)) < 2 or not set(cfg.asked) <= set(COLORS):
        raise ValueError(f"commanded must be in [0, 1] and asked two or more of {', '.join(COLORS)}; got {cfg}")
    if workers is not None and workers < 0:
        raise ValueError(f"workers must be at least 0, got {workers}")
    path = cache_path(cfg)
    if not path.is_dir():
        with when_whole(path) as scratch:
            _generate(cfg, scratch, workers)
    return _load(path)


def _load(path: Path) -> Demos:
    meta = json.loads((path / "meta.json").read_text())

    def column(name: str) -> np.ndarray:
        return np.load(path / f"{name}.npy", mmap_mode="r")

    return Demos(
        images=column("images"),
        state=column("state"),
        action=column("action"),
        prompt_id=column("prompt_id"),
        subtask_id=column("subtask_id"),
        episode_index=column("episode_index"),
        blocks=column("blocks"),
        commanded=column("commanded"),
        prompts=tuple(meta["prompts"]),
        subtasks=tuple(meta["subtasks"]),
        camera_names=tuple(meta["camera_names"]),
    )


def _generate(cfg: DemoConfig, path: Path, workers: int | None) -> None:
    prompts = {prompt: i for i, prompt in enumerate(known_prompts())}
    subtasks = {subtask: i for i, subtask in enumerate(known_subtasks())}
    names = ("state", "action", "blocks", "prompt_id", "subtask_id", "commanded")
    columns: dict[str, list[np.ndarray]] = {name: [] for name in names}
    lengths: list[int] = []
    raw = path / "images.raw"
    with raw.open("wb") as file, _progress() as progress:
        bar = progress.add_task("demonstrations", total=cfg.episodes, speed=0.0)
        for episode in _episodes(cfg, workers):
            file.write(episode.images.tobytes())  # straight to disk: all of them may not fit in memory
            lengths.append(len(episode.state))
            columns["state"].append(episode.state)
            columns["action"].append(episode.action)
            columns["blocks"].append(episode.blocks)
            columns["prompt_id"].append(np.full(lengths[-1], prompts[episode.prompt], np.int32))
            columns["commanded"].append(np.full(lengths[-1], episode.commanded))
            columns["subtask_id"].append(np.array([subtasks[name] for name in episode.subtasks], np.int32))
            elapsed = max(progress.tasks[bar].elapsed or 0.0, 1e-6)
            progress.update(bar, advance=1, speed=sum(lengths) / elapsed)
    for name, parts in columns.items():
        np.save(path / f"{name}.npy", np.concatenate(parts))
    np.save(path / "episode_index.npy", np.repeat(np.arange(len(lengths), dtype=np.int32), lengths))
    _as_npy(raw, (sum(lengths), len(CAMERAS), *cfg.image_size, 3))
    meta = {"prompts": list(prompts), "subtasks": list(subtasks), "camera_names": CAMERAS}
    (path / "meta.json").write_text(json.dumps(meta, indent=1))


def _as_npy(raw: Path, shape: tuple[int, ...]) -> None:
    """Turn a file of bare uint8 into an .npy of this shape, a slice at a time."""
    target = np.lib.format.open_memmap(raw.with_suffix(".npy"), mode="w+", dtype=np.uint8, shape=shape)
    flat, source = target.reshape(-1), np.memmap(raw, np.uint8, mode="r")
    for start in range(0, len(flat), 1 << 26):
        flat[start : start + (1 << 26)] = source[start : start + (1 << 26)]
    target.flush()
    raw.unlink()


def _episodes(cfg: DemoConfig, workers: int | None) -> Iterator[Episode]:
    """All episodes in order of their index."""
    count = len(os.sched_getaffinity(0)) if workers is None and hasattr(os, "sched_getaffinity") else workers
    chunks = [range(i, min(i + _CHUNK, cfg.episodes)) for i in range(0, cfg.episodes, _CHUNK)]
    if count == 0:
        for chunk in chunks:
            yield from _record_chunk(cfg, chunk)
        return
    # Never fork: the parent may hold the threads of an accelerator runtime.
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
        for episodes in pool.map(_record_chunk, [cfg] * len(chunks), chunks):
            yield from episodes


def _record_chunk(cfg: DemoConfig, indices: range) -> list[Episode]:
    world = Tabletop(cfg.image_size)
    how = {"commanded": cfg.commanded, "asked": cfg.asked, "pairs": cfg.pairs}
    return [record_episode(world, (cfg.seed, i), cfg.noise, **how) for i in indices]


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TextColumn("{task.fields[speed]:.0f} frames/s"), TimeRemainingColumn())
