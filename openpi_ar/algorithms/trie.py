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
    """Only these texts (`sampling.Constraint`). Its state is a node of the texts' tree of prefixes, int32 [B].

    The tree is kept as its edges, which takes memory in proportion to the texts' tokens however wide the vocabulary is.

    parent, token, child  of each edge.
    vocab_size            ids of the model.
    eos_id                allowed where the texts have been left: after their end, or by a draft that is none of them.
    """

    parent: Int[Array, " E"]
    token: Int[Array, " E"]
    child: Int[Array, " E"]
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
        rows = np.array([(*edge, child) for edge, child in edges.items()], np.int32)
        return cls(*rows.T, vocab_size=vocab_size, eos_id=eos_id)

    def init(self, batch: int) -> Int[Array, " B"]:
        return jnp.full((batch,), _ROOT, jnp.int32)

    def mask(self, state: Int[Array, " B"]) -> Bool[Array, "B V"]:
        here = self.parent == state[:, None]
        # An edge that starts elsewhere marks a column past the vocabulary, which is dropped.
        columns = jnp.where(here, self.token, self.vocab_size)
        rows = jnp.arange(state.shape[0])[:, None]
        allowed = jnp.zeros((state.shape[0], self.vocab_size), bool).at[rows, columns].set(True, mode="drop")
        return allowed.at[:, self.eos_id].max(~here.any(-1))

    def advance(self, state: Int[Array, " B"], token: Int[Array, " B"]) -> Int[Array, " B"]:
        taken = (self.parent == state[:, None]) & (self.token == token[:, None])
        return jnp.where(taken, self.child, _LEFT).max(-1)
