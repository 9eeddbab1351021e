"""The training source over the embedded tabletop's demonstrations: frames in, raw samples out."""

from collections.abc import Sequence
import dataclasses
import math

import numpy as np

from openpi_ar.config import TabletopData
from openpi_ar.data.layout import Column, Layout, Numbers, stats_of
from openpi_ar.data.normalize import Mode, NormStats
from openpi_ar.errors import UserError
from openpi_ar.worlds.tabletop import demos as sim_demos
from openpi_ar.worlds.tabletop.scene import COLORS
from openpi_ar.worlds.tabletop.world import CAMERAS

HELD_OUT = 0.05
"""Fraction of the episodes, taken from the end, that training never sees (at least one)."""

STATE = ("x", "y", "z", "opening")
ACTION = ("x", "y", "z", "grip")

_IN_PROCESS = 8


@dataclasses.dataclass(frozen=True)
class TabletopSource:
    """Random access to the frames of some episodes, as raw samples for `InputTransform.sample`.

    A sample is the frame and the `horizon` actions from it on. Past the episode's end the last action is repeated and
    `action_valid` is False.
    """

    demos: sim_demos.Demos
    frames: np.ndarray
    """Indices into the demonstrations [rows]."""
    horizon: int
    last: np.ndarray
    """Index of the last frame of each demonstration frame's episode [all frames]."""

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> dict:
        d, t = self.demos, int(self.frames[index])
        steps = np.arange(t, t + self.horizon)
        end = self.last[t]
        return {
            "images": {name: np.asarray(d.images[t, c]) for c, name in enumerate(d.camera_names)},
            "state": np.asarray(d.state[t]),
            "prompt": d.prompts[int(d.prompt_id[t])],
            "subtask": d.subtasks[int(d.subtask_id[t])],
            "actions": np.asarray(d.action[np.minimum(steps, end)]),
            "action_valid": steps <= end,
            "supervise_text": not d.commanded[t],
        }

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts that occur in these frames."""
        return tuple(self.demos.prompts[i] for i in np.unique(self.demos.prompt_id[self.frames]))

    @property
    def name(self) -> str:
        """For messages."""
        return "the embedded tabletop"

    @property
    def subtasks(self) -> tuple[str, ...]:
        """The subtasks that occur in these frames."""
        return tuple(self.demos.subtasks[i] for i in np.unique(self.demos.subtask_id[self.frames]))

    @property
    def layout(self) -> Layout:
        """Cameras and dimensions of the scene."""
        return Layout({name: name for name in self.demos.camera_names}, STATE, ACTION)

    def where(self, index: int) -> str:
        """ "episode E, frame F"."""
        frame, episode = int(self.frames[index]), np.asarray(self.demos.episode_index)
        return f"episode {episode[frame]}, frame {frame - int(np.searchsorted(episode, episode[frame]))}"

    def unlabelled(self) -> list[str]:
        """None: the expert says every one."""
        return []

    def numbers(self) -> Numbers:
        """States and actions of all frames of this source."""
        rows = np.arange(len(self.frames))
        arrays = {"state": self.demos.state, "actions": self.demos.action}
        return {k: [Column(c, rows) for c in np.asarray(x)[self.frames].T] for k, x in arrays.items()}

    def norm_stats(self, mode: Mode = "quantile") -> dict[str, NormStats]:
        """Statistics of states and actions over all frames of this source."""
        return stats_of(self.numbers(), mode)

    @property
    def objects(self) -> tuple[str, ...]:
        """Every block's colour, in the order of `poses`."""
        return COLORS

    def poses(self, index: np.ndarray, cameras: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(images uint8 [B C h w 3], blocks [B O 3] in metres, NaN where absent, tool [B 3]) of these rows."""
        d, frames = self.demos, self.frames[index]
        order = [d.camera_names.index(name) for name in cameras]
        return np.asarray(d.images[frames])[:, order], np.asarray(d.blocks[frames]), np.asarray(d.state[frames, :3])


def asked_colors(cfg: TabletopData) -> tuple[str, ...]:
    """Colours that tasks ask for. Raises UserError if they are not at least two of the scene's."""
    asked = cfg.asked or COLORS
    if len(set(asked)) < 2 or not set(asked) <= set(COLORS):
        raise UserError(f"data.asked must name at least two of {', '.join(COLORS)}, found {' '.join(asked)}")
    return asked


def load_tabletop(cfg: TabletopData, horizon: int, cameras: Sequence[str]) -> tuple[TabletopSource, TabletopSource]:
    """Training and held-out sources; generates and caches the demonstrations on first use (shows its progress).

    Raises UserError if a camera of the model is not one of the scene's or there are fewer than two episodes.
    """
    if cfg.episodes < 2:
        raise UserError(f"data.episodes must be at least 2 (one is held out for evaluation), found {cfg.episodes}")
    _check_cameras(cameras, CAMERAS)
    demos = sim_demos.load_or_generate(
        sim_demos.DemoConfig(
            episodes=cfg.episodes,
            seed=cfg.seed,
            image_size=cfg.image_size,
            noise=cfg.noise,
            commanded=cfg.commanded,
            asked=asked_colors(cfg),
            pairs=cfg.pairs,
            cache_dir=cfg.cache_dir,
        ),
        # Starting worker processes costs more than a few episodes do.
        workers=0 if cfg.episodes <= _IN_PROCESS else None,
    )
    return split_sources(demos, horizon, cameras)


def split_sources(
    demos: sim_demos.Demos, horizon: int, cameras: Sequence[str]
) -> tuple[TabletopSource, TabletopSource]:
    """(training, held-out) sources over the demonstrations, split by episode.

    Of the held-out episodes only those count whose subtasks follow from the prompt: nobody can say the others.
    """
    _check_cameras(cameras, demos.camera_names)
    episode = np.asarray(demos.episode_index)
    ids, inverse = np.unique(episode, return_inverse=True)
    starts = np.flatnonzero(np.r_[True, np.diff(episode) != 0])
    if len(starts) != len(ids):
        raise UserError("the demonstrations' frames are not grouped by episode: delete their cache and run again")
    last = np.r_[starts[1:], len(episode)] - 1
    held_out = max(1, math.ceil(HELD_OUT * len(ids)))
    is_train = inverse < len(ids) - held_out
    all_last = last[inverse]
    train, test = (np.flatnonzero(mask) for mask in (is_train, ~is_train & ~np.asarray(demos.commanded)))
    if not len(test):
        raise UserError("all held-out episodes are commanded ones: raise data.episodes or lower data.commanded")
    return TabletopSource(demos, train, horizon, all_last), TabletopSource(demos, test, horizon, all_last)


def _check_cameras(wanted: Sequence[str], present: Sequence[str]) -> None:
    if missing := [name for name in wanted if name not in present]:
        raise UserError(
            f"model.cameras names {', '.join(missing)}, but the tabletop has {', '.join(present)}: "
            f"set --model.cameras {' '.join(present)}"
        )
