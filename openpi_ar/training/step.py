"""The jitted training and evaluation steps."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int
import numpy as np
import optax

from openpi_ar.algorithms import decode
from openpi_ar.algorithms.losses import Metrics, compute_loss
from openpi_ar.config import DecodeConfig, LossConfig, TrainConfig
from openpi_ar.models.pi0 import Pi0
from openpi_ar.training.state import TrainState
from openpi_ar.types import Array, Batch, Observation

StepFn = Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]


def ema_decay(decay: float, step: Int[Array, ""]) -> Float[Array, ""]:
    """Decay after `step` updates: min(decay, (1 + step) / (10 + step)), so that the random start is soon forgotten."""
    return jnp.minimum(decay, (1 + step) / (10 + step))


def train_step(
    state: TrainState, batch: Batch, key: jax.Array, *, cfg: TrainConfig, tx: optax.GradientTransformation
) -> tuple[TrainState, Metrics]:
    """One update. Metrics are those of `compute_loss` plus `grad_norm` (before clipping)."""
    step_key = jax.random.fold_in(key, state.step)

    def loss_fn(model: Pi0) -> tuple[Float[Array, ""], Metrics]:
        return compute_loss(model, batch, step_key, cfg.loss)

    # Any: optax's types know only its own notion of parameters, but every pytree will do.
    params: Any = state.model
    grads, metrics = jax.grad(loss_fn, has_aux=True)(params)
    updates, opt_state = tx.update(grads, state.opt_state, params)
    model: Any = optax.apply_updates(params, updates)
    ema = state.ema
    if ema is not None and cfg.optimizer.ema_decay is not None:
        d = ema_decay(cfg.optimizer.ema_decay, state.step)
        ema = jax.tree.map(lambda average, new: d * average + (1 - d) * new, ema, model)
    new = TrainState(step=state.step + 1, model=model, opt_state=opt_state, ema=ema)
    return new, {**metrics, "grad_norm": optax.tree.norm(grads)}


def make_train_step(cfg: TrainConfig, tx: optax.GradientTransformation) -> StepFn:
    """`train_step` jitted once for the run, its state donated (old and new never coexist)."""

    def step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        return train_step(state, batch, key, cfg=cfg, tx=tx)

    return jax.jit(step, donate_argnums=0)


def make_eval_loss(cfg: LossConfig) -> Callable[[Pi0, Batch, jax.Array], Metrics]:
    """Jitted loss metrics of a held-out batch."""
    return jax.jit(lambda model, batch, key: compute_loss(model, batch, key, cfg)[1])


def make_act(
    cfg: DecodeConfig, *, max_tokens: int, eos_id: int, allowed: np.ndarray
) -> Callable[[Pi0, Observation, jax.Array], decode.Act]:
    """Jitted talk-and-act on stacked parameters, for evaluation between steps (the policy has its own)."""

    def run(model: Pi0, obs: Observation, key: jax.Array) -> decode.Act:
        return decode.act(
            model.unstacked(),
            obs,
            key,
            eos_id=eos_id,
            allowed=allowed,
            max_tokens=max_tokens,
            num_steps=cfg.denoise_steps,
            temperature=cfg.temperature,
        )

    return jax.jit(run)
