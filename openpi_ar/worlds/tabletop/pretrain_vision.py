"""Pre-training of the vision tower on object poses, which a simulator gives for free.

A vision tower from scratch finds *which* objects there are within minutes of imitation, but *where* they are to a
centimetre only after hours: the actions are a thin, noisy signal for it. Here the tower first learns to predict where
everything is, from frames of the same demonstrations; the readout is then thrown away and training proper starts from
the tower.
"""

from collections.abc import Callable, Iterator
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float
import numpy as np
import optax
from rich.progress import track

from openpi_ar.models.vit import VisionTransformer
from openpi_ar.models.vlm import VLA
from openpi_ar.types import Array
from openpi_ar.worlds.tabletop.poses import PosedFrames

POSITION_SCALE = 0.1
"""Metres that count as one in the loss: the spread of positions on the table."""
_WRIST_REACH = 0.1
"""Horizontal distance from the tool, in metres, within which the wrist camera sees an object."""


class PoseHead(nnx.Module):
    """For each camera and object, one query attends over the camera's tokens and reads presence and position."""

    def __init__(self, cameras: int, objects: int, width: int, *, rngs: nnx.Rngs):
        shape = (cameras, objects, width)
        self.query = nnx.Param(jax.random.normal(rngs.params(), shape) * width**-0.5)
        self.out = nnx.Param(jax.random.normal(rngs.params(), (*shape, 4)) * width**-0.5)

    def __call__(self, tokens: Float[Array, "B C T D"]) -> Float[Array, "B C O 4"]:
        weights = jax.nn.softmax(jnp.einsum("BCTD,COD->BCOT", tokens, self.query[...]), axis=-1)
        return jnp.einsum("BCOT,BCTD,CODX->BCOX", weights, tokens, self.out[...])


def pose_targets(
    blocks: Float[np.ndarray, "B O 3"], tool: Float[np.ndarray, "B 3"], cameras: tuple[str, ...]
) -> tuple[Float[np.ndarray, "B C P 3"], Bool[np.ndarray, "B C P"]]:
    """Positions of the objects (blocks, then the tool) as each camera can know them, and which are to be seen.

    A camera on the wrist knows positions relative to the tool, the others in the world; both in units of 10 cm.
    """
    objects = np.concatenate([blocks, tool[:, None]], axis=1)
    positions, seen = [], []
    for camera in cameras:
        on_wrist = "wrist" in camera
        at = objects - tool[:, None] if on_wrist else objects
        visible = np.asarray(np.isfinite(at).all(-1))
        if on_wrist:
            visible &= (np.abs(np.nan_to_num(at[..., :2], nan=9.0)) < _WRIST_REACH).all(-1)
            visible[:, -1] = False
        positions.append(np.nan_to_num(at) / POSITION_SCALE)
        seen.append(visible)
    return np.stack(positions, 1).astype(np.float32), np.stack(seen, 1)


def pose_loss(
    tower: tuple[VisionTransformer, PoseHead], images: Array, positions: Array, seen: Array
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Presence cross-entropy + L1 of the positions of what is seen; and that L1's mean in centimetres."""
    siglip, head = tower
    batch, cameras = images.shape[:2]
    flat = images.reshape(-1, *images.shape[2:]).astype(jnp.float32) / 127.5 - 1.0
    tokens = siglip(flat, jnp.dtype("float32"))
    out = head(tokens.reshape(batch, cameras, *tokens.shape[1:]))
    presence = optax.sigmoid_binary_cross_entropy(out[..., 0], seen).mean()
    error = jnp.sum(jnp.abs(out[..., 1:] - positions).mean(-1) * seen) / jnp.maximum(seen.sum(), 1)
    return presence + 5.0 * error, error * (100 * POSITION_SCALE)


def pretrain_vision(
    model: VLA,
    frames: PosedFrames,
    *,
    steps: int,
    batch_size: int = 64,
    peak_lr: float = 1e-3,
    seed: int = 0,
    quiet: bool = False,
) -> tuple[VLA, float]:
    """The model with its vision tower trained on poses, and the mean error over the last steps in centimetres.

    `quiet`: without a progress bar.
    """
    objects = frames.blocks.shape[1] + 1  # the blocks and the tool
    rngs = nnx.Rngs(seed)
    head = PoseHead(len(model.cfg.cameras), objects, model.cfg.vlm.width, rngs=rngs)
    trained: Any = nnx.clone(model)
    tower: Any = (jax.tree.map(jnp.copy, trained.img), head)  # a copy: the fit takes it over
    batches = _batches(model, frames, steps, batch_size, seed)
    tower, error = fit(tower, pose_loss, batches, steps, peak_lr, "vision tower: poses", quiet=quiet)
    trained.img = tower[0]
    return trained, error


def fit(
    parts: Any,
    loss: Callable[..., tuple[Array, Array]],
    batches: Iterator[tuple[Any, ...]],
    steps: int,
    peak_lr: float,
    label: str,
    *,
    quiet: bool = False,
) -> tuple[Any, float]:
    """The parts (a pytree that is used up) after `steps` of AdamW on `loss(parts, *batch) -> (loss, error in
    centimetres)`, and the mean error over the last 100 steps. `label` heads the progress bar; `quiet`: none.
    """
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak_lr, min(100, steps // 10), steps, 0.01 * peak_lr)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=1e-4))

    def step(parts: Any, opt_state: optax.OptState, batch: tuple[Any, ...]) -> tuple[Any, optax.OptState, Array]:
        (_, error), grads = jax.value_and_grad(loss, has_aux=True)(parts, *batch)
        updates, opt_state = tx.update(grads, opt_state, parts)
        return optax.apply_updates(parts, updates), opt_state, error

    run = jax.jit(step, donate_argnums=(0, 1))
    opt_state = tx.init(parts)
    errors: list[Array] = []
    for batch in track(batches, label, total=steps, disable=quiet):
        parts, opt_state, error = run(parts, opt_state, batch)
        errors.append(error)
    return parts, float(jnp.mean(jnp.stack(errors[-100:])))


def _batches(
    model: VLA, frames: PosedFrames, steps: int, batch_size: int, seed: int
) -> Iterator[tuple[np.ndarray, ...]]:
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        index = np.sort(rng.choice(len(frames), batch_size, replace=len(frames) < batch_size))
        images, blocks, tool = frames.poses(index, model.cfg.cameras)
        positions, seen = pose_targets(blocks, tool, model.cfg.cameras)
        yield images, positions, seen
