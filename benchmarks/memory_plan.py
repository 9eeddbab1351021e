"""The memory plan of a training step against what the process then really takes, on a CPU.

    python -m benchmarks.memory_plan pi05_subtask_tabletop pi0_tabletop debug:512      # debug with batches of 512 rows

A process of its own for each preset, so that none finds memory that another has left. Measured is the highest resident
set (VmHWM) of three steps, less what the process took before it held any state: its libraries and the compiled program.
"""

import ctypes
import dataclasses
import json
import os
from pathlib import Path
import subprocess
import sys

import jax
import numpy as np
from tyro.conf import Positional

from configs import get_preset
from openpi_ar import flags
from openpi_ar.config import TrainConfig
from openpi_ar.errors import UserError, command_line
from openpi_ar.training import memory
from openpi_ar.training.optimizer import make_optimizer
from openpi_ar.training.state import train_key
from openpi_ar.training.step import make_train_step

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes of one training step: estimated from shapes, accounted by XLA, measured."""

    estimated: int
    compiled: int
    measured: int

    @property
    def errors(self) -> tuple[float, float]:
        """Of the estimate and of the compiled plan, as fractions of what was measured."""
        return self.estimated / self.measured - 1, self.compiled / self.measured - 1


def parse(name: str) -> TrainConfig:
    """`preset`, `preset:rows`, `preset+lora` (towers frozen but for adapters of rank 8) or both: `preset+lora:rows`.

    Raises UserError for anything else.
    """
    given, (name, _, rows) = name, name.partition(":")
    preset, _, lora = name.partition("+")
    cfg = get_preset(preset)
    if lora not in ("", "lora") or not (rows or "1").isdigit() or rows == "0":
        raise UserError(f"expected PRESET, PRESET:ROWS, PRESET+lora or PRESET+lora:ROWS, found {given!r}")
    if lora:
        towers = {t: dataclasses.replace(getattr(cfg.model, t), lora_rank=8) for t in ("vlm", "expert")}
        table = ("img/*", "embedder/*", "vlm/*", "expert/*", "!*lora_?")
        cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, **towers), frozen=table)
    return dataclasses.replace(cfg, batch_size=int(rows)) if rows else cfg


def measure_here(cfg: TrainConfig) -> Plan:
    """Compiles the step once, takes three of them and looks at this process. Call it in a fresh one."""
    step_fn = make_train_step(cfg, make_optimizer(cfg.optimizer, cfg.num_steps))
    abstract, rows, key = memory.abstract_state(cfg), memory.abstract_batch(cfg), train_key(cfg)
    compiled = step_fn.lower(abstract, rows, key).compile()
    planned = memory.planned(cfg, compiled.memory_analysis(), abstract, rows).total
    _forget_the_past()
    before = _status("VmRSS")
    state = jax.tree.map(_filled, abstract)
    batches = [jax.tree.map(_filled, rows) for _ in range(2)]  # one in use, one on its way
    for i in range(3):
        state, metrics = compiled(state, batches[i % 2], key)
        jax.block_until_ready(metrics)
    return Plan(memory.estimate(cfg).total, planned, _status("VmHWM") - before)


def measure(name: str) -> Plan:
    """`measure_here` in a process of its own."""
    # Whatever is freed goes back to the system at once: what is resident is what is in use.
    env = os.environ | {"JAX_PLATFORMS": "cpu", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "benchmarks.memory_plan", name, "--here"]
    done = subprocess.run(
        command, env=env, stdout=subprocess.PIPE, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    return Plan(**json.loads(done.stdout.splitlines()[-1]))


def _filled(x: jax.ShapeDtypeStruct) -> jax.Array:
    """Small numbers everywhere: memory that was never written is not resident."""
    return jax.device_put(np.full(x.shape, 1 if x.dtype == bool else 0.01, x.dtype))


def _forget_the_past() -> None:
    jax.clear_caches()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew


def _status(field: str) -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields[field].split()[0]) * 1024


@dataclasses.dataclass(frozen=True)
class Args:
    """The memory plan of training steps against what they really take."""

    presets: Positional[tuple[str, ...]]
    """Names of presets: `debug`, `debug:512` with that many rows, `debug+lora` with adapters on frozen towers."""
    here: bool = False
    """Measure the first one in this process, and print JSON."""


def run(args: Args) -> None:
    """Prints a table. Raises UserError before anything is measured."""
    names, configs = args.presets, [parse(name) for name in args.presets]
    if args.here:
        print(json.dumps(dataclasses.asdict(measure_here(configs[0]))))
        return
    print("| preset | estimated | compiled | measured |\n|---|---|---|---|")
    for name in names:
        plan = measure(name)
        shown = [
            f"{size / MIB:,.0f} MiB ({error:+.0%})"
            for size, error in zip((plan.estimated, plan.compiled), plan.errors, strict=True)
        ]
        print(f"| `{name}` | {shown[0]} | {shown[1]} | {plan.measured / MIB:,.0f} MiB |", flush=True)


def main(argv: list[str] | None = None) -> None:
    """Entry point. Bad input ends with one line on stderr and exit code 2."""
    with command_line():
        run(flags.parse(Args, argv, "python -m benchmarks.memory_plan"))


if __name__ == "__main__":
    main()
