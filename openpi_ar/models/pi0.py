"""pi0 and pi0.5: SigLIP, two Gemma towers and the projections between them.

This module embeds and projects; `openpi_ar.algorithms` composes the calls into training, decoding and denoising.
"""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from openpi_ar.images import resize_with_pad_on_device
from openpi_ar.model_config import ModelConfig
from openpi_ar.models.decoder import Embedder, Tower
from openpi_ar.models.fused import FusedTower, cast_matrices
from openpi_ar.models.layers import Linear, sincos_embedding
from openpi_ar.models.vit import VisionTransformer
from openpi_ar.models.vlm import Run, embed_tokens
from openpi_ar.types import Array, Observation


class Pi0(nnx.Module):
    """A `vlm.VLA`. pi0.5: flow time conditions the action tower through AdaRMS; state is text in the prompt.
    pi0: one state token leads the actions, and time is mixed into them by an MLP.
    """

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        width = cfg.expert.width
        remat, vlm = cfg.recomputed, cfg.vlm
        self.img = VisionTransformer(cfg.siglip, vlm.width, rngs=rngs, remat=remat)
        self.embedder = Embedder(cfg.vocab_size, vlm.width, rngs=rngs, scaled=vlm.scaled_embeddings, tied=vlm.tied_head)
        self.vlm: Tower | FusedTower = Tower(vlm, adaptive=False, rngs=rngs, remat=remat)
        self.expert: Tower | FusedTower = Tower(cfg.expert, adaptive=cfg.adaptive_time, rngs=rngs, remat=remat)
        self.action_in = Linear(cfg.action_dim, width, rngs=rngs)
        self.action_out = Linear(width, cfg.action_dim, rngs=rngs)
        if cfg.adaptive_time:
            self.time_mlp_in = Linear(width, width, rngs=rngs)
            self.time_mlp_out = Linear(width, width, rngs=rngs)
        else:
            self.state_in = Linear(cfg.state_dim, width, rngs=rngs)
            self.action_time_mlp_in = Linear(2 * width, width, rngs=rngs)
            self.action_time_mlp_out = Linear(width, width, rngs=rngs)

    @property
    def dtype(self) -> jnp.dtype:
        """Compute dtype of the towers."""
        return jnp.dtype(self.cfg.dtype)

    @property
    def tower(self) -> Tower | FusedTower:
        """Tower 1."""
        return self.vlm

    @property
    def action_tower(self) -> Tower | FusedTower:
        """Tower 2."""
        return self.expert

    def head_weight(self) -> Float[Array, "V D"]:
        """Weight of the vocabulary's head."""
        return self.embedder.weight

    def unstacked(self) -> "Pi0":
        """The same model with its layers as lists: unrolled programs (see `models.stack`)."""
        new = nnx.clone(self)
        assert isinstance(self.vlm, Tower) and isinstance(self.expert, Tower), "this is an inference form already"
        assert isinstance(new.vlm, Tower) and isinstance(new.expert, Tower)
        new.img.blocks = self.img.blocks.unstacked()
        new.vlm.blocks = self.vlm.blocks.unstacked()
        new.expert.blocks = self.expert.blocks.unstacked()
        return new

    def for_inference(self, dtype: str | None = None) -> "Pi0":
        """The inference form (see `models.fused`), computing in `dtype` (None: as configured) with weights kept in it.

        What is computed in float32 in any case (norms, patches, action and time projections) stays float32.
        """
        dtype = dtype or self.cfg.dtype
        new = nnx.clone(self)
        assert isinstance(self.vlm, Tower) and isinstance(self.expert, Tower), "this is an inference form already"
        new.cfg = dataclasses.replace(self.cfg, dtype=dtype, remat=False)
        new.img.blocks = cast_matrices(self.img.blocks.unstacked(), jnp.dtype(dtype))
        new.embedder.table = nnx.Param(self.embedder.table[...].astype(dtype))
        if self.embedder.head is not None:
            new.embedder.head = nnx.Param(self.embedder.head[...].astype(dtype))
        new.vlm = FusedTower(self.vlm, jnp.dtype(dtype), decodes=True)
        new.expert = FusedTower(self.expert, jnp.dtype(dtype))
        return new

    def embed_images(self, obs: Observation) -> Float[Array, "B T D"]:
        """Tokens of all cameras in one batched call of the vision tower; T = cameras * patches, camera-major.

        uint8 images of another size than the model's are resized first, as on the host.
        """
        batch, cameras = obs.images.shape[:2]
        images = jnp.asarray(obs.images).reshape(-1, *obs.images.shape[2:])
        if images.dtype == jnp.uint8:
            images = resize_with_pad_on_device(images, *self.cfg.siglip.image_size).astype(jnp.float32) / 127.5 - 1.0
        tokens = self.img(images.astype(jnp.float32), self.dtype)
        return tokens.reshape(batch, cameras * tokens.shape[1], tokens.shape[2])

    def embed_text(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Token embeddings in the compute dtype."""
        return self.embedder.encode(ids).astype(self.dtype)

    def embed(self, obs: Observation, image_tokens: Float[Array, "B _ D"] | None = None) -> Run:
        """Images first, then the prompt. Images are bidirectional; a masked camera holds no position."""
        images = self.embed_images(obs) if image_tokens is None else image_tokens
        seen = jnp.repeat(jnp.asarray(obs.image_mask), images.shape[1] // obs.image_mask.shape[1], axis=1)
        no = jnp.zeros_like(seen)
        return Run(x=images, valid=seen, causal=no, hidden=no).then(embed_tokens(self, obs.prompt))

    def logits(self, hidden: Float[Array, "*b D"]) -> Float[Array, "*b V"]:
        """Float32 next-token logits of tower-1 hidden states."""
        return self.embedder.logits(hidden)

    @property
    def suffix_causal(self) -> Bool[Array, " T"]:
        """`causal` bits of the action tower's tokens: a state token (pi0) is its own block, then one block of
        actions."""
        opens = [True] * (1 + self.cfg.suffix_tokens - self.cfg.action_horizon)
        return jnp.array(opens + [False] * (self.cfg.action_horizon - 1))

    def time_condition(self, t: Float[Array, "*b"]) -> Float[Array, "*b E"] | None:
        """AdaRMS condition of flow times, in the compute dtype (None for pi0); the MLP is float32, as openpi's."""
        if not self.cfg.adaptive_time:
            return None
        emb = sincos_embedding(t, self.cfg.expert.width, exact=self.cfg.exact_time)
        return jax.nn.swish(self.time_mlp_out(jax.nn.swish(self.time_mlp_in(emb)))).astype(self.dtype)

    def embed_suffix(
        self, obs: Observation, x_t: Float[Array, "B n A X"], t: Float[Array, "B n"]
    ) -> tuple[Float[Array, "B n T E"], Float[Array, "B n E"] | None]:
        """Action-tower tokens and AdaRMS condition (None for pi0) of n noisy chunks per row.

        The projections are float32, as openpi's.
        """
        actions = self.action_in(x_t.astype(jnp.float32))
        if self.cfg.adaptive_time:
            return actions.astype(self.dtype), self.time_condition(t)
        emb = sincos_embedding(t, self.cfg.expert.width, exact=self.cfg.exact_time)
        state = self.state_in(jnp.asarray(obs.state, jnp.float32))[:, None, None]
        state = jnp.broadcast_to(state, (*actions.shape[:2], 1, state.shape[-1]))
        emb = jnp.broadcast_to(emb[:, :, None], actions.shape)
        mixed = jax.nn.swish(self.action_time_mlp_in(jnp.concatenate([actions, emb], axis=-1)))
        tokens = jnp.concatenate([state, self.action_time_mlp_out(mixed)], axis=2)
        return tokens.astype(self.dtype), None

    def project_velocity(self, hidden: Float[Array, "B n T E"]) -> Float[Array, "B n A X"]:
        """Float32 velocity of the action tokens (the last `action_horizon` ones)."""
        return self.action_out(hidden[:, :, -self.cfg.action_horizon :].astype(jnp.float32))
