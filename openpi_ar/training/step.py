"""The jitted training and evaluation steps."""

from collections.abc import Callable
import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int
import optax

from openpi_ar.algorithms.act import Act, act, act_on, talk
from openpi_ar.algorithms.flow import Steps
from openpi_ar.algorithms.generate import Generated
from openpi_ar.algorithms.losses import Counts, Metrics, batch_counts, compute_loss
from openpi_ar.algorithms.sampling import Sampling, row_keys
from openpi_ar.config import DecodeConfig, LossConfig, TrainConfig
from openpi_ar.data.augment import augment, with_mistakes
from openpi_ar.models.vlm import VLA
from openpi_ar.params import join, split
from openpi_ar.training import freeze
from openpi_ar.training.state import TrainState
from openpi_ar.types import Array, Batch, Observation, Tokens

# Stream of a step's key from which images are changed; the key itself draws noise and times.
_AUGMENT, _MISTAKES = 1, 2

StepFn = Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]


def ema_decay(decay: float, step: Int[Array, ""]) -> Float[Array, ""]:
    """Decay after `step` updates: min(decay, (1 + step) / (10 + step)), so that the random start is soon forgotten."""
    return jnp.minimum(decay, (1 + step) / (10 + step))


def train_step(
    state: TrainState, batch: Batch, key: jax.Array, *, cfg: TrainConfig, tx: optax.GradientTransformation
) -> tuple[TrainState, Metrics]:
    """One update of what is trained. Metrics are those of `compute_loss`, the counts they are over (`Counts.metrics`),
    and `grad_norm` (before clipping)."""
    step_key = jax.random.fold_in(key, state.step)
    # Any: optax's types know only its own notion of parameters, but every pytree will do.
    params: Any = split(state.model, freeze.frozen_paths(cfg, state.model))
    grads, metrics = accumulated_gradients(state.model, params, batch, step_key, cfg)
    updates, opt_state = tx.update(grads, state.opt_state, params)
    new_params: Any = optax.apply_updates(params, updates)
    ema = state.ema
    if ema is not None and cfg.optimizer.ema_decay is not None:
        d = ema_decay(cfg.optimizer.ema_decay, state.step)
        ema = jax.tree.map(lambda average, new: d * average + (1 - d) * new, ema, new_params)
    model = join(state.model, new_params)
    new = TrainState(step=state.step + 1, model=model, opt_state=opt_state, ema=ema)
    return new, {**metrics, "grad_norm": optax.tree.norm(grads)}


def accumulated_gradients(
    model: VLA, params: Any, batch: Batch, key: jax.Array, cfg: TrainConfig
) -> tuple[Any, Metrics]:
    """(gradient by `params`, metrics) of the batch, `optimizer.accumulate` slices of it one after another.

    Each slice is divided by its share of the whole batch's counts, so their mean is what one pass over the batch gives,
    whatever is masked where. A slice takes every k-th row: rows then stay on the device that holds them.
    """
    slices = cfg.optimizer.accumulate

    def gradients(part: Batch, fed: Tokens, part_key: jax.Array, counts: Counts) -> tuple[Any, Metrics]:
        loss_key, augment_key = part_key, jax.random.fold_in(part_key, _AUGMENT)
        seen = augment(part.observation, augment_key, cfg.augment, cfg.model.cameras)
        part = dataclasses.replace(part, observation=seen)

        def loss_fn(params: Any) -> tuple[Float[Array, ""], Metrics]:
            return compute_loss(join(model, params), part, loss_key, cfg.loss, counts, fed)

        return jax.grad(loss_fn, has_aux=True)(params)

    batch, fed = with_mistakes(batch, jax.random.fold_in(key, _MISTAKES), cfg.augment.mistakes)
    counts = batch_counts(batch)
    if slices == 1:
        grads, metrics = gradients(batch, fed, key, counts)
        return grads, {**metrics, **counts.metrics()}
    share = jax.tree.map(lambda count: count / slices, counts)
    parts = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, slices, *x.shape[1:]), 0, 1), (batch, fed))

    def one(total: Any, xs: tuple[Batch, Tokens, jax.Array]) -> tuple[Any, None]:
        part, fed, part_key = xs
        return jax.tree.map(jnp.add, total, gradients(part, fed, part_key, share)), None

    first, first_fed = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(lambda: gradients(first, first_fed, key, share))
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(one, zero, (*parts, jax.random.split(key, slices)))
    grads, metrics = jax.tree.map(lambda x: x / slices, total)
    return grads, {**metrics, **counts.metrics()}


def make_train_step(cfg: TrainConfig, tx: optax.GradientTransformation, where: Any = None) -> StepFn:
    """`train_step` jitted once for the run, its state donated (old and new never coexist).

    `where`: the state's shardings, if it is on several devices; the new state then stays where the old one was.
    """

    def step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        return train_step(state, batch, key, cfg=cfg, tx=tx)

    return jax.jit(step, donate_argnums=0, out_shardings=None if where is None else (where, None))


def make_eval_loss(cfg: LossConfig) -> Callable[[VLA, Batch, jax.Array], Metrics]:
    """Jitted loss metrics of a held-out batch, with the counts they are over."""

    def run(model: VLA, batch: Batch, key: jax.Array) -> Metrics:
        return {**compute_loss(model, batch, key, cfg)[1], **batch_counts(batch).metrics()}

    return jax.jit(run)


def make_act(
    cfg: DecodeConfig, sampling: Sampling, where: jax.sharding.Sharding | None = None, *, reprompts: bool = False
) -> Callable[[VLA, Observation, jax.Array, Callable[[Generated], Tokens]], Act]:
    """Jitted talk-and-act on stacked parameters, for evaluation between steps (the policy has its own).

    `where`: the sharding of what comes out, if the model is on several devices. `reprompts`: the actions see a prompt
    of their own, which the function's last argument makes of the text; it is not called otherwise.
    """

    def keys_and_noise(model: VLA, obs: Observation, key: jax.Array) -> tuple[Array | None, Array]:
        text_key, noise_key = jax.random.split(key)
        batch = obs.images.shape[0]
        noise = jax.random.normal(noise_key, (batch, model.cfg.action_horizon, model.cfg.action_dim))
        return None if sampling.greedy else row_keys(text_key, batch), noise

    @partial(jax.jit, out_shardings=where)
    def at_once(model: VLA, obs: Observation, key: jax.Array) -> Act:
        keys, noise = keys_and_noise(model, obs, key)
        return act(model.unstacked(), obs, noise, sampling, num_steps=Steps.of(cfg), keys=keys)

    @partial(jax.jit, out_shardings=(where, None))
    def first(model: VLA, obs: Observation, key: jax.Array) -> tuple[Generated, Array]:
        out = talk(model.unstacked(), obs, sampling, keys=keys_and_noise(model, obs, key)[0])
        return out.text, out.images

    @partial(jax.jit, out_shardings=where)
    def then(model: VLA, obs: Observation, images: Array, key: jax.Array) -> Array:
        noise = keys_and_noise(model, obs, key)[1]
        return act_on(model.unstacked(), obs, images, noise, num_steps=Steps.of(cfg))

    def run(model: VLA, obs: Observation, key: jax.Array, prompts: Callable[[Generated], Tokens]) -> Act:
        if not reprompts:
            return at_once(model, obs, key)
        text, images = first(model, obs, key)
        return Act(text=text, actions=then(model, dataclasses.replace(obs, prompt=prompts(text)), images, key))

    return run
