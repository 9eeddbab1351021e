"""Compiles programs, runs them in turns, and computes how far each is from what the device could do.

Programs are timed in turns (a, b, a, b, ...), so that a slow minute of a shared machine falls on all of them alike, and
compared by the ratio of their medians.
"""

from collections.abc import Callable, Mapping
import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass
class Program:
    """A compiled program on its arguments.

    compile_s   seconds of tracing and compiling.
    flops, bytes_accessed   XLA's cost analysis; None where the backend gives none. The body of a loop counts once.
    compulsory  bytes of arguments and results: read and written at least once.
    peak        bytes of arguments, results and temporaries.
    temporary   bytes of temporaries alone.
    times       seconds of each run.
    """

    call: Callable[[], Any]
    compile_s: float
    flops: float | None
    bytes_accessed: float | None
    compulsory: int
    peak: int
    temporary: int = 0
    times: list[float] = dataclasses.field(default_factory=list)

    @property
    def median(self) -> float:
        return float(np.median(self.times))

    @property
    def p95(self) -> float:
        return float(np.percentile(self.times, 95))


def compile_program(fn: Callable[..., Any], *args: Any) -> Program:
    """`fn` jitted and compiled for these arguments, not run yet."""
    start = time.perf_counter()
    # As a list: JAX describes arguments by trees like theirs, and not every class may hold a description.
    leaves, tree = jax.tree.flatten(args)
    compiled = jax.jit(lambda leaves: fn(*jax.tree.unflatten(tree, leaves))).lower(leaves).compile()
    seconds = time.perf_counter() - start
    cost, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
    compulsory = memory.argument_size_in_bytes + memory.output_size_in_bytes if memory else 0
    return Program(
        call=lambda: jax.block_until_ready(compiled(leaves)),
        compile_s=seconds,
        flops=cost.get("flops"),
        bytes_accessed=cost.get("bytes accessed"),
        compulsory=compulsory,
        peak=compulsory + (memory.temp_size_in_bytes if memory else 0),
        temporary=memory.temp_size_in_bytes if memory else 0,
    )


def run_in_turns(programs: Mapping[str, Program], *, seconds: float, least: int = 7, most: int = 200) -> None:
    """Fills the `times` of all programs: rounds of one run each, after one that warms up, for about `seconds`."""
    for program in programs.values():
        program.call()
    start, rounds = time.perf_counter(), 0
    while rounds < least or (rounds < most and time.perf_counter() - start < seconds):
        for program in programs.values():
            now = time.perf_counter()
            program.call()
            program.times.append(time.perf_counter() - now)
        rounds += 1


@dataclasses.dataclass(frozen=True)
class Device:
    """What this device reaches at best, measured: FLOP/s of a large matmul, bytes/s (read and written) of a large
    copy."""

    flops: float
    bandwidth: float

    def bound(self, flops: float, moved: float) -> float:
        """Seconds that no program with this work and traffic can be faster than."""
        return max(flops / self.flops, moved / self.bandwidth)


def measure_device(dtype: str) -> Device:
    """The best of several runs each: this is a ceiling."""
    accelerator = jax.default_backend() != "cpu"
    n, count = (8192, 1 << 28) if accelerator else (1536, 1 << 24)
    a, x = jnp.ones((n, n), dtype), jnp.ones((count,), jnp.float32)
    programs = {"matmul": compile_program(lambda a: a @ a, a), "copy": compile_program(lambda x: x + 1.0, x)}
    run_in_turns(programs, seconds=1.0, most=20)
    best = {name: min(p.times) for name, p in programs.items()}
    return Device(flops=2 * n**3 / best["matmul"], bandwidth=2 * x.nbytes / best["copy"])
