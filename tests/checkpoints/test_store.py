"""Broken if this fails: a checkpoint does not give back what was saved, or a broken one is taken for a whole one."""

import dataclasses
from pathlib import Path
import shutil

import jax
import numpy as np
import pytest

from configs import get_preset
from openpi_ar.checkpoints import store
from openpi_ar.config import TrainConfig
from openpi_ar.errors import UserError
from openpi_ar.text.tokenizer import load_tokenizer
from openpi_ar.training.optimizer import make_optimizer
from openpi_ar.training.state import TrainState, init_state
from tests.conftest import tabletop_stats

CFG = get_preset("debug")
NO_EMA = dataclasses.replace(CFG, optimizer=dataclasses.replace(CFG.optimizer, ema_decay=None))


def abstract(cfg: TrainConfig) -> TrainState:
    return jax.eval_shape(lambda: init_state(cfg, make_optimizer(cfg.optimizer, cfg.num_steps)))


def random_state(cfg: TrainConfig, step: int) -> TrainState:
    """Every leaf different, as none is by chance."""
    rng = np.random.default_rng(step)
    state = jax.tree.map(lambda a: jax.numpy.asarray(rng.normal(size=a.shape), a.dtype), abstract(cfg))
    return state._replace(step=jax.numpy.asarray(step, "int32"))


def assets(cfg: TrainConfig) -> store.Assets:
    return store.Assets(cfg, load_tokenizer("embedded"), tabletop_stats())


def save(directory: Path, cfg: TrainConfig, *steps: int, keep_last: int = 9) -> list[TrainState]:
    writer = store.CheckpointStore(directory, keep_last=keep_last)
    states = [random_state(cfg, step) for step in steps]
    for state in states:
        writer.save(state, 10 * int(state.step), assets(cfg))
    writer.close()
    return states


def assert_same(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


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


@pytest.mark.parametrize("cfg", [CFG, NO_EMA], ids=["ema", "no ema"])
def test_train_state_comes_back_to_the_bit(tmp_path, cfg):
    (saved,) = save(tmp_path, cfg, 7)
    restored, position = store.restore_train_state(tmp_path / "7", abstract(cfg))
    assert_same(restored, saved)
    assert position == 70
    # Negative control: the comparison sees one changed number.
    with pytest.raises(AssertionError):
        assert_same(restored._replace(step=restored.step + 1), saved)


def test_policy_gets_the_average_and_the_assets(experiment):
    directory, (_, newest) = experiment
    cfg, model, tokenizer, stats = store.load_policy_checkpoint(directory)
    assert_same(model, newest.ema)
    assert not np.array_equal(model.action_in.kernel[...], newest.model.action_in.kernel[...])
    assert cfg == CFG
    assert tokenizer.model_bytes == load_tokenizer("embedded").model_bytes
    np.testing.assert_array_equal(stats["actions"].q99, tabletop_stats()["actions"].q99)


def test_a_step_or_an_experiment_may_be_given(experiment):
    directory, (first, newest) = experiment
    assert_same(store.load_policy_checkpoint(str(directory / "2"))[1], first.ema)
    assert_same(store.load_policy_checkpoint(str(directory))[1], newest.ema)


def test_params_are_one_pure_dict_under_params(experiment):
    metadata = store.ocp.PyTreeCheckpointer().metadata(experiment[0] / "5" / "params").item_metadata
    assert list(metadata.tree) == ["params"]
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(metadata.tree["params"])]
    assert not any("value" in path for path in paths)
    assert any(path.startswith("['vlm']") for path in paths)


def test_only_the_last_ones_are_kept(tmp_path):
    save(tmp_path, CFG, 1, 2, 3, 4, keep_last=1)
    assert store.complete_steps(tmp_path) == [3, 4]
    assert store.latest_step(tmp_path / "nowhere") is None


@pytest.mark.parametrize("part", ["assets/config.json", "assets/tokenizer.model", "assets/norm_stats.json"])
def test_half_written_step_is_not_the_latest_and_is_named(copy, part):
    (copy / "5" / part).unlink()
    assert store.latest_step(copy) == 2
    with pytest.raises(UserError, match=f"5 is not a complete checkpoint: {part} missing"):
        store.load_policy_checkpoint(copy / "5")
    shutil.rmtree(copy / "2")
    with pytest.raises(UserError, match=f"holds no complete checkpoint: 5 lacks {part}"):
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
    config.write_text(config.read_text().replace('"action_dim": 4', '"action_dim": 6').replace("true", "false", 1))
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


def test_policy_only_checkpoint_cannot_be_resumed(copy):
    shutil.rmtree(copy / "5" / "train_state")
    store.load_policy_checkpoint(copy / "5")
    with pytest.raises(UserError, match="holds no train_state"):
        store.restore_train_state(copy / "5", abstract(CFG))
