"""Questions about one moment of the tabletop, whose answers its images tell for certain.

held    what colour is the block in the gripper?     red | none
table   how many blocks are on the table?            zero | one | two | ...: outside of the bins and not held
bin     what is in the left bin?                     nothing | blue | red and blue
side    is the red block left of the blue one?       yes | no
done    what was just done?                          nothing | picked up the red block | placed the red block in ...
"""

from collections.abc import Iterator
import itertools

import numpy as np

from openpi_ar.worlds.tabletop import scene
from openpi_ar.worlds.tabletop.scene import BINS, COLORS
from openpi_ar.worlds.tabletop.tasks import LIFTED_Z, Facts

KINDS = ("held", "table", "bin", "side", "done")
_COUNTS = ("zero", "one", "two", "three", "four", "five")
_APART = 0.02
"""Metres to the side from which on left and right are plain to see."""


def all_questions(facts: Facts) -> dict[str, list[tuple[str, str]]]:
    """Every question of each kind with its answer; none of a kind where the answer would not be certain."""
    return {kind: list(_OF_KIND[kind](facts)) for kind in KINDS}


def sample_question(rng: np.random.Generator, facts: Facts) -> tuple[str, str, str]:
    """(kind, question, answer), kinds that can be asked now being equally likely."""
    possible = {kind: questions for kind, questions in all_questions(facts).items() if questions}
    kind = tuple(possible)[rng.integers(len(possible))]
    return kind, *possible[kind][rng.integers(len(possible[kind]))]


def kind_of(question: str) -> str:
    """The kind of a question of this file."""
    return next(kind for kind, begin in _BEGINS.items() if question.startswith(begin))


def known_questions() -> tuple[str, ...]:
    """Every question there is."""
    sides = (_side(a, b) for a, b in itertools.permutations(COLORS, 2))
    return (_BEGINS["held"], _BEGINS["table"], *map(_bin, BINS), *sides, _BEGINS["done"])


_BEGINS = {
    "held": "what colour is the block in the gripper?",
    "table": "how many blocks are on the table?",
    "bin": "what is in the ",
    "side": "is the ",
    "done": "what was just done?",
}


def _bin(name: str) -> str:
    return f"{_BEGINS['bin']}{name} bin?"


def _side(first: str, second: str) -> str:
    return f"{_BEGINS['side']}{first} block left of the {second} one?"


def _placed(facts: Facts) -> dict[str, list[str]]:
    """Colours in each bin, in the order of `COLORS`."""
    where = {color: facts.bins.of(facts.blocks[color]) for color in COLORS if color in facts.blocks}
    there = [name for name in BINS if name in facts.bins.center]
    return {name: [color for color, place in where.items() if place == name and color != facts.held] for name in there}


def _held_now(facts: Facts) -> Iterator[tuple[str, str]]:
    yield _BEGINS["held"], facts.held or "none"


def _on_the_table(facts: Facts) -> Iterator[tuple[str, str]]:
    away = {facts.held, *itertools.chain(*_placed(facts).values())}
    yield _BEGINS["table"], _COUNTS[sum(color not in away for color in facts.blocks)]


def _in_the_bins(facts: Facts) -> Iterator[tuple[str, str]]:
    for name, colors in _placed(facts).items():
        yield _bin(name), " and ".join(colors) or "nothing"


def _sides(facts: Facts) -> Iterator[tuple[str, str]]:
    for first, second in itertools.permutations([color for color in COLORS if color in facts.blocks], 2):
        right = float(facts.blocks[second][0] - facts.blocks[first][0])
        if abs(right) > _APART:
            yield _side(first, second), "yes" if right > 0 else "no"


def _just_done(facts: Facts) -> Iterator[tuple[str, str]]:
    """Only where one image is enough: a block in the air, the only block in a bin, or none in any. In a `back` task a
    block lies in a bin from the start."""
    placed = [(color, name) for name, colors in _placed(facts).items() for color in colors]
    if facts.held is not None:
        if facts.blocks[facts.held][2] > LIFTED_Z:
            yield _BEGINS["done"], f"picked up the {facts.held} block"
    elif facts.bins is scene.TWO_BINS:
        return
    elif not placed:
        yield _BEGINS["done"], "nothing"
    elif len(placed) == 1:
        yield _BEGINS["done"], f"placed the {placed[0][0]} block in the {placed[0][1]} bin"


_OF_KIND = {"held": _held_now, "table": _on_the_table, "bin": _in_the_bins, "side": _sides, "done": _just_done}
