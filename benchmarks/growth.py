"""How time grows with tokens decoded, tokens read, cameras and rows of a batch: `python -m benchmarks.run growth --plot
growth.png`.

Expected: a token costs the same however many are decoded; prefill is linear in prompt and cameras as long as matmuls
outweigh attention; a batch costs less per row until the device is full.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.inference import Ours, sampling_of
from benchmarks.sizes import Size, make_model, make_observation
from benchmarks.timing import Program, compile_program, run_in_turns
from openpi_ar.models.vlm import VLA

AXES = {
    "tokens decoded": (5, 10, 20, 40, 80),
    "prompt tokens": (16, 32, 64, 128, 256, 512),
    "cameras": (1, 2, 3, 4),
    "batch": (1, 2, 4, 8, 16, 32),
}
MEASURED = {
    "tokens decoded": "ms per token",
    "prompt tokens": "prefill, ms",
    "cameras": "images and prefill, ms",
    "batch": "text and actions, ms per row",
}


def _program(axis: str, value: int, size: Size, model: VLA) -> Program:
    if axis == "tokens decoded":
        size = dataclasses.replace(size, tokens=value)
    ours, sampling = Ours(size), sampling_of(size)
    obs = make_observation(
        size,
        batch=value if axis == "batch" else 1,
        cameras=value if axis == "cameras" else None,
        prompt=value if axis == "prompt tokens" else None,
    )
    if axis == "batch":
        shape = (value, size.model.action_horizon, size.model.action_dim)
        return compile_program(
            ours.whole, model, obs, jax.random.normal(jax.random.key(0), shape), sampling, None, None
        )
    if axis == "cameras":
        return compile_program(lambda m, o: ours.prefill(m, o, m.embed_images(o)), model, obs)
    images = jax.jit(lambda m, o: m.embed_images(o))(model, obs)
    if axis == "prompt tokens":
        return compile_program(ours.prefill, model, obs, images)
    last, cache = jax.jit(ours.prefill)(model, obs, images)
    return compile_program(ours.generate, model, cache, last, sampling)


def run(size: Size, dtype: str, seconds: float) -> dict[str, dict[int, float]]:
    """Median milliseconds by axis and value, of what `MEASURED` names; `seconds` for each axis."""
    model = Ours(size).prepare(make_model(size.model, dtype))
    found: dict[str, dict[int, float]] = {}
    for axis, values in AXES.items():
        programs = {str(v): _program(axis, v, size, model) for v in values}
        run_in_turns(programs, seconds=seconds)
        per = axis in ("tokens decoded", "batch")
        found[axis] = {v: 1e3 * programs[str(v)].median / (v if per else 1) for v in values}
    return found


def line(points: dict[int, float]) -> tuple[float, float, float]:
    """Slope, intercept and largest relative distance of a least-squares line through the points."""
    x, y = np.array(list(points)), np.array(list(points.values()))
    slope, intercept = np.polyfit(x, y, 1)
    return float(slope), float(intercept), float(np.max(np.abs(slope * x + intercept - y) / y))


def plot(found: dict[str, dict[int, float]], path: Path, title: str) -> None:
    """One panel per axis; a straight line through what should be linear. Needs the extra `viz`."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(found), figsize=(4 * len(found), 3), layout="constrained")
    for panel, (axis, points) in zip(panels, found.items(), strict=True):
        x = list(points)
        panel.plot(x, list(points.values()), "o", color="tab:blue")
        if axis in ("prompt tokens", "cameras"):
            slope, intercept, _ = line(points)
            panel.plot(x, [slope * v + intercept for v in x], color="0.6", linewidth=1)
        panel.set(xlabel=axis, ylabel=MEASURED[axis], ylim=(0, 1.08 * max(points.values())))
    figure.suptitle(title)
    figure.savefig(path, dpi=80)


def rows(found: dict[str, dict[int, float]]) -> list[tuple[Any, ...]]:
    """(axis, what, values) for a table."""
    return [
        (axis, MEASURED[axis], "  ".join(f"{v}: {ms:.3g}" for v, ms in points.items()))
        for axis, points in found.items()
    ]
