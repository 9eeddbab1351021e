"""The three calls everything is built from, and their composition at inference.

    prefill    images + prompt (+ known text) through tower 1      -> hidden states, KVCache
    generate   autoregressive text, one token a step               -> tokens, KVCache
    velocity   the action tower over the chunk, cache read-only    -> v_t

The K/V of what was just said is already in the cache when the actions are denoised, so they are conditioned on it at no
extra prefill.
"""

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int
import numpy as np

from openpi_ar.algorithms.generate import Generated, as_draft, generate
from openpi_ar.models.cache import KVCache, action_mask, positions, prefix_lm_mask
from openpi_ar.models.fused import FastTower, runs_of
from openpi_ar.models.layers import rotary
from openpi_ar.models.pi0 import Pi0
from openpi_ar.types import Array, Observation, Tokens


@nnx.dataclass
class Prefill(nnx.Pytree):
    """Hidden states of tower 1 after the final norm. Rows of padding hold finite nonsense.

    hidden       every token: images, prompt, text; None if they were not asked for.
    prompt_last  the last valid prompt token, whose logits predict the first text token.
    text         the known text's tokens, if any.
    """

    hidden: Float[Array, "B T D"] | None = nnx.data()
    prompt_last: Float[Array, "B D"] = nnx.data()
    text: Float[Array, "B _ D"] | None = nnx.data()


@nnx.dataclass
class Act(nnx.Pytree):
    """What was said, in how many decoding steps, and what is to be done (normalised actions)."""

    ids: Int[Array, "B M"] = nnx.data()
    valid: Bool[Array, "B M"] = nnx.data()
    steps: Int[Array, ""] = nnx.data()
    actions: Float[Array, "B A X"] = nnx.data()


def prefill(
    model: Pi0,
    obs: Observation,
    text: Tokens | None = None,
    *,
    image_tokens: Float[Array, "B _ D"] | None = None,
    lean: bool = False,
) -> tuple[Prefill, KVCache]:
    """Runs images, prompt and, if given, known text through tower 1 in one pass.

    `image_tokens` (from `model.embed_images`) lets the vision tower be timed or reused apart. The prompt must have at
    least one valid token per row. `lean` leaves out `hidden`: an inference form then computes the last layer for the few
    tokens that predict text, and only writes keys and values for the others.
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

    start, stop = images.shape[1], images.shape[1] + obs.prompt.ids.shape[1]
    last = stop - 1 - jnp.argmax(valid[:, start:stop][:, ::-1], axis=1)  # padding may be anywhere: search from the end
    rows = None
    if lean:
        tail = jnp.broadcast_to(jnp.arange(stop, x.shape[1]), (x.shape[0], x.shape[1] - stop))
        rows = jnp.concatenate([last[:, None], tail], axis=1)
    hidden, (k, v) = model.vlm(x, positions(valid), prefix_lm_mask(valid, causal), remat=model.cfg.remat, rows=rows)
    cache = KVCache.full(k, v, valid, hidden_bit)
    known = hidden[:, 1:] if lean else hidden[:, stop:]
    prompt_last = hidden[:, 0] if lean else jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    out = Prefill(hidden=None if lean else hidden, prompt_last=prompt_last, text=None if text is None else known)
    return out, cache


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


def flow_table(model: Pi0, num_steps: int) -> Float[Array, "n m W"] | None:
    """Modulation of every norm of the action tower at each Euler step: all of pi0.5's computation that depends on time only.

    A constant of the checkpoint, for `denoise`. None if the model is no inference form of a pi0.5.
    """
    if not (isinstance(model.expert, FastTower) and model.cfg.pi05):
        return None
    return model.expert.modulations(model.time_condition(jnp.asarray(flow_times(num_steps))))


def denoise(
    model: Pi0,
    obs: Observation,
    cache: KVCache,
    noise: Float[Array, "B A X"],
    *,
    num_steps: int,
    table: Float[Array, "n m W"] | None = None,
) -> Float[Array, "B A X"]:
    """Euler integration of the flow from noise (t = 1) to actions (t = 0) in a fixed number of equal steps.

    `table` (of `flow_table`, for the same number of steps) saves computing it here.
    """
    batch, times = noise.shape[0], jnp.asarray(flow_times(num_steps))
    expert = model.expert
    if isinstance(expert, FastTower):
        # Nothing of this depends on the step, so it is computed before the loop.
        table = flow_table(model, num_steps) if table is None else table
        causal = model.suffix_causal
        rope = rotary(cache.action_pos[:, None] + jnp.arange(causal.shape[0]), expert.head_dim)
        mask = action_mask(cache, causal, 1)
        past = runs_of(cache)

    def velocity_at(i: Array, x: Array) -> Array:
        t = jnp.full((batch,), times[i])
        if not isinstance(expert, FastTower):
            return velocity(model, obs, cache, x, t)
        tokens, _ = model.embed_suffix(obs, x[:, None], t[:, None])
        hidden, _ = expert.run(tokens[:, 0], rope, mask, past, None if table is None else table[i])
        return model.project_velocity(hidden[:, None])[:, 0]

    def step(i: Array, x: Array) -> Array:
        return x - velocity_at(i, x) * np.float32(1 / num_steps)

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
    text: Tokens | None = None,
    draft: tuple[Int[Array, "B _"], Bool[Array, "B _"]] | None = None,
    table: Float[Array, "n m W"] | None = None,
) -> Act:
    """Says what comes next, then acts on it: prefill, generate, denoise.

    With `text` the model is told what it says (nothing is decoded). `max_tokens=0` leaves the text out (action-only
    models). `draft` is a guess (ids, valid) of the text, any guess: the right part of it is not decoded again, the result
    is the same. `table` is `flow_table`'s.
    """
    text_key, noise_key = jax.random.split(key)
    guess = None
    if text is None and draft is not None and max_tokens:
        guess = as_draft(*draft, max_tokens=max_tokens, eos_id=eos_id)
    out, cache = prefill(model, obs, guess if text is None else text, lean=True)
    batch = out.prompt_last.shape[0]
    if text is not None:
        said = Generated.known(text.ids, text.valid)
    elif max_tokens == 0:
        said = Generated.known(jnp.zeros((batch, 0), jnp.int32), jnp.zeros((batch, 0), bool))
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
            draft=guess,
            draft_hidden=out.text,
        )
    noise = jax.random.normal(noise_key, (batch, model.cfg.action_horizon, model.cfg.action_dim))
    actions = denoise(model, obs, cache, noise, num_steps=num_steps, table=table)
    return Act(ids=said.ids, valid=said.valid, steps=said.steps, actions=actions)
