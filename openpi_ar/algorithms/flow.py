"""Flow matching: the action tower over a chunk at time t, and its integration from noise to actions.

Time runs as in openpi (`pi0.py`): t = 1 is noise, t = 0 is data; x_t = t * noise + (1 - t) * actions, v = noise -
actions.
"""

from collections.abc import Callable
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Float
import numpy as np

from openpi_ar.config import DecodeConfig, DenoiseMethod
from openpi_ar.errors import UserError
from openpi_ar.models.cache import Cache
from openpi_ar.models.vlm import VLA
from openpi_ar.types import Array, Observation

Chunk = Float[Array, "B A X"]
Guide = Callable[[Callable[[Chunk], Chunk], Float[Array, ""], Chunk], Chunk]
"""`guide(velocity, t, x) -> v` stands in for `v = velocity(x)` at time t in every step of `denoise`. It may call
`velocity`, or differentiate through it, as guidance by a gradient needs."""


def velocity(model: VLA, obs: Observation, cache: Cache, x_t: Chunk, t: Float[Array, " B"]) -> Chunk:
    """The flow's velocity v_t at the noisy chunk x_t and time t. The cache is only read."""
    return velocities(model, obs, cache, x_t[:, None], t[:, None])[:, 0]


def velocities(
    model: VLA, obs: Observation, cache: Cache, x_t: Float[Array, "B n A X"], t: Float[Array, "B n"]
) -> Float[Array, "B n A X"]:
    """`velocity` of n chunks per row that share the row's cache and do not see each other.

    They run side by side as one long suffix, so n draws are one set of matmuls and the cache is never copied.
    """
    read = model.action_tower.reader(cache, model.suffix_causal, x_t.shape[1])
    return model.project_velocity(read(*model.embed_suffix(obs, x_t, t)))


@dataclasses.dataclass(frozen=True)
class Steps:
    """How the flow is integrated from noise (t = 1) to actions (t = 0).

    num     steps.
    method  euler: the velocity at a step's start, as openpi does. heun: the mean of those at its start and at the end
            that it points to, which costs two passes through the action tower (K. Heun, 1900).
    shift   1: equal steps. Above 1 shorter ones near the noise, below 1 near the actions: t' = s t / (1 + (s - 1) t)
            (P. Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", ICML 2024).

    Raises UserError for a number of steps below 1 or a shift that is not above 0.
    """

    num: int = 10
    method: DenoiseMethod = "euler"
    shift: float = 1.0

    def __post_init__(self) -> None:
        if self.num < 1 or not 0 < self.shift < float("inf"):
            raise UserError(f"denoising takes 1 step or more and a shift above 0, found {self.num} and {self.shift}")

    @classmethod
    def of(cls, steps: "DecodeConfig | Steps | int") -> "Steps":
        """Those of a checkpoint; a number: that many equal ones of Euler's."""
        if isinstance(steps, DecodeConfig):
            return cls(steps.denoise_steps, steps.denoise_method, steps.denoise_shift)
        return steps if isinstance(steps, Steps) else cls(steps)

    @property
    def passes(self) -> int:
        """Passes through the action tower."""
        return self.num * (2 if self.method == "heun" else 1)

    def times(self) -> Float[np.ndarray, " _"]:
        """Where each step starts, from 1 down, and at last 0.

        Equal steps are summed in float32 as openpi's loops do (0.8 is then 0.8000001, which the time embedding turns by
        1e-4), but for a fixed number: no loop depends on where such a sum ends.
        """
        if self.shift != 1:
            t = np.linspace(1, 0, self.num + 1)
            return (self.shift * t / (1 + (self.shift - 1) * t)).astype(np.float32)
        dt, times = np.float32(-1.0 / self.num), [np.float32(1.0)]
        for _ in range(self.num - 1):
            times.append(times[-1] + dt)
        return np.array([*times, 0.0], np.float32)

    def sizes(self) -> Float[np.ndarray, " n"]:
        """Length of each step in time."""
        if self.shift == 1:
            return np.full(self.num, 1 / self.num, np.float32)
        return -np.diff(self.times())


def flow_table(model: VLA, num_steps: Steps | int) -> Float[Array, "n m W"] | None:
    """Modulation of every norm of the action tower at each of `Steps.times()`: all that depends on time alone, for
    `denoise`.

    A constant of the checkpoint. None for a form or a family that has no such table.
    """
    return model.action_tower.modulations(model.time_condition(jnp.asarray(Steps.of(num_steps).times())))


def denoise(
    model: VLA,
    obs: Observation,
    cache: Cache,
    noise: Chunk,
    *,
    num_steps: Steps | int,
    table: Float[Array, "n m W"] | None = None,
    guide: Guide | None = None,
) -> Chunk:
    """Integration of the flow from noise to actions in a fixed number of steps: equal ones of Euler's, or `Steps`.

    `table` (of `flow_table`, for the same steps) saves computing it here. `guide` may change every velocity.
    """
    steps = Steps.of(num_steps)
    batch, times, sizes = noise.shape[0], jnp.asarray(steps.times()), jnp.asarray(steps.sizes())
    # Nothing of these depends on the step, so they are computed before the loop.
    read = model.action_tower.reader(cache, model.suffix_causal)
    table = flow_table(model, steps) if table is None else table

    def velocity_at(i: Array, x: Array) -> Array:
        def velocity(x: Array) -> Array:
            tokens, cond = model.embed_suffix(obs, x[:, None], jnp.full((batch, 1), times[i]))
            return model.project_velocity(read(tokens, cond, None if table is None else table[i]))[:, 0]

        return velocity(x) if guide is None else guide(velocity, times[i], x)

    def step(i: Array, x: Array) -> Array:
        v = velocity_at(i, x)
        if steps.method == "heun":
            v = 0.5 * (v + velocity_at(i + 1, x - v * sizes[i]))
        return x - v * sizes[i]

    return jax.lax.fori_loop(0, steps.num, step, noise.astype(jnp.float32))
