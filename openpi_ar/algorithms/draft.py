"""The check of a draft of the text.

A subtask holds for many control steps, so the last text is a good draft of the next one. As the text of a prefill it
costs a few more rows of a matmul; the model's own arg max at each of its tokens then tells how far it is what greedy
decoding would give. The agreed tokens are already in the cache.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from openpi_ar.algorithms.choice import Choice, choose, choose_along
from openpi_ar.algorithms.sampling import Generated, Sampling
from openpi_ar.models.vlm import VLM
from openpi_ar.types import Array, Kind, Tokens


class Start(NamedTuple):
    """The beginning of decoding, of each row after the `agreed` first tokens of its draft.

    choice      the next token [B].
    text        the agreed tokens.
    constraint  its state after the agreed tokens.
    """

    agreed: Int[Array, " B"]
    choice: Choice
    text: Generated
    constraint: Any


def as_draft(ids: Int[Array, "B T"], valid: Bool[Array, "B T"], sampling: Sampling) -> Tokens:
    """The text of a prefill that checks this draft: its valid tokens up to the EOS, after which nothing is read."""
    most = sampling.max_new_tokens
    ids, valid = jnp.asarray(ids)[:, :most], jnp.asarray(valid)[:, :most]
    used = jnp.cumprod(valid & (ids != sampling.eos_id), axis=1).astype(bool)
    return Tokens.of(jnp.where(used, ids, 0), used, kind=Kind.SUBTASK, causal=True)


def without_draft(model: VLM, last_hidden: Float[Array, "B D"], sampling: Sampling, keys: Array | None) -> Start:
    """Decoding begins with the first token, drawn with these keys unless it is greedy."""
    batch, most = last_hidden.shape[0], sampling.max_new_tokens
    state = sampling.init(batch)
    text = Generated.given(jnp.zeros((batch, most), jnp.int32), jnp.zeros((batch, most), bool))
    return Start(jnp.zeros((batch,), jnp.int32), choose(model, last_hidden, sampling, state, keys), text, state)


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
    # The token after the last one of a draft is needed too; of an empty draft it is the only one.
    needed = jnp.arange(count) <= draft.valid.sum(-1, keepdims=True)
    choices = choose_along(model, hidden, needed, sampling, states)
    right = (choices.ids[:, :length] == draft.ids) & draft.valid
    agreed = jnp.cumprod(right, axis=1, dtype=jnp.int32).sum(-1)
    at, row = jnp.minimum(agreed, count - 1), jnp.arange(batch)
    kept = jnp.arange(most) < agreed[:, None]
    ids, logprobs, margins = (jnp.where(kept, jnp.pad(x, [(0, 0), (0, most - count)]), 0) for x in choices)
    return Start(
        agreed=agreed,
        choice=Choice(*(x[row, at] for x in choices)),
        text=Generated(ids, kept, logprobs, margins, steps=jnp.zeros((), jnp.int32)),
        constraint=jax.tree.map(lambda s: s[at, row], states),
    )


def constraint_states(sampling: Sampling, start: Any, ids: Int[Array, "B T"]) -> Any:
    """States of the constraint from `start` on, before each of these tokens and after the last: a new first axis."""
    on = jnp.ones(ids.shape[0], bool)

    def step(state: Any, token: Array) -> tuple[Any, Any]:
        state = sampling.advance(state, token, on)
        return state, state

    _, later = jax.lax.scan(step, start, ids.T)
    return jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), start, later)
