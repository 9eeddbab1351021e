"""Checkpoints of the smallest preset, written as a run would write them."""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from configs import get_preset
from openpi_ar.checkpoints.store import Assets
from openpi_ar.config import TrainConfig
from openpi_ar.data.normalize import NormStats
from openpi_ar.text.tokenizer import load_tokenizer
from openpi_ar.training.optimizer import make_optimizer
from openpi_ar.training.state import TrainState, init_state
from openpi_ar.training.store import CheckpointStore

CFG = get_preset("debug")
NO_EMA = dataclasses.replace(CFG, optimizer=dataclasses.replace(CFG.optimizer, ema_decay=None))


# The tabletop's ranges: tool x, y, z in metres, then finger opening (state) or grip (action).
_LOW, _HIGH = np.float32([-0.16, -0.18, 0.022, 0.0]), np.float32([0.16, 0.2, 0.2, 0.09])


def tabletop_stats() -> dict[str, NormStats]:
    high = np.float32([*_HIGH[:3], 1.0])
    low = np.float32([*_LOW[:3], -1.0])
    return {
        "state": NormStats(mean=(_LOW + _HIGH) / 2, std=(_HIGH - _LOW) / 4, q01=_LOW, q99=_HIGH),
        "actions": NormStats(mean=(low + high) / 2, std=(high - low) / 4, q01=low, q99=high),
    }


def abstract(cfg: TrainConfig) -> TrainState:
    return jax.eval_shape(lambda: init_state(cfg, make_optimizer(cfg.optimizer, cfg.num_steps)))


def random_state(cfg: TrainConfig, step: int) -> TrainState:
    """Every leaf different, as none is by chance."""
    rng = np.random.default_rng(step)
    state = jax.tree.map(lambda a: jax.numpy.asarray(rng.normal(size=a.shape), a.dtype), abstract(cfg))
    return state._replace(step=jax.numpy.asarray(step, "int32"))


def assets(cfg: TrainConfig) -> Assets:
    return Assets(cfg, load_tokenizer("embedded"), tabletop_stats())


def write(directory: Path, cfg: TrainConfig, states: list[TrainState], keep_last: int = 9) -> None:
    writer = CheckpointStore(directory, keep_last=keep_last)
    for state in states:
        writer.save(state, 10 * int(state.step), assets(cfg))
    writer.close()


def save(directory: Path, cfg: TrainConfig, *steps: int, keep_last: int = 9) -> list[TrainState]:
    states = [random_state(cfg, step) for step in steps]
    write(directory, cfg, states, keep_last)
    return states


def assert_same(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)
