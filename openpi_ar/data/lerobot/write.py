"""Writes LeRobot v3.0 datasets with pyarrow, Pillow and PyAV, laid out as LeRobot's own library does it.

One parquet row group per episode; files roll over at LeRobot's size limits; subtasks in either or both of its
conventions. The dataset appears by one rename when it is complete.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import io
import json
from pathlib import Path
import sys
from typing import Any, Literal

import numpy as np
from PIL import Image
import pyarrow as pa
import pyarrow.parquet as pq

from openpi_ar.data.lerobot.encode import CHUNK, CODECS, VIDEO_MB, VIDEO_PATH, VideoFiles, place_of
from openpi_ar.data.lerobot.meta import EVENTS, LANGUAGE, SUBTASK_INDEX
from openpi_ar.data.lerobot.stats import flatten, pixel_counts, pixel_stats, vector_stats
from openpi_ar.errors import UserError
from openpi_ar.files import atomic_directory

Images = Literal["png", "h264", "av1"]
Subtasks = Literal["both", "index", "language"]

_DATA_MB = 100
_DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
# LeRobot's writer infers these types: fields that are never set are of type null.
_PERSISTENT = pa.struct(
    [(n, pa.string()) for n in ("role", "content", "style")]
    + [("timestamp", pa.float64()), ("camera", pa.null()), ("tool_calls", pa.null())]
)
_EVENT = pa.struct([(n, pa.string()) for n in ("role", "content", "style", "camera")] + [("tool_calls", pa.null())])


@dataclasses.dataclass(frozen=True)
class Spec:
    """What the episodes hold.

    images     `png`: in the parquet files, lossless; else the codec of the video files.
    vectors    float features and the names of their dimensions.
    flags      boolean features of one value.
    subtasks   `index` (LeRobot 0.4.4 to 0.5), `language` (0.6 and newer) or `both`. Versions before 0.6 refuse a
               dataset with language columns, so `both` needs 0.6 too.
    questions  episodes hold questions and answers, which are language columns too.
    """

    fps: int
    robot_type: str
    cameras: tuple[str, ...]
    image_size: tuple[int, int]
    vectors: Mapping[str, tuple[str, ...]]
    flags: tuple[str, ...] = ()
    images: Images = "h264"
    subtasks: Subtasks = "both"
    questions: bool = False


class LeRobotWriter:
    """Context manager: `add` episodes; the dataset is at `root` when the block ends without an error.

    Raises UserError if `root` exists already, or the images do not suit the codec.
    """

    def __init__(self, root: str | Path, spec: Spec):
        self.root, self.spec = Path(root).expanduser(), spec
        if spec.images != "png":
            CODECS[spec.images].check(spec.image_size)
        self._writing = atomic_directory(self.root, must_be_new=True)
        self._scratch = self._writing.__enter__()
        self._tasks: dict[str, int] = {}
        self._subtasks: dict[str, int] = {}
        self._episodes: list[dict[str, Any]] = []
        self._frames = 0
        self._numbers: dict[str, list[np.ndarray]] = {}
        self._pixels = {key: np.zeros((3, 256), np.int64) for key in spec.cameras}
        filmed = () if spec.images == "png" else spec.cameras
        self._videos = {key: VideoFiles(self._scratch, key, CODECS[spec.images], spec.fps) for key in filmed}
        self._file = 0
        self._parquet: pq.ParquetWriter | None = None

    def __enter__(self) -> "LeRobotWriter":
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            self._close_parquet()
            for video in self._videos.values():
                video.close()
            if error[0] is None:
                self._write_meta()
        except BaseException:
            error = sys.exc_info()
            raise
        finally:
            self._writing.__exit__(*error)

    def add(
        self,
        task: str,
        images: Mapping[str, np.ndarray],
        vectors: Mapping[str, np.ndarray],
        *,
        subtasks: Sequence[str],
        flags: Mapping[str, np.ndarray] | None = None,
        questions: Mapping[int, tuple[str, str]] | None = None,
    ) -> None:
        """One episode of T frames: uint8 [T h w 3] by camera, float [T dims] by feature, a subtask for each frame, and
        (question, answer) by frame, about all cameras."""
        length, e = len(subtasks), len(self._episodes)
        numbers: dict[str, np.ndarray] = {k: np.asarray(vectors[k], np.float32) for k in self.spec.vectors}
        numbers |= {k: np.asarray((flags or {})[k], bool)[:, None] for k in self.spec.flags}
        steps = np.arange(length)
        frame_of = {SUBTASK_INDEX: np.array([self._subtasks.setdefault(s, len(self._subtasks)) for s in subtasks])}
        numbers |= frame_of if self.spec.subtasks != "language" else {}
        numbers["timestamp"] = (steps / self.spec.fps).astype(np.float32)[:, None]
        numbers["frame_index"], numbers["index"] = steps, self._frames + steps
        numbers["episode_index"] = np.full(length, e)
        numbers["task_index"] = np.full(length, self._tasks.setdefault(task, len(self._tasks)))
        numbers = {k: v if v.ndim == 2 else v[:, None].astype(np.int64) for k, v in numbers.items()}
        if wrong := [k for k, v in (numbers | dict(images)).items() if len(v) != length]:
            raise ValueError(f"episode {e} has {length} subtasks, but {', '.join(wrong)} another number of frames")
        columns = {k: _column(v) for k, v in numbers.items()}
        if self.spec.images == "png":
            columns |= {k: pa.array([_png(x, i) for i, x in enumerate(images[k])], _IMAGE) for k in self.spec.cameras}
        if self.spec.subtasks != "index":
            columns[LANGUAGE] = _language(subtasks, numbers["timestamp"][:, 0])
        if self.spec.questions:
            columns[EVENTS] = _events(questions or {}, length, self.spec.cameras)
        elif self.spec.subtasks != "index":
            columns[EVENTS] = pa.array([[]] * length, pa.list_(pa.null()))
        row: dict[str, Any] = {"episode_index": e, "tasks": [task], "length": length}
        row |= self._write_rows(pa.table(columns))
        row |= {"dataset_from_index": self._frames, "dataset_to_index": self._frames + length}
        for key, video in self._videos.items():
            row |= {f"videos/{key}/{name}": value for name, value in video.add(images[key]).items()}
        stats = {k: vector_stats(v) for k, v in numbers.items()}
        for key in self.spec.cameras:
            counts = pixel_counts(images[key])
            self._pixels[key] += counts
            stats[key] = pixel_stats(counts, length)
        self._episodes.append(row | flatten(stats) | {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0})
        for key, value in numbers.items():
            self._numbers.setdefault(key, []).append(value)
        self._frames += length

    def _write_rows(self, table: pa.Table) -> dict[str, int]:
        place = place_of(self._file)
        path = self._scratch / _DATA_PATH.format(**place)
        if self._parquet is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._parquet = pq.ParquetWriter(path, table.schema, compression="snappy")
        self._parquet.write_table(table, row_group_size=len(table))
        if path.stat().st_size > _DATA_MB * 1_000_000:
            self._close_parquet()
            self._file += 1
        return {f"data/{name}": value for name, value in place.items()}

    def _close_parquet(self) -> None:
        if self._parquet is not None:
            self._parquet.close()
            self._parquet = None

    def _features(self) -> dict[str, Any]:
        height, width = self.spec.image_size
        names = ["height", "width", "channels"]
        image: dict[str, Any] = {"dtype": "image", "shape": [height, width, 3], "names": names}
        if self.spec.images != "png":
            image |= {"dtype": "video", "info": CODECS[self.spec.images].describe(height, width, self.spec.fps)}
        features: dict[str, Any] = dict.fromkeys(self.spec.cameras, image)
        for key, names in self.spec.vectors.items():
            features[key] = {"dtype": "float32", "shape": [len(names)], "names": list(names)}
        dtypes = dict.fromkeys(self.spec.flags, "bool")
        dtypes |= {SUBTASK_INDEX: "int64"} if self.spec.subtasks != "language" else {}
        counters = ("frame_index", "episode_index", "index", "task_index")
        dtypes |= {"timestamp": "float32"} | dict.fromkeys(counters, "int64")
        dtypes |= {LANGUAGE: "language"} if self.spec.subtasks != "index" else {}
        dtypes |= {EVENTS: "language"} if self.spec.subtasks != "index" or self.spec.questions else {}
        return features | {key: {"dtype": dtype, "shape": [1], "names": None} for key, dtype in dtypes.items()}

    def _write_meta(self) -> None:
        if not self._episodes:
            raise UserError(f"nothing to write to {self.root}: no episode was added")
        meta = self._scratch / "meta"
        (meta / "episodes/chunk-000").mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(self._episodes), meta / "episodes/chunk-000/file-000.parquet")
        _write_texts(meta / "tasks.parquet", "task", self._tasks)
        if self.spec.subtasks != "language":
            _write_texts(meta / "subtasks.parquet", "subtask", self._subtasks)
        stats = {key: vector_stats(np.concatenate(parts)) for key, parts in self._numbers.items()}
        stats |= {key: pixel_stats(counts, self._frames) for key, counts in self._pixels.items()}
        (meta / "stats.json").write_text(json.dumps(stats, indent=4))
        info = {
            "codebase_version": "v3.0",
            "fps": self.spec.fps,
            "features": self._features(),
            "total_episodes": len(self._episodes),
            "total_frames": self._frames,
            "total_tasks": len(self._tasks),
            "chunks_size": CHUNK,
            "data_files_size_in_mb": _DATA_MB,
            "video_files_size_in_mb": VIDEO_MB,
            "data_path": _DATA_PATH,
            "video_path": VIDEO_PATH if self._videos else None,
            "robot_type": self.spec.robot_type,
            "splits": {"train": f"0:{len(self._episodes)}"},
        }
        (meta / "info.json").write_text(json.dumps(info, indent=4))


def _column(x: np.ndarray) -> pa.Array:
    if x.shape[1] == 1:
        return pa.array(x[:, 0])
    return pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), x.shape[1])


def _png(image: np.ndarray, frame: int) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)  # much faster than the default, little larger
    return {"bytes": buffer.getvalue(), "path": f"frame-{frame:06d}.png"}


def _language(subtasks: Sequence[str], timestamps: np.ndarray) -> pa.Array:
    """The timeline of subtasks, the same on every frame."""
    changes = [i for i, s in enumerate(subtasks) if i == 0 or s != subtasks[i - 1]]
    row = {"role": "assistant", "style": "subtask", "camera": None, "tool_calls": None}
    timeline = [{**row, "content": subtasks[i], "timestamp": float(timestamps[i])} for i in changes]
    return pa.array([timeline] * len(subtasks), pa.list_(_PERSISTENT))


def _events(questions: Mapping[int, tuple[str, str]], length: int, cameras: Sequence[str]) -> pa.Array:
    """The questions on their frames, to each camera, as LeRobot wants it of this style."""
    rows: list[list[dict[str, Any]]] = [[] for _ in range(length)]
    for frame, texts in questions.items():
        for camera in cameras:
            for role, content in zip(("user", "assistant"), texts, strict=True):
                entry = {"role": role, "content": content, "style": "vqa", "camera": camera, "tool_calls": None}
                rows[frame].append(entry)
    return pa.array(rows, pa.list_(_EVENT))


def _write_texts(path: Path, kind: str, texts: Mapping[str, int]) -> None:
    """index and text, the text marked as pandas' index: LeRobot looks texts up by it."""
    pandas = {
        "index_columns": [kind],
        "column_indexes": [{"name": None, "field_name": None, "pandas_type": "unicode", "numpy_type": "object",
                            "metadata": {"encoding": "UTF-8"}}],
        "columns": [
            {"name": f"{kind}_index", "field_name": f"{kind}_index", "pandas_type": "int64", "numpy_type": "int64",
             "metadata": None},
            {"name": kind, "field_name": kind, "pandas_type": "unicode", "numpy_type": "object", "metadata": None},
        ],
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.2.0",
    }  # fmt: skip
    table = pa.table({f"{kind}_index": pa.array(list(texts.values()), pa.int64()), kind: pa.array(list(texts))})
    pq.write_table(table.replace_schema_metadata({"pandas": json.dumps(pandas)}), path)
