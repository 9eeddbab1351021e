"""If this fails, texts that are known to be likely change what is generated, or do not save passes through the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openpi_ar.algorithms import generate as generating
from openpi_ar.algorithms.continuations import Continuations
from openpi_ar.algorithms.draft import as_draft
from openpi_ar.algorithms.sampling import row_keys
from openpi_ar.algorithms.trie import Trie
from tests.model_fixtures import (
    EOS,
    VOCAB,
    denoise,
    greedy,
    many_observations,
    max_diff,
    noise_for,
    prefill,
    rows,
    tiny_config,
    tiny_model,
)

ROWS, MOST = 24, 9
GREEDY = greedy(MOST)
generate = jax.jit(generating.generate, static_argnames=("block",))


@pytest.fixture(scope="module", params=["stacked", "fused"])
def setting(request):
    """(model, observations, prefill, plain greedy text, its cache); some rows end with EOS, some at their budget."""
    cfg = tiny_config()
    model, obs = tiny_model(cfg), many_observations(cfg, ROWS)
    out, cache = prefill(model, obs)
    free, _ = generate(model, cache, out.prompt_last, GREEDY)
    common = np.bincount(np.asarray(free.ids)[:, 3:].ravel(), minlength=VOCAB).argmax()
    table = model.embedder.table[...]
    model.embedder.table[...] = table.at[EOS].set(table[common] * 1.0001)
    model = model if request.param == "stacked" else model.for_inference()
    out, cache = prefill(model, obs)
    plain, after = generate(model, cache, out.prompt_last, GREEDY)
    lengths = np.asarray(plain.valid).sum(-1)
    assert lengths.min() < MOST == lengths.max() and (np.asarray(plain.ids)[lengths == MOST, -1] != EOS).any()
    return cfg, model, obs, (out, cache), plain, after


def texts_of(plain) -> list[list[int]]:
    return [ids[valid].tolist() for ids, valid in zip(np.asarray(plain.ids), np.asarray(plain.valid), strict=True)]


def random_table(rng: np.random.Generator, true: list[list[int]]) -> list[list[int]]:
    """True texts of some rows, whole, cut, changed, drawn out or put together, and some of nothing but noise."""
    texts = []
    for _ in range(rng.integers(0, ROWS + 1)):
        text = list(true[rng.integers(len(true))])
        change = rng.integers(5)
        if change == 0:
            text[rng.integers(len(text))] = int(rng.integers(2, VOCAB))
        elif change == 1:
            text = text[: rng.integers(len(text) + 1)]
        elif change == 2:
            text = [t for t in text if t != EOS] + rng.integers(2, VOCAB, 5).tolist()
        elif change == 3:
            text = rng.integers(2, VOCAB, rng.integers(1, 12)).tolist()
        texts.append(text)
    return texts


def same_text(a, b) -> None:
    np.testing.assert_array_equal(a.ids, b.ids)
    np.testing.assert_array_equal(a.valid, b.valid)
    assert max_diff(a.logprobs, b.logprobs) < 1e-4 and max_diff(a.margins, b.margins) < 1e-3


@pytest.mark.parametrize("block", [2, 5, 8])
def test_the_text_is_that_of_decoding_token_by_token_whatever_the_table(setting, block):
    cfg, model, obs, (out, cache), plain, after = setting
    rng, true = np.random.default_rng(block), texts_of(plain)
    for trial in range(40):
        table = Continuations.of(random_table(rng, true), 12, EOS, rows=ROWS)
        text, filled = generate(model, cache, out.prompt_last, GREEDY, continuations=table, block=block)
        same_text(text, plain)
        assert int(text.steps) <= int(plain.steps)
        np.testing.assert_array_equal(filled.next_pos, after.next_pos)
        if trial < 3:  # the actions read the same text
            args = (noise_for(cfg, batch=ROWS),)
            want = denoise(model, obs, after, *args, num_steps=2)
            assert max_diff(denoise(model, obs, filled, *args, num_steps=2), want) < 1e-4
    table = Continuations.of(true, 12, EOS, rows=ROWS)
    text, _ = generate(model, cache, out.prompt_last, GREEDY, continuations=table, block=block)
    assert int(text.steps) < int(plain.steps)  # control: with the right one there is something to check


def test_rows_alone_take_the_passes_that_their_table_leaves(setting):
    cfg, model, obs, _, plain, _ = setting
    true = texts_of(plain)
    for row in range(6):
        text = [t for t in true[row] if t != EOS]
        out, cache = prefill(model, rows(obs, slice(row, row + 1)))

        def passes(table: list[list[int]], block: int = 8, out=out, cache=cache, row=row) -> int:
            found, _ = generate(
                model,
                cache,
                out.prompt_last,
                GREEDY,
                continuations=Continuations.of(table, 12, EOS, rows=2),
                block=block,
            )
            assert np.asarray(found.ids)[0].tolist() == np.asarray(plain.ids)[row].tolist()
            return int(found.steps)

        alone = passes([])
        # One token comes from the prefill. Every token but EOS goes into the cache, eight with a pass at most.
        assert (alone, passes([text])) == (len(text), -(-len(text) // 8))
        assert passes([text], block=1) == alone
        if len(text) > 5:
            wrong = 9 if text[3] != 9 else 8
            assert passes([[*text[:3], wrong, wrong]]) < alone
            assert passes([[*text[:3], wrong], text]) < passes(
                [[*text[:3], wrong]]
            )  # the next text with this beginning
            assert passes([[*text[:2], wrong, *text[3:]]]) <= alone
    assert sum(len(text) > 6 for text in true[:6]) > 1


def test_a_draft_that_was_right_in_part_goes_on_from_the_table(setting):
    cfg, model, obs, _, plain, after = setting
    true = texts_of(plain)
    cut = np.where(np.arange(MOST) < 3, np.asarray(plain.ids), 7)
    draft = as_draft(cut, np.ones_like(cut, bool), GREEDY)
    out, cache = prefill(model, obs, draft)
    table = Continuations.of(true, 12, EOS, rows=ROWS)
    options = {"draft": draft, "draft_hidden": out.text}
    by_token, _ = generate(model, cache, out.prompt_last, GREEDY, **options)
    by_block, filled = generate(model, cache, out.prompt_last, GREEDY, **options, continuations=table)
    same_text(by_block, by_token)
    same_text(by_block, plain)
    assert int(by_block.steps) < int(by_token.steps)
    np.testing.assert_array_equal(filled.next_pos, after.next_pos)


def test_constraints_hold_within_a_block(setting):
    _, model, _, (out, cache), plain, _ = setting
    rng = np.random.default_rng(1)
    texts = [[*rng.integers(2, 6, rng.integers(2, 7)).tolist(), EOS] for _ in range(10)]
    listed = greedy(MOST, constraint=Trie.of(texts, VOCAB, EOS))
    want, _ = generate(model, cache, out.prompt_last, listed)
    for table in (texts, texts[::-1], texts_of(plain)):
        continuations = Continuations.of(table, 12, EOS, rows=ROWS)
        text, _ = generate(model, cache, out.prompt_last, listed, continuations=continuations)
        np.testing.assert_array_equal(text.ids, want.ids)
        finite = np.isfinite(np.asarray(want.margins))
        np.testing.assert_array_equal(np.isfinite(np.asarray(text.margins)), finite)
        assert max_diff(np.asarray(text.margins)[finite], np.asarray(want.margins)[finite]) < 1e-3
    assert int(
        generate(model, cache, out.prompt_last, listed, continuations=Continuations.of(texts, 12, EOS))[0].steps
    ) < int(want.steps)


def test_proposals_are_how_the_first_text_with_this_beginning_goes_on():
    table = Continuations.of([[5, 6, 7, EOS, 9], [5, 6], [5, 8, 7, 7, 7], []], 4, EOS)
    np.testing.assert_array_equal(table.valid.sum(-1), [3, 2, 4, 0])
    ids = jnp.array([[5, 6, 0, 0, 0], [5, 8, 0, 0, 0], [5, 6, 7, 0, 0], [6, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    tokens, proposed = table.propose(ids, jnp.array([2, 2, 3, 1, 0]), 3)
    np.testing.assert_array_equal(tokens, [[7, 0, 0], [7, 7, 0], [0, 0, 0], [0, 0, 0], [5, 6, 7]])
    np.testing.assert_array_equal(proposed, np.asarray(tokens) > 0)
    np.testing.assert_array_equal(table.propose(ids[:1], jnp.array([9]), 2)[1], [[False, False]])


def test_drawn_text_takes_no_proposals(setting):
    _, model, _, (out, cache), *_ = setting
    drawn = greedy(3, temperature=1.0)
    with pytest.raises(ValueError, match="greedy"):
        generating.generate(
            model,
            cache,
            out.prompt_last,
            drawn,
            keys=row_keys(jax.random.key(0), ROWS),
            continuations=Continuations.of([], 3, EOS),
        )
