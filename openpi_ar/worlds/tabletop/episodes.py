"""The tabletop's episodes as a rollout plays them: whose task, from which layout, and with which subtask forced."""

from collections.abc import Callable
from typing import Any

import numpy as np

from openpi_ar.errors import UserError
from openpi_ar.worlds.protocol import Info, Observation, Play, World
from openpi_ar.worlds.tabletop.expert import approached, expert_action, parse_subtask
from openpi_ar.worlds.tabletop.tasks import known_subtasks, next_subtask, pick_up, sample_task
from openpi_ar.worlds.tabletop.world import ACTIONS, CAMERAS, FPS, STATES, Tabletop

ACTION_NAMES = ("x (m)", "y (m)", "z (m)", "grip (> 0 closes)")
APPROACH_STEPS = 60
"""Control steps within which a hand that was told to pick up a block must have gone to one."""


def open_episodes(play: Play) -> Callable[[], "TabletopEpisodes"]:
    """Makes the worlds in which these episodes are played. Raises UserError if the model is for another robot."""
    own = len(STATES), len(ACTIONS)
    cameras, dims, size = play.cameras or CAMERAS, play.dims or own, play.image_size or (64, 64)
    if not set(cameras) <= set(CAMERAS) or dims != own:
        raise UserError(
            f"this checkpoint is for another robot than the tabletop's (cameras {', '.join(cameras)}; {dims[0]} state "
            f"and {dims[1]} action dimensions): give an observation with --images, --state and --prompt"
        )
    return lambda: TabletopEpisodes(play, Tabletop(size, cameras))


class TabletopEpisodes(World):
    """Episodes on the tabletop; the seed of an episode is also that of its scene.

    With a forced subtask an episode ends when the hand is down at a block, or after `APPROACH_STEPS`; a wrong one is
    "pick up the X block" where X is on the table but not what comes next. Raises UserError for values out of range, or
    a subtask that the tabletop does not have.

    Figures: `blocks_placed`, the fraction of the task's blocks in their bins at the end; `approached_named`, whether
    the first block that the hand went down to is the one that the forced subtask names, and `approached_true`, whether
    it is the one that the task needed; None without a forced subtask for a block on the table.
    """

    fps = FPS

    def __init__(self, play: Play, world: Tabletop) -> None:
        if play.seed < 0:
            raise UserError(f"seed must be 0 or more, found {play.seed}")
        if play.subtask is not None and play.wrong_subtask:
            raise UserError("a given subtask and a wrong one exclude each other: ask for one of them")
        if play.subtask is not None and play.subtask not in known_subtasks():
            raise UserError(
                f"the tabletop has no subtask {play.subtask!r}: there are e.g. 'pick up the red block', "
                "'place the red block in the left bin' or 'done'"
            )
        self.world, self._play = world, play
        self.forced = None

    def label(self, episode: int) -> dict[str, Any]:
        return {"seed": self.seed(episode)}

    def seed(self, episode: int) -> int:
        return self._play.seed + episode

    def prompt(self, episode: int) -> str:
        rng = np.random.default_rng(self.seed(episode))
        return sample_task(rng, split=self._play.split)[0].prompt

    def begin(self, episode: int, *, render: bool = True) -> tuple[Observation, Info]:
        seed = self.seed(episode)
        obs, self._info = self.world.reset(seed, split=self._play.split, render=render)
        self._needed = parse_subtask(self._info["subtask"])[0]
        self._first: str | None = None
        self.forced = self._play.subtask
        if self._play.wrong_subtask:
            others = sorted(color for color in self._info["positions"] if color != self._needed)
            self.forced = pick_up(others[seed % len(others)])
        return obs, self._info

    def step(self, action: np.ndarray, *, render: bool = True) -> tuple[Observation, float, bool, bool, Info]:
        obs, reward, terminated, truncated, self._info = self.world.step(action, render=render)
        if self.forced is not None:
            self._first = self._first or approached(self.world.facts())
            terminated |= self._first is not None
            truncated |= self._info["steps"] >= APPROACH_STEPS
        return obs, reward, terminated, truncated, self._info

    def expert_action(self) -> np.ndarray:
        facts = self.world.facts()
        return expert_action(facts, next_subtask(self.world.task, facts))

    def figures(self) -> dict[str, float | bool | None]:
        named = None if self.forced is None else parse_subtask(self.forced)[0]
        judged = named in self._info["positions"]
        return {
            "blocks_placed": self._info["blocks_placed"],
            "approached_named": self._first == named if judged else None,
            "approached_true": self._first == self._needed if judged else None,
        }
