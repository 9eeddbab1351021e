"""Broken if this fails: `--resume` continues another run than the one that was saved, or refuses the one that was."""

from pathlib import Path
import shutil

import pytest

from configs import HELP, get_preset
from openpi_ar.data.sources import load_sources
from openpi_ar.errors import UserError
from openpi_ar.training import cli, experiment
from openpi_ar.training.sharding import make_placement
from openpi_ar.training.store import CheckpointStore
from tests.checkpoint_fixtures import random_state
from tests.lerobot_fixtures import GOLDEN, broken, edit_column
import train

ARM = """
cameras: {observation.images.base_0_rgb: base_0_rgb, observation.images.left_wrist_0_rgb: left_wrist_0_rgb}
state: [observation.state]
actions: [action]
delta_mask: [6, -1]
flips: [1, -1]
pi05: {horizon: 4, template: subtask}
"""
MODEL = (
    "--model.cameras base_0_rgb left_wrist_0_rgb --model.state-dim 8 --model.action-dim 8 --text.max-prompt-tokens 200"
)
FIRST = f"{MODEL} --text.max-target-tokens 40 --num-steps 9 --save-every 3 --data.frames decode --data.prompt-swap 0"


@pytest.fixture
def demos(tmp_path, monkeypatch) -> Path:
    """A dataset in the working directory."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(GOLDEN / "v21_images", tmp_path / "demos"))


def parse(line: str) -> cli.Arguments:
    return cli.parse(["--config", "debug", *line.split()], HELP, get_preset, experiment.saved_config)


def start(line: str) -> Path:
    """The checkpoint that a run of these flags leaves at step 6, without the run."""
    cfg = parse(line).config
    data = train.make_data(cfg, make_placement(cfg), None)
    writer = CheckpointStore(experiment.experiment_dir(cfg), keep_last=1)
    writer.save(random_state(cfg, 6), 6, data.assets)
    writer.close()
    return experiment.experiment_dir(cfg) / "6"


def resume(line: str) -> cli.Arguments:
    """What goes on, if the run of these flags may. Raises UserError if it may not."""
    args = parse(f"{line} --resume")
    step_dir = experiment.plan(args.config, resume=True, overwrite=False)
    train.make_data(args.config, make_placement(args.config), step_dir)
    return args


def test_what_is_not_given_is_as_it_was_saved(demos):
    saved = start(f"{FIRST} --data.path demos --seed 3 --optimizer.peak-lr 1e-3 --exp-name a")
    cfg = resume("--exp-name a").config
    assert cfg == experiment.saved_config(cfg)
    assert (cfg.num_steps, cfg.seed, cfg.save_every, cfg.data.path) == (9, 3, 3, "demos")
    more = resume("--exp-name a --num-steps 20").config
    assert (more.num_steps, more.optimizer.peak_lr) == (20, 1e-3)
    assert experiment.describe_resumed(more, saved).endswith("with its config, but for num_steps (9 saved, 20 given)")
    with pytest.raises(UserError, match=r"another config: seed \(3 saved, 4 given\); use the saved values"):
        resume("--exp-name a --seed 4")
    # Negative control: without --resume the preset's values hold.
    assert parse("--exp-name a").config.num_steps == get_preset("debug").num_steps
    assert parse("--exp-name a --auto-resume").config.num_steps == 9
    assert parse("--exp-name b --auto-resume").config.num_steps == get_preset("debug").num_steps


def test_a_run_that_was_moved_resumes_where_it_is(demos, tmp_path):
    start(f"{FIRST} --data.path demos")
    shutil.move(tmp_path / "checkpoints/debug/default", tmp_path / "elsewhere/debug/b")
    cfg = resume("--checkpoint-dir elsewhere --exp-name b").config
    assert (cfg.checkpoint_dir, cfg.exp_name) == ("elsewhere", "b")


def test_the_same_frames_are_the_same_data_wherever_they_are(demos, tmp_path):
    start(f"{FIRST} --data.path demos --data.mix demos/=2")
    resume("--data.path demos/")
    resume(f"--data.path {demos} --data.mix {demos}=2")
    demos.rename(tmp_path / "moved")
    resume("--data.path moved --data.mix moved=2")
    with pytest.raises(UserError, match=r"data.mix \(\('demos/=2',\) saved, \('moved=3',\) given\)"):
        resume("--data.path moved --data.mix moved=3")
    with pytest.raises(UserError, match=r"demos is not a directory"):
        resume("")


def test_other_frames_are_other_data(demos, tmp_path):
    start(f"{FIRST} --data.path demos")
    (other,) = [broken(tmp_path / "more", "v21_images")]
    edit_column(next(other.glob("data/*/*.parquet")), "action", lambda rows: rows[3].__setitem__(0, 0.123))
    with pytest.raises(UserError, match="more/v21_images holds other frames than this run was trained on"):
        resume(f"--data.path {other}")
    resume(f"--data.path {GOLDEN / 'v21_images'}")  # control


@pytest.mark.parametrize("again", ["", "--robot arm.yaml"])
def test_a_run_with_a_robot_resumes_with_and_without_naming_it(demos, tmp_path, again):
    (tmp_path / "arm.yaml").write_text(ARM)
    start(f"{FIRST} --data.path demos --robot arm.yaml")
    cfg = resume(again).config
    assert cfg.data.robot.delta_mask == (6, -1)
    assert experiment.describe_resumed(cfg, Path("6")) == "resuming 6 with its config"
    (tmp_path / "arm.yaml").write_text(ARM.replace("-1]\npi05", "1]\npi05"))
    with pytest.raises(UserError, match=r"data.robot.flips \(\(1, -1\) saved, \(1, 1\) given\)"):
        resume("--robot arm.yaml")


def test_the_checkpoint_says_what_the_dataset_calls_its_actions(demos):
    start(f"{FIRST} --data.path demos")
    data = load_sources(parse(f"{FIRST} --data.path demos").config)[0]
    cfg = experiment.saved_config(parse("").config)
    assert cfg is not None and cfg.inference.robot is not None
    assert cfg.inference.robot.action_names == tuple(data.layout.actions) and len(data.layout.actions) == 7
