"""LIBERO-10's three "put both ... in the basket" tasks: prompts, and what is to be done next. Needs no simulator."""

from collections.abc import Mapping
import dataclasses

import numpy as np

BASKET = "basket"
DONE = "done"

LIFTED = 0.025
"""Height above the table from which an object counts as picked up, metres."""
_RIM_MARGIN = 0.04
"""How far above the basket's rim the centre of an object that was let go may still be, metres."""


@dataclasses.dataclass(frozen=True)
class Task:
    """One task: its number in the suite libero_10, LIBERO's own prompt, and the objects that go into the basket."""

    index: int
    prompt: str
    objects: tuple[str, str]


_PAIRS = {
    0: ("alphabet soup", "tomato sauce"),
    1: ("cream cheese box", "butter"),
    7: ("alphabet soup", "cream cheese box"),
}
TASKS = {i: Task(i, f"put both the {a} and the {b} in the basket", (a, b)) for i, (a, b) in _PAIRS.items()}
"""By their number in libero_10."""
_OBJECTS = tuple(dict.fromkeys(name for task in TASKS.values() for name in task.objects))

NAMES = {
    "alphabet_soup_1": "alphabet soup",
    "tomato_sauce_1": "tomato sauce",
    "cream_cheese_1": "cream cheese box",
    "butter_1": "butter",
    "basket_1": BASKET,
}
"""What prompts call LIBERO's bodies; all others keep their own name."""


@dataclasses.dataclass(frozen=True)
class Box:
    """An object as a box: `center` [3] and `half` sizes [3] in metres; the columns of `axes` [3 3] are its edges."""

    center: np.ndarray
    axes: np.ndarray
    half: np.ndarray

    @property
    def extent(self) -> np.ndarray:
        """Half sizes [3] of the box around it along x, y and z."""
        return np.abs(self.axes) @ self.half

    @property
    def top(self) -> float:
        """Height of its highest point."""
        return float(self.center[2] + self.extent[2])

    @property
    def bottom(self) -> float:
        """Height of its lowest point."""
        return float(self.center[2] - self.extent[2])


@dataclasses.dataclass(frozen=True)
class Facts:
    """What one moment shows, in metres.

    tool     point between the finger tips [3].
    axes     directions of the hand [3 3]: columns x, y (along which the fingers open) and z (where they point).
    opening  distance between the fingers.
    objects  boxes by name, the basket among them.
    held     the object that both fingers touch, or None.
    table    height of the table.
    """

    tool: np.ndarray
    axes: np.ndarray
    opening: float
    objects: Mapping[str, Box]
    held: str | None
    table: float


def pick_up(name: str) -> str:
    """The subtask until the object is in the air."""
    return f"pick up the {name}"


def put(name: str) -> str:
    """The subtask from then on until it is let go."""
    return f"put the {name} in the basket"


def known_subtasks() -> tuple[str, ...]:
    """Every subtask of the three tasks."""
    return (*map(pick_up, _OBJECTS), *map(put, _OBJECTS), DONE)


def parse_subtask(subtask: str) -> tuple[str | None, bool]:
    """(object, whether it goes into the basket); (None, False) for "done". Raises ValueError for any other text."""
    if subtask == DONE:
        return None, False
    for name in _OBJECTS:
        if subtask in (pick_up(name), put(name)):
            return name, subtask == put(name)
    raise ValueError(f"unknown subtask {subtask!r}; see openpi_ar.worlds.libero.tasks.known_subtasks()")


def is_placed(facts: Facts, name: str) -> bool:
    """The object was let go over or in the basket: it counts from the moment of release."""
    basket, box = facts.objects[BASKET], facts.objects[name]
    inside = np.abs(box.center[:2] - basket.center[:2]) < basket.extent[:2]
    return bool(facts.held != name and inside.all() and box.center[2] < basket.top + _RIM_MARGIN)


def is_lifted(facts: Facts, name: str) -> bool:
    """The object is held in the air."""
    return facts.held == name and facts.objects[name].bottom > facts.table + LIFTED


def next_subtask(task: Task, facts: Facts) -> str:
    """The true subtask at this moment; depends on nothing but the task and what can be seen.

    An object of the task that is in the air goes into the basket; else the first of the prompt's that is not there yet
    is picked up.
    """
    todo = [name for name in task.objects if not is_placed(facts, name)]
    lifted = [name for name in todo if is_lifted(facts, name)]
    if lifted:
        return put(lifted[0])
    return pick_up(todo[0]) if todo else DONE
