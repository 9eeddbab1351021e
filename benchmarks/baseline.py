"""The same numbers the way public implementations compute them: what our times are compared with.

What is done as where (read at openpi 15a9616, github.com/BrunoFANG1/openpi_subtask_generation 74ac1d7; the latter's
`gemma_05.py` and `pi05.py` are used alike by github.com/Ke-Wang1017/openpi_subtask):

* openpi `siglip.py` `_Module`, `Encoder`: patches by a strided convolution, blocks scanned; `pi0.py` `embed_prefix`:
  one call per camera.
* openpi `gemma.py` `Module`, `Block`, `Attention`: blocks scanned over stacked parameters and cache, all of them under
  remat, RoPE in every layer; keys joined to the cache before attention; `lora.py` `FeedForward`: gate, up and down as
  three matmuls of [B T D].
* `pi0.py` `sample_actions`: time MLP, AdaRMS, positions and masks in every denoising step, a loop on a float time.
* `pi0_fast.py` `sample_actions` and the fork's `sample_low_level_task`: tokens rolled to the right, a cache as long as
  everything will be, over which the prefill attends too; it goes through the scan of every token's layers as input and
  output. All prefix positions go through the LM head (`pi0_fast.py`), or the last one (the fork; `Size.last_logits`);
  decoding does so with one, takes a log-softmax, writes the token by a one-hot product, and spends a step on the token
  after the last.
* the fork's `compute_loss`: prefix once, then actions on its cache; all text positions through the head, a product with
  one-hot targets.

Left out, though they do it: random keys split in every step, Beta times by rejection (the draws are ours, to compare
losses).
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from openpi_ar.algorithms.losses import sample_time
from openpi_ar.models.cache import positions, prefix_lm_mask
from openpi_ar.models.decoder import Tower
from openpi_ar.models.layers import MASKED, GatedMLP, Linear, rotary, rotate
from openpi_ar.types import Array, Batch, Observation, Tokens

Pi0 = Any
"""The model with stacked layers, whose modules are read one by one."""
Cache = tuple[Array, Array, Array]
"""Keys and values [L B S K H], valid [B S]."""


def embed_images(model: Pi0, obs: Observation) -> Array:
    """One call of the vision tower per camera; uint8 images of the model's size."""
    images = jnp.asarray(obs.images).astype(jnp.float32) / 127.5 - 1.0
    return jnp.concatenate([see(model, images[:, i]) for i in range(images.shape[1])], axis=1)


def see(model: Pi0, images: Array) -> Array:
    """[B T D] from [B h w 3] in [-1, 1]."""
    img, step = model.img, (model.img.patch, model.img.patch)
    kernel = img.patch_kernel[...].astype(jnp.float32)
    axes = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(images, kernel, step, "VALID", dimension_numbers=axes) + img.patch_bias[...]
    x = (x.reshape(x.shape[0], -1, x.shape[-1]) + img.pos_embedding[...]).astype(model.dtype)

    def body(x: Array, block: Any) -> tuple[Array, None]:
        x = x + block.attn(block.norm1(x))
        y = jax.nn.gelu(dense(block.fc1, block.norm2(x)), approximate=True)
        return x + dense(block.fc2, y), None

    x, _ = jax.lax.scan(jax.checkpoint(body, prevent_cse=False) if model.cfg.remat else body, x, img.blocks.layers)
    return dense(img.head, img.norm(x))


def dense(layer: Linear, x: Array) -> Array:
    return jnp.dot(x, layer.kernel[...].astype(x.dtype)) + layer.bias[...].astype(x.dtype)


def feed_forward(layer: GatedMLP, x: Array) -> Array:
    gate_up = layer.gate_up[...].astype(x.dtype)
    y = jax.nn.gelu(jnp.dot(x, gate_up[0]), approximate=True) * jnp.dot(x, gate_up[1])
    return jnp.dot(y, layer.down[...].astype(x.dtype))


def logits_of(model: Pi0, hidden: Array) -> Array:
    """Float32 logits [B T V]."""
    return jnp.dot(hidden, model.embedder.table[...].astype(hidden.dtype).T, preferred_element_type=jnp.float32)


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
    at: Array | None = None,
    remat: bool = False,
) -> tuple[Array, Any]:
    """Hidden states after the final norm, and the cache: `cached` with one new token in slot `at`, or a new one, as
    long as the mask is wide. Without `at`, `cached` (read only) and the new tokens' keys and values are joined.
    """

    def body(x: Array, xs: Any) -> tuple[Array, Any]:
        block, past = xs
        sin, cos = rotary(pos, tower.head_dim)
        y, gate = block.attn_norm(x, cond)
        q, (k, v) = rotate(block.q(y), sin, cos), block.kv(y)
        k = rotate(k, sin, cos)
        if past is None:
            stored = joined = tuple(
                jnp.pad(a, [(0, 0), (0, mask.shape[-1] - a.shape[1]), (0, 0), (0, 0)]) for a in (k, v)
            )
        elif at is not None:
            update = jax.lax.dynamic_update_slice_in_dim
            stored = joined = tuple(update(a, b, at, 1) for a, b in zip(past, (k, v), strict=True))
        else:
            stored, joined = past, tuple(jnp.concatenate([a, b], 1) for a, b in zip(past, (k, v), strict=True))
        y = block.out(attention(q, *joined, mask))
        x = x + (y if gate is None else gate * y)
        y, gate = block.mlp_norm(x, cond)
        y = feed_forward(block.mlp, y)
        return x + (y if gate is None else gate * y), stored

    again = jax.checkpoint(body, prevent_cse=False) if remat else body
    x, kv = jax.lax.scan(again, x, (tower.blocks.layers, cached))
    return tower.norm(x, cond)[0], kv


@jax.vmap
def align_right(x: Array, valid: Array, mask: Array) -> tuple[Array, Array, Array]:
    """[T D], [T] and [T T] rolled so that the last valid token is the last of all."""
    by = -jnp.max(valid * jnp.arange(valid.shape[0])) - 1
    return jnp.roll(x, by, axis=0), jnp.roll(valid, by), jnp.roll(mask, by, axis=(0, 1))


def prefill(
    model: Pi0, obs: Observation, text: Tokens | None = None, images: Array | None = None, *, room: int = 0
) -> tuple[Array, Cache]:
    """Hidden states of the whole prefix, and the cache with `room` for more tokens. What is decoded from is aligned."""
    images = embed_images(model, obs) if images is None else images
    runs = [obs.prompt] if text is None else [obs.prompt, text]
    x = jnp.concatenate([images, *(model.embed_text(r.ids) for r in runs)], axis=1)
    seen = jnp.repeat(obs.image_mask, images.shape[1] // obs.image_mask.shape[1], axis=1)
    valid = jnp.concatenate([seen, *(r.valid for r in runs)], axis=1)
    causal = jnp.concatenate([jnp.zeros_like(seen), *(r.causal for r in runs)], axis=1)
    mask = prefix_lm_mask(valid, causal)
    if room:
        x, valid, mask = align_right(x, valid, mask)
    mask = jnp.pad(mask, [(0, 0), (0, 0), (0, room)])
    hidden, (k, v) = run_tower(model.vlm, x, positions(valid), mask, remat=model.cfg.remat)
    return hidden, (k, v, jnp.pad(valid, [(0, 0), (0, room)]))


def first_logits(model: Pi0, hidden: Array, *, last: bool = False) -> Array:
    """Logits [B 1 V] of the first text token, by way of those of all positions, or of the last one alone."""
    return logits_of(model, hidden[:, -1:]) if last else logits_of(model, hidden)[:, -1:]


def generate(model: Pi0, cache: Cache, logits: Array, tokens: int, *, eos_id: int = -1) -> tuple[Array, Cache]:
    """Greedy tokens [B M], and the cache (which has room for them) with them."""
    slots = cache[0].shape[2]
    size = slots - tokens
    length = cache[2].sum(-1, dtype=jnp.int32)

    def body(state: Any) -> Any:
        i, ids, logits, k, v, _ = state
        token = jnp.argmax(logits, -1).astype(jnp.int32)
        one_hot = jax.nn.one_hot(jnp.broadcast_to(i, token.shape), tokens, dtype=jnp.int32)
        ids = jnp.where(jnp.einsum("Bi,BiM->BM", jnp.ones_like(token), one_hot) != 0, token, ids)
        slot = jnp.arange(slots)[None, None]
        mask = (slot >= (size - length)[:, None, None]) & (slot < size + i + 1)
        x = model.embed_text(token)
        hidden, (k, v) = run_tower(model.vlm, x, length[:, None] + i, mask, (k, v), at=size + i, remat=model.cfg.remat)
        logits = jax.nn.log_softmax(logits_of(model, hidden[:, -1:]), axis=-1)
        return i + 1, ids, logits, k, v, jnp.all(token == eos_id)

    start = (jnp.int32(0), jnp.zeros((length.shape[0], tokens), jnp.int32), logits, *cache[:2], jnp.bool_(False))
    count, ids, _, k, v, _ = jax.lax.while_loop(lambda s: ~s[-1] & (s[0] < tokens), body, start)
    valid = jnp.broadcast_to(jnp.arange(tokens) < count, ids.shape)
    return ids, (k, v, jnp.concatenate([cache[2][:, :size], valid], axis=1))


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


def text_and_actions(
    model: Pi0, obs: Observation, noise: Array, tokens: int, steps: int, *, last: bool = False
) -> tuple[Array, Array]:
    """The text, then the actions; `last` as in `first_logits`."""
    hidden, cache = prefill(model, obs, room=tokens)
    ids, cache = generate(model, cache, first_logits(model, hidden, last=last), tokens)
    return ids, denoise(model, obs, cache, noise, steps)


def mean_where(x: Array, mask: Array) -> Array:
    """Mean of x where mask holds; 0 where it holds nowhere."""
    return jnp.sum(jnp.where(mask, x, 0.0)) / jnp.maximum(mask.sum(), 1)


def text_ce(model: Pi0, hidden: Array, prompt: Tokens, target: Tokens) -> Array:
    """Cross-entropy from the hidden states of all text positions [B P+T D], against one-hot targets."""
    ids = jnp.concatenate([prompt.ids, target.ids], axis=1)
    counted = jnp.concatenate([jnp.zeros_like(prompt.loss), target.loss], axis=1)
    logits = logits_of(model, hidden[:, :-1])
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
