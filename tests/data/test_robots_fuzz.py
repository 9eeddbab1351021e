"""Broken if this fails: some mistake in a robot file ends in a stack trace, names no file, or changes what a robot sees."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from openpi_ar.data import robots
from openpi_ar.data.robot import Robot
from openpi_ar.errors import UserError
from openpi_ar.robot_spec import RobotSpec
from tests.data.mutations import change_json

CAMERAS = ("base_0_rgb", "left_wrist_0_rgb")
ARM = {
    "name": "arm",
    "cameras": {"observation.images.top": "base_0_rgb", "observation.images.wrist|wrist": "left_wrist_0_rgb"},
    "optional": ["observation.images.wrist|wrist"],
    "state": {"observation.state[0:6]": 6, "observation.gripper": 1},
    "action_dims": 7,
    "actions": ["action[0:6]", "gripper"],
    "action_names": ["a", "b", "c", "d", "e", "f", "grip"],
    "delta_mask": [6, -1],
    "flips": [1, -1],
    "inverted_grippers": [6],
    "prompt": "tidy up",
    "pi05": {"horizon": 10, "template": "subtask", "delta": [True, False]},
}


def text_of(rng: np.random.Generator, body: Any) -> tuple[str, str]:
    """(file name, text): JSON or YAML, sometimes with a line twice, lost, cut off or indented otherwise."""
    if rng.random() < 0.3:
        name, text = "arm.json", json.dumps(body, indent=1)
    else:
        name, text = "arm.yaml", yaml.safe_dump(json.loads(json.dumps(body)), sort_keys=False, allow_unicode=True)
    lines = text.split("\n")
    i, what = int(rng.integers(len(lines))), rng.integers(12)
    if what == 0:
        lines.insert(i, lines[i])
    elif what == 1:
        del lines[i]
    elif what == 2:
        lines[i] = lines[i][: len(lines[i]) // 2]
    elif what == 3:
        lines[i] = ("\t", " ", "- ", "yes: ", "2024-13-41: ")[rng.integers(5)] + lines[i]
    return name, "\n".join(lines)


def outcome(path: Path) -> str:
    """ "read", or the line that reading ends with. Anything else but a UserError of one line is raised."""
    try:
        spec = robots.get_robot(str(path)).of_model("pi05")
        check_held(spec, path)
        robot = Robot(spec, CAMERAS, spec.state_dims or 7, spec.action_dims or 7)
    except UserError as e:
        line = str(e)
        assert "\n" not in line and len(line) < 2000
        assert path.name in line or "robot" in line, line
        return line
    observe(robot)
    return "read"


def check_held(spec: RobotSpec, path: Path) -> None:
    """Every name and number of the robot is in its file: nothing was made up, changed or turned into text."""
    text = path.read_bytes().decode("utf-8-sig")
    body = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    assert spec.cameras == body["cameras"]
    for name in ("actions", "flips", "inverted_grippers", "optional"):
        given = body.get(name, getattr(RobotSpec(), name))
        assert getattr(spec, name) == tuple([given] if isinstance(given, str) else given)
    assert list(spec.state) == ([body["state"]] if isinstance(body["state"], str) else list(body["state"]))
    assert spec.prompt == body.get("prompt")


def observe(robot: Robot) -> None:
    """An observation of the undamaged robot is read or refused in one line."""
    raw = {
        "observation.images.top": np.full((8, 8, 3), 1, np.uint8),
        "observation.images.wrist": np.full((8, 8, 3), 2, np.uint8),
        "observation.state": np.arange(8.0),
        "observation.gripper": np.array([0.25]),
    }
    try:
        reading = robot.read(raw)
    except UserError as e:
        assert "\n" not in str(e)
        return
    for camera, image in reading.images.items():
        (key,) = (key for key, name in robot.spec.cameras.items() if name == camera)
        assert int(image[0, 0, 0]) == (1 if "top" in key else 2), (key, camera)


def try_mistakes(tmp_path: Path, seeds: range) -> list[str]:
    outcomes = []
    for seed in seeds:
        rng, body = np.random.default_rng(seed), copy.deepcopy(ARM)
        for _ in range(rng.integers(0, 3)):
            change_json(rng, body)
        name, text = text_of(rng, body)
        path = tmp_path / name
        path.write_bytes(text.encode(("utf-8", "utf-8", "utf-8-sig", "utf-16")[rng.integers(4)], "replace"))
        try:
            outcomes.append(outcome(path))
        except Exception as e:
            raise AssertionError(f"seed {seed}: {type(e).__name__} {e}\n{text}") from e
    return outcomes


def test_mistakes_are_refused_in_one_line_that_names_the_file(tmp_path):
    outcomes = try_mistakes(tmp_path, range(200))
    assert 20 < outcomes.count("read") < 180  # the damage is such that both happen
    assert len(set(outcomes)) > 50  # and of many kinds


@pytest.mark.slow
@pytest.mark.parametrize("part", range(5))
def test_many_mistakes_are_refused_in_one_line_that_names_the_file(tmp_path, part):
    try_mistakes(tmp_path, range(200 + 500 * part, 700 + 500 * part))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cameras: [observation.images.top]", "cameras must be pairs `key: value`, each value a text, found"),
        ("cameras: {observation.images.top: }", "cameras: observation.images.top must be a text, found nothing"),
        ("cameras: {7: base_0_rgb}", "cameras: key must be a text, found 7"),
        ("action: [action]", "no field action: did you mean actions"),
        ("inverted_grippers: 6", "inverted_grippers must be a list, each entry a whole number, found 6"),
        ("flips: [1, yes]", "flips, entry 2 must be a whole number, found True"),
        ("prompt: 3", "prompt must be a text, found 3"),
        ("state: [a]\nstate: [b]", "'state' is given twice: keep one"),
        ("state: [a, a]", "each once, found 'a'"),
        ("pi05: {horizon: '10'}", "pi05: horizon must be a whole number, found '10'"),
        ("delta_mask: 6", "delta_mask must be a list"),
        ("delta_mask: [1000000000000]\nstate: {s: 3}\naction_dims: 3", "delta_mask must be runs"),
        ("action_names: [x, y]\nstate: {s: 3}\naction_dims: 3", "action_names must be 3 names, found 2"),
        ("{[1]: 2}", "is not YAML"),
        ("prompt: 2024-13-41", "is not YAML"),
    ],
)
def test_a_mistake_names_the_file_and_the_field(tmp_path, text, words):
    keys = {line.partition(":")[0] for line in text.split("\n")}
    rest = {"cameras": {"observation.images.top": "base_0_rgb"}, "state": ["observation.state"]}
    path = tmp_path / "mine.yaml"
    path.write_text(text + "\n" + yaml.safe_dump({k: v for k, v in rest.items() if k not in keys}))
    with pytest.raises(UserError) as e:
        robots.get_robot(str(path))
    assert "mine.yaml" in str(e.value) and words in str(e.value)


def test_feature_and_camera_the_wrong_way_round(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("cameras: {base_0_rgb: observation.images.top}\nstate: [observation.state]")
    with pytest.raises(UserError, match="wrong way round.*write observation.images.top: base_0_rgb") as e:
        robots.get_robot(str(path)).check_cameras(CAMERAS)
    assert "--model.cameras" not in str(e.value)
