"""Swapped prompts: rows whose task is another one's, so that their actions can only be predicted from the subtask."""

from collections.abc import Sequence
import dataclasses

import numpy as np

from openpi_ar.errors import UserError


@dataclasses.dataclass(frozen=True)
class PromptSwap:
    """With probability `fraction`, another task takes the prompt's place and the text is not supervised.

    The actions still follow the row's own subtask. Rows without actions (questions) stay as they are.

    prompts   tasks to choose from. Raises UserError if rows are to be swapped and there are fewer than two.
    """

    prompts: Sequence[str]
    fraction: float

    def __post_init__(self):
        if self.fraction and len(set(self.prompts)) < 2:
            raise UserError("data.prompt_swap needs demonstrations of two tasks at least, found one: set it to 0")

    def __call__(self, raw: dict, rng: np.random.Generator) -> dict:
        # Both draws are always made, so that changing the fraction does not change which prompt a row would get.
        chance, pick = rng.random(), int(rng.integers(max(len(self.prompts) - 1, 1)))
        if chance >= self.fraction or raw.get("actions") is None:
            return raw
        others = [p for p in self.prompts if p != raw["prompt"]]
        return {**raw, "prompt": others[pick % len(others)], "supervise_text": False}
