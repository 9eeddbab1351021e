"""If this fails, tokens are drawn from another distribution than was asked for, or a constraint is not kept."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from openpi_ar.algorithms.draft import as_draft
from openpi_ar.algorithms.sampling import AllowedIds, Sampling, log_probability, row_keys
from openpi_ar.types import Kind, Tokens
from tests.model_fixtures import (
    EOS,
    VOCAB,
    generate,
    greedy,
    max_diff,
    prefill,
    ragged_observation,
    rows,
    tiny_config,
    tiny_model,
)


def oracle(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Probabilities of one row: the ids from the most likely on, as many as both limits let through."""
    p = np.exp((logits - logits.max()) / temperature)
    order = np.argsort(-p, kind="stable")[: top_k or len(p)]
    p = p / p[order].sum()
    kept, total = [], 0.0
    for i in order:
        if total >= top_p:
            break
        kept.append(i)
        total += p[i]
    out = np.zeros_like(p)
    out[kept] = p[kept] / p[kept].sum()
    return out


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (1, 1.0), (5, 1.0), (0, 0.1), (0, 0.8), (7, 0.6), (99, 0.99)])
def test_filtered_logits_are_the_oracles_distribution(temperature, top_k, top_p):
    logits = np.random.default_rng(0).normal(size=(20, 40)) * 2
    logits[0] = 0.0
    logits[0, 3] = 9.0  # one id far ahead
    sampling = Sampling(EOS, 4, temperature=temperature, top_k=top_k, top_p=top_p)
    got = np.asarray(jax.nn.softmax(sampling.filtered(jnp.asarray(logits, jnp.float32)), axis=-1))
    want = np.stack([oracle(row, temperature, top_k, top_p) for row in logits[1:]])
    np.testing.assert_array_equal(got[1:] > 0, want > 0)
    np.testing.assert_allclose(got[1:], want, atol=1e-6)
    wrong = np.stack([oracle(row, temperature * 1.1, top_k, top_p) for row in logits[1:]])
    if (want > 0).sum(-1).max() > 1:
        assert np.abs(got[1:] - wrong).max() > 1e-4  # control
    assert got[0].argmax() == 3


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (12, 1.0), (0, 0.9), (12, 0.9)])
def test_draws_follow_the_filtered_distribution(top_k, top_p):
    """Pearson's chi-squared test at a false-alarm rate of 1e-6 for each case, over all keys; this key's draws are fixed."""
    logits, n, alarm = np.random.default_rng(1).normal(size=VOCAB) * 2, 20_000, 1e-6
    sampling = Sampling(EOS, 1, temperature=0.7, top_k=top_k, top_p=top_p)
    drawn = sampling.choose(jnp.tile(jnp.asarray(logits, jnp.float32), (n, 1)), row_keys(jax.random.key(0), n))
    seen = np.bincount(np.asarray(drawn), minlength=VOCAB)

    def p_value(temperature: float) -> float:
        want = oracle(logits, temperature, top_k, top_p) * n
        assert seen[want == 0].sum() == 0
        common = want >= 5  # the rest as one class, as the test needs about five expected draws in each
        groups = [np.append(x[common], x[~common].sum()) for x in (seen, want)]
        kept = groups[1] > 0
        return float(chisquare(groups[0][kept], groups[1][kept]).pvalue)

    assert p_value(0.7) > alarm > p_value(0.75)


def test_options_out_of_range_and_missing_keys_are_refused():
    for wrong in ({"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(ValueError, match="temperature >= 0"):
            greedy(3, **wrong)
    with pytest.raises(ValueError, match="random key per row"):
        greedy(3, temperature=1.0).choose(jnp.zeros((2, VOCAB)), None)
    assert int(greedy(3, top_k=1, top_p=0.1).choose(jnp.arange(5.0)[None], None)[0]) == 4


# ----------------------------------------------------------------------------------------------------------------------
# in the decode loop
# ----------------------------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OneOf:
    """Only these texts [K T], each ended by EOS. Its state: which of them the row may still be in, and how far it
    is."""

    texts: jax.Array

    def init(self, batch: int):
        return jnp.ones((batch, len(self.texts)), bool), jnp.zeros((batch,), jnp.int32)

    def mask(self, state):
        following = jax.nn.one_hot(self._next(state), VOCAB, dtype=bool)  # [B K V]
        return (following & state[0][..., None]).any(1)

    def advance(self, state, token):
        return state[0] & (self._next(state) == token[:, None]), state[1] + 1

    def _next(self, state):
        return self.texts.T[jnp.minimum(state[1], self.texts.shape[1] - 1)]


TWO = OneOf(jnp.array([[5, 9, 9, EOS], [5, 7, EOS, EOS]]))


@pytest.fixture(scope="module", params=["stacked", "fused"])
def setting(request):
    cfg = tiny_config()
    model, obs = tiny_model(cfg), ragged_observation(cfg)
    return model if request.param == "stacked" else model.for_inference(), obs


def as_text(text) -> Tokens:
    ids, valid = np.asarray(text.ids), np.asarray(text.valid)
    return Tokens.of(ids, valid, kind=Kind.SUBTASK, causal=True, hidden=ids == EOS)


def forced_logits(model, obs, text) -> np.ndarray:
    """Logits that predict each token of the text, from one prefill with it."""
    out, _ = prefill(model, obs, as_text(text))
    return np.asarray(model.logits(jnp.concatenate([out.prompt_last[:, None], out.text[:, :-1]], axis=1)), np.float64)


def test_a_constraint_with_state_is_kept_in_the_loop_and_its_probabilities_are_the_models(setting):
    model, obs = setting
    out, cache = prefill(model, obs)
    text, _ = generate(model, cache, out.prompt_last, greedy(6, constraint=TWO))
    written = [ids[valid].tolist() for ids, valid in zip(np.asarray(text.ids), np.asarray(text.valid), strict=True)]
    assert all(ids in ([5, 9, 9, EOS], [5, 7, EOS]) for ids in written)
    free, _ = generate(model, cache, out.prompt_last, greedy(6))
    assert not any(free.ids[i, :2].tolist() in ([5, 9], [5, 7]) for i in range(3))  # control
    logits = forced_logits(model, obs, text)
    for row, ids in enumerate(written):  # of two ways at the second token, the likelier; elsewhere there is one
        nine, seven = logits[row, 1, 9], logits[row, 1, 7]
        assert ids[1] == (9 if nine > seven else 7)
        want = [0.0, -np.log1p(np.exp(-abs(nine - seven))), *[0.0] * (len(ids) - 2)]
        np.testing.assert_allclose(text.logprobs[row, : len(ids)], want, atol=1e-4)
    assert not np.asarray(text.logprobs)[~np.asarray(text.valid)].any()


def test_a_draft_under_a_constraint_with_state_is_checked_with_its_states(setting):
    model, obs = setting
    sampling = greedy(6, constraint=TWO)
    out, cache = prefill(model, obs)
    plain, _ = generate(model, cache, out.prompt_last, sampling)
    ids, valid = np.asarray(plain.ids), np.asarray(plain.valid)
    # Right, right up to the second token, and free text that the constraint forbids.
    ids = np.stack([ids[0], np.where(np.arange(6) == 1, 16 - ids[1], ids[1]), [40, 41, 42, 43, 44, 45]])
    draft = as_draft(ids, np.stack([valid[0], valid[1], np.ones(6, bool)]), sampling)
    out, cache = prefill(model, obs, draft)
    checked, _ = generate(model, cache, out.prompt_last, sampling, draft=draft, draft_hidden=out.text)
    np.testing.assert_array_equal(checked.ids, plain.ids)
    np.testing.assert_allclose(checked.logprobs, plain.logprobs, atol=1e-4)
    assert 0 < int(checked.steps) <= int(plain.steps)
    same = as_draft(plain.ids, plain.valid, sampling)
    out, cache = prefill(model, obs, same)
    again, _ = generate(model, cache, out.prompt_last, sampling, draft=same, draft_hidden=out.text)
    assert int(again.steps) == 0
    np.testing.assert_array_equal(again.ids, plain.ids)
    np.testing.assert_allclose(again.logprobs, plain.logprobs, atol=1e-4)


def test_log_probabilities_are_of_the_allowed_softmax_however_the_token_was_drawn(setting):
    model, obs = setting
    allowed = np.arange(VOCAB) % 2 == 1
    sampling = greedy(5, temperature=2.0, top_k=9, top_p=0.95, constraint=AllowedIds(allowed))
    out, cache = prefill(model, obs)
    text, _ = generate(model, cache, out.prompt_last, sampling, keys=row_keys(jax.random.key(0), 3))
    logits = jnp.where(allowed, forced_logits(model, obs, text), -jnp.inf)
    want = np.where(text.valid, log_probability(logits, text.ids), 0.0)
    assert max_diff(text.logprobs, want) < 1e-4
    assert max_diff(text.logprobs, np.where(text.valid, log_probability(logits / 2, text.ids), 0.0)) > 0.1  # control
    assert np.asarray(text.ids)[np.asarray(text.valid)].min() > 0 and len({tuple(r) for r in text.ids.tolist()}) == 3


def test_a_rows_text_depends_on_its_own_key_and_not_on_its_batch(setting):
    model, obs = setting
    sampling, keys = greedy(5, temperature=1.5), row_keys(jax.random.key(3), 3)
    out, cache = prefill(model, obs)
    together, _ = generate(model, cache, out.prompt_last, sampling, keys=keys)
    one = rows(obs, slice(1, 2))
    out, cache = prefill(model, one)
    alone, _ = generate(model, cache, out.prompt_last, sampling, keys=keys[1:2])
    assert alone.ids[0].tolist() == together.ids[1].tolist()
    other, _ = generate(model, cache, out.prompt_last, sampling, keys=keys[:1])
    assert other.ids[0].tolist() != alone.ids[0].tolist()
