"""How commands print."""

from collections.abc import Callable, Iterator
import contextlib

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


def console() -> Console:
    """The terminal. Not wrapped where output is piped: one row of a table stays one line.

    Texts are shown as they are: "[red]" in a user's task is no colour, ":smile:" no picture.
    """
    out = Console(markup=False, emoji=False)
    return out if out.is_terminal else Console(width=200, markup=False, emoji=False)


def new_table(*columns: str, title: str | None = None, header: bool = True) -> Table:
    """An empty table of these columns."""
    out = Table(title=title, title_justify="left", show_header=header)
    for name in columns:
        out.add_column(name, overflow="fold")
    return out


@contextlib.contextmanager
def progress_bar(label: str, total: int, *, shown: bool = True) -> Iterator[Callable[[int, str], None]]:
    """A bar over `total` steps; `update(completed, note)` moves it and shows the note beside it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, TimeRemainingColumn(), disable=not shown) as bar:
        task = bar.add_task(label, total=total, note="")
        yield lambda completed, note: bar.update(task, completed=completed, note=note)
