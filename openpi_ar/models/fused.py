"""The inference form of a decoder: made once at load, same numbers, fewer and larger matmuls.

Layers are a list and the program is unrolled, so no slice of a stack is copied per step; queries, keys and values come
from one matmul, gate and up from another; low-rank adapters are added into their weights. Its cache
(`cache.LayeredCache`) is one entry per layer; a decode loop writes to short arrays of its own, so that no step copies
the rest. Nothing here is trained.
"""

from collections.abc import Sequence
import functools

from einops import rearrange
from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from openpi_ar.compilation import attention_on
from openpi_ar.models.cache import KV, Cache, LayeredCache, action_mask, positions, prefix_lm_mask
from openpi_ar.models.decoder import Block, Rope, Tower, action_positions, residual, take
from openpi_ar.models.layers import (
    ACTIVATIONS,
    MASKED,
    AdaRMSNorm,
    Einsum,
    RMSNorm,
    attend,
    matmul,
    merge_lora,
    rotary,
    rotate,
)
from openpi_ar.models.stack import Stack
from openpi_ar.models.vlm import CacheReader, Run
from openpi_ar.types import Array, check_mask


def attend_apart(q: Float[Array, "B T N H"], runs: Sequence[KV], mask: Bool[Array, "B T S"]) -> Float[Array, "B T N H"]:
    """`layers.attend` with one softmax over runs that are never joined, divided after the product with the values."""
    check_mask(mask, "mask")
    q = rearrange(q, "B T (K G) H -> B K T G H", K=runs[0][0].shape[1])
    logits, start = [], 0
    for k, v in runs:
        seen = mask[:, None, :, None, start : start + v.shape[1]]
        here = jnp.einsum("BKTGH,BKHS->BKTGS", q, k, preferred_element_type=jnp.float32)
        logits.append(jnp.where(seen, here, MASKED))
        start += v.shape[1]
    top = functools.reduce(jnp.maximum, [x.max(-1, keepdims=True) for x in logits])
    weights = [jnp.exp(x - top) for x in logits]
    total = functools.reduce(jnp.add, [w.sum(-1, keepdims=True) for w in weights])
    parts = [
        jnp.einsum("BKTGS,BSKH->BKTGH", w.astype(q.dtype), v, preferred_element_type=jnp.float32)
        for w, (_, v) in zip(weights, runs, strict=True)
    ]
    return rearrange((functools.reduce(jnp.add, parts) / total).astype(q.dtype), "B K T G H -> B T (K G) H")


def _merged(layer: Einsum) -> Array:
    """The weight with its adapters. Those of the output projection sum over heads by themselves (`lora_specs`)."""
    summed = "N" in layer.spec.split("->")[0].split(",")[0]  # heads come in and do not go out
    return merge_lora(layer.w, layer.lora_a, layer.lora_b, summed=summed)


def _norm(layer: RMSNorm | AdaRMSNorm, x: Array, modulation: Array | None) -> tuple[Array, Array | None]:
    if isinstance(layer, RMSNorm):
        return layer(x)
    assert modulation is not None, "this tower is conditioned: it needs a modulation"
    return layer.modulated(x, modulation)


class FusedBlock(nnx.Module):
    """One `decoder.Block`, weights fused and cast to `dtype`; laid out for one token at a time if it `decodes`."""

    def __init__(self, block: Block, dtype: jnp.dtype, *, decodes: bool):
        self.attention = block.attention
        q, kv = _merged(block.q), _merged(block.kv)
        heads, width, dim = q.shape
        self.heads, self.kv_heads, self.dim = heads, kv.shape[1], dim
        flat = [jnp.moveaxis(w, 0, 1).reshape(width, -1) for w in (q, kv[0], kv[1])]
        mlp = block.mlp
        gate_up = merge_lora(mlp.gate_up, mlp.gate_up_lora_a, mlp.gate_up_lora_b)
        down = merge_lora(mlp.down, mlp.down_lora_a, mlp.down_lora_b)
        self.activation = mlp.activation
        self.qkv = nnx.Param(jnp.concatenate(flat, axis=1).astype(dtype))
        self.out = nnx.Param(_merged(block.out).reshape(heads * dim, width).astype(dtype))
        self.gate_up = nnx.Param(jnp.concatenate(list(gate_up), axis=1).astype(dtype))
        # Transposed: XLA's CPU matrix-vector product reads a weight 1.4 times as fast along its longer axis. A product
        # of ten rows takes 1.3 times as long that way.
        self.decodes = decodes
        self.down = nnx.Param((down.T if decodes else down).astype(dtype))
        self.attn_norm, self.mlp_norm = block.attn_norm, block.mlp_norm

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rope: Rope,
        mask: Bool[Array, "B T S"],
        past: Sequence[KV],
        modulations: tuple[Array | None, Array | None],
        rows: Int[Array, "B R"] | None = None,
        at: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B _ D"], KV]:
        """As `Block`; with `rows` only these tokens are computed on, though all of them write keys and values.

        With `at`, keys and values are written to the last run of `past`, from that slot on, and this run is returned.
        """
        y, gate = _norm(self.attn_norm, x, modulations[0])
        weights, n, h = self.qkv[...].astype(y.dtype), self.heads * self.dim, self.dim
        if rows is None:
            qkv = matmul(y, weights)
            q, kv, own = qkv[..., :n], qkv[..., n:], rope
        else:
            kv, own = matmul(y, weights[:, n:]), (take(rope[0], rows), take(rope[1], rows))
            q = matmul(take(y, rows), weights[:, :n])
            x, mask = take(x, rows), take(mask, rows)
        q = rotate(q.reshape(*q.shape[:-1], self.heads, h), *own)
        k, v = jnp.split(kv.reshape(*kv.shape[:-1], 2 * self.kv_heads, h), 2, axis=-2)
        k = rotate(k, *rope)
        new = (jnp.moveaxis(k, 1, -1), v)
        runs = [*past, new]
        if at is not None:
            write = jax.lax.dynamic_update_slice_in_dim
            new = write(past[-1][0], new[0], at, 3), write(past[-1][1], v, at, 1)
            runs = [*past[:-1], new]
        q = q * h**-0.5
        # A kernel of the library is for many queries over their own keys: decoding and the last layer's few are not.
        if past or rows is not None or attention_on(self.attention, q.dtype) == "plain":
            y = attend_apart(q, runs, mask)
        else:
            y = attend(q, [(k, v)], mask, self.attention)
        y = matmul(y.reshape(*y.shape[:-2], n), self.out[...].astype(y.dtype))
        x = residual(x, y, gate)
        y, gate = _norm(self.mlp_norm, x, modulations[1])
        a, b = jnp.split(matmul(y, self.gate_up[...].astype(y.dtype)), 2, axis=-1)
        down = self.down[...].astype(y.dtype)
        y = ACTIVATIONS[self.activation](a) * b
        y = jnp.einsum("BTF,DF->BTD", y, down) if self.decodes else matmul(y, down)
        return residual(x, y, gate), new


class FusedTower(nnx.Module):
    """`decoder.Tower` for inference; `decodes` if it mostly runs on one token at a time."""

    def __init__(self, tower: Tower, dtype: jnp.dtype, *, decodes: bool = False):
        self.head_dim, self.rope_base = tower.head_dim, tower.rope_base
        layers = tower.blocks.unstacked().layers
        assert isinstance(layers, nnx.List)
        self.blocks = nnx.List([FusedBlock(block, dtype, decodes=decodes) for block in layers])
        self.norm = tower.norm

    def extend(
        self, run: Run, cache: Cache | None = None, *, rows: Int[Array, "B R"] | None = None
    ) -> tuple[Float[Array, "B _ D"], LayeredCache]:
        """See `vlm.Tower`. With `rows`, the last layer computes no other tokens."""
        own, rope = prefix_lm_mask(run.valid, run.causal), self._rotary(positions(run.valid, cache))
        if cache is None:
            x, new = self._forward(run.x, rope, own, [[]] * len(self.blocks), None, rows)
            return x, LayeredCache.full(new, run.valid, run.hidden)
        assert isinstance(cache, LayeredCache) and cache.tail, "this cache is of another form of the tower, or full"
        batch, slots = cache.valid.shape
        seen = jnp.broadcast_to(cache.valid[:, None], (batch, own.shape[1], slots))
        mask = jax.lax.dynamic_update_slice_in_dim(seen, own, cache.fill, axis=2)
        x, tail = self._forward(run.x, rope, mask, cache.runs, None, rows, cache.at)
        return x, cache.append(tail, run.valid, run.hidden)

    def reader(self, cache: Cache, causal: Bool[Array, " T"], draws: int = 1) -> CacheReader:
        """See `vlm.ActionTower`."""
        assert isinstance(cache, LayeredCache), "this cache is of another form of the tower"
        rope = self._rotary(action_positions(cache, causal, draws))
        mask, past = action_mask(cache, causal, draws), cache.runs

        def read(tokens: Array, cond: Array | None, table: Array | None = None) -> Array:
            if table is None and cond is not None:
                table = self.modulations(cond.astype(tokens.dtype))
                table = None if table is None else jnp.repeat(table, tokens.shape[2], axis=1)
            x = tokens.reshape(tokens.shape[0], -1, tokens.shape[-1])
            return self._forward(x, rope, mask, past, table)[0].reshape(tokens.shape)

        return read

    def modulations(self, cond: Float[Array, "*b D"] | None) -> Float[Array, "*b m W"] | None:
        """Modulation of every norm: two per layer, then the final one (m = 2 L + 1, W = 3 D)."""
        if cond is None:
            return None
        norms = [n for block in self.blocks for n in (block.attn_norm, block.mlp_norm)] + [self.norm]
        return jnp.stack([n.modulation(cond) for n in norms if isinstance(n, AdaRMSNorm)], axis=-2)

    def _rotary(self, positions: Int[Array, "B T"]) -> Rope:
        return rotary(positions, self.head_dim, self.rope_base)

    def _forward(
        self,
        x: Float[Array, "B T D"],
        rope: Rope,
        mask: Bool[Array, "B T S"],
        past: Sequence[Sequence[KV]],
        table: Float[Array, "... m W"] | None,
        rows: Int[Array, "B R"] | None = None,
        at: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B _ D"], list[KV]]:
        """Hidden states after the final norm, and keys and values by layer.

        `past` has the runs of every layer that come before the tokens, in the order of the mask; `table` the
        modulations, [m W] for all tokens alike or [B T m W]. With `at`, the tokens are written to the last run from
        that slot on, S counts no others, and what comes back is this run.
        """
        kv, last = [], len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            pair = (None, None) if table is None else (table[..., 2 * i, :], table[..., 2 * i + 1, :])
            x, new = block(x, rope, mask, past[i], pair, rows if i == last else None, at)
            kv.append(new)
        return _norm(self.norm, x, None if table is None else table[..., -1, :])[0], kv


def cast_matrices(tree: Stack, dtype: jnp.dtype) -> Stack:
    """Arrays of two axes or more in `dtype`; norms and one-axis biases stay as they are."""
    return jax.tree.map(lambda a: a.astype(dtype) if a.ndim > 1 else a, tree)
