"""A question on the command line (`infer.py --question`): what is printed of its answer, and drawn into the image."""

from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from openpi_ar import files
from openpi_ar.text.templates import asks_for_places


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
