"""Tasks, their prompts and subtasks, the held-out combinations, and the sampling of episodes. No physics in here.

Three kinds: `clear` (everything into one bin), `sort` (warm and cool colours apart) and `pair` (two named blocks, in
the order asked). What to do next is a function of the task and of what one image shows, never of the past. A fourth,
`command`, is for training only: a random plan that its prompt does not tell.

A fifth is apart, because it cannot be done without a memory: `back`, a block into the other bin and back. The block
lies in one of two wide bins while the hand is at home, and at the end all is as it was; between, a block that hangs
over its own bin was either just picked up there or is about to be put back. What is next follows from the subtasks that
are completed (`Facts.completed`), which no image shows.
"""

from collections.abc import Collection, Mapping
import dataclasses
import itertools
from typing import Literal, get_args

import numpy as np

from openpi_ar.worlds.tabletop import scene
from openpi_ar.worlds.tabletop.scene import BINS, COLORS

Split = Literal["train", "held_out", "back"]
"""Which tasks: those of training, those with something that training never shows, or `back`."""

WARM = ("red", "yellow")
"""Colours that are not cool."""

HELD_OUT_COMBOS: frozenset[tuple[str, str]] = frozenset({("purple", "left"), ("yellow", "right")})
"""(colour, bin) that no training episode asks for, in any kind of task."""
HELD_OUT_PAIRS: frozenset[tuple[str, str, str, str]] = frozenset(
    {
        ("red", "right", "blue", "left"),
        ("green", "left", "red", "left"),
        ("blue", "right", "green", "right"),
        ("yellow", "left", "green", "left"),
        ("purple", "right", "red", "left"),
        ("blue", "left", "purple", "right"),
    }
)
"""(first colour, bin, second colour, bin) of `pair` prompts never seen in training, though each half is."""

_ADVERBS = {"middle": "in the middle"}

_LANDING = 0.004
"""How far from the middle of a bin blocks come to rest, metres (standard deviation): so they start in one, too."""
_TURNED = 0.03
"""The same of their yaw, radians: the pads have turned them square."""

LIFTED_Z = 0.07
"""Height of a held block's centre (its bottom then clears walls and blocks) from which it is being placed, metres."""


@dataclasses.dataclass(frozen=True)
class Task:
    """What is asked: `targets` is the plan, each (colour, bin) in the order in which it is to be done."""

    kind: Literal["clear", "sort", "pair", "command", "back"]
    prompt: str
    targets: tuple[tuple[str, str], ...]

    @property
    def is_ordered(self) -> bool:
        """The plan must be done in its order; otherwise a block already in the air may go first."""
        return self.kind in ("pair", "command")

    @property
    def is_held_out(self) -> bool:
        """The plan contains a held-out combination or is a held-out pair."""
        return bool(HELD_OUT_COMBOS.intersection(self.targets)) or (
            self.kind == "pair" and self.targets[0] + self.targets[1] in HELD_OUT_PAIRS
        )


@dataclasses.dataclass(frozen=True)
class Layout:
    """The start of an episode: colours of the blocks, xy [n, 2] metres, yaw [n] radians; tool [3], finger opening."""

    colors: tuple[str, ...]
    xy: np.ndarray
    yaw: np.ndarray
    tool: np.ndarray
    opening: float


@dataclasses.dataclass(frozen=True)
class Facts:
    """One moment: tool point [3], finger opening, block centres [3] by colour (metres), the colour held or None, the
    bins of the scene. `completed` is the one thing that cannot be seen: how many subtasks of a `back` task are done.
    """

    tool: np.ndarray
    opening: float
    blocks: Mapping[str, np.ndarray]
    held: str | None
    bins: scene.Bins = scene.THREE_BINS
    completed: int = 0


def clear_task(bin_name: str, colors: tuple[str, ...]) -> Task:
    """All blocks into one bin."""
    targets = tuple((color, bin_name) for color in COLORS if color in colors)
    return Task("clear", f"clear the table into the {bin_name} bin", targets)


def sort_task(warm_bin: str, cool_bin: str, colors: tuple[str, ...]) -> Task:
    """Warm colours into one bin, cool ones into another."""
    targets = tuple((color, warm_bin if color in WARM else cool_bin) for color in COLORS if color in colors)
    where = [_ADVERBS.get(name, name) for name in (warm_bin, cool_bin)]
    return Task("sort", f"put warm colours {where[0]} and cool colours {where[1]}", targets)


def pair_task(first: str, first_bin: str, second: str, second_bin: str) -> Task:
    """Two named blocks, in this order."""
    prompt = f"put the {first} block in the {first_bin} bin, then the {second} one in the {second_bin}"
    return Task("pair", prompt, ((first, first_bin), (second, second_bin)))


def back_task(color: str, bin_name: str) -> Task:
    """The named block into that one of two bins, then back into the other, where it was."""
    (other,) = set(scene.TWO_BINS.center) - {bin_name}
    return Task("back", f"move the {color} block to the {bin_name} bin and back", ((color, bin_name), (color, other)))


def command_task(rng: np.random.Generator, prompt: str, colors: tuple[str, ...]) -> Task:
    """A random plan without held-out combinations, whatever the prompt asks: only the subtask tells what is next."""
    allowed = {c: [b for b in BINS if (c, b) not in HELD_OUT_COMBOS] for c in colors}
    order = [str(color) for color in rng.permutation(colors)]
    return Task("command", prompt, tuple((c, allowed[c][int(rng.integers(len(allowed[c])))]) for c in order))


def known_prompts() -> tuple[str, ...]:
    """Every prompt there is, held-out ones included."""
    clear = [clear_task(name, ()) for name in BINS]
    sort = [sort_task(*names, ()) for names in itertools.permutations(BINS, 2)]
    pairs = itertools.product(itertools.permutations(COLORS, 2), BINS, BINS)
    pair = [pair_task(a, x, b, y) for (a, b), x, y in pairs]
    return tuple(task.prompt for task in (*clear, *sort, *pair))


def known_subtasks() -> tuple[str, ...]:
    """Every subtask there is: 5 to pick up, 15 to place, and "done"."""
    places = itertools.product(COLORS, BINS)
    return (*map(pick_up, COLORS), *(place(color, name) for color, name in places), "done")


def pick_up(color: str) -> str:
    """The subtask that ends when the block is in the air."""
    return f"pick up the {color} block"


def place(color: str, bin_name: str) -> str:
    """The subtask that ends when the block is released."""
    return f"place the {color} block in the {bin_name} bin"


def is_placed(facts: Facts, color: str, bin_name: str) -> bool:
    """The block is inside the bin's walls and not held."""
    return facts.held != color and facts.bins.of(facts.blocks[color]) == bin_name


def is_lifted(facts: Facts, color: str) -> bool:
    """The block is held, and high enough to be placed."""
    return facts.held == color and bool(facts.blocks[color][2] > LIFTED_Z)


def next_subtask(task: Task, facts: Facts) -> str:
    """The true subtask at this moment; depends on nothing but the task and what can be seen, and of a `back` task on
    what is completed.

    The next block is the first of the plan that is not in its bin. One exception: where the order is free (`clear`,
    `sort`), a block already in the air is placed first. Raises KeyError when a targeted block is not on the table.
    """
    if task.kind == "back":
        return (*plan(task), "done")[facts.completed]
    todo = [(color, name) for color, name in task.targets if not is_placed(facts, color, name)]
    if not todo:
        return "done"
    for color, name in todo[:1] if task.is_ordered else todo:
        if is_lifted(facts, color):
            return place(color, name)
    return pick_up(todo[0][0])


def plan(task: Task) -> tuple[str, ...]:
    """Every subtask of the task's targets, in their order."""
    return tuple(text for color, name in task.targets for text in (pick_up(color), place(color, name)))


def completed_after(task: Task, facts: Facts) -> int:
    """How many subtasks of a `back` task are completed at a moment whose facts know what was so the moment before."""
    done = facts.completed
    if done == 2 * len(task.targets):
        return done
    color, name = task.targets[done // 2]
    return done + (is_placed(facts, color, name) if done % 2 else is_lifted(facts, color))


def sample_task(
    rng: np.random.Generator, *, split: Split = "train", asked: Collection[str] = COLORS, pairs: float = 1 / 3
) -> tuple[Task, Layout]:
    """Draw an episode; by default the three kinds are equally likely.

    Args:
        rng: source of all randomness.
        split: `train` never asks for a held-out combination or pair; `held_out` always does. `back`: tasks of that
            kind, of every colour in `asked` and both bins, with up to two blocks that stand by.
        asked: only tasks whose targets all have one of these colours; other blocks may stand by.
        pairs: probability of a `pair`; the other two kinds are equally likely.

    Raises:
        ValueError: unknown split, or `asked` is not at least two of `scene.COLORS`.
    """
    if split not in get_args(Split):
        raise ValueError(f"split must be one of {', '.join(get_args(Split))}, got {split!r}")
    if len(set(asked)) < 2 or not set(asked) <= set(COLORS):
        raise ValueError(f"asked must be at least two of {', '.join(COLORS)}, got {tuple(asked)}")
    if split == "back":
        colors = [str(color) for color in rng.permutation(COLORS)]
        task = back_task(next(c for c in colors if c in asked), ("left", "right")[rng.integers(2)])
        others = [c for c in colors if c != task.targets[0][0]]
        return task, back_layout(rng, task, tuple(others[: rng.integers(3)]))
    kind = "pair" if rng.random() < pairs else ("clear", "sort")[rng.integers(2)]
    while True:
        task, colors = _propose(rng, kind)
        if task.is_held_out == (split == "held_out") and all(color in asked for color, _ in task.targets):
            return task, sample_layout(rng, colors)


def sample_layout(rng: np.random.Generator, colors: tuple[str, ...]) -> Layout:
    """Random block poses at least `BLOCK_SPACING` apart and a random start of the hand."""
    low, high = np.array([scene.BLOCKS_X, scene.BLOCKS_Y]).T
    count = len(colors)
    while True:
        xy = rng.uniform(low, high, (count, 2))
        gaps = np.linalg.norm(xy[:, None] - xy[None], axis=-1) + np.eye(count)
        if not count or gaps.min() >= scene.BLOCK_SPACING:
            break
    tool = rng.uniform([*low, 0.09], [high[0], scene.TOOL_HIGH[1] - 0.05, scene.TOOL_HIGH[2]])
    opening = scene.MAX_OPENING if rng.random() < 0.8 else rng.uniform(0, scene.MAX_OPENING)
    yaw = rng.uniform(-scene.BLOCK_YAW, scene.BLOCK_YAW, count)
    return Layout(colors, xy, yaw, tool, float(opening))


def back_layout(rng: np.random.Generator, task: Task, others: tuple[str, ...] = ()) -> Layout:
    """The block of a `back` task where it is to return to, as if it had been dropped there; `others` on the table."""
    color, home = task.targets[-1]
    table = sample_layout(rng, others)
    xy = scene.TWO_BINS.center[home] + rng.normal(0, _LANDING, 2)
    return Layout(
        colors=(color, *others),
        xy=np.concatenate([xy[None], table.xy]),
        yaw=np.concatenate([rng.normal(0, _TURNED, 1), table.yaw]),
        tool=scene.HOME.copy(),
        opening=scene.MAX_OPENING,
    )


def _propose(rng: np.random.Generator, kind: str) -> tuple[Task, tuple[str, ...]]:
    colors = tuple(str(color) for color in rng.permutation(COLORS)[: rng.integers(2, 5)])
    if kind == "sort":
        warm, cool = (BINS[i] for i in rng.permutation(len(BINS))[:2])
        return sort_task(warm, cool, colors), colors
    bins = [BINS[i] for i in rng.integers(len(BINS), size=2)]
    if kind == "clear":
        return clear_task(bins[0], colors), colors
    return pair_task(colors[0], bins[0], colors[1], bins[1]), colors
