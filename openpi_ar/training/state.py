"""Everything a training step changes, as one pytree."""

from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import optax

from openpi_ar.config import TrainConfig
from openpi_ar.models.pi0 import Pi0

# Streams drawn from the run's seed; fixed numbers, so that a new one never shifts the others.
_INIT, _TRAIN = 0, 1


class TrainState(NamedTuple):
    """step: int32 scalar, updates done. model, ema: float32 parameters; ema is None when no average is kept."""

    step: jax.Array
    model: Pi0
    opt_state: optax.OptState
    ema: Pi0 | None

    @property
    def best_model(self) -> Pi0:
        """What is evaluated and saved as `params`: the average if there is one."""
        return self.model if self.ema is None else self.ema


def init_state(cfg: TrainConfig, tx: optax.GradientTransformation) -> TrainState:
    """A fresh state, a pure function of the config. Under `jax.eval_shape` it costs nothing at any size."""
    # Any: optax's types know only its own notion of parameters, but every pytree will do.
    model: Any = Pi0(cfg.model, rngs=nnx.Rngs(jax.random.fold_in(jax.random.key(cfg.seed), _INIT)))
    # A copy: the step donates its state, and one buffer cannot be donated twice.
    ema = None if cfg.optimizer.ema_decay is None else jax.tree.map(jnp.copy, model)
    return TrainState(step=jnp.zeros((), jnp.int32), model=model, opt_state=tx.init(model), ema=ema)


def started_at(state: TrainState, model: Pi0) -> TrainState:
    """A fresh state that begins with the given parameters; the average starts there too."""
    # A copy of its own, here as in `init_state`: numpy views would share memory with what the step donates.
    return state._replace(model=model, ema=None if state.ema is None else jax.tree.map(jnp.copy, model))


def train_key(cfg: TrainConfig) -> jax.Array:
    """Key from which every step folds its own: a resumed run draws what an uninterrupted one would."""
    return jax.random.fold_in(jax.random.key(cfg.seed), _TRAIN)
