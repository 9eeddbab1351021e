"""The cache directory, and directories that appear when they are complete."""

from collections.abc import Iterator
import contextlib
import errno
import hashlib
import json
import os
from pathlib import Path
import shutil
import tempfile
from typing import Any

from openpi_ar.errors import UserError


def cache_root(given: str | Path | None = None) -> Path:
    """Where caches are: the given directory, else `$OPENPI_AR_CACHE`, else `~/.cache/openpi_ar`."""
    return Path(given or os.environ.get("OPENPI_AR_CACHE") or "~/.cache/openpi_ar").expanduser()


def digest(content: Any) -> str:
    """16 hexadecimal digits that differ between contents (anything that JSON can hold): the name of a cache entry."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def openpi_cache_root() -> Path:
    """openpi's downloads, which are found and not fetched again: `$OPENPI_DATA_HOME`, else `~/.cache/openpi`."""
    return Path(os.environ.get("OPENPI_DATA_HOME") or "~/.cache/openpi").expanduser()


_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@contextlib.contextmanager
def when_whole(path: Path, *, must_be_new: bool = False) -> Iterator[Path]:
    """A scratch directory that takes the name `path` at the end of the block; an error leaves nothing behind.

    If another process was faster, its directory stays, or is an error if it `must_be_new`. Raises UserError if the
    directory cannot be written, or exists and must be new.
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
