"""Robots as data: the table of those that released models were trained for, and files of your own.

A row of `ROBOTS` is complete: a released checkpoint and a robot's name are enough to act; a robot of your
own is the same fields in a YAML or JSON file. Values are openpi's (`src/openpi/policies/*_policy.py`,
`src/openpi/training/config.py`).
"""

import dataclasses
import json
from pathlib import Path

from openpi_ar import config_json
from openpi_ar.errors import UserError
from openpi_ar.lookup import nearest
from openpi_ar.robot_spec import RobotSpec, Variant, make_mask
from openpi_ar.text.templates import get_template
from openpi_ar.textfile import parse_json, parse_yaml, read_text

_FILES = (".json", ".yaml", ".yml")


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
            pi0=Variant(horizon=50, template="openpi_pi0"),
            pi05=Variant(horizon=50, template="openpi"),
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
        # openpi's pi0_libero and pi05_libero. LIBERO's actions are relative already; pi0's were made so once more.
        # pi0.5 was trained with discrete_state_input=False, that is pi0's prompt: it does not see the state at all.
        # Both were trained on images turned by 180 degrees, which openpi's client does before sending them.
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
    )
}


def get_robot(name: str) -> RobotSpec:
    """The robot of that name in the table, or of that YAML or JSON file. Raises UserError listing the names."""
    if name in ROBOTS:
        return ROBOTS[name]
    if name.endswith(_FILES):
        return loads(read_text(Path(name).expanduser()), source=name)
    raise UserError(
        f"unknown robot {name!r}: choose one of {', '.join(nearest(name, ROBOTS))}, or the path of a .yaml or .json "
        "file like them"
    )


def dumps(robot: RobotSpec) -> str:
    """The robot as indented JSON."""
    return json.dumps(dataclasses.asdict(robot), indent=2) + "\n"


def loads(text: str, *, source: str = "robot.json") -> RobotSpec:
    """Inverse of `dumps`, of YAML too if `source` is not called .json.

    Shorter than what `dumps` writes: `state` may be a list of keys. Raises UserError naming unknown, missing or unfit
    fields.
    """
    body = parse_json(text, source) if source.endswith(".json") else parse_yaml(text, source)
    if not isinstance(body, dict):
        raise UserError(f"{source}: expected the fields of a robot, found {type(body).__name__}")
    for name in ("state", "actions"):
        if isinstance(body.get(name), str):
            body[name] = [body[name]]
    keys = body.get("state")
    if isinstance(keys, list):
        if wrong := [key for key in keys if not isinstance(key, str) or keys.count(key) > 1]:
            raise UserError(f"{source}: state names features or raw keys in quotes, each once, found {wrong[0]!r}")
        body["state"] = dict.fromkeys(keys, 0)
    spec = config_json.decode(RobotSpec, {"name": Path(source).stem, **body}, source)
    if not spec.cameras or not spec.state:
        raise UserError(
            f"{source}: cameras must name at least one image and state one key, found {spec.cameras} and {spec.state}"
        )
    for variant in filter(None, (spec.pi0, spec.pi05)):
        try:
            get_template(variant.template)
        except UserError as e:
            raise UserError(f"{source}: {e}") from e
    return spec
