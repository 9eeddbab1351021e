"""The numbers and texts of LeRobot episodes as arrays, read straight from parquet columns: no video is opened.

Who says which subtask a frame belongs to (`subtask_labels`):

    index       column `subtask_index`, texts in meta/subtasks.parquet         LeRobot 0.4.4 to 0.5
    language    column `language_persistent`: what is said from when on        LeRobot 0.6 and newer
    task        the task of each frame, which then changes within the episode
    <column>    any other column of texts
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import itertools

import numpy as np
import pyarrow as pa
from rich.progress import track

from openpi_ar.data.lerobot.meta import LANGUAGE, SUBTASK_INDEX, Episode, Meta, read_table
from openpi_ar.data.robot_spec import split_key
from openpi_ar.errors import UserError

_MANY_FILES = 100
"""Reading more files than this takes seconds, so a progress bar is shown."""


@dataclasses.dataclass(frozen=True, eq=False)
class Frames:
    """All frames of some episodes, one episode after the other. N frames, E episodes.

    columns      numbers [N dims] by feature; texts [N] (dtype object).
    starts       first frame of each episode, and N: [E + 1].
    timestamps   float32 [N], seconds from the start of the episode.
    timelines    per episode, the rows of `language_persistent`; empty if not asked for.
    """

    meta: Meta
    episodes: tuple[Episode, ...]
    columns: Mapping[str, np.ndarray]
    starts: np.ndarray
    timestamps: np.ndarray
    timelines: tuple[Sequence[dict], ...]

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def episode_of(self) -> np.ndarray:
        """Position in `episodes` of each frame [N]."""
        return np.repeat(np.arange(len(self.episodes)), np.diff(self.starts))

    def where(self, frame: int) -> str:
        """ "FILE: episode E, frame F" of a frame [0, N), for messages."""
        e = int(np.searchsorted(self.starts, frame, side="right")) - 1
        return f"{self.episodes[e].data}: episode {self.episodes[e].index}, frame {self.number(frame)}"

    def number(self, frame: int) -> int:
        """Of a frame [0, N) within its episode."""
        return frame - int(self.starts[int(np.searchsorted(self.starts, frame, side="right")) - 1])

    def vector(self, keys: Sequence[str]) -> np.ndarray:
        """Features side by side, float32 [N dims]; "name[0:7]" is some dimensions of one. Raises UserError at the first value
        that is not finite, and if a feature lacks the dimensions."""
        out = np.concatenate([self._part(key) for key in keys], axis=1)
        bad = ~np.isfinite(out)
        if bad.any():
            frame, dim = (int(i) for i in np.argwhere(bad)[0])
            raise UserError(
                f"{self.where(frame)}: dimension {dim} of {' + '.join(keys)} is {out[frame, dim]} "
                f"({int(bad.any(1).sum())} such frames in all): repair or leave out the episode (data.episodes)"
            )
        return out

    def _part(self, key: str) -> np.ndarray:
        name, part = split_key(key)
        whole = np.asarray(self.columns[self.meta.find(name)], np.float32)
        if not whole[:, part].size or (part.stop or 0) > whole.shape[1]:
            raise UserError(f"{key!r}: {name} of {self.meta.root} has {whole.shape[1]} dimensions, counted from 0")
        return whole[:, part]


def read_columns(meta: Meta, episodes: Sequence[Episode], keys: Sequence[str]) -> Frames:
    """The features `keys` (slices aside) of these episodes; `language_persistent` may be one of them.

    Raises UserError naming file and episode if a file or a column is missing, frames are lost or out of order, or the
    timestamps do not belong to the dataset's fps.
    """
    keys = [meta.find(split_key(key)[0]) for key in keys]
    by_file: dict = {}
    for episode in episodes:
        by_file.setdefault(episode.data, []).append(episode)
    parts: dict[int, dict[str, np.ndarray]] = {}
    timelines: dict[int, Sequence[dict]] = {}
    wanted = list(dict.fromkeys([*keys, "episode_index", "frame_index", "timestamp"]))
    for path, group in track(by_file.items(), "reading", transient=True, disable=len(by_file) < _MANY_FILES):
        table = read_table(path, wanted, where=_span(group))
        columns = {k: _numbers(meta, table[k], k, f"{path} ({_span(group)})") for k in wanted if k != LANGUAGE}
        places = _places(columns["episode_index"][:, 0])
        for episode in group:
            rows = places.get(episode.index, slice(0, 0))
            parts[episode.index] = part = {k: v[rows] for k, v in columns.items()}
            _check(meta, episode, part)
            # The timeline is the same on every frame of an episode.
            timelines[episode.index] = table[LANGUAGE][rows.start].as_py() or [] if LANGUAGE in wanted else []
    order = [e.index for e in episodes]
    starts = np.concatenate([[0], np.cumsum([len(parts[i]["frame_index"]) for i in order])])
    columns = {k: np.concatenate([parts[i][k] for i in order]) for k in wanted if k != LANGUAGE}
    stamps = columns["timestamp"][:, 0].astype(np.float32)
    return Frames(meta, tuple(episodes), columns, starts, stamps, tuple(timelines[i] for i in order))


def subtask_labels(frames: Frames, source: str) -> tuple[list[str], np.ndarray]:
    """(texts, index of each frame's text [N], -1 where the frame has none), by one of the conventions above."""
    if source == "language":
        return _language_labels(frames)
    if source in ("index", "task"):
        texts, key = (frames.meta.subtasks, SUBTASK_INDEX) if source == "index" else (frames.meta.tasks, "task_index")
        file = frames.meta.subtasks_file if source == "index" else frames.meta.tasks_file
        return _index_labels(frames, key, texts or {}, str(file), required=source == "task")
    return _text_labels([str(t or "") for t in frames.columns[source]])


def task_labels(frames: Frames) -> tuple[list[str], np.ndarray]:
    """(texts, index of each frame's task [N]). Raises UserError naming file and frame if a task has no text."""
    return _index_labels(frames, "task_index", frames.meta.tasks, str(frames.meta.tasks_file), required=True)


def subtask_source(meta: Meta, asked: str) -> str:
    """The convention to use: `asked`, or for "auto" the one that the dataset follows; "none" if it has no labels.

    Raises UserError if what was asked for is not there.
    """
    has_index = SUBTASK_INDEX in meta.features
    if asked == "auto":
        if has_index and meta.subtasks is not None:
            return "index"
        return "language" if LANGUAGE in meta.features else "none"
    needs = {"index": SUBTASK_INDEX, "language": LANGUAGE, "task": "task_index"}.get(asked, asked)
    if asked != "none":
        feature = meta.feature(needs)
        if asked == needs and feature.dtype != "string":
            raise UserError(f"data.subtasks is {asked!r}, but that feature holds {feature.dtype}, not texts")
    if asked == "index" and meta.subtasks is None:
        raise UserError(f"{meta.root / 'meta'} holds no subtasks.parquet (or .jsonl): the texts of {SUBTASK_INDEX}")
    return asked


def label_columns(source: str) -> tuple[str, ...]:
    """The features that `subtask_labels` needs of `read_columns`."""
    table = {"none": (), "index": (SUBTASK_INDEX,), "language": (LANGUAGE,), "task": ("task_index",)}
    return table.get(source, (source,))


def _span(group: Sequence[Episode]) -> str:
    first, last = group[0].index, group[-1].index
    return f"episode {first}" if first == last else f"episodes {first} to {last}"


def _places(indices: np.ndarray) -> dict[int, slice]:
    """Rows of each episode in a file. An episode in two pieces is left with the last, and then found to be too short."""
    borders = np.concatenate([[0], np.flatnonzero(np.diff(indices)) + 1, [len(indices)]])
    return {int(indices[a]): slice(int(a), int(b)) for a, b in itertools.pairwise(borders) if b > a}


def _check(meta: Meta, episode: Episode, part: Mapping[str, np.ndarray]) -> None:
    where = f"{episode.data}: episode {episode.index}"
    frame_index, stamps = part["frame_index"][:, 0], part["timestamp"][:, 0].astype(np.float64)
    count = len(frame_index)
    if count != episode.length or not count:
        raise UserError(
            f"{where} has {count} frames, meta/ says {episode.length}: a file is damaged or from another set"
        )
    wrong = np.flatnonzero(frame_index != np.arange(count))
    if len(wrong):
        raise UserError(f"{where}, frame {wrong[0]}: frame_index is {frame_index[wrong[0]]}, not its place: damaged?")
    # Half a frame off, another image would be read.
    off = np.flatnonzero(~(np.abs(stamps - np.arange(count) / meta.fps) < 0.5 / meta.fps))
    if len(off):
        raise UserError(
            f"{where}, frame {off[0]}: timestamp is {stamps[off[0]]:g} s, at the dataset's {meta.fps:g} frames a second it "
            f"should be {off[0] / meta.fps:g} s: fps in meta/info.json and the recording differ"
        )


def _numbers(meta: Meta, column: pa.ChunkedArray, key: str, where: str) -> np.ndarray:
    """[rows dims]; a scalar is one dimension, arrays are flattened. Texts [rows]."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    rows = len(array)
    if meta.features[key].dtype == "string":
        return np.asarray(array.to_pylist(), object)
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    while pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_fixed_size_list(array.type):
        array = array.flatten()
    flat = array.to_numpy(zero_copy_only=False)
    dims = int(np.prod(meta.features[key].shape))
    if flat.size != rows * dims:
        raise UserError(
            f"{where}: feature {key!r} must hold {dims} numbers in each of {rows} frames (shape "
            f"{list(meta.features[key].shape)} in meta/info.json), found {flat.size}"
        )
    if flat.dtype == object:  # booleans or integers of which some are null
        flat = flat.astype(np.float64)
    return flat.reshape(rows, dims)


def _index_labels(
    frames: Frames, key: str, texts: Mapping[int, str], file: str, *, required: bool
) -> tuple[list[str], np.ndarray]:
    index = frames.columns[key][:, 0].astype(np.float64)
    index = np.where(np.isnan(index), -1, index).astype(np.int64)
    used = np.unique(index)
    lost = [int(i) for i in used if (i >= 0 and i not in texts) or (required and not texts.get(int(i), "").strip())]
    if lost:
        frame = int(np.flatnonzero(index == lost[0])[0])
        raise UserError(f"{frames.where(frame)}: {key} is {lost[0]}, which has no text in {file}: add it there")
    names, place = [], np.full(len(used), -1)
    for i, value in enumerate(used):
        if value >= 0 and texts[int(value)].strip():
            place[i] = len(names)
            names.append(texts[int(value)].strip())
    return names, place[np.searchsorted(used, index)]


def _language_labels(frames: Frames) -> tuple[list[str], np.ndarray]:
    said = [""] * len(frames)
    for e, timeline in enumerate(frames.timelines):
        start, stop = int(frames.starts[e]), int(frames.starts[e + 1])
        begin, texts = _timeline(timeline)
        # Both sides float32: LeRobot's writer widens the frames' float32 timestamps.
        active = np.searchsorted(begin, frames.timestamps[start:stop], side="right") - 1
        said[start:stop] = [texts[i] if i >= 0 else "" for i in active]
    return _text_labels(said)


def _timeline(rows: Sequence[dict]) -> tuple[np.ndarray, list[str]]:
    """Start times float32, ascending, and texts of the subtasks among the persistent rows of an episode."""
    subtasks = [r for r in rows if r.get("style") == "subtask" and r.get("camera") is None]
    begin = np.asarray([r["timestamp"] for r in subtasks], np.float32)
    order = np.argsort(begin, kind="stable")
    return begin[order], [str(subtasks[i]["content"] or "") for i in order]


def _text_labels(said: Sequence[str]) -> tuple[list[str], np.ndarray]:
    names: dict[str, int] = {}
    labels = [names.setdefault(text.strip(), len(names)) if text.strip() else -1 for text in said]
    return list(names), np.asarray(labels, np.int64)


def runs(labels: np.ndarray, starts: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """(first frame, one past the last, label) of each run of one label within one episode."""
    edges = np.flatnonzero(np.diff(labels)) + 1
    borders = np.union1d(edges, starts)
    for a, b in itertools.pairwise(borders):
        yield int(a), int(b), int(labels[a])
