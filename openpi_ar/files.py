"""The cache directory, directories that appear when they are complete, and memory-mapped arrays that can be pickled."""

from collections.abc import Iterator
import contextlib
import errno
import os
from pathlib import Path
import shutil
import tempfile
from typing import Any

import numpy as np

from openpi_ar.errors import UserError


def cache_root(given: str | Path | None = None) -> Path:
    """Where caches are: the given directory, else `$OPENPI_AR_CACHE`, else `~/.cache/openpi_ar`."""
    return Path(given or os.environ.get("OPENPI_AR_CACHE") or "~/.cache/openpi_ar").expanduser()


def openpi_cache_root() -> Path:
    """Where openpi puts its downloads, which are found and not fetched again: `$OPENPI_DATA_HOME`, else
    `~/.cache/openpi`."""
    return Path(os.environ.get("OPENPI_DATA_HOME") or "~/.cache/openpi").expanduser()


_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@contextlib.contextmanager
def when_whole(path: Path, *, must_be_new: bool = False) -> Iterator[Path]:
    """A scratch directory beside `path`, which takes its name at the end of the block: a half-written one is never
    seen.

    An error leaves nothing behind. If another process was faster, its directory stays: use this where both are the
    same, or have it refused by `must_be_new`. Raises UserError if the directory cannot be written, or exists and must
    be new.
    """
    if must_be_new and path.exists():
        raise UserError(f"{path} exists: name a new directory, or delete this one first")
    scratch: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f"{path.name}.", suffix=".partial", dir=path.parent))
        scratch.chmod(0o755)
        yield scratch
        try:
            scratch.rename(path)
        except OSError:
            if must_be_new or not path.is_dir():
                raise
    except OSError as e:
        if scratch is not None and e.errno not in _DISK:
            raise
        free = shutil.disk_usage(next(p for p in path.absolute().parents if p.is_dir())).free
        raise UserError(f"{path} cannot be written ({free / 1e9:.1f} GB free): {e}; nothing was left behind") from e
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def replace_text(path: Path, text: str) -> None:
    """Writes a file in one step: another process reads the old text or the new one, and a killed one leaves either."""
    beside = path.with_name(f".{path.name}.partial")
    beside.write_text(text)
    beside.replace(path)


class Mapped:
    """Base of classes with memory-mapped .npy arrays as fields: pickled, these are the names of their files, not
    gigabytes."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: _File(value.filename) if _is_file(value) else value for name, value in self.__dict__.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        opened = {name: value.open() if isinstance(value, _File) else value for name, value in state.items()}
        self.__dict__.update(opened)


class _File:
    def __init__(self, name: str | Path):
        self.name = str(name)

    def open(self) -> np.ndarray:
        return np.load(self.name, mmap_mode="r")


def _is_file(value: object) -> bool:
    """A whole file, that is: a part of one is a memory map too, of the same name."""
    return (
        isinstance(value, np.memmap)
        and value.filename is not None
        and value.shape == _File(value.filename).open().shape
    )
