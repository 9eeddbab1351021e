"""If this fails, the text and actions of inference are not those that the model was trained to give."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openpi_ar.algorithms import act as acting
from openpi_ar.algorithms.flow import Steps
from openpi_ar.algorithms.sampling import AllowedIds
from openpi_ar.models import family
from openpi_ar.types import Kind, Tokens
from tests.model_fixtures import (
    EOS,
    VOCAB,
    act,
    denoise,
    generate,
    greedy,
    max_diff,
    noise_for,
    prefill,
    ragged_batch,
    ragged_observation,
    rows,
    text_run,
    tiny_config,
    tiny_model,
    velocity,
)

# One forward in float32 through three blocks: two programs that differ in fusion and summation order only.
TOL = 2e-5


def settings(pi05=True):
    cfg = tiny_config(pi05=pi05)
    return cfg, tiny_model(cfg), ragged_observation(cfg)


def write(model, obs, max_new_tokens=6, allowed=None):
    out, cache = prefill(model, obs)
    constraint = None if allowed is None else AllowedIds(allowed)
    return generate(model, cache, out.prompt_last, greedy(max_new_tokens, constraint=constraint))


def as_text(generated) -> Tokens:
    ids, valid = np.asarray(generated.ids), np.asarray(generated.valid)
    return Tokens.of(ids, valid, kind=Kind.SUBTASK, causal=True, loss=True, hidden=ids == EOS)


@pytest.mark.parametrize("pi05", [True, False])
@pytest.mark.parametrize("form", ["stacked", "unstacked", "for_inference"])
def test_teacher_forced_equals_decoded(pi05, form):
    """Forcing the generated text through one prefill gives the same next-token choices, cache and velocity."""
    _, model, obs = settings(pi05)
    if form != "stacked":
        model = getattr(model, form)()
    text, cache = write(model, obs)
    out, forced_cache = prefill(model, obs, as_text(text))
    predicts = jnp.concatenate([out.prompt_last[:, None], out.text[:, :-1]], axis=1)
    again = jnp.argmax(model.logits(predicts), axis=-1)
    assert jnp.array_equal(jnp.where(text.valid, again, 0), text.ids)
    assert len({tuple(r) for r in np.asarray(text.ids).tolist()}) == 3  # the rows' texts really differ

    x_t, t = jax.random.normal(jax.random.key(5), (3, 4, 5)), jnp.array([0.2, 0.6, 1.0])
    v = velocity(model, obs, cache, x_t, t)
    assert max_diff(v, velocity(model, obs, forced_cache, x_t, t)) < TOL
    # control: the text matters to the actions, by far more than the tolerance
    assert max_diff(v, velocity(model, obs, prefill(model, obs)[1], x_t, t)) > 100 * TOL


def test_wrong_positions_would_be_seen():
    """Control of the test above: decoding one position late (openpi's off-by-one) moves the velocity."""
    _, model, obs = settings()
    text, _ = write(model, obs)
    _, right = prefill(model, obs, as_text(text))
    one = Tokens.of(np.zeros((3, 1), np.int32), kind=Kind.SUBTASK, causal=True, hidden=True)
    late = jax.tree.map(lambda pad, x: np.concatenate([pad, np.asarray(x)], axis=1), one, as_text(text))
    _, shifted = prefill(model, obs, late)
    x_t, t = jnp.zeros((3, 4, 5)), jnp.full((3,), 0.5)
    assert max_diff(velocity(model, obs, right, x_t, t), velocity(model, obs, shifted, x_t, t)) > 100 * TOL


def test_rows_stop_at_their_own_eos():
    """`done` accumulates: after a row's EOS come zeros, whatever the other rows still say."""
    _, model, obs = settings()
    free, _ = write(model, obs, max_new_tokens=5, allowed=np.arange(VOCAB) != EOS)
    # Make EOS win where row 1 would write its third token: teach the head that this id is EOS.
    third = int(free.ids[1, 2])
    model.embedder.table[...] = model.embedder.table[...].at[EOS].set(model.embedder.table[...][third] * 1.001)
    allowed = np.arange(VOCAB) != third
    text, cache = write(model, obs, max_new_tokens=5, allowed=allowed)
    lengths = np.asarray(text.valid).sum(-1)
    assert lengths.min() < lengths.max()
    for row, valid, n in zip(np.asarray(text.ids), np.asarray(text.valid), lengths, strict=True):
        assert valid[:n].all()
        assert not valid[n:].any()
        assert (row[n:] == 0).all()
        assert EOS not in row[: n - 1]
    # EOS is not written to the cache: only what the actions may see is.
    before = np.asarray(prefill(model, obs)[1].valid).sum(-1)
    spoken = (np.asarray(text.ids) != EOS) & np.asarray(text.valid)
    ended = (np.asarray(text.ids) == EOS).any(-1)
    assert np.asarray(cache.valid).sum(-1)[ended].tolist() == (before + spoken.sum(-1))[ended].tolist()


def test_the_budget_and_allowed_ids_are_obeyed():
    _, model, obs = settings()
    allowed = np.zeros(VOCAB, bool)
    allowed[[EOS, 7, 9]] = True
    text, _ = write(model, obs, max_new_tokens=3, allowed=allowed)
    assert text.ids.shape == (3, 3)
    assert set(np.asarray(text.ids)[np.asarray(text.valid)].tolist()) <= {EOS, 7, 9}
    one, cache = write(model, obs, max_new_tokens=1)
    assert one.ids.shape == (3, 1)
    # A text cut off at its first token is in the cache all the same: the actions see what was text.
    assert (cache.next_pos - prefill(model, obs)[1].next_pos).tolist() == [int(i != EOS) for i in one.ids[:, 0]]


def test_later_target_tokens_move_earlier_states_by_exactly_zero():
    cfg, model, _ = settings()
    batch = ragged_batch(cfg)
    ids = np.asarray(batch.target.ids).copy()
    ids[0, 3] = (ids[0, 3] + 5) % VOCAB
    run = lambda text: prefill(model, batch.observation, text)[0].hidden
    a, b = run(batch.target), run(dataclasses.replace(batch.target, ids=ids))
    start = a.shape[1] - ids.shape[1]
    assert max_diff(a[0, : start + 3], b[0, : start + 3]) == 0.0
    assert max_diff(a[1:], b[1:]) == 0.0
    assert max_diff(a[0, start + 3], b[0, start + 3]) > 0.01
    # control: were the target bidirectional, the prompt itself would see the change
    leaky = dataclasses.replace(batch.target, causal=np.zeros_like(ids, dtype=bool))
    c, d = run(leaky), run(dataclasses.replace(leaky, ids=ids))
    assert max_diff(c[0, : start + 3], d[0, : start + 3]) > 1e-3


@pytest.mark.parametrize("pi05", [True, False])
def test_padding_and_masked_cameras_change_nothing(pi05):
    cfg, model, obs = settings(pi05)
    run = lambda o: act(model, o, noise_for(cfg), greedy(5), num_steps=3)
    images = np.array(obs.images)
    images[1, 0] = 0.77
    ids = np.where(obs.prompt.valid, obs.prompt.ids, 42)
    junk = dataclasses.replace(obs, images=images, prompt=dataclasses.replace(obs.prompt, ids=ids.astype(np.int32)))
    a, b = run(obs), run(junk)
    assert jnp.array_equal(a.text.ids, b.text.ids)
    assert max_diff(a.actions, b.actions) == 0.0
    seen = np.array(obs.images)
    seen[0, 0] = 0.77  # control: the same change in a camera that is not masked
    assert max_diff(a.actions[0], run(dataclasses.replace(obs, images=seen)).actions[0]) > 1e-3


def test_more_padding_changes_nothing():
    """A longer prompt budget shifts slots, not positions."""
    cfg, model, obs = settings()
    p = obs.prompt
    wide = jax.tree.map(lambda x: np.pad(np.asarray(x), [(0, 0), (2, 3)]), p)
    a, b = (act(model, o, noise_for(cfg), greedy(5), num_steps=3) for o in (obs, dataclasses.replace(obs, prompt=wide)))
    assert jnp.array_equal(a.text.ids, b.text.ids)
    assert max_diff(a.actions, b.actions) < TOL


@pytest.mark.parametrize("pi05", [True, False])
def test_batch_of_three_equals_three_batches_of_one(pi05):
    _, model, obs = settings(pi05)
    text, cache = write(model, obs)
    noise = jax.random.normal(jax.random.key(9), (3, 4, 5))
    actions = denoise(model, obs, cache, noise, num_steps=4)
    for i in range(3):
        one = rows(obs, slice(i, i + 1))
        text_i, cache_i = write(model, one)
        assert text_i.ids.tolist() == text.ids[i : i + 1].tolist()
        alone = denoise(model, one, cache_i, noise[i : i + 1], num_steps=4)
        assert max_diff(alone, actions[i : i + 1]) < TOL


def test_hidden_tokens_are_invisible_to_the_actions():
    """Hidden text neither is read by the action tower nor shifts its positions."""
    cfg, model, obs = settings()
    batch = ragged_batch(cfg)
    everything = dataclasses.replace(batch.target, hidden=np.ones_like(batch.target.hidden))
    x_t, t = jax.random.normal(jax.random.key(5), (3, 4, 5)), jnp.full((3,), 0.4)
    plain = velocity(model, obs, prefill(model, obs)[1], x_t, t)
    masked = velocity(model, obs, prefill(model, obs, everything)[1], x_t, t)
    shown = velocity(model, obs, prefill(model, obs, batch.target)[1], x_t, t)
    assert max_diff(plain, masked) < TOL
    assert max_diff(plain, shown) > 100 * TOL


def test_denoise_is_euler_from_noise_to_data():
    _, model, obs = settings()
    _, cache = prefill(model, obs)
    noise = jax.random.normal(jax.random.key(2), (3, 4, 5))
    x = noise
    for t in (1.0, 0.75, 0.5, 0.25):
        x = x - 0.25 * velocity(model, obs, cache, x, jnp.full((3,), t))
    assert max_diff(x, denoise(model, obs, cache, noise, num_steps=4)) < TOL
    assert max_diff(x, denoise(model, obs, cache, noise, num_steps=8)) > 100 * TOL


def by_hand(model, obs, cache, x, times, heun=False):
    """The flow followed with a velocity at a time."""
    v = lambda x, t: velocity(model, obs, cache, x, jnp.full((3,), float(t)))
    for t, after in itertools.pairwise(times):
        slope = v(x, t)
        if heun:
            slope = (slope + v(x - (t - after) * slope, after)) / 2
        x = x - (t - after) * slope
    return x


def test_heun_and_unequal_steps_are_those_of_the_formula():
    _, model, obs = settings()
    _, cache = prefill(model, obs)
    noise = jax.random.normal(jax.random.key(2), (3, 4, 5))
    run = lambda **how: denoise(model, obs, cache, noise, num_steps=Steps(4, **how))
    equal, shifted = (1, 0.75, 0.5, 0.25, 0), (1, 0.9, 0.75, 0.5, 0)  # 3 t / (1 + 2 t)
    assert max_diff(run(), by_hand(model, obs, cache, noise, equal)) < TOL
    assert max_diff(run(shift=3.0), by_hand(model, obs, cache, noise, shifted)) < TOL
    assert max_diff(run(method="heun"), by_hand(model, obs, cache, noise, equal, heun=True)) < TOL
    assert max_diff(run(method="heun", shift=3.0), by_hand(model, obs, cache, noise, shifted, heun=True)) < TOL
    assert min(max_diff(run(), run(shift=3.0)), max_diff(run(), run(method="heun"))) > 100 * TOL  # control


def test_equal_steps_are_openpis_and_end_at_the_actions():
    for n in (1, 3, 10):
        times = Steps(n).times()
        assert times[0] == 1 and times[-1] == 0 and (np.diff(times) < 0).all() and len(times) == n + 1
        np.testing.assert_allclose(Steps(n, shift=2.5).sizes().sum(), 1, rtol=1e-6)
    for wrong in ({"num": 0}, {"shift": 0.0}, {"shift": float("nan")}):
        with pytest.raises(ValueError, match="1 step or more"):
            Steps(**wrong)


def test_act_with_given_text_follows_it():
    cfg, model, obs = settings()
    rng = np.random.default_rng(0)
    one, other = (text_run(rng.integers(2, VOCAB, (3, 4)), [4, 2, 3], causal=True) for _ in range(2))
    a, b = (act(model, obs, noise_for(cfg), greedy(4), text=text, num_steps=3) for text in (one, other))
    assert jnp.array_equal(a.text.ids, one.ids)
    assert max_diff(a.actions, b.actions) > 1e-3
    silent = act(model, obs, noise_for(cfg), greedy(0), num_steps=3)
    assert silent.text.ids.shape == (3, 0)


def test_stages_run_apart_are_the_same_composition():
    """What times the stages gets the functions that the one program is made of: same names, order and numbers."""
    cfg, model, obs = settings()
    names, programs = [], {}

    def apart(name, function, *arguments):
        names.append(name)
        return programs.setdefault(name, jax.jit(function))(*arguments)

    whole = act(model, obs, noise_for(cfg), greedy(4), num_steps=3)
    staged = acting.act(model, obs, noise_for(cfg), greedy(4), num_steps=3, run=apart)
    assert names == [name for name in acting.STAGES if name != "reprompt"]
    assert jnp.array_equal(staged.text.ids, whole.text.ids)
    assert max_diff(staged.actions, whole.actions) < TOL
    other = acting.act(model, obs, noise_for(cfg, seed=1), greedy(4), num_steps=3, run=apart)  # control
    assert max_diff(other.actions, whole.actions) > 100 * TOL


def test_a_guide_that_returns_the_velocity_changes_nothing():
    """Control: one that holds the first step of the chunk to a target reaches it, by gradients through the model."""
    cfg, model, obs = settings()
    _, cache = prefill(model, obs)
    noise = noise_for(cfg)
    plain = denoise(model, obs, cache, noise, num_steps=4)
    assert max_diff(plain, denoise(model, obs, cache, noise, num_steps=4, guide=lambda v, t, x: v(x))) == 0.0

    def towards(velocity, t, x):
        def miss(x):
            v = velocity(x)
            return jnp.square((x - t * v)[:, 0] - 0.5).sum(), v

        return jnp.add(*(jax.grad(miss, has_aux=True)(x)))

    guided = denoise(model, obs, cache, noise, num_steps=4, guide=towards)
    assert np.abs(guided[:, 0] - 0.5).mean() < 0.9 * np.abs(plain[:, 0] - 0.5).mean()


def test_a_bfloat16_table_is_copied_once_on_a_cpu():
    """XLA:CPU multiplies bfloat16 by way of float32 copies, one for each form of product: at full size 2 GB each."""
    cfg = tiny_config(vocab_size=60_000, dtype="bfloat16")
    model = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16), family.abstract(cfg))
    arguments = (model, rows(ragged_observation(cfg), slice(0, 1)), noise_for(cfg, batch=1), greedy(4))
    temporaries = act.lower(*arguments, num_steps=2).compile().memory_analysis().temp_size_in_bytes
    table, logits = (4 * 60_000 * n for n in (cfg.vlm.width, 1))
    assert temporaries < 1.5 * table + 6 * logits
