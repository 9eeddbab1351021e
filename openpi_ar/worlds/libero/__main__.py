"""`python -m openpi_ar.worlds.libero record OUT` and `eval --ckpt DIR`: demonstrations on LIBERO, and closed-loop
episodes there."""

import dataclasses
from pathlib import Path
import time
from typing import Annotated, Any, Literal

from rich.progress import track
import tyro

from openpi_ar import files, flags
from openpi_ar.data.lerobot.encode import CODECS
from openpi_ar.errors import UserError, command_line
from openpi_ar.tables import console, new_table
from openpi_ar.worlds.libero.episodes import LiberoEpisodes, check_dims, plan_episodes, spread
from openpi_ar.worlds.libero.export import write_libero
from openpi_ar.worlds.libero.record import record_episodes
from openpi_ar.worlds.libero.tasks import TASKS
from openpi_ar.worlds.libero.world import LiberoWorld
from openpi_ar.worlds.rollout import RolloutConfig, RolloutResult, run_rollouts
from openpi_ar.worlds.video import SUFFIXES

EXPERT = "expert"
"""In place of a checkpoint: the scripted expert."""


@dataclasses.dataclass(frozen=True)
class Record:
    """Successful demonstrations of the scripted expert, from newly drawn layouts, as a LeRobot v3.0 dataset."""

    out: Annotated[str, tyro.conf.Positional]
    """Directory to write; must not exist."""
    episodes: int = 30
    """How many, spread evenly over the tasks."""
    tasks: tuple[int, ...] = tuple(TASKS)
    """Numbers in libero_10."""
    seed: int = 0
    """Different seeds share no episode."""
    noise: float = 1.0
    """Strength of the disturbance while recording; 1 is the usual amount, 0 none."""
    image_size: tuple[int, int] = (256, 256)
    """Height and width of both images."""
    images: Literal["png", "h264", "av1"] = "h264"
    """png: in the parquet files, lossless; else the video codec."""
    subtasks: Literal["both", "index", "language"] = "both"
    """index: LeRobot 0.4.4 to 0.5; language: 0.6 and newer (older versions refuse such columns)."""
    workers: int = 1
    """Processes that record at the same time."""

    def run(self) -> None:
        self._check()
        began = time.perf_counter()
        LiberoWorld(self.image_size)  # raises here if it is not installed, without a worker's traceback
        jobs = [(task, (self.seed, i)) for task, n in spread(self.episodes, self.tasks).items() for i in range(n)]
        source = record_episodes(jobs, self.image_size, self.noise, self.workers)
        lengths: list[int] = []

        def counted():
            for episode in track(source, "demonstrations", total=len(jobs)):
                lengths.append(len(episode.state))
                yield episode

        root = write_libero(self.out, counted(), self.image_size, images=self.images, subtasks=self.subtasks)
        rate = sum(lengths) / (time.perf_counter() - began)
        console().print(f"{root}: {len(jobs)} episodes, {sum(lengths)} frames, {rate:.1f} frames/s", soft_wrap=True)

    def _check(self) -> None:
        files.check_new(Path(self.out))
        if self.images != "png":
            CODECS[self.images].check(self.image_size)
        if self.episodes < 1 or self.workers < 1 or self.seed < 0 or self.noise < 0:
            raise UserError("--episodes and --workers must be 1 or more, --seed and --noise 0 or more")
        if not self.tasks or not set(self.tasks) <= set(TASKS):
            raise UserError(f"--tasks are some of {', '.join(map(str, TASKS))}, found {list(self.tasks)}")


@dataclasses.dataclass(frozen=True)
class Eval:
    """Closed-loop episodes from LIBERO's own initial states: success and generated subtasks, by task."""

    ckpt: str
    """Directory or URL of a checkpoint; `expert`: the scripted expert instead, to check the evaluation."""
    robot: str | None = None
    """`libero` for a checkpoint of openpi's or LeRobot's; a checkpoint of yours trained on LeRobot data needs none."""
    asset_id: str | None = None
    """Which statistics under the checkpoint's `assets/`, if there are several."""
    horizon: int | None = None
    """Actions in a chunk, where the checkpoint does not record it; default: openpi's for the robot."""
    tasks: tuple[int, ...] = tuple(TASKS)
    """Numbers in libero_10."""
    episodes: int = 10
    """Of each task; LIBERO has 50 initial states."""
    first: int = 0
    """Initial state of the first episode of each task."""
    execute: int = 5
    """Actions of a chunk that are executed before the policy is asked again; 5 is openpi's. The expert plans one."""
    expert_drives: bool = False
    """The scripted expert acts and the model only generates subtasks: how often are they right?"""
    image_size: tuple[int, int] = (256, 256)
    """Height and width of both images, before they are resized to the model's; openpi's client has 256 x 256 too."""
    seed: int = 0
    """Seed of the action noise."""
    video: Path | None = None
    """Film the episodes: .mp4 or .gif. Every step is drawn then, which takes several times as long."""
    json: Path | None = None
    """Write the results to this file."""

    def run(self) -> None:
        files.check_file(self.video, "--video", *SUFFIXES)
        files.check_file(self.json, "--json")
        world = LiberoWorld(self.image_size)
        plan = plan_episodes(world, dict.fromkeys(self.tasks, self.episodes), self.first)
        policy = None if self.ckpt == EXPERT else self._policy()
        cfg = RolloutConfig(len(plan), self.execute, batch=1, expert_drives=self.expert_drives)
        began = time.perf_counter()
        result = run_rollouts(policy, cfg, lambda: LiberoEpisodes(plan, world, self.seed), video=self.video)
        steps = sum(e.steps for e in result.episodes)
        _print(result, self.tasks)
        console().print(f"{steps} control steps, {steps / (time.perf_counter() - began):.1f} a second, scenes included")
        by_task = {str(task): result.only(task=task).means for task in self.tasks}
        files.write_json(self.json, {**result.as_dict(), "tasks": by_task})

    def _policy(self) -> Any:
        # Here, because only a checkpoint needs jax.
        from openpi_ar.policy import Policy

        keys = ("robot", "asset_id", "horizon")
        foreign = {key: value for key in keys if (value := getattr(self, key)) is not None}
        with console().status(f"loading {self.ckpt}"):
            policy = Policy.from_checkpoint(self.ckpt, **foreign)
        check_dims((policy.transform.state_stats.dims, policy.transform.action_stats.dims))
        return policy


def _print(result: RolloutResult, tasks: tuple[int, ...]) -> None:
    rows = [*((str(task), TASKS[task].prompt, result.only(task=task)) for task in tasks), ("all", "", result)]
    names = [name for name, value in result.means.items() if value is not None]
    table = new_table("task", "prompt", "episodes", *(name.replace("_", " ") for name in names))
    for task, prompt, part in rows:
        table.add_row(task, prompt, str(len(part.episodes)), *(f"{part.means[name]:.3f}" for name in names))
    console().print(table)


Command = Annotated[Record, tyro.conf.subcommand("record")] | Annotated[Eval, tyro.conf.subcommand("eval")]


def main(argv: list[str] | None = None) -> None:
    """Entry point. Bad input ends with one line on stderr and exit code 2."""
    with command_line():
        flags.parse(Command, argv, "python -m openpi_ar.worlds.libero", description=__doc__).run()


if __name__ == "__main__":
    main()
