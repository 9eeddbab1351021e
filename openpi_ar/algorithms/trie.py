"""The constraint that only texts of a list can be generated."""

from collections.abc import Sequence
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int
import numpy as np

from openpi_ar.types import Array

_ROOT, _LEFT = 0, -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trie:
    """Only these texts (`sampling.FewIds`). Its state is a node of the texts' tree of prefixes, int32 [B].

    The tree is kept as its edges, node by node and in the order of their tokens, which takes memory in proportion to
    the texts' tokens however wide the vocabulary is.

    first, count  of each node: its first edge, and how many it has; none: a text ends here.
    token, child  of each edge.
    most          edges that a node has at most.
    vocab_size    ids of the model.
    eos_id        allowed where the texts have been left: after their end, or by a draft that is none of them.
    """

    first: Int[Array, " N"]
    count: Int[Array, " N"]
    token: Int[Array, " E"]
    child: Int[Array, " E"]
    most: int = dataclasses.field(metadata={"static": True})
    vocab_size: int = dataclasses.field(metadata={"static": True})
    eos_id: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, texts: Sequence[Sequence[int]], vocab_size: int, eos_id: int) -> "Trie":
        """The tree of these texts, each with its EOS. Raises ValueError if there are none, or one lacks its end."""
        if not texts or any(not len(ids) or ids[-1] != eos_id for ids in texts):
            raise ValueError(f"a trie needs one or more texts that end with EOS ({eos_id}), found {list(texts)[:3]}")
        edges: dict[tuple[int, int], int] = {}
        for ids in texts:
            node = _ROOT
            for token in ids:
                node = edges.setdefault((node, int(token)), len(edges) + 1)
        parent, token, child = np.array([(*edge, edges[edge]) for edge in sorted(edges)], np.int32).T
        nodes = np.arange(len(edges) + 1)
        first, after = (np.searchsorted(parent, nodes, side).astype(np.int32) for side in ("left", "right"))
        most = int((after - first).max())
        return cls(first, after - first, token, child, most=most, vocab_size=vocab_size, eos_id=eos_id)

    def init(self, batch: int) -> Int[Array, " B"]:
        return jnp.full((batch,), _ROOT, jnp.int32)

    def mask(self, state: Int[Array, " B"]) -> Bool[Array, "B V"]:
        ids, allowed = self.candidates(state)
        # What is not allowed marks a column past the vocabulary, which is dropped.
        columns, rows = jnp.where(allowed, ids, self.vocab_size), jnp.arange(state.shape[0])[:, None]
        return jnp.zeros((state.shape[0], self.vocab_size), bool).at[rows, columns].set(True, mode="drop")

    def advance(self, state: Int[Array, " B"], token: Int[Array, " B"]) -> Int[Array, " B"]:
        ids, children, there = self._edges(state)
        return jnp.where(there & (ids == token[:, None]), children, _LEFT).max(-1)

    def candidates(self, state: Int[Array, " B"]) -> tuple[Int[Array, "B F"], Bool[Array, "B F"]]:
        ids, _, there = self._edges(state)
        ended = ~there.any(-1, keepdims=True)
        return jnp.where(ended, self.eos_id, ids), there | ended & (jnp.arange(self.most) == 0)

    def forced(self, state: Int[Array, " B"], width: int) -> tuple[Int[Array, "B w"], Bool[Array, "B w"]]:
        def step(node: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
            ids, children, there = self._edges(node)
            only = (there.sum(-1) == 1) & (ids[:, 0] != self.eos_id)
            return jnp.where(only, children[:, 0], _LEFT), (jnp.where(only, ids[:, 0], 0), only)

        _, (tokens, only) = jax.lax.scan(step, state, length=width)
        return tokens.T, only.T

    def _edges(self, state: Int[Array, " B"]) -> tuple[Int[Array, "B F"], Int[Array, "B F"], Bool[Array, "B F"]]:
        """(tokens, children, which of them there are) of the edges of each node."""
        node = jnp.maximum(state, _ROOT)
        count = jnp.where(state == _LEFT, 0, jnp.asarray(self.count)[node])[:, None]
        at = jnp.arange(self.most)
        edge = jnp.minimum(jnp.asarray(self.first)[node][:, None] + at, len(self.token) - 1)
        return jnp.asarray(self.token)[edge], jnp.asarray(self.child)[edge], at < count
