"""The cache directory, places that can be written, and directories that appear when they are complete."""

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

_SPARE = 2**24
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


ANOTHER_CACHE = "set OPENPI_AR_CACHE (for datasets also --data.cache-dir) to a directory that can be written"


def cache_root(given: str | Path | None = None) -> Path:
    """Where caches are: the given directory, else `$OPENPI_AR_CACHE`, else `~/.cache/openpi_ar`."""
    return _at_home(given or os.environ.get("OPENPI_AR_CACHE") or "~/.cache/openpi_ar", "OPENPI_AR_CACHE")


def digest(content: Any) -> str:
    """16 hexadecimal digits that differ between contents (anything that JSON can hold): the name of a cache entry."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def openpi_cache_root() -> Path:
    """openpi's downloads, which are found and not fetched again: `$OPENPI_DATA_HOME`, else `~/.cache/openpi`."""
    return _at_home(os.environ.get("OPENPI_DATA_HOME") or "~/.cache/openpi", "OPENPI_DATA_HOME")


def _at_home(path: str | Path, variable: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as e:  # a user without a home directory
        raise UserError(f"{path}: {e}: set {variable} to a directory that can be written") from e


# ---- places that can be written -------------------------------------------------------------------------------------


FIGURES = (".png", ".pdf", ".svg")
"""What a plot may be written as."""


def check_file(path: Path | None, flag: str, *suffixes: str) -> None:
    """Raises UserError, naming the flag, if the file cannot be written or does not end in one of the suffixes; None:
    nothing is to be written. Writes nothing."""
    if path is None:
        return
    if suffixes and path.suffix.lower() not in suffixes:
        raise UserError(f"{flag} must end in {', '.join(suffixes[:-1])} or {suffixes[-1]}, found {str(path)!r}")
    if not path.parent.is_dir():
        raise UserError(f"{flag}: the folder {str(path.parent)!r} does not exist: create it first")
    with writing(path, f"name another file with {flag}"):
        if path.exists():
            path.open("ab").close()
        else:
            _probe(path.parent)


def check_directory(path: Path, instead: str, *, need: int = 0) -> None:
    """Raises UserError if nothing, or not that many bytes, can be written into the directory, which need not exist yet.

    Leaves nothing behind. `instead` says how to choose another one.
    """
    with writing(path, instead):
        there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
        _probe(there)
        # What is nearly full counts as full: descriptions are written too, and other programs write.
        if need and 1.1 * need + _SPARE > shutil.disk_usage(there).free:
            raise OSError(errno.ENOSPC, f"{_size(need)} are needed")


@contextlib.contextmanager
def writing(path: Path, instead: str) -> Iterator[None]:
    """The block writes `path`: an error of the disk becomes a UserError that names it, and says what to do instead."""
    try:
        yield
    except OSError as e:
        raise _unwritable(path, e, instead) from e


def write_json(path: Path | None, body: Any, flag: str = "--json") -> None:
    """Writes an indented JSON file, arrays as lists; None: none. Raises UserError, naming the flag, if it cannot."""
    if path is not None:
        with writing(path, f"name another file with {flag}"):
            path.write_text(json.dumps(body, indent=2, default=lambda a: a.tolist()) + "\n")


def _unwritable(path: Path, error: OSError, instead: str) -> UserError:
    free = shutil.disk_usage(next(p for p in path.absolute().parents if p.is_dir())).free
    full = f" ({_size(free)} free)" if error.errno in _DISK else ""
    return UserError(f"{path} cannot be written: {error.strerror or error}{full}: {instead}")


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _probe(folder: Path) -> None:
    """Raises OSError if no block can be written there. The file has no name where the system knows such files."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(4096))


_ANOTHER = "name another directory"


def check_new(path: Path) -> None:
    """Raises UserError if a directory exists already, or cannot be written."""
    if path.exists():
        raise UserError(f"{path} exists: name a new directory, or delete this one first")
    check_directory(path, _ANOTHER)


@contextlib.contextmanager
def atomic_directory(path: Path, *, must_be_new: bool = False, instead: str = _ANOTHER) -> Iterator[Path]:
    """A scratch directory that takes the name `path` at the end of the block; an error leaves nothing behind.

    If another process was faster, its directory stays, or is an error if it `must_be_new`. Raises UserError if the
    directory cannot be written, or exists and must be new.
    """
    if must_be_new:
        check_new(path)
    scratch: Path | None = None
    try:
        with writing(path, instead):
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
        if e.errno not in _DISK:
            raise
        raise _unwritable(path, e, f"nothing was left behind; {instead}") from e
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def replace_text(path: Path, text: str) -> None:
    """Writes a file in one step: another process reads the old text or the new one, and a killed one leaves either."""
    beside = path.with_name(f".{path.name}.partial")
    beside.write_text(text)
    beside.replace(path)
