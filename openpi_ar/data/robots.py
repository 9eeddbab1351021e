"""Robots as data: the table of those that released models were trained for, files of your own, and training on them.

A row of `ROBOTS` says everything, so that a released checkpoint and a robot's name are enough to act; a robot of your own is
the same fields in a YAML or JSON file. Values are openpi's (`src/openpi/policies/*_policy.py`, `src/openpi/training/config.py`).
"""

from collections.abc import Sequence
import dataclasses
import json
from pathlib import Path
from typing import Any

import yaml

from openpi_ar import config_json
from openpi_ar.config import LeRobotData, RobotConfig, TrainConfig
from openpi_ar.data.robot_spec import ANY, STATE, RobotSpec, Variant, split_key
from openpi_ar.data.transforms import make_mask
from openpi_ar.errors import UserError
from openpi_ar.lookup import nearest
from openpi_ar.textfile import read_text

MASKED = ("none", "")
"""In place of a feature: the camera is masked."""

_FILES = (".json", ".yaml", ".yml")

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
            actions=("actions",),
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
            actions=("actions",),
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


# ----------------------------------------------------------------------------------------------------------------------
# files
# ----------------------------------------------------------------------------------------------------------------------


def get_robot(name: str) -> RobotSpec:
    """The robot of that name in the table, or of that YAML or JSON file. Raises UserError listing the names, nearest first."""
    if name in ROBOTS:
        return ROBOTS[name]
    if name.endswith(_FILES):
        return loads(read_text(Path(name).expanduser()), source=name)
    raise UserError(
        f"unknown robot {name!r}: choose one of {', '.join(nearest(name, ROBOTS))}, or the path of a .yaml or .json file like them"
    )


def dumps(robot: RobotSpec) -> str:
    """The robot as indented JSON."""
    return json.dumps(dataclasses.asdict(robot), indent=2) + "\n"


def loads(text: str, *, source: str = "robot.json") -> RobotSpec:
    """Inverse of `dumps`, of YAML too if `source` is not called .json.

    Shorter than what `dumps` writes: `state` may be a list of keys, and `delta_mask` (`[6, -1]`: six dimensions relative to
    the state, one absolute) stands for `delta` of both models. Raises UserError naming unknown, missing or unfit fields.
    """
    try:
        body = json.loads(text) if source.endswith(".json") else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as e:
        kind = "JSON" if source.endswith(".json") else "YAML"
        raise UserError(f"{source} is not {kind}: {' '.join(str(e).split())}") from e
    if not isinstance(body, dict):
        raise UserError(f"{source}: expected the fields of a robot, found {type(body).__name__}")
    if isinstance(body.get("state"), list | str):
        keys = [body["state"]] if isinstance(body["state"], str) else body["state"]
        if wrong := [key for key in keys if not isinstance(key, str)]:
            raise UserError(f"{source}: state names features or raw keys, found {wrong[0]!r}: put it in quotes")
        body["state"] = dict.fromkeys(keys, 0)
    if isinstance(body.get("actions"), str):
        body["actions"] = [body["actions"]]
    runs = body.pop("delta_mask", None)
    spec = config_json.decode(RobotSpec, {"name": Path(source).stem, **body}, source)
    if runs is None:
        return spec
    mask = _mask(runs, source)
    parts = {kind: dataclasses.replace(getattr(spec, kind), delta=mask) for kind in ("pi0", "pi05")}
    return dataclasses.replace(spec, **parts)


def _mask(runs: Any, source: str) -> tuple[bool, ...]:
    if not isinstance(runs, list) or any(type(r) is not int or not r for r in runs):
        raise UserError(f"{source}: delta_mask is a list of runs, [6, -1]: six relative, one absolute; found {runs!r}")
    return make_mask(*runs)


# ----------------------------------------------------------------------------------------------------------------------
# training
# ----------------------------------------------------------------------------------------------------------------------


def as_data(spec: RobotSpec, data: LeRobotData, cameras: Sequence[str], *, kind: str) -> LeRobotData:
    """How to read a dataset of this robot: what `--robot` stands for.

    Features go by the last part of the robot's raw keys. Raises UserError if the robot feeds cameras that the model lacks.
    """
    if strange := [camera for camera in spec.cameras.values() if camera not in cameras]:
        raise UserError(
            f"robot {spec.name} feeds camera {', '.join(strange)}, but the model reads {', '.join(cameras)}: set "
            f"--model.cameras {' '.join(spec.cameras.values())}, or name the model's cameras in the robot's file"
        )
    keys = {camera: key + "|none" * (key in spec.optional) for key, camera in spec.cameras.items()}
    return dataclasses.replace(
        data,
        cameras=tuple(f"{camera}={keys.get(camera, 'none')}" for camera in cameras),
        state=tuple(spec.state),
        actions=spec.actions,
        prompt=data.prompt or spec.prompt or "",
        robot=RobotConfig(
            name=spec.name,
            delta_mask=_runs(spec.variant(kind).delta),
            flips=spec.flips,
            aloha_grippers=spec.aloha_grippers,
            inverted_grippers=spec.inverted_grippers,
        ),
    )


def of_data(data: LeRobotData, cameras: Sequence[str], state_dims: int, action_dims: int) -> RobotSpec:
    """Inverse of `as_data`: the robot whose dataset was, or is, trained on. It sends what the dataset's features are called.

    "state" alone is always the model's whole state, cut and side by side. Raises UserError if the fields of `data.robot` do
    not fit that many dimensions.
    """
    given: dict[str, str] = {name: key for name, _, key in (entry.partition("=") for entry in data.cameras)}
    keys = {camera: given.get(camera, camera).split("|") for camera in cameras}
    seen = {camera: [k for k in names if k not in MASKED] for camera, names in keys.items()}
    # LeRobot's own name of a camera that goes by its last part.
    full = {k: f"observation.images.{k.rsplit('/', 1)[-1]}" for names in seen.values() for k in names if "." not in k}
    named = {camera: "|".join([*names, *(full[k] for k in names if k in full)]) for camera, names in seen.items()}
    state = [f"observation.{key}" if split_key(key)[0] == STATE else key for key in data.state]
    variant = Variant(delta=_mask(list(data.robot.delta_mask), "data.robot"))
    try:
        spec = RobotSpec(
            name=data.robot.name or "of the dataset",
            cameras={key: camera for camera, key in named.items() if key},
            state=dict.fromkeys(state, 0) if len(state) > 1 else {state[0]: state_dims},
            action_dims=action_dims,
            pi0=variant,
            pi05=variant,
            actions=data.actions,
            optional=tuple(
                named[camera] for camera, names in keys.items() if set(names) & set(MASKED) and named[camera]
            ),
            unused=(ANY,),
            flips=data.robot.flips,
            aloha_grippers=data.robot.aloha_grippers,
            inverted_grippers=data.robot.inverted_grippers,
            prompt=data.prompt or None,
        )
    except ValueError as e:
        raise UserError(f"data.robot: {e}") from e
    spec.check_dims(state_dims, action_dims)
    return spec


def of_config(cfg: TrainConfig, state_dims: int, action_dims: int) -> RobotSpec | None:
    """The robot whose dataset a run was trained on, by its config alone; None if it names no dataset. Raises UserError as
    `of_data`."""
    if cfg.data.path:
        return of_data(cfg.data, cfg.model.cameras, state_dims, action_dims)
    return None


def _runs(mask: Sequence[bool]) -> tuple[int, ...]:
    """Inverse of `make_mask`."""
    runs: list[int] = []
    for relative in mask:
        if runs and (runs[-1] > 0) == relative:
            runs[-1] += 1 if relative else -1
        else:
            runs.append(1 if relative else -1)
    return tuple(runs)
