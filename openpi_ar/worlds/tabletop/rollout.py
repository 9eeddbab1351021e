"""Closed-loop episodes on the tabletop: does the policy do the task, and does it say the right thing on the way?

Several episodes run at once, each in its own world, so that the policy sees batches: all worlds re-plan together, then each
executes the first `execute` actions of its chunk. A world whose episode is over takes the next one.
"""

from collections.abc import Callable, Sequence
import contextlib
import dataclasses
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from openpi_ar.errors import UserError
from openpi_ar.policy.session import Session
from openpi_ar.worlds.tabletop.expert import Expert, approached, parse_subtask
from openpi_ar.worlds.tabletop.tasks import Split, pick_up, sample_task
from openpi_ar.worlds.tabletop.world import Info, Observation, Tabletop
from openpi_ar.worlds.video import Shot, VideoWriter

APPROACH_STEPS = 60
"""Control steps within which a hand that was told to pick up a block must have gone to one."""


@runtime_checkable
class BatchPolicy(Protocol):
    """What a rollout needs of a policy; see `openpi_ar.policy.Policy`."""

    def infer_batch(
        self,
        raws: Sequence[Any],
        *,
        subtasks: Sequence[str | None] | None = None,
        sessions: Sequence[Session] | None = None,
        batch_size: int | None = None,
    ) -> list[dict[str, Any]]: ...


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """Which episodes to run, and how.

    episodes         how many; their seeds are `seed`, `seed + 1`, ..., of the scene and of the policy's session.
    split            tasks asked for: "train", or combinations never trained on, "held_out".
    execute          actions of each chunk that are executed before the policy is asked again.
    batch            episodes run at once.
    shuffle_prompts  each episode gets the prompt of another one, but is scored by its own task.
    blank_images     the policy sees black images.
    expert_drives    the scripted expert acts; the policy only says what comes next, and only that is judged.
    subtask          the policy is made to say this, always.
    wrong_subtask    it is made to say "pick up the X block" where X is on the table but not what comes next.

    With a forced subtask an episode ends when the hand is down at a block, or after `APPROACH_STEPS`.
    """

    episodes: int = 20
    seed: int = 0
    split: Split = "train"
    execute: int = 2
    batch: int = 8
    shuffle_prompts: bool = False
    blank_images: bool = False
    expert_drives: bool = False
    subtask: str | None = None
    wrong_subtask: bool = False

    @property
    def is_forced(self) -> bool:
        return self.wrong_subtask or self.subtask is not None


@dataclasses.dataclass(frozen=True)
class EpisodeResult:
    """One episode.

    success            the whole task was done within the step limit.
    blocks_placed      fraction of the task's blocks in their bins at the end.
    subtask_accuracy   fraction of re-plans at which the subtask said was the true one; None if it was forced or the
                       model says nothing.
    text_trouble       fraction of re-plans whose text had no end or looped.
    approached_named   the first block the hand went down to was the one that the forced subtask names; None if none is
                       forced or the block is not on the table.
    approached_true    it was the one that the task needed next.
    """

    seed: int
    prompt: str
    success: bool
    blocks_placed: float
    subtask_accuracy: float | None
    text_trouble: float
    steps: int
    approached_named: bool | None = None
    approached_true: bool | None = None


@dataclasses.dataclass(frozen=True)
class RolloutResult:
    """All episodes in the order of their seeds, and means over them (None where no episode has the figure)."""

    episodes: tuple[EpisodeResult, ...]

    def mean(self, field: str) -> float | None:
        """Mean of a field over the episodes that have it."""
        values = [v for e in self.episodes if (v := getattr(e, field)) is not None]
        return float(np.mean(values)) if values else None

    @property
    def means(self) -> dict[str, float | None]:
        """Mean of every figure of `EpisodeResult`."""
        names = [f.name for f in dataclasses.fields(EpisodeResult) if f.name not in ("seed", "prompt")]
        return {name: self.mean(name) for name in names}


def run_rollouts(
    policy: BatchPolicy,
    cfg: RolloutConfig,
    make_world: Callable[[], Tabletop] = Tabletop,
    *,
    video: str | Path | None = None,
    progress: bool = True,
) -> RolloutResult:
    """Runs the episodes.

    Args:
        policy: is asked with the world's observations; its actions must be in the world's units.
        cfg: which episodes.
        make_world: makes the worlds, `cfg.batch` at most; their cameras and image size must suit the policy.
        video: .mp4 or .gif to write, episodes in the order in which they end.
        progress: show a bar with the running means.

    Raises:
        UserError: options out of range or contradictory, or a video that cannot be written.
    """
    _check(cfg)
    prompts = _prompts(cfg)
    todo = iter(range(cfg.episodes))
    slots = [_Slot(make_world(), record=video is not None) for _ in range(min(cfg.batch, cfg.episodes))]
    done: dict[int, EpisodeResult] = {}
    with (
        _Bar(cfg.episodes, shown=progress) as bar,
        contextlib.nullcontext() if video is None else VideoWriter(video) as film,
    ):
        live = [slot for slot in slots if slot.begin(cfg, next(todo, None), prompts)]
        while live:
            _replan(policy, cfg, live, len(slots))
            for slot in [s for s in live if s.over]:
                done[slot.episode] = slot.result()
                if film is not None:
                    film.add_episode(slot.prompt, slot.film)
                bar.update(done)
                slot.begin(cfg, next(todo, None), prompts)
            live = [slot for slot in live if not slot.over]
    return RolloutResult(tuple(done[i] for i in range(cfg.episodes)))


class _Slot:
    """A world and the episode that runs in it."""

    def __init__(self, world: Tabletop, *, record: bool):
        self.world, self.record = world, record
        self.expert = Expert(world)
        self.over = True

    def begin(self, cfg: RolloutConfig, episode: int | None, prompts: Sequence[str]) -> bool:
        """Starts the episode; False if there is none left."""
        if episode is None:
            return False
        self.episode, self.seed, self.prompt = episode, cfg.seed + episode, prompts[episode]
        self.session = Session(self.seed)
        self.obs, self.info = self.world.reset(self.seed, split=cfg.split)
        self.forced = _forced(cfg, self.seed, self.info)
        self.limit = min(APPROACH_STEPS, self.world.max_steps) if cfg.is_forced else self.world.max_steps
        self.first: str | None = None
        self.needed = self.info["subtask"]
        self.over, self.steps = False, 0
        self.right: list[bool] = []
        self.trouble: list[bool] = []
        self.film: list[Shot] = []
        return True

    def raw(self, cfg: RolloutConfig) -> Observation:
        """What the policy gets to see."""
        images = self.obs["images"]
        if cfg.blank_images:
            images = {name: np.zeros_like(image) for name, image in images.items()}
        return {**self.obs, "images": images, "prompt": self.prompt}

    def execute(self, cfg: RolloutConfig, plan: dict[str, Any]) -> None:
        """Notes what was said and does the first actions of the chunk."""
        said, right = plan["subtask"], None
        self.trouble.append(plan["text_status"] != "ok")
        if self.forced is None and said:
            right = said == self.info["subtask"]
            self.right.append(right)
        for i, action in enumerate(plan["actions"][: cfg.execute]):
            if self.record:
                self.film.append(Shot(self.obs["images"], said, right))
            looked_at = self.record or i == cfg.execute - 1
            if cfg.expert_drives:
                action = self.expert.act()
            self.obs, _, success, _, self.info = self.world.step(action, render=looked_at)
            self.steps += 1
            if self.forced is not None:
                self.first = self.first or approached(self.world.facts())
            self.over = success or self.first is not None or self.steps >= self.limit
            if self.over:
                break
        if self.over and self.record:
            self.film += [Shot(self.obs["images"], said, right)] * 5  # how it ended stays for half a second

    def result(self) -> EpisodeResult:
        named = None if self.forced is None else parse_subtask(self.forced)[0]
        if named not in self.info["positions"]:
            named = None
        return EpisodeResult(
            seed=self.seed,
            prompt=self.prompt,
            success=self.info["success"],
            blocks_placed=self.info["blocks_placed"],
            subtask_accuracy=float(np.mean(self.right)) if self.right else None,
            text_trouble=float(np.mean(self.trouble)),
            steps=self.steps,
            approached_named=None if named is None else self.first == named,
            approached_true=None if named is None else self.first == parse_subtask(self.needed)[0],
        )


def _replan(policy: BatchPolicy, cfg: RolloutConfig, live: Sequence[_Slot], batch_size: int) -> None:
    """Asks the policy for all live episodes at once and executes what it answers."""
    forced = [slot.forced for slot in live] if cfg.is_forced else None
    sessions = [slot.session for slot in live]
    plans = policy.infer_batch(
        [slot.raw(cfg) for slot in live], subtasks=forced, sessions=sessions, batch_size=batch_size
    )
    for slot, plan in zip(live, plans, strict=True):
        if len(plan["actions"]) < cfg.execute:
            raise UserError(
                f"execute is {cfg.execute} but the policy plans {len(plan['actions'])} steps: execute that many at most"
            )
        slot.execute(cfg, plan)


def _check(cfg: RolloutConfig) -> None:
    wrong = [f"{name} is {v}" for name in ("episodes", "execute", "batch") if (v := getattr(cfg, name)) < 1]
    if wrong:
        raise UserError(f"must be at least 1: {', '.join(wrong)}")
    if cfg.seed < 0:
        raise UserError(f"seed must be 0 or more, found {cfg.seed}")
    if cfg.expert_drives and cfg.is_forced:
        raise UserError("the expert does not listen to a forced subtask: leave out one of them")
    if cfg.subtask is not None and cfg.wrong_subtask:
        raise UserError("a given subtask and a wrong one exclude each other: ask for one of them")
    if cfg.subtask is not None:
        try:
            parse_subtask(cfg.subtask)
        except ValueError:
            raise UserError(
                f"the tabletop has no subtask {cfg.subtask!r}: say e.g. 'pick up the red block', "
                "'place the red block in the left bin' or 'done'"
            ) from None


def _prompts(cfg: RolloutConfig) -> list[str]:
    """The prompt given in each episode."""
    seeds = range(cfg.seed, cfg.seed + cfg.episodes)
    own = [sample_task(np.random.default_rng(seed), split=cfg.split)[0].prompt for seed in seeds]
    if not cfg.shuffle_prompts:
        return own
    shuffled = []
    for i, prompt in enumerate(own):
        others = [p for p in own[i + 1 :] + own[:i] if p != prompt]
        if not others:
            raise UserError(f"shuffling prompts needs episodes with different tasks: ask for more than {cfg.episodes}")
        shuffled.append(others[0])
    return shuffled


def _forced(cfg: RolloutConfig, seed: int, info: Info) -> str | None:
    if not cfg.wrong_subtask:
        return cfg.subtask
    needed = parse_subtask(info["subtask"])[0]
    others = sorted(color for color in info["positions"] if color != needed)
    return pick_up(others[seed % len(others)])


class _Bar:
    """Progress over episodes with the running means; silent if not shown."""

    def __init__(self, total: int, *, shown: bool):
        columns = (TextColumn("episodes"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[means]}"))
        self._progress = Progress(*columns, TimeRemainingColumn(), disable=not shown)
        self._task = self._progress.add_task("episodes", total=total, means="")

    def __enter__(self) -> "_Bar":
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def update(self, done: dict[int, EpisodeResult]) -> None:
        result = RolloutResult(tuple(done.values()))
        shown = ("success", "blocks_placed", "subtask_accuracy", "approached_named")
        means = ", ".join(f"{name} {value:.2f}" for name in shown if (value := result.mean(name)) is not None)
        self._progress.update(self._task, completed=len(done), means=means)
