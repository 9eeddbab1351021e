"""Autoregressive text, one token a step, and the check of a draft of it.

A subtask holds for many control steps, so what was said last time is a good guess of what will be said now. As the text
run of a prefill it costs a few more rows of a matmul; the model's own arg max at each of its tokens then says how far it is
what greedy decoding would give. The agreed tokens are already in the cache.
"""

import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from openpi_ar.models.cache import KVCache, decode_mask
from openpi_ar.models.fused import FastTower, joined, room_for, runs_of
from openpi_ar.models.layers import rotary
from openpi_ar.models.pi0 import Pi0
from openpi_ar.types import Array, Kind, Tokens


@nnx.dataclass
class Generated(nnx.Pytree):
    """Decoded tokens. A row is valid up to and including its EOS; after it come zeros.

    steps   passes through the model that it took, the same for all rows; 0 if a draft was right.
    """

    ids: Int[Array, "B M"] = nnx.data()
    valid: Bool[Array, "B M"] = nnx.data()
    steps: Int[Array, ""] = nnx.data()

    @classmethod
    def known(cls, ids: Int[Array, "B M"], valid: Bool[Array, "B M"]) -> "Generated":
        """Text that is given, not decoded."""
        return cls(ids=jnp.asarray(ids), valid=jnp.asarray(valid), steps=jnp.zeros((), jnp.int32))


@nnx.dataclass
class _State(nnx.Pytree):
    """State of the decode loop: a row has chosen `step` tokens, of which `last` is not in the cache yet.

    Rows stand at different steps when different parts of their drafts were right. `new` has the keys and values of the tokens
    said so far where they are kept apart from the cache (an inference form).
    """

    count: Int[Array, ""] = nnx.data()
    step: Int[Array, " B"] = nnx.data()
    last: Int[Array, " B"] = nnx.data()
    done: Bool[Array, " B"] = nnx.data()
    ids: Int[Array, "B M"] = nnx.data()
    valid: Bool[Array, "B M"] = nnx.data()
    cache: KVCache = nnx.data()
    new: Any = nnx.data()
    key: Array = nnx.data()


def as_draft(ids: Int[Array, "B T"], valid: Bool[Array, "B T"], *, max_tokens: int, eos_id: int) -> Tokens:
    """The text run that checks this guess: its first valid tokens, without the EOS (nothing is ever read after it)."""
    ids, valid = jnp.asarray(ids)[:, :max_tokens], jnp.asarray(valid)[:, :max_tokens]
    spoken = jnp.cumprod(valid & (ids != eos_id), axis=1).astype(bool)
    return Tokens.of(jnp.where(spoken, ids, 0), spoken, kind=Kind.SUBTASK, causal=True)


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
    draft: Tokens | None = None,
    draft_hidden: Float[Array, "B T D"] | None = None,
) -> tuple[Generated, KVCache]:
    """Decodes until every row has said EOS or `max_tokens` tokens are out. `last_hidden` predicts the first token.

    `allowed` masks the vocabulary (no special, location or action ids in text); it must allow EOS. Temperature 0 is
    greedy. EOS ends the text but is not written to the cache: nothing ever attends to it, so the loop stops on the step
    that emits it. (Training marks it `hidden` for the same reason.)

    A `draft` (from `as_draft`) was the text run of the prefill that gave `cache` and its hidden states. Each row keeps the
    tokens that it would have said and goes on from there; the others become holes in the cache. The text is that of
    decoding without a draft. Raises ValueError if the text is not greedy.
    """
    batch, vlm = last_hidden.shape[0], model.vlm

    def choose(hidden: Array, key: Array) -> Array:
        logits = jnp.where(allowed, model.logits(hidden), -jnp.inf)
        if temperature == 0.0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return jax.random.categorical(key, logits / temperature).astype(jnp.int32)

    def live(state: _State) -> Array:
        # A text cut off at max_tokens takes one step more, which writes its last token to the cache and drops the next.
        return ~state.done & (state.step <= max_tokens)

    def record(state: _State, token: Array) -> _State:
        """Notes the chosen token in rows that go on; one too many falls off the end."""
        on = live(state)
        here = (jnp.arange(max_tokens) == state.step[:, None]) & on[:, None]
        return dataclasses.replace(
            state,
            step=state.step + on,
            last=jnp.where(on, token, 0),
            done=state.done | (on & (token == eos_id) & (state.step < max_tokens)),
            ids=jnp.where(here, token[:, None], state.ids),
            valid=state.valid | here,
        )

    def say(x: Array, on: Array, cache: KVCache, new: Any) -> tuple[Array, KVCache, Any]:
        """One token through the tower, and into the cache, where it is valid if `on`."""
        no, pos = jnp.zeros_like(on), cache.next_pos[:, None]
        if not isinstance(vlm, FastTower):
            hidden, (k, v) = vlm(x, pos, decode_mask(cache), cache)
            return hidden, cache.append(k, v, on, no), new
        mask = (cache.valid | (jnp.arange(cache.valid.shape[1]) == cache.fill))[:, None]
        past = [[*runs, own] for runs, own in zip(before, new, strict=True)]
        hidden, (k, v) = vlm.run(x, rotary(pos, vlm.head_dim), mask, past, None, at=cache.fill - slots)
        return hidden, cache.mark(on, no), list(zip(k, v, strict=True))

    def body(state: _State) -> _State:
        on = live(state)[:, None]
        x = model.embed_text(state.last[:, None])
        hidden, cache, new = say(x, on, state.cache, state.new)
        key, now = jax.random.split(state.key)
        state = dataclasses.replace(state, count=state.count + 1, cache=cache, new=new, key=key)
        return record(state, choose(hidden[:, 0], now))

    key, now = jax.random.split(key)
    agreed, ids = jnp.zeros((batch,), jnp.int32), jnp.zeros((batch, max_tokens), jnp.int32)
    if draft is None:
        first = choose(last_hidden, now)
    else:
        if temperature != 0.0 or draft_hidden is None:
            raise ValueError("a draft is checked against greedy text, with the hidden states of its prefill")
        length = draft.ids.shape[1]
        predicted = choose(jnp.concatenate([last_hidden[:, None], draft_hidden], axis=1)[:, :max_tokens], now)
        right = (predicted[:, :length] == draft.ids) & draft.valid
        agreed = jnp.cumprod(right, axis=1, dtype=jnp.int32).sum(-1)
        at = jnp.minimum(agreed, predicted.shape[1] - 1)
        first = jnp.take_along_axis(predicted, at[:, None], axis=1)[:, 0]
        cache = cache.forget(jnp.arange(length) < agreed[:, None])
        ids = ids.at[:, :length].set(draft.ids)
    kept = jnp.arange(max_tokens) < agreed[:, None]
    slots, before, new = cache.valid.shape[1], [], []
    longer = dataclasses.replace(cache.grow(max_tokens), fill=jnp.asarray(slots, jnp.int32))
    if isinstance(vlm, FastTower):
        before = runs_of(cache)
        new = room_for(before, max_tokens)
        longer = dataclasses.replace(longer, k=(), v=())  # the loop writes to `new` and only reads `before`
    start = _State(
        count=jnp.zeros((), jnp.int32),
        step=agreed,
        last=jnp.zeros((batch,), jnp.int32),
        done=jnp.zeros((batch,), bool),
        ids=jnp.where(kept, ids, 0),
        valid=kept,
        cache=longer,
        new=new,
        key=key,
    )
    start = record(start, first)
    end = jax.lax.while_loop(lambda s: live(s).any(), body, start)
    longer = end.cache
    if isinstance(vlm, FastTower):
        k, v = joined(cache, end.new)
        longer = dataclasses.replace(longer, k=k, v=v)
    return Generated(ids=end.ids, valid=end.valid, steps=end.count), longer
