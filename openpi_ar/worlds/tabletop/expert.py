"""The scripted expert: one smooth rule from (what can be seen now, subtask) to the tool target. It remembers nothing.

Having no memory is what makes it a fair teacher for a policy that sees one frame, and it recovers from anything: a
slipped or dropped block is simply a block that is not held.
"""

import numpy as np

from openpi_ar.worlds.tabletop import scene
from openpi_ar.worlds.tabletop.tasks import LIFTED_Z, Facts

Z_LOW = float(scene.TOOL_LOW[2])
Z_TRAVEL = 0.12
"""Tool height for carrying and releasing: the carried block's bottom is 5 cm above the walls."""

_FUNNEL_SLOPE = 4.0
_ALIGNED = 0.012
"""Horizontal distance below which the funnel is at its bottom, metres; the pads forgive about 2 cm."""
_CLOSE_Z = Z_LOW + 0.012
_EMPTY = 0.030
"""Finger opening below which no block can be between the pads (they are 4 cm wide), metres."""
_OPENED = 0.065
"""Finger opening from which the hand may come down around a block, metres."""


def drop_point(color: str, bin_name: str, bins: scene.Bins = scene.THREE_BINS) -> np.ndarray:
    """Tool target [3] for releasing a block: spread by colour so that blocks do not pile up."""
    angle = 2 * np.pi * scene.COLORS.index(color) / len(scene.COLORS)
    (x, y), (along_x, along_y) = bins.center[bin_name], bins.spread
    return np.array([x + along_x * np.cos(angle), y + along_y * np.sin(angle), Z_TRAVEL])


def parse_subtask(subtask: str) -> tuple[str | None, str | None]:
    """(colour, bin) of a subtask: bin None for "pick up", both None for "done". Raises ValueError for another text."""
    match subtask.split():
        case ["pick", "up", "the", color, "block"] if color in scene.COLORS:
            return color, None
        case ["place", "the", color, "block", "in", "the", name, "bin"] if color in scene.COLORS and name in scene.BINS:
            return color, name
        case ["done"]:
            return None, None
    raise ValueError(f"unknown subtask {subtask!r}; see openpi_ar.worlds.tabletop.tasks.known_subtasks()")


def expert_action(facts: Facts, subtask: str) -> np.ndarray:
    """The action float32 [4] (tool target x, y, z in metres; grip +1 close, -1 open) that carries out a subtask.

    Raises ValueError for an unknown subtask, KeyError if the block it names is not on the table.
    """
    color, bin_name = parse_subtask(subtask)
    if color is None:
        return _action(scene.HOME, close=False)
    if facts.held is not None and facts.held != color:
        return _put_down(facts)
    if facts.held is None:
        return _grasp(facts, facts.blocks[color])
    lifted = facts.blocks[color][2] > LIFTED_Z
    if bin_name is None or not lifted:
        return _action([*facts.tool[:2], Z_TRAVEL], close=True)
    goal = drop_point(color, bin_name, facts.bins)
    over_bin = float(np.linalg.norm(facts.tool[:2] - goal[:2])) < facts.bins.near
    return _action(goal, close=not over_bin)


def approached(facts: Facts) -> str | None:
    """The colour that the hand is at: held, or nearest along the table once the hand is down; None while it travels."""
    if facts.held is not None:
        return facts.held
    if facts.tool[2] > 0.07:
        return None
    return min(facts.blocks, key=lambda color: float(np.linalg.norm(facts.blocks[color][:2] - facts.tool[:2])))


def _grasp(facts: Facts, block: np.ndarray) -> np.ndarray:
    distance = float(np.linalg.norm(block[:2] - facts.tool[:2]))
    height = block[2] - scene.BLOCK_HALF  # not on the table: on top of another block
    down = distance < _ALIGNED + 0.004 and facts.tool[2] < _CLOSE_Z + height
    if down and facts.opening > _EMPTY:
        return _action([*block[:2], Z_LOW + height], close=True)
    if facts.opening < _OPENED:  # a missed grasp, or just released: rise and open before anything else
        return _action([*block[:2], Z_TRAVEL], close=False)
    z = Z_LOW + height + _FUNNEL_SLOPE * max(0.0, distance - _ALIGNED)
    return _action([*block[:2], min(z, Z_TRAVEL)], close=False)


def _put_down(facts: Facts) -> np.ndarray:
    """Set a block that was not asked for back on the table, in front of the bins."""
    x, y = facts.tool[0], min(facts.tool[1], scene.BLOCKS_Y[1] - 0.02)
    over_table = bool(facts.tool[1] < scene.BLOCKS_Y[1])
    low = bool(facts.tool[2] < 0.04)
    return _action([x, y, Z_LOW + 0.005 if over_table else Z_TRAVEL], close=not (over_table and low))


def _action(target: object, *, close: bool) -> np.ndarray:
    return np.array([*np.asarray(target, dtype=np.float32), 1.0 if close else -1.0], dtype=np.float32)
