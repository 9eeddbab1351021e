"""Frames of LeRobot datasets as uint8 RGB: videos decoded with PyAV by timestamp, images from parquet with Pillow."""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import io
from pathlib import Path
from typing import Any

import av
from av.container import InputContainer
import av.error
from av.video.frame import VideoFrame
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from openpi_ar.data.lerobot.meta import Episode, Meta
from openpi_ar.data.lerobot.parquet import read_table, require
from openpi_ar.data.pictures import read_picture
from openpi_ar.errors import UserError

_NEAR = 0.45
"""Of a frame period: further from every frame than this, a timestamp has no frame of its own."""

_EPISODES_IN_MEMORY = 8

# A title in another encoding does no harm. Before version 19 PyAV has to be told to decode it all the same.
_ANY_TITLE: Any = {"metadata_errors": "replace"} if int(av.__version__.partition(".")[0]) < 19 else {}


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """The header of a video file."""

    codec: str
    pixels: str
    fps: float
    height: int
    width: int


def probe(path: Path) -> VideoInfo:
    """Opens the file and reads its header. Raises UserError if it is missing or not a video."""
    with _open(path, path.name) as container:
        stream = container.streams.video[0]
        codec = stream.codec_context
        if codec is None:
            raise UserError(f"{path} is in a codec that this PyAV does not know")
        name = {"libdav1d": "av1", "libaom-av1": "av1"}.get(str(codec.name), str(codec.name))
        rate = float(stream.average_rate or 0)
        return VideoInfo(name, str(codec.pix_fmt), rate, codec.height, codec.width)


def read_frames(meta: Meta, episode: Episode, camera: str, timestamps: np.ndarray, frames: Sequence[int]) -> Iterator:
    """The frames uint8 [h w 3] of these ascending numbers within the episode, one after the other.

    `timestamps` are those of all its frames, seconds from its start. Raises UserError naming file, episode and frame
    if a file is missing, truncated or recorded at another rate, or an image cannot be read.
    """
    if meta.feature(camera).dtype == "image":
        return _images(meta, episode, camera, frames)
    return _video(meta, episode, camera, [float(timestamps[i]) for i in frames], frames)


def _video(meta: Meta, episode: Episode, camera: str, times: list[float], frames: Sequence[int]) -> Iterator:
    span = meta.span(episode, camera)
    where = f"camera {camera!r}, episode {episode.index}"
    with _open(span.path, where) as container:
        stream = container.streams.video[0]
        rate = stream.average_rate
        if rate and stream.frames != 1 and abs(float(rate) - meta.fps) > 0.01 * meta.fps:
            raise UserError(
                f"{span.path} ({where}) has {float(rate):g} frames a second, info.json says {meta.fps:g}: the fps "
                "differ"
            )
        decoded = _decode(container, span.start + times[0] if times else 0.0, _NEAR / meta.fps)
        before: VideoFrame | None = None
        now: VideoFrame | None = None
        ended = False
        for number, time in zip(frames, times, strict=True):
            wanted, label = span.start + time, f"{where}, frame {number}"
            try:
                while not ended and (now is None or _time(now) < wanted - 1e-6):
                    following = next(decoded, None)
                    before, now, ended = now or before, following, following is None
            except av.error.FFmpegError as e:
                raise UserError(f"{span.path} is damaged at {label}: {e.strerror}; copy it again") from e
            there = [frame for frame in (before, now) if frame is not None]
            near = min(there, key=lambda frame: abs(_time(frame) - wanted), default=None)
            if near is None or abs(_time(near) - wanted) > _NEAR / meta.fps:
                found = "it ends before" if now is None or near is None else f"the nearest is at {_time(near):.4f} s"
                raise UserError(f"{span.path} holds no frame at {wanted:.4f} s ({label}): {found}; truncated?")
            yield near.to_ndarray(format="rgb24")


def _decode(container: InputContainer, wanted: float, back: float) -> Iterator[VideoFrame]:
    """Frames in order of time, from one at or before `wanted` seconds on, if the file holds one.

    Seeks to the key frame before `wanted - back`. Some streams (MPEG-4 with B-frames) are indexed by decoding time and
    land too late: then from further back.
    """
    stream = container.streams.video[0]
    while stream.time_base is not None and wanted > back:
        container.seek(int((wanted - back) / stream.time_base), stream=stream)
        frames = _with_time(container)
        first = next(frames, None)
        if first is not None and _time(first) <= wanted + 1e-6:
            yield first
            yield from frames
            return
        back = 4 * back + 1
    container.seek(0)
    yield from _with_time(container)


def _with_time(container: InputContainer) -> Iterator[VideoFrame]:
    return (frame for frame in container.decode(container.streams.video[0]) if frame.pts is not None)


def _time(frame: VideoFrame) -> float:
    return float(frame.pts * frame.time_base)  # pyright: ignore[reportOptionalOperand, reportOperatorIssue]


def _open(path: Path, where: str) -> InputContainer:
    try:
        container = av.open(str(require(path, where)), **_ANY_TITLE)
    except (av.error.FFmpegError, OSError) as e:
        raise UserError(
            f"{path} ({where}, frame 0) cannot be opened as a video: {e.strerror}; truncated? Copy it again"
        ) from e
    if not container.streams.video:
        container.close()
        raise UserError(f"{path} ({where}) holds no video stream")
    return container


def _images(meta: Meta, episode: Episode, camera: str, frames: Sequence[int]) -> Iterator:
    changed = episode.data.stat().st_mtime_ns if episode.data.is_file() else 0
    column = _image_column(episode.data, changed, camera, episode.index)
    for number in frames:
        entry = column[number].as_py()
        where = f"{episode.data}: camera {camera!r}, episode {episode.index}, frame {number}"
        yield _image(entry, meta.root, where)


def _image(entry: Any, root: Path, where: str) -> np.ndarray:
    try:
        # Without embedded bytes, LeRobot's path is relative to the dataset.
        source = io.BytesIO(entry["bytes"]) if entry["bytes"] else root / entry["path"]
    except (TypeError, KeyError) as e:
        raise UserError(f"{where} is not a readable image: it holds neither bytes nor a path") from e
    return read_picture(source, where)


@functools.lru_cache(maxsize=_EPISODES_IN_MEMORY)
def _image_column(path: Path, changed: int, camera: str, episode: int) -> pa.ChunkedArray:
    del changed  # a file written anew is read anew
    where = f"camera {camera!r}, episode {episode}"
    # Files have one row group per episode, so the filter reads little more than the episode.
    return read_table(path, ["episode_index", camera], where=where, only=pc.field("episode_index") == episode)[camera]
