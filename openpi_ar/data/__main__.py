"""`python -m openpi_ar.data inspect|stats|subtasks|bench PATH` and `export OUT`: LeRobot datasets from the command line."""

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

BENCH = """\
usage: python -m openpi_ar.data bench PATH
       python -m openpi_ar.data bench --config NAME [any flag of train.py]

Measures how fast samples are made: decoding, resizing, reading, tokenizing, and the loader with threads, 1 and 2 worker
processes. PATH: a LeRobot dataset, for a model of full size. --config: as that run would, and the training step too; says
whether data or compute is the bottleneck.
"""


def main(argv: list[str] | None = None) -> None:
    """Entry point. Bad input ends with one line on stderr and exit code 2."""
    argv = sys.argv[1:] if argv is None else argv
    about = f"{__doc__} Throughput: `python -m openpi_ar.data bench --help`."
    try:
        if argv[:1] == ["bench"]:
            _bench(argv[1:])
        else:
            tyro.cli(Command, args=argv, prog="python -m openpi_ar.data", description=about).run()
    except UserError as e:
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        raise SystemExit(2) from None


def _bench(argv: list[str]) -> None:
    # Here, because only this command knows presets and training.
    from configs import HELP, PRESETS, get_preset
    from openpi_ar.training import cli, experiment, throughput

    if "--config" in argv:
        cfg = cli.parse(argv, HELP, get_preset).config
        experiment.check_config(cfg)
        experiment.check_data(cfg)
        throughput.bench(cfg, step=True)
    elif len(argv) == 1 and not argv[0].startswith("-"):
        throughput.bench(throughput.for_dataset(argv[0], PRESETS["pi05_subtask"]), step=False)
    else:
        print(BENCH, end="")
        if not {"-h", "--help"} & set(argv):
            raise UserError("bench takes a dataset's PATH, or --config NAME with flags of train.py")


if __name__ == "__main__":
    main()
