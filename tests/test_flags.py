"""Broken if this fails: a command does not take a spelling that other launchers taught its users, or answers with a box."""

from pathlib import Path
import re

import pytest

from configs import HELP, PRESETS, get_preset
import infer
from openpi_ar import flags
from openpi_ar.checkpoints.__main__ import convert, inspect
from openpi_ar.config import TrainConfig
from openpi_ar.config_json import flatten
from openpi_ar.errors import UserError
from openpi_ar.training import cli
from openpi_ar.worlds import robot_file

ROOT = Path(__file__).parents[1]


def parse(*words: str) -> cli.Arguments:
    return cli.parse(["--config", "debug", *words], HELP, get_preset)


@pytest.mark.parametrize("name", sorted(flags.booleans(TrainConfig)))
def test_every_boolean_of_a_run_takes_a_value_or_none(name):
    field, (path, _, last) = name.replace("-", "_"), name.rpartition(".")
    off = f"--{path}{'.' if path else ''}no-{last}"
    for words in ([f"--{name}"], [f"--{name}", "True"], [f"--{field}=true"], [f"--{name}=1"], [f"--{name}", "yes"]):
        assert flatten(parse(*words).config)[field] is True
    for words in ([off], [f"--{name}", "False"], [f"--{name}=false"], [f"--{name}", "0"], [f"--{field}=off"]):
        assert flatten(parse(*words).config)[field] is False
    with pytest.raises(UserError, match=rf"is true or false, found 'maybe': write --{name} or {off}"):
        parse(f"--{name}=maybe")


def test_what_to_do_with_a_run_may_be_spelt_as_other_launchers_do():
    assert parse("--resume=true", "--dry_run").resume and parse("--dry_run=True").dry_run
    assert not parse("--resume", "false").resume and not parse("--no-resume").resume
    assert parse("--auto_resume", "1").auto_resume


def test_a_value_of_another_field_is_no_boolean():
    """Negative control: numbers and texts stay what they are."""
    cfg = parse("--seed", "1", "--num_steps=7", "--data.prompt", "true").config
    assert (cfg.seed, cfg.num_steps, cfg.data.prompt) == (1, 7, "true")
    assert flags.spelt_out(["record", "x", "--", "run.py", "--flag_a=~/b"], frozenset()) == [
        *("record", "x", "--", "run.py", "--flag_a=~/b")
    ]


def test_other_commands_take_them_too():
    args = flags.parse(infer.Args, ["--ckpt", "x", "--expert-drives", "False", "--blank_images=1"], "infer")
    assert (args.expert_drives, args.blank_images) == (False, True)


def test_home_is_found_in_every_spelling(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    line = "--ckpt=~/run --images front=~/a.png --json ~/o.json --prompt ~sorry"
    args = flags.parse(infer.Args, line.split(), "infer")
    assert (args.ckpt, args.images, args.json) == ("/home/me/run", ("front=/home/me/a.png",), Path("/home/me/o.json"))
    assert args.prompt == "~sorry"
    data = parse("--data.path=~/demos", "--data.mix=~/more=2", "--checkpoint-dir=~/ck").config
    assert (data.data.path, data.data.mix, data.checkpoint_dir) == (
        "/home/me/demos",
        ("/home/me/more=2",),
        "/home/me/ck",
    )
    call = flags.parse({"convert": convert, "inspect": inspect}, ["inspect", "~/ck"], "checkpoints")
    assert call.func is inspect and call.keywords["source"] == "/home/me/ck"


@pytest.mark.parametrize("line", ["inspekt x", "inspect", "convert a b --to x", "inspect x --no-such-flag 3"])
def test_an_error_is_one_line(line):
    with pytest.raises(UserError) as e:
        flags.parse({"convert": convert, "inspect": inspect}, line.split(), "checkpoints")
    assert "\n" not in str(e.value) and str(e.value).endswith("; see checkpoints --help")


def test_a_worlds_robot_goes_by_its_name():
    cameras = ("--model.cameras", "front", "wrist")
    args = cli.parse(["--config", "debug", *cameras, "--robot", "tabletop"], HELP, get_preset, robot_file=robot_file)
    assert args.config.data.robot.name == "tabletop" and robot_file("arm.yaml") == "arm.yaml"
    with pytest.raises(UserError, match="unknown robot 'tabletop'"):  # the data knows no world
        parse("--robot", "tabletop")


def test_every_command_reads_its_words_here():
    files = [*ROOT.glob("*.py"), *ROOT.glob("openpi_ar/**/*.py"), *ROOT.glob("benchmarks/*.py")]
    own = [str(f.relative_to(ROOT)) for f in files if re.search(r"tyro\.(cli|extras)", f.read_text())]
    assert sorted(own) == ["openpi_ar/flags.py", "openpi_ar/training/cli.py"]
    assert len(PRESETS) > 3
