"""`python -m openpi_ar.worlds.tabletop record|pretrain|rollout|steps|ask`: demonstrations, a model that knows where
things are before it imitates, closed-loop episodes, how many denoising steps they need, and questions about them."""

import dataclasses
from pathlib import Path
import time
from typing import Annotated, Literal

import tyro

from openpi_ar import files, flags
from openpi_ar.data.lerobot.meta import read_meta
from openpi_ar.errors import UserError, command_line
from openpi_ar.policy.ladder import Ladder
from openpi_ar.tables import console, new_table
from openpi_ar.worlds.protocol import Play
from openpi_ar.worlds.rollout import RolloutConfig, run_rollouts
from openpi_ar.worlds.tabletop.ask import AskConfig, ask
from openpi_ar.worlds.tabletop.dataset import Demonstrations, record_dataset
from openpi_ar.worlds.tabletop.episodes import open_episodes
from openpi_ar.worlds.video import SUFFIXES


@dataclasses.dataclass(frozen=True)
class Record:
    """Demonstrations of the scripted expert as a LeRobot v3.0 dataset."""

    out: Annotated[str, tyro.conf.Positional]
    """Directory to write; must not exist."""
    demos: Annotated[Demonstrations, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=lambda: Demonstrations(episodes=100)
    )
    images: Literal["png", "h264", "av1"] = "h264"
    """png: in the parquet files, lossless; else the video codec."""
    subtasks: Literal["both", "index", "language"] = "both"
    """index: LeRobot 0.4.4 to 0.5; language: 0.6 and newer (older versions refuse such columns)."""
    questions: bool = False
    """Ask on every second frame what its images tell for certain (`language_events`, LeRobot 0.6 and newer)."""

    def run(self) -> None:
        began = time.perf_counter()
        columns = {"subtasks": self.subtasks, "questions": self.questions}
        root = record_dataset(self.out, self.demos, images=self.images, **columns)
        frames = sum(e.length for e in read_meta(root).episodes)
        rate = frames / (time.perf_counter() - began)
        console().print(f"{root}: {self.demos.episodes} episodes, {frames} frames, {rate:.0f} frames/s", soft_wrap=True)


@dataclasses.dataclass(frozen=True)
class Pretrain:
    """A checkpoint for `train.py --init-from`: a vision tower that has learned where everything is, and a tower 1 that
    has learned what a text names, both from the positions that the simulator knows."""

    out: Annotated[Path, tyro.conf.Positional]
    """Directory to write; must not exist."""
    like: str = "tabletop"
    """Checkpoint whose model sizes and texts it gets; `tabletop`, which comes with the package, has those of the
    tabletop's presets."""
    vision_steps: int = 1_000
    """Steps of the vision tower, 64 frames each; 0: none."""
    naming_steps: int = 600
    """Then, steps of tower 1, 32 frames each; 0: none."""
    init_from: str = ""
    """Checkpoint to start from; empty: random parameters."""
    data: str = "world://tabletop?episodes=1000&commanded=0.25&pairs=0.45"
    """Dataset with block positions: an address or what `record` wrote."""
    seed: int = 0
    """Of the random parameters and of which frames are seen."""

    def run(self) -> None:
        files.check_new(self.out)
        # Here, because recording needs no JAX.
        from openpi_ar.checkpoints import remote, store
        from openpi_ar.compilation import keep_compiled_programs
        from openpi_ar.config import InferenceConfig
        from openpi_ar.worlds.tabletop import pretrain

        keep_compiled_programs()
        found = store.load_assets(store.resolve_step_dir(remote.shipped(self.like))).config
        if isinstance(found, InferenceConfig):
            raise UserError(f"{self.like} is a converted checkpoint, which has no training config: name one of a run")
        data = dataclasses.replace(found.data, path=self.data)
        cfg = dataclasses.replace(found, data=data, init_from=self.init_from, seed=self.seed)
        found = pretrain.pretrain(cfg, vision_steps=self.vision_steps, naming_steps=self.naming_steps)
        for what, error in found.errors.items():
            console().print(f"{what}: blocks placed to {error:.2f} cm")
        step = pretrain.save(found, self.out, self.vision_steps + self.naming_steps)
        console().print(
            f"{step}: start with python train.py --config {cfg.name} --init-from {self.out}", soft_wrap=True
        )


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Closed-loop episodes: what `infer.py --rollout` plays, and the scripted expert."""

    ckpt: str = "expert"
    """Checkpoint, as for infer.py; `expert`: the scripted expert, which checks the world itself."""
    which: Annotated[Play, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Play)
    how: Annotated[RolloutConfig, tyro.conf.arg(name="")] = dataclasses.field(default_factory=RolloutConfig)
    video: Path | None = None
    """Film the episodes: .mp4 or .gif."""
    json: Path | None = None
    """Write the results to this file."""

    def run(self) -> None:
        files.check_file(self.video, "--video", *SUFFIXES)
        files.check_file(self.json, "--json")
        policy = None
        if self.ckpt != "expert":
            from openpi_ar.policy import Policy

            policy = Policy.from_checkpoint(self.ckpt)
        make = open_episodes(Play.of(policy, **dataclasses.asdict(self.which)))
        result = run_rollouts(policy, self.how, make, video=self.video)
        console().print(result.table())
        files.write_json(self.json, result.as_dict())


@dataclasses.dataclass(frozen=True)
class Ask:
    """Questions about unseen layouts while the scripted expert plays, and how many a checkpoint answers."""

    ckpt: str = "tabletop"
    """Checkpoint, as for infer.py."""
    which: Annotated[Play, tyro.conf.arg(name="")] = dataclasses.field(default_factory=lambda: Play(seed=1000))
    how: Annotated[AskConfig, tyro.conf.arg(name="")] = dataclasses.field(default_factory=AskConfig)
    json: Path | None = None
    """Write the results to this file."""

    def run(self) -> None:
        files.check_file(self.json, "--json")
        from openpi_ar.policy import Policy

        policy = Policy.from_checkpoint(self.ckpt)
        result = ask(policy, self.how, open_episodes(Play.of(policy, **dataclasses.asdict(self.which))))
        console().print(result.table())
        files.write_json(self.json, result.as_dict())


@dataclasses.dataclass(frozen=True)
class StepsOfFlow:
    """Success against the number, method and spacing of the steps from noise to actions. Where there is no simulator:
    `python -m openpi_ar.policy steps`."""

    ckpt: str = "tabletop"
    """Checkpoint, as for infer.py."""
    which: Annotated[Play, tyro.conf.arg(name="")] = dataclasses.field(default_factory=lambda: Play(seed=1000))
    how: Annotated[RolloutConfig, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=lambda: RolloutConfig(episodes=50, batch=50)
    )
    ladder: Annotated[Ladder, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Ladder)
    tolerance: float = 0.02
    """The fewest steps whose success is this close to the best are enough."""
    write: bool = False
    """Write them into the checkpoint (`decode.denoise_steps`, ...): its policy then uses them."""
    json: Path | None = None
    """Write the results to this file."""

    def run(self) -> None:
        files.check_file(self.json, "--json")
        from openpi_ar.policy import Policy, steps

        policy = Policy.from_checkpoint(self.ckpt)
        make = open_episodes(Play.of(policy, **dataclasses.asdict(self.which)))
        results = {}
        for way in steps.ways(self.ladder):
            console().print(f"{steps.describe(way)}:")
            played = run_rollouts(policy.denoising(way.num, way.method, way.shift), self.how, make)
            results[way] = played.means
        chosen = steps.fewest({way: 1 - r["success"] for way, r in results.items()}, self.tolerance)
        table = new_table("steps", "passes", "success", "subtask right", "")
        for way, r in results.items():
            right = "" if r["subtask_accuracy"] is None else f"{r['subtask_accuracy']:.1%}"
            enough = "enough" if way == chosen else ""
            table.add_row(steps.describe(way), str(way.passes), f"{r['success']:.1%}", right, enough)
        console().print(table)
        body = {"chosen": steps.describe(chosen), "ways": {steps.describe(way): r for way, r in results.items()}}
        files.write_json(self.json, body)
        if self.write:
            console().print(f"{steps.write(self.ckpt, chosen)}: {steps.describe(chosen)}", soft_wrap=True)


Command = (
    Annotated[Record, tyro.conf.subcommand("record")]
    | Annotated[Pretrain, tyro.conf.subcommand("pretrain")]
    | Annotated[Rollout, tyro.conf.subcommand("rollout")]
    | Annotated[StepsOfFlow, tyro.conf.subcommand("steps")]
    | Annotated[Ask, tyro.conf.subcommand("ask")]
)


def main(argv: list[str] | None = None) -> None:
    """Entry point. Bad input ends with one line on stderr and exit code 2."""
    with command_line():
        flags.parse(Command, argv, "python -m openpi_ar.worlds.tabletop", description=__doc__).run()


if __name__ == "__main__":
    main()
