"""Command lines: tyro's, with the spellings that users of other launchers know, and with errors of one line.

--wandb   --wandb=True   --wandb true   --wandb 1    the same, of every boolean; likewise False, 0, --no-wandb
--out ~/x   --out=~/x   --images front=~/a.png       the home directory: a shell finds it in the first form alone
--exp_name x                                         --exp-name x
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import io
import os
import re
import sys
import types
import typing
from typing import Any

import tyro

from openpi_ar.errors import UserError

_BOOLEANS = {**dict.fromkeys(("true", "yes", "on", "1"), True), **dict.fromkeys(("false", "no", "off", "0"), False)}


def parse(what: Any, argv: Sequence[str] | None, prog: str, **options: Any) -> Any:
    """A command line as an instance of `what`: a dataclass, or several as subcommands.

    Functions by the names of their subcommands (a mapping) give a call without arguments of the one that is meant.

    Args:
        what: as above.
        argv: the words of the command line; None: this process's.
        prog: the command, for messages and help.
        options: of `tyro.cli`.

    Raises:
        UserError: of one line, if the words are not understood.
        SystemExit: after printing help.
    """
    words = spelt_out(sys.argv[1:] if argv is None else argv, booleans(what))
    with one_line(f"{prog} --help"):
        if isinstance(what, Mapping):
            return tyro.extras.subcommand_cli_from_dict({k: _later(f) for k, f in what.items()}, args=words, prog=prog)
        return tyro.cli(what, args=words, prog=prog, **options)


def spelt_out(argv: Sequence[str], boolean: frozenset[str]) -> list[str]:
    """The words as tyro expects them. `boolean`: names of flags, as `booleans` gives them. Raises UserError for a
    boolean that is neither true nor false."""
    words, rest = [], list(argv)
    while rest:
        word = rest.pop(0)
        if word == "--":  # what follows is another command
            return [*words, word, *rest]
        flag, equals, value = word.partition("=")
        if not flag.startswith("--"):
            words.append(_at_home(word))
            continue
        flag = flag.replace("_", "-")
        if flag[2:] not in boolean:
            words.append(f"{flag}{equals}{_at_home(value)}")
            continue
        if not equals and rest and rest[0].lower() in _BOOLEANS:
            equals, value = "=", rest.pop(0)
        if equals and value.lower() not in _BOOLEANS:
            raise UserError(f"{flag} is true or false, found {value!r}: write {flag} or {_negated(flag)}")
        words.append(_negated(flag) if equals and not _BOOLEANS[value.lower()] else flag)
    return words


def booleans(what: Any, prefix: str = "") -> frozenset[str]:
    """Names of the boolean flags of a dataclass, function, or several of them: "wandb", "model.remat"."""
    if isinstance(what, Mapping):
        return frozenset().union(*map(booleans, what.values()))
    if typing.get_origin(what) is typing.Annotated:
        what = typing.get_args(what)[0]
    if typing.get_origin(what) in (types.UnionType, typing.Union):
        return frozenset().union(*(booleans(member, prefix) for member in typing.get_args(what)))
    if not (dataclasses.is_dataclass(what) or isinstance(what, types.FunctionType)):
        return frozenset()
    found: set[str] = set()
    for name, hint in typing.get_type_hints(what, include_extras=True).items():
        name = f"{prefix}{name}".replace("_", "-")
        # tyro leaves out the prefix of some annotated fields: a name that is no flag does no harm.
        inner = (f"{name}.", prefix) if typing.get_origin(hint) is typing.Annotated else (f"{name}.",)
        found |= {name} if hint is bool else frozenset().union(*(booleans(hint, p) for p in inner))
    return frozenset(found)


@contextlib.contextmanager
def one_line(advice: str) -> Iterator[None]:
    """The boxes of tyro's error messages folded into one line."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            yield
    except SystemExit as e:
        if not e.code:
            sys.stderr.write(errors.getvalue())
            raise
        lines = [re.sub(r"[─-╿]|--{5,}", "", line).strip() for line in errors.getvalue().splitlines()]
        lines = [line for line in lines if line]
        end = next((i for i, s in enumerate(lines) if s.startswith(("Argument helptext", "For full help"))), len(lines))
        # The first line is the box's title ("Value error"); the rest is the message.
        raise UserError(f"{' '.join(lines[1:end])}; see {advice}") from e


def _negated(flag: str) -> str:
    """ "--model.remat" -> "--model.no-remat"."""
    path, dot, name = flag[2:].rpartition(".")
    return f"--{path}{dot}no-{name}"


def _at_home(word: str) -> str:
    """A path, or the path behind `name=`, with the home directory in place of "~"."""
    start, path = re.fullmatch(r"((?:[\w.-]+=)*)(.*)", word, re.DOTALL).groups()  # pyright: ignore[reportOptionalMemberAccess]
    return start + os.path.expanduser(path) if path.startswith("~") else word


def _later(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def bound(*args: Any, **kwargs: Any) -> Callable[[], Any]:
        return functools.partial(function, *args, **kwargs)

    return bound
