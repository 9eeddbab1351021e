"""The tabletop environment: gymnasium-style `reset` and `step` over MuJoCo, two ray-cast cameras, true subtasks.

A grasp is friction between force-limited pads and a free block; nothing is welded or attracted.
"""

# pyright: reportAttributeAccessIssue=false
# mujoco is a binary module without type stubs.

from typing import Any

import mujoco
import numpy as np

from openpi_ar.worlds.tabletop import scene
from openpi_ar.worlds.tabletop.cameras import RayCamera
from openpi_ar.worlds.tabletop.tasks import (
    Facts,
    Layout,
    Split,
    Task,
    back_layout,
    completed_after,
    is_lifted,
    is_placed,
    next_subtask,
    sample_layout,
    sample_task,
)

Observation = dict[str, Any]
Info = dict[str, Any]

FPS = 10
"""Control steps a second."""
CAMERAS = ("front", "wrist")
STATES = ("x", "y", "z", "opening")
"""Dimensions of the state: the tool's place and the finger opening, metres."""
ACTIONS = ("x", "y", "z", "grip")
"""Dimensions of an action: the tool's target in metres, and whether to close (above 0)."""

MAX_SPEED = 0.05
"""Furthest that the servo's set-point moves in one control step, along the table and along z each, metres."""
HOLD_STEPS = 25
"""Control steps for which the block of a `back` task must be left alone at the end: three times what a hand at home
needs to pick it up again."""
_RAMP = 5
"""The set-point moves in this many equal parts per control step."""


class Tabletop:
    """Tabletop with three bins and 2-4 blocks; same seed and same actions, same pixels.

    Observation: {"images": {camera: uint8 [H, W, 3]}, "state": float32 [4], "prompt": str}; state is tool x, y, z and
    finger opening in metres. Action: float [4], the absolute tool target x, y, z in metres (clipped to the workspace,
    approached at limited speed) and grip in [-1, 1], above 0 closes.

    Info: `subtask` (the true one now), `success`, `blocks_placed` (fraction of the task's blocks in their bins),
    `positions` {colour: float64 [3]}, `held` (colour or None), `out_of_order` (the
    second block of a pair was placed first, or a block that had come back was picked up again: success is lost),
    `task`, `steps`. Success in a `back` task: the block was in the other bin, is back, and has been left alone for
    `HOLD_STEPS`; `blocks_placed` are then the halves of the way.

    Args:
        image_size: height and width in pixels.
        cameras: which of "front" and "wrist" to render, in this order.

    Raises:
        ValueError: unknown camera or a size that is not positive.
    """

    def __init__(self, image_size: tuple[int, int] = (64, 64), cameras: tuple[str, ...] = CAMERAS) -> None:
        self.image_size, self.cameras = image_size, cameras
        self._scenes: dict[tuple[int, scene.Bins], tuple[mujoco.MjModel, mujoco.MjData]] = {}
        self._rays: dict[str, RayCamera] = {}
        self._task: Task | None = None
        self._bind(2, scene.THREE_BINS)  # a wrong camera or size is reported now, not at the first reset

    def reset(
        self,
        seed: int,
        *,
        split: Split = "train",
        task: Task | None = None,
        layout: Layout | None = None,
        render: bool = True,
    ) -> tuple[Observation, Info]:
        """Start the episode that `seed` stands for.

        Args:
            seed: non-negative; decides the task and the layout.
            split: which tasks are drawn; see `tasks.sample_task`.
            task: do this one instead; the table then holds its blocks and up to two more.
            layout: start from here instead; must hold every block of the task.
            render: False leaves `images` empty.

        Raises:
            ValueError: unknown split, or a layout that lacks a block of the task.
        """
        rng = np.random.default_rng(seed)
        drawn, drawn_layout = sample_task(rng, split=split)
        if task is not None and task.kind == "back":
            drawn_layout = back_layout(rng, task)
        elif task is not None and layout is None:
            named = tuple(color for color, _ in task.targets)
            others = [color for color in scene.COLORS if color not in named]
            extra = rng.permutation(others)[: rng.integers(3)] if task.kind == "pair" else ()
            drawn_layout = sample_layout(rng, (*named, *map(str, extra)))
        self._task = task or drawn
        self._steps, self._out_of_order = 0, False
        self._completed, self._left_alone = 0, 0
        self._place(layout or drawn_layout)
        return self._observe(render), self._info()

    def step(self, action: np.ndarray, *, render: bool = True) -> tuple[Observation, float, bool, bool, Info]:
        """Drive the tool towards `action` [4] for 0.1 s.

        Reward is 1 on success, else 0. Terminated: success. Truncated: the step limit (`max_steps`). Raises ValueError
        for an action of another shape or one that is not finite, RuntimeError before `reset`.
        """
        task = self.task
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (len(ACTIONS),) or not np.isfinite(action).all():
            raise ValueError(f"action must be 4 finite numbers, x, y, z and grip, got {action}")
        self._drive(np.clip(action[:3], scene.TOOL_LOW, scene.TOOL_HIGH), close=bool(action[3] > 0))
        self._steps += 1
        if task.kind == "pair":
            facts = self.facts()
            first, second = (is_placed(facts, *target) for target in task.targets)
            self._out_of_order |= second and not first
        if task.kind == "back":
            self._come_back()
        info = self._info()
        success = info["success"]
        return self._observe(render), float(success), success, self._steps >= self.max_steps, info

    def facts(self) -> Facts:
        """What can be seen now, from the simulator's state."""
        blocks = {color: self._data.xpos[body].copy() for color, body in zip(self._colors, self._bodies, strict=True)}
        return Facts(self._tool(), self._opening(), blocks, self._held(), self._bins, self._completed)

    @property
    def task(self) -> Task:
        """The task being scored. Raises RuntimeError before `reset`."""
        if self._task is None:
            raise RuntimeError("call reset() first")
        return self._task

    @property
    def max_steps(self) -> int:
        """Step limit: several times what the scripted expert needs."""
        return 40 + 35 * len(self.task.targets)

    def _come_back(self) -> None:
        """Brings what no image of a `back` task shows up to date."""
        facts, (color, home) = self.facts(), self.task.targets[-1]
        if facts.completed == 2 * len(self.task.targets):
            self._left_alone = self._left_alone + 1 if is_placed(facts, color, home) else 0
            self._out_of_order |= is_lifted(facts, color)
        self._completed = completed_after(self.task, facts)

    def _bind(self, num_blocks: int, bins: scene.Bins) -> None:
        """Make the scene with this many blocks and these bins current, compiling it at its first use."""
        if (num_blocks, bins) not in self._scenes:
            model = mujoco.MjModel.from_xml_string(scene.build_xml(num_blocks, bins))
            self._scenes[num_blocks, bins] = model, mujoco.MjData(model)
        self._bins = bins
        self._model, self._data = model, _ = self._scenes[num_blocks, bins]
        if not self._rays:
            self._rays = {name: RayCamera(model, name, self.image_size) for name in self.cameras}
        self._bodies = [model.body(f"block{i}").id for i in range(num_blocks)]
        self._fingers = [model.body(f"{side}_finger").id for side in ("left", "right")]

    def _place(self, layout: Layout) -> None:
        missing = {color for color, _ in self.task.targets} - set(layout.colors)
        if missing:
            raise ValueError(f"the layout lacks {sorted(missing)}, which the task {self.task.prompt!r} names")
        self._bind(len(layout.colors), scene.TWO_BINS if self.task.kind == "back" else scene.THREE_BINS)
        model, data = self._model, self._data
        mujoco.mj_resetData(model, data)
        self._colors = layout.colors
        for i, color in enumerate(layout.colors):
            model.geom(f"block{i}").rgba[:3] = scene.RGB[color]
            half = layout.yaw[i] / 2
            z = scene.BLOCK_HALF + scene.BIN_FLOOR * (self._bins.of(layout.xy[i]) is not None)
            data.joint(f"block{i}").qpos[:] = [*layout.xy[i], z, np.cos(half), 0, 0, np.sin(half)]
        for axis, value in zip("xyz", layout.tool, strict=True):
            data.joint(axis).qpos[:] = value
        for side in ("left", "right"):
            data.joint(f"{side}_slide").qpos[:] = layout.opening / 2
        self._setpoint = np.array(layout.tool, dtype=np.float64)
        data.ctrl[:] = [*self._setpoint, layout.opening / 2]
        mujoco.mj_forward(model, data)

    def _drive(self, target: np.ndarray, *, close: bool) -> None:
        # The set-point never runs far ahead of a blocked hand: the state alone tells what an action will do.
        start = np.clip(self._setpoint, self._tool() - 0.02, self._tool() + 0.02)
        move = target - start
        reach = np.hypot(move[0], move[1])
        move[:2] *= min(1.0, MAX_SPEED / max(reach, 1e-9))
        move[2] = np.clip(move[2], -MAX_SPEED, MAX_SPEED)
        self._data.ctrl[3] = 0.0 if close else scene.MAX_OPENING / 2
        for part in range(1, _RAMP + 1):
            self._data.ctrl[:3] = start + move * (part / _RAMP)
            mujoco.mj_step(self._model, self._data, nstep=scene.SUBSTEPS // _RAMP)
        self._setpoint = start + move
        # mj_step leaves positions one sub-step ahead of everything derived from them (cameras, contacts).
        mujoco.mj_forward(self._model, self._data)

    def _tool(self) -> np.ndarray:
        return self._data.qpos[:3].copy()

    def _opening(self) -> float:
        return float(self._data.qpos[3] + self._data.qpos[4])

    def _held(self) -> str | None:
        """The block that both fingers touch."""
        touching = {frozenset(pair) for pair in self._model.geom_bodyid[self._data.contact.geom].tolist()}
        bodies = zip(self._colors, self._bodies, strict=True)
        return next((color for color, body in bodies if all({f, body} in touching for f in self._fingers)), None)

    def _observe(self, render: bool) -> Observation:
        cameras = self._rays.items() if render else ()
        images = {name: camera.render(self._model, self._data) for name, camera in cameras}
        state = np.array([*self._tool(), self._opening()], dtype=np.float32)
        return {"images": images, "state": state, "prompt": self.task.prompt}

    def _info(self) -> Info:
        facts, targets = self.facts(), self.task.targets
        placed = [is_placed(facts, *target) for target in targets]
        if self.task.kind == "back":
            placed = [i < facts.completed // 2 for i in range(len(targets))]
        # "Placed" counts from the moment of release; success also waits for the fall and for the open hand.
        joints = [self._data.joint(f"block{self._colors.index(color)}") for color, _ in targets]
        landed = all(np.linalg.norm(joint.qvel[:3]) < 0.1 for joint in joints)  # metres per second
        success = bool(all(placed) and landed and facts.opening > 0.06 and not self._out_of_order)
        if self.task.kind == "back":
            success &= self._left_alone >= HOLD_STEPS
        return {
            "subtask": next_subtask(self.task, facts),
            "success": success,
            "blocks_placed": sum(placed) / len(targets),
            "positions": facts.blocks,
            "held": facts.held,
            "out_of_order": self._out_of_order,
            "task": self.task,
            "steps": self._steps,
        }
