"""How many steps from noise to actions does a checkpoint need? Action error on a dataset's frames against them.

    python -m openpi_ar.policy steps --ckpt RUN --data DATASET --write

Every way of denoising gets the same frames, the same noise and the true subtasks, so they differ in nothing else. An
error on single frames is not success: where there is a simulator, play (`python -m openpi_ar.worlds.tabletop steps`).
"""

from collections.abc import Mapping, Sequence
import dataclasses
import itertools
from pathlib import Path
import time
from typing import Any

import numpy as np
from rich.table import Table

from openpi_ar.algorithms.flow import Steps
from openpi_ar.checkpoints import remote, store
from openpi_ar.errors import UserError
from openpi_ar.policy.ladder import Ladder
from openpi_ar.policy.policy import Policy
from openpi_ar.tables import new_table, progress_bar

_TIMED = 5


@dataclasses.dataclass(frozen=True)
class Measured:
    """One way of denoising.

    error     mean absolute difference from the recorded actions, over valid steps and dimensions, each dimension in
              units of its standard deviation in these frames.
    apart     the same from the actions of the finest way: what more steps would change.
    ms        median time of a whole call for one observation, the subtask given.
    """

    steps: Steps
    error: float
    apart: float
    ms: float


def ways(ladder: Ladder) -> tuple[Steps, ...]:
    """Every number with every method and every shift. Raises UserError if there is none, or one that cannot be."""
    found = tuple(itertools.starmap(Steps, itertools.product(ladder.num, ladder.methods, ladder.shifts)))
    if not found:
        raise UserError("name at least one number of steps, one method and one shift")
    return found


def measure(
    policy: Policy, samples: Sequence[dict[str, Any]], ways: Sequence[Steps], *, batch: int = 16
) -> list[Measured]:
    """Runs every way over samples with `actions`, `action_valid` and, for models that generate text, `subtask`.

    Shows progress. Raises UserError if no action dimension varies in the samples, or as `Policy.infer`.
    """
    valid = np.stack([row["action_valid"] for row in samples])
    true = np.stack([row["actions"] for row in samples]).astype(np.float64)
    spread = true[valid].std(0)
    varies = spread > 1e-6
    if not varies.any():
        raise UserError(f"the actions of these {len(samples)} frames are all the same, so no error can be measured")
    horizon, dims = policy.cfg.model.action_horizon, policy.cfg.model.action_dim
    noise = np.random.default_rng(0).standard_normal((len(samples), horizon, dims)).astype(np.float32)
    texts = [row["subtask"] for row in samples] if policy.transform.writes_text else None
    chunks, ms = [], []
    with progress_bar("ways of denoising", len(ways)) as update:
        for done, steps in enumerate(ways, 1):
            one = policy.denoising(steps.num, steps.method, steps.shift)
            out: list[dict[str, Any]] = []
            for at in range(0, len(samples), batch):
                rows = slice(at, at + batch)
                told = None if texts is None else texts[rows]
                out += one.infer_batch(samples[rows], noise=noise[rows], subtasks=told, batch_size=batch)
            chunks.append(np.stack([row["actions"] for row in out]))
            ms.append(_time(one, samples[0], noise[0], None if texts is None else texts[0]))
            update(done, f"{describe(steps)}: {ms[-1]:.1f} ms")
    finest = chunks[int(np.argmax([steps.passes for steps in ways]))]

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        return float((np.abs(a - b)[valid][:, varies] / spread[varies]).mean())

    return [
        Measured(steps, distance(c, true), distance(c, finest), t) for steps, c, t in zip(ways, chunks, ms, strict=True)
    ]


def enough(measured: Sequence[Measured], tolerance: float = 0.02) -> Steps:
    """The way with the fewest passes, and of those the most exact, whose error is within a fraction of the least."""
    errors = {m.steps: m.error for m in measured}
    return fewest(errors, tolerance * min(errors.values()))


def fewest(errors: Mapping[Steps, float], tolerance: float) -> Steps:
    """The way with the fewest passes, and of those the most exact, with an error up to `tolerance` above the least."""
    bound = min(errors.values()) + tolerance
    return min((way for way, error in errors.items() if error <= bound), key=lambda way: (way.passes, errors[way]))


def write(ckpt: str, steps: Steps) -> Path:
    """Makes a checkpoint's policy use these steps; returns the file that says so. Raises UserError if it cannot."""
    if remote.shipped(ckpt) != ckpt:
        raise UserError(f"{ckpt} is the checkpoint that comes with the package: copy it and name the copy with --ckpt")
    changes = {"denoise_steps": steps.num, "denoise_method": steps.method, "denoise_shift": steps.shift}
    return store.write_decode(ckpt, **changes)


def describe(steps: Steps) -> str:
    """E.g. `5 euler, shift 2`."""
    return f"{steps.num} {steps.method}" + (f", shift {steps.shift:g}" if steps.shift != 1 else "")


def as_dict(measured: Sequence[Measured], chosen: Steps) -> dict[str, Any]:
    """Everything, for JSON."""
    ways = {describe(m.steps): {"error": m.error, "apart": m.apart, "ms": m.ms} for m in measured}
    return {"chosen": describe(chosen), "ways": ways}


def table(measured: Sequence[Measured], chosen: Steps) -> Table:
    """A row for each way, for the terminal."""
    out = new_table("steps", "passes", "error (std)", "from the finest", "ms", "")
    for m in measured:
        numbers = (str(m.steps.passes), f"{m.error:.4f}", f"{m.apart:.4f}", f"{m.ms:.1f}")
        out.add_row(describe(m.steps), *numbers, "enough" if m.steps == chosen else "")
    return out


def _time(policy: Policy, sample: dict[str, Any], noise: np.ndarray, subtask: str | None) -> float:
    times = []
    for _ in range(1 + _TIMED):  # the first compiles
        began = time.perf_counter()
        policy.infer(sample, noise=noise, subtask=subtask)
        times.append(1e3 * (time.perf_counter() - began))
    return float(np.median(times[1:]))
