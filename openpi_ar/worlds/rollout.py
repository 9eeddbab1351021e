"""Closed-loop episodes in a simulated world: does the policy do the task, and does it name the right subtasks?

Several episodes run at once, each in its own world, so that the policy sees batches: all worlds re-plan together, then
each executes the first `execute` actions of its chunk. A world whose episode is over takes the next one. Every episode
has its own session of the policy, so results do not depend on how many run at once.
"""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from openpi_ar.errors import UserError
from openpi_ar.policy.session import Session
from openpi_ar.tables import new_table, progress_bar
from openpi_ar.worlds.calibration import Calibration
from openpi_ar.worlds.protocol import BatchPolicy, Observation, World
from openpi_ar.worlds.video import Shot, VideoWriter


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How episodes are run: 0, 1, ... of a world."""

    episodes: int = 20
    """How many."""
    execute: int = 2
    """Actions of each chunk that are executed before the policy is asked again."""
    batch: int = 8
    """Episodes run at once."""
    shuffle_prompts: bool = False
    """Ablation: each episode gets the prompt of another one, but is scored by its own task."""
    blank_images: bool = False
    """Ablation: the policy sees black images."""
    expert_drives: bool = False
    """The scripted expert acts; the policy only generates subtasks, and only those are judged."""


@dataclasses.dataclass(frozen=True)
class EpisodeResult:
    """One episode.

    label             the entries that name it.
    prompt            the task that the policy was given.
    success           the whole task was done within the step limit.
    subtask_accuracy  fraction of re-plans at which the generated subtask was the true one; None if it was forced or
                      the model generates none.
    text_trouble      fraction of re-plans whose text had no end or looped.
    steps             control steps.
    passes            through the model, by each text that was not the last one; of the whole batch.
    judged            (log-probability, right) of every text that was judged and has a probability.
    figures           the world's own.
    """

    label: Mapping[str, Any]
    prompt: str
    success: bool
    subtask_accuracy: float | None
    text_trouble: float
    steps: int
    figures: Mapping[str, float | bool | None]
    judged: Sequence[tuple[float, bool]] = ()
    passes: Sequence[int] = ()

    def numbers(self) -> dict[str, float | bool | None]:
        """Every figure by its name."""
        common = {name: getattr(self, name) for name in ("subtask_accuracy", "text_trouble", "steps")}
        sure = float(np.mean(np.exp([p for p, _ in self.judged]))) if self.judged else None
        passes = float(np.mean(self.passes)) if self.passes else None
        return {"success": self.success, **self.figures, **common, "confidence": sure, "passes_per_new_text": passes}

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {**self.label, "prompt": self.prompt, **self.numbers()}


@dataclasses.dataclass(frozen=True)
class RolloutResult:
    """All episodes in their order."""

    episodes: tuple[EpisodeResult, ...]

    @property
    def means(self) -> dict[str, float | None]:
        """Mean of every figure over the episodes that have it; None where none has."""
        columns = {name: [e.numbers()[name] for e in self.episodes] for name in self.episodes[0].numbers()}
        known = {name: [v for v in values if v is not None] for name, values in columns.items()}
        return {name: float(np.mean(values)) if values else None for name, values in known.items()}

    def as_dict(self) -> dict[str, Any]:
        """Means, calibration and episodes, for JSON."""
        calibration = self.calibration
        sure = {} if calibration is None else {"calibration": calibration.as_dict()}
        return {**self.means, **sure, "episodes": [e.as_dict() for e in self.episodes]}

    @property
    def calibration(self) -> Calibration | None:
        """Of the confidence in the text; None if no text was judged."""
        judged = [pair for e in self.episodes for pair in e.judged]
        return Calibration.of([np.exp(p) for p, _ in judged], [right for _, right in judged]) if judged else None

    def table(self) -> Table:
        """The means that there are, for people."""
        table = new_table("mean over episodes", "")
        calibration = self.calibration
        areas = {} if calibration is None else {"area under risk and coverage": calibration.area_risk_coverage}
        for name, value in (self.means | areas).items():
            if value is not None:
                table.add_row(name.replace("_", " "), f"{value:.3f}")
        return table

    def only(self, **label: Any) -> "RolloutResult":
        """The episodes with these entries in their labels."""
        return RolloutResult(tuple(e for e in self.episodes if label.items() <= dict(e.label).items()))


def run_rollouts(
    policy: BatchPolicy | None,
    cfg: RolloutConfig,
    make_world: Callable[[], World],
    *,
    video: str | Path | None = None,
    progress: bool = True,
) -> RolloutResult:
    """Runs the episodes.

    Args:
        policy: is asked with the world's observations; its actions must be in the world's units. None: the scripted
            expert acts and names the true subtask, which checks the world itself.
        cfg: how to run them.
        make_world: makes the worlds, `cfg.batch` at most.
        video: .mp4 or .gif to write, episodes in the order in which they end.
        progress: show a bar with the running means.

    Raises:
        UserError: options out of range or contradictory, plans that are too short, or a video that cannot be written.
    """
    if wrong := [f"{name} is {v}" for name in ("episodes", "execute", "batch") if (v := getattr(cfg, name)) < 1]:
        raise UserError(f"must be at least 1: {', '.join(wrong)}")
    todo = iter(range(cfg.episodes))
    worlds = [make_world() for _ in range(min(cfg.batch, cfg.episodes))]
    prompts = _prompts(cfg, worlds[0])
    slots = [_Slot(world, cfg, sees=policy is not None, film=video is not None) for world in worlds]
    done: dict[int, EpisodeResult] = {}
    with (
        progress_bar("episodes", cfg.episodes, shown=progress) as update,
        contextlib.nullcontext() if video is None else VideoWriter(video, fps=worlds[0].fps) as film,
    ):
        live = [slot for slot in slots if slot.begin(next(todo, None), prompts)]
        while live:
            for slot, plan in zip(live, _plans(policy, cfg, live, len(slots)), strict=True):
                slot.execute(plan)
            for slot in [s for s in live if s.over]:
                done[slot.episode] = slot.result()
                if film is not None:
                    film.add_episode(slot.prompt, slot.shots)
                update(len(done), _running_means(done))
                slot.begin(next(todo, None), prompts)
            live = [slot for slot in live if not slot.over]
    return RolloutResult(tuple(done[i] for i in range(cfg.episodes)))


class _Slot:
    """A world and the episode that runs in it. `sees`: observations need images; `film`: every step is kept."""

    def __init__(self, world: World, cfg: RolloutConfig, *, sees: bool, film: bool):
        self.world, self.cfg = world, cfg
        self._sees, self._films = sees or film, film
        self.over = True

    def begin(self, episode: int | None, prompts: Sequence[str]) -> bool:
        """Starts the episode; False if there is none left."""
        if episode is None:
            return False
        self.episode, self.prompt, self.session = episode, prompts[episode], Session(self.world.seed(episode))
        self.obs, self.info = self.world.begin(episode, render=self._sees)
        self.over, self._steps = False, 0
        self._right: list[bool] = []
        self._judged: list[tuple[float, bool]] = []
        self._passes: list[int] = []
        self._text: str | None = None
        self._trouble: list[bool] = []
        self.shots: list[Shot] = []
        return True

    def raw(self) -> Observation:
        """What the policy sees."""
        images = self.obs["images"]
        if self.cfg.blank_images:
            images = {name: np.zeros_like(image) for name, image in images.items()}
        return {**self.obs, "images": images, "prompt": self.prompt}

    def execute(self, plan: Mapping[str, Any]) -> None:
        """Judges the text and executes the first actions of the chunk."""
        text, right = plan["subtask"], None
        self._trouble.append(plan["text_status"] != "ok")
        if text and text != self._text and plan.get("passes") is not None:
            self._passes.append(plan["passes"])
        self._text = text
        if self.world.forced is None and text:
            right = text == self.info["subtask"]
            self._right.append(right)
            if plan.get("logprob") is not None:
                self._judged.append((plan["logprob"], right))
        for i in range(self.cfg.execute):
            if self._films:
                self.shots.append(Shot(self.obs["images"], text, right))
            action = plan["actions"][i] if plan["actions"] is not None else self.world.expert_action()
            # Drawing takes most of a step's time: only what will be looked at is drawn.
            looked_at = self._films or (self._sees and i == self.cfg.execute - 1)
            self.obs, _, terminated, truncated, self.info = self.world.step(action, render=looked_at)
            self._steps += 1
            self.over = terminated or truncated
            if self.over:
                break
        if self.over and self._films:
            self.shots += [Shot(self.obs["images"], text, right)] * (self.world.fps // 2)  # the end, for half a second

    def result(self) -> EpisodeResult:
        return EpisodeResult(
            label=self.world.label(self.episode),
            prompt=self.prompt,
            success=bool(self.info["success"]),
            subtask_accuracy=float(np.mean(self._right)) if self._right else None,
            text_trouble=float(np.mean(self._trouble)),
            steps=self._steps,
            figures=self.world.figures(),
            judged=tuple(self._judged),
            passes=tuple(self._passes),
        )


def _plans(
    policy: BatchPolicy | None, cfg: RolloutConfig, live: Sequence[_Slot], batch_size: int
) -> list[dict[str, Any]]:
    """A plan for each live episode; `actions` None: the expert's."""
    if policy is None:
        return [{"subtask": slot.info["subtask"], "text_status": "ok", "actions": None} for slot in live]
    forced = [slot.world.forced for slot in live]
    if cfg.expert_drives and any(text is not None for text in forced):
        raise UserError("the expert does not listen to a forced subtask: leave out one of them")
    plans = policy.infer_batch(
        [slot.raw() for slot in live],
        subtasks=None if None in forced else forced,
        sessions=[slot.session for slot in live],
        batch_size=batch_size,
    )
    shortest = min(len(plan["actions"]) for plan in plans)
    if shortest < cfg.execute:
        raise UserError(f"execute is {cfg.execute} but the policy plans {shortest} steps: execute that many at most")
    return [{**plan, "actions": None} for plan in plans] if cfg.expert_drives else plans


def _prompts(cfg: RolloutConfig, world: World) -> list[str]:
    """The prompt given in each episode."""
    own = [world.prompt(i) for i in range(cfg.episodes)]
    if not cfg.shuffle_prompts:
        return own
    shuffled = []
    for i, prompt in enumerate(own):
        others = [p for p in own[i + 1 :] + own[:i] if p != prompt]
        if not others:
            raise UserError(f"shuffling prompts needs episodes with different tasks: ask for more than {cfg.episodes}")
        shuffled.append(others[0])
    return shuffled


def _running_means(done: Mapping[int, EpisodeResult]) -> str:
    means = RolloutResult(tuple(done.values())).means
    shown = {name: v for name, v in means.items() if v is not None and name not in ("text_trouble", "steps")}
    return ", ".join(f"{name} {v:.2f}" for name, v in shown.items())
