"""What a run reports: `metrics.jsonl`, the progress bar or plain lines, `loss.png`, TensorBoard and W&B on request."""

from collections.abc import Mapping, Sequence
import json
from pathlib import Path
import sys
import time
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from openpi_ar import files
from openpi_ar.algorithms.losses import PARTS
from openpi_ar.config import TrainConfig
from openpi_ar.training import distributed, tracking
from openpi_ar.training.store import FULL

FILE, PLOT = "metrics.jsonl", "loss.png"
_COUNT = "_count"
_SHOWN = ("loss", "flow", *(f"{part}_{name}" for part in PARTS for name in ("ce", "exact_match")))
"""Plotted and shown beside the progress bar, as far as they are measured."""


class MetricsLog:
    """Appends one JSON object a line: `{"step": n, "kind": "train" | "eval", ...}`.

    On resume, lines after the resumed step are dropped first, so that no step appears twice; TensorBoard drops what it
    has of those steps, and W&B continues the run whose id is in a file beside it. Of several processes one writes.
    Raises UserError if an extra (TensorBoard, W&B) is asked for and not installed.
    """

    def __init__(self, directory: Path, cfg: TrainConfig, *, start_step: int):
        self.path = directory / FILE
        self._tensorboard = self._wandb = None
        if not distributed.is_primary():
            return
        self._tensorboard = tracking.tensorboard(directory, start_step) if cfg.tensorboard else None
        self._wandb = tracking.wandb(directory, cfg) if cfg.wandb else None
        kept = [json.dumps(r) + "\n" for r in read_metrics(self.path) if r["step"] <= start_step]
        files.replace_text(self.path, "".join(kept))

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """One record; flushed, so that a killed run keeps what it has seen."""
        if not distributed.is_primary():
            return
        values = {k: float(f"{v:.6g}") for k, v in values.items()}
        with files.writing(self.path, FULL), self.path.open("a") as f:
            f.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(f"{kind}/{name}", value, step)
        if self._wandb is not None:
            self._wandb.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        """Draws `loss.png` and flushes the extras."""
        if not distributed.is_primary():
            return
        plot_losses(self.path, self.path.parent / PLOT)
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records of a `metrics.jsonl`; a last line that was cut off by a crash is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def plot_losses(source: Path, target: Path) -> None:
    """Draws training and held-out curves of the loss and its parts, if there are two points or more."""
    from matplotlib.figure import Figure  # slow to import, needed once

    records = read_metrics(source)
    names = [n for n in _SHOWN if any(n in r for r in records)]
    if len(records) < 2 or not names:
        return
    fig = Figure(figsize=(4 * len(names), 3), layout="tight")
    axes = fig.subplots(1, len(names), squeeze=False)[0]
    for ax, name in zip(axes, names, strict=True):
        for kind, style in (("train", "-"), ("eval", "o")):
            points = [(r["step"], r[name]) for r in records if r["kind"] == kind and name in r]
            if points:
                ax.plot(*zip(*points, strict=True), style, label=kind, markersize=4, linewidth=1)
        ax.set(title=name, xlabel="step", yscale="linear" if name.endswith("exact_match") else "log")
        ax.grid(alpha=0.3)
    axes[0].legend()
    with files.writing(target, FULL):
        fig.savefig(target, dpi=120)


def averaged(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means by name over the steps or batches that measured something.

    A part of the loss (flow, or a kind of token) whose `<part>_count` is 0 in a row has nothing there; one that is 0 in
    all rows is left out, as are the counts.
    """
    means = {}
    for name in rows[0]:
        part = next((p for p in PARTS if name == p or name.startswith(f"{p}_")), None)
        values = [float(row[name]) for row in rows if part is None or float(row[part + _COUNT]) > 0]
        if values and not name.endswith(_COUNT):
            means[name] = float(np.mean(values))
    return means


class Window:
    """Metrics since the last report. They stay on the device until then, so steps are dispatched without waiting."""

    def __init__(self, batch_size: int):
        self._batch_size = batch_size
        self._rows: list[tuple[int, Mapping[str, Any]]] = []
        self._waits: list[float] = []
        self.restart_clock()

    def add(self, step: int, metrics: Mapping[str, Any], wait_seconds: float) -> None:
        """`step` counts updates done, this one included."""
        self._rows.append((step, metrics))
        self._waits.append(wait_seconds)
        self._timed += 1

    def check_finite(self) -> None:
        """Raises FloatingPointError naming the first step whose loss or gradient is not finite."""
        for step, metrics in self._rows:
            loss = float(metrics["loss"])
            if not np.isfinite([loss, float(metrics["grad_norm"])]).all():
                parts = ", ".join(f"{k} {float(v):.3g}" for k, v in metrics.items())
                raise FloatingPointError(f"the loss of step {step} is {loss} ({parts})")

    def report(self) -> dict[str, float]:
        """`averaged` since the last report, samples per second and seconds waited for data per step; starts afresh."""
        self.check_finite()
        means = averaged([metrics for _, metrics in self._rows])
        now = time.perf_counter()
        means["samples_per_s"] = self._timed * self._batch_size / (now - self._start)
        means["wait_s"] = float(np.mean(self._waits))
        self._rows, self._waits = [], []
        self.restart_clock()
        return means

    def restart_clock(self) -> None:
        """Time until now does not count as training (compiling, evaluating, saving)."""
        self._start, self._timed = time.perf_counter(), 0


class Display:
    """A progress bar on a terminal, plain lines elsewhere (logs, notebooks, pipes). Of several processes one shows
    it."""

    def __init__(self, num_steps: int, start_step: int, title: str):
        self.console = Console(soft_wrap=True, markup=False)
        self.num_steps = num_steps
        self._began = (time.perf_counter(), start_step)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metrics]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._bar = (
            Progress(*columns, console=self.console) if sys.stdout.isatty() and distributed.is_primary() else None
        )
        if self._bar is not None:
            self._task = self._bar.add_task(title, total=num_steps, completed=start_step, metrics="starting")

    def __enter__(self) -> "Display":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, step: int) -> None:
        """Moves the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Shows the loss parts beside the bar, or prints them as a line."""
        text = "  ".join(f"{n} {values[n]:.4g}" for n in _SHOWN if n in values)
        text += f"  {values['samples_per_s']:.3g} samples/s"
        if self._bar is not None:
            self._bar.update(self._task, metrics=text)
            return
        began, first = self._began
        left = (time.perf_counter() - began) / max(step - first, 1) * (self.num_steps - step)
        distributed.say(f"step {step}/{self.num_steps}  {text}  ETA {_duration(left)}")

    def line(self, text: str) -> None:
        """Prints a line above the bar."""
        if self._bar is not None:
            self.console.print(text, highlight=False)
        else:
            distributed.say(text)

    def evaluation(self, step: int, values: Mapping[str, float], texts: Sequence[tuple[str, str]]) -> None:
        """Prints held-out metrics, and true texts beside generated ones."""
        self.line(f"eval at {step}: " + "  ".join(f"{k} {v:.4g}" for k, v in values.items()))
        width = max((len(truth) for truth, _ in texts), default=0)
        for truth, text in texts:
            self.line(f"    {'=' if truth == text else '!'} {truth:<{width}} | {text}")


def _duration(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    h, m = divmod(minutes, 60)
    return f"{h}:{m:02}:{s:02}"
