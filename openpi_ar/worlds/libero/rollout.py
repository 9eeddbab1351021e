"""Closed-loop episodes from LIBERO's own initial states: does the policy do the task, and does it say the right thing?"""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from openpi_ar.errors import UserError
from openpi_ar.policy.session import Session
from openpi_ar.worlds.libero.expert import expert_action
from openpi_ar.worlds.libero.tasks import TASKS, next_subtask
from openpi_ar.worlds.libero.world import FPS, LiberoWorld
from openpi_ar.worlds.video import Shot, VideoWriter


@runtime_checkable
class SinglePolicy(Protocol):
    """What an episode needs of a policy; see `openpi_ar.policy.Policy`."""

    def infer(self, raw: Any, *, session: Session | None = None) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Which episodes to run, and how.

    tasks          numbers in libero_10.
    episodes       of each task: from initial state `first`, `first + 1`, ...
    execute        actions of each chunk that are executed before the policy is asked again; 5 is openpi's.
    expert_drives  the scripted expert acts; the policy only says what comes next, and only that is judged.
    seed           of the policy's session in the first episode; `seed + 1` in the second, ...
    """

    tasks: tuple[int, ...] = tuple(TASKS)
    episodes: int = 10
    first: int = 0
    execute: int = 5
    expert_drives: bool = False
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class EpisodeResult:
    """One episode.

    success           LIBERO's own goal was reached within the step limit.
    objects_placed    fraction of the task's objects in the basket at the end.
    subtask_accuracy  fraction of re-plans at which the subtask said was the true one; None if the model says nothing.
    text_trouble      fraction of re-plans whose text had no end or looped.
    """

    task: int
    state: int
    success: bool
    objects_placed: float
    subtask_accuracy: float | None
    text_trouble: float
    steps: int


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """All episodes, and means over them."""

    episodes: tuple[EpisodeResult, ...]

    def means(self, task: int | None = None) -> dict[str, float | None]:
        """Mean of every figure over the episodes (of one task) that have it; None where no episode has."""
        chosen = [e for e in self.episodes if task is None or e.task == task]
        out: dict[str, float | None] = {}
        for field in dataclasses.fields(EpisodeResult)[2:]:
            values = [v for e in chosen if (v := getattr(e, field.name)) is not None]
            out[field.name] = float(np.mean(values)) if values else None
        return out


class ExpertPolicy:
    """The scripted expert in a policy's place: checks the evaluation itself. Sees the world's state; plans one action."""

    def __init__(self, world: LiberoWorld) -> None:
        self._world = world

    def infer(self, raw: Any, *, session: Session | None = None) -> dict[str, Any]:
        """As `openpi_ar.policy.Policy.infer`."""
        facts = self._world.facts()
        subtask = next_subtask(self._world.task, facts)
        return {"subtask": subtask, "text_status": "ok", "actions": expert_action(facts, subtask)[None]}


def run_episodes(
    policy: SinglePolicy, cfg: EvalConfig, world: LiberoWorld, *, video: str | Path | None = None, progress: bool = True
) -> EvalResult:
    """Runs the episodes, task by task.

    Args:
        policy: is asked with the world's observations.
        cfg: which episodes.
        world: where.
        video: .mp4 or .gif to write.
        progress: show a bar with the running means.

    Raises:
        UserError: options out of range, an initial state that LIBERO lacks, plans too short, or a video that cannot be
            written.
    """
    _check(cfg, world)
    plan = [(task, cfg.first + i) for task in cfg.tasks for i in range(cfg.episodes)]
    done: list[EpisodeResult] = []
    columns = (TextColumn("episodes"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[means]}"))
    with (
        Progress(*columns, TimeRemainingColumn(), disable=not progress) as bar,
        contextlib.nullcontext() if video is None else VideoWriter(video, fps=FPS) as film,
    ):
        shown = bar.add_task("episodes", total=len(plan), means="")
        for i, (task, state) in enumerate(plan):
            session = Session(cfg.seed + i)
            result, shots = _run(policy, session, cfg, world, (task, state), record=film is not None)
            if film is not None:
                film.add_episode(TASKS[task].prompt, shots)
            done.append(result)
            means = EvalResult(tuple(done)).means()
            named = ("success", "objects_placed", "subtask_accuracy")
            text = ", ".join(f"{name} {value:.2f}" for name in named if (value := means[name]) is not None)
            bar.update(shown, completed=len(done), means=text)
    return EvalResult(tuple(done))


def _run(
    policy: SinglePolicy,
    session: Session,
    cfg: EvalConfig,
    world: LiberoWorld,
    episode: tuple[int, int],
    *,
    record: bool,
) -> tuple[EpisodeResult, list[Shot]]:
    task, state = episode
    sees = record or not isinstance(policy, ExpertPolicy)  # drawing takes most of the time
    obs, info = world.reset(task, state, render=sees)
    right: list[bool] = []
    trouble: list[bool] = []
    film: list[Shot] = []
    over = False
    while not over:
        plan = policy.infer(obs, session=session)
        if len(plan["actions"]) < cfg.execute:
            raise UserError(
                f"execute is {cfg.execute} but the policy plans {len(plan['actions'])} steps: execute that many at most"
            )
        said, correct = plan["subtask"], None
        trouble.append(plan["text_status"] != "ok")
        if said:
            correct = said == info["subtask"]
            right.append(correct)
        for i, action in enumerate(plan["actions"][: cfg.execute]):
            if cfg.expert_drives:
                action = expert_action(world.facts(), info["subtask"])
            looked_at = record or (sees and i == cfg.execute - 1)
            obs, _, success, late, info = world.step(action, render=looked_at)
            if record:
                film.append(Shot(obs["images"], said, correct))
            over = success or late
            if over:
                break
    result = EpisodeResult(
        task=task,
        state=state,
        success=info["success"],
        objects_placed=info["objects_placed"],
        subtask_accuracy=float(np.mean(right)) if right else None,
        text_trouble=float(np.mean(trouble)),
        steps=info["steps"],
    )
    return result, film


def _check(cfg: EvalConfig, world: LiberoWorld) -> None:
    wrong = [f"{name} is {v}" for name in ("episodes", "execute") if (v := getattr(cfg, name)) < 1]
    if wrong:
        raise UserError(f"must be at least 1: {', '.join(wrong)}")
    if not cfg.tasks or not set(cfg.tasks) <= set(TASKS):
        raise UserError(f"tasks are {list(cfg.tasks)}: choose some of {', '.join(map(str, TASKS))} of libero_10")
    for task in cfg.tasks:
        count = world.num_states(task)
        if cfg.first < 0 or cfg.first + cfg.episodes > count:
            raise UserError(
                f"task {task} has initial states 0 to {count - 1}, asked for {cfg.first} to {cfg.first + cfg.episodes - 1}"
            )
