"""Broken if this fails: the vision tower no longer learns where things are before imitation, nor tower 1 what a text names."""

import dataclasses
from pathlib import Path
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import PRESETS
from configs.debug import DEBUG
from configs.pi05_subtask import TABLETOP_FROM_NOTHING
from openpi_ar.algorithms.prefill import prefill
from openpi_ar.checkpoints import remote, store
from openpi_ar.config import LeRobotData, TrainConfig
from openpi_ar.data.inputs import InputTransform, collate
from openpi_ar.data.sources import load_sources
from openpi_ar.errors import UserError
from openpi_ar.models import family
from openpi_ar.models.vlm import VLA
from openpi_ar.policy import Policy
from openpi_ar.text.tokenizer import load_tokenizer
from openpi_ar.training.initial import load_initial
from openpi_ar.training.state import init_model
from openpi_ar.types import Observation
from openpi_ar.worlds import datasets
from openpi_ar.worlds.tabletop.__main__ import Pretrain
from openpi_ar.worlds.tabletop.poses import PosedFrames, posed
from openpi_ar.worlds.tabletop.pretrain import pretrain, save
from openpi_ar.worlds.tabletop.pretrain_naming import PlaceReadout, naming_loss, naming_texts, pretrain_naming
from openpi_ar.worlds.tabletop.pretrain_vision import pose_targets, pretrain_vision
from openpi_ar.worlds.tabletop.record import record_episode
from openpi_ar.worlds.tabletop.world import Tabletop
from tests.lerobot_fixtures import GOLDEN

ALL_GOLDEN = ("front=base_0_rgb", "wrist=left_wrist_0_rgb")


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """On four episodes of the tabletop."""
    cache = str(tmp_path_factory.mktemp("cache"))
    data = LeRobotData("world://tabletop?episodes=4&image_size=32x32", cache_dir=cache)
    return dataclasses.replace(DEBUG, data=data)


@pytest.fixture(scope="module")
def setting(cfg: TrainConfig) -> tuple[VLA, PosedFrames, InputTransform]:
    train, *_ = load_sources(cfg, datasets.local)
    transform = InputTransform.for_training(DEBUG, load_tokenizer(DEBUG.text.tokenizer), train.norm_stats())
    return jax.jit(lambda: family.create(DEBUG.model, rngs=nnx.Rngs(0)))(), posed(train), transform


def test_targets_are_what_each_camera_can_know():
    """The wrist camera sees only what is near the tool, and knows it relative to the tool."""
    nothing = [np.nan] * 3
    blocks = np.array([[[0.1, 0.0, 0.02], [-0.1, 0.0, 0.02], nothing]])
    tool = np.array([[0.08, 0.02, 0.12]])
    at, seen = pose_targets(blocks, tool, ("front", "wrist"))
    assert seen.tolist() == [[[True, True, False, True], [True, False, False, False]]]
    np.testing.assert_allclose(at[0, 0, 0], [1.0, 0.0, 0.2], atol=1e-6)
    np.testing.assert_allclose(at[0, 0, 3], tool[0] / 0.1, atol=1e-6)
    np.testing.assert_allclose(at[0, 1, 0], [0.2, -0.2, -1.0], atol=1e-6)


@pytest.mark.slow
def test_error_falls_and_only_the_vision_tower_changes(setting):
    model, train, _ = setting
    _, start = pretrain_vision(model, train, steps=2, batch_size=16)
    trained, error = pretrain_vision(model, train, steps=120, batch_size=16, peak_lr=3e-3)
    assert error < 0.8 * start  # mean over the last 100 of the 120 steps, in centimetres
    same = jax.tree.map(lambda a, b: bool((a == b).all()), model, trained)
    assert all(jax.tree.leaves((same.vlm, same.expert, same.embedder)))
    assert not any(jax.tree.leaves((same.img.patch_kernel, same.img.head.kernel)))


def test_loss_reads_what_the_text_alone_would_write(setting):
    """The texts run side by side; each one's values are those of a prefill with that text only, and absent blocks do not
    count."""
    model, frames, transform = setting
    texts = naming_texts(transform)
    obs = collate([transform.observation(frames.source[i]) for i in (0, 40, 90)])
    assert isinstance(obs, Observation)
    readout = PlaceReadout(1, 8, rngs=nnx.Rngs(1))
    rng = np.random.default_rng(0)
    places, present = rng.normal(size=(3, 5, 3)).astype(np.float32), rng.random((3, 5)) < 0.6
    parts: Any = (model.img, model.embedder, model.vlm, readout)
    got, centimetres = jax.jit(lambda p, *a: naming_loss(p, model, texts, *a))(parts, obs, places, present)

    values = jax.jit(lambda m, o, t: jnp.asarray(prefill(m, o, t)[1].v[1]))
    errors = []
    for k, ids in enumerate(np.asarray(texts.ids)):
        one = jax.tree.map(lambda x, k=k: np.repeat(np.asarray(x)[k : k + 1], 3, 0), texts)
        v = values(model, obs, one)
        last = v.shape[1] - len(ids) + int((one.valid & ~one.hidden)[0].sum()) - 1
        found = np.asarray(v)[:, last].reshape(3, -1) @ np.asarray(readout.kernel[...])[0]
        errors.append(np.abs(found - places[:, k]).mean(-1))
    want = (np.stack(errors, 1) * present).sum() / present.sum()
    # Float32 sums in another order.
    np.testing.assert_allclose(got, want, rtol=2e-6)
    np.testing.assert_allclose(centimetres, 10 * want, rtol=2e-6)
    swapped = dataclasses.replace(texts, ids=np.roll(np.asarray(texts.ids), 1, 0))
    other, _ = jax.jit(lambda p, *a: naming_loss(p, model, swapped, *a))(parts, obs, places, present)
    assert abs(float(other) - want) > 1e-4  # the words are read


@pytest.mark.slow
def test_error_falls_and_the_action_tower_stays(setting):
    model, frames, transform = setting
    trained, error = pretrain_naming(model, frames, transform, steps=150, batch_size=16, peak_lr=1e-2, quiet=True)
    # Mean over all steps; zeros for answers would be off by the mean itself.
    assert error < 0.8 * 100 * np.nanmean(np.abs(frames.blocks))
    same = jax.tree.map(lambda a, b: bool((a == b).all()), model, trained)
    assert all(jax.tree.leaves((same.expert, same.action_in, same.action_out)))
    assert not any(jax.tree.leaves((same.img.patch_kernel, same.vlm.blocks.layers.q)))


def test_blocks_are_where_the_world_had_them(cfg, setting):
    """Read back from the dataset, row by row, against the recording itself."""
    frames = setting[1]
    world, done = Tabletop((32, 32)), 0
    for i in range(4):
        episode = record_episode(world, (0, i), 1.0)
        rows = [frames.source.table.frames.where(int(r)) for r in frames.source.rows]
        mine = [k for k, where in enumerate(rows) if f"episode {i}," in where]
        if not mine:
            continue  # held out
        images, blocks, tool = frames.poses(np.array(mine), ("wrist", "front"))
        np.testing.assert_array_equal(blocks, episode.blocks)
        np.testing.assert_array_equal(tool, episode.state[:, :3])
        np.testing.assert_array_equal(images, episode.images[:, ::-1])
        done += 1
    assert done == 3


@pytest.mark.slow
def test_the_recipe_ends_in_a_checkpoint_to_start_from(cfg, tmp_path):
    found = pretrain(cfg, vision_steps=2, naming_steps=1, quiet=True)
    assert set(found.errors) == {"vision", "naming"} and all(e > 0 for e in found.errors.values())
    step = save(found, tmp_path / "out", 3)
    model, _ = load_initial(dataclasses.replace(cfg, init_from=str(tmp_path / "out")))
    jax.tree.map(np.testing.assert_array_equal, model, found.model)
    fresh = jax.jit(lambda: init_model(cfg))()
    assert not np.array_equal(model.img.patch_kernel, fresh.img.patch_kernel)
    assert step.name == "3" and Policy.from_checkpoint(step).cfg == cfg.inference


@pytest.mark.parametrize(
    ("fields", "steps", "words"),
    [
        ({}, (0, 0), "steps must be 0 or more and not all 0"),
        ({}, (-1, 3), "steps must be 0 or more"),
        ({"text": dataclasses.replace(DEBUG.text, template="openpi")}, (0, 1), "no subtask that could name a block"),
        ({"data": LeRobotData(str(GOLDEN / "v30_video"), cameras=ALL_GOLDEN)}, (1, 0), "no feature 'observation.env"),
    ],
)
def test_what_cannot_be_learned_is_said(cfg, fields, steps, words):
    changed = dataclasses.replace(cfg, **fields)
    with pytest.raises(UserError, match=words):
        pretrain(changed, vision_steps=steps[0], naming_steps=steps[1], quiet=True)


def test_the_commands_model_is_the_presets():
    """Otherwise what it writes would not fit `train.py --config pi05_subtask_tabletop --init-from`."""
    shipped = store.load_assets(store.resolve_step_dir(remote.shipped(Pretrain(Path()).like))).config
    for name in ("pi05_subtask_tabletop", "pi05_tabletop"):
        assert PRESETS[name].model == shipped.model
    assert PRESETS[shipped.name].text == shipped.text
    assert TABLETOP_FROM_NOTHING.data.path == Pretrain(Path()).data
