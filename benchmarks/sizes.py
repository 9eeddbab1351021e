"""What is measured: model sizes and their inputs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from openpi_ar.model_config import GEMMA_2B, GEMMA_300M, ModelConfig, TowerConfig, VitConfig
from openpi_ar.models import family
from openpi_ar.models.vlm import VLA
from openpi_ar.types import Batch, Kind, Observation, Tokens


@dataclasses.dataclass(frozen=True)
class Size:
    """A model, and how much it reads and generates: prompt tokens, decoded tokens, denoising steps, rows of a training
    batch.

    last_logits  the baseline's first logits are those of the last token alone (the subtask fork), not of all the prefix
                 (openpi's pi0-FAST): with a real vocabulary these would be most of its time.
    """

    model: ModelConfig
    prompt: int
    tokens: int
    steps: int = 10
    train_batch: int = 4
    last_logits: bool = False


def _tower(width: int, depth: int, mlp: int, head_dim: int) -> TowerConfig:
    return TowerConfig(width=width, depth=depth, mlp_dim=mlp, num_heads=8, num_kv_heads=1, head_dim=head_dim)


_MID = ModelConfig(
    siglip=VitConfig(width=192, depth=4, mlp_dim=768, num_heads=4, image_size=(112, 112)),
    vlm=_tower(512, 6, 2048, 64),
    expert=_tower(256, 6, 1024, 64),
    vocab_size=8192,
    dtype="float32",
)

SIZES = {
    "tiny": Size(
        ModelConfig(
            siglip=VitConfig(width=32, depth=2, mlp_dim=64, num_heads=2, image_size=(28, 28)),
            vlm=_tower(64, 2, 128, 16),
            expert=_tower(32, 2, 64, 16),
            vocab_size=512,
            dtype="float32",
        ),
        prompt=16,
        tokens=6,
        steps=4,
        train_batch=2,
    ),
    "mid": Size(_MID, prompt=48, tokens=20),
    # The vocabulary of real checkpoints: its head is five times as large as the towers that write text.
    "mid-vocab": Size(dataclasses.replace(_MID, vocab_size=257_152), prompt=48, tokens=20, last_logits=True),
    "full": Size(ModelConfig(vlm=GEMMA_2B, expert=GEMMA_300M, action_horizon=50), prompt=200, tokens=25, train_batch=1),
}


def make_model(cfg: ModelConfig, dtype: str) -> VLA:
    """A model whose every parameter is random (norms and gates too: nothing is hidden by a zero), in this dtype."""

    abstract = family.abstract(dataclasses.replace(cfg, dtype=dtype))
    rng = np.random.default_rng(0)
    # One block of noise, repeated: random numbers for billions of values take minutes, and so does compiling the init.
    block = rng.standard_normal(1_000_003, np.float32)

    def fill(a: jax.ShapeDtypeStruct) -> jax.Array:
        scale = 0.02 if len(a.shape) < 2 else a.shape[-2] ** -0.5
        return jnp.asarray(np.resize(np.roll(block, rng.integers(1_000_003)), a.shape) * scale, dtype)

    return jax.tree.map(fill, abstract)


def text_run(ids: np.ndarray, *, target: bool) -> Tokens:
    """Tokens that are all valid; as a target also causal and supervised."""
    return Tokens.of(ids, kind=Kind.SUBTASK if target else Kind.PROMPT, causal=target, loss=target)


def make_observation(
    size: Size, *, batch: int = 1, cameras: int | None = None, prompt: int | None = None
) -> Observation:
    """Random images and a full prompt, on the device."""
    rng = np.random.default_rng(0)
    cfg = size.model
    count = len(cfg.cameras) if cameras is None else cameras
    obs = Observation(
        images=rng.integers(0, 256, (batch, count, *cfg.siglip.image_size, 3), np.uint8),
        image_mask=np.ones((batch, count), bool),
        prompt=text_run(rng.integers(2, cfg.vocab_size, (batch, prompt or size.prompt)), target=False),
        state=rng.normal(size=(batch, cfg.state_dim)).astype(np.float32),
    )
    return jax.tree.map(jnp.asarray, obs)


def make_batch(size: Size) -> Batch:
    """A training batch whose targets are as long as what is decoded."""
    rng = np.random.default_rng(1)
    cfg, rows = size.model, size.train_batch
    shape = (rows, cfg.action_horizon, cfg.action_dim)
    batch = Batch(
        observation=make_observation(size, batch=rows),
        target=text_run(rng.integers(2, cfg.vocab_size, (rows, size.tokens)), target=True),
        actions=rng.normal(size=shape).astype(np.float32),
        action_mask=np.ones(shape, bool),
    )
    return jax.tree.map(jnp.asarray, batch)
