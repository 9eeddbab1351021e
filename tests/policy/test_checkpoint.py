"""If this fails, a checkpoint of openpi's cannot be used by naming its robot, or is fed wrongly without a word."""

import dataclasses
import json
from pathlib import Path
import shutil
import subprocess
import sys
from typing import Any

from flax import nnx
import numpy as np
import orbax.checkpoint as ocp
import pytest

import infer
from openpi_ar.checkpoints import export, load, remote
from openpi_ar.data.normalize import NormStats, save_norm_stats
from openpi_ar.data.robots import ROBOTS, dumps, get_robot
from openpi_ar.errors import UserError
from openpi_ar.model_config import VitConfig
from openpi_ar.params import flatten, unflatten
from openpi_ar.policy import Policy
from openpi_ar.policy import checkpoint as foreign
from openpi_ar.text.tokenizer import load_tokenizer
from openpi_ar.worlds import robot_file
from tests.model_fixtures import tiny_config, tiny_model

CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
SIGLIP = VitConfig(width=24, depth=2, mlp_dim=40, num_heads=2, patch_size=8, image_size=(16, 16))
SIZES: dict[str, Any] = {"cameras": CAMERAS, "state_dim": 32, "action_dim": 32, "vocab_size": 1040, "siglip": SIGLIP}


class Reader:
    """Stands for `load.read`: the headers are read, the parameters are those of a tiny model made once."""

    def __init__(self, folder: Path):
        self.models = {kind: tiny_model(tiny_config(**SIZES, pi05=kind == "pi05")) for kind in ("pi0", "pi05")}
        self.kind, self.calls = "pi05", 0
        for kind, model in self.models.items():
            arrays = export.to_openpi(flatten(model), model.cfg)
            ocp.PyTreeCheckpointer().save(folder / kind / "params", {"params": unflatten(arrays)})
        self.folder = folder

    def __call__(self, looked: load.Inspected) -> load.Loaded:
        self.calls += 1
        model = nnx.clone(self.models[self.kind])
        model.cfg = looked.config
        return load.Loaded(model, looked.config, looked.kind, looked.matched.source, looked.notes)

    def checkpoint(self, folder: Path, *asset_ids: str, dims: int = 32) -> Path:
        """One of openpi's, with statistics of these robots."""
        shutil.copytree(self.folder / self.kind, folder)
        for asset_id in asset_ids:
            (folder / "assets" / asset_id).mkdir(parents=True)
            body = json.dumps({"norm_stats": openpi_stats(dims)})
            (folder / "assets" / asset_id / "norm_stats.json").write_text(body)
        return folder


@pytest.fixture(scope="module")
def one_reader(tmp_path_factory) -> Reader:
    return Reader(tmp_path_factory.mktemp("openpi"))


@pytest.fixture
def reader(one_reader, monkeypatch) -> Reader:
    one_reader.kind, one_reader.calls = "pi05", 0
    monkeypatch.setattr(load, "read", one_reader)
    # PaliGemma's is not shipped; any vocabulary will do here.
    monkeypatch.setattr(foreign, "load_tokenizer", lambda name: {"paligemma": load_tokenizer("embedded")}[name])
    return one_reader


def openpi_stats(dims: int) -> dict[str, dict[str, list[float]]]:
    rng = np.random.default_rng(dims)
    mean, std = rng.normal(size=dims), rng.uniform(0.5, 2, dims)
    entry = {"mean": mean, "std": std, "q01": mean - 2 * std, "q99": mean + 3 * std}
    return {name: {k: v.tolist() for k, v in entry.items()} for name in ("state", "actions")}


@pytest.mark.parametrize(
    ("robot", "pi05", "asset", "horizon", "template", "tokens"),
    [
        ("droid", True, "droid", 15, "openpi", 200),
        ("droid", False, "droid", 10, "openpi_pi0", 48),
        ("libero", True, "physical-intelligence/libero", 10, "openpi_pi0", 200),
        ("libero", False, "physical-intelligence/libero", 50, "openpi_pi0", 48),
        ("aloha", True, "trossen", 50, "openpi", 200),
        ("aloha_sim", False, "lerobot/aloha_sim_transfer_cube_human", 50, "openpi_pi0", 48),
    ],
)
def test_the_robots_name_says_the_rest(reader, tmp_path, robot, pi05, asset, horizon, template, tokens):
    reader.kind = "pi05" if pi05 else "pi0"
    parts = foreign.load_policy_parts(reader.checkpoint(tmp_path / "c", asset, "other"), robot)
    assert parts.cfg.model.action_horizon == parts.model.cfg.action_horizon == horizon
    assert (parts.cfg.text.template, parts.cfg.text.max_prompt_tokens) == (template, tokens)
    assert parts.cfg.robot == ROBOTS[robot].of_model("pi05" if pi05 else "pi0")
    assert {s.mode for s in parts.stats.values()} == {"quantile" if pi05 else "z_score"}
    np.testing.assert_array_equal(parts.stats["actions"].q99, openpi_stats(32)["actions"]["q99"])


def test_horizon_and_statistics_can_be_named(reader, tmp_path):
    path = reader.checkpoint(tmp_path / "c", "mine", "theirs")
    parts = foreign.load_policy_parts(path, "droid", asset_id="mine", horizon=16)
    assert parts.model.cfg.action_horizon == 16
    # One that says its horizon itself is believed.
    (path / "config.json").write_text('{"action_horizon": 50}')
    assert foreign.load_policy_parts(path, "droid", asset_id="mine").cfg.model.action_horizon == 50
    (path / "config.json").write_text('{"action_dim": 32}')
    assert foreign.load_policy_parts(path, "droid", asset_id="mine").cfg.model.action_horizon == 15


def test_parameters_may_be_named_instead_of_the_checkpoint(reader, tmp_path):
    path = reader.checkpoint(tmp_path / "c", "droid")
    export.save_safetensors(path, flatten(reader.models["pi05"]), reader.models["pi05"].cfg, "torch")
    for inner in ("params", "model.safetensors"):
        assert foreign.load_policy_parts(path / inner, "droid").cfg.robot.name == "droid"
    assert foreign.load_policy_parts(f"file://{path}", "droid").cfg.robot.name == "droid"


def test_a_robot_of_your_own_is_a_file(reader, tmp_path):
    mine = dataclasses.replace(
        ROBOTS["droid"], name="mine", pi05=dataclasses.replace(ROBOTS["droid"].pi05, horizon=7), asset_ids=()
    )
    (tmp_path / "mine.json").write_text(dumps(mine))
    parts = foreign.load_policy_parts(reader.checkpoint(tmp_path / "c", "droid"), str(tmp_path / "mine.json"))
    assert (parts.cfg.model.action_horizon, parts.cfg.robot) == (7, mine.of_model("pi05"))


def test_a_checkpoint_of_ours_needs_no_robot_and_may_be_given_one(tiny_checkpoint):
    parts = foreign.load_policy_parts(tiny_checkpoint)
    assert not parts.cfg.robot.name and parts.cfg.model.vocab_size == 1040
    tabletop = robot_file("tabletop")
    assert foreign.load_policy_parts(tiny_checkpoint, tabletop).cfg.robot == get_robot(tabletop).of_model("pi05")
    for option in ({"asset_id": "droid"}, {"horizon": 3}):
        with pytest.raises(UserError, match="leave out --asset-id and --horizon"):
            foreign.load_policy_parts(tiny_checkpoint, **option)


def test_what_is_wrong_is_said_before_parameters_are_read(reader, tmp_path):
    path = reader.checkpoint(tmp_path / "c", "a", "b/c")
    for robot, options, words in (
        (None, {}, r"does not say which robot it is for: .*--robot aloha \| aloha_sim \| droid"),
        ("drod", {}, "unknown robot 'drod': choose one of droid"),
        ("droid", {}, "several robots: a, b/c; pick one with --asset-id"),
        ("droid", {"asset_id": "b"}, "no statistics of --asset-id b: it has "),
        ("droid", {"horizon": 0}, "horizon must be 1"),
    ):
        with pytest.raises(UserError, match=words):
            foreign.load_policy_parts(path, robot, **options)
    with pytest.raises(UserError, match=r"expected .*/assets/droid/norm_stats\.json"):
        foreign.load_policy_parts(reader.checkpoint(tmp_path / "none"), "droid")
    with pytest.raises(UserError, match="nowhere does not exist"):
        foreign.load_policy_parts(tmp_path / "nowhere")
    assert reader.calls == 0


def test_what_only_the_parameters_tell_is_checked_too(reader, tmp_path):
    reader.kind = "pi0"
    path = reader.checkpoint(tmp_path / "c", "droid")
    stats = {k: NormStats(**{n: np.array(a) for n, a in v.items()}) for k, v in openpi_stats(32).items()}
    save_norm_stats(path / "assets" / "droid", stats)  # says quantile
    with pytest.raises(UserError, match="mode quantile, but pi0 is trained with z_score"):
        foreign.load_policy_parts(path, "droid")
    assert reader.calls == 0  # the headers tell it


def droid_observation(file: Path) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    raw = {
        "observation/exterior_image_1_left": rng.integers(0, 256, (18, 32, 3), np.uint8),
        "observation/wrist_image_left": rng.integers(0, 256, (18, 32, 3), np.uint8),
        "observation/joint_position": rng.normal(size=7),
        "observation/gripper_position": np.array([0.4]),
    }
    np.savez(file, **raw, prompt=np.array("pick up the red block"))
    return raw


def test_infer_with_a_robot_needs_no_code(reader, tmp_path, capsys):
    """From the command line, in the robot's units, equal to the policy's and to its model's actions by openpi's formula."""
    path = reader.checkpoint(tmp_path / "pi05_droid", "droid")
    raw = droid_observation(tmp_path / "o.npz")
    argv = ["--ckpt", str(path), "--robot", "droid", "--observation", str(tmp_path / "o.npz"), "--repeats", "1"]
    infer.main([*argv, "--horizon", "4", "--json", str(tmp_path / "o.json")])
    written = json.loads((tmp_path / "o.json").read_text())
    assert np.shape(written["actions"]) == (4, 8) and written["subtask"] == ""
    assert written["prompt"] == "pick up the red block" and "action 7" in capsys.readouterr().out

    policy = Policy.from_checkpoint(path, robot="droid", horizon=4)
    policy.transform.actions_to_real = lambda actions, raws: actions[..., :8]  # type: ignore[method-assign]
    normalised = policy.infer({**raw, "prompt": "pick up the red block"})["actions"]
    low, high = (np.array(openpi_stats(32)["actions"][k][:8]) for k in ("q01", "q99"))
    np.testing.assert_allclose(written["actions"], (normalised + 1) / 2 * (high - low + 1e-6) + low, atol=1e-3)


def test_infer_takes_the_robots_own_prompt_and_prints_all_its_columns(reader, tmp_path, capsys, monkeypatch):
    result = {"subtask": "", "text_status": "ok", "actions": np.full((2, 14), -0.123456), "timing": {"total": 1.0}}
    seen = []
    monkeypatch.setattr(Policy, "measure", lambda self, raw, **_: seen.append(raw) or dict(result))
    reader.kind = "pi0"
    path = reader.checkpoint(tmp_path / "c", "lerobot/aloha_sim_transfer_cube_human")
    np.savez(tmp_path / "o.npz", **{"images/cam_high": np.zeros((3, 8, 8), np.uint8), "state": np.zeros(14)})
    infer.main(["--ckpt", str(path), "--robot", "aloha_sim", "--observation", str(tmp_path / "o.npz")])
    out = capsys.readouterr().out
    assert "prompt:  Transfer cube" in out and "action 13" in out and out.count("-0.1235") == 28
    policy = Policy.from_checkpoint(path, robot="aloha_sim")
    np.testing.assert_array_equal(policy.transform.observation(seen[0])["image_mask"], [True, False, False])


def test_infer_on_the_tabletop_by_its_robot_is_the_same(tiny_checkpoint, tmp_path, monkeypatch):
    seen = []
    result = {"subtask": "", "text_status": "ok", "actions": np.zeros((2, 4)), "timing": {}}
    monkeypatch.setattr(
        Policy, "measure", lambda self, raw, **_: seen.append(self.transform.observation(raw)) or result
    )
    for robot in ([], ["--robot", "tabletop"]):
        infer.main(["--ckpt", str(tiny_checkpoint), "--prompt", "put the red block in the left bin", *robot])
    for name in ("images", "image_mask", "state"):
        np.testing.assert_array_equal(seen[0][name], seen[1][name])
    np.testing.assert_array_equal(seen[0]["prompt"]["ids"], seen[1]["prompt"]["ids"])


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (["--robot", "drod"], ["unknown robot 'drod'", "droid"]),
        (["--asset-id", "panda"], ["--asset-id panda", "it has droid"]),
        (["--horizon", "0"], ["horizon must be 1"]),
        (
            ["--images", "wrist_image_left=WRIST"],
            ["image 'observation/exterior_image_1_left' of camera 'base_0_rgb' is missing"],
        ),
        (["--images", "base_0_rgb=WRIST", "wrist_image_left=WRIST", "top=WRIST"], ["no image 'images/top'"]),
        (["--images", "base_0_rgb=WRIST", "wrist_image_left=WRIST", "--state", "1"], ["8 numbers", "[1]"]),
        (["--images", "base_0_rgb=WRIST", "wrist_image_left=WRIST"], ["joint_position", "8 numbers"]),
        ([], ["image 'observation/exterior_image_1_left' of camera 'base_0_rgb' is missing"]),
        (["--rollout", "1"], ["names no simulated world", "--world (tabletop, libero)"]),
        (["--rollout", "1", "--world", "tabletop"], ["another robot than the tabletop"]),
        (["--rollout", "1", "--world", "moon"], ["no world 'moon'", "tabletop"]),
    ],
)
def test_infer_says_in_one_line_what_a_robot_lacks(reader, tmp_path, capsys, change, parts):
    from PIL import Image

    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "w.png")
    change = [c.replace("WRIST", str(tmp_path / "w.png")) for c in change]
    path = reader.checkpoint(tmp_path / "c", "droid")
    prompt = [] if "--rollout" in change else ["--prompt", "go"]
    with pytest.raises(SystemExit) as e:
        infer.main(["--ckpt", str(path), "--robot", "droid", *prompt, *change])
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count("\n") == 1
    assert [part for part in parts if part not in err] == []


def test_the_shipped_checkpoint_opens_by_its_name_from_any_directory(tmp_path, monkeypatch, tiny_checkpoint):
    """Its exact name is the shipped one, even where a directory is called so; `./tabletop` is that directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tabletop").symlink_to(tiny_checkpoint)
    assert foreign.load_policy_parts("tabletop").cfg.model.vocab_size != 1040
    for path in ("./tabletop", Path("tabletop"), str(tmp_path / "tabletop")):
        assert foreign.load_policy_parts(path).cfg.model.vocab_size == 1040
    assert remote.local_copy("tabletop") == remote.SHIPPED["tabletop"]  # what training starts from, and the tools
    assert remote.local_copy("./tabletop") == Path("tabletop")
    monkeypatch.setitem(remote.SHIPPED, "tabletop", tmp_path / "none")
    with pytest.raises(
        UserError, match=r"'tabletop' is not in this installation: expected at .*/none.*train\.py.*\./tabletop"
    ):
        foreign.load_policy_parts("tabletop")


def test_what_the_package_offers_is_imported_when_asked_for():
    """Whatever was imported before: a module must not hide the function of its name; and observations need no JAX."""
    code = (
        "import sys; from openpi_ar.policy import observations; assert 'jax' not in sys.modules; "
        "import openpi_ar.policy.checkpoint; from openpi_ar.policy import Policy, Session, load; "
        "assert callable(load) and load.__name__ == 'load' and Policy.__name__ == 'Policy'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
