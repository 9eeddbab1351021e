"""Questions about moments of the tabletop that no training saw: how many does a checkpoint answer?

The scripted expert plays the episodes of a rollout. Every few steps one question of each kind is asked, drawn from
those that are certain then, so that all kinds weigh the same whatever their number of wordings.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any, Protocol, runtime_checkable

import numpy as np
from rich.table import Table

from openpi_ar.errors import UserError
from openpi_ar.tables import new_table, progress_bar
from openpi_ar.worlds.tabletop.episodes import TabletopEpisodes
from openpi_ar.worlds.tabletop.questions import KINDS, all_questions


@runtime_checkable
class Answers(Protocol):
    """What is asked; see `openpi_ar.policy.talker.Talker.answer`."""

    def answer(self, images: Any, question: str) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class AskConfig:
    """What is asked, and when."""

    episodes: int = 50
    """How many."""
    every: int = 6
    """Control steps from one round of questions to the next."""
    blank_images: bool = False
    """Ablation: the model sees black images."""

    def __post_init__(self) -> None:
        for name in ("episodes", "every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be 1 or more, found {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class Kind:
    """Questions of one kind.

    asked     how many.
    right     fraction answered word for word.
    majority  what always giving the commonest answer to each wording would reach, known from these very questions.
    """

    asked: int
    right: float
    majority: float

    @classmethod
    def of(cls, rows: Sequence[tuple[str, str, str]]) -> "Kind":
        """From (question, true answer, given answer)."""
        truths: dict[str, Counter[str]] = {}
        for question, truth, _ in rows:
            truths.setdefault(question, Counter())[truth] += 1
        commonest = sum(counts.most_common(1)[0][1] for counts in truths.values())
        return cls(len(rows), float(np.mean([given == truth for _, truth, given in rows])), commonest / len(rows))


@dataclasses.dataclass(frozen=True)
class Asked:
    """The result: all questions together, and by kind."""

    overall: Kind
    kinds: Mapping[str, Kind]

    def table(self) -> Table:
        """A row for each kind, for the terminal."""
        out = new_table("questions", "asked", "right", "commonest answer", title="answers on unseen layouts")
        for name, kind in [*self.kinds.items(), ("all", self.overall)]:
            out.add_row(name, str(kind.asked), f"{kind.right:.1%}", f"{kind.majority:.1%}")
        return out

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return dataclasses.asdict(self)


def ask(model: Answers, cfg: AskConfig, make_world: Callable[[], TabletopEpisodes]) -> Asked:
    """Plays the episodes and asks, with a progress bar.

    Raises UserError as the world or `Talker.answer` does.
    """
    world = make_world()
    found: dict[str, list[tuple[str, str, str]]] = {name: [] for name in KINDS}
    with progress_bar("episodes", cfg.episodes) as update:
        for episode in range(cfg.episodes):
            obs, info = world.begin(episode)
            rng, ended = np.random.default_rng(world.seed(episode)), False
            while not ended:
                if info["steps"] % cfg.every == 0:
                    images = obs["images"]
                    if cfg.blank_images:
                        images = {name: np.zeros_like(image) for name, image in images.items()}
                    for name, questions in all_questions(world.world.facts()).items():
                        if questions:
                            question, truth = questions[rng.integers(len(questions))]
                            found[name].append((question, truth, model.answer(images, question)["answer"]))
                # Only what is looked at is rendered.
                seen = (info["steps"] + 1) % cfg.every == 0
                obs, _, terminated, truncated, info = world.step(world.expert_action(), render=seen)
                ended = terminated or truncated
            update(episode + 1, f"{sum(map(len, found.values()))} questions")
    rows = [row for kind in found.values() for row in kind]
    return Asked(Kind.of(rows), {name: Kind.of(kind) for name, kind in found.items() if kind})
