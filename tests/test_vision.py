"""If this fails, the vision tower no longer learns where things are before imitation starts."""

import dataclasses

from flax import nnx
import jax
import numpy as np

from configs.debug import DEBUG
from openpi_ar.data.tabletop import load_tabletop
from openpi_ar.models.pi0 import Pi0
from openpi_ar.training.vision import pose_targets, pretrain_vision


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


def test_error_falls_and_only_the_vision_tower_changes(tmp_path):
    data = dataclasses.replace(DEBUG.data, episodes=4, cache_dir=str(tmp_path))
    train, _ = load_tabletop(data, DEBUG.model.action_horizon, DEBUG.model.cameras)
    model = jax.jit(lambda: Pi0(DEBUG.model, rngs=nnx.Rngs(0)))()
    _, start = pretrain_vision(model, train, steps=2, batch_size=16)
    trained, error = pretrain_vision(model, train, steps=120, batch_size=16, peak_lr=3e-3)
    assert error < 0.8 * start  # mean over the last 100 of the 120 steps, in centimetres
    same = jax.tree.map(lambda a, b: bool((a == b).all()), model, trained)
    assert all(jax.tree.leaves((same.vlm, same.expert, same.embedder)))
    assert not any(jax.tree.leaves((same.img.patch_kernel, same.img.head.kernel)))
