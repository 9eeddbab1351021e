"""Training at the largest batch that fits: samples a second, MFU, and the memory plan against what was really taken."""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.device.fast import Bench
from benchmarks.device.plan import Stage
from benchmarks.device.record import OutOfTime, Record
from benchmarks.device.weights import random_tree, zeros
from benchmarks.roofline import Roofline
from benchmarks.sizes import Size, make_batch
from configs import PRESETS
from openpi_ar.compilation import counted
from openpi_ar.config import TrainConfig
from openpi_ar.training import memory
from openpi_ar.training.optimizer import make_optimizer
from openpi_ar.training.state import TrainState, train_key
from openpi_ar.training.step import make_train_step
from openpi_ar.types import Batch

_BATCHES = (96, 64, 48, 32, 24, 16, 12, 8, 4, 2, 1)
_SPARE = 1.08
"""The estimate is up to a fifth off (docs/lab/scale.md); the compiled plan then decides."""
_LEAST, _STEPS, _SECONDS = 4, 12, 12.0
_FULL = "RESOURCE_EXHAUSTED"
"""In the message of XLA's error where memory does not suffice."""


def config(size: str, options: dict[str, Any]) -> TrainConfig:
    """The preset with moments in bfloat16 and no average: what one 80 GB device holds."""
    cfg = PRESETS["debug" if size == "tiny" else "pi05_subtask_lora" if options.get("lora") else "pi05_subtask"]
    if size == "tiny" and options.get("lora"):
        towers = {t: dataclasses.replace(getattr(cfg.model, t), lora_rank=4) for t in ("vlm", "expert")}
        frozen = PRESETS["pi05_subtask_lora"].frozen
        cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, **towers), frozen=frozen)
    optimizer = dataclasses.replace(cfg.optimizer, ema_decay=None, moment_dtype="bfloat16", accumulate=1)
    model = dataclasses.replace(cfg.model, **options.get("model", {}))
    return dataclasses.replace(cfg, optimizer=optimizer, model=model)


def batches_that_may_fit(cfg: TrainConfig, free: int, most: int) -> list[int]:
    """Rows, the most first. What a row adds is the same for each."""
    one, two = (memory.estimate(dataclasses.replace(cfg, batch_size=n)).total for n in (1, 2))
    return [n for n in _BATCHES if n <= most and (one + (two - one) * (n - 1)) * _SPARE <= free]


def make_state(cfg: TrainConfig) -> tuple[TrainState, Batch]:
    """Random parameters and a batch, on the device."""
    abstract = memory.abstract_state(cfg)
    model = random_tree(abstract.model)
    state = TrainState(jnp.zeros((), jnp.int32), model, zeros(abstract.opt_state), None)
    size = Size(cfg.model, cfg.text.max_prompt_tokens, cfg.text.max_target_tokens, train_batch=cfg.batch_size)
    return state, make_batch(size)


def measure(record: Record, bench: Bench, cfg: TrainConfig) -> dict[str, Any]:
    """A few steps with this batch size, written from the fourth on. Raises XLA's own error where memory does not
    suffice."""
    record.check_time(10)
    free = memory.available().bytes
    step = make_train_step(cfg, make_optimizer(cfg.optimizer, cfg.num_steps))
    abstract, rows, key = memory.abstract_state(cfg), memory.abstract_batch(cfg), train_key(cfg)
    with counted() as compiling:
        program = step.lower(abstract, rows, key).compile()
    plan = memory.planned(cfg, program.memory_analysis(), abstract, rows)
    if plan.total > free:
        raise MemoryError(f"{_FULL}: planned {plan.total / 1e9:.1f} of {free / 1e9:.1f} GB")
    state, batch = make_state(cfg)
    known = {
        "batch": cfg.batch_size,
        "compile_s": None if compiling.read else compiling.seconds,
        "estimated_gb": memory.estimate(cfg).total / 1e9,
        "planned_gb": plan.total / 1e9,
        "free_gb": free / 1e9,
    }
    times, losses, found, began = [], [], known, time.perf_counter()
    while len(times) < _LEAST or (len(times) < _STEPS and time.perf_counter() - began < _SECONDS):
        now = time.perf_counter()
        state, metrics = program(state, batch, key)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - now)
        losses.append(float(metrics["loss"]))
        if len(times) >= _LEAST:
            found = {**known, **rates(cfg, bench, float(np.median(times[1:]))), "losses": losses}
            record.add("step", found)
    return found


def rates(cfg: TrainConfig, bench: Bench, step_s: float) -> dict[str, Any]:
    """What a step time amounts to, and the memory that was taken so far. No MFU of adapters: they have other FLOPs."""
    used = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    found = {"step_s": step_s, "samples_per_s": cfg.batch_size / step_s, "peak_gb": used and used / 1e9}
    if cfg.frozen:
        return found
    prefix = len(cfg.model.cameras) * cfg.model.siglip.num_tokens
    prefix += cfg.text.max_prompt_tokens + cfg.text.max_target_tokens
    work = Roofline(cfg.model, cfg.batch_size)
    flops = work.training(prefix, cfg.text.max_target_tokens, cfg.loss.flow_draws)
    found |= {"tflop": flops / 1e12, "mfu_measured": flops / step_s / bench.rates.flops}
    return found | ({} if bench.sheet is None else {"mfu_data_sheet": flops / step_s / bench.sheet.flops})


def run(stage: Stage, size: str, record: Record) -> None:
    """The largest batch first; the next smaller one where memory does not suffice."""
    cfg = config(size, stage.options)
    bench = Bench(record, size, cfg.model.dtype)
    record.add("options", stage.options)
    candidates = batches_that_may_fit(cfg, memory.available().bytes, 4 if size == "tiny" else _BATCHES[0])
    for rows in candidates:
        try:
            found = measure(record, bench, dataclasses.replace(cfg, batch_size=rows))
        except OutOfTime:
            raise
        except Exception as e:
            if _FULL not in str(e):
                raise
            record.say(f"{rows} rows do not fit")
            continue
        mfu = f", MFU {found['mfu_measured']:.0%}" if "mfu_measured" in found else ""
        peak = "" if found["peak_gb"] is None else f", {found['peak_gb']:.1f} taken"
        record.say(
            f"{rows} rows {found['samples_per_s']:.3g} samples/s{mfu}, {found['planned_gb']:.1f} GB planned{peak}"
        )
        return
    record.say("no batch fits this device")
