"""If this fails, the next token is not the likeliest one, its probability is wrong, or rows go through the head that
nobody needs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openpi_ar.algorithms import generate as generating
from openpi_ar.algorithms.choice import likeliest
from openpi_ar.algorithms.draft import as_draft
from openpi_ar.algorithms.trie import Trie
from openpi_ar.models.paligemma import PaliGemma
from tests.model_fixtures import (
    EOS,
    VOCAB,
    greedy,
    many_observations,
    max_diff,
    prefill,
    tiny_config,
    tiny_model,
)

MOST = 9
TEXTS = [[5, 9, 20, 21, 22, 23, EOS], [5, 9, 20, 31, 32, 33, 34, EOS], [5, 7, EOS]]


@pytest.fixture(scope="module")
def setting():
    cfg = tiny_config()
    return tiny_model(cfg).for_inference(), many_observations(cfg, 6)


@pytest.fixture
def through_head(monkeypatch):
    """Rows of each product with the whole vocabulary, as programs run that are traced from here on."""
    seen, right = [], PaliGemma.logits

    def logits(self, hidden):
        jax.debug.callback(lambda: seen.append(hidden.reshape(-1, hidden.shape[-1]).shape[0]), ordered=True)
        return right(self, hidden)

    monkeypatch.setattr(PaliGemma, "logits", logits)
    return seen


def run(model, obs, sampling, draft=None, **options):
    """Decodes in a program of its own: what is traced under a patch serves no other test."""
    known = None if draft is None else as_draft(*draft, sampling)
    out, cache = prefill(model, obs, known)
    more = {} if draft is None else {"draft": known, "draft_hidden": out.text}
    decode = jax.jit(
        lambda model, cache, last, more: generating.generate(model, cache, last, sampling, **more, **options)
    )
    text, _ = decode(model, cache, out.prompt_last, more)
    jax.effects_barrier()
    return text


@pytest.mark.parametrize("width", [1, 2, 64, 97, 60 * 41])
def test_the_likeliest_id_and_how_sure_it_is_are_numpys(width):
    rng = np.random.default_rng(width)
    logits = rng.normal(size=(30, width)).astype(np.float32) * 3
    logits[:10] = np.round(logits[:10])  # ties
    logits[10:20][rng.random((10, width)) < 0.5] = -np.inf
    logits[20:22] = -np.inf
    logits[20, width // 2] = logits[21, width - 1] = 3.0  # one id is allowed
    logits[(logits == -np.inf).all(-1), 0] = 1.0
    got = jax.jit(likeliest)(logits)
    exact = logits.astype(np.float64)
    top = exact.max(-1, keepdims=True)
    np.testing.assert_array_equal(got.ids, logits.argmax(-1))  # the first of equals
    np.testing.assert_allclose(got.logprobs, -np.log(np.exp(exact - top).sum(-1)), atol=1e-5)
    rest = np.where(np.arange(width) == logits.argmax(-1)[:, None], -np.inf, exact).max(-1)
    np.testing.assert_allclose(got.margins, top[:, 0] - rest, atol=1e-6)
    assert np.isinf(got.margins[20:22]).all() and not np.asarray(got.logprobs)[20:22].any()
    broken = logits.copy()
    broken[0, width // 2] = np.nan
    assert np.isnan(likeliest(broken).logprobs[0])  # control: found by `confidence.check_finite`


def test_only_the_rows_of_a_draft_go_through_the_head(setting, through_head):
    model, obs = setting
    plain = run(model, obs, greedy(MOST))
    assert through_head == [6] * (MOST + 1)  # the first token, and one a pass
    ids, valid = np.asarray(plain.ids), np.asarray(plain.valid)
    # Rounded up to 1, 4 or 9 rows a row of the batch, all 54 at most.
    for lengths, rows in (
        ([0] * 6, 6),
        ([8, 0, 0, 0, 0, 0], 24),
        ([3] * 6, 24),
        ([3, 3, 3, 3, 3, 4], 54),
        ([9] * 6, 54),
    ):
        through_head.clear()
        draft = ids, valid & (np.arange(MOST) < np.asarray(lengths)[:, None])
        got = run(model, obs, greedy(MOST), draft)
        assert through_head[0] == rows
        assert through_head[1:] == [6] * int(got.steps)
        np.testing.assert_array_equal(got.ids, ids)
        assert max_diff(got.logprobs, plain.logprobs) < 1e-4 and max_diff(got.margins, plain.margins) < 1e-3


@dataclasses.dataclass(frozen=True)
class Masked:
    """The same texts, but a constraint that can only tell what is allowed: all logits are computed."""

    trie: Trie

    def init(self, batch: int):
        return self.trie.init(batch)

    def mask(self, state):
        return self.trie.mask(state)

    def advance(self, state, token):
        return self.trie.advance(state, token)


def test_where_few_ids_are_allowed_no_others_are_computed_and_forced_stretches_take_one_pass(setting, through_head):
    model, obs = setting
    trie = Trie.of(TEXTS, VOCAB, EOS)
    plain = run(model, obs, greedy(MOST, constraint=Masked(trie)))
    assert through_head == [6] * (int(plain.steps) + 1)
    through_head.clear()
    lengths = np.asarray(plain.valid).sum(-1)
    assert lengths.max() > 6, "no row writes a long text"
    passes = {}
    for block in (1, 3, 8):
        text = run(model, obs, greedy(MOST, constraint=trie), block=block)
        np.testing.assert_array_equal(text.ids, plain.ids)
        np.testing.assert_array_equal(text.valid, plain.valid)
        assert max_diff(text.logprobs, plain.logprobs) < 1e-4
        np.testing.assert_array_equal(np.isinf(text.margins), np.isinf(plain.margins))
        passes[block] = int(text.steps)
    assert through_head == []
    # 5 and a choice, 9 20 and a choice, and the rest: three passes in place of one a token.
    assert passes[1] == int(plain.steps) and passes[8] == 3 < passes[3] < passes[1]
    right = run(model, obs, greedy(MOST, constraint=trie), (np.asarray(plain.ids), np.asarray(plain.valid)))
    assert through_head == [] and int(right.steps) == 0
    np.testing.assert_array_equal(right.ids, plain.ids)


def test_a_tries_lists_are_what_its_texts_say():
    trie = Trie.of([*TEXTS, [40, EOS]], VOCAB, EOS)
    beginnings = {tuple(text[:n]) for text in [*TEXTS, [40, EOS]] for n in range(len(text) + 1)} | {(5, 40), (EOS,)}
    for begin in sorted(beginnings):
        following = {
            text[len(begin)]
            for text in [*TEXTS, [40, EOS]]
            if (*text[: len(begin)],) == begin and len(text) > len(begin)
        }
        state = trie.init(2)
        for token in begin:
            state = trie.advance(state, jnp.full((2,), token))
        ids, allowed = trie.candidates(state)
        assert set(ids[0][allowed[0]].tolist()) == (following or {EOS})
        assert set(np.flatnonzero(trie.mask(state)[1]).tolist()) == (following or {EOS})
        forced, only = trie.forced(state, 4)
        want, rest = [], list(begin)
        while len(following) == 1 and following != {EOS} and len(want) < 4:
            want.append(following.pop())
            rest.append(want[-1])
            following = {text[len(rest)] for text in TEXTS if text[: len(rest)] == rest and len(text) > len(rest)}
        assert forced[0][only[0]].tolist() == want
        assert (np.asarray(only)[0, : len(want)]).all() and not np.asarray(only)[0, len(want) :].any()
