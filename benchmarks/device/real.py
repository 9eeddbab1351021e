"""The tabletop's fine-tune on recorded batches, as long as the time reaches; beside it a few steps of the CPU.

`device_prepare.sh` records them (`python -m benchmarks.device.recorded`): a GPU's machine has no simulator. Without
them the batches are random ones of the same shapes, and the stage says so; their losses then mean nothing.
"""

import dataclasses
from pathlib import Path
import time
from typing import Any

import jax
import numpy as np

from benchmarks.device.plan import PREPARED, Stage
from benchmarks.device.record import Record
from benchmarks.device.weights import random_tree
from benchmarks.sizes import Size, make_batch
from configs import PRESETS
from openpi_ar.checkpoints import store
from openpi_ar.checkpoints.remote import SHIPPED
from openpi_ar.config import TrainConfig
from openpi_ar.models import family
from openpi_ar.training import memory
from openpi_ar.training.optimizer import make_optimizer
from openpi_ar.training.state import TrainState, state_of, train_key
from openpi_ar.training.step import make_eval_loss, make_train_step
from openpi_ar.types import Batch

BATCHES = PREPARED / "tabletop.npz"
HELD_OUT = 4
"""Batches at the end of the file that are not trained on."""
_CPU_STEPS = 4
_SHOWN = ("loss", "flow", "subtask_exact_match")


def load(path: Path, cfg: TrainConfig) -> list[Batch]:
    """Recorded batches, or random ones of the same shapes."""
    if not path.is_file():
        size = Size(cfg.model, cfg.text.max_prompt_tokens, cfg.text.max_target_tokens, train_batch=cfg.batch_size)
        return [jax.device_get(make_batch(size))] * (HELD_OUT + 1)
    file, structure = np.load(path), jax.tree.structure(memory.abstract_batch(cfg))
    leaves = [file[f"leaf_{i}"] for i in range(structure.num_leaves)]
    return [jax.tree.unflatten(structure, [leaf[i] for leaf in leaves]) for i in range(len(leaves[0]))]


def config(size: str) -> TrainConfig:
    cfg = PRESETS["pi05_subtask_tabletop"]
    return cfg if size == "full" else dataclasses.replace(cfg, model=PRESETS["debug"].model, batch_size=4)


def start(cfg: TrainConfig, size: str) -> TrainState:
    """The shipped checkpoint with a fresh optimizer."""
    tx = make_optimizer(cfg.optimizer, cfg.num_steps)
    if size == "tiny":  # of another shape than the shipped one
        return jax.jit(lambda m: state_of(cfg, tx, m))(random_tree(family.abstract(cfg.model)))
    model = store.load_policy_checkpoint(SHIPPED["tabletop"])[1]
    return jax.jit(lambda m: state_of(cfg, tx, m))(model)


def steps(record: Record, cfg: TrainConfig, state: TrainState, batches: list[Batch], most: int, spare: float) -> Any:
    """(state, steps done, steps per second after the first, seconds of the first, metrics of the last)."""
    step, key = make_train_step(cfg, make_optimizer(cfg.optimizer, cfg.num_steps)), train_key(cfg)
    began = time.perf_counter()
    state, metrics = jax.block_until_ready(step(state, batches[0], key))
    first, done, began = time.perf_counter() - began, 1, time.perf_counter()
    while done < most and record.left > spare:
        before = metrics
        state, metrics = step(state, batches[done % len(batches)], key)
        jax.block_until_ready(before)  # the host is one step ahead of the device, not more: it watches the clock
        done += 1
    jax.block_until_ready(metrics)
    return state, done, (done - 1) / max(time.perf_counter() - began, 1e-9), first, metrics


def held_out(cfg: TrainConfig, model: Any, batches: list[Batch]) -> dict[str, float]:
    """Means over the held-out batches, with the same noise each time."""
    loss = make_eval_loss(cfg.loss)
    found = [loss(model, batch, jax.random.key(i)) for i, batch in enumerate(batches)]
    return {name: float(np.mean([np.asarray(m[name]) for m in found])) for name in _SHOWN}


def run(stage: Stage, size: str, record: Record) -> None:
    """Held-out loss before, the fine-tune, held-out loss after; then a few steps on the CPU."""
    cfg, path = config(size), BATCHES if size == "full" else Path()
    batches = load(path, cfg)
    recorded = path.is_file()
    record.add("data", f"{len(batches)} recorded batches" if recorded else "random batches of the tabletop's shapes")
    state = start(cfg, size)
    aside, batches = batches[-HELD_OUT:], batches[:-HELD_OUT]
    record.add("before", held_out(cfg, state.best_model, aside))
    most = cfg.num_steps if size == "full" else 30
    state, done, rate, first, metrics = steps(record, cfg, state, batches, most, 14.0)
    record.add("steps", done)
    record.add("steps_per_s", rate)
    record.add("first_step_s", first)
    record.add("last_loss", float(metrics["loss"]))
    record.say(f"{done} steps at {rate:.3g} a second")
    record.add("after", held_out(cfg, state.best_model, aside))
    losses = f"held-out loss {record.figures['before']['loss']:.3g} to {record.figures['after']['loss']:.3g}"
    record.say(losses if recorded else "random batches")
    if jax.default_backend() == "cpu":
        return
    with record.attempt("cpu"):
        record.check_time(10)
        cpu = jax.devices("cpu")[0]
        with jax.default_device(cpu):
            state, batches = jax.device_put((jax.device_get(state), batches[:_CPU_STEPS]), cpu)
            _, done, slow, _, _ = steps(record, cfg, state, batches, _CPU_STEPS, 1.0)
        if done > 1:
            record.add("cpu_steps_per_s", slow)
            record.say(f"{rate / slow:.1f} times this machine's CPU")
