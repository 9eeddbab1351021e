"""The next token from hidden states, and how sure the model is of it.

The head of a real vocabulary (257,152 ids) is read from memory for every product, and its logits are long: here is
decided how many rows of hidden states go through it, and how often their logits are read.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from openpi_ar.algorithms.sampling import Sampling, certainty
from openpi_ar.models.vlm import VLM
from openpi_ar.types import Array


class Choice(NamedTuple):
    """Chosen ids [*b], and float32 [*b] how sure the model is of each: `sampling.Generated`."""

    ids: Array
    logprobs: Array
    margins: Array


def choose(
    model: VLM, hidden: Float[Array, "N D"], sampling: Sampling, state: Any, keys: Array | None = None
) -> Choice:
    """The next token after each hidden state, as `sampling` says; `state` is that of its constraint, of N rows.

    Where the constraint can list the ids that may come next, no others are computed. Raises ValueError if tokens are
    drawn and there are no keys.
    """
    few = sampling.candidates(state)
    if few is None:
        return _choose(sampling.constrained(model.logits(hidden), state), sampling, keys)
    ids, allowed = few
    weight = model.head_weight()[ids].astype(hidden.dtype)
    logits = jnp.einsum("ND,NFD->NF", hidden, weight, preferred_element_type=jnp.float32)
    choice = _choose(jnp.where(allowed, logits, -jnp.inf), sampling, keys)
    return choice._replace(ids=jnp.take_along_axis(ids, choice.ids[:, None], axis=1)[:, 0])


def _choose(logits: Float[Array, "N V"], sampling: Sampling, keys: Array | None) -> Choice:
    if sampling.greedy:
        return likeliest(logits)
    ids = sampling.choose(logits, keys)
    return Choice(ids, *certainty(logits, ids))


def likeliest(logits: Float[Array, "N V"]) -> Choice:
    """The likeliest id of each row (the first of equals) and its `certainty`.

    An arg max over a whole row is computed one by one on a CPU, maxima and sums are not: so the maxima of pieces of a
    row come first, and only the best piece is searched. Half the time of `argmax` and `certainty`, or less.
    """
    rows, width = logits.shape
    pieces = _pieces(width)
    split = logits.reshape(rows, pieces, width // pieces)
    tops = split.max(-1)
    piece, top = jnp.argmax(tops, axis=-1), tops.max(-1)
    best = jnp.take_along_axis(split, piece[:, None, None], axis=1)[:, 0]
    at = jnp.argmax(best, axis=-1)
    total = jnp.exp(logits - top[:, None]).sum(-1)
    second = jnp.maximum(_without(tops, piece), _without(best, at))
    ids = (piece * best.shape[1] + at).astype(jnp.int32)
    return Choice(ids, 0.0 - jnp.log(total), top - second)


def _pieces(width: int) -> int:
    """The largest divisor up to the square root."""
    return max(d for d in range(1, math.isqrt(width) + 1) if width % d == 0)


def _without(x: Float[Array, "N n"], at: Int[Array, " N"]) -> Float[Array, " N"]:
    """The maximum of each row but for one place."""
    return jnp.where(jnp.arange(x.shape[1]) == at[:, None], -jnp.inf, x).max(-1)


def choose_along(
    model: VLM, hidden: Float[Array, "B T D"], needed: Bool[Array, "B T"], sampling: Sampling, states: Any
) -> Choice:
    """Greedy choices [B T] after hidden states of consecutive tokens; those that are not `needed` mean nothing.

    `states` are the constraint's before each of them, [T B ...] (`draft.constraint_states`). What is not needed does
    not go through the head, up to a rounding of the number of rows: programs have fixed shapes.
    """
    batch, length, _ = hidden.shape
    rows = hidden.reshape(batch * length, -1)
    states = jax.tree.map(lambda s: jnp.moveaxis(s, 1, 0).reshape(batch * length, *s.shape[2:]), states)
    count, order = needed.sum(), jnp.argsort(~needed.ravel(), stable=True)

    def of(size: int) -> Choice:
        first = order[:size]
        some = choose(model, rows[first], sampling, jax.tree.map(lambda s: s[first], states))
        return Choice(*(jnp.zeros((batch * length,), x.dtype).at[first].set(x) for x in some))

    sizes = [batch * length]
    if not sampling.lists:
        sizes = [batch * n for n in (1, 4, 16, 64) if n < length] + sizes
    fits = jnp.asarray(sizes) >= count
    chosen = jax.lax.switch(jnp.argmax(fits), [lambda size=size: of(size) for size in sizes])
    return Choice(*(x.reshape(batch, length) for x in chosen))
