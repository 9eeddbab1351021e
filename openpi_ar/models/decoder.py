"""One Gemma tower. Tower 1 (the VLM) and tower 2 (the action expert) are the same code with different configs.

openpi runs both towers in one pass over concatenated queries, keys and values. No token of tower 1 ever attends to one of
tower 2, so that pass factors exactly into: tower 1 writes keys and values; tower 2 reads them.
"""

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from openpi_ar.config import TowerConfig
from openpi_ar.models.cache import KVCache
from openpi_ar.models.layers import AdaRMSNorm, Einsum, GatedMLP, RMSNorm, attend, rotary, rotate
from openpi_ar.models.stack import Stack, narrow
from openpi_ar.types import Array

KV = tuple[Float[Array, "*L B _ K H"], Float[Array, "*L B _ K H"]]


def _norm(cfg: TowerConfig, adaptive: bool, rngs: nnx.Rngs) -> RMSNorm | AdaRMSNorm:
    return AdaRMSNorm(cfg.width, rngs=rngs) if adaptive else RMSNorm(cfg.width)


def _residual(x: Float[Array, "B T D"], y: Float[Array, "B T D"], gate: Float[Array, "B T D"] | None) -> Array:
    return x + y if gate is None else x + gate * y


class Block(nnx.Module):
    """Attention and gated MLP, both pre-norm."""

    def __init__(self, cfg: TowerConfig, *, adaptive: bool, rngs: nnx.Rngs):
        d, n, k, h, r = cfg.width, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim, cfg.lora_rank
        self.attn_norm = _norm(cfg, adaptive, rngs)
        self.q = Einsum("BTD,NDH->BTNH", (n, d, h), fan_in=d, rngs=rngs, lora_rank=r)
        self.kv = Einsum("BSD,cKDH->cBSKH", (2, k, d, h), fan_in=d, rngs=rngs, lora_rank=r)
        self.out = Einsum("BTNH,NHD->BTD", (n, h, d), fan_in=n * h, rngs=rngs, lora_rank=r)
        self.mlp_norm = _norm(cfg, adaptive, rngs)
        self.mlp = GatedMLP(d, cfg.mlp_dim, rngs=rngs, lora_rank=r)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        sin: Float[Array, "B T 1 h"],
        cos: Float[Array, "B T 1 h"],
        mask: Bool[Array, "B T S"],
        cached: KV | None,
        cond: Float[Array, "B n D"] | None,
    ) -> tuple[Float[Array, "B T D"], KV]:
        """The block's output and the keys (after RoPE) and values of its T tokens. S covers cache, then own tokens."""
        y, gate = self.attn_norm(x, cond)
        q = rotate(narrow(self.q(y)), sin, cos)
        k, v = narrow(self.kv(y))
        k = rotate(k, sin, cos)
        runs = [(k, v)] if cached is None else [cached, (k, v)]
        y = attend(q * q.shape[-1] ** -0.5, runs, mask)
        x = _residual(x, narrow(self.out(y)), gate)
        y, gate = self.mlp_norm(x, cond)
        return _residual(x, narrow(self.mlp(y)), gate), (k, v)


class Tower(nnx.Module):
    """`depth` blocks and a final norm, AdaRMS-conditioned if `adaptive`."""

    def __init__(self, cfg: TowerConfig, *, adaptive: bool, rngs: nnx.Rngs, policy: str = "full"):
        self.head_dim = cfg.head_dim
        self.blocks = Stack(lambda r: Block(cfg, adaptive=adaptive, rngs=r), cfg.depth, rngs=rngs, policy=policy)
        self.norm = _norm(cfg, adaptive, rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        mask: Bool[Array, "B T S"],
        cache: KVCache | None = None,
        cond: Float[Array, "B n D"] | None = None,
        *,
        remat: bool = False,
        rows: Int[Array, "B R"] | None = None,
    ) -> tuple[Float[Array, "B _ D"], KV]:
        """Hidden states after the final norm (of all tokens, or of those in `rows`), and the keys and values [L B T K H].

        `cache` is only read; its slots come first along S. `cond` conditions AdaRMS, one for each of n equal groups of
        tokens.
        """
        sin, cos = rotary(positions, self.head_dim)

        def step(block: Block, x: Array, cached: KV | None) -> tuple[Array, KV]:
            return block(x, sin, cos, mask, cached, cond)

        x, kv = self.blocks(step, x, None if cache is None else (cache.k, cache.v), remat=remat)
        x = self.norm(x, cond)[0]
        return x if rows is None else jnp.take_along_axis(x, rows[..., None], axis=1), kv


class Embedder(nnx.Module):
    """Token embedding, scaled by sqrt(width) at lookup; the same table reads out the logits (no soft-capping)."""

    def __init__(self, vocab_size: int, width: int, *, rngs: nnx.Rngs):
        self.table = nnx.Param(jax.random.normal(rngs.params(), (vocab_size, width)) * width**-0.5)

    def encode(self, ids: Int[Array, "*b"]) -> Float[Array, "*b D"]:
        """Embeddings in the dtype of the table."""
        x = self.table[...][ids]
        # The factor is rounded to the table's dtype first, as Gemma does: 45.25, not 45.2548, for bfloat16 at 2048.
        return x * jnp.sqrt(x.shape[-1]).astype(x.dtype)

    def logits(self, x: Float[Array, "*b D"]) -> Float[Array, "*b V"]:
        """Float32 logits of hidden states."""
        table = self.table[...].astype(x.dtype)
        return jnp.einsum("...D,VD->...V", x, table, preferred_element_type=jnp.float32)
