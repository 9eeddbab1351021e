"""The command line: `--config NAME`, what to do with an existing experiment, and every field of the config as a flag.

Nothing here imports JAX: `train.py` answers `--help` and wrong flags before it does.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
import dataclasses
from pathlib import Path

import tyro

from openpi_ar import files, flags
from openpi_ar.config import Distributed, TrainConfig
from openpi_ar.errors import UserError

USAGE = """\
usage: python train.py --config NAME [--exp-name NAME] [--resume | --auto-resume | --overwrite] [--data.path DATASET]
                       [--robot NAME|FILE] [--dry-run] [--any.field value ...]

Trains a preset. Every field of its config is a flag:
    python train.py --config pi05_subtask_tabletop --exp-name wide --model.vlm.mlp-dim 768 --optimizer.peak-lr 5e-4
Checkpoints, metrics.jsonl and loss.png go to <checkpoint_dir>/<config>/<exp_name>/.

    --config NAME       the preset (below); `--config NAME --help` lists its fields and their values
    --exp-name NAME     name of this run (default: default)
    --resume            continue from the newest complete checkpoint, exactly as if never stopped: fields that are not
                        given have their saved values
    --auto-resume       continue if there is a complete checkpoint, start (anew) if there is none: one command for a
                        scheduler that starts jobs again
    --overwrite         delete what the experiment's directory holds and start anew
    --data.path DATASET train on this LeRobot dataset: a directory, a name on the Hugging Face hub, or what a simulated
                        world writes on first use: 'world://tabletop?episodes=200' (docs/data.md)
    --robot NAME|FILE   how its cameras, states and actions are read: a robot's name, or a .yaml or .json file of yours
                        (docs/robots.md); the checkpoint stores it. Single fields are flags too:
                        --data.robot.delta-mask 6 -1
    --dry-run           show what the model would be fed (mapping, ranges, prompts), check all labels, and train nothing
    --plot FILE         with --dry-run: draw the ranges into this image file
    --distributed.coordinator HOST:PORT  --distributed.num-processes N  --distributed.process-id I
                        one process of several; Slurm, Open MPI and TPU slices need no flag (docs/clusters.md)

Presets:
"""


_PRETRAINING = (
    "a world's own command trains towers on its poses: python -m openpi_ar.worlds.NAME pretrain OUT, then "
    "--init-from OUT"
)
_IN_ADDRESS = (
    "what a world's demonstrations are like stands in their address: --data.path 'world://NAME?parameter=value'"
)
_RETIRED: dict[str, tuple[str, str]] = {
    "--data": ("lerobot", "every dataset is named by --data.path"),
    "--data.vision-steps": ("0", _PRETRAINING),
    "--data.naming-steps": ("0", _PRETRAINING),
    "--loss.text-weight": ("", "--loss.subtask-weight and --loss.answer-weight have taken its place"),
    **{f"--data.{name}": ("", _IN_ADDRESS) for name in ("seed", "image-size", "noise", "commanded", "asked", "pairs")},
}
"""Flags of earlier versions: the value that changes nothing (such a flag is left out), and what to do for any other
one."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What one call of `train.py` asks for."""

    config: TrainConfig
    resume: bool
    auto_resume: bool
    overwrite: bool
    distributed: Distributed
    dry_run: bool = False
    plot: Path | None = None


_OWN = ("resume", "auto-resume", "overwrite", "dry-run")


def parse(
    argv: Sequence[str],
    presets: Mapping[str, tuple[TrainConfig, str]],
    get_preset: Callable[[str], TrainConfig],
    saved: Callable[[TrainConfig], TrainConfig | None] = lambda cfg: None,
    robot_file: Callable[[str], str] = lambda name: name,
) -> Arguments:
    """Parses the command line. Raises UserError in one line; SystemExit(0) after printing help.

    `saved` finds the config of the run that `--resume` and `--auto-resume` continue: fields that are not given are its.
    `robot_file` gives the files of robots that `data/robots.py` does not know by name.
    """
    argv = flags.spelt_out(argv, flags.booleans(TrainConfig) | set(_OWN))
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    for name in _OWN:
        parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--robot")
    parser.add_argument("--plot", type=Path)
    try:
        own, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as e:
        raise UserError(f"{e}; see python train.py --help") from e
    names = "".join(f"    {name:<24}{text}\n" for name, (_, text) in presets.items())
    if own.config is None:
        if {"-h", "--help"} & set(rest):
            print(USAGE + names, end="")
            raise SystemExit(0)
        raise UserError(f"--config NAME is needed; presets: {', '.join(presets)}; see python train.py --help")
    processes, rest = _parse_processes(_without_retired(rest))
    base = get_preset(own.config)
    cfg = _parse_fields(base, rest)
    if own.resume or own.auto_resume:
        base = saved(cfg) or base
        cfg = _parse_fields(base, rest)
    if own.robot is not None:
        # Again: the cameras that the robot feeds may be given as flags, and flags go before the robot's own values.
        cfg = _parse_fields(_with_robot(base, robot_file(own.robot), cfg), rest)
    if own.plot is not None and not own.dry_run:
        raise UserError("--plot draws what --dry-run finds: add --dry-run")
    files.check_file(own.plot, "--plot", *files.FIGURES)
    return Arguments(cfg, own.resume, own.auto_resume, own.overwrite, processes, own.dry_run, own.plot)


def _with_robot(preset: TrainConfig, robot: str, cfg: TrainConfig) -> TrainConfig:
    from openpi_ar.data.robots import get_robot

    spec = get_robot(robot).of_model(cfg.model.kind)
    spec.check_cameras(cfg.model.cameras)
    return dataclasses.replace(preset, data=dataclasses.replace(preset.data, robot=spec))


def _without_retired(args: Sequence[str]) -> list[str]:
    """The arguments without flags of earlier versions that change nothing. Raises UserError for one that would."""
    kept, rest = [], list(args)
    while rest:
        flag, is_pair, value = rest[0].partition("=")
        name = flag.replace("_", "-")
        if name not in _RETIRED:
            kept.append(rest.pop(0))
            continue
        neutral, advice = _RETIRED[name]
        if not is_pair:
            value = rest[1] if len(rest) > 1 else ""
        if not neutral or value != neutral:
            raise UserError(f"{flag} is a flag of an earlier version: {advice}")
        del rest[: 1 if is_pair else 2]
    return kept


@dataclasses.dataclass(frozen=True)
class _Processes:
    distributed: Distributed = dataclasses.field(default_factory=Distributed)


def _parse_processes(rest: Sequence[str]) -> tuple[Distributed, list[str]]:
    """(`--distributed.*`, all other arguments)."""
    with flags.one_line("python train.py --help"):
        found, others = tyro.cli(_Processes, args=list(rest), return_unknown_args=True, add_help=False)
    return found.distributed, others


def _parse_fields(preset: TrainConfig, rest: Sequence[str]) -> TrainConfig:
    with flags.one_line(f"python train.py --config {preset.name} --help"):
        return tyro.cli(
            tyro.conf.AvoidSubcommands[TrainConfig],
            default=preset,
            args=list(rest),
            prog=f"python train.py --config {preset.name}",
            description=f"Fields of preset {preset.name} and their values.",
        )
