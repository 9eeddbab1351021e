"""Datasets that worlds write, by address: `world://tabletop?episodes=1000&seed=2`.

The first use writes the dataset into the cache. A config keeps the address, so the same run finds or writes the dataset
on any machine.
"""

import math
import typing
from typing import Any, TypeVar

from openpi_ar.errors import UserError
from openpi_ar.lookup import nearest

SCHEME = "world://"
NAMES = ("tabletop",)
"""Worlds whose datasets have an address."""

T = TypeVar("T")


def local(path: str, cache_dir: str | None = None) -> str:
    """The path of a dataset as it is, or the directory of the dataset that an address stands for, written if need be.

    Args:
        path: of a LeRobot dataset, or `world://NAME?parameter=value&...`.
        cache_dir: below which datasets are written; see `files.cache_root`.

    Raises:
        UserError: a world or parameter that does not exist, or a value that it cannot have; names those there are.
    """
    if not path.startswith(SCHEME):
        return path
    name, _, query = path.removeprefix(SCHEME).partition("?")
    if name not in NAMES:
        raise UserError(
            f"{path}: there is no world {name!r}: datasets are written by {', '.join(nearest(name, NAMES))}"
        )
    from openpi_ar.worlds.tabletop.dataset import Demonstrations, cached_dataset  # not before a simulator is asked for

    return str(cached_dataset(parse(Demonstrations, query, path), cache_dir))


def parse(kind: type[T], query: str, address: str) -> T:
    """The frozen dataclass `kind` with the fields that `a=1&b=x,y` gives. `address` heads messages.

    Raises UserError for a field that it does not have, one that is given twice, or a value of another type.
    """
    hints, values = typing.get_type_hints(kind), {}
    for part in query.split("&") if query else ():
        name, equals, text = part.partition("=")
        if name not in hints:
            raise UserError(f"{address}: no parameter {name!r}: there are {', '.join(nearest(name, hints))}")
        if not equals or name in values:
            raise UserError(f"{address}: {name} must be given once, as {name}=VALUE")
        try:
            values[name] = _value(hints[name], text)
        except ValueError:
            form = _FORMS.get(hints[name]) or " or ".join(typing.get_args(hints[name]))
            raise UserError(f"{address}: {name} must be {form}, found {text!r}") from None
    return kind(**values)


_FORMS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    tuple[int, int]: "height and width such as 64x64",
    tuple[str, ...]: "names such as red,blue",
}


def _value(hint: Any, text: str) -> Any:
    if typing.get_origin(hint) is typing.Literal:
        if text not in typing.get_args(hint):
            raise ValueError(text)
        return text
    if hint == tuple[str, ...]:
        return tuple(text.split(","))
    if hint == tuple[int, int]:
        height, width = text.split("x")
        return int(height), int(width)
    value = hint(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value
