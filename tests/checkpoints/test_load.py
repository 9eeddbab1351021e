"""If this fails, a public checkpoint no longer loads, or loads as another model than it is."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from openpi_ar.algorithms.prefill import prefill
from openpi_ar.checkpoints.load import load_model
from openpi_ar.checkpoints.options import LoadOptions
from openpi_ar.checkpoints.pi0 import names
from openpi_ar.errors import UserError
from openpi_ar.model_config import TowerConfig
from openpi_ar.models.vit import resample_pos_embedding
from openpi_ar.types import Observation, Tokens
from tests.format_fixtures import GOLDEN, HEADS, LEROBOT, TORCH, assert_equal, damaged, golden, params


def test_one_model_in_three_formats_is_one_model():
    """LeRobot's file and openpi's PyTorch file were written by those libraries from the same weights."""
    a, b = (
        golden(LEROBOT),
        load_model(TORCH, LoadOptions(siglip_heads=4, dtype="float32")),
    )
    assert (a.kind, b.kind) == ("lerobot", "torch")
    assert a.config == b.config
    assert_equal(params(a), params(b))
    assert a.config.expert == TowerConfig(width=32, depth=4, mlp_dim=96, num_heads=8, num_kv_heads=1, head_dim=16)
    assert (a.config.action_horizon, a.config.pi05, a.config.siglip.depth) == (6, False, 3)
    assert any(names.EXPERT_HEAD in note for note in a.notes)
    # As stored if not told otherwise.
    assert params(golden(TORCH))["vlm/blocks/layers/q/w"].dtype == ml_dtypes.bfloat16


def test_training_checkpoints_of_openpi_end_in_value():
    loaded = load_model(GOLDEN / "pi05" / "params")
    assert loaded.kind == "openpi"
    assert loaded.config.action_horizon == 50  # told nowhere beside params/
    assert any("action_horizon 50" in note for note in loaded.notes)
    assert load_model(GOLDEN / "pi05").config.action_horizon == 6
    assert load_model(GOLDEN / "pi05", LoadOptions(action_horizon=9)).config.action_horizon == 9


@pytest.mark.parametrize("kept", ["embed_tokens", "lm_head", "both"])
def test_embedding_under_either_name(tmp_path, kept):
    tensors = load_file(LEROBOT / "model.safetensors")
    for name in list(tensors):
        if kept == "embed_tokens" and name.endswith("paligemma.lm_head.weight"):
            del tensors[name]
        if kept == "lm_head" and name.endswith("embed_tokens.weight"):
            del tensors[name]
        if kept == "both" and name.endswith("paligemma.lm_head.weight"):
            tensors[name] = tensors[name] + 1  # untied by training: the embedding wins
    save_file(tensors, tmp_path / "model.safetensors")
    assert_equal(
        params(load_model(tmp_path, HEADS)),
        params(golden(LEROBOT)),
    )


def test_a_vision_tower_without_its_inner_name(tmp_path):
    """As transformers 5.24 saves it."""
    tensors = load_file(LEROBOT / "model.safetensors")
    save_file({k.replace(".vision_model.", "."): v for k, v in tensors.items()}, tmp_path / "model.safetensors")
    assert_equal(params(load_model(tmp_path, HEADS)), params(golden(LEROBOT)))


def test_shards(tmp_path):
    tensors = load_file(LEROBOT / "model.safetensors")
    half = sorted(tensors)[: len(tensors) // 2]
    parts = {
        "a.safetensors": {k: tensors[k] for k in half},
        "b.safetensors": {k: v for k, v in tensors.items() if k not in half},
    }
    for name, part in parts.items():
        save_file(part, tmp_path / name)
    index = {"weight_map": {k: name for name, part in parts.items() for k in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_equal(
        params(load_model(tmp_path, HEADS)),
        params(golden(LEROBOT)),
    )
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(UserError, match=r"shards that are not beside it: b\.safetensors"):
        load_model(tmp_path)


def test_mixed_types_stay_mixed_and_agree(tmp_path):
    """openpi's PyTorch training keeps norms and projections in float32 and the rest in bfloat16."""
    tensors = load_file(LEROBOT / "model.safetensors")
    mixed = {
        k: v if "norm" in k or k.startswith("model.action") else v.astype(ml_dtypes.bfloat16)
        for k, v in tensors.items()
    }
    save_file(mixed, tmp_path / "model.safetensors")
    loaded = params(load_model(tmp_path, HEADS))
    assert loaded["vlm/blocks/layers/attn_norm/scale"].dtype == np.float32
    assert loaded["vlm/blocks/layers/q/w"].dtype == ml_dtypes.bfloat16
    full = params(load_model(tmp_path, LoadOptions(siglip_heads=4, dtype="float32")))
    assert_equal(full, params(golden(LEROBOT)))  # the values were bfloat16's all along


def test_nan_weights_are_named(tmp_path):
    def spoil(t):
        t["model.action_in_proj.bias"][3] = np.nan

    with pytest.warns(UserWarning, match="action_in_proj/bias holds values that are not finite"):
        load_model(damaged(tmp_path, spoil), HEADS)


def test_position_embedding_is_resampled_as_big_vision_does():
    """Bilinear between corner-aligned patch centres, computed here by hand."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(16 * 16, 3)).astype(np.float32)
    for new in ((27, 27), (8, 20), (16, 16)):
        ours = resample_pos_embedding(table, (16, 16), new).reshape(*new, 3)
        grid = table.reshape(16, 16, 3).astype(np.float64)
        y, x = (np.linspace(0, 15, n) for n in new)
        y0, x0 = np.minimum(y.astype(int), 14), np.minimum(x.astype(int), 14)
        fy, fx = (y - y0)[:, None, None], (x - x0)[None, :, None]
        rows = grid[y0] * (1 - fy) + grid[y0 + 1] * fy
        want = rows[:, x0] * (1 - fx) + rows[:, x0 + 1] * fx
        np.testing.assert_allclose(ours, want, atol=1e-5)
    half_pixel = jax.image.resize(table.reshape(16, 16, 3), (27, 27, 3), "linear")
    assert np.abs(resample_pos_embedding(table, (16, 16), (27, 27)).reshape(27, 27, 3) - half_pixel).max() > 0.05


@pytest.mark.slow
def test_384_pixels_are_27_patches_a_side():
    """Two cameras and 32 tokens: 2 * 729 + 32 = 1490 slots, and what the 6 pixels at the edge show changes nothing."""
    loaded = load_model(
        TORCH, LoadOptions(siglip_heads=4, dtype="float32", image_size=(384, 384), cameras=("base", "wrist"))
    )
    assert loaded.config.siglip.grid == (27, 27)
    images = np.random.default_rng(0).uniform(-1, 1, (1, 2, 384, 384, 3)).astype(np.float32)
    prompt = Tokens.of(np.arange(32)[None])
    obs = Observation(
        images=images, image_mask=np.ones((1, 2), bool), prompt=prompt, state=np.zeros((1, 8), np.float32)
    )
    run = jax.jit(lambda m, o: prefill(m, o)[0].hidden)
    hidden = np.asarray(run(loaded.model, obs))
    assert hidden.shape == (1, 1490, 64)
    assert np.isfinite(hidden).all()
    for edge, changes in ((378, False), (377, True)):
        other = images.copy()
        other[:, :, edge:, :] = 0
        other[:, :, :, edge:] = 0
        assert (
            np.abs(np.asarray(run(loaded.model, dataclasses.replace(obs, images=other))) - hidden).max() > 0
        ) == changes


def test_a_larger_non_square_image_and_five_cameras_run():
    loaded = load_model(GOLDEN / "pi05", LoadOptions(image_size=(96, 160), cameras=tuple("abcde")))
    assert loaded.config.siglip.grid == (6, 10)
    assert any("resampled from (4, 4) to (6, 10)" in note for note in loaded.notes)
    images = np.random.default_rng(0).uniform(-1, 1, (1, 5, 96, 160, 3)).astype(np.float32)
    prompt = Tokens.of(np.arange(8)[None])
    obs = Observation(
        images=images, image_mask=np.ones((1, 5), bool), prompt=prompt, state=np.zeros((1, 8), np.float32)
    )
    out, cache = jax.jit(prefill)(loaded.model, obs)
    assert out.hidden.shape[1] == 5 * 60 + 8
    assert np.isfinite(out.hidden).all()
