"""The three calls everything is built from, and their composition at inference.

    prefill    images + prompt (+ known text) through tower 1      -> hidden states, KVCache
    generate   autoregressive text, one token a step               -> tokens, KVCache
    velocity   the action tower over the chunk, cache read-only    -> v_t

The K/V of what was just said is already in the cache when the actions are denoised, so they are conditioned on it at no
extra prefill.
"""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int
import numpy as np

from openpi_ar.models.cache import KVCache, action_mask, decode_mask, positions, prefix_lm_mask
from openpi_ar.models.pi0 import Pi0
from openpi_ar.types import Array, Observation, Text


@nnx.dataclass
class Prefill(nnx.Pytree):
    """Hidden states of tower 1 after the final norm. Rows of padding hold finite nonsense.

    hidden       every token: images, prompt, text.
    prompt_last  the last valid prompt token, whose logits predict the first text token.
    text         the known text's tokens, if any.
    """

    hidden: Float[Array, "B T D"] = nnx.data()
    prompt_last: Float[Array, "B D"] = nnx.data()
    text: Float[Array, "B _ D"] | None = nnx.data()


@nnx.dataclass
class Generated(nnx.Pytree):
    """Decoded tokens. A row is valid up to and including its EOS; after it come zeros."""

    ids: Int[Array, "B M"] = nnx.data()
    valid: Bool[Array, "B M"] = nnx.data()


@nnx.dataclass
class Act(nnx.Pytree):
    """What was said and what is to be done (normalised actions)."""

    ids: Int[Array, "B M"] = nnx.data()
    valid: Bool[Array, "B M"] = nnx.data()
    actions: Float[Array, "B A X"] = nnx.data()


def prefill(
    model: Pi0, obs: Observation, text: Text | None = None, *, image_tokens: Float[Array, "B _ D"] | None = None
) -> tuple[Prefill, KVCache]:
    """Runs images, prompt and, if given, known text through tower 1 in one pass.

    `image_tokens` (from `model.embed_images`) lets the vision tower be timed or reused apart. The prompt must have at
    least one valid token per row.
    """
    images = model.embed_images(obs) if image_tokens is None else image_tokens
    per_camera = images.shape[1] // obs.image_mask.shape[1]
    runs = [obs.prompt] if text is None else [obs.prompt, text]
    x = jnp.concatenate([images, *(model.embed_text(run.ids) for run in runs)], axis=1)
    seen = jnp.repeat(jnp.asarray(obs.image_mask), per_camera, axis=1)
    no = jnp.zeros_like(seen)
    valid = jnp.concatenate([seen, *(run.valid for run in runs)], axis=1)
    causal = jnp.concatenate([no, *(run.causal for run in runs)], axis=1)
    hidden_bit = jnp.concatenate([no, *(run.hidden for run in runs)], axis=1)

    hidden, (k, v) = model.vlm(x, positions(valid), prefix_lm_mask(valid, causal), remat=model.cfg.remat)
    cache = KVCache.empty(k, slots=k.shape[2]).append(k, v, valid, hidden_bit)

    start, stop = images.shape[1], images.shape[1] + obs.prompt.ids.shape[1]
    last = stop - 1 - jnp.argmax(valid[:, start:stop][:, ::-1], axis=1)  # padding may be anywhere: search from the end
    prompt_last = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    return Prefill(hidden=hidden, prompt_last=prompt_last, text=None if text is None else hidden[:, stop:]), cache


@nnx.dataclass
class _State(nnx.Pytree):
    """State of the decode loop: `step` tokens have been chosen; `last` of them is not in the cache yet."""

    step: Int[Array, ""] = nnx.data()
    last: Int[Array, " B"] = nnx.data()
    done: Bool[Array, " B"] = nnx.data()
    ids: Int[Array, "B M"] = nnx.data()
    valid: Bool[Array, "B M"] = nnx.data()
    cache: KVCache = nnx.data()
    key: Array = nnx.data()


def generate(
    model: Pi0,
    cache: KVCache,
    last_hidden: Float[Array, "B D"],
    key: Array,
    *,
    max_tokens: int,
    eos_id: int,
    allowed: Bool[Array, " V"],
    temperature: float = 0.0,
) -> tuple[Generated, KVCache]:
    """Decodes until every row has said EOS or `max_tokens` tokens are out. `last_hidden` predicts the first token.

    `allowed` masks the vocabulary (no special, location or action ids in text); it must allow EOS. Temperature 0 is
    greedy. EOS ends the text but is not written to the cache: nothing ever attends to it, so the loop stops on the step
    that emits it. (Training marks it `hidden` for the same reason.)
    """
    batch = last_hidden.shape[0]

    def choose(hidden: Array, key: Array) -> Array:
        logits = jnp.where(allowed, model.logits(hidden), -jnp.inf)
        if temperature == 0.0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return jax.random.categorical(key, logits / temperature).astype(jnp.int32)

    def record(state: _State, token: Array) -> _State:
        """Writes the chosen token at `step` in rows that are not done."""
        token = jnp.where(state.done, 0, token)
        return dataclasses.replace(
            state,
            step=state.step + 1,
            last=token,
            done=state.done | (token == eos_id),
            ids=jnp.asarray(state.ids).at[:, state.step].set(token, mode="drop"),
            valid=jnp.asarray(state.valid).at[:, state.step].set(~state.done, mode="drop"),
        )

    def body(state: _State) -> _State:
        live = ~state.done[:, None]
        x = model.embed_text(state.last[:, None])
        pos = state.cache.next_pos[:, None]
        hidden, (k, v) = model.vlm(x, pos, decode_mask(state.cache), state.cache)
        key, now = jax.random.split(state.key)
        cache = state.cache.append(k, v, live, jnp.zeros_like(live))
        return record(dataclasses.replace(state, cache=cache, key=key), choose(hidden[:, 0], now))

    key, now = jax.random.split(key)
    start = _State(
        step=jnp.zeros((), jnp.int32),
        last=jnp.zeros((batch,), jnp.int32),
        done=jnp.zeros((batch,), bool),
        ids=jnp.zeros((batch, max_tokens), jnp.int32),
        valid=jnp.zeros((batch, max_tokens), bool),
        cache=cache.grow(max_tokens),
        key=key,
    )
    start = record(start, choose(last_hidden, now))
    # A text cut off at max_tokens takes one step more, which writes its last token to the cache and drops the next.
    end = jax.lax.while_loop(lambda s: (s.step <= max_tokens) & ~s.done.all(), body, start)
    return Generated(ids=end.ids, valid=end.valid), end.cache


def velocity(
    model: Pi0, obs: Observation, cache: KVCache, x_t: Float[Array, "B A X"], t: Float[Array, " B"]
) -> Float[Array, "B A X"]:
    """The flow's velocity v_t at the noisy chunk x_t and time t (1 is noise, 0 is data). The cache is only read."""
    return velocities(model, obs, cache, x_t[:, None], t[:, None])[:, 0]


def velocities(
    model: Pi0, obs: Observation, cache: KVCache, x_t: Float[Array, "B n A X"], t: Float[Array, "B n"]
) -> Float[Array, "B n A X"]:
    """`velocity` of n chunks per row that share the row's cache and do not see each other.

    They run side by side as one long suffix, so n draws are one set of matmuls and the cache is never copied.
    """
    return model.project_velocity(suffix_hidden(model, cache, *model.embed_suffix(obs, x_t, t)))


def suffix_hidden(
    model: Pi0, cache: KVCache, tokens: Float[Array, "B n T E"], cond: Float[Array, "B n E"] | None
) -> Float[Array, "B n T E"]:
    """Hidden states of the action tower after its final norm, for the tokens and condition of `model.embed_suffix`."""
    batch, draws, count, width = tokens.shape
    pos = cache.action_pos[:, None] + jnp.tile(jnp.arange(count), draws)
    mask = action_mask(cache, model.suffix_causal, draws)
    x = tokens.reshape(batch, draws * count, width)
    hidden, _ = model.expert(x, pos, mask, cache, cond, remat=model.cfg.remat)
    return hidden.reshape(batch, draws, count, width)


def denoise(
    model: Pi0, obs: Observation, cache: KVCache, noise: Float[Array, "B A X"], *, num_steps: int
) -> Float[Array, "B A X"]:
    """Euler integration of the flow from noise (t = 1) to actions (t = 0) in a fixed number of equal steps."""
    batch = noise.shape[0]
    times = jnp.asarray(flow_times(num_steps))

    def step(i: Array, x: Array) -> Array:
        return x - velocity(model, obs, cache, x, jnp.full((batch,), times[i])) * np.float32(1 / num_steps)

    return jax.lax.fori_loop(0, num_steps, step, noise.astype(jnp.float32))


def flow_times(num_steps: int) -> Float[np.ndarray, " n"]:
    """Time at the start of each Euler step, from 1 down.

    Summed in float32 as openpi's loops do (0.8 is then 0.8000001, which the time embedding turns by 1e-4), but for a fixed
    number of steps: no loop depends on where such a sum ends.
    """
    dt, times = np.float32(-1.0 / num_steps), [np.float32(1.0)]
    for _ in range(num_steps - 1):
        times.append(times[-1] + dt)
    return np.array(times, np.float32)


def act(
    model: Pi0,
    obs: Observation,
    key: Array,
    *,
    eos_id: int,
    allowed: Bool[Array, " V"],
    max_tokens: int,
    num_steps: int,
    temperature: float = 0.0,
    text: Text | None = None,
) -> Act:
    """Says what comes next, then acts on it: prefill, generate, denoise.

    With `text` the model is told what it says (nothing is decoded). `max_tokens=0` leaves the text out (action-only
    models).
    """
    text_key, noise_key = jax.random.split(key)
    out, cache = prefill(model, obs, text)
    batch = out.prompt_last.shape[0]
    if text is not None:
        said = Generated(ids=jnp.asarray(text.ids), valid=jnp.asarray(text.valid))
    elif max_tokens == 0:
        said = Generated(ids=jnp.zeros((batch, 0), jnp.int32), valid=jnp.zeros((batch, 0), bool))
    else:
        said, cache = generate(
            model,
            cache,
            out.prompt_last,
            text_key,
            max_tokens=max_tokens,
            eos_id=eos_id,
            allowed=allowed,
            temperature=temperature,
        )
    noise = jax.random.normal(noise_key, (batch, model.cfg.action_horizon, model.cfg.action_dim))
    actions = denoise(model, obs, cache, noise, num_steps=num_steps)
    return Act(ids=said.ids, valid=said.valid, actions=actions)
