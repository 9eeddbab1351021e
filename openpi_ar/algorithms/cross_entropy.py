"""Cross-entropy against a vocabulary too wide to hold: float32 log-sum-exp over slices of it, in both directions.

Logits of a 257,152-wide head are 1 MB a token, twice that with their softmax and again with its gradient. Here only one
slice of them exists at a time: the forward pass carries the log-sum-exp and the arg max from slice to slice, the
backward pass computes each slice's logits once more (a quarter of the work of the whole) and writes that slice of the
table's gradient. Sliced along the vocabulary, not along the tokens: each row of the table is then read, and its
gradient written (and summed over devices), once.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int
import numpy as np

from openpi_ar.types import Array

SLICE = 2048
"""Columns of the vocabulary at a time. On a CPU 1024 to 4096 are equally fast, and a slice of logits stays in cache."""
AT_ONCE = 1 << 20
"""Logits that are few enough (4 MB) to be computed at once: 1.5 times as fast, and no loop carries the gradient."""


def token_losses(
    hidden: Float[Array, "n D"], table: Float[Array, "V D"], ids: Int[Array, " n"], *, columns: int | None = None
) -> tuple[Float[Array, " n"], Int[Array, " n"]]:
    """(cross-entropy, most likely id) of each row, from the head's input and its weight; ids are integer labels.

    The matmuls are in the dtype of `hidden`, everything after them float32. Of equal logits the first wins, as in
    `argmax`. Differentiable in `hidden` and `table`; a table that needs no gradient gets none computed. `columns` at a
    time, by default `SLICE`, or all if that makes no more than `AT_ONCE` logits.
    """
    if columns is None:
        columns = table.shape[0] if hidden.shape[0] * table.shape[0] <= AT_ONCE else SLICE
    return _token_losses(jnp.asarray(hidden), jnp.asarray(table), jnp.asarray(ids), columns)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _token_losses(hidden: jax.Array, table: jax.Array, ids: jax.Array, columns: int) -> tuple[jax.Array, jax.Array]:
    return _forward(hidden, table, ids, columns)[0]


def _forward(hidden: jax.Array, table: jax.Array, ids: jax.Array, columns: int) -> tuple[Any, Any]:
    rows = hidden.shape[0]

    def one(start: Any, size: int, carry: Any) -> Any:
        top, total, label, best = carry
        logits = _logits(hidden, _slice(table, start, size))
        here = logits.max(-1)
        new_top = jnp.maximum(top, here)
        total = total * jnp.exp(top - new_top) + jnp.exp(logits - new_top[:, None]).sum(-1)
        label += jnp.where(_is_label(ids, start, size), logits, 0.0).sum(-1)
        best = jnp.where(here > top, start + jnp.argmax(logits, axis=-1).astype(jnp.int32), best)
        return new_top, total, label, best

    zero = jnp.zeros(rows, jnp.float32)
    carry = (jnp.full(rows, -jnp.inf), zero, zero, jnp.zeros(rows, jnp.int32))
    top, total, label, best = _over_slices(one, table.shape[0], columns, carry)
    log_sum = top + jnp.log(total)
    return (log_sum - label, best), (hidden, table, ids, log_sum)


def _backward(columns: int, kept: Any, cotangents: Any) -> tuple[jax.Array, jax.Array, np.ndarray]:
    hidden, table, ids, log_sum = kept
    scale = cotangents[0][:, None]

    def one(start: Any, size: int, carry: Any) -> Any:
        d_hidden, d_table = carry
        weight = _slice(table, start, size).astype(hidden.dtype)
        probability = jnp.exp(_logits(hidden, weight) - log_sum[:, None])
        d_logits = ((probability - _is_label(ids, start, size)) * scale).astype(hidden.dtype)
        d_hidden += jnp.matmul(d_logits, weight, preferred_element_type=jnp.float32)
        d_weight = jnp.matmul(d_logits.T, hidden, preferred_element_type=jnp.float32)
        return d_hidden, jax.lax.dynamic_update_slice_in_dim(d_table, d_weight.astype(table.dtype), start, axis=0)

    carry = (jnp.zeros(hidden.shape, jnp.float32), jnp.zeros_like(table))
    d_hidden, d_table = _over_slices(one, table.shape[0], columns, carry)
    return d_hidden.astype(hidden.dtype), d_table, np.zeros(ids.shape, jax.dtypes.float0)


_token_losses.defvjp(_forward, _backward)


def _over_slices(one: Callable[[Any, int, Any], Any], vocab: int, columns: int, carry: Any) -> Any:
    """`carry = one(start, size, carry)` over the vocabulary; the last slice is what is left."""
    whole, rest = divmod(vocab, columns)
    # A trip count known at trace time makes this a scan, which drops what nobody uses (a frozen table's gradient).
    if whole:
        carry = jax.lax.fori_loop(0, whole, lambda i, c: one(i * columns, columns, c), carry)
    return one(whole * columns, rest, carry) if rest else carry


def _slice(table: jax.Array, start: Any, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(table, start, size, axis=0)


def _logits(hidden: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.einsum("nD,VD->nV", hidden, weight.astype(hidden.dtype), preferred_element_type=jnp.float32)


def _is_label(ids: jax.Array, start: Any, size: int) -> jax.Array:
    return ids[:, None] == start + jnp.arange(size, dtype=ids.dtype)
