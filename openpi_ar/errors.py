"""The one exception that means "the input is wrong", not "the program is wrong", and how commands end on it."""

from collections.abc import Iterator
import contextlib
import io
import sys


class UserError(ValueError):
    """Something the user can mend: a bad flag, file, directory or observation.

    The message is one line: what was expected, what was found, where, and what to do. Every command prints it as
    `error: ...` and exits with code 2 (`command_line`).
    """


@contextlib.contextmanager
def command_line() -> Iterator[None]:
    """Runs the body of a command: a UserError becomes one line on stderr and exit code 2.

    Characters that the encoding of the output cannot hold are replaced.
    """
    replace_unwritable()
    try:
        yield
    except UserError as e:
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        raise SystemExit(2) from None


def first_line(error: Exception) -> str:
    """The first line of an error's message; its type if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def replace_unwritable() -> None:
    """Makes stdout replace what its encoding cannot hold (a pipe in cp1252 or ASCII), as standard error does."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
