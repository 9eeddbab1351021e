"""What `python -m openpi_ar.data` does: each command is a dataclass of its flags with a `run` that prints tables."""

from collections.abc import Mapping, Sequence
import dataclasses
import os
from pathlib import Path
import time
from typing import Annotated, Literal

import numpy as np
from rich.table import Table
import tyro

from openpi_ar import files
from openpi_ar.data.lerobot.columns import Frames, label_columns, read_columns, runs, subtask_labels, subtask_source
from openpi_ar.data.lerobot.meta import Episode, Meta, choose_episodes, read_meta
from openpi_ar.data.lerobot.video import probe
from openpi_ar.data.normalize import NEAR_CONSTANT, NormStats, compute_stats, save_norm_stats
from openpi_ar.errors import UserError
from openpi_ar.tables import console, new_table

_ANOTHER = "name another directory with --out"

Directory = Annotated[str, tyro.conf.Positional]


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Version, size, features, cameras, tasks and subtask convention of a dataset."""

    path: Directory
    """The directory that holds meta/."""

    def run(self) -> None:
        meta = read_meta(self.path)
        source = subtask_source(meta, "auto")
        frames = sum(e.length for e in meta.episodes)
        lengths = [e.length for e in meta.episodes] or [0]
        about = new_table("", "", title=str(meta.root), header=False)
        for name, value in {
            "version": meta.version,
            "robot": meta.robot_type,
            "frames a second": f"{meta.fps:g}",
            "episodes": f"{len(meta.episodes)} of {min(lengths)} to {max(lengths)} frames",
            "frames": f"{frames} ({frames / meta.fps / 3600:.2f} h)",
            "subtasks": {"none": "none found", "index": "subtask_index", "language": "language_persistent"}[source],
        }.items():
            about.add_row(name, value)
        features = new_table("feature", "type", "shape", "dimensions")
        for key, f in meta.features.items():
            names = ", ".join(map(str, f.names)) if isinstance(f.names, list) else ""
            features.add_row(key, f.dtype, " ".join(map(str, f.shape)), names)
        cameras, faults = _cameras(meta)
        console().print(about, features, cameras)
        for fault in [*_faults(meta), *faults]:
            console().print(fault, style="red", soft_wrap=True)
        # Last, so that a damaged file of texts leaves the rest to be seen.
        tasks = new_table("task", "episodes")
        for text in meta.tasks.values():
            tasks.add_row(text or "(no text)", str(sum(text in e.tasks for e in meta.episodes)))
        console().print(tasks)


@dataclasses.dataclass(frozen=True)
class Stats:
    """Normalisation statistics of states and actions, quantiles exact, straight from parquet; no video is decoded."""

    path: Directory
    """The directory that holds meta/."""
    state: tuple[str, ...] = ("observation.state",)
    """Features that are the state, side by side."""
    actions: tuple[str, ...] = ("action",)
    """Features that are the action, side by side."""
    episodes: tuple[int, ...] = ()
    """Empty: all."""
    mode: Literal["quantile", "z_score"] = "quantile"
    """How the statistics are to be used; stored with them. quantile: pi0.5, z_score: pi0."""
    out: Path | None = None
    """Directory to write norm_stats.json to; None: only print."""

    def run(self) -> None:
        began = time.perf_counter()
        if self.out is not None:
            files.check_directory(self.out, _ANOTHER)  # before the work that it is for
        meta = read_meta(self.path)
        frames = read_columns(meta, choose_episodes(meta, self.episodes), [*self.state, *self.actions])
        keys = {"state": self.state, "actions": self.actions}
        values = {name: frames.vector(features) for name, features in keys.items()}
        stats = {name: compute_stats(x.T, self.mode) for name, x in values.items()}
        seconds = time.perf_counter() - began
        for name, s in stats.items():
            console().print(
                _stats_table(name, s, values[name], [n for key in keys[name] for n in meta.dimension_names(key)])
            )
        console().print(
            f"mode {self.mode}; {len(frames)} rows in {seconds:.2f} s ({len(frames) / seconds:,.0f} rows/s), no video "
            "decoded"
        )
        if self.out is not None:
            with files.writing(self.out, _ANOTHER):
                save_norm_stats(self.out, stats)
            console().print(f"written to {self.out / 'norm_stats.json'}", soft_wrap=True)


@dataclasses.dataclass(frozen=True)
class Subtasks:
    """Every subtask with its frames, episodes and first frame; frames and episodes without one."""

    path: Directory
    """The directory that holds meta/."""
    source: str = "auto"
    """index, language, task, a feature of texts, or auto."""

    def run(self) -> None:
        meta = read_meta(self.path)
        source = subtask_source(meta, self.source)
        if source == "none":
            raise UserError(
                f"{meta.root} has no subtask labels: neither subtask_index with meta/subtasks.parquet nor "
                f"language_persistent is there; name another feature with --source"
            )
        frames = read_columns(meta, meta.episodes, label_columns(source))
        texts, labels = subtask_labels(frames, source)
        table = new_table("subtask", "frames", "episodes", "runs", "first", title=f"subtasks by {source}")
        episode_of = frames.episode_of
        pieces = np.array([label for _, _, label in runs(labels, frames.starts)])
        for i, text in enumerate(texts):
            rows = np.flatnonzero(labels == i)
            counts = (len(rows), len(np.unique(episode_of[rows])), int((pieces == i).sum()))
            table.add_row(text, *map(str, counts), frames.where(int(rows[0]), file=False))
        console().print(table)
        _flag_missing(frames, labels)


def _cameras(meta: Meta) -> tuple[Table, list[str]]:
    """Each camera by the first of its files that is there, and a line on each that is missing or unreadable."""
    table = new_table("camera", "stored as", "codec", "pixels", "frames a second", "height x width", "files")
    faults = []
    for key in meta.cameras:
        f = meta.features[key]
        if f.dtype == "image":
            files = {e.data for e in meta.episodes}
            table.add_row(key, "images in parquet", "", "", "", " x ".join(map(str, f.shape)), str(len(files)))
            continue
        files = {e.videos[key].path: e for e in reversed(meta.episodes) if key in e.videos}
        absent = _absent(files)
        shown, first = [""] * 4, min(set(files) - set(absent), default=None)
        if first is not None:
            try:
                info = probe(first)
                shown = [info.codec, info.pixels, f"{info.fps:g}", f"{info.height} x {info.width}"]
            except UserError as e:
                faults.append(str(e))
        table.add_row(
            key, "video", *shown, f"{len(files) - len(absent)} of {len(files)}" if absent else str(len(files))
        )
        if absent:
            faults.append(f"camera {key}: {_missing(absent, files, 'video')}")
        if placeless := [e.index for e in meta.episodes if key not in e.videos]:
            faults.append(
                f"camera {key}: meta/ does not say where the video of {len(placeless)} of {len(meta.episodes)} "
                f"episodes is, the first is episode {placeless[0]}"
            )
    return table, faults


def _faults(meta: Meta) -> list[str]:
    """A line for each feature that cannot be used, and for the data files that are missing."""
    files = {e.data: e for e in reversed(meta.episodes)}
    absent = _absent(files)
    lines = [f"feature {key} {f.fault}: it cannot be used" for key, f in meta.features.items() if f.fault]
    return lines + ([_missing(absent, files, "data")] if absent else [])


def _absent(files: Mapping[Path, Episode]) -> list[Path]:
    """The files that do not exist, ordered by their first episode."""
    return sorted((path for path in files if not os.path.isfile(path)), key=lambda path: files[path].index)


def _missing(absent: Sequence[Path], files: Mapping[Path, Episode], what: str) -> str:
    return (
        f"{len(absent)} of {len(files)} {what} files missing, the first is {absent[0]} (episode "
        f"{files[absent[0]].index})"
    )


def _stats_table(name: str, s: NormStats, x: np.ndarray, names: list[str]) -> Table:
    table = new_table(name, "mean", "std", "q01", "q99", "")
    for i in range(s.dims):
        # The statistics of such a dimension are floored already, so the data is asked.
        spread = np.ptp(np.quantile(x[:, i], [0.01, 0.99])) if s.mode == "quantile" else x[:, i].std()
        flat = spread < NEAR_CONSTANT
        values = (f"{a[i]:.5g}" for a in (s.mean, s.std, s.q01, s.q99))
        table.add_row(names[i], *values, "constant: centred, not scaled" if flat else "")
    return table


def _flag_missing(frames: Frames, labels: np.ndarray) -> None:
    missing = np.flatnonzero(labels < 0)
    if not len(missing):
        console().print(f"every one of {len(frames)} frames has a subtask")
        return
    counts = np.bincount(frames.episode_of[missing], minlength=len(frames.episodes))
    empty = [frames.episodes[e].index for e in np.flatnonzero(counts == np.diff(frames.starts))]
    console().print(
        f"{len(missing)} of {len(frames)} frames have no subtask, in {int((counts > 0).sum())} episodes; the first is "
        f"{frames.where(int(missing[0]), file=False)}; training skips them",
        style="red",
        soft_wrap=True,
    )
    if empty:
        some = ", ".join(map(str, empty[:20])) + (", ..." if len(empty) > 20 else "")
        console().print(f"{len(empty)} episodes have none at all: {some}", style="red", soft_wrap=True)
