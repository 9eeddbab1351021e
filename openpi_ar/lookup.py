"""The one rule by which a name that a user wrote means one of the names there are.

Exactly that name; else, for a name of one part ("state") or a robot's key ("observation/state"), the one name whose
last part it is; else an error that lists the candidates, nearest first.
"""

from collections.abc import Iterable
import difflib

from openpi_ar.errors import UserError


def resolve(name: str, names: Iterable[str], what: str) -> str:
    """The one of `names` that is meant. `what` begins the message: "DATASET has no feature". Raises UserError."""
    names = list(names)
    found = matches(name, names)
    if not found:
        raise unknown(name, names, what)
    if len(found) > 1:
        raise UserError(f"{what} {name!r}: {' and '.join(found)} both end so; write the whole name")
    return found[0]


def matches(name: str, names: Iterable[str]) -> list[str]:
    """What `name` may mean: itself, if it is one of `names`, else all whose last part it is."""
    names = list(names)
    if name in names:
        return [name]
    plain = "." not in name or "/" in name
    return [other for other in names if plain and last_part(other) == last_part(name)]


def unknown(name: str, names: Iterable[str], what: str) -> UserError:
    """The error for a name that is none of `names`."""
    return UserError(f"{what} {name!r}: it has {', '.join(nearest(name, names)) or 'none'}")


def nearest(name: str, names: Iterable[str]) -> list[str]:
    """All of `names`, those most like `name` first."""
    return sorted(names, key=lambda other: -difflib.SequenceMatcher(None, name.lower(), other.lower()).ratio())


def last_part(name: str) -> str:
    """ "observation.images.top" and "images/top" -> "top"."""
    return name.replace("/", ".").rsplit(".", 1)[-1]
