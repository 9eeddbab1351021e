"""Flow matching: the action tower over a chunk at time t, and its integration from noise to actions.

Time runs as in openpi (`pi0.py`): t = 1 is noise, t = 0 is data; x_t = t * noise + (1 - t) * actions, v = noise -
actions.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Float
import numpy as np

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


def flow_table(model: VLA, num_steps: int) -> Float[Array, "n m W"] | None:
    """Modulation of every norm of the action tower at each Euler step: all that depends on time alone, for `denoise`.

    A constant of the checkpoint. None for a form or a family that has no such table.
    """
    return model.action_tower.modulations(model.time_condition(jnp.asarray(flow_times(num_steps))))


def denoise(
    model: VLA,
    obs: Observation,
    cache: Cache,
    noise: Chunk,
    *,
    num_steps: int,
    table: Float[Array, "n m W"] | None = None,
    guide: Guide | None = None,
) -> Chunk:
    """Euler integration of the flow from noise to actions in a fixed number of equal steps.

    `table` (of `flow_table`, for as many steps) saves computing it here. `guide` may change every step's velocity.
    """
    batch, times = noise.shape[0], jnp.asarray(flow_times(num_steps))
    # Nothing of these depends on the step, so they are computed before the loop.
    read = model.action_tower.reader(cache, model.suffix_causal)
    table = flow_table(model, num_steps) if table is None else table

    def step(i: Array, x: Array) -> Array:
        def velocity_at(x: Array) -> Array:
            tokens, cond = model.embed_suffix(obs, x[:, None], jnp.full((batch, 1), times[i]))
            return model.project_velocity(read(tokens, cond, None if table is None else table[i]))[:, 0]

        v = velocity_at(x) if guide is None else guide(velocity_at, times[i], x)
        return x - v * np.float32(1 / num_steps)

    return jax.lax.fori_loop(0, num_steps, step, noise.astype(jnp.float32))


def flow_times(num_steps: int) -> Float[np.ndarray, " n"]:
    """Time at the start of each Euler step, from 1 down.

    Summed in float32 as openpi's loops do (0.8 is then 0.8000001, which the time embedding turns by 1e-4), but for a
    fixed number of steps: no loop depends on where such a sum ends.
    """
    dt, times = np.float32(-1.0 / num_steps), [np.float32(1.0)]
    for _ in range(num_steps - 1):
        times.append(times[-1] + dt)
    return np.array(times, np.float32)
