"""Everything a training step changes, as one pytree."""

from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import optax

from openpi_ar.config import TrainConfig
from openpi_ar.models import family
from openpi_ar.models.vlm import VLA
from openpi_ar.params import join, split
from openpi_ar.training import freeze

# Numbers of the random streams of a run's seed: fixed, so that a new stream changes no other.
_INIT, _TRAIN = 0, 1


class TrainState(NamedTuple):
    """step: int32 scalar, updates done. model: all parameters. opt_state, ema: of what is trained alone
    (`params.split`); ema is None when no average is kept. All float32, but for what the config asks to be stored in
    bfloat16.
    """

    step: jax.Array
    model: VLA
    opt_state: optax.OptState
    ema: Any

    @property
    def best_model(self) -> VLA:
        """What is evaluated and saved as `params`: the average if there is one."""
        return self.model if self.ema is None else join(self.model, self.ema)


def init_model(cfg: TrainConfig) -> VLA:
    """A random model, a pure function of the config, in the dtypes that training keeps."""
    return freeze.stored(
        cfg, family.create(cfg.model, rngs=nnx.Rngs(jax.random.fold_in(jax.random.key(cfg.seed), _INIT)))
    )


def state_of(cfg: TrainConfig, tx: optax.GradientTransformation, model: VLA) -> TrainState:
    """A fresh state that begins with the given parameters; the average starts there too."""
    trained = split(model, freeze.frozen_paths(cfg, model))
    # A copy: the step donates its state, and one buffer cannot be donated twice.
    ema = None if cfg.optimizer.ema_decay is None else jax.tree.map(jnp.copy, trained)
    return TrainState(step=jnp.zeros((), jnp.int32), model=model, opt_state=tx.init(trained), ema=ema)


def init_state(cfg: TrainConfig, tx: optax.GradientTransformation) -> TrainState:
    """A fresh state, a pure function of the config. Under `jax.eval_shape` it costs nothing at any size."""
    return state_of(cfg, tx, init_model(cfg))


def train_key(cfg: TrainConfig) -> jax.Array:
    """Key from which every step folds its own: a resumed run draws what an uninterrupted one would."""
    return jax.random.fold_in(jax.random.key(cfg.seed), _TRAIN)
