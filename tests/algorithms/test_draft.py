"""If this fails, a draft of the text changes the text, or does not save the decoding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openpi_ar.algorithms import act as acting
from openpi_ar.algorithms.draft import as_draft
from openpi_ar.algorithms.generate import generate
from openpi_ar.algorithms.prefill import prefill
from tests.model_fixtures import (
    EOS,
    VOCAB,
    act,
    greedy,
    many_observations,
    max_diff,
    noise_for,
    ragged_observation,
    rows,
    tiny_config,
    tiny_model,
)

ROWS, MOST = 192, 6
GREEDY = greedy(MOST)


@pytest.fixture(scope="module")
def plain():
    """(model, observations, what greedy decoding gives)."""
    cfg = tiny_config()
    model = tiny_model(cfg)
    # EOS ends some rows only: it takes the direction of a token that is written in many.
    obs = many_observations(cfg, ROWS)
    free = act(model, obs, noise_for(cfg, batch=ROWS), GREEDY, num_steps=2)
    common = np.bincount(np.asarray(free.text.ids)[:, 2:].ravel(), minlength=VOCAB).argmax()
    table = model.embedder.table[...]
    model.embedder.table[...] = table.at[EOS].set(table[common] * 1.0001)
    model = model.for_inference()
    out = act(model, obs, noise_for(cfg, batch=ROWS), GREEDY, num_steps=2)
    lengths = np.asarray(out.text.valid).sum(-1)
    assert len(set(lengths.tolist())) > 3 and len({tuple(r) for r in np.asarray(out.text.ids).tolist()}) > 20
    return model, obs, out


def make_drafts(
    kind: str, ids: np.ndarray, valid: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A draft of each row's text, as long as three more than the budget."""
    ids, valid = np.pad(ids, [(0, 0), (0, 3)]), np.pad(valid, [(0, 0), (0, 3)])
    lengths = valid.sum(-1)
    other = rng.integers(2, VOCAB, ids.shape).astype(np.int32)
    if kind == "empty":
        return ids, np.zeros_like(valid)
    if kind == "wrong somewhere":
        at = rng.integers(0, lengths)
        ids[np.arange(len(ids)), at] = (ids[np.arange(len(ids)), at] + rng.integers(1, VOCAB, len(ids))) % VOCAB
    if kind == "too long":
        ids, valid = np.where(valid, ids, other), np.ones_like(valid)
        ids[np.arange(len(ids)), lengths - 1] = np.where(lengths < MOST, other[:, 0], ids[:, MOST - 1])
    if kind == "too short":
        valid &= np.arange(ids.shape[1]) < rng.integers(0, lengths + 1)[:, None]
    if kind == "another row's":
        turn = rng.permutation(len(ids))
        ids, valid = ids[turn], valid[turn]
    if kind == "noise":
        ids, valid = other, rng.random(valid.shape) < 0.8
    if kind == "mixed":
        pick = rng.integers(0, 5, len(ids))[:, None]
        true = ids[:, :MOST].copy(), valid[:, :MOST].copy()
        for i, k in enumerate(("empty", "wrong somewhere", "too long", "too short")):
            a, b = make_drafts(k, true[0].copy(), true[1].copy(), rng)
            ids, valid = np.where(pick == i, a, ids), np.where(pick == i, b, valid)
    return ids, valid


def agreed(draft, valid, ids, written) -> np.ndarray:
    """How many tokens before EOS the draft has right, per row; by a loop."""
    counts = []
    for g, v, i, s in zip(draft, valid, ids, written, strict=True):
        n = 0
        while n < MOST and v[n] and s[n] and g[n] == i[n] != EOS:
            n += 1
        counts.append(n)
    return np.array(counts)


KINDS = ("right", "wrong somewhere", "too long", "too short", "empty", "another row's", "noise", "mixed")


@pytest.mark.parametrize("kind", KINDS)
def test_any_draft_gives_the_greedy_text(plain, kind):
    """3 x 192 drafts of each kind: 4,608 in all. The number of steps is what the least lucky row needs."""
    model, obs, out = plain
    ids, valid = np.asarray(out.text.ids), np.asarray(out.text.valid)
    ended = (ids == EOS).any(-1)
    for seed in range(3):
        draft = make_drafts(kind, ids.copy(), valid.copy(), np.random.default_rng(seed))
        got = act(model, obs, noise_for(model.cfg, batch=ROWS), GREEDY, num_steps=2, draft=draft)
        np.testing.assert_array_equal(got.text.ids, ids)
        np.testing.assert_array_equal(got.text.valid, valid)
        assert max_diff(got.actions, out.actions) < 1e-4
        right = agreed(*draft, ids, valid)
        needed = np.where(ended, valid.sum(-1) - 1, MOST) - right
        assert int(got.text.steps) == needed.max()
    if kind == "right":
        assert int(got.text.steps) == 0
    if kind == "empty":
        assert int(got.text.steps) == int(out.text.steps) == MOST
    if kind == "wrong somewhere":
        assert set(right.tolist()) >= set(range(4))  # every position had its turn


def test_the_cache_holds_the_generated_text_and_nothing_else(plain):
    """After a wrong draft: as many positions, the same visible keys; a rejected token is a hole."""
    model, obs, out = plain
    few = rows(obs, slice(0, 16))
    ids, valid = np.asarray(out.text.ids)[:16], np.asarray(out.text.valid)[:16]
    draft = make_drafts("wrong somewhere", ids.copy(), valid.copy(), np.random.default_rng(0))

    def run(model, obs, draft):
        tokens = None if draft is None else as_draft(*draft, GREEDY)
        first, cache = prefill(model, obs, tokens, last_only=True)
        return generate(model, cache, first.prompt_last, GREEDY, draft=tokens, draft_hidden=first.text)[1]

    a, b = jax.jit(run)(model, few, None), jax.jit(run)(model, few, draft)
    assert jnp.array_equal(a.next_pos, b.next_pos)
    a, b = jax.tree.map(np.asarray, (a, b))  # ragged slices on the device would each be a program
    for row in range(16):
        for x, y in zip(a.keys_values, b.keys_values, strict=True):
            assert max_diff(x[:, row][:, a.valid[row]], y[:, row][:, b.valid[row]]) < 1e-4


def test_a_draft_needs_greedy_decoding(plain):
    model, obs, out = plain
    with pytest.raises(ValueError, match="greedy"):
        drawn = dataclasses.replace(GREEDY, temperature=0.5)
        acting.act(
            model, obs, noise_for(model.cfg, batch=ROWS), drawn, draft=(out.text.ids, out.text.valid), num_steps=2
        )


def test_plain_layers_take_drafts_too(plain):
    """The stacked form (used between training steps) checks drafts by the same code."""
    cfg = tiny_config()
    model, obs = tiny_model(cfg), ragged_observation(cfg)
    out = act(model, obs, noise_for(cfg), GREEDY, num_steps=2)
    got = act(model, obs, noise_for(cfg), GREEDY, num_steps=2, draft=(out.text.ids, out.text.valid))
    assert int(got.text.steps) == 0
    assert jnp.array_equal(got.text.ids, out.text.ids)
    assert max_diff(got.actions, out.actions) < 1e-4
