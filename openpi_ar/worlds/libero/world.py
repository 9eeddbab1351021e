"""LIBERO's environment with gymnasium-style `reset` and `step`, true subtasks and openpi's observations.

Physics, controller, success and initial states are LIBERO's own; only rendering is replaced (`render.py`).
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# LIBERO and robosuite come with the extra; mujoco is a binary module without type stubs.

import contextlib
import io
import logging
import os
from typing import Any

import numpy as np

from openpi_ar.errors import UserError
from openpi_ar.worlds.libero.tasks import NAMES, TASKS, Box, Facts, Task, is_placed, next_subtask

Observation = dict[str, Any]
Info = dict[str, Any]

CAMERAS = {"image": "agentview", "wrist_image": "robot0_eye_in_hand"}
"""What robot `libero` (data/robots.py) calls an image -> the simulator's camera."""
STATE_DIM, ACTION_DIM = 8, 7
FPS = 20
"""Control steps a second."""
MAX_STEPS = 520
"""openpi's limit for libero_10."""
SETTLE_STEPS = 20
"""Control steps before an episode begins: the initial states hold objects in the air."""

_SUITE = "libero_10"
_WAIT = np.array([0, 0, 0, 0, 0, 0, -1.0])
_FINGERS = (
    {"gripper0_leftfinger", "gripper0_finger_joint1_tip"},
    {"gripper0_rightfinger", "gripper0_finger_joint2_tip"},
)
_PADS = 0.012
"""The fingers' joints stand this far apart when their pads touch, metres."""


class LiberoWorld:
    """LIBERO-10's tasks 0, 1 and 7. One task's scene is held at a time: episodes in order of their task start fastest.

    Observation: {"images": {"image", "wrist_image": uint8 [H, W, 3]}, "state": float32 [8], "prompt": str}, what
    openpi's client sends: the state is the tool's position (metres), orientation (axis times angle) and the two
    fingers' positions. Its images are LIBERO's turned by 180 degrees; as LIBERO's have the bottom row first, that is
    the camera's picture the right way up, mirrored left to right.

    Action: float [7] in [-1, 1], LIBERO's: translation (1 is 5 cm), turn (1 is 0.5 rad), grip (-1 opens, +1 closes).

    Info: `subtask` (the true one now), `success` (LIBERO's own goal), `objects_placed` (fraction of the task's objects
    in the basket), `held` (name or None), `task`, `state` (index of the initial state, None for a drawn one), `steps`.

    Args:
        image_size: height and width in pixels.

    Raises:
        UserError: the extra `libero` is not installed, or the image size is not positive.
    """

    max_steps = MAX_STEPS

    def __init__(self, image_size: tuple[int, int] = (256, 256)) -> None:
        if min(image_size) < 1:
            raise UserError(f"image_size must be positive (height, width), found {list(image_size)}")
        self.image_size = image_size
        self._suite = _load_suite()
        self._task: Task | None = None
        self._env: Any = None
        self._cameras: Any = None
        self._boxes: dict[str, tuple[int, np.ndarray, np.ndarray]] = {}

    def reset(
        self, task: int, state: int | None = 0, *, seed: int = 0, render: bool = True
    ) -> tuple[Observation, Info]:
        """Start an episode, after the objects have come to rest.

        Args:
            task: its number in libero_10.
            state: which of LIBERO's initial states to start from; None draws a new one by LIBERO's rules, which seeds
                NumPy's global generator.
            seed: decides a drawn state.
            render: False leaves `images` empty.

        Raises:
            UserError: another task, or no such initial state.
        """
        if task not in TASKS:
            raise UserError(f"there is no task {task} here: choose one of {', '.join(map(str, TASKS))} of {_SUITE}")
        if state is not None and not 0 <= state < self.num_states(task):
            raise UserError(f"task {task} has initial states 0 to {self.num_states(task) - 1}, found {state}")
        self._open(TASKS[task])
        if state is None:
            self._env.seed(seed)
        self._raw = self._env.reset()
        if state is not None:
            self._raw = self._env.set_init_state(self._states[state])
        for _ in range(SETTLE_STEPS):
            self._raw, *_ = self._env.step(_WAIT)
        self._table = min(self._box_now(name).bottom for name in self._boxes)
        self._state, self._steps = state, 0
        self._success = bool(self._env.check_success())
        return self._observe(render), self._info()

    def step(self, action: np.ndarray, *, render: bool = True) -> tuple[Observation, float, bool, bool, Info]:
        """One control step of 0.05 s.

        Reward is 1 on success, else 0. Terminated: success. Truncated: the step limit. Raises ValueError for an action
        of another shape or one that is not finite, RuntimeError before `reset`.
        """
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (ACTION_DIM,) or not np.isfinite(action).all():
            raise ValueError(f"action must be 7 finite numbers, got {action}")
        self.task  # noqa: B018  raises before `reset`
        self._raw, *_ = self._env.step(np.clip(action, -1, 1))
        self._steps += 1
        self._success = success = bool(self._env.check_success())
        return self._observe(render), float(success), success, self._steps >= self.max_steps, self._info()

    def facts(self) -> Facts:
        """What can be seen now, from the simulator's state."""
        data, site = self._data, self._tool_site
        x, y, z = data.site_xmat[site].reshape(3, 3).T  # robosuite's hand opens along x
        opening = float(np.abs(self._raw["robot0_gripper_qpos"]).sum()) - _PADS
        return Facts(
            tool=data.site_xpos[site].copy(),
            axes=np.stack([-y, x, z], axis=1),
            opening=opening,
            objects={name: self._box_now(name) for name in self._boxes},
            held=self._held(),
            table=self._table,
        )

    def num_states(self, task: int) -> int:
        """How many initial states LIBERO has for a task."""
        return len(_quietly(self._suite.get_task_init_states, task))

    @property
    def task(self) -> Task:
        """The task being scored. Raises RuntimeError before `reset`."""
        if self._task is None:
            raise RuntimeError("call reset() first")
        return self._task

    def close(self) -> None:
        """Free the scene; a later `reset` builds it anew."""
        if self._cameras is not None:
            self._cameras.close()
        if self._env is not None:
            self._env.close()
        self._cameras = self._env = self._task = None

    def _open(self, task: Task) -> None:
        """Make this task's scene the current one."""
        if self._task == task:
            return
        self.close()
        from libero.libero.envs.env_wrapper import ControlEnv

        self._env = _quietly(
            ControlEnv,
            bddl_file_name=self._suite.get_task_bddl_file_path(task.index),
            has_offscreen_renderer=False,
            use_camera_obs=False,
            hard_reset=False,  # another compiled model for every episode otherwise
            ignore_done=True,
        )
        self._states = _quietly(self._suite.get_task_init_states, task.index)
        prompt = self._suite.get_task(task.index).language
        if prompt != task.prompt:
            raise UserError(f"task {task.index} of the installed LIBERO is {prompt!r}, expected {task.prompt!r}")
        self._model, self._data = self._env.sim.model._model, self._env.sim.data._data
        self._tool_site = self._model.site("gripper0_grip_site").id
        bodies = {NAMES.get(str(name), str(name)): body for name, body in self._env.env.obj_body_id.items()}
        movable = {name: body for name, body in bodies.items() if self._model.body_jntnum[body]}
        self._boxes = {name: self._box(body) for name, body in movable.items()}
        self._task = task

    def _box_now(self, name: str) -> Box:
        body, center, half = self._boxes[name]
        axes = self._data.xmat[body].reshape(3, 3).copy()
        return Box(self._data.xpos[body] + axes @ center, axes, half)

    def _box(self, body: int) -> tuple[int, np.ndarray, np.ndarray]:
        """Body, center [3] and half sizes [3] of the box around its colliding shapes, in its own frame."""
        import mujoco

        model = self._model
        corners = []
        signs = np.stack(np.meshgrid(*[[-1, 1]] * 3), -1).reshape(-1, 3)
        for geom in np.flatnonzero((model.geom_bodyid == body) & (model.geom_contype > 0)):
            rotation = np.zeros(9)
            mujoco.mju_quat2Mat(rotation, model.geom_quat[geom])
            middle, half = model.geom_aabb[geom][:3], model.geom_aabb[geom][3:]
            corners.append(model.geom_pos[geom] + (middle + signs * half) @ rotation.reshape(3, 3).T)
        low, high = np.min(np.concatenate(corners), 0), np.max(np.concatenate(corners), 0)
        return body, (low + high) / 2, (high - low) / 2

    def _held(self) -> str | None:
        """The object that both fingers touch."""
        pairs = self._model.geom_bodyid[self._data.contact.geom].tolist()
        touched = []
        for names in _FINGERS:
            finger = {self._model.body(name).id for name in names}
            touched.append({b for pair in pairs for a, b in (pair, pair[::-1]) if a in finger})
        both = touched[0] & touched[1]
        return next((name for name, (body, *_) in self._boxes.items() if body in both), None)

    def _observe(self, render: bool) -> Observation:
        images = {}
        if render:
            if self._cameras is None:
                from openpi_ar.worlds.libero.render import Cameras

                self._cameras = Cameras(self._model, tuple(CAMERAS.values()), self.image_size)
            pictures = self._cameras.render(self._data)
            images = {name: np.ascontiguousarray(x[:, ::-1]) for name, x in zip(CAMERAS, pictures, strict=True)}
        return {"images": images, "state": _state(self._raw), "prompt": self.task.prompt}

    def _info(self) -> Info:
        facts = self.facts()
        placed = [is_placed(facts, name) for name in self.task.objects]
        return {
            "subtask": next_subtask(self.task, facts),
            "success": self._success,
            # LIBERO's goal may be reached while the hand still holds the last one.
            "objects_placed": 1.0 if self._success else sum(placed) / len(placed),
            "held": facts.held,
            "task": self.task,
            "state": self._state,
            "steps": self._steps,
        }


def _state(raw: dict[str, np.ndarray]) -> np.ndarray:
    from robosuite.utils.transform_utils import quat2axisangle

    turn = quat2axisangle(raw["robot0_eef_quat"].copy())
    return np.concatenate([raw["robot0_eef_pos"], turn, raw["robot0_gripper_qpos"]]).astype(np.float32)


def _load_suite() -> Any:
    os.environ.setdefault("MUJOCO_GL", "egl")  # read when mujoco is imported; its own default needs a display
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
    try:
        from libero.libero import benchmark
    except ImportError as e:
        raise UserError(
            f"LIBERO is not installed ({e}): pip install 'openpi-ar[libero]' (it needs mujoco 3.3.7), and EGL or "
            "OSMesa (apt-get install libegl1 libosmesa6)"
        ) from e
    return _quietly(benchmark.get_benchmark(_SUITE))


def _quietly(function: Any, *args: Any, **kwargs: Any) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):  # LIBERO reports what it does
        return function(*args, **kwargs)
