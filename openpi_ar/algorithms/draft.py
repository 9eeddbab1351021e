"""The check of a draft of the text.

A subtask holds for many control steps, so the last text is a good draft of the next one. As the text of a prefill it
costs a few more rows of a matmul; the model's own arg max at each of its tokens then tells how far it is what greedy
decoding would give. The agreed tokens are already in the cache.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from openpi_ar.algorithms.sampling import Generated, Sampling, certainty
from openpi_ar.models.vlm import VLM
from openpi_ar.types import Array, Kind, Tokens


class Start(NamedTuple):
    """The beginning of decoding, of each row after the `agreed` first tokens of its draft.

    logits      of the next token, constrained.
    text        the agreed tokens.
    constraint  its state after the agreed tokens.
    """

    agreed: Int[Array, " B"]
    logits: Float[Array, "B V"]
    text: Generated
    constraint: Any


def as_draft(ids: Int[Array, "B T"], valid: Bool[Array, "B T"], sampling: Sampling) -> Tokens:
    """The text of a prefill that checks this draft: its valid tokens up to the EOS, after which nothing is read."""
    most = sampling.max_new_tokens
    ids, valid = jnp.asarray(ids)[:, :most], jnp.asarray(valid)[:, :most]
    used = jnp.cumprod(valid & (ids != sampling.eos_id), axis=1).astype(bool)
    return Tokens.of(jnp.where(used, ids, 0), used, kind=Kind.SUBTASK, causal=True)


def without_draft(model: VLM, last_hidden: Float[Array, "B D"], sampling: Sampling) -> Start:
    """Decoding begins with the first token."""
    batch, most = last_hidden.shape[0], sampling.max_new_tokens
    state = sampling.init(batch)
    logits = sampling.constrained(model.logits(last_hidden), state)
    text = Generated.given(jnp.zeros((batch, most), jnp.int32), jnp.zeros((batch, most), bool))
    return Start(jnp.zeros((batch,), jnp.int32), logits, text, state)


def check_draft(
    model: VLM,
    last_hidden: Float[Array, "B D"],
    draft: Tokens,
    draft_hidden: Float[Array, "B T D"] | None,
    sampling: Sampling,
) -> Start:
    """How far a draft (from `as_draft`) is the greedy text. Raises ValueError if the text is not greedy."""
    if not sampling.greedy or draft_hidden is None:
        raise ValueError("a draft is checked against greedy text, with the hidden states of its prefill")
    (batch, length), most = draft.ids.shape, sampling.max_new_tokens
    hidden = jnp.concatenate([last_hidden[:, None], draft_hidden], axis=1)[:, :most]
    count = hidden.shape[1]
    states = constraint_states(sampling, sampling.init(batch), draft.ids[:, : count - 1])
    logits = constrained_along(sampling, model.logits(hidden), states)
    predicted = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    right = (predicted[:, :length] == draft.ids) & draft.valid
    agreed = jnp.cumprod(right, axis=1, dtype=jnp.int32).sum(-1)
    at = jnp.minimum(agreed, count - 1)
    kept = jnp.arange(most) < agreed[:, None]
    draft_values = (draft.ids, *certainty(logits[:, :length], draft.ids))
    ids, logprobs, margins = (jnp.where(kept, jnp.pad(x, [(0, 0), (0, most - length)]), 0) for x in draft_values)
    return Start(
        agreed=agreed,
        logits=jnp.take_along_axis(logits, at[:, None, None], axis=1)[:, 0],
        text=Generated(ids, kept, logprobs, margins, steps=jnp.zeros((), jnp.int32)),
        constraint=jax.tree.map(lambda s: s[at, jnp.arange(batch)], states),
    )


def constrained_along(sampling: Sampling, logits: Float[Array, "B T V"], states: Any) -> Float[Array, "B T V"]:
    """Logits of consecutive tokens, constrained by the state before each (`constraint_states`)."""
    return jax.vmap(sampling.constrained, in_axes=(1, 0), out_axes=1)(logits, states)


def constraint_states(sampling: Sampling, start: Any, ids: Int[Array, "B T"]) -> Any:
    """States of the constraint from `start` on, before each of these tokens and after the last: a new first axis."""
    on = jnp.ones(ids.shape[0], bool)

    def step(state: Any, token: Array) -> tuple[Any, Any]:
        state = sampling.advance(state, token, on)
        return state, state

    _, later = jax.lax.scan(step, start, ids.T)
    return jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), start, later)
