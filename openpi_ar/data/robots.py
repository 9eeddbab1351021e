"""Robots as data: what their observations are called, how many dimensions they have, and how pi's models were fed them.

A row of `ROBOTS` says everything, so that a released checkpoint and a robot's name are enough to act; a robot of your own is
the same fields in a JSON file. Values are openpi's (`src/openpi/policies/*_policy.py`, `src/openpi/training/config.py`).
"""

from collections.abc import Mapping
import dataclasses
import difflib
import json
from pathlib import Path
from typing import Any

import numpy as np

from openpi_ar import config_json
from openpi_ar.data import transforms
from openpi_ar.data.transforms import make_mask
from openpi_ar.errors import UserError
from openpi_ar.text.prompts import TEMPLATES

IMAGES, STATE, ACTIONS, PROMPT = "images", "state", "actions", "prompt"


@dataclasses.dataclass(frozen=True)
class Variant:
    """What differs between pi0 and pi0.5 on the same robot."""

    horizon: int
    """Actions in a chunk; parameters do not tell it."""
    template: str
    """A key of `openpi_ar.text.prompts.TEMPLATES`."""
    delta: tuple[bool, ...] = ()
    """Action dimensions that the model predicts relative to the state; dimensions past its end are absolute."""


@dataclasses.dataclass(frozen=True)
class RobotSpec:
    """One robot. Plain data: `dumps` and `loads` take it to JSON and back.

    Raw keys are paths joined by "/": "images/cam_high" is `raw["images"]["cam_high"]` as well as `raw["images/cam_high"]`.
    """

    name: str
    cameras: dict[str, str]
    """Raw key of an image -> camera of the model. The model's other cameras are masked."""
    state: dict[str, int]
    """Raw keys of the state's parts and their dimensions, concatenated in this order."""
    action_dims: int
    """The model's first action dimensions are the robot's."""
    pi0: Variant
    pi05: Variant
    optional: tuple[str, ...] = ()
    """Raw keys of cameras that may be left out (masked then)."""
    unused: tuple[str, ...] = ()
    """Names in raw["images"] that the robot sends and no model reads."""
    flips: tuple[int, ...] = ()
    """Signs between the robot's joints and those of the runtime that the base models were trained with."""
    aloha_grippers: tuple[int, ...] = ()
    """Dimensions of state and actions that hold ALOHA grippers."""
    asset_ids: tuple[str, ...] = ()
    """Directories under a checkpoint's `assets/` that openpi puts this robot's statistics in."""
    prompt: str | None = None
    """What to do if an observation does not say it."""

    def __post_init__(self):
        problems = []
        if not self.cameras or len(set(self.cameras.values())) != len(self.cameras):
            problems.append(f"cameras must name at least one image, each for its own camera, found {self.cameras}")
        if not self.state or any(not isinstance(n, int) or n < 1 for n in self.state.values()) or self.action_dims < 1:
            problems.append(f"dimensions must be positive, found state {self.state}, action_dims {self.action_dims}")
        if unknown := set(self.optional) - set(self.cameras):
            problems.append(f"optional names {', '.join(sorted(unknown))}, which cameras does not")
        dims = min(self.state_dims, self.action_dims)
        if set(self.flips) - {1, -1} or len(self.flips) > dims or any(not 0 <= i < dims for i in self.aloha_grippers):
            problems.append(f"flips must be up to {dims} signs +-1, aloha_grippers dimensions under {dims}")
        for kind, v in (("pi0", self.pi0), ("pi05", self.pi05)):
            if len(v.delta) > dims or v.horizon < 1:
                problems.append(f"{kind}: horizon must be positive and delta no longer than {dims}, found {v}")
            if v.template not in TEMPLATES:
                problems.append(f"{kind}: unknown template {v.template!r}; choose one of {', '.join(TEMPLATES)}")
        if problems:
            raise ValueError(f"robot {self.name!r}: " + "; ".join(problems))

    @property
    def state_dims(self) -> int:
        """Dimensions of the concatenated state."""
        return sum(self.state.values())

    def variant(self, pi05: bool) -> Variant:
        """What a model of that kind is fed."""
        return self.pi05 if pi05 else self.pi0

    def images(self, raw: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Images [h w 3] by the model's camera names; those in raw["masked"] are left out.

        Besides its raw key an image may go by the key's last part or by the model's camera name, alone or in
        raw["images"]. Raises UserError naming an image that is missing, or one in raw["images"] that is none of these.
        """
        flat, masked = _flatten(raw), set(raw.get("masked", ()))
        found, known = {}, {f"{IMAGES}/{name}" for name in self.unused}
        for key, camera in self.cameras.items():
            places = _places(key, camera)
            known |= set(places)
            present = [place for place in places if place in flat]
            if masked & set(places) or (not present and key in self.optional):
                continue
            if not present:
                others = [k for k in flat if k not in (PROMPT, STATE, *self.state)]
                raise UserError(
                    f"image {key!r} is missing: robot {self.name} sends {', '.join(self.cameras)}; found "
                    f"{', '.join(others) or 'no image'}"
                )
            found[camera] = transforms.to_uint8_image(flat[present[0]], key)
        if strange := [k for k in flat if k.startswith(f"{IMAGES}/") and k not in known]:
            raise UserError(f"robot {self.name} has no image {strange[0]!r}: it sends {', '.join(self.cameras)}")
        return found

    def state_vector(self, raw: Mapping[str, Any]) -> np.ndarray | None:
        """The state in the runtime's convention, float64 [P_real]; None if raw holds none of it.

        Either its parts under their keys, or the whole under "state". Raises UserError if a part is missing or misfit.
        """
        flat = _flatten(raw)
        if any(key in flat for key in self.state):
            parts = [_part(self.name, flat, key, dims) for key, dims in self.state.items()]
            x = np.concatenate(parts)
        elif STATE in flat:
            x = _part(self.name, flat, STATE, self.state_dims)
        else:
            return None
        if self.flips:
            x = transforms.flip(x, self.flips)
        grippers = list(self.aloha_grippers)
        if grippers:
            x[grippers] = transforms.aloha_gripper_state_to_pi(x[grippers])
        return x

    def actions_to_model(self, actions: np.ndarray, state: np.ndarray, pi05: bool) -> np.ndarray:
        """The robot's actions [... A X_real] as a model predicts them before normalisation.

        `state` [... P_real] as `state_vector` gives it.
        """
        x = transforms.flip(np.asarray(actions, np.float64), self.flips)
        grippers = list(self.aloha_grippers)
        x[..., grippers] = transforms.aloha_gripper_action_to_pi(x[..., grippers])
        return transforms.to_delta(x, state, self.variant(pi05).delta)

    def actions_from_model(self, actions: np.ndarray, state: np.ndarray, pi05: bool) -> np.ndarray:
        """Inverse of `actions_to_model`."""
        x = transforms.to_absolute(np.asarray(actions, np.float64), state, self.variant(pi05).delta)
        grippers = list(self.aloha_grippers)
        x[..., grippers] = transforms.aloha_gripper_action_from_pi(x[..., grippers])
        return transforms.flip(x, self.flips)

    def prompt_of(self, raw: Mapping[str, Any]) -> Any:
        """The prompt as text, from bytes or a numpy scalar too; the robot's own if raw has none."""
        prompt = raw.get(PROMPT)
        if isinstance(prompt, np.ndarray | np.generic) and np.ndim(prompt) == 0:
            prompt = prompt.item()
        if isinstance(prompt, bytes):
            prompt = prompt.decode(errors="replace")
        return self.prompt if prompt is None else prompt


# ----------------------------------------------------------------------------------------------------------------------
# the table
# ----------------------------------------------------------------------------------------------------------------------

_ALOHA = RobotSpec(
    name="aloha",
    cameras={
        "images/cam_high": "base_0_rgb",
        "images/cam_left_wrist": "left_wrist_0_rgb",
        "images/cam_right_wrist": "right_wrist_0_rgb",
    },
    optional=("images/cam_left_wrist", "images/cam_right_wrist"),
    unused=("cam_low",),
    state={"state": 14},  # left arm 6, left gripper, right arm 6, right gripper
    action_dims=14,
    pi0=Variant(horizon=50, template="openpi_pi0", delta=make_mask(6, -1, 6, -1)),
    pi05=Variant(horizon=50, template="openpi", delta=make_mask(6, -1, 6, -1)),
    flips=(1, -1, -1, 1, 1, 1, 1, 1, -1, -1, 1, 1, 1, 1),
    aloha_grippers=(6, 13),
    asset_ids=("trossen",),
)

ROBOTS: dict[str, RobotSpec] = {
    robot.name: robot
    for robot in (
        _ALOHA,
        # openpi's pi0_aloha_sim: trained on absolute joint positions.
        dataclasses.replace(
            _ALOHA,
            name="aloha_sim",
            pi0=dataclasses.replace(_ALOHA.pi0, delta=()),
            pi05=dataclasses.replace(_ALOHA.pi05, delta=()),
            asset_ids=("lerobot/aloha_sim_transfer_cube_human",),
            prompt="Transfer cube",
        ),
        # openpi's pi0_droid and pi05_droid: actions are joint velocities, so nothing is relative to the state.
        RobotSpec(
            name="droid",
            cameras={
                "observation/exterior_image_1_left": "base_0_rgb",
                "observation/wrist_image_left": "left_wrist_0_rgb",
            },
            unused=("exterior_image_2_left",),
            state={"observation/joint_position": 7, "observation/gripper_position": 1},
            action_dims=8,
            pi0=Variant(horizon=10, template="openpi_pi0"),
            pi05=Variant(horizon=15, template="openpi"),
            asset_ids=("droid",),
        ),
        # openpi's pi0_libero and pi05_libero. LIBERO's actions are relative already; pi0's were made so once more. pi0.5
        # was trained with discrete_state_input=False, that is pi0's prompt: it does not see the state at all. Both were
        # trained on images turned by 180 degrees, which openpi's client does before sending them.
        RobotSpec(
            name="libero",
            cameras={"observation/image": "base_0_rgb", "observation/wrist_image": "left_wrist_0_rgb"},
            state={"observation/state": 8},
            action_dims=7,
            pi0=Variant(horizon=50, template="openpi_pi0", delta=make_mask(6, -1)),
            pi05=Variant(horizon=10, template="openpi_pi0"),
            asset_ids=("physical-intelligence/libero",),
        ),
        # The embedded one.
        RobotSpec(
            name="tabletop",
            cameras={"images/front": "front", "images/wrist": "wrist"},
            state={"state": 4},
            action_dims=4,
            pi0=Variant(horizon=8, template="openpi_pi0"),
            pi05=Variant(horizon=8, template="subtask"),
            asset_ids=("tabletop",),
        ),
    )
}


def get_robot(name: str) -> RobotSpec:
    """The robot of that name in the table, or of that `.json` file. Raises UserError listing the names, nearest first."""
    if name in ROBOTS:
        return ROBOTS[name]
    if name.endswith(".json"):
        try:
            return loads(Path(name).expanduser().read_text(), source=name)
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"robot file {name} cannot be read: {e}") from e
    near = sorted(ROBOTS, key=lambda r: -difflib.SequenceMatcher(None, name, r).ratio())
    raise UserError(f"unknown robot {name!r}: choose one of {', '.join(near)}, or the path of a .json file like them")


def dumps(robot: RobotSpec) -> str:
    """The robot as indented JSON."""
    return json.dumps(dataclasses.asdict(robot), indent=2) + "\n"


def loads(text: str, *, source: str = "robot.json") -> RobotSpec:
    """Inverse of `dumps`. Raises UserError naming unknown, missing or unfit fields."""
    try:
        return config_json.decode(RobotSpec, json.loads(text), source)
    except json.JSONDecodeError as e:
        raise UserError(f"{source} is not JSON: {e}") from e


def _flatten(raw: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in raw.items():
        name = f"{prefix}{key}"
        flat |= _flatten(value, f"{name}/") if isinstance(value, Mapping) else {name: value}
    return flat


def _places(key: str, camera: str) -> list[str]:
    """Where the image of a raw key is looked for, in this order."""
    return [place for name in (key, key.rsplit("/", 1)[-1], camera) for place in (name, f"{IMAGES}/{name}")]


def _part(robot: str, flat: Mapping[str, Any], key: str, dims: int) -> np.ndarray:
    value = np.atleast_1d(np.asarray(flat.get(key)))
    if value.dtype.kind not in "fiu" or value.shape != (dims,):
        found = "nothing" if key not in flat else f"{value.dtype} {list(value.shape)}"
        raise UserError(f"observation[{key!r}] of robot {robot} must be {dims} numbers, found {found}")
    return value.astype(np.float64)
