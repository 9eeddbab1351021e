"""The tabletop in numbers: one MJCF model of primitives, and the geometry every other module reads from here.

World frame, metres: x to the right and y away from the front camera, z up, table top at z = 0. So "left" is x < 0 and
is left in the front image. Blocks start near the camera; three open bins stand side by side behind them:

    y 0.205 +--------+--------+--------+
            |  left  | middle | right  |     light grey / brown / dark grey; walls 5 cm, outer ones 8 cm
    y 0.085 +--------+--------+--------+
    y 0.04     . . . . . . . . . . .
               .       blocks      .         x in [-0.14, 0.14]
    y -0.15    . . . . . . . . . . .

The workspace is nearly square so that a 64 x 64 image spends its pixels on it (about 6 mm each).
"""

from collections.abc import Mapping
import dataclasses

import numpy as np

COLORS: tuple[str, ...] = ("red", "yellow", "green", "blue", "purple")
"""Every block colour, in the order in which tasks that do not name an order take them."""
BINS: tuple[str, ...] = ("left", "middle", "right")
"""Three: a colour never shown with one of them is still shown with two, so the prompt must tell which."""

RGB: dict[str, tuple[float, float, float]] = {
    "red": (0.95, 0.08, 0.06),
    "yellow": (1.0, 0.85, 0.05),
    "green": (0.08, 0.75, 0.15),
    "blue": (0.08, 0.25, 1.0),
    "purple": (0.72, 0.1, 0.85),
}

BLOCK_HALF = 0.02
BLOCKS_X = (-0.14, 0.14)
BLOCKS_Y = (-0.15, 0.04)
BLOCK_SPACING = 0.10
"""Least distance between block centres at the start: an open hand around one block clears its neighbours."""
BLOCK_YAW = 0.25
"""Largest start yaw, radians: closing pads turn the block square within this range."""

BIN_CENTER: dict[str, tuple[float, float]] = {"left": (-0.13, 0.145), "middle": (0.0, 0.145), "right": (0.13, 0.145)}
BIN_RGBA = {"left": "0.86 0.86 0.86 1", "middle": "0.52 0.36 0.18 1", "right": "0.20 0.20 0.20 1"}
BIN_HALF = (0.055, 0.06)
"""Inner half sizes of a bin along x and y."""


@dataclasses.dataclass(frozen=True, eq=False)
class Bins:
    """The bins of a scene, side by side.

    center  xy of each, metres, by name.
    half    inner half sizes of each along x and y, metres.
    spread  half axes of the ellipse on which blocks of different colours are released, metres.
    near    how near to that point along the table the hand lets go, metres: a block that is released on the move flies.
    """

    center: Mapping[str, tuple[float, float]]
    half: tuple[float, float]
    spread: tuple[float, float]
    near: float

    def of(self, position: np.ndarray) -> str | None:
        """The bin whose inner walls enclose a point [>= 2] (x, y, ...) seen from above, or None."""
        for name, (x, y) in self.center.items():
            if abs(position[0] - x) < self.half[0] and abs(position[1] - y) < self.half[1]:
                return name
        return None


THREE_BINS = Bins(BIN_CENTER, BIN_HALF, spread=(0.016, 0.018), near=0.02)
TWO_BINS = Bins({"left": (-0.095, 0.145), "right": (0.095, 0.145)}, (0.085, 0.06), spread=(0.0, 0.0), near=0.005)
"""Wide enough for the open hand to come down inside: blocks can be taken out again."""

WALL_HEIGHT = 0.05
BACK_HEIGHT = 0.08
"""Height of the far and outer walls: a block released on the move lands inside."""
WALL_HALF = 0.003
BIN_FLOOR = 0.002
"""Thickness of a bin's floor."""

TOOL_LOW = np.array([-0.18, -0.18, 0.022])
TOOL_HIGH = np.array([0.18, 0.20, 0.20])
"""Limits of the tool point, the middle between the pads. At the lowest z the finger tips are 2 mm above the table."""
HOME = np.array([0.0, -0.03, 0.17])
"""Where the hand rests when there is nothing to do."""
MAX_OPENING = 0.09
"""Distance between the pads of the open hand: 5 cm wider than a block."""

TIMESTEP = 0.004
SUBSTEPS = 25
"""Physics steps per control step: 10 Hz control."""

FRONT_FOVY = 24.0
WRIST_FOVY = 80.0
FRONT_POSITION = np.array([0.0, -0.37, 0.90])
FRONT_LOOKS_AT = np.array([0.0, 0.03, 0.02])


def bin_of(position: np.ndarray) -> str | None:
    """The bin of `THREE_BINS` that a point is in."""
    return THREE_BINS.of(position)


def _vector(values: object) -> str:
    return " ".join(f"{value:.6g}" for value in np.ravel(np.asarray(values, dtype=float)))


def _bin_xml(bins: Bins, name: str) -> str:
    (x, y), (half_x, half_y), rgba = bins.center[name], bins.half, BIN_RGBA[name]
    outer_x, z, back = half_x + 2 * WALL_HALF, WALL_HEIGHT / 2, BACK_HEIGHT / 2
    west, east = (back if name == outer else z for outer in (BINS[0], BINS[-1]))
    boxes = {
        "floor": ((x, y, BIN_FLOOR / 2), (half_x, half_y, BIN_FLOOR / 2)),
        "near": ((x, y - half_y - WALL_HALF, z), (outer_x, WALL_HALF, z)),
        "far": ((x, y + half_y + WALL_HALF, back), (outer_x, WALL_HALF, back)),
        "west": ((x - half_x - WALL_HALF, y, west), (WALL_HALF, half_y, west)),
        "east": ((x + half_x + WALL_HALF, y, east), (WALL_HALF, half_y, east)),
    }
    return "".join(
        f'<geom name="{name}_{part}" type="box" pos="{_vector(pos)}" size="{_vector(size)}" rgba="{rgba}"/>\n'
        for part, (pos, size) in boxes.items()
    )


def _finger_xml(side: str) -> str:
    # Only the pad is broad. It hangs from a thin strut so that neither camera loses the block behind the hand.
    sign = 1 if side == "right" else -1
    return f"""
      <body name="{side}_finger" gravcomp="1">
        <joint name="{side}_slide" type="slide" axis="{sign} 0 0" range="0 {MAX_OPENING / 2}" damping="4"/>
        <geom class="hand" name="{side}_pad" pos="{sign * 0.005} 0 0" size="0.005 0.018 0.02" mass="0.05"
              friction="2 0.05 0.001" condim="6" rgba="0.30 0.30 0.32 1"/>
        <geom class="hand" name="{side}_strut" pos="{sign * 0.006} 0 0.07" size="0.004 0.004 0.05" mass="0.01"/>
      </body>"""


def build_xml(num_blocks: int, bins: Bins = THREE_BINS) -> str:
    """MJCF of the scene with these bins and `num_blocks` blocks named block0, block1, ...; reset sets their colours.

    Actuators: x, y, z (tool position, metres) and grip (opening of each finger, metres).
    """
    forward = (FRONT_LOOKS_AT - FRONT_POSITION) / np.linalg.norm(FRONT_LOOKS_AT - FRONT_POSITION)
    right = np.array([1.0, 0.0, 0.0])
    blocks = "".join(
        f"""<body name="block{i}" pos="0 0 {BLOCK_HALF + i}"><freejoint name="block{i}"/>
      <geom name="block{i}" type="box" size="{_vector([BLOCK_HALF] * 3)}" mass="0.05" condim="4"
        friction="1.2 0.02 0.001"/>
    </body>\n"""
        for i in range(num_blocks)
    )
    slides = "".join(
        f'<joint name="{axis}" type="slide" axis="{direction}" damping="1"/>'
        for axis, direction in {"x": "1 0 0", "y": "0 1 0", "z": "0 0 1"}.items()
    )
    servos = "".join(
        f'<position name="{axis}" joint="{axis}" kp="2500" kv="110" forcerange="-80 80"/>' for axis in ("x", "y", "z")
    )
    return f"""<mujoco model="tabletop">
  <option timestep="{TIMESTEP}" integrator="implicitfast" cone="elliptic" impratio="5"/>
  <default>
    <default class="hand"><geom type="box" rgba="0.40 0.40 0.42 1"/></default>
  </default>
  <worldbody>
    <geom name="table" type="plane" size="2 2 0.1" rgba="0.55 0.54 0.52 1" friction="0.8 0.01 0.001"/>
    {"".join(_bin_xml(bins, name) for name in bins.center)}
    <camera name="front" pos="{_vector(FRONT_POSITION)}" fovy="{FRONT_FOVY}"
            xyaxes="{_vector([right, np.cross(right, forward)])}"/>
    <body name="hand" gravcomp="1">
      {slides}
      <geom class="hand" name="palm" pos="0 0 0.125" size="0.055 0.010 0.006" mass="1" contype="0" conaffinity="0"/>
      <camera name="wrist" pos="0 0 0.115" xyaxes="1 0 0 0 1 0" fovy="{WRIST_FOVY}"/>
      {_finger_xml("left")}{_finger_xml("right")}
    </body>
    {blocks}
  </worldbody>
  <equality><joint joint1="left_slide" joint2="right_slide" polycoef="0 1 0 0 0" solref="0.008 1"/></equality>
  <contact><exclude body1="left_finger" body2="right_finger"/></contact>
  <actuator>
    {servos}
    <position name="grip" joint="right_slide" kp="600" kv="20" forcerange="-10 10"/>
  </actuator>
</mujoco>"""
