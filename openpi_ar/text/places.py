"""Places in PaliGemma's answers: `<loc0100><loc0200><loc0700><loc0800> cup ; ...`, the sides of a box in 1024ths of the
image, and of a segmentation also 16 `<seg>` tokens, the code of a mask within the box."""

import dataclasses
import re

_ONE = re.compile(r"((?:<loc\d{4}>){4})\s*((?:<seg\d{3}>){16})?([^<;]*)")
_TOKEN = re.compile(r"<(?:loc|seg)(\d+)>")
GRID = 1024
"""Parts that a side of the image is divided into."""


@dataclasses.dataclass(frozen=True)
class Place:
    """One object.

    label  what was asked for; "" if the answer does not say.
    box    top, left, bottom, right, each from 0 to 1023 of 1024.
    code   16 numbers under 128: the mask, as a code of PaliGemma's mask decoder; None without a segmentation.
    """

    label: str
    box: tuple[int, int, int, int]
    code: tuple[int, ...] | None = None


def find_places(answer: str) -> tuple[list[Place], int]:
    """(the objects of an answer in its order, how many <loc> and <seg> tokens belong to none of them)."""
    found = []
    for box, code, label in _ONE.findall(answer):
        top, left, bottom, right = (min(int(n), GRID - 1) for n in _TOKEN.findall(box))
        numbers = tuple(int(n) for n in _TOKEN.findall(code))
        found.append(Place(label.strip(), (top, left, bottom, right), numbers or None))
    used = sum(4 + len(place.code or ()) for place in found)
    return found, len(_TOKEN.findall(answer)) - used
