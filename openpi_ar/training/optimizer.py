"""AdamW with linear warm-up, cosine decay and global-norm clipping, from the config."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from openpi_ar.config import OptimizerConfig
from openpi_ar.errors import UserError


def check_schedule(cfg: OptimizerConfig, num_steps: int) -> None:
    """Raises UserError if the warm-up does not end before the run does. Computes nothing."""
    if cfg.warmup_steps >= num_steps:
        raise UserError(
            f"optimizer.warmup_steps ({cfg.warmup_steps}) must be less than num_steps ({num_steps}): "
            f"lower --optimizer.warmup-steps or raise --num-steps"
        )


def make_schedule(cfg: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Learning rate at each step: linear from peak / (warmup + 1) to peak, then cosine to `final_lr` at `num_steps`.

    Raises UserError if the warm-up does not end before the run does.
    """
    check_schedule(cfg, num_steps)
    return optax.warmup_cosine_decay_schedule(
        init_value=cfg.peak_lr / (cfg.warmup_steps + 1),
        peak_value=cfg.peak_lr,
        warmup_steps=cfg.warmup_steps,
        decay_steps=num_steps,
        end_value=cfg.final_lr,
    )


def make_optimizer(cfg: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """Clip, then AdamW on the schedule. Weight decay acts on every parameter, as in openpi."""
    adam = optax.adamw(make_schedule(cfg, num_steps), b1=cfg.b1, b2=cfg.b2, weight_decay=cfg.weight_decay)
    if cfg.moment_dtype != "float32":
        adam = stored_as(adam, cfg.moment_dtype)
    return optax.chain(optax.clip_by_global_norm(cfg.clip_norm), adam)


def stored_as(tx: optax.GradientTransformation, dtype: str) -> optax.GradientTransformation:
    """`tx` whose state is kept in `dtype` between updates and is float32 within one. Integers stay as they are."""

    def cast(state: Any, to: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(to) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = tx.update(updates, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(tx.init(params), dtype), update)
