"""If this fails, a checkpoint does not give a policy what was saved, or a broken one is taken for a whole one."""

import dataclasses
from pathlib import Path
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from openpi_ar.checkpoints import store
from openpi_ar.errors import UserError
from openpi_ar.text.tokenizer import load_tokenizer
from openpi_ar.training.state import TrainState
from openpi_ar.training.store import CheckpointStore
from tests.checkpoint_fixtures import CFG, assert_same, assets, random_state, save, tabletop_stats


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> tuple[Path, list[TrainState]]:
    """Steps 2 and 5."""
    directory = tmp_path_factory.mktemp("whole")
    return directory, save(directory, CFG, 2, 5)


@pytest.fixture
def copy(experiment, tmp_path) -> Path:
    """A copy of it to break."""
    return Path(shutil.copytree(experiment[0], tmp_path / "copy"))


def test_openpis_layout(experiment):
    directory, _ = experiment
    for part in ("params/_METADATA", "train_state/_METADATA", "assets/config.json", "assets/norm_stats.json"):
        assert (directory / "5" / part).is_file()
    assert (directory / "5" / "assets" / "tokenizer.model").read_bytes() == load_tokenizer("embedded").model_bytes


def test_policy_gets_the_average_and_the_assets(experiment):
    directory, (_, newest) = experiment
    cfg, model, tokenizer, stats = store.load_policy_checkpoint(directory)
    assert_same(model, newest.ema)
    assert not np.array_equal(model.action_in.kernel[...], newest.model.action_in.kernel[...])
    assert cfg == CFG.inference
    assert tokenizer.model_bytes == load_tokenizer("embedded").model_bytes
    np.testing.assert_array_equal(stats["actions"].q99, tabletop_stats()["actions"].q99)


def test_subtasks_of_the_training_data_travel_with_the_checkpoint(tmp_path):
    texts = ("pick up the red block", "über den Tisch")
    writer = CheckpointStore(tmp_path, keep_last=1)
    state = random_state(CFG, 1)
    writer.save(state, 10, dataclasses.replace(assets(CFG), subtasks=texts))
    writer.close()
    cfg, *_ = store.load_policy_checkpoint(tmp_path)
    assert cfg.subtasks == texts
    file = store.resolve_step_dir(tmp_path) / "assets" / store.SUBTASKS
    for content, words in (('{"a": 1}', "must hold a list of texts"), ("[1]", "list of texts"), ("[", "not JSON")):
        file.write_text(content)
        with pytest.raises(UserError, match=words):
            store.load_policy_checkpoint(tmp_path)
    file.unlink()  # as earlier versions wrote them
    assert store.load_policy_checkpoint(tmp_path)[0].subtasks == ()


def test_a_step_or_an_experiment_may_be_given(experiment):
    directory, (first, newest) = experiment
    assert_same(store.load_policy_checkpoint(str(directory / "2"))[1], first.ema)
    assert_same(store.load_policy_checkpoint(str(directory))[1], newest.ema)


def test_params_are_one_pure_dict_under_params(experiment):
    metadata = ocp.PyTreeCheckpointer().metadata(experiment[0] / "5" / "params").item_metadata
    assert list(metadata.tree) == ["params"]
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(metadata.tree["params"])]
    assert not any("value" in path for path in paths)
    assert any(path.startswith("['vlm']") for path in paths)


@pytest.mark.parametrize("part", ["assets/config.json", "assets/tokenizer.model", "assets/norm_stats.json"])
def test_half_written_step_is_not_the_latest_and_is_named(copy, part):
    (copy / "5" / part).unlink()
    assert store.latest_step(copy) == 2
    with pytest.raises(UserError, match=f"5 is not a complete checkpoint: {part} missing"):
        store.load_policy_checkpoint(copy / "5")
    shutil.rmtree(copy / "2")
    with pytest.raises(UserError, match=f"5 is not a complete checkpoint: {part} missing"):
        store.load_policy_checkpoint(copy)


def test_unfinished_write_is_never_seen(copy):
    (copy / "5").rename(copy / "5.orbax-checkpoint-tmp")
    assert store.latest_step(copy) == 2


def test_missing_parameters_are_named(copy):
    shutil.rmtree(copy / "5" / "params")
    with pytest.raises(UserError, match="params/_METADATA missing"):
        store.load_policy_checkpoint(copy / "5")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # orbax's threads outlive its error
def test_damaged_parameters_are_an_error_of_one_file(copy):
    for file in (copy / "5" / "params").rglob("*"):
        if file.is_file() and file.name != "_METADATA":
            file.write_bytes(b"")
    with pytest.raises(UserError, match="params cannot be read"):
        store.load_policy_checkpoint(copy / "5")


def test_foreign_or_absent_directory_is_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        store.load_policy_checkpoint(tmp_path / "absent")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"not a complete checkpoint: _CHECKPOINT_METADATA, params/_METADATA"):
        store.load_policy_checkpoint(tmp_path)


def test_every_parameter_that_does_not_fit_is_listed(copy):
    config = copy / "5" / "assets" / "config.json"
    config.write_text(
        config.read_text().replace('"action_dim": 4', '"action_dim": 6').replace('"pi05": true', '"pi05": false')
    )
    with pytest.raises(UserError) as error:
        store.load_policy_checkpoint(copy / "5")
    text = str(error.value)
    for words in (
        "params/action_in/kernel: expected [6, 16], found [4, 16]",
        "state_in/kernel: missing",
        "time_mlp_in/kernel: unknown",
    ):
        assert words in text


def test_statistics_of_the_other_mode_are_refused(copy):
    path = copy / "5" / "assets" / "norm_stats.json"
    path.write_text(path.read_text().replace('"quantile"', '"z_score"'))
    with pytest.raises(UserError, match=r"norm_stats.json.* mode z_score, but pi0.5 is trained with quantile"):
        store.load_policy_checkpoint(copy / "5")
