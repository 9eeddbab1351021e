"""LIBERO's episodes as a rollout plays them: each task from LIBERO's own initial states."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from openpi_ar.errors import UserError
from openpi_ar.worlds.libero.expert import expert_action
from openpi_ar.worlds.libero.tasks import TASKS, next_subtask
from openpi_ar.worlds.libero.world import ACTION_DIM, FPS, STATE_DIM, LiberoWorld
from openpi_ar.worlds.protocol import Info, Observation, Play, World

ACTION_NAMES = ("x", "y", "z", "turn x", "turn y", "turn z", "grip (-1 opens)")


def plan_episodes(world: LiberoWorld, counts: Mapping[int, int], first: int = 0) -> list[tuple[int, int]]:
    """(task, initial state) of so many episodes of each task from state `first` on, task by task.

    Raises UserError for another task than those of `TASKS`, a state that LIBERO lacks, or no episodes.
    """
    if not counts or not set(counts) <= set(TASKS):
        raise UserError(f"tasks are {list(counts)}: choose some of {', '.join(map(str, TASKS))} of libero_10")
    for task, count in counts.items():
        states = world.num_states(task)
        if count < 1:
            raise UserError(f"must be at least 1: episodes is {count}")
        if first < 0 or first + count > states:
            raise UserError(
                f"task {task} has initial states 0 to {states - 1}, asked for {first} to {first + count - 1}"
            )
    return [(task, first + i) for task, count in counts.items() for i in range(count)]


def spread(episodes: int, tasks: Sequence[int]) -> dict[int, int]:
    """How many episodes of each task, as evenly as may be; tasks without any are left out."""
    counts = {task: episodes // len(tasks) + (k < episodes % len(tasks)) for k, task in enumerate(tasks)}
    return {task: count for task, count in counts.items() if count}


def open_episodes(play: Play) -> Callable[[], "LiberoEpisodes"]:
    """Makes the worlds in which these episodes are played, spread evenly over the tasks; `play.seed` is the first
    initial state. Raises UserError if LIBERO is not installed, lacks what is asked, or the model is for another robot.
    """
    if play.split != "train" or play.subtask is not None or play.wrong_subtask:
        raise UserError(
            "LIBERO has no held-out tasks and forces no subtask: leave out --split, --subtask, --wrong-subtask"
        )
    check_dims(play.dims or (STATE_DIM, ACTION_DIM))
    plan = plan_episodes(LiberoWorld(), spread(play.episodes, tuple(TASKS)), play.seed)
    return lambda: LiberoEpisodes(plan, LiberoWorld(), play.seed)


def check_dims(dims: tuple[int, int]) -> None:
    """Raises UserError if a robot with this many dimensions of state and actions is not LIBERO's."""
    if dims != (STATE_DIM, ACTION_DIM):
        raise UserError(
            f"this checkpoint is for another robot than LIBERO's ({STATE_DIM} state and {ACTION_DIM} action "
            f"dimensions): it has {dims[0]} and {dims[1]}. Train one on what `python -m openpi_ar.worlds.libero "
            "record` writes"
        )


class LiberoEpisodes(World):
    """Episodes on LIBERO. Figure: `objects_placed`, the fraction of the task's objects in the basket at the end.

    `plan` holds the task and the initial state of each episode; in order of their task they start fastest. `seed` is
    that of the policy's session in the first one.
    """

    fps = FPS
    forced = None

    def __init__(self, plan: Sequence[tuple[int, int]], world: LiberoWorld, seed: int = 0) -> None:
        self.world, self._plan, self._seed = world, plan, seed

    def label(self, episode: int) -> dict[str, Any]:
        task, state = self._plan[episode]
        return {"task": task, "state": state}

    def seed(self, episode: int) -> int:
        return self._seed + episode

    def prompt(self, episode: int) -> str:
        return TASKS[self._plan[episode][0]].prompt

    def begin(self, episode: int, *, render: bool = True) -> tuple[Observation, Info]:
        obs, self._info = self.world.reset(*self._plan[episode], render=render)
        return obs, self._info

    def step(self, action: np.ndarray, *, render: bool = True) -> tuple[Observation, float, bool, bool, Info]:
        obs, reward, terminated, truncated, self._info = self.world.step(action, render=render)
        return obs, reward, terminated, truncated, self._info

    def expert_action(self) -> np.ndarray:
        facts = self.world.facts()
        return expert_action(facts, next_subtask(self.world.task, facts))

    def figures(self) -> dict[str, float | bool | None]:
        return {"objects_placed": self._info["objects_placed"]}
