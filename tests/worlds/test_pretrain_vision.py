"""If this fails, the vision tower no longer learns where things are before imitation starts, nor tower 1 what a text names."""

import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.debug import DEBUG
from openpi_ar.algorithms.prefill import prefill
from openpi_ar.data.inputs import InputTransform, collate
from openpi_ar.models import family
from openpi_ar.models.vlm import VLA
from openpi_ar.text.tokenizer import load_tokenizer
from openpi_ar.types import Observation
from openpi_ar.worlds.tabletop.pretrain_naming import PlaceReadout, naming_loss, naming_texts, pretrain_naming
from openpi_ar.worlds.tabletop.pretrain_vision import pose_targets, pretrain_vision
from openpi_ar.worlds.tabletop.source import TabletopSource, load_tabletop


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> tuple[VLA, TabletopSource, InputTransform]:
    data = dataclasses.replace(DEBUG.data, episodes=4, cache_dir=str(tmp_path_factory.mktemp("demos")))
    train, _ = load_tabletop(data, DEBUG.model.action_horizon, DEBUG.model.cameras)
    transform = InputTransform(DEBUG, load_tokenizer(DEBUG.text.tokenizer), train.norm_stats())
    return jax.jit(lambda: family.create(DEBUG.model, rngs=nnx.Rngs(0)))(), train, transform


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
    model, source, transform = setting
    texts = naming_texts(source, transform)
    obs = collate([transform.observation(source[i]) for i in (0, 40, 90)])
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
    model, source, transform = setting
    trained, error = pretrain_naming(model, source, transform, steps=60, batch_size=16, peak_lr=1e-2, quiet=True)
    places = source.poses(np.arange(len(source)), DEBUG.model.cameras)[1]
    # Mean over all steps; zeros for answers would be off by the mean itself.
    assert error < 0.8 * 100 * np.nanmean(np.abs(places))
    same = jax.tree.map(lambda a, b: bool((a == b).all()), model, trained)
    assert all(jax.tree.leaves((same.expert, same.action_in, same.action_out)))
    assert not any(jax.tree.leaves((same.img.patch_kernel, same.vlm.blocks.layers.q)))
