"""Texts that are likely to be generated, from which decoding proposes how to go on.

A robot has few subtasks. After "pick up the red" one text is known to go on " block": several proposed tokens are
checked in one pass through the model, as a draft is, and decoding keeps those that it would have chosen itself.
"""

from collections.abc import Sequence
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int
import numpy as np

from openpi_ar.types import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Continuations:
    """A table of texts, the most frequent first. A pytree, so that it can be an argument of a compiled program.

    ids    token ids, without the EOS.
    valid  which slots hold one: the first ones of each text; none: no text.
    """

    ids: Int[Array, "N M"]
    valid: Bool[Array, "N M"]

    @classmethod
    def of(
        cls, texts: Sequence[Sequence[int]], longest: int, eos_id: int, *, rows: int | None = None
    ) -> "Continuations":
        """The table of these texts, cut at their EOS and to `longest` tokens; padded with empty texts to `rows`.

        Padding lets tables of several sizes share one program. More texts than `rows` are left out.
        """
        count = max(len(texts), 1) if rows is None else rows
        ids, valid = np.zeros((count, longest), np.int32), np.zeros((count, longest), bool)
        for row, text in enumerate(texts[:count]):
            text = list(text)
            text = text[: text.index(eos_id) if eos_id in text else len(text)][:longest]
            ids[row, : len(text)], valid[row, : len(text)] = text, True
        return cls(ids, valid)

    def propose(
        self, ids: Int[Array, "B m"], step: Int[Array, " B"], width: int
    ) -> tuple[Int[Array, "B w"], Bool[Array, "B w"]]:
        """(tokens, which are proposed) after the first `step` tokens of each row, at most `width`.

        They follow in the first text that begins with these tokens and goes on; if there is none, nothing is proposed.
        """
        table, known, longest = jnp.asarray(self.ids), jnp.asarray(self.valid), self.ids.shape[1]
        written = jnp.pad(ids, [(0, 0), (0, max(0, longest - ids.shape[1]))])[:, :longest]
        past = jnp.arange(longest) >= step[:, None]
        begins = ((written[:, None] == table) & known | past[:, None]).all(-1)
        goes_on = known.sum(-1) > step[:, None]
        fits = begins & goes_on
        text = jnp.argmax(fits, axis=-1)
        at = step[:, None] + jnp.arange(width)
        inside = jnp.minimum(at, longest - 1)
        proposed = fits.any(-1)[:, None] & (at < longest) & jnp.take_along_axis(known[text], inside, axis=1)
        return jnp.where(proposed, jnp.take_along_axis(table[text], inside, axis=1), 0), proposed


Proposal = tuple[Int[Array, "B w"], Bool[Array, "B w"]]
"""Tokens that may come next, and which are proposed: the first ones of each row."""


def joined(forced: Proposal, known: Proposal) -> Proposal:
    """What is known to be likely where it begins with what must come, else what must come."""
    agrees = (~forced[1] | known[1] & (known[0] == forced[0])).all(-1, keepdims=True)
    ids, proposed = (jnp.where(agrees, a, b) for a, b in zip(known, forced, strict=True))
    return ids, proposed
