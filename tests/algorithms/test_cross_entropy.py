"""If this fails, the text loss is not the cross-entropy of the whole vocabulary, or it holds all of it in memory
again."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openpi_ar.algorithms.cross_entropy import token_losses

ROWS, WIDTH = 6, 16


def setting(vocab: int, scale: float = 3.0):
    rng = np.random.default_rng(vocab)
    hidden = scale * rng.normal(size=(ROWS, WIDTH)).astype(np.float32)
    table = rng.normal(size=(vocab, WIDTH)).astype(np.float32)
    return hidden, table, rng.integers(0, vocab, ROWS).astype(np.int32), rng.normal(size=ROWS).astype(np.float32)


def by_hand(hidden, table, ids, weights):
    """Float64, one row at a time: losses, arg max, and gradients of sum(weights * losses)."""
    hidden, table = hidden.astype(np.float64), table.astype(np.float64)
    losses, best, d_hidden, d_table = [], [], np.zeros_like(hidden), np.zeros_like(table)
    for n in range(len(hidden)):
        logits = table @ hidden[n]
        p = np.exp(logits - logits.max())
        p /= p.sum()
        losses.append(-np.log(p[ids[n]]))
        best.append(int(logits.argmax()))
        d = p - (np.arange(len(table)) == ids[n])
        d_hidden[n] = weights[n] * d @ table
        d_table += weights[n] * np.outer(d, hidden[n])
    return np.array(losses), best, d_hidden, d_table


def ours(hidden, table, ids, weights, columns):
    def total(h, w):
        losses, best = token_losses(h, w, ids, columns=columns)
        return jnp.sum(losses * weights), (losses, best)

    (_, (losses, best)), grads = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(hidden, table)
    return losses, best.tolist(), *grads


@pytest.mark.parametrize(("vocab", "columns"), [(40, 8), (43, 8), (43, 100)], ids=["even", "rest", "one slice"])
def test_losses_and_gradients_against_float64(vocab, columns):
    args = setting(vocab)
    for a, b in zip(ours(*args, columns), by_hand(*args), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    # Negative control: a label off by one is noticed, also where it crosses into the next slice.
    hidden, table, ids, weights = args
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(ours(*args, columns)[0], by_hand(hidden, table, (ids + 1) % vocab, weights)[0])


def test_huge_logits_stay_finite_and_the_first_of_equals_wins():
    hidden, table, ids, weights = setting(40, scale=1e3)
    losses, _, *grads = ours(hidden, table, ids, weights, 8)
    assert all(np.isfinite(x).all() for x in (losses, *grads))
    same = np.ones((40, WIDTH), np.float32)
    assert ours(hidden, same, ids, weights, 8)[1] == [0] * ROWS


def test_bfloat16_activations_get_float32_losses():
    hidden, table, ids, weights = setting(43, scale=0.3)
    losses, _, d_hidden, d_table = ours(jnp.asarray(hidden, jnp.bfloat16), table, ids, weights, 8)
    want = by_hand(hidden, table, ids, weights)
    assert (losses.dtype, d_hidden.dtype, d_table.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(losses, want[0], atol=0.05)
    np.testing.assert_allclose(d_table, want[3], atol=0.05)


def buffers(function, *args) -> list[tuple[int, ...]]:
    """Shapes of all arrays in the compiled program."""
    text = jax.jit(function).lower(*args).compile().as_text()
    found = re.findall(r"\b(?:f32|bf16|f16|s32|pred)\[([\d,]+)\]", text)
    return [tuple(int(d) for d in shape.split(",")) for shape in set(found)]


def test_no_array_of_all_tokens_and_the_whole_vocabulary_is_ever_made():
    rows, vocab, columns = 96, 512, 64
    hidden, table = jnp.zeros((rows, WIDTH)), jnp.zeros((vocab, WIDTH))
    ids = jnp.zeros(rows, jnp.int32)

    def sliced(h, w):
        return token_losses(h, w, ids, columns=columns)[0].sum()

    def whole(h, w):
        return -jnp.take_along_axis(jax.nn.log_softmax(h @ w.T), ids[:, None], axis=1).sum()

    largest = lambda f: max(np.prod(s) for s in buffers(jax.value_and_grad(f, argnums=(0, 1)), hidden, table))
    assert largest(sliced) <= max(rows * columns, vocab * WIDTH)
    assert largest(whole) >= rows * vocab  # negative control: such an array would be seen


def test_frozen_table_gets_no_gradient_computed():
    hidden, table, ids, _ = setting(512)
    loss = lambda h, w: token_losses(h, w, ids, columns=64)[0].sum()

    def temporary(argnums) -> int:
        compiled = jax.jit(jax.grad(loss, argnums=argnums)).lower(hidden, table).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(0) < table.nbytes
    assert (512, WIDTH) in buffers(jax.grad(loss, argnums=1), hidden, table)
    text = jax.jit(jax.grad(loss)).lower(hidden, table).compile().as_text()
    # Each row of the table is read; nothing writes into an array of its shape.
    assert not re.search(r"f32\[512,16\]\S* (?:dynamic-update-slice|scatter|add)\(", text)
