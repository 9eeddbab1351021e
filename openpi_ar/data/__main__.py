"""`python -m openpi_ar.data inspect|stats|subtasks PATH` and `export OUT`: LeRobot datasets from the command line."""

import sys
from typing import Annotated

import tyro

from openpi_ar.data.commands import Export, Inspect, Stats, Subtasks
from openpi_ar.errors import UserError

Command = (
    Annotated[Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[Stats, tyro.conf.subcommand("stats")]
    | Annotated[Subtasks, tyro.conf.subcommand("subtasks")]
    | Annotated[Export, tyro.conf.subcommand("export")]
)


def main(argv: list[str] | None = None) -> None:
    """Entry point. Bad input ends with one line on stderr and exit code 2."""
    try:
        tyro.cli(Command, args=argv, prog="python -m openpi_ar.data", description=__doc__).run()
    except UserError as e:
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
