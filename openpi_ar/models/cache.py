"""The key/value cache and every attention mask. `KVCache.append` is the only writer, but for the decode loop of an
inference form, which keeps new keys and values apart until it ends (`KVCache.mark`); attention only reads."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from openpi_ar.types import Array

Layers = Float[Array, "L B S K H"] | tuple[Float[Array, "B S K H"], ...]


@nnx.dataclass
class KVCache(nnx.Pytree):
    """Keys (after RoPE) and values that tower 1 wrote.

    Slot is not position: padding leaves holes that `valid` masks, and positions count valid tokens only, so rows of
    different lengths need no alignment.

    k, v    one entry per layer and slot: stacked as the layers of a scanned tower are, or a tuple over the layers of an
            unrolled one, each of which a decode loop can then update in place.
    valid   slot may be attended to.
    hidden  slot is invisible to the action tower.
    fill    next slot to write, the same for all rows.
    """

    k: Layers = nnx.data()
    v: Layers = nnx.data()
    valid: Bool[Array, "B S"] = nnx.data()
    hidden: Bool[Array, "B S"] = nnx.data()
    fill: Int[Array, ""] = nnx.data()

    @classmethod
    def empty(cls, k: Float[Array, "L B T K H"], slots: int) -> "KVCache":
        """An empty cache of `slots` slots with the layers, batch, heads and dtype of the keys `k`."""
        layers, batch, _, heads, dim = k.shape
        blank = jnp.zeros((layers, batch, slots, heads, dim), k.dtype)
        none = jnp.zeros((batch, slots), bool)
        return cls(k=blank, v=blank, valid=none, hidden=none, fill=jnp.zeros((), jnp.int32))

    @classmethod
    def full(cls, k: Layers, v: Layers, valid: Bool[Array, "B S"], hidden: Bool[Array, "B S"]) -> "KVCache":
        """A cache of just these tokens, with no room left."""
        return cls(k=k, v=v, valid=valid, hidden=hidden, fill=jnp.asarray(valid.shape[1], jnp.int32))

    @property
    def next_pos(self) -> Int[Array, " B"]:
        """RoPE position of the next token of tower 1, per row."""
        return self.valid.sum(-1, dtype=jnp.int32)

    @property
    def visible(self) -> Bool[Array, "B S"]:
        """Slots that the action tower may attend to."""
        return self.valid & ~self.hidden

    @property
    def action_pos(self) -> Int[Array, " B"]:
        """RoPE position of the first token of the action tower, per row: hidden tokens hold no position there."""
        return self.visible.sum(-1, dtype=jnp.int32)

    def grow(self, slots: int) -> "KVCache":
        """The same cache with room for `slots` more tokens."""
        ends = [(0, 0), (0, slots)]

        def widen(x: Array) -> Array:
            return jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [(0, slots), (0, 0), (0, 0)])

        return dataclasses.replace(
            self,
            k=jax.tree.map(widen, self.k),
            v=jax.tree.map(widen, self.v),
            valid=jnp.pad(self.valid, ends),
            hidden=jnp.pad(self.hidden, ends),
        )

    def forget(self, keep: Bool[Array, "B T"]) -> "KVCache":
        """The cache without those of the last T slots of a full cache that are not kept: they become holes."""
        start = self.valid.shape[1] - keep.shape[1]
        return dataclasses.replace(
            self, valid=jnp.concatenate([self.valid[:, :start], self.valid[:, start:] & keep], axis=1)
        )

    def append(self, k: Layers, v: Layers, valid: Bool[Array, "B T"], hidden: Bool[Array, "B T"]) -> "KVCache":
        """The cache with T more tokens in the slots from `fill` on. There must be room: see `grow`."""

        def write_layer(old: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(old, new, self.fill, axis=old.ndim - 3)

        marked = self.mark(valid, hidden)
        return dataclasses.replace(
            marked, k=jax.tree.map(write_layer, self.k, k), v=jax.tree.map(write_layer, self.v, v)
        )

    def mark(self, valid: Bool[Array, "B T"], hidden: Bool[Array, "B T"]) -> "KVCache":
        """The cache as if T more tokens stood in the slots from `fill` on."""

        def write(old: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(old, new, self.fill, axis=1)

        return dataclasses.replace(
            self, valid=write(self.valid, valid), hidden=write(self.hidden, hidden), fill=self.fill + valid.shape[1]
        )


def positions(valid: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """RoPE positions of a sequence that starts at 0: valid tokens before each token. Padding holds no position."""
    return jnp.cumsum(valid, axis=-1, dtype=jnp.int32) - 1


def prefix_lm_mask(valid: Bool[Array, "B T"], causal: Bool[Array, "B T"]) -> Bool[Array, "B T T"]:
    """Who attends to whom ([query, key]) in one sequence, from each token's `causal` bit (big_vision's `mask_ar`).

    A causal token opens a new block; a token sees its own block and all earlier ones.

        causal 0 0 0 | 1 1 1   bidirectional prefix, autoregressive text
        causal 1 | 1 0 0 0     pi0's suffix: a state token, then an action chunk that sees itself whole
    """
    block = jnp.cumsum(causal, axis=-1)
    return (block[:, None, :] <= block[:, :, None]) & valid[:, None, :] & valid[:, :, None]


def decode_mask(cache: KVCache) -> Bool[Array, "B 1 _"]:
    """One new text token attends to every valid slot of the cache and to itself."""
    batch = cache.valid.shape[0]
    return jnp.concatenate([cache.valid[:, None], jnp.ones((batch, 1, 1), bool)], axis=-1)


def action_mask(cache: KVCache, causal: Bool[Array, " T"], draws: int) -> Bool[Array, "B _ _"]:
    """The action tower's mask for `draws` chunks of T tokens side by side, [B draws*T S+draws*T].

    Every token attends to the visible cache, and to its own chunk as the `causal` bits say.
    """
    batch, slots = cache.valid.shape
    everything = jnp.ones((1, causal.shape[0]), bool)
    chunk = prefix_lm_mask(everything, causal[None])[0]
    own = jnp.kron(jnp.eye(draws, dtype=jnp.int8), chunk.astype(jnp.int8)).astype(bool)
    seen = jnp.broadcast_to(cache.visible[:, None], (batch, own.shape[0], slots))
    return jnp.concatenate([seen, jnp.broadcast_to(own, (batch, *own.shape))], axis=-1)
