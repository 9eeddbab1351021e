"""A decoder: Gemma or Llama by its config. Tower 1 (the VLM) and tower 2 (the action expert) are the same code.

openpi runs both towers in one pass over concatenated queries, keys and values. No token of tower 1 ever attends to one
of tower 2, so that pass factors exactly into: tower 1 writes keys and values; tower 2 reads them.
"""

from flax import nnx
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from openpi_ar.model_config import TowerConfig
from openpi_ar.models.cache import Cache, StackedCache, action_mask, positions, prefix_lm_mask
from openpi_ar.models.layers import AdaRMSNorm, Einsum, GatedMLP, RMSNorm, attend, normal_init, rotary, rotate
from openpi_ar.models.stack import Stack, narrow
from openpi_ar.models.vlm import CacheReader, Run
from openpi_ar.types import Array

KV = tuple[Float[Array, "*L B _ K H"], Float[Array, "*L B _ K H"]]
Rope = tuple[Float[Array, "B T 1 h"], Float[Array, "B T 1 h"]]


def _norm(cfg: TowerConfig, adaptive: bool, rngs: nnx.Rngs) -> RMSNorm | AdaRMSNorm:
    if adaptive:
        return AdaRMSNorm(cfg.width, eps=cfg.norm_eps, rngs=rngs)
    return RMSNorm(cfg.width, eps=cfg.norm_eps, offset=cfg.norm_offset)


def residual(x: Float[Array, "B T D"], y: Float[Array, "B T D"], gate: Float[Array, "... D"] | None) -> Array:
    """The sum of the residual stream and a branch, gated if AdaRMS gives a gate."""
    return x + y if gate is None else x + gate * y


def take(x: Float[Array, "B T *d"] | Bool[Array, "B T *d"], rows: Int[Array, "B R"]) -> Array:
    """These tokens of each row."""
    return jnp.take_along_axis(x, rows.reshape(*rows.shape, *[1] * (x.ndim - 2)), axis=1)


class Block(nnx.Module):
    """Attention and gated MLP, both pre-norm."""

    def __init__(self, cfg: TowerConfig, *, adaptive: bool, rngs: nnx.Rngs, attention: str = "auto"):
        self.attention = attention
        d, n, k, h, r = cfg.width, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim, cfg.lora_rank
        self.attn_norm = _norm(cfg, adaptive, rngs)
        self.q = Einsum("BTD,NDH->BTNH", (n, d, h), fan_in=d, rngs=rngs, lora_rank=r)
        self.kv = Einsum("BSD,cKDH->cBSKH", (2, k, d, h), fan_in=d, rngs=rngs, lora_rank=r)
        self.out = Einsum("BTNH,NHD->BTD", (n, h, d), fan_in=n * h, rngs=rngs, lora_rank=r)
        self.mlp_norm = _norm(cfg, adaptive, rngs)
        self.mlp = GatedMLP(d, cfg.mlp_dim, activation=cfg.activation, rngs=rngs, lora_rank=r)

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
        y = attend(q * q.shape[-1] ** -0.5, runs, mask, self.attention)
        x = residual(x, narrow(self.out(y)), gate)
        y, gate = self.mlp_norm(x, cond)
        return residual(x, narrow(self.mlp(y)), gate), (k, v)


class Tower(nnx.Module):
    """`depth` blocks and a final norm, AdaRMS-conditioned if `adaptive`. Layers are stacked, or a list (`Stack`).

    `remat` and `attention` are those of the model's config.
    """

    def __init__(
        self,
        cfg: TowerConfig,
        *,
        adaptive: bool,
        rngs: nnx.Rngs,
        remat: str | None = None,
        attention: str = "auto",
    ):
        self.head_dim, self.rope_base, self.attention = cfg.head_dim, cfg.rope_base, attention

        def block(rngs: nnx.Rngs) -> Block:
            return Block(cfg, adaptive=adaptive, rngs=rngs, attention=attention)

        self.blocks = Stack(block, cfg.depth, rngs=rngs, remat=remat)
        self.norm = _norm(cfg, adaptive, rngs)

    def rotary(self, positions: Int[Array, "B T"]) -> Rope:
        """RoPE's sine and cosine at these positions."""
        return rotary(positions, self.head_dim, self.rope_base)

    def extend(
        self, run: Run, cache: Cache | None = None, *, rows: Int[Array, "B R"] | None = None
    ) -> tuple[Float[Array, "B _ D"], StackedCache]:
        """See `vlm.Tower`."""
        assert cache is None or isinstance(cache, StackedCache), "this cache is of another form of the tower"
        mask, past = prefix_lm_mask(run.valid, run.causal), None
        if cache is not None:
            batch, slots = cache.valid.shape
            seen = jnp.broadcast_to(cache.valid[:, None], (batch, mask.shape[1], slots))
            mask, past = jnp.concatenate([seen, mask], axis=-1), (cache.k, cache.v)
        x, (k, v) = self.forward(run.x, self.rotary(positions(run.valid, cache)), mask, past)
        x = x if rows is None else take(x, rows)
        if cache is None:
            return x, StackedCache.full(k, v, run.valid, run.hidden)
        return x, cache.append(k, v, run.valid, run.hidden)

    def reader(self, cache: Cache, causal: Bool[Array, " T"], draws: int = 1) -> CacheReader:
        """See `vlm.ActionTower`."""
        assert isinstance(cache, StackedCache), "this cache is of another form of the tower"
        rope = self.rotary(action_positions(cache, causal, draws))
        mask = action_mask(cache, causal, draws)

        def read(tokens: Array, cond: Array | None, table: Array | None = None) -> Array:
            x = tokens.reshape(tokens.shape[0], -1, tokens.shape[-1])
            return self.forward(x, rope, mask, (cache.k, cache.v), cond)[0].reshape(tokens.shape)

        return read

    def modulations(self, cond: Float[Array, "*b D"] | None) -> None:
        """None: this form computes them layer by layer."""

    def forward(
        self,
        x: Float[Array, "B T D"],
        rope: Rope,
        mask: Bool[Array, "B T S"],
        past: KV | None = None,
        cond: Float[Array, "B n D"] | None = None,
    ) -> tuple[Float[Array, "B T D"], KV]:
        """Hidden states after the final norm, and the tokens' keys and values [L B T K H].

        The keys and values `past` come first along S. `cond` conditions AdaRMS, one for each of n groups of tokens.
        """

        def step(block: Block, x: Array, cached: KV | None) -> tuple[Array, KV]:
            return block(x, *rope, mask, cached, cond)

        x, kv = self.blocks(step, x, past)
        return self.norm(x, cond)[0], kv


def action_positions(cache: Cache, causal: Bool[Array, " T"], draws: int) -> Int[Array, "B _"]:
    """RoPE positions of `draws` chunks of T action tokens side by side: all begin after what the cache shows."""
    return cache.action_pos[:, None] + jnp.tile(jnp.arange(causal.shape[0]), draws)


class Embedder(nnx.Module):
    """Token embedding and the vocabulary's head: the same table if it is tied, else a weight of its own.

    `scaled`: embeddings are multiplied by sqrt(width) at lookup (Gemma). Logits have no soft-capping. A vocabulary may
    have more rows than its tokenizer has pieces.
    """

    def __init__(self, vocab_size: int, width: int, *, rngs: nnx.Rngs, scaled: bool = True, tied: bool = True):
        self.scaled = scaled
        self.table = nnx.Param(normal_init(rngs.params(), (vocab_size, width)) * width**-0.5)
        self.head = None if tied else nnx.Param(normal_init(rngs.params(), (vocab_size, width)) * width**-0.5)

    def encode(self, ids: Int[Array, "*b"]) -> Float[Array, "*b D"]:
        """Embeddings in the dtype of the table."""
        x = self.table[...][ids]
        # The factor is rounded to the table's dtype first, as Gemma does: 45.25, not 45.2548, for bfloat16 at 2048.
        return x * jnp.sqrt(x.shape[-1]).astype(x.dtype) if self.scaled else x

    @property
    def weight(self) -> Float[Array, "V D"]:
        """The head's weight."""
        return (self.table if self.head is None else self.head)[...]

    def logits(self, x: Float[Array, "*b D"]) -> Float[Array, "*b V"]:
        """Float32 logits of hidden states."""
        return jnp.einsum("...D,VD->...V", x, self.weight.astype(x.dtype), preferred_element_type=jnp.float32)
