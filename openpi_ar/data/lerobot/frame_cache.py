"""Decoded, resized frames on disk: a video is decoded once, training then reads a memory map.

One array per camera and size. Its directory's name is a digest of everything the pixels depend on, and it appears by
one rename when it is complete: a half-written one is never read.
"""

from concurrent.futures import ThreadPoolExecutor
import dataclasses
import json
from pathlib import Path
import time

import numpy as np

from openpi_ar.data.lerobot.columns import Frames
from openpi_ar.data.lerobot.meta import INFO
from openpi_ar.data.lerobot.parquet import require
from openpi_ar.data.lerobot.video import read_frames
from openpi_ar.files import ANOTHER_CACHE, atomic_directory, cache_root, check_directory, cores, digest
from openpi_ar.images import resize_with_pad
from openpi_ar.tables import progress_bar

_VERSION = 1
"""Raise when decoding or resizing changes: old caches are then left alone and not read."""


def cache_path(frames: Frames, camera: str, size: tuple[int, int], root: str | None = None) -> Path:
    """Where the frames of this camera are or will be; `root`: see `files.cache_root`.

    Raises UserError naming the file and episode if a file is missing.
    """
    meta = frames.meta
    files = {}
    for episode in frames.episodes:
        path = meta.frames_file(episode, camera)
        if path not in files:
            stat = require(path, f"camera {camera!r}, episode {episode.index}").stat()
            files[path] = (str(path.relative_to(meta.root)), stat.st_size, stat.st_mtime_ns)
    # The place of the dataset does not matter, its files do: a copy that keeps their times shares the cache.
    content = {
        "info": (meta.root / INFO).read_text("utf-8"),
        "files": list(files.values()),
        "episodes": [(e.index, e.length, e.videos[camera].start if camera in e.videos else 0) for e in frames.episodes],
        "camera": camera,
        "size": size,
        "version": _VERSION,
    }
    return cache_root(root) / "lerobot" / digest(content)


def cached_frames(frames: Frames, camera: str, size: tuple[int, int], root: str | None = None) -> Path:
    """The .npy file of all frames of a camera, uint8 [N h w 3], aspect kept and padded to `size` (height, width).

    Decodes on first use, with a progress bar. Raises UserError as `read_frames` does, and if the disk is too small.
    """
    path = cache_path(frames, camera, size, root)
    if not path.is_dir():
        shape = (len(frames), *size, 3)
        instead = f"{ANOTHER_CACHE}, or use --data.frames decode to decode at every read"
        check_directory(path, instead, need=int(np.prod(shape)))
        with atomic_directory(path, instead=instead) as scratch:
            _fill(frames, camera, size, np.lib.format.open_memmap(scratch / "frames.npy", "w+", np.uint8, shape))
            about = {"dataset": str(frames.meta.root), "camera": camera, "size": size, "frames": len(frames)}
            (scratch / "meta.json").write_text(json.dumps(about, indent=1))
    return path / "frames.npy"


class CachedReader:
    """A camera's frame, uint8 [h w 3], out of a file of `cached_frames`; pickled as the name of that file."""

    def __init__(self, file: Path):
        self.file, self._pixels = file, np.load(file, mmap_mode="r")

    def __call__(self, row: int) -> np.ndarray:
        return np.asarray(self._pixels[row])

    def __reduce__(self):
        return CachedReader, (self.file,)


@dataclasses.dataclass(frozen=True, eq=False)
class DecodingReader:
    """A camera's frame, uint8 [h w 3] as recorded, decoded at every call."""

    frames: Frames
    camera: str

    def __call__(self, row: int) -> np.ndarray:
        e, number = self.frames.place(row)
        frames, stamps = self.frames, self.frames.timestamps[self.frames.rows(e)]
        return next(read_frames(frames.meta, frames.episodes[e], self.camera, stamps, [number]))


def _fill(frames: Frames, camera: str, size: tuple[int, int], out: np.memmap) -> None:
    """Decodes and resizes everything into `out`. Both release the GIL, so threads do; the first error ends them."""

    def one(e: int) -> int:
        rows, numbers = frames.rows(e), range(frames.episodes[e].length)
        stamps = frames.timestamps[rows]
        for row, image in enumerate(read_frames(frames.meta, frames.episodes[e], camera, stamps, numbers), rows.start):
            out[row] = resize_with_pad(image, *size)
        return rows.stop

    began = time.perf_counter()
    with progress_bar(f"decoding {camera}", len(frames)) as update, ThreadPoolExecutor(cores()) as pool:
        for done in pool.map(one, range(len(frames.episodes))):
            update(done, f"{done / (time.perf_counter() - began):.0f} frames/s")
    out.flush()
