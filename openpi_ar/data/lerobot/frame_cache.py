"""Decoded, resized frames on disk: a video is decoded once, training then reads a memory map.

One array per camera and size. Its directory's name is a digest of everything the pixels depend on, and it appears by
one rename when it is complete: a half-written one is never read.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
import dataclasses
import hashlib
import json
import os
from pathlib import Path
import shutil

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from openpi_ar.data.lerobot.columns import Frames
from openpi_ar.data.lerobot.meta import INFO
from openpi_ar.data.lerobot.video import read_frames
from openpi_ar.errors import UserError
from openpi_ar.files import Mapped, cache_root, when_whole
from openpi_ar.images import resize_with_pad

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
            if not path.is_file():
                raise UserError(
                    f"{path} is missing (camera {camera!r}, episode {episode.index}): download or copy the dataset "
                    "again"
                )
            stat = path.stat()
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
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    return cache_root(root) / "lerobot" / digest


def cached_frames(frames: Frames, camera: str, size: tuple[int, int], root: str | None = None) -> np.ndarray:
    """All frames of a camera, read-only uint8 [N h w 3], aspect kept and padded to `size` (height, width).

    Decodes on first use, with a progress bar. Raises UserError as `read_frames` does, and if the disk is too small.
    """
    path = cache_path(frames, camera, size, root)
    if not path.is_dir():
        shape = (len(frames), *size, 3)
        path.parent.mkdir(parents=True, exist_ok=True)  # whose disk is asked
        need, free = int(np.prod(shape)), shutil.disk_usage(path.parent).free
        if need > 0.95 * free:
            raise UserError(
                f"the decoded frames of camera {camera!r} take {need / 1e9:.1f} GB, {path.parent} has {free / 1e9:.1f} "
                f"GB free: set --data.cache-dir to another disk, or --data.frames decode to decode at every read"
            )
        with when_whole(path) as scratch:
            _fill(frames, camera, size, np.lib.format.open_memmap(scratch / "frames.npy", "w+", np.uint8, shape))
            about = {"dataset": str(frames.meta.root), "camera": camera, "size": size, "frames": len(frames)}
            (scratch / "meta.json").write_text(json.dumps(about, indent=1))
    return np.load(path / "frames.npy", mmap_mode="r")


@dataclasses.dataclass(frozen=True, eq=False)
class CachedReader(Mapped):
    """A camera's frame, uint8 [h w 3], out of `cached_frames`."""

    pixels: np.ndarray

    def __call__(self, row: int) -> np.ndarray:
        return np.asarray(self.pixels[row])


@dataclasses.dataclass(frozen=True, eq=False)
class DecodingReader:
    """A camera's frame, uint8 [h w 3] as recorded, decoded at every call."""

    frames: Frames
    camera: str

    def __call__(self, row: int) -> np.ndarray:
        frames = self.frames
        e = int(np.searchsorted(frames.starts, row, side="right")) - 1
        start, stop = int(frames.starts[e]), int(frames.starts[e + 1])
        stamps = frames.timestamps[start:stop]
        return next(read_frames(frames.meta, frames.episodes[e], self.camera, stamps, [row - start]))


def _fill(frames: Frames, camera: str, size: tuple[int, int], out: np.ndarray) -> None:
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]:.0f} frames/s"),
        TimeRemainingColumn(),
    )
    with progress:
        bar = progress.add_task(f"decoding {camera}", total=len(frames), speed=0.0)

        def done(count: int) -> None:
            progress.advance(bar, count)
            task = progress.tasks[bar]
            progress.update(bar, speed=task.completed / max(task.elapsed or 0.0, 1e-6))

        def one(e: int) -> None:
            start, stop = int(frames.starts[e]), int(frames.starts[e + 1])
            numbers = range(stop - start)
            decoded = read_frames(frames.meta, frames.episodes[e], camera, frames.timestamps[start:stop], numbers)
            for i, image in enumerate(decoded):
                out[start + i] = resize_with_pad(image, *size)
            done(stop - start)

        _in_threads(one, range(len(frames.episodes)))
    if isinstance(out, np.memmap):
        out.flush()


def _in_threads(job: Callable[[int], None], items: Sequence[int]) -> None:
    """Decoders and resizing release the GIL, so threads do. The first error ends it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    pool = ThreadPoolExecutor(min(cores, len(items)))
    try:
        for _ in pool.map(job, items):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
