"""The scripted expert for LIBERO: one rule from (what can be seen now, subtask) to LIBERO's action, without memory.

As on the tabletop, having no memory makes it a fair teacher for a policy that sees one frame, and lets it recover: a
slipped object is simply one that is not held. Grasps are planned on boxes: along which edge, and where, the open hand
fits between the neighbours.
"""

from collections.abc import Iterator
import dataclasses
import itertools

import numpy as np
from scipy.spatial.transform import Rotation

from openpi_ar.worlds.libero.tasks import BASKET, Box, Facts, is_lifted, parse_subtask

MAX_STEP, MAX_TURN = 0.05, 0.5
"""What an action of 1 commands: metres and radians ahead of where the hand is."""
MAX_OPENING = 0.067
"""Between the pads of the open fingers, metres."""

_GAIN, _TURN_GAIN = 1.6, 1.0
_CLEARANCE = 0.035
"""Between a carried object and what stands on the table, metres."""
_TIP = 0.015
"""The fingers reach this far below the tool point."""
_PALM = 0.022
"""The palm begins this far above the tool point."""
_GRIP_DEPTH = 0.022
"""The tool goes this far below an object's top, if the table lets it."""
_ALIGNED, _TURNED = 0.004, 0.06
"""Horizontal distance (metres) and angle (radians) from which the hand may come down around an object."""
_DOWN = 0.009
_FUNNEL_SLOPE = 3.0
_PLAY = 0.003
"""Least room between the open fingers and what they come down around, both sides together, metres."""
_OPENED = 0.061
"""Finger opening from which the hand may come down, metres."""
_EMPTY = 0.012
"""Fingers this much closer than the object is wide hold nothing, metres."""
_OVER_BASKET = 0.015
_NEAREST = -0.15
"""Least x of a hand that rises, metres: the arm's base is at -0.6."""
_SPREAD = 0.03
"""Objects are let go this far from the basket's middle, on different sides, so that they do not pile up."""

# The open hand seen along its fingers, as rectangles |u - u0| < du, |v| < dv; u: along which the fingers open.
_FINGER_U, _FINGER_DU, _FINGER_DV = 0.048, 0.018, 0.014
_PALM_DU, _PALM_DV = 0.106, 0.036
_CLEAR_ENOUGH = 0.02
"""More room than this is of no use."""


@dataclasses.dataclass(frozen=True)
class Grasp:
    """How the hand closes: tool point [3] (metres), direction [2] along which the fingers open, free room (metres)."""

    point: np.ndarray
    across: np.ndarray
    room: float


def expert_action(facts: Facts, subtask: str) -> np.ndarray:
    """LIBERO's action float32 [7] (translation, turn, grip: +1 close, -1 open; in [-1, 1]) that carries out a subtask.

    Raises ValueError for an unknown subtask, KeyError if the object it names is not there.
    """
    name, goes_in = parse_subtask(subtask)
    standing = [box.top for box in facts.objects.values() if box.bottom < facts.table + 0.02]
    travel = max(standing) + _CLEARANCE + _TIP
    if name is None:
        return _towards(facts, np.array([*facts.tool[:2], travel]), facts.axes[:2, 1], close=False)
    if facts.held not in (None, name):
        return _towards(facts, facts.tool, facts.axes[:2, 1], close=False)  # another object: let it go
    if facts.held is None:
        return _grasp(facts, name, travel)
    if not goes_in or not is_lifted(facts, name):
        return _towards(facts, _straight_up(facts, travel), facts.axes[:2, 1], close=True)
    return _put(facts, name, travel)


def drop_point(facts: Facts, name: str) -> np.ndarray:
    """Where [2] an object is let go: on the side of the basket that others in it leave free."""
    basket = facts.objects[BASKET]
    middle = basket.center[:2]
    inside = [
        box.center[0] - middle[0]
        for other, box in facts.objects.items()
        if other not in (BASKET, name) and (np.abs(box.center[:2] - middle) < basket.extent[:2]).all()
    ]
    side = -np.sign(np.mean(inside)) if inside else -1.0
    return middle + np.array([side * _SPREAD, 0.0])


def plan_grasp(facts: Facts, name: str) -> Grasp:
    """The roomiest grasp from above, with the least turning and the least off the middle."""
    box = facts.objects[name]
    others = np.concatenate([np.empty((0, 3)), *(_outline(b) for key, b in facts.objects.items() if key != name)])
    z = max(box.top - _GRIP_DEPTH, facts.table + _TIP)
    best, best_score = None, -np.inf
    for across, side, shift, aside in _grips(box):
        point = np.array([*(box.center[:2] + shift * side + aside * across), z])
        room = min(_room(point, across, side, others), _CLEAR_ENOUGH)
        # Turning counts from the arm's own rest: its last joint soon comes to its end.
        turn = float(np.arccos(np.clip(abs(across[1]), 0, 1)))
        score = (room if room > 0 else 3 * room) - 0.1 * abs(shift) - 0.3 * abs(aside) - 0.015 * turn
        if score > best_score:
            best, best_score = Grasp(point, across, room), score
    if best is None:  # too wide every way, e.g. tilted against a wall: try along its shortest edge
        across, _, _ = min(_directions(box), key=lambda d: d[1])
        best = Grasp(np.array([*box.center[:2], z]), across, 0.0)
    return best


def _grips(box: Box) -> Iterator[tuple[np.ndarray, np.ndarray, float, float]]:
    """Directions [2] across and along the hand's closing, and how far off the object's middle along each, in metres."""
    for across, width, along in _directions(box):
        if width > MAX_OPENING - _PLAY:
            continue
        side = np.array([-across[1], across[0]])
        slack = (MAX_OPENING - width) / 2 - _PLAY
        # What is as long as it is wide may be round: off its middle the fingers slide away.
        reach = along - 0.012 if along > 0.6 * width else 0.25 * along
        # One finger may come down nearer than the other: closing centres them.
        for shift, aside in itertools.product(np.linspace(-1, 1, 7), (0, 1, -1) if slack > 0 else (0,)):
            yield across, side, float(shift * max(0.0, reach)), aside * slack


def _grasp(facts: Facts, name: str, travel: float) -> np.ndarray:
    grasp = plan_grasp(facts, name)
    distance = float(np.linalg.norm(grasp.point[:2] - facts.tool[:2]))
    turned = float(np.arccos(np.clip(abs(grasp.across @ facts.axes[:2, 1]), 0, 1)))
    width = min(width for _, width, _ in _directions(facts.objects[name]))
    down = facts.tool[2] < grasp.point[2] + _DOWN and distance < 3 * _ALIGNED
    if down and facts.opening > width - _EMPTY:
        began = facts.opening < _OPENED
        return _towards(facts, grasp.point, grasp.across, close=began or distance < 2 * _ALIGNED)
    if facts.opening < _OPENED:  # a missed grasp, or just released: rise and open before anything else
        return _towards(facts, np.array([*facts.tool[:2], travel]), facts.axes[:2, 1], close=False)
    off = max(0.0, distance - _ALIGNED) + 0.1 * max(0.0, turned - _TURNED)
    # A funnel: the tips stay clear above the object until the hand is aligned.
    above = facts.objects[name].top + _TIP + 0.02
    z = grasp.point[2] if off == 0 else min(above + _FUNNEL_SLOPE * off, travel)
    return _towards(facts, np.array([*grasp.point[:2], z]), grasp.across, close=False)


def _put(facts: Facts, name: str, travel: float) -> np.ndarray:
    box, rim = facts.objects[name], facts.objects[BASKET].top
    target = drop_point(facts, name) - (box.center[:2] - facts.tool[:2])
    across = np.array([0.0, 1.0])
    hangs = facts.tool[2] - box.bottom
    if np.linalg.norm(target - facts.tool[:2]) > _OVER_BASKET:
        height = travel + max(0.0, hangs - _TIP)
        high = box.bottom > rim + 0.01
        goal = np.array([*target, height]) if high else _straight_up(facts, height)
        return _towards(facts, goal, across, close=True)
    release = rim + max(_TIP, hangs - 0.04)
    return _towards(facts, np.array([*target, release]), across, close=bool(facts.tool[2] > release + 0.012))


def _straight_up(facts: Facts, height: float) -> np.ndarray:
    # Close to its base the arm drifts backwards as it rises, until its joints are at their ends.
    return np.array([max(facts.tool[0], _NEAREST), facts.tool[1], height])


def _towards(facts: Facts, target: np.ndarray, across: np.ndarray, *, close: bool) -> np.ndarray:
    move = _GAIN * (np.asarray(target) - facts.tool) / MAX_STEP
    # One direction for the whole move: a clipped corner would leave the planned path.
    move /= max(1.0, float(np.abs(move).max()))
    y = np.array([*across, 0.0]) / np.linalg.norm(across)
    # The fingers are alike: turn less than a quarter from the arm's own rest; at about a quarter, the short way.
    if (y[1] if abs(y[1]) > 0.3 else y @ facts.axes[:, 1]) < 0:
        y = -y
    z = np.array([0.0, 0.0, -1.0])
    wanted = np.stack([np.cross(y, z), y, z], axis=1)
    turn = Rotation.from_matrix(wanted @ facts.axes.T).as_rotvec()
    turn = np.clip(_TURN_GAIN * turn / MAX_TURN, -1, 1)
    return np.array([*move, *turn, 1.0 if close else -1.0], np.float32)


def _directions(box: Box) -> list[tuple[np.ndarray, float, float]]:
    """Horizontal directions [2] to grip along, the object's width there, and its half length across them."""
    upright = int(np.argmax(np.abs(box.axes[2])))
    flat = [(box.axes[:2, i] / np.linalg.norm(box.axes[:2, i]), i) for i in range(3) if i != upright]
    return [(axis, 2 * float(box.half[i]), float(box.half[3 - upright - i])) for axis, i in flat]


def _outline(box: Box) -> np.ndarray:
    """Points [n 3] all over a box."""
    ticks = np.linspace(-1, 1, 7)
    grid = np.stack(np.meshgrid(ticks, ticks, ticks, indexing="ij"), -1).reshape(-1, 3)
    return box.center + (grid * box.half) @ box.axes.T


def _room(point: np.ndarray, across: np.ndarray, side: np.ndarray, outline: np.ndarray) -> float:
    """Horizontal distance of the open hand at `point` from points [n 3] of other objects; negative: they overlap."""
    offset = outline[:, :2] - point[:2]
    u, v = np.abs(offset @ across), np.abs(offset @ side)
    fingers = np.maximum(np.abs(u - _FINGER_U) - _FINGER_DU, v - _FINGER_DV)
    palm = np.maximum(u - _PALM_DU, v - _PALM_DV)
    height = outline[:, 2] - point[2]
    gap = np.where(height > _PALM, np.minimum(palm, fingers), np.where(height > -_TIP, fingers, np.inf))
    return float(gap.min(initial=np.inf))
