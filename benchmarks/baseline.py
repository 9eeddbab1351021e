"""The same numbers the way public implementations compute them: what our times are compared with.

Layers are scanned over stacked parameters, keys are joined to the cache before attention, RoPE is computed in every layer,
the time MLP and AdaRMS modulation in every denoising step, whose loop runs on a float time; each camera has a vision call of
its own; all prefix positions go through the LM head; there is no draft. In training, all text positions go through it and
the cross-entropy is a product with one-hot targets.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from openpi_ar.algorithms.losses import mean_where, sample_time
from openpi_ar.models.cache import positions, prefix_lm_mask
from openpi_ar.models.gemma import Tower
from openpi_ar.models.layers import MASKED, rotary, rotate
from openpi_ar.models.pi0 import Pi0
from openpi_ar.types import Array, Batch, Observation, Text

Cache = tuple[Array, Array, Array]
"""Keys and values [L B S K H], valid [B S]."""


def embed_images(model: Pi0, obs: Observation) -> Array:
    """One call of the vision tower per camera."""
    one = [dataclasses.replace(obs, images=obs.images[:, i : i + 1]) for i in range(obs.images.shape[1])]
    return jnp.concatenate([model.embed_images(o) for o in one], axis=1)


def attention(q: Array, k: Array, v: Array, mask: Array) -> Array:
    b, t, n, h = q.shape
    q = (q * h**-0.5).reshape(b, t, k.shape[2], -1, h)
    logits = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32)
    probs = jax.nn.softmax(jnp.where(mask[:, None, None], logits, MASKED), axis=-1).astype(k.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", probs, v).reshape(b, t, n, h)


def run_tower(
    tower: Tower,
    x: Array,
    pos: Array,
    mask: Array,
    cached: Any = None,
    cond: Array | None = None,
    *,
    remat: bool = False,
) -> tuple[Array, Any]:
    """Hidden states after the final norm, and the new tokens' keys and values."""

    def body(x: Array, xs: Any) -> tuple[Array, Any]:
        block, past = xs
        sin, cos = rotary(pos, tower.head_dim)
        y, gate = block.attn_norm(x, cond)
        q, (k, v) = rotate(block.q(y), sin, cos), block.kv(y)
        k = rotate(k, sin, cos)
        keys, values = (
            (k, v) if past is None else (jnp.concatenate([a, b], 1) for a, b in zip(past, (k, v), strict=True))
        )
        y = block.out(attention(q, keys, values, mask))
        x = x + (y if gate is None else gate * y)
        y, gate = block.mlp_norm(x, cond)
        y = block.mlp(y)
        return x + (y if gate is None else gate * y), (k, v)

    x, kv = jax.lax.scan(jax.checkpoint(body) if remat else body, x, (tower.blocks.layers, cached))
    return tower.norm(x, cond)[0], kv


def prefill(model: Pi0, obs: Observation, text: Text | None = None, images: Array | None = None) -> tuple[Array, Cache]:
    """Hidden states of the whole prefix, and the cache."""
    images = embed_images(model, obs) if images is None else images
    runs = [obs.prompt] if text is None else [obs.prompt, text]
    x = jnp.concatenate([images, *(model.embed_text(r.ids) for r in runs)], axis=1)
    seen = jnp.repeat(obs.image_mask, images.shape[1] // obs.image_mask.shape[1], axis=1)
    valid = jnp.concatenate([seen, *(r.valid for r in runs)], axis=1)
    causal = jnp.concatenate([jnp.zeros_like(seen), *(r.causal for r in runs)], axis=1)
    mask = prefix_lm_mask(valid, causal)
    hidden, (k, v) = run_tower(model.vlm, x, positions(valid), mask, remat=model.cfg.remat)
    return hidden, (k, v, valid)


def first_logits(model: Pi0, hidden: Array) -> Array:
    """Logits of the first text token, by way of those of all positions (the prompt fills its slots)."""
    return model.logits(hidden)[:, -1]


def generate(model: Pi0, cache: Cache, logits: Array, tokens: int) -> tuple[Array, Cache]:
    """Greedy tokens [B M], and the cache with them."""
    k, v, valid = cache
    start, batch = k.shape[2], k.shape[1]
    pad = [(0, 0), (0, 0), (0, tokens), (0, 0), (0, 0)]
    first = jnp.argmax(logits, -1).astype(jnp.int32)
    ids = jnp.zeros((batch, tokens), jnp.int32).at[:, 0].set(first)

    def body(state: Any) -> Any:
        i, ids, last, k, v, valid = state
        mask = jnp.concatenate([valid[:, None], jnp.ones((batch, 1, 1), bool)], axis=-1)
        x = model.embed_text(last[:, None])
        hidden, (k1, v1) = run_tower(model.vlm, x, valid.sum(-1, dtype=jnp.int32)[:, None], mask, (k, v))
        k, v = (jax.lax.dynamic_update_slice_in_dim(a, b, start + i, axis=2) for a, b in ((k, k1), (v, v1)))
        token = jnp.argmax(model.logits(hidden[:, 0]), -1).astype(jnp.int32)
        return i + 1, ids.at[:, i + 1].set(token, mode="drop"), token, k, v, valid.at[:, start + i].set(True)

    state = (0, ids, first, jnp.pad(k, pad), jnp.pad(v, pad), jnp.pad(valid, pad[1:3]))
    _, ids, _, k, v, valid = jax.lax.while_loop(lambda s: s[0] < tokens, body, state)
    return ids, (k, v, valid)


def velocity(model: Pi0, obs: Observation, cache: Cache, x: Array, t: Array) -> Array:
    """One pass of the action tower; masks and positions anew."""
    k, v, valid = cache
    tokens, cond = model.embed_suffix(obs, x[:, None], t[:, None])
    count, batch = tokens.shape[2], x.shape[0]
    own = prefix_lm_mask(jnp.ones((batch, count), bool), jnp.tile(model.suffix_causal, (batch, 1)))
    seen = jnp.broadcast_to(valid[:, None], (batch, count, valid.shape[1]))
    pos = valid.sum(-1, dtype=jnp.int32)[:, None] + jnp.arange(count)
    mask = jnp.concatenate([seen, own], axis=-1)
    hidden, _ = run_tower(model.expert, tokens[:, 0], pos, mask, (k, v), cond, remat=model.cfg.remat)
    return model.project_velocity(hidden[:, None])[:, 0]


def denoise(model: Pi0, obs: Observation, cache: Cache, noise: Array, steps: int) -> Array:
    """Euler steps while the time is above zero."""
    dt = jnp.float32(-1.0 / steps)

    def body(state: tuple[Array, Array]) -> tuple[Array, Array]:
        x, t = state
        return x + dt * velocity(model, obs, cache, x, jnp.broadcast_to(t, x.shape[:1])), t + dt

    return jax.lax.while_loop(lambda s: s[1] >= -dt / 2, body, (noise, jnp.float32(1.0)))[0]


def text_and_actions(model: Pi0, obs: Observation, noise: Array, tokens: int, steps: int) -> tuple[Array, Array]:
    """What is said, then what is done."""
    hidden, cache = prefill(model, obs)
    ids, cache = generate(model, cache, first_logits(model, hidden), tokens)
    return ids, denoise(model, obs, cache, noise, steps)


def text_ce(model: Pi0, hidden: Array, prompt: Text, target: Text) -> Array:
    """Cross-entropy from the hidden states of all text positions [B P+T D], against one-hot targets."""
    ids = jnp.concatenate([prompt.ids, target.ids], axis=1)
    counted = jnp.concatenate([jnp.zeros_like(prompt.loss), target.loss], axis=1)
    logits = model.logits(hidden[:, :-1])
    one_hot = jax.nn.one_hot(ids[:, 1:], logits.shape[-1])
    log_p = jnp.sum(one_hot * jax.nn.log_softmax(logits, axis=-1), axis=-1)
    return mean_where(-log_p, counted[:, 1:])


def loss(model: Pi0, batch: Batch, key: Array, flow_weight: float, text_weight: float) -> Array:
    """The training loss with one draw of noise and time per row, drawn as ours are."""
    hidden, cache = prefill(model, batch.observation, batch.target)
    text = batch.observation.prompt.ids.shape[1] + batch.target.ids.shape[1]
    ce = text_ce(model, hidden[:, -text:], batch.observation.prompt, batch.target)
    actions = jnp.asarray(batch.actions)
    noise_key, time_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, (actions.shape[0], 1, *actions.shape[1:]))[:, 0]
    t = sample_time(time_key, (actions.shape[0], 1))[:, 0]
    w = t[:, None, None]
    v = velocity(model, batch.observation, cache, w * noise + (1 - w) * actions, t)
    flow = mean_where(jnp.square(v - (noise - actions)), batch.action_mask)
    return flow_weight * flow + text_weight * ce


def train_step(
    model: Any, opt_state: Any, batch: Batch, key: Array, weights: tuple[float, float], tx: optax.GradientTransformation
) -> tuple[Any, Any, Array]:
    """(model, optimizer state, loss) after one update."""
    value, grads = jax.value_and_grad(loss)(model, batch, key, *weights)
    updates, opt_state = tx.update(grads, opt_state, model)
    return optax.apply_updates(model, updates), opt_state, value
