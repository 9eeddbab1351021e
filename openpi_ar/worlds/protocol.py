"""What a rollout needs of a policy and of a simulated world, and what is asked of the world."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from tyro.conf import Suppress

from openpi_ar.policy.session import Session

Observation = Mapping[str, Any]
Info = Mapping[str, Any]


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


@runtime_checkable
class World(Protocol):
    """A simulated world with its episodes, which go by number from 0 on.

    Observations are {"images", "state", "prompt"}, as policies read them. Info holds at least `subtask`, the true one
    now, and `success`. Actions are the world's own.
    """

    fps: int
    """Control steps a second."""
    forced: str | None
    """The subtask that the policy is made to output in this episode; None: its own."""

    def label(self, episode: int) -> dict[str, Any]:
        """The entries that name an episode in the results."""
        ...

    def seed(self, episode: int) -> int:
        """The seed of the policy's session in an episode."""
        ...

    def prompt(self, episode: int) -> str:
        """The task of an episode, in words."""
        ...

    def begin(self, episode: int, *, render: bool = True) -> tuple[Observation, Info]:
        """Starts an episode. `render` False leaves `images` empty."""
        ...

    def step(self, action: np.ndarray, *, render: bool = True) -> tuple[Observation, float, bool, bool, Info]:
        """(observation, reward, terminated, truncated, info), as gymnasium has it."""
        ...

    def expert_action(self) -> np.ndarray:
        """The scripted expert's action now."""
        ...

    def figures(self) -> dict[str, float | bool | None]:
        """The world's own figures of the episode that ends now; None: not applicable."""
        ...


@dataclasses.dataclass(frozen=True)
class Play:
    """Which episodes of a world are asked for, and for which model. A world refuses what it does not have.

    The first four fields are how many, and of the model (None: the world's own) its cameras, the height and width of
    its images, and the dimensions of the robot's state and actions.
    """

    episodes: Suppress[int] = 1
    cameras: Suppress[tuple[str, ...] | None] = None
    image_size: Suppress[tuple[int, int] | None] = None
    dims: Suppress[tuple[int, int] | None] = None
    seed: int = 0
    """Of the first episode's task and layout and of the policy's session; `seed + 1` of the second, ..."""
    split: Literal["train", "held_out", "back"] = "train"
    """Tasks asked for: those of training, combinations never trained on, or tasks that cannot be done without a memory
    (`back`: the tabletop's; docs/data.md)."""
    subtask: str | None = None
    """The policy is made to output this, always."""
    wrong_subtask: bool = False
    """It is made to output a subtask that could be asked for but is not next."""

    @classmethod
    def of(cls, policy: Any, **asked: Any) -> "Play":
        """For the model of an `openpi_ar.policy.Policy`, or with None for the scripted expert."""
        if policy is None:
            return cls(**asked)
        dims = policy.transform.state_stats.dims, policy.transform.action_stats.dims
        model = {"cameras": policy.cameras, "image_size": policy.cfg.model.siglip.image_size, "dims": dims}
        return cls(**asked | model)
