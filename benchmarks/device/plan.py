"""What is run in which order, and for how long at most. Nothing here imports JAX: a process that only starts others
must not take the device's memory."""

import dataclasses
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PREPARED = ROOT / ".device"
"""What `device_prepare.sh` has made, ignored by git."""
SITE = PREPARED / "site"
"""Packages; those that the machine has itself come first."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One process. `module` has `run(stage, size, record)`; its figures go to `<file>.json` under its name.

    flags    added to XLA_FLAGS.
    options  of the module.
    """

    name: str
    module: str
    file: str
    seconds: int
    flags: str = ""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


def _flag(name: str, seconds: int, flags: str, *rows: str) -> Stage:
    """A variant that differs by flags of XLA alone."""
    return Stage(name, "helps", "helps", seconds, flags, {"rows": rows})


STAGES: tuple[Stage, ...] = (
    Stage("right", "right", "right", 75),
    Stage("fast", "fast", "fast", 150),
    Stage("train", "train", "train", 100),
    Stage("train_lora", "train", "train", 80, options={"lora": True}),
    _flag(
        "while_loops",
        45,
        "--xla_gpu_enable_command_buffer=+WHILE --xla_gpu_command_buffer_unroll_loops=true",
        "token",
        "denoise",
    ),
    Stage("cudnn", "helps", "helps", 40, options={"rows": ("prefill", "vision"), "model": {"attention": "cudnn"}}),
    Stage("inside", "inside", "helps", 60),
    Stage("real", "real", "real", 45),
    Stage("train_cudnn", "train", "train", 60, options={"model": {"attention": "cudnn"}}),
    Stage("train_narrow", "train", "train", 60, options={"model": {"remat_policy": "narrow"}}),
    _flag("no_triton_products", 45, "--xla_gpu_enable_triton_gemm=false", "token", "prefill", "denoise"),
    _flag("latency_hiding", 45, "--xla_gpu_enable_latency_hiding_scheduler=true", "token", "prefill"),
    _flag("no_autotuning", 45, "--xla_gpu_autotune_level=0", "token", "prefill"),
    _flag("no_command_buffers", 45, "--xla_gpu_enable_command_buffer=", "token", "denoise"),
)
"""In the order of their worth: whatever the minutes do not reach is the least of it."""

STAGE = {stage.name: stage for stage in STAGES}
