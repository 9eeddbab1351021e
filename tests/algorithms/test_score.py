"""If this fails, a text outside a given list can be generated, or candidates get other probabilities than decoding
gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openpi_ar.algorithms.draft import as_draft
from openpi_ar.algorithms.sampling import AllowedIds, log_probability
from openpi_ar.algorithms.score import score
from openpi_ar.algorithms.trie import Trie
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

scored = jax.jit(score)


@pytest.fixture(scope="module", params=["stacked", "fused"])
def setting(request):
    cfg = tiny_config()
    model, obs = tiny_model(cfg), ragged_observation(cfg)
    return model if request.param == "stacked" else model.for_inference(), obs


def random_texts(seed: int, count: int = 12, longest: int = 5) -> list[list[int]]:
    """Texts over few ids, so that they share beginnings; some begin others."""
    rng = np.random.default_rng(seed)
    return [[*rng.integers(2, 6, rng.integers(1, longest)).tolist(), EOS] for _ in range(count)]


def as_tokens(texts: list[list[int]]) -> Tokens:
    ids = np.zeros((len(texts), max(map(len, texts))), np.int32)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = text
    valid = np.arange(ids.shape[1]) < np.array([len(text) for text in texts])[:, None]
    return Tokens.of(ids, valid, kind=Kind.SUBTASK, causal=True, hidden=ids == EOS)


def test_a_trie_allows_exactly_what_goes_on_as_one_of_its_texts():
    texts = random_texts(0, count=30)
    trie = Trie.of(texts, VOCAB, EOS)
    prefixes = sorted({tuple(text[:n]) for text in texts for n in range(len(text))})
    state = trie.init(len(prefixes))
    for step in range(max(map(len, prefixes))):
        token = jnp.array([p[step] if step < len(p) else -1 for p in prefixes])
        state = jnp.where(token >= 0, trie.advance(state, token), state)
    mask = np.asarray(trie.mask(state))
    for prefix, allowed in zip(prefixes, mask, strict=True):
        following = {text[len(prefix)] for text in texts if tuple(text[: len(prefix)]) == prefix}
        assert set(np.flatnonzero(allowed)) == following
    # Whoever has left the texts, by their end or by another token, can only end.
    left = trie.advance(trie.init(2), jnp.array([VOCAB - 1, EOS]))
    assert [np.flatnonzero(row).tolist() for row in np.asarray(trie.mask(trie.advance(left, jnp.array([2, 3]))))] == [
        [EOS]
    ] * 2
    for wrong in ([], [[]], [[3, EOS], [4]]):
        with pytest.raises(ValueError, match="texts that end with EOS"):
            Trie.of(wrong, VOCAB, EOS)


@pytest.mark.parametrize("seed", range(5))
def test_only_texts_of_the_list_come_out_each_token_the_likeliest_that_is_left(setting, seed):
    model, obs = setting
    texts = random_texts(seed)
    sampling = greedy(6, constraint=Trie.of(texts, VOCAB, EOS))
    out, cache = prefill(model, obs)
    text, _ = generate(model, cache, out.prompt_last, sampling)
    ids, valid = np.asarray(text.ids), np.asarray(text.valid)
    free, _ = generate(model, cache, out.prompt_last, greedy(6))
    for row in range(3):
        written = ids[row][valid[row]].tolist()
        assert written in texts
        logits = token_logits(model, rows(obs, slice(row, row + 1)), [written])[0]
        for step, token in enumerate(written):
            following = sorted({t[step] for t in texts if t[:step] == written[:step] and step < len(t)})
            assert token == following[np.argmax(logits[step][following])]
            rest = sorted(logits[step][following])
            np.testing.assert_allclose(text.margins[row, step], rest[-1] - rest[-2] if rest[1:] else np.inf, atol=1e-4)
        assert np.asarray(free.ids)[row][np.asarray(free.valid)[row]].tolist() != written  # control
    # A draft under the constraint gives the same, right or not.
    for drafted in (ids, np.roll(ids, 1, axis=0), np.full_like(ids, VOCAB - 1)):
        draft = as_draft(drafted, np.ones_like(valid), sampling)
        again, cache = prefill(model, obs, draft)
        checked, _ = generate(model, cache, again.prompt_last, sampling, draft=draft, draft_hidden=again.text)
        np.testing.assert_array_equal(checked.ids, text.ids)
        finite = np.isfinite(text.margins)
        np.testing.assert_array_equal(np.isfinite(checked.margins), finite)
        np.testing.assert_allclose(np.asarray(checked.margins)[finite], np.asarray(text.margins)[finite], atol=1e-4)


def token_logits(model, obs, texts: list[list[int]]) -> np.ndarray:
    """Logits that predict each token of each text, from prefills that end with it; float64 [N T V]."""
    tokens = as_tokens(texts)
    many = jax.tree.map(lambda a: np.repeat(np.asarray(a), len(texts), axis=0), obs)
    out, _ = prefill(model, many, tokens)
    hidden = jnp.concatenate([out.prompt_last[:, None], out.text[:, :-1]], axis=1)
    return np.asarray(model.logits(hidden), np.float64)


def test_scores_are_those_of_texts_prefilled_and_of_texts_decoded(setting):
    model, obs = setting
    texts = [*random_texts(7, count=20, longest=7), [EOS]]
    allowed = np.arange(VOCAB) != 40
    sampling = greedy(8, constraint=AllowedIds(allowed))
    for row in range(3):
        one = rows(obs, slice(row, row + 1))
        out, cache = prefill(model, one)
        tokens = as_tokens(texts)
        got = np.asarray(scored(model, cache, out.prompt_last, tokens, sampling))
        logits = np.where(allowed, token_logits(model, one, texts), -np.inf)
        want = np.where(tokens.valid, log_probability(jnp.asarray(logits), jnp.asarray(tokens.ids)), 0.0)
        np.testing.assert_allclose(got, want, atol=1e-4)  # float32 sums of another order
        assert np.abs(got - np.roll(want, 1, axis=0)).max() > 0.1  # control
        text, _ = generate(model, cache, out.prompt_last, sampling)
        ids = np.asarray(text.ids)[0][np.asarray(text.valid)[0]].tolist()
        alone = scored(model, cache, out.prompt_last, as_tokens([ids]), sampling)
        assert max_diff(alone[0], np.asarray(text.logprobs)[0, : len(ids)]) < 1e-4


def test_a_texts_score_does_not_depend_on_the_others(setting):
    model, obs = setting
    out, cache = prefill(model, rows(obs, slice(1, 2)))
    texts = random_texts(3, count=9)
    first = np.asarray(scored(model, cache, out.prompt_last, as_tokens(texts), greedy(8)))
    changed = [texts[0], *[[9 - token if token != EOS else EOS for token in text] for text in texts[1:]]]
    second = np.asarray(scored(model, cache, out.prompt_last, as_tokens(changed), greedy(8)))
    np.testing.assert_array_equal(first[0], second[0])
    assert np.abs(first[1:] - second[1:]).max() > 0.1  # control


def test_the_whole_list_and_its_complement_are_all_the_probability(setting):
    """Every text of up to two ids from a vocabulary of few, and those that go on: probabilities add up to 1."""
    model, obs = setting
    few = [EOS, 2, 3, 4]
    sampling = greedy(8, constraint=AllowedIds(np.isin(np.arange(VOCAB), few)))
    texts = [[EOS], *[[a, EOS] for a in few[1:]], *[[a, b] for a in few[1:] for b in few[1:]]]
    out, cache = prefill(model, rows(obs, slice(0, 1)))
    total = np.exp(
        np.asarray(scored(model, cache, out.prompt_last, as_tokens(texts), sampling), np.float64).sum(-1)
    ).sum()
    assert abs(total - 1) < 1e-5
