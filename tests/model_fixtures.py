"""Tiny random models and ragged observations, shared by the model and algorithm tests."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from openpi_ar.algorithms import act as acting
from openpi_ar.algorithms import flow, losses
from openpi_ar.algorithms import generate as generating
from openpi_ar.algorithms import prefill as prefilling
from openpi_ar.algorithms.sampling import Sampling
from openpi_ar.model_config import ModelConfig, TowerConfig, VitConfig
from openpi_ar.models import family
from openpi_ar.models.pi0 import Pi0
from openpi_ar.types import Batch, Kind, Observation, Tokens

VOCAB, EOS = 64, 1

# Jitted once for all tests: equal shapes share one compilation.
prefill = jax.jit(prefilling.prefill)
generate = jax.jit(generating.generate)
velocity = jax.jit(flow.velocity)
denoise = jax.jit(flow.denoise, static_argnames=("num_steps", "guide"))
act = jax.jit(acting.act, static_argnames=("num_steps",))
compute_loss = jax.jit(losses.compute_loss, static_argnames=("cfg",))
flow_loss = jax.jit(losses.flow_loss, static_argnames=("draws",))
text_loss = jax.jit(losses.text_loss)


def tiny_config(**changes) -> ModelConfig:
    fields = {
        "siglip": VitConfig(width=24, depth=2, mlp_dim=40, num_heads=2, patch_size=8, image_size=(16, 24)),
        "vlm": TowerConfig(width=32, depth=3, mlp_dim=48, num_heads=4, num_kv_heads=2, head_dim=8),
        "expert": TowerConfig(width=20, depth=3, mlp_dim=28, num_heads=4, num_kv_heads=2, head_dim=8),
        "vocab_size": VOCAB,
        "cameras": ("front", "wrist"),
        "state_dim": 3,
        "action_dim": 5,
        "action_horizon": 4,
        "dtype": "float32",
        "remat": False,
    }
    return ModelConfig(**{**fields, **changes})


def random_like(abstract: Any, scale: float, seed: int = 0) -> Any:
    """A tree of these shapes and dtypes, normal of deviation `scale`. Filled on the host: initialising for real, op by op,
    compiles two hundred small programs, and as one program a large one."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(scale * rng.standard_normal(a.shape), a.dtype), abstract)


def tiny_model(cfg: ModelConfig | None = None, seed: int = 0) -> Pi0:
    """A model whose every parameter is random: norms, gates and biases too, so that nothing is hidden by a zero."""
    model = random_like(family.abstract(cfg or tiny_config()), 0.25, seed)
    for norm in (model.img.norm, model.img.blocks.layers.norm1, model.img.blocks.layers.norm2):
        norm.scale[...] += 1.0  # LayerNorm's scale is stored whole, RMSNorm's without its 1
    return model


def greedy(max_new_tokens: int, **changes) -> Sampling:
    return Sampling(eos_id=EOS, max_new_tokens=max_new_tokens, **changes)


def noise_for(cfg: ModelConfig, seed: int = 0, batch: int = 3) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (batch, cfg.action_horizon, cfg.action_dim))


def text_run(ids: np.ndarray, lengths: list[int], causal: bool, hidden: np.ndarray | None = None) -> Tokens:
    valid = np.arange(ids.shape[1])[None] < np.asarray(lengths)[:, None]
    kind = Kind.SUBTASK if causal else Kind.PROMPT
    hidden = np.zeros(ids.shape, bool) if hidden is None else hidden
    return Tokens.of(ids * valid, valid, kind=kind, causal=causal, loss=causal, hidden=hidden)


def ragged_observation(cfg: ModelConfig, seed: int = 0, batch: int = 3, prompt: int = 7) -> Observation:
    """Prompts of different lengths, a masked camera in row 1 (the first one: a hole in the middle of the sequence)."""
    rng = np.random.default_rng(seed)
    h, w = cfg.siglip.image_size
    masks = np.ones((batch, len(cfg.cameras)), bool)
    masks[1, 0] = False
    lengths = [prompt, 4, 2][:batch]
    return Observation(
        images=rng.uniform(-1, 1, (batch, len(cfg.cameras), h, w, 3)).astype(np.float32),
        image_mask=masks,
        prompt=text_run(rng.integers(2, VOCAB, (batch, prompt)), lengths, causal=False),
        state=rng.normal(size=(batch, cfg.state_dim)).astype(np.float32),
    )


def many_observations(cfg: ModelConfig, count: int) -> Observation:
    """Rows that differ in images and prompts, prompts of different lengths, a camera masked here and there."""
    rng = np.random.default_rng(0)
    one = ragged_observation(cfg)
    masks = np.ones((count, len(cfg.cameras)), bool)
    masks[::5, 0] = False
    return Observation(
        images=rng.uniform(-1, 1, (count, *one.images.shape[1:])).astype(np.float32),
        image_mask=masks,
        prompt=text_run(rng.integers(2, VOCAB, (count, 7)), rng.integers(1, 8, count).tolist(), causal=False),
        state=rng.normal(size=(count, cfg.state_dim)).astype(np.float32),
    )


def ragged_batch(cfg: ModelConfig, seed: int = 0) -> Batch:
    """Targets of different lengths that end with EOS; chunks cut at different steps."""
    rng = np.random.default_rng(seed + 100)
    lengths = [5, 2, 4]
    ids = rng.integers(2, VOCAB, (3, 6))
    ids[np.arange(3), np.asarray(lengths) - 1] = EOS
    target = text_run(ids, lengths, causal=True)
    target = dataclasses.replace(target, hidden=target.ids == EOS)
    mask = np.ones((3, cfg.action_horizon, cfg.action_dim), bool)
    mask[2, 2:] = False
    mask[:, :, -1] = False
    actions = rng.normal(size=mask.shape).astype(np.float32)
    return Batch(ragged_observation(cfg, seed), target, actions, mask)


def rows(tree, index) -> object:
    """Rows of every leaf of a batch."""
    return jax.tree.map(lambda a: a[index], tree)


def max_diff(a, b) -> float:
    """On the host: on the device every shape would be three programs."""
    return float(np.max(np.abs(np.asarray(a).astype(np.float64) - np.asarray(b).astype(np.float64))))
