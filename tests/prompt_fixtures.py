"""The task that a tabletop prompt asks for, read off its words: what the tests hold tasks and experts against."""

import re

from openpi_ar.worlds.tabletop.scene import BINS, COLORS
from openpi_ar.worlds.tabletop.tasks import Task, clear_task, pair_task, sort_task


def parse_prompt(prompt: str, colors: tuple[str, ...]) -> Task:
    """The task on a table with these block colours. Raises ValueError if there is no such task there."""
    if match := re.fullmatch(r"clear the table into the (\w+) bin", prompt):
        if match[1] in BINS:
            return clear_task(match[1], colors)
    elif match := re.fullmatch(r"put warm colours (?:in the )?(\w+) and cool colours (?:in the )?(\w+)", prompt):
        warm, cool = match.groups()
        if {warm, cool} <= set(BINS) and warm != cool and sort_task(warm, cool, ()).prompt == prompt:
            return sort_task(warm, cool, colors)
    elif match := re.fullmatch(r"put the (\w+) block in the (\w+) bin, then the (\w+) one in the (\w+)", prompt):
        first, first_bin, second, second_bin = match.groups()
        if first != second and {first, second} <= set(COLORS) and {first_bin, second_bin} <= set(BINS):
            if missing := {first, second} - set(colors):
                raise ValueError(f"prompt {prompt!r} names {sorted(missing)}, but the blocks are {colors}")
            return pair_task(first, first_bin, second, second_bin)
    raise ValueError(f"unknown prompt {prompt!r}")
