"""Caches of keys and values, and every attention mask. Attention reads a cache; only a tower's `extend` writes one."""

import abc
from collections.abc import Sequence
import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from openpi_ar.types import Array


@nnx.dataclass
class Cache(nnx.Pytree):
    """Which slots of a cache hold what. How keys (after RoPE) and values are kept is up to the form of the tower.

    Slot is not position: padding leaves holes that `valid` masks, and positions count valid tokens only, so rows of
    different lengths need no alignment.

    valid   slot may be attended to.
    hidden  slot is invisible to the action tower.
    fill    next slot to write, the same for all rows.
    """

    valid: Bool[Array, "B S"] = nnx.data()
    hidden: Bool[Array, "B S"] = nnx.data()
    fill: Int[Array, ""] = nnx.data()

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

    @property
    @abc.abstractmethod
    def keys_values(self) -> tuple[Float[Array, "L B S K H"], Float[Array, "L B S K H"]]:
        """Keys and values of all layers, whatever the form; for inspection."""

    @abc.abstractmethod
    def reserve(self, slots: int) -> "Cache":
        """The same cache with room for `slots` more tokens. Reserved slots that were never written stay holes."""

    @abc.abstractmethod
    def repeat(self, times: int) -> "Cache":
        """A cache of `times` as many rows: each row that often, one after another."""

    def compact(self) -> "Cache":
        """The same cache in the form that is read fastest, once nothing more will be written for a while."""
        return self

    def invalidate(self, keep: Bool[Array, "B T"]) -> "Cache":
        """A full cache with those of its last T slots that are not kept turned into holes."""
        start = self.valid.shape[1] - keep.shape[1]
        valid = jnp.concatenate([self.valid[:, :start], self.valid[:, start:] & keep], axis=1)
        return dataclasses.replace(self, valid=valid)

    def retract(self, written: int, kept: Int[Array, " B"]) -> "Cache":
        """The cache with the first `kept` of each row's last `written` tokens; slots that no row keeps are free."""
        start, slots = self.fill - written, jnp.arange(self.valid.shape[1])
        return dataclasses.replace(
            self, valid=self.valid & (slots < start + kept[:, None]), fill=start + kept.max().astype(self.fill.dtype)
        )

    def _repeated(self, times: int) -> dict[str, Array]:
        """The bits after `repeat`."""
        return {name: jnp.repeat(getattr(self, name), times, axis=0) for name in ("valid", "hidden")}

    def _reserved(self, slots: int) -> dict[str, Array]:
        """The bits after `reserve`."""
        ends = [(0, 0), (0, slots)]
        fill = jnp.asarray(self.valid.shape[1], jnp.int32)
        return {"valid": jnp.pad(self.valid, ends), "hidden": jnp.pad(self.hidden, ends), "fill": fill}

    def _marked(self, valid: Bool[Array, "B T"], hidden: Bool[Array, "B T"]) -> dict[str, Array]:
        """The bits with T more tokens, in the slots from `fill` on."""

        def write(old: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(old, new, self.fill, axis=1)

        fill = self.fill + valid.shape[1]
        return {"valid": write(self.valid, valid), "hidden": write(self.hidden, hidden), "fill": fill}


@nnx.dataclass
class StackedCache(Cache):
    """Layers on a leading axis, as a scanned tower reads and writes them."""

    k: Float[Array, "L B S K H"] = nnx.data()
    v: Float[Array, "L B S K H"] = nnx.data()

    @classmethod
    def full(cls, k: Array, v: Array, valid: Bool[Array, "B S"], hidden: Bool[Array, "B S"]) -> "StackedCache":
        """A cache of just these tokens, with no room left."""
        return cls(valid=valid, hidden=hidden, fill=jnp.asarray(valid.shape[1], jnp.int32), k=k, v=v)

    @property
    def keys_values(self) -> tuple[Array, Array]:
        return self.k, self.v

    def reserve(self, slots: int) -> "StackedCache":
        ends = [(0, 0), (0, 0), (0, slots), (0, 0), (0, 0)]
        return dataclasses.replace(self, **self._reserved(slots), k=jnp.pad(self.k, ends), v=jnp.pad(self.v, ends))

    def repeat(self, times: int) -> "StackedCache":
        k, v = (jnp.repeat(x, times, axis=1) for x in (self.k, self.v))
        return dataclasses.replace(self, **self._repeated(times), k=k, v=v)

    def append(
        self,
        k: Float[Array, "L B T K H"],
        v: Float[Array, "L B T K H"],
        valid: Bool[Array, "B T"],
        hidden: Bool[Array, "B T"],
    ) -> "StackedCache":
        """The cache with T more tokens. There must be room: see `reserve`."""
        k, v = (jax.lax.dynamic_update_slice_in_dim(a, b, self.fill, axis=2) for a, b in ((self.k, k), (self.v, v)))
        return dataclasses.replace(self, **self._marked(valid, hidden), k=k, v=v)


KV = tuple[Float[Array, "B K H _"], Float[Array, "B _ K H"]]
"""Keys of one layer, slots last (as a product with queries reads them, so that no step transposes them), and values."""


@nnx.dataclass
class LayeredCache(Cache):
    """One entry per layer of an unrolled tower: `past`, which a decode loop only reads, and a `tail` that it writes.

    A loop carries what it writes from step to step; what it only reads it does not, so no step copies the prefix.
    """

    past: tuple[KV, ...] = nnx.data()
    tail: tuple[KV, ...] = nnx.data()

    @classmethod
    def full(cls, past: Sequence[KV], valid: Bool[Array, "B S"], hidden: Bool[Array, "B S"]) -> "LayeredCache":
        """A cache of just these tokens, with no room left."""
        fill = jnp.asarray(valid.shape[1], jnp.int32)
        return cls(valid=valid, hidden=hidden, fill=fill, past=tuple(past), tail=())

    @property
    def keys_values(self) -> tuple[Array, Array]:
        past = self.compact().past
        return jnp.stack([jnp.moveaxis(k, -1, 1) for k, _ in past]), jnp.stack([v for _, v in past])

    @property
    def runs(self) -> list[list[KV]]:
        """What attention reads, by layer: arrays that are never joined."""
        return [[*pair] for pair in zip(self.past, self.tail, strict=True)] if self.tail else [[p] for p in self.past]

    def reserve(self, slots: int) -> "LayeredCache":
        if self.tail:
            return self.compact().reserve(slots)

        def blank(x: Array, axis: int) -> Array:
            return jnp.zeros((*x.shape[:axis], slots, *x.shape[axis + 1 :]), x.dtype)

        tail = tuple((blank(k, 3), blank(v, 1)) for k, v in self.past)
        return dataclasses.replace(self, **self._reserved(slots), tail=tail)

    def repeat(self, times: int) -> "LayeredCache":
        past, tail = jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), (self.past, self.tail))
        return dataclasses.replace(self, **self._repeated(times), past=past, tail=tail)

    def compact(self) -> "LayeredCache":
        if not self.tail:
            return self
        join = jnp.concatenate
        past = tuple(
            (join([a, c], axis=3), join([b, d], axis=1)) for (a, b), (c, d) in zip(self.past, self.tail, strict=True)
        )
        return dataclasses.replace(self, past=past, tail=())

    @property
    def at(self) -> Int[Array, ""]:
        """Slot of the tail that is written next."""
        return self.fill - self.past[0][1].shape[1]

    def append(self, tail: Sequence[KV], valid: Bool[Array, "B T"], hidden: Bool[Array, "B T"]) -> "LayeredCache":
        """The cache with T more tokens, whose keys and values have been written to `tail`."""
        return dataclasses.replace(self, **self._marked(valid, hidden), tail=tuple(tail))


def positions(valid: Bool[Array, "B T"], cache: Cache | None = None) -> Int[Array, "B T"]:
    """RoPE positions: valid tokens before each token, those of the cache included. Padding holds no position."""
    own = jnp.cumsum(valid, axis=-1, dtype=jnp.int32) - 1
    return own if cache is None else own + cache.next_pos[:, None]


def prefix_lm_mask(valid: Bool[Array, "B T"], causal: Bool[Array, "B T"]) -> Bool[Array, "B T T"]:
    """Who attends to whom ([query, key]) in one sequence, from each token's `causal` bit (big_vision's `mask_ar`).

    A causal token opens a new block; a token sees its own block and all earlier ones.

        causal 0 0 0 | 1 1 1   bidirectional prefix, autoregressive text
        causal 1 | 1 0 0 0     pi0's suffix: a state token, then an action chunk that sees itself whole
    """
    block = jnp.cumsum(causal, axis=-1)
    return (block[:, None, :] <= block[:, :, None]) & valid[:, None, :] & valid[:, :, None]


def action_mask(cache: Cache, causal: Bool[Array, " T"], draws: int) -> Bool[Array, "B _ _"]:
    """The action tower's mask for `draws` chunks of T tokens side by side, [B draws*T S+draws*T].

    Every token attends to the visible cache, and to its own chunk as the `causal` bits say.
    """
    batch, slots = cache.valid.shape
    everything = jnp.ones((1, causal.shape[0]), bool)
    chunk = prefix_lm_mask(everything, causal[None])[0]
    own = jnp.kron(jnp.eye(draws, dtype=jnp.int8), chunk.astype(jnp.int8)).astype(bool)
    seen = jnp.broadcast_to(cache.visible[:, None], (batch, own.shape[0], slots))
    return jnp.concatenate([seen, jnp.broadcast_to(own, (batch, *own.shape))], axis=-1)
