"""Video files of a LeRobot dataset: episodes one after the other, a new file where one grows too large."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import av
from av.container import OutputContainer
from av.video.stream import VideoStream
import numpy as np

from openpi_ar.errors import UserError

VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
VIDEO_MB, CHUNK = 200, 1000
"""Size of a file from which another one begins, and files of a chunk: LeRobot's."""


@dataclasses.dataclass(frozen=True)
class Codec:
    """An encoder and its options. Every second frame is a key frame, so that any frame is found quickly."""

    name: str
    encoder: str
    options: tuple[tuple[str, str], ...]
    smallest: int

    def check(self, size: tuple[int, int]) -> None:
        """Raises UserError if frames of this height and width cannot be encoded, or the encoder is not there."""
        if self.encoder not in av.codecs_available:
            raise UserError(
                f"this PyAV has no encoder {self.encoder}: choose other --images, or install PyAV's own wheel"
            )
        if size[0] % 2 or size[1] % 2 or min(size) < self.smallest:
            raise UserError(
                f"{self.name} needs images of even height and width, at least {self.smallest} pixels, found "
                f"{list(size)}: choose --images png or another size"
            )

    def describe(self, height: int, width: int, fps: int) -> dict[str, Any]:
        """The `info` of a video feature."""
        settings = dict(self.options)
        return {
            "video.height": height,
            "video.width": width,
            "video.codec": self.name,
            "video.pix_fmt": "yuv420p",
            "video.fps": fps,
            "video.channels": 3,
            "has_audio": False,
            "video.g": int(settings["g"]),
            "video.crf": int(settings["crf"]),
            "is_depth_map": False,
        }


CODECS = {
    # LeRobot's own choice but for the quality: at crf 30 every second frame of a 64-pixel image shows the one before.
    "av1": Codec("av1", "libsvtav1", (("g", "2"), ("crf", "18"), ("preset", "10")), 64),
    "h264": Codec("h264", "libx264", (("g", "2"), ("crf", "20"), ("bf", "0")), 16),
}


def place_of(file: int) -> dict[str, int]:
    """The chunk and the number within it of a dataset's n-th file."""
    return {"chunk_index": file // CHUNK, "file_index": file % CHUNK}


class VideoFiles:
    """The video files of one camera, in the dataset directory `root`."""

    def __init__(self, root: Path, key: str, codec: Codec, fps: int):
        self._root, self._key, self._codec, self._fps = root, key, codec, fps
        self._file, self._frames = 0, 0
        self._open: tuple[OutputContainer, VideoStream, Path] | None = None

    def add(self, images: np.ndarray) -> dict[str, Any]:
        """Appends an episode uint8 [T h w 3]; returns its place as meta/episodes has it."""
        place = place_of(self._file)
        container, stream, path = self._open or self._start(place, images.shape[1:3])
        start = self._frames
        for image in images:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts = self._frames
            container.mux(stream.encode(frame))
            self._frames += 1
        if path.is_file() and path.stat().st_size > VIDEO_MB * 1_000_000:  # an encoder may hold back the first frames
            self.close()
        return {**place, "from_timestamp": start / self._fps, "to_timestamp": (start + len(images)) / self._fps}

    def close(self) -> None:
        """Ends the current file; the next episode starts another."""
        if self._open is not None:
            container, stream, _ = self._open
            container.mux(stream.encode(None))
            container.close()
            self._open, self._frames, self._file = None, 0, self._file + 1

    def _start(self, place: dict[str, int], size: tuple[int, ...]) -> tuple[OutputContainer, VideoStream, Path]:
        path = self._root / VIDEO_PATH.format(video_key=self._key, **place)
        path.parent.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("SVT_LOG", "1")  # SVT-AV1 prints its settings for every file otherwise
        container = av.open(str(path), "w")
        stream = container.add_stream(self._codec.encoder, rate=self._fps, options=dict(self._codec.options))
        assert isinstance(stream, VideoStream)
        stream.height, stream.width, stream.pix_fmt = size[0], size[1], "yuv420p"
        self._open = container, stream, path
        return self._open
