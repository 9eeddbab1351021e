"""Recording a demonstration on LIBERO: the executed action is disturbed, the recorded one is the expert's clean answer.

As on the tabletop (`worlds/tabletop/record.py`). Layouts are drawn by LIBERO's rules, so that its initial states
are never trained on.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import functools

import numpy as np

from openpi_ar.worlds.libero.expert import expert_action
from openpi_ar.worlds.libero.tasks import DONE, Facts, next_subtask
from openpi_ar.worlds.libero.world import LiberoWorld
from openpi_ar.worlds.processes import map_in_processes

_DONE_FRAMES = 5
_MAX_ATTEMPTS = 10
_NEAR = 0.12
"""The hand may close too early when it is this near above an object, metres."""


@dataclasses.dataclass
class Episode:
    """T frames: images uint8 [T, 2, H, W, 3], state float32 [T, 8], action float32 [T, 7], subtasks [T]."""

    prompt: str
    images: np.ndarray
    state: np.ndarray
    action: np.ndarray
    subtasks: list[str]


class Disturbance:
    """What happens to the executed action: drifting offsets, excursions, a hand that closes too early.

    Args:
        rng: source of all randomness.
        noise: 0 leaves actions as they are; 1 is the usual amount.
    """

    def __init__(self, rng: np.random.Generator, noise: float) -> None:
        self._rng, self._noise = rng, noise
        # Commands, not metres: 0.1 of the full command moves the hand by 2 to 3 mm a step.
        self._sigma = noise * rng.uniform(0.02, 0.15)
        self._offset = np.zeros(6)
        self._excursion, self._excursion_steps = np.zeros(3), 0
        self._misses = int(rng.random() < 0.2 * min(noise, 1))
        self._closing = 0

    def __call__(self, action: np.ndarray, facts: Facts) -> np.ndarray:
        """The action float32 [7] to execute in place of the clean one."""
        if self._noise == 0:
            return action
        rng = self._rng
        if rng.random() < 0.01:
            self._excursion = self._noise * rng.uniform(-0.7, 0.7, 3)
            self._excursion_steps = int(rng.integers(2, 6))
        self._excursion_steps -= 1
        if self._excursion_steps <= 0:
            self._excursion = np.zeros(3)
        # First-order autoregression, stationary at sigma: errors of a real policy last, they do not average out.
        self._offset = 0.8 * self._offset + 0.6 * self._sigma * rng.standard_normal(6)
        executed = action.copy()
        executed[:6] += (self._offset * [1, 1, 1, 0.3, 0.3, 0.3]).astype(np.float32)
        executed[:3] += self._excursion.astype(np.float32)
        executed[6] = self._grip(action, facts)
        return np.clip(executed, -1, 1)

    def _grip(self, action: np.ndarray, facts: Facts) -> float:
        low = facts.tool[2] < facts.table + _NEAR
        if self._misses and facts.held is None and action[6] < 0 and low and self._rng.random() < 0.1:
            self._misses -= 1
            self._closing = int(self._rng.integers(3, 7))
        self._closing -= 1
        return 1.0 if self._closing >= 0 else float(action[6])


def record_episode(world: LiberoWorld, task: int, seed: tuple[int, ...], noise: float) -> Episode:
    """A successful demonstration from a layout never used in evaluation; failed attempts are drawn again.

    Args:
        world: environment to use; its state is lost.
        task: number in libero_10.
        seed: non-negative integers; together with the task they decide everything.
        noise: strength of the disturbance, 0 for none.

    Raises:
        RuntimeError: 10 attempts in a row failed, which points to a broken scene or expert.
    """
    for attempt in range(_MAX_ATTEMPTS):
        episode = _attempt(world, task, np.random.default_rng([task, *seed, attempt]), noise)
        if episode is not None:
            return episode
    raise RuntimeError(
        f"the expert failed {_MAX_ATTEMPTS} attempts at task {task}, demonstration {seed}, with noise {noise}"
    )


def record_episodes(
    jobs: Sequence[tuple[int, tuple[int, ...]]], image_size: tuple[int, int], noise: float, workers: int = 1
) -> Iterator[Episode]:
    """`record_episode` for each (task, seed), in this order; tasks side by side build their scenes once.

    `workers` processes, each with its own world; 1 stays in this process.
    """
    return map_in_processes(functools.partial(_record, image_size, noise), jobs, workers)


def _record(image_size: tuple[int, int], noise: float, job: tuple[int, tuple[int, ...]]) -> Episode:
    return record_episode(_world(image_size), *job, noise)


_world = functools.lru_cache(1)(LiberoWorld)


def _attempt(world: LiberoWorld, task: int, rng: np.random.Generator, noise: float) -> Episode | None:
    observation, info = world.reset(task, None, seed=int(rng.integers(2**31)))
    disturb = Disturbance(rng, noise)
    images, states, actions, subtasks = [], [], [], []
    for _ in range(world.max_steps):
        facts = world.facts()
        subtask = next_subtask(world.task, facts)
        action = expert_action(facts, subtask)
        images.append(np.stack(list(observation["images"].values())))
        states.append(observation["state"])
        actions.append(action)
        subtasks.append(subtask)
        if subtasks[-_DONE_FRAMES:] == [DONE] * _DONE_FRAMES:
            break
        observation, _, _, _, info = world.step(disturb(action, facts))
    if subtasks[-1] != DONE or not info["success"]:
        return None
    return Episode(world.task.prompt, np.stack(images), np.stack(states), np.stack(actions), subtasks)
