"""The numbers and texts of LeRobot episodes as arrays, read straight from parquet columns: no video is opened.

Which subtask a frame belongs to is recorded in one of these ways (`subtask_labels`):

    index       column `subtask_index`, texts in meta/subtasks.parquet         LeRobot 0.4.4 to 0.5
    language    column `language_persistent`: subtasks and when they begin     LeRobot 0.6 and newer
    task        the task of each frame, which then changes within the episode
    <column>    any other column of texts
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import itertools
from typing import Any

import numpy as np
import pyarrow as pa
from rich.progress import track

from openpi_ar.data.lerobot.meta import LANGUAGE, SUBTASK_INDEX, Episode, Meta
from openpi_ar.data.lerobot.parquet import read_table, to_array
from openpi_ar.data.lerobot.texts import text_of
from openpi_ar.errors import UserError
from openpi_ar.robot_spec import split_key
from openpi_ar.textfile import is_number

_MANY_FILES = 100
"""Reading more files than this takes seconds, so a progress bar is shown."""
_CONVENTIONS = {"index": SUBTASK_INDEX, "language": LANGUAGE, "task": "task_index"}
"""The column that each way of recording subtasks needs; any other name is that of a column of texts."""

Timeline = tuple[np.ndarray, list[str]]
"""When subtasks begin, float32 seconds, ascending, and their texts."""


@dataclasses.dataclass(frozen=True, eq=False)
class Frames:
    """All frames of some episodes, one episode after the other. N frames, E episodes.

    columns      numbers [N dims] by feature; texts [N] (dtype object).
    starts       first frame of each episode, and N: [E + 1].
    timestamps   float32 [N], seconds from the start of the episode.
    timelines    subtasks of each episode by `language_persistent`; none if not asked for.
    """

    meta: Meta
    episodes: tuple[Episode, ...]
    columns: Mapping[str, np.ndarray]
    starts: np.ndarray
    timestamps: np.ndarray
    timelines: tuple[Timeline, ...]

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def episode_of(self) -> np.ndarray:
        """Position in `episodes` of each frame [N]."""
        return np.repeat(np.arange(len(self.episodes)), np.diff(self.starts))

    def rows(self, e: int) -> slice:
        """The frames of the episode at position `e` in `episodes`."""
        return slice(int(self.starts[e]), int(self.starts[e + 1]))

    def place(self, frame: int) -> tuple[int, int]:
        """(position in `episodes`, number within the episode) of a frame [0, N)."""
        e = int(np.searchsorted(self.starts, frame, side="right")) - 1
        return e, frame - int(self.starts[e])

    def where(self, frame: int, *, file: bool = True) -> str:
        """ "FILE: episode E, frame F" of a frame [0, N), for messages."""
        e, number = self.place(frame)
        return f"{self.episodes[e].data}: " * file + f"episode {self.episodes[e].index}, frame {number}"

    def vector(self, keys: Sequence[str]) -> np.ndarray:
        """Features side by side, float32 [N dims]; "name[0:7]" is some dimensions of one.

        Raises UserError at a value that is not finite, a feature that lacks the dimensions or holds no numbers.
        """
        out = np.concatenate([self._part(key) for key in keys], axis=1)
        bad = ~np.isfinite(out)
        if bad.any():
            frame, dim = map(int, np.argwhere(bad)[0])
            raise UserError(
                f"{self.where(frame)}: dimension {dim} of {' + '.join(keys)} is {out[frame, dim]} "
                f"({int(bad.any(1).sum())} such frames in all): repair or leave out the episode (data.episodes)"
            )
        return out

    def _part(self, key: str) -> np.ndarray:
        name, part = split_key(key)
        name = self.meta.find(name)
        with np.errstate(over="ignore"):  # too large for float32 is infinite: `vector` says so
            whole = self.numbers(name).astype(np.float32)
        if not whole[:, part].size or (part.stop or 0) > whole.shape[1]:
            raise UserError(f"{key!r}: {name} of {self.meta.root} has {whole.shape[1]} dimensions, counted from 0")
        return whole[:, part]

    def numbers(self, name: str) -> np.ndarray:
        """A feature's values as read, [N dims]. Raises UserError if it holds no numbers."""
        values = self.columns.get(name)
        if values is None or values.dtype == object:
            what = "texts" if self.meta.feature(name).dtype == "string" else "rows of language"
            raise UserError(f"feature {name!r} of {self.meta.root} holds {what}, not numbers: name another one")
        return values

    def index(self, name: str) -> np.ndarray:
        """A feature of one whole number a frame, int64 [N]; -1 where it is empty. Raises UserError if it is none."""
        values = self.numbers(name).astype(np.float64)
        if values.shape[1] != 1:
            raise UserError(
                f"feature {name!r} of {self.meta.root} has {values.shape[1]} dimensions, expected one index"
            )
        flat = np.where(np.isnan(values[:, 0]), -1, values[:, 0])
        odd = np.flatnonzero((flat != np.round(flat)) | (np.abs(flat) > 2**31))
        if len(odd):
            raise UserError(f"{self.where(int(odd[0]))}: {name} is {flat[odd[0]]:g}, expected a whole number")
        return flat.astype(np.int64)


def read_columns(meta: Meta, episodes: Sequence[Episode], keys: Sequence[str]) -> Frames:
    """The features `keys` (slices aside) of these episodes; `language_persistent` may be one of them.

    Raises UserError naming file and episode if a file or a column is missing, frames are lost or out of order, or the
    timestamps do not belong to the dataset's fps.
    """
    keys = [meta.find(split_key(key)[0]) for key in keys]
    for key in keys:
        if (kind := meta.feature(key).dtype) in ("image", "video"):
            raise UserError(f"feature {key!r} of {meta.root} holds {kind}s, not numbers: name another one")
    if not episodes:
        raise UserError(f"{meta.root} has no episodes")
    by_file: dict = {}
    for episode in episodes:
        by_file.setdefault(episode.data, []).append(episode)
    parts: dict[int, dict[str, np.ndarray]] = {}
    timelines: dict[int, Timeline] = {}
    wanted = list(dict.fromkeys([*keys, "episode_index", "frame_index", "timestamp"]))
    for path, group in track(by_file.items(), "reading", transient=True, disable=len(by_file) < _MANY_FILES):
        table = read_table(path, wanted, where=_span(group))
        where = f"{path} ({_span(group)})"
        columns = {k: _array(meta, table[k], k, where) for k in wanted if k != LANGUAGE}
        places = _places(columns["episode_index"][:, 0])
        for episode in group:
            rows = places.get(episode.index, slice(0, 0))
            parts[episode.index] = part = {k: v[rows] for k, v in columns.items()}
            _check(meta, episode, part)
            # The timeline is the same on every frame of an episode.
            language = table[LANGUAGE][rows.start].as_py() if LANGUAGE in wanted else None
            timelines[episode.index] = _subtasks(language, f"{path}: episode {episode.index}")
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
        meta = frames.meta
        texts, key = (meta.subtasks, SUBTASK_INDEX) if source == "index" else (meta.tasks, "task_index")
        file = meta.subtasks_file if source == "index" else meta.tasks_file
        return _index_labels(frames, key, texts, str(file), required=source == "task")
    values = frames.columns[source].tolist()
    texts = {value: text_of(value, f"{frames.meta.root}: {source}") for value in dict.fromkeys(values)}
    return _text_labels([texts[value] for value in values])


def task_labels(frames: Frames) -> tuple[list[str], np.ndarray]:
    """(texts, index of each frame's task [N]). Raises UserError naming file and frame if a task has no text."""
    return _index_labels(frames, "task_index", frames.meta.tasks, str(frames.meta.tasks_file), required=True)


def subtask_source(meta: Meta, asked: str) -> str:
    """The convention to use: `asked`, or for "auto" the one that the dataset follows; "none" if it has no labels.

    Raises UserError if what was asked for is not there.
    """
    has_index = SUBTASK_INDEX in meta.features
    if asked == "auto":
        if has_index and meta.subtasks_file is not None:
            return "index"
        return "language" if LANGUAGE in meta.features else "none"
    if asked == "none":
        return asked
    if asked not in _CONVENTIONS:
        asked = meta.find(asked)
        if (kind := meta.feature(asked).dtype) != "string":
            raise UserError(f"data.subtasks is {asked!r}, but that feature holds {kind}, not texts")
        return asked
    meta.feature(_CONVENTIONS[asked])
    if asked == "index" and meta.subtasks_file is None:
        raise UserError(f"{meta.root / 'meta'} holds no subtasks.parquet (or .jsonl): the texts of {SUBTASK_INDEX}")
    return asked


def label_columns(source: str) -> tuple[str, ...]:
    """The features that `subtask_labels` needs of `read_columns`."""
    return () if source == "none" else (_CONVENTIONS.get(source, source),)


def _span(group: Sequence[Episode]) -> str:
    first, last = group[0].index, group[-1].index
    return f"episode {first}" if first == last else f"episodes {first} to {last}"


def _array(meta: Meta, column: pa.ChunkedArray, key: str, where: str) -> np.ndarray:
    # LeRobot's own columns (frame_index, ...) need not be among the features.
    feature = meta.features.get(key)
    shape, texts = ((1,), False) if feature is None else (feature.shape, feature.dtype == "string")
    return to_array(column, shape, texts=texts, where=f"{where}: feature {key!r}")


def _places(indices: np.ndarray) -> dict[int, slice]:
    """Rows of each episode in a file. An episode in two pieces is left with the last: `_check` finds it too short."""
    borders = np.concatenate([[0], np.flatnonzero(np.diff(indices)) + 1, [len(indices)]])
    indices = np.nan_to_num(indices, nan=-1)
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
            f"{where}, frame {off[0]}: timestamp is {stamps[off[0]]:g} s, at the dataset's {meta.fps:g} frames a "
            f"second it should be {off[0] / meta.fps:g} s: fps in meta/info.json and the recording differ"
        )


def _index_labels(
    frames: Frames, key: str, texts: Mapping[int, str], file: str, *, required: bool
) -> tuple[list[str], np.ndarray]:
    index = frames.index(key)
    used = np.unique(index)
    textless = [int(i) for i in used if (i >= 0 and i not in texts) or (required and not texts.get(int(i)))]
    if textless:
        frame = int(np.flatnonzero(index == textless[0])[0])
        raise UserError(f"{frames.where(frame)}: {key} is {textless[0]}, which has no text in {file}: add it there")
    names, place = [], np.full(len(used), -1)
    for i, value in enumerate(used):
        if value >= 0 and texts[int(value)]:
            place[i] = len(names)
            names.append(texts[int(value)])
    return names, place[np.searchsorted(used, index)]


def _language_labels(frames: Frames) -> tuple[list[str], np.ndarray]:
    labels = []
    for e, (begin, texts) in enumerate(frames.timelines):
        # Both sides float32: LeRobot's writer widens the frames' float32 timestamps.
        active = np.searchsorted(begin, frames.timestamps[frames.rows(e)], side="right")
        labels += [["", *texts][i] for i in active]
    return _text_labels(labels)


def _subtasks(timeline: Any, where: str) -> Timeline:
    rows = [] if timeline is None else timeline
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{where}: {LANGUAGE} must be a list of rows, found {type(timeline).__name__}")
    rows = [row for row in rows if row.get("style") == "subtask" and row.get("camera") is None]
    for row in rows:
        if not is_number(row.get("timestamp")):
            raise UserError(
                f"{where}: {LANGUAGE} has a subtask at {row.get('timestamp')!r}, expected a time in seconds"
            )
    begin = np.asarray([row["timestamp"] for row in rows], np.float32)
    order = np.argsort(begin, kind="stable")
    return begin[order], [text_of(rows[i].get("content"), f"{where}: {LANGUAGE}") for i in order]


def _text_labels(texts: Sequence[str]) -> tuple[list[str], np.ndarray]:
    names: dict[str, int] = {}
    labels = [names.setdefault(text, len(names)) if text else -1 for text in texts]
    return list(names), np.asarray(labels, np.int64)


def runs(labels: np.ndarray, starts: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """(first frame, one past the last, label) of each run of one label within one episode."""
    borders = np.union1d(np.flatnonzero(np.diff(labels)) + 1, starts)
    for a, b in itertools.pairwise(borders.tolist()):
        yield a, b, int(labels[a])
