"""Broken if this fails: a model trained on a robot's data learns other numbers than it should, or moves that robot otherwise."""

import dataclasses
import json

import numpy as np
import pytest

from configs import HELP, get_preset
from openpi_ar.config import LeRobotData
from openpi_ar.data import robots
from openpi_ar.data.inputs import InputTransform
from openpi_ar.data.robot import Robot
from openpi_ar.data.transforms import actions_to_model
from openpi_ar.errors import UserError
from openpi_ar.robot_spec import RobotSpec
from openpi_ar.text.tokenizer import load_tokenizer
from openpi_ar.training import cli
from tests.data.test_robots import RAWS
from tests.lerobot_fixtures import CAMERAS, GOLDEN, HORIZON, LENGTHS, STARTS, broken, edit_column, rows, source
import train

DATASET = GOLDEN / "v30_video"
# Joints 1 to 4 relative, then the gripper, which is of the other sense; the rest is not the model's.
MINE = """
name: mine
cameras: {observation.images.base_0_rgb: base_0_rgb}
state: ["observation.state[1:5]", "observation.state[6]"]
actions: ["action[1:5]", "action[6]"]
delta_mask: [4, -1]
flips: [1, -1]
inverted_grippers: [4]
"""
FLAGS = [
    "--model.cameras",
    *CAMERAS,
    "--model.state-dim",
    "5",
    "--model.action-dim",
    "6",
    "--text.max-prompt-tokens",
    "64",
]


def parse(*flags: object):
    return cli.parse(["--config", "debug", *map(str, flags)], HELP, get_preset)


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(MINE)
    return path


def by_hand() -> tuple[np.ndarray, np.ndarray]:
    """States and absolute actions of every frame as the model is to see them before normalisation, float64 [60 5]."""
    out = []
    for key in ("observation.state", "action"):
        x = np.array([row[key] for row in rows("v30_video")])[:, [1, 2, 3, 4, 6]]
        x[:, 1] *= -1
        x[:, 4] = 1 - x[:, 4]
        out.append(x)
    return out[0], out[1]


def test_a_file_stands_for_flags_and_flags_go_first(mine, tmp_path):
    cfg = parse("--data.path", DATASET, "--robot", mine, "--data.robot.flips", 1, *FLAGS).config
    robot = robots.get_robot(str(mine))
    assert cfg.data == LeRobotData(path=str(DATASET), robot=dataclasses.replace(robot, flips=(1,)))
    filled = cfg.data.filled(CAMERAS)
    assert filled.cameras == ("base_0_rgb=observation.images.base_0_rgb", "left_wrist_0_rgb=none")
    assert (filled.state, filled.actions) == (tuple(robot.state), robot.actions)
    assert filled.filled(CAMERAS) == filled
    flags = ("--data.cameras", "left_wrist_0_rgb=wrist", "--data.state", "observation.state[6]")
    own = parse("--data.path", DATASET, "--robot", mine, *flags, *FLAGS).config.data.filled(CAMERAS)
    assert own.cameras == ("base_0_rgb=observation.images.base_0_rgb", "left_wrist_0_rgb=wrist")
    assert own.state == ("observation.state[6]",) and own.actions == robot.actions
    spelled = parse(
        "--data.path", DATASET, *FLAGS, "--data.robot.delta-mask", 4, -1, "--data.state", "observation.state[6]"
    )
    assert spelled.config.data.robot == RobotSpec(delta_mask=(4, -1))
    as_json = tmp_path / "mine.json"
    as_json.write_text(robots.dumps(robots.get_robot(str(mine))))
    assert parse("--data.path", DATASET, "--robot", as_json, *FLAGS).config.data == dataclasses.replace(
        cfg.data, robot=dataclasses.replace(cfg.data.robot, flips=(1, -1))
    )
    for flags, words in (
        (
            ("--data.path", DATASET, "--robot", mine),
            r"robot mine feeds camera base_0_rgb, but the model reads front, wrist",
        ),
        (("--data.path", DATASET, "--robot", "mind"), "unknown robot 'mind'"),
        (("--plot", "a.png"), "add --dry-run"),
    ):
        with pytest.raises(UserError, match=words):
            parse(*flags)


@pytest.fixture
def transform(mine):
    cfg = parse("--data.path", DATASET, "--robot", mine, *FLAGS).config
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, action_horizon=HORIZON))
    data = source(DATASET, **{k: getattr(cfg.data, k) for k in ("cameras", "state", "actions", "robot")})
    return InputTransform.for_training(cfg, load_tokenizer("embedded"), data.norm_stats()), data


def test_statistics_are_of_what_is_learnt(transform):
    _, data = transform
    state, actions = by_hand()
    chunks = [
        actions[start + i : min(start + i + HORIZON, start + length)] - state[start + i]
        for start, length in zip(STARTS, LENGTHS, strict=True)
        for i in range(length)
    ]
    stats = data.norm_stats()
    relative = np.concatenate(chunks)[:, :4]
    for name, x in (("mean", np.mean), ("q01", lambda a, axis: np.quantile(a, 0.01, axis=axis))):
        np.testing.assert_allclose(getattr(stats["state"], name), x(state, axis=0), atol=1e-6)
        np.testing.assert_allclose(getattr(stats["actions"], name)[:4], x(relative, axis=0), atol=1e-6)
        np.testing.assert_allclose(getattr(stats["actions"], name)[4], x(actions[:, 4], axis=0), atol=1e-6)
    # Negative control: the statistics of absolute actions are others.
    assert np.abs(stats["actions"].mean[:4] - actions.mean(0)[:4]).max() > 0.02


def test_training_and_the_robots_own_observation_agree_and_actions_come_back_absolute(transform):
    t, data = transform
    recorded, (state, actions) = rows("v30_video"), by_hand()
    for i in (0, 19, 41):
        raw, row = data[i], recorded[i]
        sample = t.sample(raw)
        # What the robot itself sends: whole features under LeRobot's names.
        sent = {
            "observation.images.base_0_rgb": raw["images"]["base_0_rgb"],
            "observation.state": np.array(row["observation.state"]),
            "prompt": raw["prompt"],
        }
        nested = {key: value for key, value in sent.items() if key != "observation.state"}
        nested["observation"] = {"state": sent["observation.state"]}
        for obs in (t.observation(sent), t.observation(nested)):
            for name in ("images", "image_mask", "state"):
                np.testing.assert_array_equal(obs[name], sample[name])
            np.testing.assert_array_equal(obs["prompt"]["ids"], sample["prompt"]["ids"])
        assert sample["image_mask"].tolist() == [True, False]
        np.testing.assert_allclose(t.state_stats.unnormalize(sample["state"][:5]), state[i], atol=1e-5)
        learnt = t.action_stats.unnormalize(sample["actions"][0, :5])
        np.testing.assert_allclose(learnt, [*(actions[i] - state[i])[:4], actions[i][4]], atol=1e-5)
        back = t.actions_to_real(sample["actions"][None], [t.robot.read(sent)])[0]
        np.testing.assert_allclose(back, raw["actions"], atol=1e-5)
        np.testing.assert_allclose(back[0], np.array(row["action"])[[1, 2, 3, 4, 6]], atol=1e-5)


@pytest.mark.parametrize("name", list(RAWS))
@pytest.mark.parametrize("pi05", [True, False])
def test_a_robot_of_the_table_can_be_trained_and_is_the_same_after(name, pi05):
    cameras = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    spec = robots.get_robot(name).of_model("pi05" if pi05 else "pi0")
    data = LeRobotData(path="x", robot=spec)
    a, b = (Robot(s, cameras, spec.state_dims, spec.action_dims) for s in (spec, data.reader(cameras)))
    raw, rng = RAWS[name](), np.random.default_rng(0)
    want, got = a.read(raw), b.read(raw)
    np.testing.assert_array_equal(got.state, want.state)
    assert {k: v.tolist() for k, v in got.images.items()} == {k: v.tolist() for k, v in want.images.items()}
    assert got.prompt == want.prompt
    actions = rng.uniform(0.1, 0.9, (3, spec.action_dims))
    np.testing.assert_array_equal(
        actions_to_model(b.spec, actions, got.state), actions_to_model(a.spec, actions, want.state)
    )
    # Features of a dataset go by the last part of the robot's keys.
    assert set(spec.optional) == {
        key for key in spec.optional if f"{key}|none" in " ".join(data.filled(cameras).cameras)
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("state: [", "mine.yaml is not YAML"),
        ("- a", "expected the fields of a robot, found list"),
        (MINE.replace("[4, -1]", "4"), r"delta_mask must be a list, each entry a whole number, found 4"),
        (MINE.replace("[1, -1]", "[2]"), "signs"),
        (MINE.replace("cameras", "kameras"), "no field kameras"),
        (MINE.replace("state[6]", "state[x]"), r"'observation.state\[x\]' is neither"),
        (MINE.replace("grippers: [4]", "grippers: [4]\naloha_grippers: [4]"), "dimension 4 is both"),
    ],
)
def test_files_that_are_wrong_are_refused(tmp_path, text, words):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        robots.get_robot(str(path))


def test_dimensions_that_the_data_lacks_are_refused(mine):
    with pytest.raises(UserError, match=r"has 7 dimensions"):
        source(DATASET, state=("observation.state[5:9]",))
    for robot, words in (
        (RobotSpec(delta_mask=(8,)), "delta_mask must be of 7 dimensions at most, found 8"),
        (RobotSpec(inverted_grippers=(7,)), "under 7"),
    ):
        with pytest.raises(UserError, match=words):
            source(DATASET, robot=robot)


def dry_run(capsys, path, *flags) -> str:
    train.main([*map(str, ("--config", "debug", "--dry-run", "--data.path", path, *flags))])
    return capsys.readouterr().out


def test_dry_run_shows_everything_and_writes_nothing(mine, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = dry_run(capsys, DATASET, "--robot", mine, *FLAGS, "--plot", "ranges.png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.yaml", "ranges.png"]
    lines = {
        cell: line
        for line in out.splitlines()
        for cell in [line.strip("│ ").split(" ", 3)[:2]]
        for cell in [" ".join(cell)]
    }
    assert "action.j6" in lines["action 4"] and "1 - x, absolute" in lines["action 4"]
    assert "sign turned, less the chunk's first state" in lines["action 1"]
    assert "padding" in lines["action 5"] and "masked" in next(s for s in out.splitlines() if "left_wrist_0_rgb" in s)
    # The very text that is tokenised, with the state in it.
    cfg = parse("--data.path", DATASET, "--robot", mine, *FLAGS).config
    assert "'Task: put the red block in the bowl, State: " in out and r";\nSubtask:'" in out
    assert "' reach for the red block<eos>'" in out and f"│ {cfg.text.max_target_tokens} " in out
    assert "no remarks; nothing was trained" in out


def test_dry_run_finds_what_is_odd(tmp_path, capsys):
    path = broken(tmp_path, "v30_video")
    file = path / "data/chunk-000/file-000.parquet"
    edit_column(file, "subtask_index", lambda c: c.__setitem__(slice(22, 25), [-1] * 3))
    edit_column(file, "action", lambda c: c.__setitem__(slice(None), [[0.5, *a[1:]] for a in c]))
    edit_column(file, "observation.state", lambda c: c[3].__setitem__(2, 99.0))
    names = json.loads((path / "meta/info.json").read_text())["features"]["action"]["names"]
    edit_column(path / "meta/subtasks.parquet", "subtask", lambda c: c.__setitem__(1, "lift the red block " * 5))
    flags = (*FLAGS[:3], "--model.state-dim", 7, "--model.action-dim", 7, "--data.held-out", 0)
    out = dry_run(capsys, path, *flags)
    assert f"no subtask: {file}: episode 1, frame 2 to 4" in out
    assert f"actions 0 (action.{names[0]}) is constant, 0.5" in out
    assert "state 2 (observation.state.j2) reaches" in out and "(99 before normalisation)" in out
    assert out.count("episode 0, frame 3") >= 2
    assert f"'{' '.join(['lift the red block'] * 5)}' takes 2" in out
