"""If this fails, an option that should only save time or memory changes what is learnt, or an augmentation does
damage."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import PRESETS
from openpi_ar.algorithms import losses
from openpi_ar.config import AugmentConfig, OptimizerConfig
from openpi_ar.data.augment import augment, with_mistakes
from openpi_ar.errors import UserError
from openpi_ar.models.vlm import Run
from openpi_ar.training import experiment
from openpi_ar.training import step as steps
from openpi_ar.training.optimizer import make_optimizer, stored_as
from openpi_ar.training.state import init_model
from openpi_ar.training.step import accumulated_gradients
from openpi_ar.types import Batch, Kind
from tests.model_fixtures import compute_loss, ragged_batch, rows, tiny_config, tiny_model

DEBUG = PRESETS["debug"]
# The gradient is of the text part alone, which does not depend on noise; the metrics are of both.
CFG = dataclasses.replace(
    DEBUG, model=tiny_config(), batch_size=6, loss=dataclasses.replace(DEBUG.loss, flow_weight=0.0)
)
# One function for all tests: equal configs share one compilation.
gradients = jax.jit(accumulated_gradients, static_argnames="cfg")


def with_optimizer(**changes):
    return dataclasses.replace(CFG, optimizer=dataclasses.replace(CFG.optimizer, **changes))


def six_rows() -> Batch:
    """Rows whose supervised tokens and action entries differ in number, so that a mean of means would be wrong."""
    a, b = ragged_batch(CFG.model, 0), ragged_batch(CFG.model, 1)
    both = jax.tree.map(lambda x, y: np.concatenate([x, y]), a, b)
    assert isinstance(both, Batch)
    silent = np.arange(6)[:, None] != 4
    return dataclasses.replace(both, target=dataclasses.replace(both.target, loss=both.target.loss & silent))


@pytest.mark.slow
def test_accumulated_slices_weigh_every_token_and_entry_alike():
    cfg, model, batch, key = with_optimizer(accumulate=3), tiny_model(CFG.model), six_rows(), jax.random.key(7)
    sliced, metrics = gradients(model, model, batch, key, cfg=cfg)
    # By hand: sums over slices divided by the counts of the whole.
    tokens, entries, text, flow, counts = 0.0, 0.0, 0.0, 0.0, []
    for i, k in enumerate(jax.random.split(key, 3)):
        part = rows(batch, np.arange(i, 6, 3))
        scored, acted = float((part.target.loss & part.target.valid).sum()), float(part.action_mask.sum())
        _, m = compute_loss(model, part, k, cfg.loss)
        tokens, entries = tokens + scored, entries + acted
        text, flow = text + scored * float(m["subtask_ce"]), flow + acted * float(m["flow"])
        counts.append(scored)
    np.testing.assert_allclose(float(metrics["subtask_ce"]), text / tokens, rtol=1e-5)
    np.testing.assert_allclose(float(metrics["flow"]), flow / entries, rtol=1e-5)
    assert len(set(counts)) > 1
    # One slice of everything is a plain gradient.
    whole, _ = gradients(model, model, batch, key, cfg=CFG)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), sliced, whole)
    assert max(float(np.abs(np.asarray(x)).max()) for x in jax.tree.leaves(sliced)) > 1e-2


@pytest.mark.parametrize(
    ("batch_size", "changes", "words"),
    [
        (6, {"accumulate": 4}, "batch_size 6 does not divide into optimizer.accumulate 4"),
        (6, {"accumulate": 0}, "accumulate 0"),
        (6, {"moment_dtype": "bfloat16", "b2": 0.999}, "b2 0.99 or less"),
    ],
)
def test_options_that_cannot_work_are_refused(batch_size, changes, words):
    cfg = with_optimizer(**changes)
    with pytest.raises(UserError, match=words):
        experiment.check_config(dataclasses.replace(cfg, batch_size=batch_size))


def test_bfloat16_moments_follow_float32_ones():
    """On a noisy quadratic: the same path within a few percent, and a second moment that comes down again."""
    cfg = OptimizerConfig(peak_lr=3e-2, final_lr=3e-3, warmup_steps=10, b2=0.99, weight_decay=0.0)
    noise = jax.random.normal(jax.random.key(0), (400, 64))

    def run(dtype: str):
        tx = make_optimizer(dataclasses.replace(cfg, moment_dtype=dtype), 400)
        target = jnp.linspace(-1.0, 1.0, 64)

        def one(carry, e):
            x, state = carry
            updates, state = tx.update(x - target + 0.1 * e, state, x)
            x = optax.apply_updates(x, updates)
            return (x, state), jnp.abs(x - target).mean()

        (_, state), errors = jax.lax.scan(one, (jnp.zeros(64), tx.init(jnp.zeros(64))), noise)
        adam = next(s for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "nu")) if hasattr(s, "nu"))
        return np.asarray(errors), adam

    (a, wide), (b, narrow) = run("float32"), run("bfloat16")
    assert (narrow.mu.dtype, narrow.nu.dtype, narrow.count.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.int32)
    assert a[-1] < 0.1 * a[0]
    np.testing.assert_allclose(b[-50:].mean(), a[-50:].mean(), rtol=0.15)
    np.testing.assert_allclose(narrow.nu.astype(jnp.float32).mean(), wide.nu.mean(), rtol=0.2)
    # Negative control: with b2 0.999, which the config refuses, the moment gets stuck at what it was.
    stuck = stored_as(optax.scale_by_adam(b2=0.999), "bfloat16")
    state = stuck.init(jnp.ones(1))
    for scale in [1.0] * 3 + [0.0] * 50:
        _, state = stuck.update(jnp.full(1, scale), state)
    assert float(state.nu[0]) == float(stuck.update(jnp.zeros(1), state)[1].nu[0]) > 0


def test_what_is_recomputed_changes_the_memory_and_no_gradient():
    x, yes = np.random.default_rng(0).normal(size=(2, 40, 32)).astype(np.float32), jnp.ones((2, 40), bool)
    run = Run(jnp.asarray(x), yes, ~yes, ~yes)
    leaves = jax.tree.leaves(tiny_model(tiny_config()).vlm)

    def gradient(**changes):
        cfg = dataclasses.replace(CFG, model=tiny_config(**changes))
        vlm = jax.tree.unflatten(jax.tree.structure(jax.eval_shape(lambda: init_model(cfg)).vlm), leaves)
        loss = lambda m: jnp.square(m.extend(run)[0]).sum()
        compiled = jax.jit(jax.grad(loss)).lower(vlm).compile()
        return jax.tree.leaves(compiled(vlm)), compiled.memory_analysis().temp_size_in_bytes

    plain, most = gradient(remat=False)
    used = []
    for policy in ("full", "narrow", "weights", "dots"):
        got, size = gradient(remat=True, remat_policy=policy)
        used.append(size)
        for a, b in zip(got, plain, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    assert used[0] < used[1] < used[2] < used[3] <= most


# ---- augmentation ---------------------------------------------------------------------------------------------------


def observation(size: int = 24):
    """A grey ramp from left to right in both cameras, uint8."""
    obs = six_rows().observation
    ramp = np.broadcast_to(np.linspace(0, 255, size).astype(np.uint8)[:, None], (size, size, 3))
    return dataclasses.replace(obs, images=np.broadcast_to(ramp, (6, 2, size, size, 3)).copy())


CAMERAS = ("front", "wrist")


def test_no_augmentation_is_the_same_object():
    obs = observation()
    assert augment(obs, jax.random.key(0), AugmentConfig(), CAMERAS) is obs


def test_a_crop_is_a_window_of_the_image_and_leaves_named_cameras_alone():
    obs = observation()
    got = np.asarray(augment(obs, jax.random.key(0), AugmentConfig(crop=0.2, uncropped=("wrist",)), CAMERAS).images)
    plain = obs.images.astype(np.float32) / 127.5 - 1.0
    assert got.dtype == np.float32 and got.min() >= -1.0 and got.max() <= 1.0
    np.testing.assert_allclose(got[:, 1], plain[:, 1], atol=1e-5)
    # A window of a ramp is a ramp: from `left` on, flatter by the scale; each row of the batch has its own.
    inner = got[:, 0, 12, 4:-4, 0]
    slope, full = np.diff(inner, axis=1), np.diff(plain[0, 0, 12, 4:-4, 0]).mean()
    ratio = slope.mean(1) / full
    assert ((ratio > 0.79) & (ratio <= 1.001)).all() and len(set(ratio.round(4))) > 3
    left = got[:, 0, 12, :, 0].min(1)
    assert (left >= -1.0).all() and (left < -1.0 + 0.2 * 2 + 0.05).all()


def test_colours_change_only_what_they_say():
    obs = observation()
    images = obs.images.copy()
    images[..., 0] //= 2  # something to saturate
    obs = dataclasses.replace(obs, images=images)
    plain = images.astype(np.float32) / 127.5 - 1.0
    grey = lambda x: ((x + 1) / 2) @ np.array([0.299, 0.587, 0.114])
    run = lambda **c: np.asarray(augment(obs, jax.random.key(1), AugmentConfig(**c), CAMERAS).images)
    np.testing.assert_allclose(grey(run(saturation=0.2))[..., 4:-4], grey(plain)[..., 4:-4], atol=1e-4)
    dim = run(brightness=0.5)
    factor = (dim[:, :, 12, 8, 1] + 1) / (plain[:, :, 12, 8, 1] + 1)
    assert ((factor > 0.5) & (factor < 1.5)).all() and np.ptp(factor) > 0.1
    assert not np.allclose(run(contrast=0.4), plain, atol=0.05)
    assert all(np.isfinite(run(brightness=0.9, contrast=0.9, saturation=0.9, crop=0.5)).ravel())


def test_training_sees_augmented_images_and_each_step_others(monkeypatch):
    seen = []
    real = steps.augment
    monkeypatch.setattr(steps, "augment", lambda obs, key, *a: seen.append(a[0]) or real(obs, key, *a))
    cfg = dataclasses.replace(CFG, augment=AugmentConfig(crop=0.1, brightness=0.3))
    model, batch = tiny_model(cfg.model), six_rows()
    losses = [float(gradients(model, model, batch, jax.random.key(k), cfg=cfg)[1]["subtask_ce"]) for k in (0, 1)]
    plain = [float(gradients(model, model, batch, jax.random.key(k), cfg=CFG)[1]["subtask_ce"]) for k in (0, 1)]
    assert plain[0] == pytest.approx(plain[1], rel=1e-5)
    assert abs(losses[0] - losses[1]) > 1e-4 * abs(losses[0])
    assert seen.count(cfg.augment) == 1  # traced once, run twice


def test_mistakes_are_fed_never_asked_for():
    batch, key = six_rows(), jax.random.key(3)
    same, fed = with_mistakes(batch, key, 0.0)
    assert same is batch and fed is batch.target
    other, fed = with_mistakes(batch, key, 0.5)
    assert other.target is batch.target
    ids, before = np.asarray(batch.target.ids), np.roll(batch.target.ids, 1, axis=0)
    changed = np.asarray(fed.ids) != ids
    assert changed.any()
    np.testing.assert_array_equal(np.asarray(fed.ids)[changed], before[changed])
    assert batch.target.valid[changed].all() and np.roll(batch.target.valid, 1, axis=0)[changed].all()
    # Rows with mistakes train no actions, the others all of theirs.
    acting = np.asarray(other.action_mask).any((1, 2))
    assert not acting[changed.any(1)].any() and 0 < acting.sum() < 6
    np.testing.assert_array_equal(np.asarray(other.action_mask)[acting], batch.action_mask[acting])


def test_questions_neither_take_nor_lend_mistakes():
    batch, key = six_rows(), jax.random.key(3)
    kind = np.array(batch.target.kind)
    kind[[1, 4]] = Kind.ANSWER
    asked = dataclasses.replace(batch, target=dataclasses.replace(batch.target, kind=kind))
    other, fed = with_mistakes(asked, key, 0.9)
    ids = np.asarray(batch.target.ids)
    changed = np.asarray(fed.ids) != ids
    assert changed[[0, 2, 3, 5]].any() and not changed[[1, 4]].any()
    lender = np.array([5, 1, 0, 2, 4, 3])  # the row before without the questions
    np.testing.assert_array_equal(np.asarray(fed.ids)[changed], ids[lender][changed])
    np.testing.assert_array_equal(np.asarray(other.action_mask)[[1, 4]], batch.action_mask[[1, 4]])
    # Negative control: as subtasks, the same rows are fed mistakes.
    assert (np.asarray(with_mistakes(batch, key, 0.9)[1].ids) != ids)[[1, 4]].any()


def test_training_feeds_mistakes_and_divides_by_what_is_left():
    cfg = dataclasses.replace(CFG, augment=AugmentConfig(mistakes=0.9))
    model, batch, key = tiny_model(cfg.model), six_rows(), jax.random.key(3)
    metrics = gradients(model, model, batch, key, cfg=cfg)[1]
    other, fed = with_mistakes(batch, jax.random.fold_in(key, steps._MISTAKES), 0.9)
    want = jax.jit(functools.partial(losses.compute_loss, cfg=cfg.loss))(model, other, key, fed=fed)[1]
    for name in ("subtask_ce", "flow"):
        np.testing.assert_allclose(metrics[name], want[name], rtol=1e-5)
    assert abs(float(want["subtask_ce"]) - float(compute_loss(model, batch, key, cfg.loss)[1]["subtask_ce"])) > 1e-3
