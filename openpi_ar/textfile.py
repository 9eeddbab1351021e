"""Text, JSON and YAML files that other programs wrote, and the numbers in them: what is not as expected is one line
naming the file.

Texts are UTF-8, with or without a byte-order mark.
"""

from collections.abc import Iterable, Mapping
import contextlib
import json
from pathlib import Path
import sys
from typing import Any, TypeGuard

import numpy as np
import yaml

from openpi_ar.errors import UserError

_LARGEST = 2**31 - 1
"""Indices and lengths stay below: what numpy and pyarrow hold, and no dataset reaches."""


def read_text(path: Path) -> str:
    """The content of a UTF-8 file. Raises UserError if it is missing, cannot be read or is in another encoding."""
    try:
        return path.read_text("utf-8-sig")
    except FileNotFoundError as e:
        raise UserError(f"{path} is missing") from e
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 (byte {e.object[e.start]:#04x} at {e.start}): save it as UTF-8") from e
    except (OSError, ValueError) as e:  # ValueError: the path itself holds a zero byte
        raise UserError(f"{path} cannot be read: {getattr(e, 'strerror', None) or e}") from e


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises UserError if it does not."""
    return _object(read_text(path), str(path))


def read_lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(number of the line, object) of a file of one JSON object a line; blank lines are skipped.

    Raises UserError naming the line that holds none.
    Lines end with a line feed alone: JSON texts may hold the other characters that Unicode breaks lines at.
    """
    lines = enumerate(read_text(path).split("\n"), 1)
    return [(number, _object(line, f"{path} line {number}")) for number, line in lines if line.strip()]


def read_texts(path: Path) -> tuple[str, ...]:
    """A file of one text a line; blank lines are skipped. Raises UserError if there is none."""
    texts = tuple(line.strip() for line in read_text(path).splitlines() if line.strip())
    if not texts:
        raise UserError(f"{path} holds no text: write one a line")
    return texts


def as_text(value: Any, what: str) -> str:
    """A text that may be UTF-8 bytes, or an array or list of one text, as HDF5, RLDS and .npz files give it.

    Raises UserError, saying what it is, for anything else.
    """
    one = np.ravel(value)[0] if isinstance(value, np.ndarray | list | tuple) and np.size(value) == 1 else value
    with contextlib.suppress(UnicodeDecodeError):
        if isinstance(one, bytes | str):
            return one.decode() if isinstance(one, bytes) else str(one)
    found = f"an array, {value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else repr(value)[:200]
    raise UserError(f"{what} is {found}, expected a text (UTF-8)")


def whole_number(row: Mapping[str, Any], key: str, where: str, least: int = 0) -> int:
    """A whole number out of a user's file. Raises UserError saying where, if it is anything else or below `least`."""
    value = row.get(key)
    # Floats too: pandas makes them of integers.
    if not is_number(value) or value != int(value) or not least <= value <= _LARGEST:
        found = f"is {value!r}" if key in row else "is missing"
        raise UserError(f"{where}: {key} {found}, expected a whole number of {least} or more")
    return int(value)


def is_number(value: Any) -> TypeGuard[int | float]:
    """A finite number, not True or False."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def parse_json(text: str, where: str) -> Any:
    """What a JSON text holds. Raises UserError, saying where, if it is none or gives a key twice."""
    try:
        return json.loads(text, object_pairs_hook=_once)
    except _TwiceError as e:
        raise UserError(f"{where}: {e}") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where} is not JSON: {e}") from e


def parse_yaml(text: str, where: str) -> Any:
    """The same of YAML, of plain values."""
    try:
        return yaml.load(text, _Loader)
    except _TwiceError as e:
        raise UserError(f"{where}: {e}") from e
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as e:  # no date, a list as a key
        raise UserError(f"{where} is not YAML: {' '.join(str(e).split())}") from e


class _TwiceError(Exception):
    pass


class _Loader(yaml.SafeLoader):
    """Refuses keys that are given twice, of which YAML's own loader takes the last."""


def _once(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    body = {}
    for key, value in pairs:
        if key in body:
            raise _TwiceError(f"{key!r} is given twice: keep one")
        body[key] = value
    return body


_Loader.add_constructor(
    yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG,
    lambda loader, node: _once(loader.construct_pairs(node, deep=True)),  # pyright: ignore[reportArgumentType]
)


def _object(text: str, where: str) -> dict[str, Any]:
    body = parse_json(text, where)
    if not isinstance(body, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(body).__name__}")
    return body
