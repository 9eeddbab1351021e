"""The description of a LeRobot dataset: `meta/` of versions 2.0, 2.1 and 3.0, read with pyarrow alone.

v2.x   meta/{info.json, episodes.jsonl, tasks.jsonl}          one parquet and, per camera, one video file per episode
v3.0   meta/{info.json, tasks.parquet, episodes/*/*.parquet}  files shared by episodes, which know their place in them
either meta/subtasks.{parquet,jsonl}                          optional: texts of the column `subtask_index`
"""

from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
import functools
import itertools
import math
from pathlib import Path
from typing import Any

from openpi_ar.data.lerobot.hub import local_dataset
from openpi_ar.data.lerobot.parquet import read_table, to_rows
from openpi_ar.data.lerobot.texts import read_texts
from openpi_ar.errors import UserError
from openpi_ar.lookup import resolve, unknown
from openpi_ar.robot_spec import split_key
from openpi_ar.textfile import is_number, read_lines, read_object, whole_number

INFO = "meta/info.json"
SUBTASK_INDEX = "subtask_index"
LANGUAGE, EVENTS = "language_persistent", "language_events"
SUPERVISE = "supervise_text"
"""Optional boolean feature: False where the subtask does not follow from the prompt, so its text is not trained."""

_LAYOUT = {"v2.0": 2, "v2.1": 2, "v3.0": 3}


@dataclasses.dataclass(frozen=True)
class Feature:
    """One entry of `features` in info.json. `fault` says why it cannot be read: an error once it is used."""

    dtype: str
    shape: tuple[int, ...]
    names: Any = None
    fault: str = ""


@dataclasses.dataclass(frozen=True)
class VideoSpan:
    """The frames of one episode and camera: from `start` seconds on in the file."""

    path: Path
    start: float


@dataclasses.dataclass(frozen=True)
class Episode:
    """`length` frames, in one parquet file that may hold other episodes too. `videos` is keyed by feature.

    A camera whose place meta/ does not tell is not among `videos`.
    """

    index: int
    length: int
    data: Path
    tasks: tuple[str, ...]
    videos: Mapping[str, VideoSpan]


@dataclasses.dataclass(frozen=True, eq=False)
class Meta:
    """A dataset without its frames. Texts are read when they are asked for: a damaged file may not be needed."""

    root: Path
    version: str
    fps: float
    robot_type: str
    features: Mapping[str, Feature]
    episodes: tuple[Episode, ...]

    @functools.cached_property
    def tasks(self) -> Mapping[int, str]:
        """Text of each task index, "" where there is none. Raises UserError if the file is not what it should be."""
        return read_texts(self.tasks_file, "task")

    @functools.cached_property
    def subtasks(self) -> Mapping[int, str]:
        """Text of each subtask index, as `tasks`; none if there is no file."""
        return {} if self.subtasks_file is None else read_texts(self.subtasks_file, "subtask")

    @property
    def tasks_file(self) -> Path:
        """The file of the tasks' texts."""
        return self.root / ("meta/tasks.parquet" if _LAYOUT[self.version] == 3 else "meta/tasks.jsonl")

    @property
    def subtasks_file(self) -> Path | None:
        """The file of the subtasks' texts, if there is one."""
        files = (self.root / f"meta/subtasks.{suffix}" for suffix in ("parquet", "jsonl"))
        return next(filter(Path.is_file, files), None)

    @property
    def cameras(self) -> tuple[str, ...]:
        """Features that hold images, in the dataset's order."""
        return tuple(key for key, f in self.features.items() if f.dtype in ("image", "video"))

    def find(self, key: str) -> str:
        """The feature that a key means (`openpi_ar/lookup.py`). Raises UserError if there is none, or as `feature`."""
        name = resolve(key, self.features, f"{self.root / INFO} has no feature")
        self.feature(name)
        return name

    def feature(self, name: str) -> Feature:
        """Raises UserError, listing what there is, if the dataset has no such feature or it cannot be used."""
        if name not in self.features:
            raise unknown(name, self.features, f"{self.root / INFO} has no feature")
        if fault := self.features[name].fault:
            raise UserError(f"{self.root / INFO}: feature {name!r} {fault}")
        return self.features[name]

    def span(self, episode: Episode, camera: str) -> VideoSpan:
        """Where an episode's frames are in a video. Raises UserError if the dataset does not say."""
        if camera not in episode.videos:
            raise UserError(
                f"{self.root / 'meta'} does not say where the video of camera {camera!r}, episode {episode.index} is: "
                f"expected video_path in info.json, and in v3.0 its place in meta/episodes"
            )
        return episode.videos[camera]

    def frames_file(self, episode: Episode, camera: str) -> Path:
        """The file that holds an episode's frames of a camera. Raises UserError if the dataset does not say."""
        return self.span(episode, camera).path if self.feature(camera).dtype == "video" else episode.data

    def dimension_names(self, key: str) -> list[str]:
        """ "feature.name" of each dimension of a feature, or of a slice of it: "observation.state[0:7]"."""
        name, part = split_key(key)
        name = self.find(name)
        f = self.features[name]
        dims = math.prod(f.shape)
        # {"motors": [...]} in datasets of early versions.
        found = next(iter(f.names.values()), None) if isinstance(f.names, dict) and len(f.names) == 1 else f.names
        names = found if isinstance(found, list) and len(found) == dims else range(dims)
        return [f"{name}.{n}" for n in names][part]


def read_meta(path: str | Path) -> Meta:
    """Reads and checks `meta/` of a directory, or of a dataset of the Hugging Face hub by its name.

    Raises UserError naming the file and what was expected of it. Texts, files of frames and features are checked when
    they are used.
    """
    root = local_dataset(path)
    if not root.is_dir():
        raise UserError(
            f"{root} is not a directory: expected a LeRobot dataset, the directory that holds meta/; if it was moved, "
            "give its new place (train.py: --data.path)"
        )
    file = root / INFO
    info = read_object(file)
    version, features, fps = info.get("codebase_version"), info.get("features"), info.get("fps")
    if not isinstance(version, str) or version not in _LAYOUT:
        raise UserError(
            f"{file}: codebase_version is {version!r}, this reads {', '.join(_LAYOUT)}: convert the dataset with "
            f"LeRobot's own converter, or record it anew"
        )
    if not isinstance(features, dict) or not features:
        raise UserError(f"{file}: features is {features!r}, expected an object with an entry for each feature")
    if not is_number(fps) or not fps > 0:
        raise UserError(f"{file}: fps is {fps!r}, expected a number above 0")
    expected = whole_number(info, "total_episodes", str(file))
    known = {key: _feature(entry, float(fps)) for key, entry in features.items()}
    read_episodes = _episodes_v3 if _LAYOUT[version] == 3 else _episodes_v2
    episodes = read_episodes(root, info, [key for key, f in known.items() if f.dtype == "video"])
    episodes.sort(key=lambda e: e.index)
    if twice := [e.index for e, after in itertools.pairwise(episodes) if e.index == after.index]:
        raise UserError(f"{root / 'meta'} lists episode {twice[0]} more than once: leave one of them")
    if len(episodes) != expected:
        raise UserError(f"{file} says {expected} episodes, {root / 'meta'} lists {len(episodes)}: a file is missing")
    robot = info.get("robot_type")
    return Meta(root, version, float(fps), robot if isinstance(robot, str) else "unknown", known, tuple(episodes))


def choose_episodes(meta: Meta, wanted: Sequence[int]) -> tuple[Episode, ...]:
    """The episodes of these indices, in the dataset's order; all if none is named. Raises UserError on unknown ones."""
    if not wanted:
        return meta.episodes
    known = {e.index for e in meta.episodes}
    if unknown := sorted(set(wanted) - known):
        there = f"{len(known)}, {min(known)} to {max(known)}" if known else "none"
        raise UserError(f"{meta.root} has no episode {', '.join(map(str, unknown))}: it has {there}")
    return tuple(e for e in meta.episodes if e.index in set(wanted))


def _feature(entry: Any, fps: float) -> Feature:
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, info = entry.get("dtype"), entry.get("shape"), entry.get("info") or entry.get("video_info")
    rate = info.get("video.fps") if isinstance(info, dict) else None
    fault = ""
    if not isinstance(dtype, str):
        fault = f"has dtype {dtype!r}, expected a name such as float32"
    elif not isinstance(shape, list) or not all(type(n) is int and n > 0 for n in shape):
        fault = "" if dtype in ("image", "video") else f"has shape {shape!r}, expected a list of whole numbers"
    if rate is not None and not (is_number(rate) and abs(rate - fps) <= 0.01 * fps):
        fault = f"is recorded as video.fps {rate!r}, but the dataset's fps is {fps:g}"
    sizes = tuple(n for n in shape if type(n) is int) if isinstance(shape, list) else ()
    return Feature(dtype if isinstance(dtype, str) else "unknown", sizes, entry.get("names"), fault)


def _episodes_v2(root: Path, info: Mapping[str, Any], videos: Sequence[str]) -> list[Episode]:
    file, per_chunk = root / "meta/episodes.jsonl", whole_number(info, "chunks_size", str(root / INFO), least=1)
    episodes = []
    for number, row in read_lines(file):
        where = f"{file}, entry {number}"
        index, length = whole_number(row, "episode_index", where), whole_number(row, "length", where, least=1)
        place = {"episode_chunk": index // per_chunk, "episode_index": index}
        spans = {}
        with contextlib.suppress(UserError):  # reported when a camera is used: `Meta.span`
            spans = {key: VideoSpan(_path(root, info, "video_path", video_key=key, **place), 0.0) for key in videos}
        data = _path(root, info, "data_path", **place)
        episodes.append(Episode(index, length, data, _strings(row.get("tasks")), spans))
    return episodes


def _episodes_v3(root: Path, info: Mapping[str, Any], videos: Sequence[str]) -> list[Episode]:
    files = sorted((root / "meta/episodes").glob("*/*.parquet"))
    if not files:
        raise UserError(f"{root / 'meta/episodes'} holds no parquet file: a v3.0 dataset lists its episodes there")
    columns = ["episode_index", "length", "data/chunk_index", "data/file_index"]
    places = [f"videos/{key}/{name}" for key in videos for name in ("chunk_index", "file_index", "from_timestamp")]
    tables = [
        (file, read_table(file, columns, where="the list of episodes", optional=["tasks", *places])) for file in files
    ]
    rows = [(row, f"{file}, row {i}") for file, table in tables for i, row in enumerate(to_rows(table, file))]
    return [_episode_v3(root, info, videos, row, where) for row, where in rows]


def _episode_v3(root: Path, info: Mapping[str, Any], videos: Sequence[str], row: dict, where: str) -> Episode:
    def place(of: str) -> dict[str, int]:
        return {name: whole_number(row, f"{of}/{name}", where) for name in ("chunk_index", "file_index")}

    spans = {}
    for key in videos:
        start = row.get(f"videos/{key}/from_timestamp")
        with contextlib.suppress(UserError):  # reported when the camera is used: `Meta.span`
            path = _path(root, info, "video_path", video_key=key, **place(f"videos/{key}"))
            if is_number(start) and start >= 0:
                spans[key] = VideoSpan(path, float(start))
    index, length = whole_number(row, "episode_index", where), whole_number(row, "length", where, least=1)
    return Episode(index, length, _path(root, info, "data_path", **place("data")), _strings(row.get("tasks")), spans)


def _path(root: Path, info: Mapping[str, Any], template: str, **place: int | str) -> Path:
    """A file by its template in info.json. Raises UserError if it is not there, or asks for other fields."""
    try:
        return root / info[template].format(**place)
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as e:
        raise UserError(
            f"{root / INFO}: {template} is {info.get(template)!r}, expected a path with the fields {', '.join(place)}"
        ) from e


def _strings(value: Any) -> tuple[str, ...]:
    return tuple(text.strip() for text in value if isinstance(text, str)) if isinstance(value, list) else ()
