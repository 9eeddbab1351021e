"""`python -m openpi_ar.data inspect|stats|subtasks PATH`: LeRobot datasets from the command line."""

from typing import Annotated

import tyro

from openpi_ar import flags
from openpi_ar.data.commands import Inspect, Stats, Subtasks
from openpi_ar.errors import command_line

Command = (
    Annotated[Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[Stats, tyro.conf.subcommand("stats")]
    | Annotated[Subtasks, tyro.conf.subcommand("subtasks")]
)


def main(argv: list[str] | None = None) -> None:
    """Entry point. Bad input ends with one line on stderr and exit code 2."""
    with command_line():
        flags.parse(Command, argv, "python -m openpi_ar.data", description=__doc__).run()


if __name__ == "__main__":
    main()
