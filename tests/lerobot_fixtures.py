"""Datasets written by LeRobot itself, what is in them, and copies to break."""

from collections.abc import Callable
import io
import json
from pathlib import Path
import shutil

import numpy as np
from PIL import Image
import pyarrow as pa
import pyarrow.parquet as pq

from openpi_ar.config import LeRobotData
from openpi_ar.data.lerobot.load import load_lerobot
from openpi_ar.data.lerobot.source import LeRobotSource

GOLDEN = Path(__file__).parent / "golden/lerobot"
DATASETS = ("v21_images", "v21_video", "v30_images_lang", "v30_video")
CAMERAS = ("base_0_rgb", "left_wrist_0_rgb")
LENGTHS = (20, 18, 22)
STARTS = (0, 20, 38)
HORIZON = 6
TASKS = ("put the red block in the bowl", "open the drawer", "put the red block in the bowl")
# (subtask, frames) of each episode.
TIMELINES = (
    (("reach for the red block", 7), ("lift the red block", 7), ("place it in the bowl", 6)),
    (("reach for the handle", 9), ("pull the drawer open", 9)),
    (("reach for the red block", 8), ("lift the red block", 7), ("place it in the bowl", 7)),
)
SUBTASKS = tuple(text for timeline in TIMELINES for text, count in timeline for _ in range(count))


def sources(path: str | Path, *, needs_subtask: bool = True, size: tuple[int, int] = (64, 64), **fields: object):
    """(training, held-out, remarks), all frames in both unless `held_out` is given; decoded at every read."""
    cfg = LeRobotData(**({"path": str(path), "held_out": 0.0, "frames": "decode"} | fields))  # type: ignore[arg-type]
    return load_lerobot(cfg, HORIZON, CAMERAS, size, needs_subtask=needs_subtask)


def source(path: str | Path, **fields: object) -> LeRobotSource:
    return sources(path, **fields)[0]


def rows(name: str) -> list[dict]:
    """Every frame of a dataset in order, as plain Python values, by pyarrow alone."""
    files = sorted((GOLDEN / name / "data").glob("*/*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def pixels(camera: str) -> np.ndarray:
    """What was recorded, uint8 [60 64 64 3]."""
    key = f"observation.images.{camera}"
    return np.stack([np.asarray(Image.open(io.BytesIO(row[key]["bytes"]))) for row in rows("v21_images")])


def broken(tmp_path: Path, name: str) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(GOLDEN / name, tmp_path / name))


def edit_json(file: Path, change: Callable[[dict], object]) -> None:
    body = json.loads(file.read_text())
    change(body)
    file.write_text(json.dumps(body))


def edit_column(file: Path, name: str, change: Callable[[list], object]) -> None:
    """Changes a column of a parquet file, given as Python values, in place."""
    table = pq.read_table(file)
    values = table[name].to_pylist()
    change(values)
    at = table.column_names.index(name)
    column = pa.array(values, table.schema.field(name).type)
    pq.write_table(table.set_column(at, name, column), file)


def add_feature(path: Path, name: str, **entry: object) -> None:
    edit_json(path / "meta/info.json", lambda info: info["features"].update({name: entry}))


def add_texts(path: Path, name: str, texts: Callable[[int], list]) -> None:
    add_feature(path, name, dtype="string", shape=[1], names=None)
    for file in path.glob("data/*/*.parquet"):
        table = pq.read_table(file)
        pq.write_table(table.append_column(name, pa.array(texts(table.num_rows), pa.string())), file)


def rewrite_tasks(path: Path, change: Callable[[list[dict]], object]) -> list[dict]:
    file = path / "meta/tasks.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    change(rows)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows
