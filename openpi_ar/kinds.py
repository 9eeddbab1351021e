"""Kinds of tokens. Apart from `types.py`, so that looking at data and robots imports no JAX."""

import enum


class Kind(enum.IntEnum):
    """What a token belongs to. Losses and metrics go by kind, with one weight each."""

    PROMPT = 0
    SUBTASK = 1
    ANSWER = 2
    ACTION = 3

    @property
    def label(self) -> str:
        """Its name in metrics, loss weights and raw samples."""
        return "action_token" if self is Kind.ACTION else self.name.lower()
