"""What `infer.py` shows of a result: printed, and drawn into a file."""

from collections.abc import Sequence
import math
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from openpi_ar import files
from openpi_ar.compilation import Programs
from openpi_ar.text.templates import asks_for_places


def print_result(
    report: dict[str, Any], console: Console, programs: Programs, action_names: Sequence[str] = ()
) -> None:
    """What was generated and how sure it is of it, the actions, and what took its time."""
    note = "" if report["text_status"] == "ok" else f"   [{report['text_status']}: the text has no proper end]"
    written = "answer" if "answer" in report else "subtask"
    for name, text in (("prompt", report["prompt"]), (written, report[written] + note)):
        console.print(f"{name + ':':<9}{text}", highlight=False, soft_wrap=True)
    if report.get("logprob") is not None:
        lead = "" if report["margin"] is None else f", closest choice by a factor of {math.exp(report['margin']):.3g}"
        console.print(f"sure:    {math.exp(report['logprob']):.1%}{lead}", highlight=False, soft_wrap=True)
    if "scores" in report:
        _print_scores(report, console)
    if "actions" in report:
        table = Table("step", *action_names, title="actions")
        for step, action in enumerate(report["actions"]):
            table.add_row(str(step), *(f"{value:.4f}" for value in action))
        # Two arms have 14 columns: squeezed into a terminal they would lose their digits.
        Console(width=max(console.width, 12 * len(table.columns)), markup=False).print(table)
    first = "with compilation" if programs.compiled else "programs from the cache" if programs.read else ""
    notes = {"total": "as one program", "first_call": first}
    table = Table("stage", "ms", "", title="time")
    for name, ms in report["timing"].items():
        table.add_row(name.replace("_", " "), f"{ms:.1f}", notes.get(name, ""))
    console.print(table)


def _print_scores(report: dict[str, Any], console: Console) -> None:
    """The list that text was chosen from, likeliest first. Greedy decoding may end in another one."""
    scores = sorted(report["scores"].items(), key=lambda pair: -pair[1])
    table = Table("subtask", "log-probability", title="scores")
    for text, value in scores:
        table.add_row(text, f"{value:.3f}")
    console.print(table)
    if scores[0][0] != report["subtask"]:
        console.print(
            f"note: the list's likeliest is {scores[0][0]!r}; decoding, which chooses token by token, ended elsewhere",
            highlight=False,
            soft_wrap=True,
        )


def plot_chunk(path: Path, report: dict[str, Any], action_names: Sequence[str]) -> None:
    """The action chunk over its steps, a panel for each dimension, as a .png, .pdf or .svg file."""
    from matplotlib.figure import Figure

    actions = report["actions"]
    fig = Figure(figsize=(6, 1.5 * actions.shape[1] + 1), layout="tight")
    axes = fig.subplots(actions.shape[1], 1, sharex=True, squeeze=False)[:, 0]
    for ax, name, values in zip(axes, action_names, actions.T, strict=True):
        ax.plot(values, marker="o")
        ax.set_ylabel(name)
    axes[-1].set_xlabel("control step")
    fig.suptitle(f"{report['prompt']}\nsubtask: {report['subtask']}", fontsize=9, parse_math=False)
    with files.writing(path, "name another file with --plot"):
        fig.savefig(path, dpi=120)


def print_boxes(report: dict[str, Any], console: Console) -> None:
    """The objects of a detection or segmentation, if the answer has any."""
    if report["boxes"]:
        table = Table("object", "top", "left", "bottom", "right", "mask", title="boxes in pixels of the first image")
        for box in report["boxes"]:
            code = "" if box["code"] is None else " ".join(map(str, box["code"]))
            table.add_row(box["label"], *(f"{side:.1f}" for side in box["box"]), code)
        console.print(table)
    elif asks_for_places(report["prompt"]):
        console.print("note: the answer has no boxes")
    if report["stray_tokens"]:
        console.print(f"note: {report['stray_tokens']} <loc> or <seg> tokens of the answer belong to no object")


def draw_boxes(path: Path, image: np.ndarray, report: dict[str, Any]) -> None:
    """The first image with the answer above it and its boxes in it, as a .png, .pdf or .svg file."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    fig = Figure(figsize=(6, 6 * image.shape[0] / image.shape[1] + 0.8), layout="tight")
    ax = fig.subplots()
    ax.imshow(image)
    for i, box in enumerate(report["boxes"]):
        top, left, bottom, right = box["box"]
        color = f"C{i}"
        ax.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, color=color, linewidth=2))
        style = {"color": "white", "backgroundcolor": color, "fontsize": 8, "va": "bottom", "parse_math": False}
        ax.text(left, top, box["label"], **style)
    ax.set_title(f"{report['prompt']}\n{report['answer']}", fontsize=8, wrap=True, parse_math=False)
    ax.set_axis_off()
    with files.writing(path, "name another file with --plot"):
        fig.savefig(path, dpi=120)
