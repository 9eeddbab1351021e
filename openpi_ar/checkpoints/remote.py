"""Finds a checkpoint: shipped with the package, on this disk, or remote and copied to openpi's cache.

A remote one is downloaded once, and resumed after an interruption. The cache (`files.openpi_cache_root`) is laid out as
openpi does it: `gs://bucket/a/b` is `<cache>/bucket/a/b`.
"""

from pathlib import Path, PurePosixPath
import re
from typing import Any
from urllib.parse import urlsplit

import fsspec
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

import openpi_ar
from openpi_ar.errors import UserError
from openpi_ar.files import check_directory, openpi_cache_root
from openpi_ar.lookup import nearest

SHIPPED = {"tabletop": Path(openpi_ar.__file__).parent / "assets" / "tabletop"}
"""Names of the checkpoints that come with the package, and where they are."""

_BLOCK = 8 << 20
_PARTIAL = ".partial"
_SCHEMES = ("gs", "http", "https", "hf", "s3", "file")


def shipped(path: str | Path) -> str | Path:
    """The directory of a checkpoint that comes with the package, if `path` is exactly its name; any other path
    unchanged.

    A directory that has the same name is `./tabletop`, or a `Path`. Raises UserError if this installation lacks the
    checkpoint.
    """
    if not isinstance(path, str) or path not in SHIPPED:
        return path
    if not SHIPPED[path].is_dir():
        raise UserError(
            f"the checkpoint {path!r} is not in this installation: expected at {SHIPPED[path]}. Train one with `python "
            f"train.py --config pi05_subtask_tabletop` and give its directory; a directory called {path} is ./{path}"
        )
    return SHIPPED[path]


def local_copy(path: str | Path) -> Path:
    """A local path as it is; an address or hub id (`owner/name`) as its copy in the cache, downloaded if need be.

    `tabletop` is the checkpoint that comes with the package (`shipped`). A file is written as `<name>.partial` and
    renamed when it is complete; a directory is marked complete after its last file. Raises UserError if the address
    cannot be reached.
    """
    text = str(shipped(path))
    scheme, address = (text.split("://", 1)[0] if "://" in text else ""), text
    if not scheme:
        local = Path(text).expanduser()
        if local.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", text):
            return local
        if local.parent.is_dir():
            there = ", ".join(nearest(local.name, (p.name for p in local.parent.iterdir()))[:8]) or "nothing"
            raise UserError(f"{text} does not exist: {local.parent} holds {there}; one on the hub is hf://{text}")
        address, scheme = f"hf://{text}", "hf"
        text = f"{text} does not exist, and as {address} on the hub it"
    if scheme not in _SCHEMES:
        raise UserError(
            f"{text}: expected a local path, a hub id or an address of {', '.join(_SCHEMES)}, found {scheme}://"
        )
    parts = urlsplit(address)
    target = openpi_cache_root() / (parts.netloc.replace(":", "_") or scheme) / parts.path.strip("/")
    if target.is_file() or (target.is_dir() and not (target.parent / f".{target.name}{_PARTIAL}").exists()):
        return target
    check_directory(target.parent, "set OPENPI_DATA_HOME to a directory that can be written")
    try:
        _download(address, target)
    except UserError:
        raise
    except ImportError as e:
        raise UserError(f"{text} needs one more package ({e}): pip install 'openpi-ar[remote]'") from e
    except Exception as e:  # every backend has its own errors
        raise UserError(
            f"{text} cannot be downloaded: {type(e).__name__}: {' '.join(str(e).split())[:200]}; what has arrived "
            f"stays in {target.parent}, and the next try resumes there. Or download it yourself and give the local path"
        ) from e
    return target


def _download(url: str, target: Path) -> None:
    # Public buckets are read without credentials.
    fs, root = fsspec.core.url_to_fs(url, **({"token": "anon"} if url.startswith("gs://") else {}))
    root = root.rstrip("/")
    info = fs.info(root)
    # A web server's page of links stands for a directory.
    is_page = "http" in fs.protocol and "html" in str(info.get("mimetype", ""))
    files = {target: info} if info["type"] == "file" and not is_page else _listing(fs, root, target)
    if not files:
        raise UserError(f"{url} holds no file")
    mark = target.parent / f".{target.name}{_PARTIAL}"
    is_directory = target not in files
    target.parent.mkdir(parents=True, exist_ok=True)
    if is_directory:
        mark.touch()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as bar:
        task = bar.add_task(f"downloading {url}", total=sum(i.get("size") or 0 for i in files.values()))
        for local, remote in sorted(files.items()):
            _fetch(fs, remote, local, lambda n: bar.advance(task, n))
    if is_directory:
        mark.unlink()


def _listing(fs: Any, root: str, target: Path) -> dict[Path, dict]:
    found = fs.find(root, detail=True)
    files = {}
    for name, info in found.items():
        relative = name[len(root) :].strip("/")
        if ".." in PurePosixPath(relative).parts:
            raise UserError(f"{name} lies outside of {root}")
        files[target / relative] = info
    return files


def _fetch(fs: Any, info: dict, local: Path, advance: Any) -> None:
    """One file, from where an earlier try stopped."""
    if local.exists():
        advance(local.stat().st_size)
        return
    local.parent.mkdir(parents=True, exist_ok=True)
    partial = local.with_name(local.name + _PARTIAL)
    have = partial.stat().st_size if partial.exists() else 0
    size = info.get("size")
    with fs.open(info["name"], "rb", block_size=_BLOCK) as source:
        if have:
            try:
                source.seek(have)
                advance(have)
            except (ValueError, OSError):  # a server without ranges: from the start
                have = 0
        with partial.open("ab" if have else "wb") as out:
            while block := source.read(_BLOCK):
                out.write(block)
                advance(len(block))
    got = partial.stat().st_size
    if size is not None and got != size:
        raise UserError(f"{info['name']}: expected {size} bytes, received {got}: the connection broke off; try again")
    partial.rename(local)
