"""If this fails, training minimises something other than 10 x flow matching + cross-entropy of each kind of token."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openpi_ar.algorithms import losses
from openpi_ar.algorithms.losses import _TEXT, sample_time
from openpi_ar.config import LossConfig
from openpi_ar.types import Batch, Kind, Tokens
from tests.model_fixtures import (
    VOCAB,
    compute_loss,
    flow_loss,
    prefill,
    ragged_batch,
    ragged_observation,
    text_loss,
    tiny_config,
    tiny_model,
    velocity,
)

flow_error = jax.jit(losses.flow_error)


def setting(pi05=True):
    cfg = tiny_config(pi05=pi05)
    return cfg, tiny_model(cfg), ragged_batch(cfg)


def test_text_loss_against_a_loop_in_float64():
    _, model, batch = setting()
    out, _ = prefill(model, batch.observation, batch.target)
    ce, metrics = text_loss(model, out.prompt_last, out.text, batch.target)
    hidden, table = np.asarray(out.hidden, np.float64), np.asarray(model.embedder.table[...], np.float64)
    start = hidden.shape[1] - batch.target.ids.shape[1]
    prompt = np.asarray(batch.observation.prompt.valid)
    losses, hits = [], []
    for b in range(3):
        row = start - prompt.shape[1] + np.flatnonzero(prompt[b])[-1]  # the last valid prompt token predicts first
        right = []
        for i in np.flatnonzero(batch.target.valid[b]):
            logits = table @ hidden[b, row]
            losses.append(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[batch.target.ids[b, i]])
            right.append(logits.argmax() == batch.target.ids[b, i])
            row = start + i
        hits.append(right)
    assert abs(float(ce) - np.mean(losses)) < 1e-5
    assert float(metrics["subtask_exact_match"]) == np.mean([all(h) for h in hits])
    assert float(metrics["subtask_first_token"]) == np.mean([h[0] for h in hits])
    assert len(losses) == 11  # 5 + 2 + 4: padding is not scored


def with_hole(target: Tokens, at: int) -> Tokens:
    """The same tokens with one more slot, invalid, before slot `at`."""

    def widened(x):
        return np.insert(np.asarray(x), at, 0, axis=1)

    return jax.tree.map(widened, target)


def test_a_token_is_predicted_by_the_valid_one_before_it_whatever_padding_is_between():
    _, model, batch = setting()
    holed = with_hole(with_hole(batch.target, 2), 0)  # before the first token and within the text
    results = []
    for target in (batch.target, holed):
        out, _ = prefill(model, batch.observation, target)
        results.append((out, *text_loss(model, out.prompt_last, out.text, target)))
    (_, packed, m), (out, ce, n) = results
    assert abs(float(packed) - float(ce)) < 1e-5
    assert all(abs(float(m[name]) - float(n[name])) < 1e-5 for name in m)
    # What stands in holes predicts nothing; the last valid token before a hole does.
    gradient = jax.grad(lambda hidden: losses.text_loss(model, out.prompt_last, hidden, holed)[0])(out.text)
    size = np.abs(np.asarray(gradient)).max(-1)
    assert not size[~np.asarray(holed.valid)].any()
    assert holed.valid[0].tolist() == [False, True, True, False, True, True, True, False]
    assert (size[0] > 1e-5).tolist() == [False, True, True, False, True, True, False, False]  # EOS predicts nothing
    # Negative control: each slot predicting the next one is another loss.
    naive = jnp.concatenate([out.prompt_last[:, None], out.text[:, :-1]], axis=1)
    right = losses.predictors(out.prompt_last, out.text, jnp.asarray(holed.valid))
    assert np.abs(np.asarray(naive - right))[np.asarray(holed.valid)].max() > 0.1


def two_segments(batch: Batch) -> Batch:
    """Row 0: a subtask, then hidden action tokens; row 1: an answer; row 2: a subtask whose text is not supervised."""
    kind = np.full(batch.target.ids.shape, Kind.SUBTASK, np.int8)
    kind[0, 2:], kind[1] = Kind.ACTION, Kind.ANSWER
    loss = batch.target.valid & (np.arange(3) != 2)[:, None]
    hidden = batch.target.valid & ((kind == Kind.ACTION) | np.asarray(batch.target.hidden))
    return dataclasses.replace(
        batch, target=dataclasses.replace(batch.target, kind=kind, loss=loss, hidden=np.asarray(hidden))
    )


def test_each_kind_of_token_has_its_own_loss_and_weight():
    _, model, batch = setting()
    split = two_segments(batch)
    out, _ = prefill(model, split.observation, split.target)
    predicts = losses.predictors(out.prompt_last, out.text, jnp.asarray(split.target.valid))
    logp = jax.nn.log_softmax(model.logits(predicts))
    each = -np.take_along_axis(np.asarray(logp), np.asarray(split.target.ids)[..., None], axis=-1)[..., 0]
    want = {"subtask": each[0, :2].mean(), "action_token": each[0, 2:5].mean(), "answer": each[1, :2].mean()}
    _, m = compute_loss(model, split, jax.random.key(0), LossConfig(flow_draws=1))
    for kind, value in want.items():
        assert abs(float(m[f"{kind}_ce"]) - value) < 1e-5
    cfg = LossConfig(flow_draws=1, flow_weight=0.0, subtask_weight=2.0, answer_weight=3.0, action_token_weight=5.0)
    loss, _ = compute_loss(model, split, jax.random.key(0), cfg)
    assert abs(float(loss) - (2 * want["subtask"] + 3 * want["answer"] + 5 * want["action_token"])) < 1e-4
    counts = {name: float(n) for name, n in losses.batch_counts(split).metrics().items()}
    entries = float(np.sum(split.action_mask))
    assert counts == {"flow_count": entries, "subtask_count": 2, "answer_count": 2, "action_token_count": 3}


def test_hidden_action_tokens_hold_no_position_and_are_not_seen_by_the_actions():
    _, model, batch = setting()
    split = two_segments(batch)
    _, cache = prefill(model, split.observation, split.target)
    per_row = np.asarray(split.target.valid & ~np.asarray(split.target.hidden)).sum(1)
    assert per_row.tolist() == [2, 1, 3]  # two subtask tokens; an answer less its EOS; a subtask less its EOS
    _, prompt_only = prefill(model, split.observation)
    np.testing.assert_array_equal(np.asarray(cache.action_pos - prompt_only.action_pos), per_row)
    x, t = jnp.asarray(split.actions), jnp.full((3,), 0.5)

    def v(change):
        ids = np.asarray(split.target.ids).copy()
        ids[change] = (ids[change] + 1) % VOCAB
        target = dataclasses.replace(split.target, ids=ids)
        return np.asarray(velocity(model, split.observation, prefill(model, split.observation, target)[1], x, t))

    plain = v((0, slice(0, 0)))
    np.testing.assert_array_equal(v((0, slice(2, 5))), plain)
    assert np.abs(v((0, slice(1, 2))) - plain)[0].max() > 1e-4


def test_exact_match_and_first_token_differ_when_they_should():
    """Put the model's own choices in as targets, then spoil one late token of one row and the first of another."""
    _, model, batch = setting()
    ids = np.asarray(batch.target.ids).copy()
    for i in range(ids.shape[1]):  # teacher forcing is causal: fix the choices left to right
        out, _ = prefill(model, batch.observation, dataclasses.replace(batch.target, ids=ids))
        predicts = jnp.concatenate([out.prompt_last[:, None], out.text[:, :-1]], axis=1)
        ids[:, i] = np.asarray(jnp.argmax(model.logits(predicts), axis=-1))[:, i]
    ids = np.where(batch.target.valid, ids, 0)

    def scores(ids):
        target = dataclasses.replace(batch.target, ids=ids)
        out, _ = prefill(model, batch.observation, target)
        m = text_loss(model, out.prompt_last, out.text, target)[1]
        return round(float(m["subtask_exact_match"]), 4), round(float(m["subtask_first_token"]), 4)

    assert scores(ids) == (1.0, 1.0)
    late = ids.copy()
    late[0, 4] = (late[0, 4] + 1) % VOCAB
    assert scores(late) == (0.6667, 1.0)
    first = late.copy()
    first[1, 0] = (first[1, 0] + 1) % VOCAB
    assert scores(first) == (0.3333, 0.6667)


def test_flow_loss_against_one_draw_by_hand():
    _, model, batch = setting()
    _, cache = prefill(model, batch.observation, batch.target)
    key = jax.random.key(4)
    noise_key, time_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, (3, 2, *batch.actions.shape[1:]))
    t = sample_time(time_key, (3, 2))
    errors = []
    for e, s in ((noise[:, i], t[:, i]) for i in range(2)):
        x_t = s[:, None, None] * e + (1 - s[:, None, None]) * batch.actions
        v = velocity(model, batch.observation, cache, x_t, s)
        errors.append(np.square(np.asarray(v) - np.asarray(e - batch.actions))[batch.action_mask])
    got = float(flow_loss(model, batch, cache, key, draws=2))
    assert abs(got - np.mean(errors)) < 1e-5 * got


def test_masked_action_entries_do_not_count():
    _, model, batch = setting()
    other = np.where(batch.action_mask, batch.actions, 3.0).astype(np.float32)
    _, cache = prefill(model, batch.observation, batch.target)

    def errors(actions):
        """Squared error per entry, with fixed noise and time."""
        noise, t = jnp.ones((3, 1, *actions.shape[1:])), jnp.full((3, 1), 0.5)
        return flow_error(model, batch.observation, cache, jnp.asarray(actions), noise, t)[:, 0]

    # A masked entry still enters the noisy chunk, as padding does at inference, but its own error is not in the loss.
    want = np.asarray(errors(other))[batch.action_mask].mean()
    all_of_it = np.asarray(errors(other)).mean()
    assert abs(want - all_of_it) > 1e-2
    key = jax.random.key(4)
    noise_key, time_key = jax.random.split(key)
    noise, t = jax.random.normal(noise_key, (3, 1, *other.shape[1:])), sample_time(time_key, (3, 1))
    drawn = np.asarray(flow_error(model, batch.observation, cache, jnp.asarray(other), noise, t))[:, 0]
    got = float(flow_loss(model, dataclasses.replace(batch, actions=other), cache, key, draws=1))
    assert abs(got - drawn[batch.action_mask].mean()) < 1e-5 * got
    nothing = dataclasses.replace(batch, action_mask=np.zeros_like(batch.action_mask))
    assert float(flow_loss(model, nothing, cache, jax.random.key(0), draws=1)) == 0.0


def test_total_is_ten_flow_plus_text():
    _, model, batch = setting()
    loss, m = compute_loss(model, batch, jax.random.key(0), LossConfig(flow_draws=2))
    assert abs(float(loss) - (10 * float(m["flow"]) + float(m["subtask_ce"]))) < 1e-4
    half, _ = compute_loss(
        model, batch, jax.random.key(0), LossConfig(flow_draws=2, flow_weight=5.0, subtask_weight=0.5)
    )
    assert abs(float(loss) - 2 * float(half)) < 1e-4
    text = {f"{kind}_{name}" for kind in ("subtask", "answer", "action_token") for name in _TEXT}
    assert set(m) == {"loss", "flow", *text}


def test_reprompted_actions_see_their_own_prompt_and_images_and_no_text():
    cfg = tiny_config()
    model, batch = tiny_model(cfg), ragged_batch(cfg)
    own = ragged_observation(cfg, seed=9).prompt
    key, loss = jax.random.key(0), LossConfig(flow_draws=2)
    _, plain = compute_loss(model, batch, key, cfg=loss)
    _, got = compute_loss(model, dataclasses.replace(batch, action_prompt=own), key, cfg=loss)
    assert float(got["subtask_ce"]) == pytest.approx(float(plain["subtask_ce"]), rel=1e-6)
    silent = dataclasses.replace(batch.target, valid=np.zeros_like(batch.target.valid), loss=batch.target.loss & False)
    alone = Batch(dataclasses.replace(batch.observation, prompt=own), silent, batch.actions, batch.action_mask)
    want = compute_loss(model, alone, key, cfg=loss)[1]["flow"]
    assert float(got["flow"]) == pytest.approx(float(want), rel=1e-5)
    assert abs(float(got["flow"]) - float(plain["flow"])) > 1e-4  # control
    # Another target moves the flow loss by exactly nothing.
    other = dataclasses.replace(batch.target, ids=(batch.target.ids + 7) % VOCAB)
    _, moved = compute_loss(model, dataclasses.replace(batch, target=other, action_prompt=own), key, cfg=loss)
    assert float(moved["flow"]) == float(got["flow"]) and float(moved["subtask_ce"]) != float(got["subtask_ce"])


def test_more_draws_estimate_the_same_loss():
    _, model, batch = setting()
    _, cache = prefill(model, batch.observation, batch.target)
    many = float(flow_loss(model, batch, cache, jax.random.key(0), draws=400))
    singles = [float(flow_loss(model, batch, cache, jax.random.key(i), draws=1)) for i in range(1, 60)]
    assert abs(np.mean(singles) - many) < 4 * np.std(singles) / np.sqrt(len(singles))


def test_knowledge_insulation_stops_the_flow_gradient_at_the_cache():
    """With the text weight at zero, no gradient reaches tower 1; without insulation it does."""
    _, model, batch = setting()

    def norms(insulated):
        cfg = LossConfig(subtask_weight=0.0, flow_draws=1, knowledge_insulation=insulated)
        g = jax.jit(jax.grad(lambda m: losses.compute_loss(m, batch, jax.random.key(0), cfg)[0]))(model)
        size = lambda tree: max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(tree))
        return size((g.vlm, g.img, g.embedder)), size(g.expert)

    tower, expert = norms(True)
    assert tower == 0.0 and expert > 0.0
    assert norms(False)[0] > 1e-4


def test_unsupervised_text_gives_no_text_gradient_but_conditions_the_actions():
    _, model, batch = setting()
    off = dataclasses.replace(batch, target=dataclasses.replace(batch.target, loss=np.zeros_like(batch.target.loss)))
    _, m = compute_loss(model, off, jax.random.key(0), LossConfig(flow_draws=1))
    assert float(m["subtask_ce"]) == 0.0
    ids = (np.asarray(batch.target.ids) + 1) % VOCAB
    said = dataclasses.replace(off, target=dataclasses.replace(off.target, ids=ids))
    _, n = compute_loss(model, said, jax.random.key(0), LossConfig(flow_draws=1))
    assert abs(float(m["flow"]) - float(n["flow"])) > 1e-4


def test_sample_time_is_openpis_beta():
    t = np.asarray(sample_time(jax.random.key(0), (20_000,)))
    assert t.min() >= 0.001
    assert t.max() <= 1.0
    # Beta(1.5, 1): mean 0.6, second moment 1.5 / 3.5
    u = (t - 0.001) / 0.999
    assert abs(u.mean() - 0.6) < 0.01
    assert abs((u**2).mean() - 1.5 / 3.5) < 0.01
