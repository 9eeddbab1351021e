"""Segments: what a sequence of tokens is made of, and their packing into arrays.

A prompt or a target is a list of segments. `pack` concatenates them first and pads once, at the end, so the token after
a token is always the next valid slot. What the action tower may not see is the `hidden` bit of a segment, set where the
segment is made (`text/templates.py`) and nowhere else.
"""

from collections.abc import Sequence
import dataclasses
import enum

import numpy as np

from openpi_ar.errors import UserError
from openpi_ar.kinds import Kind
from openpi_ar.text.tokenizer import Tokenizer

TokenArrays = dict[str, np.ndarray]
"""ids int32, kind int8, valid, causal, loss, hidden bool, each [budget], right-padded: the fields of `types.Tokens`."""


class Special(enum.Enum):
    """Control tokens. As text of a user, "<eos>" is just text."""

    BOS = "<bos>"
    EOS = "<eos>"


@dataclasses.dataclass(frozen=True)
class Segment:
    """Consecutive tokens that share their bits; `kind`, `causal`, `loss` and `hidden` are as in `types.Tokens`.

    content  text, a control token, or ids. Each segment's text is tokenized on its own.
    """

    content: str | Special | Sequence[int]
    kind: Kind = Kind.PROMPT
    causal: bool = False
    loss: bool = False
    hidden: bool = False

    def ids(self, tokenizer: Tokenizer) -> Sequence[int]:
        """The token ids. Raises UserError if the text is not valid Unicode."""
        if isinstance(self.content, Special):
            return [tokenizer.bos_id if self.content is Special.BOS else tokenizer.eos_id]
        return tokenizer.encode(self.content) if isinstance(self.content, str) else self.content


def pack(tokenizer: Tokenizer, segments: Sequence[Segment], budget: int) -> TokenArrays:
    """Segments as arrays of `budget` tokens; no segments give padding alone.

    Raises UserError if they take more tokens than the budget, naming the flag that raises it and how many are needed.
    """
    runs = [segment.ids(tokenizer) for segment in segments]
    lengths = [len(run) for run in runs]
    need = sum(lengths)
    if need > budget:
        what = "target" if any(segment.kind != Kind.PROMPT for segment in segments) else "prompt"
        raise UserError(
            f"the {what} takes {need} tokens but the budget is {budget}: set --text.max-{what}-tokens to {need} or "
            f"more, or shorten it ({readable(segments)[:60]!r})"
        )
    ids = np.full(budget, tokenizer.pad_id, np.int32)
    ids[:need] = [token for run in runs for token in run]
    arrays = {"ids": ids, "valid": np.arange(budget) < need}
    for name, dtype in (("causal", bool), ("loss", bool), ("hidden", bool), ("kind", np.int8)):
        arrays[name] = np.zeros(budget, dtype)
        arrays[name][:need] = np.repeat(np.array([getattr(s, name) for s in segments], dtype), lengths)
    return arrays


def readable(segments: Sequence[Segment]) -> str:
    """The segments as one text, BOS left out: EOS as "<eos>", ids as their number."""
    return "".join(_written(s.content) for s in segments if s.content is not Special.BOS)


def _written(content: str | Special | Sequence[int]) -> str:
    if isinstance(content, Special):
        return content.value
    return content if isinstance(content, str) else f"<{len(content)} ids>"
