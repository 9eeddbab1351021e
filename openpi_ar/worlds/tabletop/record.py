"""Recording one demonstration: the executed action is disturbed, the recorded one is the expert's clean answer (DART).

The policy so sees states off the ideal path together with the way back. M. Laskey et al., "DART: Noise Injection for
Robust Imitation Learning", CoRL 2017.
"""

from collections.abc import Collection
import dataclasses

import numpy as np

from openpi_ar.worlds.tabletop import scene
from openpi_ar.worlds.tabletop.expert import expert_action
from openpi_ar.worlds.tabletop.questions import sample_question
from openpi_ar.worlds.tabletop.tasks import Facts, Layout, Split, Task, command_task, next_subtask, sample_task
from openpi_ar.worlds.tabletop.world import Tabletop

_TRAINING = 0x7AB1E
"""Begins the seed of every training episode: `Tabletop.reset(0)`, `reset(1)`, ... are layouts never trained on."""

_DONE_FRAMES = 5
_MAX_ATTEMPTS = 20
_ASK_EVERY = 2
"""Frames from one question to the next."""


@dataclasses.dataclass
class Episode:
    """One demonstration of T frames.

    images uint8 [T, C, H, W, 3], state and action float32 [T, 4], subtasks [T], blocks float32 [T, colours, 3]: the
    blocks' centres in metres in the order of `scene.COLORS`, NaN where there is no such block. commanded: the subtasks
    do not follow from the prompt. questions: (question, answer) by frame.
    """

    prompt: str
    images: np.ndarray
    state: np.ndarray
    action: np.ndarray
    subtasks: list[str]
    blocks: np.ndarray
    commanded: bool
    questions: dict[int, tuple[str, str]]


class Disturbance:
    """What happens to the executed action: drifting offsets, forced drops, forced misses, picks of the wrong block.

    Args:
        rng: source of all randomness.
        noise: 0 leaves actions as they are; 1 is the usual amount.
    """

    def __init__(self, rng: np.random.Generator, noise: float) -> None:
        self._rng = rng
        self._noise = noise
        self._sigma = noise * rng.uniform(0.002, 0.015)
        self._offset = np.zeros(3)
        self._excursion = np.zeros(3)
        self._excursion_steps = 0
        self._drops = int(rng.random() < 0.2 * min(noise, 1))
        self._misses = int(rng.random() < 0.2 * min(noise, 1))
        self._wrong = int(rng.random() < 0.15 * min(noise, 1))
        self._forced: list[float] = []
        self._lure: str | None = None
        self._lure_steps = 0

    def __call__(self, action: np.ndarray, facts: Facts) -> np.ndarray:
        """The action float32 [4] to execute in place of the clean one."""
        if self._noise == 0:
            return action
        rng = self._rng
        action = self._wrong_block(action, facts)
        if rng.random() < 0.02:
            self._excursion = self._noise * rng.uniform(-0.035, 0.035, 3)
            self._excursion_steps = int(rng.integers(2, 6))
        self._excursion_steps -= 1
        if self._excursion_steps <= 0:
            self._excursion = np.zeros(3)
        # First-order autoregression, stationary at sigma: errors of a real policy last, they do not average out.
        self._offset = 0.8 * self._offset + 0.6 * self._sigma * rng.standard_normal(3)
        executed = action.copy()
        # Half of it along z, where the table is near and pressing on a block shows little.
        executed[:3] += ((self._offset + self._excursion) * np.array([1, 1, 0.5])).astype(np.float32)
        executed[3] = self._forced.pop(0) if self._forced else self._mishap(executed, facts)
        return executed

    def _mishap(self, action: np.ndarray, facts: Facts) -> float:
        over_table = facts.tool[1] < scene.BLOCKS_Y[1] - 0.01 and abs(facts.tool[0]) < scene.BLOCKS_X[1]
        if self._drops and facts.held and over_table and facts.tool[2] > 0.04 and self._rng.random() < 0.4:
            self._drops -= 1
            self._forced = [-1.0] * int(self._rng.integers(1, 3))
            return -1.0
        if self._misses and not facts.held and action[3] < 0 and self._rng.random() < 0.1:
            self._misses -= 1
            self._forced = [1.0] * int(self._rng.integers(1, 3))
            return 1.0
        return float(action[3])

    def _wrong_block(self, action: np.ndarray, facts: Facts) -> np.ndarray:
        """Now and then go for another block: the labels then show what to do with it in hand."""
        if facts.held or self._lure_steps <= 0:
            self._lure = None
        if self._lure is None and self._wrong and not facts.held and self._rng.random() < 0.1:
            self._wrong -= 1
            loose = [color for color, position in facts.blocks.items() if facts.bins.of(position) is None]
            if loose:
                self._lure, self._lure_steps = str(self._rng.choice(loose)), 12
        if self._lure is None:
            return action
        self._lure_steps -= 1
        return expert_action(facts, f"pick up the {self._lure} block")


def record_episode(
    world: Tabletop,
    seed: tuple[int, ...],
    noise: float,
    *,
    commanded: float = 0.0,
    asked: Collection[str] = scene.COLORS,
    pairs: float = 1 / 3,
    split: Split = "train",
) -> Episode:
    """A successful training demonstration; failed attempts are thrown away and drawn again.

    Args:
        world: environment to use; its state is lost.
        seed: non-negative integers; together they decide everything.
        noise: strength of the disturbance, 0 for none.
        commanded: probability of a random plan in place of the prompt's.
        asked: colours that may be targets; see `tasks.sample_task`.
        pairs: probability of a task that names two blocks and their order.
        split: `train`, or `back` for tasks that need a memory.

    Raises:
        RuntimeError: 20 attempts in a row failed, which points to a broken scene or expert.
    """
    for attempt in range(_MAX_ATTEMPTS):
        rng = np.random.default_rng([_TRAINING, *seed, attempt])
        task, layout = sample_task(rng, split=split, asked=asked, pairs=pairs)
        if rng.random() < commanded:
            task = command_task(rng, task.prompt, tuple(color for color in layout.colors if color in asked))
        episode = _attempt(world, rng, noise, task, layout)
        if episode is not None:
            return episode
    raise RuntimeError(f"the expert failed {_MAX_ATTEMPTS} attempts at demonstration {seed} with noise {noise}")


def _attempt(world: Tabletop, rng: np.random.Generator, noise: float, task: Task, layout: Layout) -> Episode | None:
    observation, _ = world.reset(0, task=task, layout=layout)
    disturb = Disturbance(rng, noise)
    images, states, actions, subtasks, blocks = [], [], [], [], []
    # A generator of its own: what is asked changes no action.
    asking, questions = rng.spawn(1)[0], {}
    success_at: int | None = None
    for step in range(world.max_steps):
        facts = world.facts()
        subtask = next_subtask(task, facts)
        action = expert_action(facts, subtask)
        images.append(np.stack([observation["images"][name] for name in world.cameras]))
        states.append(observation["state"])
        actions.append(action)
        subtasks.append(subtask)
        if step % _ASK_EVERY == 0:
            questions[step] = sample_question(asking, facts)[1:]
        blocks.append([facts.blocks.get(color, np.full(3, np.nan)) for color in scene.COLORS])
        if success_at is not None and step - success_at >= _DONE_FRAMES - 1:
            break
        observation, _, terminated, _, _ = world.step(disturb(action, facts))
        if terminated and success_at is None:
            success_at = step + 1
    if success_at is None or subtasks[-1] != "done":
        return None
    return Episode(
        prompt=task.prompt,
        images=np.stack(images),
        state=np.stack(states),
        action=np.stack(actions),
        subtasks=subtasks,
        blocks=np.array(blocks, np.float32),
        commanded=task.kind == "command",
        questions=questions,
    )
