"""What a LeRobot dataset says about itself: `meta/` of versions 2.0, 2.1 and 3.0, read with pyarrow alone.

v2.x   meta/{info.json, episodes.jsonl, tasks.jsonl}          one parquet and, per camera, one video file per episode
v3.0   meta/{info.json, tasks.parquet, episodes/*/*.parquet}  files shared by episodes, which know their place in them
either meta/subtasks.{parquet,jsonl}                          optional: texts of the column `subtask_index`
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from openpi_ar.data.lerobot.hub import local_dataset
from openpi_ar.data.robot_spec import split_key
from openpi_ar.errors import UserError

INFO = "meta/info.json"
SUBTASK_INDEX = "subtask_index"
LANGUAGE = "language_persistent"

_LAYOUT = {"v2.0": 2, "v2.1": 2, "v3.0": 3}
_PARQUET_ERRORS = (pa.ArrowException, OSError)


@dataclasses.dataclass(frozen=True)
class Feature:
    """One entry of `features` in info.json. `names` and `info` are as found there."""

    dtype: str
    shape: tuple[int, ...]
    names: Any = None
    info: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class VideoSpan:
    """Where the frames of one episode and camera are: from `start` seconds on in the file."""

    path: Path
    start: float


@dataclasses.dataclass(frozen=True)
class Episode:
    """`length` frames, in one parquet file that may hold other episodes too. `videos` is keyed by feature."""

    index: int
    length: int
    data: Path
    tasks: tuple[str, ...]
    videos: Mapping[str, VideoSpan]


@dataclasses.dataclass(frozen=True, eq=False)
class Meta:
    """A dataset without its frames. `tasks` and `subtasks` map an index to its text; subtasks is None if there is no file."""

    root: Path
    version: str
    fps: float
    robot_type: str
    features: Mapping[str, Feature]
    episodes: tuple[Episode, ...]
    tasks: Mapping[int, str]
    subtasks: Mapping[int, str] | None
    subtasks_file: Path | None

    @property
    def cameras(self) -> tuple[str, ...]:
        """Features that hold images, in the dataset's order."""
        return tuple(key for key, f in self.features.items() if f.dtype in ("image", "video"))

    @property
    def tasks_file(self) -> Path:
        """Where the tasks' texts are, for messages."""
        return self.root / ("meta/tasks.parquet" if _LAYOUT[self.version] == 3 else "meta/tasks.jsonl")

    def find(self, key: str) -> str:
        """The feature that a key means: its own name, or a plain name's (or a robot's, `observation/state`) last part.

        Raises UserError, listing what there is, if no feature or several are called so.
        """
        if key not in self.features and ("." not in key or "/" in key):
            same = [name for name in self.features if name.rsplit(".", 1)[-1] == key.rsplit("/", 1)[-1]]
            if len(same) == 1:
                return same[0]
        self.feature(key)
        return key

    def dimension_names(self, key: str) -> list[str]:
        """ "feature.name" of each dimension of a feature, or of a slice of it: "observation.state[0:7]"."""
        name, part = split_key(key)
        name = self.find(name)
        f = self.features[name]
        dims = int(np.prod(f.shape))
        names = f.names if isinstance(f.names, list) and len(f.names) == dims else range(dims)
        return [f"{name}.{n}" for n in names][part]

    def feature(self, key: str) -> Feature:
        """Raises UserError, listing what there is, if the dataset has no such feature."""
        if key not in self.features:
            raise UserError(f"{self.root / INFO} has no feature {key!r}: it has {', '.join(self.features)}")
        return self.features[key]


def read_meta(path: str | Path) -> Meta:
    """Reads and checks `meta/` of a directory, or of a dataset of the Hugging Face hub by its name. Raises UserError naming the file and what was expected of it."""
    root = local_dataset(path)
    if not root.is_dir():
        raise UserError(f"{root} is not a directory: expected a LeRobot dataset, the directory that holds meta/")
    file = root / INFO
    info = _json(file)
    version = info.get("codebase_version")
    if version not in _LAYOUT:
        raise UserError(
            f"{file}: codebase_version is {version!r}, this reads {', '.join(_LAYOUT)}: convert the dataset with "
            f"LeRobot's own converter, or record it anew"
        )
    try:
        features = {key: _feature(entry) for key, entry in info["features"].items()}
        fps, expected = float(info["fps"]), int(info["total_episodes"])
        if not fps > 0:
            raise ValueError(f"fps is {fps}")
        read_episodes = _episodes_v3 if _LAYOUT[version] == 3 else _episodes_v2
        episodes = read_episodes(root, info, [k for k, f in features.items() if f.dtype == "video"])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f"{file} does not describe a {version} dataset: {type(e).__name__} {e}") from e
    if len(episodes) != expected:
        raise UserError(f"{file} says {expected} episodes, {root / 'meta'} lists {len(episodes)}: a file is missing")
    for key, f in features.items():
        rate = f.info.get("video.fps")
        if rate is not None and abs(float(rate) - fps) > 0.01 * fps:
            raise UserError(f"{file}: fps is {fps:g}, but feature {key!r} is recorded as video.fps {float(rate):g}")
    subtasks_file = next((p for name in ("parquet", "jsonl") if (p := root / f"meta/subtasks.{name}").is_file()), None)
    meta = Meta(
        root=root,
        version=version,
        fps=fps,
        robot_type=str(info.get("robot_type") or "unknown"),
        features=features,
        episodes=tuple(episodes),
        tasks={},
        subtasks=None if subtasks_file is None else _texts(subtasks_file, "subtask"),
        subtasks_file=subtasks_file,
    )
    return dataclasses.replace(meta, tasks=_texts(meta.tasks_file, "task"))


def choose_episodes(meta: Meta, wanted: Sequence[int]) -> tuple[Episode, ...]:
    """The episodes of these indices, in the dataset's order; all if none is named. Raises UserError on unknown ones."""
    if not wanted:
        return meta.episodes
    known = {e.index for e in meta.episodes}
    if unknown := sorted(set(wanted) - known):
        raise UserError(
            f"{meta.root} has no episode {', '.join(map(str, unknown))}: it has {len(known)}, {min(known)} to {max(known)}"
        )
    return tuple(e for e in meta.episodes if e.index in set(wanted))


def read_table(
    path: Path, columns: Sequence[str] | None = None, *, where: str = "", only: pc.Expression | None = None
) -> pa.Table:
    """These columns of a parquet file, of the rows that `only` holds for. Raises UserError naming the file, `where` (an episode, say) and the column."""
    where = f" ({where})" if where else ""
    if not path.is_file():
        raise UserError(f"{path} is missing{where}: download or copy the dataset again")
    try:
        with pq.ParquetFile(path) as file:
            present = set(file.schema_arrow.names)
            if missing := [name for name in columns or () if name not in present]:
                raise UserError(
                    f"{path} has no column {', '.join(missing)}{where}: it has {', '.join(sorted(present))}"
                )
        return pq.read_table(path, columns=None if columns is None else list(columns), filters=only)
    except _PARQUET_ERRORS as e:
        raise UserError(f"{path} is not a readable parquet file{where}: {_first_line(e)}; copy it again") from e


def _first_line(e: BaseException) -> str:
    return (str(e).splitlines() or [type(e).__name__])[0]


def _json(file: Path) -> dict:
    if not file.is_file():
        raise UserError(f"{file} is missing: expected the description of a LeRobot dataset there")
    try:
        body = json.loads(file.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{file} is not JSON: {e}") from e
    if not isinstance(body, dict):
        raise UserError(f"{file} must hold a JSON object, found {type(body).__name__}")
    return body


def _json_lines(file: Path) -> list[dict]:
    if not file.is_file():
        raise UserError(f"{file} is missing: a v2 dataset lists one JSON object per line there")
    rows = []
    for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as e:
                raise UserError(f"{file} line {number} is not JSON: {e}") from e
    return rows


def _feature(entry: Mapping[str, Any]) -> Feature:
    return Feature(entry["dtype"], tuple(entry["shape"]), entry.get("names"), entry.get("info") or {})


def _episodes_v2(root: Path, info: Mapping[str, Any], videos: Sequence[str]) -> list[Episode]:
    episodes = []
    for row in _json_lines(root / "meta/episodes.jsonl"):
        index = int(row["episode_index"])
        place = {"episode_chunk": index // int(info["chunks_size"]), "episode_index": index}
        spans = {key: VideoSpan(root / info["video_path"].format(video_key=key, **place), 0.0) for key in videos}
        data = root / info["data_path"].format(**place)
        episodes.append(Episode(index, int(row["length"]), data, tuple(row.get("tasks", ())), spans))
    return episodes


def _episodes_v3(root: Path, info: Mapping[str, Any], videos: Sequence[str]) -> list[Episode]:
    files = sorted((root / "meta/episodes").glob("*/*.parquet"))
    if not files:
        raise UserError(f"{root / 'meta/episodes'} holds no parquet file: a v3.0 dataset lists its episodes there")
    columns = ["episode_index", "length", "tasks", "data/chunk_index", "data/file_index"]
    for key in videos:
        columns += [f"videos/{key}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")]

    def place(row: Mapping[str, Any], of: str) -> dict[str, int]:
        return {name: int(row[f"{of}/{name}"]) for name in ("chunk_index", "file_index")}

    episodes = []
    for row in [row for file in files for row in read_table(file, columns).to_pylist()]:
        spans = {
            key: VideoSpan(
                root / info["video_path"].format(video_key=key, **place(row, f"videos/{key}")),
                float(row[f"videos/{key}/from_timestamp"]),
            )
            for key in videos
        }
        data = root / info["data_path"].format(**place(row, "data"))
        episodes.append(Episode(int(row["episode_index"]), int(row["length"]), data, tuple(row["tasks"] or ()), spans))
    return sorted(episodes, key=lambda e: e.index)


def _texts(file: Path, kind: str) -> dict[int, str]:
    """Index -> text. In parquet the text may be a pandas index under another name: it is the only string column."""
    if file.suffix == ".jsonl":
        rows, text = _json_lines(file), kind
    else:
        table = read_table(file)
        strings = [f.name for f in table.schema if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)]
        text = kind if kind in strings else (strings or [kind])[0]
        rows = table.to_pylist()
    try:
        return {int(row[f"{kind}_index"]): "" if row[text] is None else str(row[text]) for row in rows}
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(f"{file} must give {kind}_index and {kind} in each row, found {type(e).__name__} {e}") from e
