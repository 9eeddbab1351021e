"""pi0 and pi0.5: PaliGemma, an action tower, and the projections between them.

This module embeds and projects; `openpi_ar.algorithms` composes the calls into training, decoding and denoising.
"""

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from openpi_ar.model_config import ModelConfig
from openpi_ar.models.decoder import Tower
from openpi_ar.models.fused import FusedTower
from openpi_ar.models.layers import Linear, sincos_embedding
from openpi_ar.models.paligemma import PaliGemma
from openpi_ar.types import Array, Observation


class Pi0(PaliGemma):
    """A `vlm.VLA`. pi0.5: flow time conditions the action tower through AdaRMS; state is text in the prompt.
    pi0: one state token leads the actions, and time is mixed into them by an MLP."""

    cfg: ModelConfig

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        super().__init__(cfg, rngs=rngs)
        width = cfg.expert.width
        how = {"remat": cfg.recomputed, "attention": cfg.attention}
        self.expert: Tower | FusedTower = Tower(cfg.expert, adaptive=cfg.adaptive_time, rngs=rngs, **how)
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
    def action_tower(self) -> Tower | FusedTower:
        """Tower 2."""
        return self.expert

    def unstacked(self) -> "Pi0":
        """The same model with its layers as lists: unrolled programs (see `models.stack`)."""
        new = super().unstacked()
        assert isinstance(new, Pi0) and isinstance(self.expert, Tower) and isinstance(new.expert, Tower)
        new.expert.blocks = self.expert.blocks.unstacked()
        return new

    def for_inference(self, dtype: str | None = None) -> "Pi0":
        """The inference form, as PaliGemma's; action and time projections stay float32 too."""
        new = super().for_inference(dtype)
        assert isinstance(new, Pi0) and isinstance(self.expert, Tower)
        new.expert = FusedTower(self.expert, new.dtype)
        return new

    @property
    def suffix_causal(self) -> Bool[Array, " T"]:
        """`causal` bits of the action tower's tokens: pi0's state token is a block of its own, the actions are one."""
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
