"""Pre-training of tower 1 on what a text names: given "pick up the red block", it predicts where that block is.

Imitation alone binds words to places slowly: of the blocks on the table the actions go to one or another, from frame to
frame, and the loss barely shows it. Here the named block's place is read from the values that the text's last token
writes to the cache, which is where the action tower will look. The readout is then thrown away, as that of
`pretrain_vision.py` is.
"""

from collections.abc import Iterator
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float
import numpy as np

from openpi_ar.algorithms.prefill import prefill
from openpi_ar.data.inputs import InputTransform, collate, stack_rows
from openpi_ar.models.cache import action_mask
from openpi_ar.models.vlm import VLA
from openpi_ar.types import Array, Observation, Tokens
from openpi_ar.worlds.tabletop.poses import PosedFrames
from openpi_ar.worlds.tabletop.pretrain_vision import POSITION_SCALE, fit
from openpi_ar.worlds.tabletop.scene import COLORS
from openpi_ar.worlds.tabletop.tasks import pick_up


class PlaceReadout(nnx.Module):
    """From a token's values in each of the upper layers, a position."""

    def __init__(self, layers: int, width: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (layers, width, 3)) * width**-0.5)

    def __call__(self, values: Float[Array, "L B K W"]) -> Float[Array, "L B K 3"]:
        return jnp.einsum("LBKW,LWX->LBKX", values, self.kernel[...])


def naming_loss(
    parts: tuple[Any, Any, Any, PlaceReadout],
    model: Any,
    texts: Tokens,
    obs: Observation,
    places: Float[Array, "B K 3"],
    present: Bool[Array, "B K"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """L1 between the places (units of `POSITION_SCALE`) of the present ones of K objects and what the upper layers'
    values at the end of each one's text predict; its mean in centimetres.

    `parts` stand in for the model's vision tower, embedder and tower 1. `texts` are K rows, the same for all
    observations: they run side by side after one prefix and do not see each other, as noisy chunks do
        (`flow.velocities`).
    """
    model = nnx.clone(model)
    model.img, model.embedder, model.vlm, readout = parts
    _, cache = prefill(model, obs)
    batch, (count, length) = places.shape[0], texts.ids.shape
    x = model.embed_text(jnp.asarray(texts.ids)).reshape(1, count * length, -1)
    pos = cache.next_pos[:, None] + jnp.tile(jnp.arange(length), count)
    mask = action_mask(cache, jnp.ones(length, bool), count)
    x = jnp.broadcast_to(x, (batch, *x.shape[1:]))
    _, (_, v) = model.vlm.forward(x, model.vlm.rotary(pos), mask, cache.keys_values)
    ends = jnp.arange(count) * length + (texts.valid & ~texts.hidden).sum(-1) - 1
    values = v[v.shape[0] // 2 :, :, ends]  # before, word and image have not met
    found = readout(values.reshape(*values.shape[:3], -1).astype(jnp.float32))
    error = jnp.where(present, jnp.abs(found - places).mean(-1), 0.0).mean(0).sum() / present.sum()
    return error, error * (100 * POSITION_SCALE)


def naming_texts(transform: InputTransform) -> Tokens:
    """A text that names each block, cut to the longest one."""
    targets = [transform.target({"subtask": pick_up(color)}) for color in COLORS]
    longest = max(int(t["valid"].sum()) for t in targets)
    return Tokens(**{name: x[:, :longest] for name, x in stack_rows(targets).items()})


def pretrain_naming(
    model: VLA,
    frames: PosedFrames,
    transform: InputTransform,
    *,
    steps: int,
    batch_size: int = 32,
    peak_lr: float = 1e-3,
    seed: int = 0,
    quiet: bool = False,
) -> tuple[VLA, float]:
    """The model with its vision tower, embedder and tower 1 trained to find what a text names, and the mean error over
    the last steps in centimetres. `quiet`: without a progress bar.
    """
    cfg = model.cfg.vlm
    readout = PlaceReadout(cfg.depth - cfg.depth // 2, cfg.num_kv_heads * cfg.head_dim, rngs=nnx.Rngs(seed))
    trained: Any = nnx.clone(model)
    parts: Any = (*jax.tree.map(jnp.copy, (trained.img, trained.embedder, trained.vlm)), readout)
    texts = naming_texts(transform)

    def loss(parts: Any, *batch: Any) -> tuple[Array, Array]:
        return naming_loss(parts, model, texts, *batch)

    batches = _batches(frames, transform, steps, batch_size, seed)
    parts, error = fit(parts, loss, batches, steps, peak_lr, "tower 1: what a text names", quiet=quiet)
    trained.img, trained.embedder, trained.vlm, _ = parts
    return trained, error


def _batches(
    frames: PosedFrames, transform: InputTransform, steps: int, batch_size: int, seed: int
) -> Iterator[tuple[Observation, np.ndarray, np.ndarray]]:
    rng = np.random.default_rng([seed, 1])
    for _ in range(steps):
        index = np.sort(rng.choice(len(frames), batch_size, replace=len(frames) < batch_size))
        blocks = frames.blocks[index]
        obs = collate([transform.observation(frames.source[int(i)]) for i in index])
        assert isinstance(obs, Observation)
        yield obs, np.nan_to_num(blocks / POSITION_SCALE), np.asarray(np.isfinite(blocks).all(-1))
