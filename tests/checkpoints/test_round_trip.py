"""If this fails, a conversion loses what a policy needs besides its parameters without a word, in some pair of formats."""

import dataclasses
import json
from pathlib import Path
import shutil

import numpy as np
import pytest

from openpi_ar import config_json
from openpi_ar.checkpoints import __main__ as cli
from openpi_ar.checkpoints import store
from openpi_ar.config import InferenceConfig
from openpi_ar.policy import checkpoint as policies
from openpi_ar.text.tokenizer import load_tokenizer
from openpi_ar.worlds import robot_file
from tests.format_fixtures import GOLDEN, assert_equal, params

# Every ordered pair of the four formats.
CHAIN = (
    "torch",
    "ours",
    "lerobot",
    "ours",
    "openpi",
    "torch",
    "lerobot",
    "torch",
    "openpi",
    "lerobot",
    "openpi",
    "ours",
)


def said_by(capsys) -> str:
    return " ".join(capsys.readouterr().out.split())


def assert_same_policy(path: Path, want: policies.PolicyParts) -> None:
    got = policies.load_policy_parts(path)
    assert got.cfg == want.cfg
    assert got.tokenizer.model_bytes == want.tokenizer.model_bytes
    for name, stats in want.stats.items():
        for a, b in zip(dataclasses.astuple(stats), dataclasses.astuple(got.stats[name]), strict=True):
            np.testing.assert_array_equal(a, b)
    assert_equal(params(got), params(want))


def test_every_pair_of_formats_is_the_same_policy(tiny_checkpoint, tmp_path, capsys):
    source = Path(shutil.copytree(tiny_checkpoint, tmp_path / "source"))
    (source / "0" / "assets" / store.SUBTASKS).write_text('["done", "pick up the red block"]')
    want = policies.load_policy_parts(source)
    assert want.cfg.text.template == "subtask" and want.cfg.model.cameras == ("front", "wrist")
    assert want.cfg.subtasks == ("done", "pick up the red block")
    for i, to in enumerate(CHAIN):
        target = tmp_path / f"{i}_{to}"
        cli.main(["convert", str(source), str(target), "--to", to])
        notes = said_by(capsys)
        if to == "lerobot":
            assert "LeRobot has no place for template subtask, tokenizer embedded" in notes
        elif to != "ours":
            assert "are in assets/config.json" in notes
        assert_same_policy(target, want)
        source = target
    assert config_json.read(source / "assets" / "config.json") == config_json.read(
        tiny_checkpoint / "0/assets/config.json"
    )


@pytest.mark.parametrize("robot", [robot_file("tabletop"), None])
def test_a_converted_policy_is_that_policy_with_a_robot_too(tiny_checkpoint, tmp_path, robot):
    cli.main(["convert", str(tiny_checkpoint), str(tmp_path / "torch"), "--to", "torch"])
    want, got = (policies.load_policy_parts(path, robot) for path in (tiny_checkpoint, tmp_path / "torch"))
    assert got.cfg == want.cfg and got.tokenizer.model_bytes == want.tokenizer.model_bytes
    (tmp_path / "torch" / "assets" / "tokenizer.model").unlink()
    assert any(
        "tokenizer embedded: none lies beside" in n for n in policies.load_policy_parts(tmp_path / "torch", robot).notes
    )


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_what_no_file_says_is_printed_and_left_to_the_robot(tmp_path, capsys, monkeypatch, kind):
    """A checkpoint of openpi's says no prompt: what is written is no more than a default."""
    monkeypatch.setattr(policies, "load_tokenizer", lambda name: load_tokenizer("embedded"))
    shutil.copytree(GOLDEN / kind / "params", tmp_path / "openpi" / "params")
    (tmp_path / "openpi" / "assets" / "physical-intelligence" / "libero").mkdir(parents=True)
    numbers = {name: [float(i) for i in range(8)] for name in ("mean", "std", "q01", "q99")}
    body = json.dumps({"norm_stats": {"state": numbers, "actions": numbers}})
    (tmp_path / "openpi" / "assets" / "physical-intelligence" / "libero" / "norm_stats.json").write_text(body)
    source = tmp_path / "openpi"
    want = policies.load_policy_parts(source, "libero")
    for to in ("lerobot", "ours", "torch", "openpi"):
        cli.main(["convert", str(source), str(tmp_path / f"to_{to}"), "--to", to, "--action-horizon", str(want.cfg.model.action_horizon)])  # fmt: skip
        notes, source = said_by(capsys), tmp_path / f"to_{to}"
        template = {"pi0": "openpi_pi0", "pi05": "openpi"}[kind]
        assert f"template {template}, max_prompt_tokens" in notes and "no file says them" in notes
        cfg = config_json.read(source / "assets" / "config.json")
        assert isinstance(cfg, InferenceConfig) and cfg.robot is None
        got = policies.load_policy_parts(source, "libero")
        assert (got.cfg.text, got.cfg.robot, got.cfg.model) == (want.cfg.text, want.cfg.robot, want.cfg.model)
    assert "cameras base_0_rgb, left_wrist_0_rgb, right_wrist_0_rgb: no file names them" in " ".join(want.notes)
    assert f"action_horizon {want.cfg.model.action_horizon}: no file tells it" in " ".join(want.notes)


def test_cameras_and_horizon_that_were_given_survive(tmp_path):
    given = ["--cameras", "a", "b", "--action-horizon", "3"]
    cli.main(["convert", str(GOLDEN / "pi05"), str(tmp_path / "torch"), "--to", "torch", *given])
    cli.main(["convert", str(tmp_path / "torch"), str(tmp_path / "openpi"), "--to", "openpi"])
    cli.main(["convert", str(tmp_path / "openpi"), str(tmp_path / "ours"), "--to", "ours"])
    model = config_json.read(tmp_path / "ours" / "assets" / store.CONFIG).model
    assert (model.cameras, model.action_horizon, model.exact_time) == (("a", "b"), 3, False)
