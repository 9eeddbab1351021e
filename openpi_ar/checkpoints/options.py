"""Options of loading and writing checkpoints."""

import dataclasses
from typing import Literal

Dtype = Literal["float32", "bfloat16"]
Format = Literal["openpi", "torch", "lerobot", "ours"]
"""Formats that a checkpoint can be written in."""


@dataclasses.dataclass(frozen=True)
class LoadOptions:
    """What no tensor tells, and what is wanted of the model. None: what the files beside the tensors say, else a
    default."""

    dtype: Dtype | None = None
    """Of the parameters; else as stored."""
    image_size: tuple[int, int] | None = None
    """Height and width that the model is to see; its position embedding is resampled where it was another one."""
    action_horizon: int | None = None
    """Actions of a chunk; else 50."""
    siglip_heads: int | None = None
    """For PyTorch files, whose shapes do not tell; else 16."""
    num_kv_heads: int | None = None
    """The same for the towers; else 1."""
    cameras: tuple[str, ...] | None = None
    """Names in the model's order; else openpi's three."""
    compute_dtype: Dtype | None = None
    """Of the computation; else float32 on CPU, bfloat16 elsewhere."""

    def over(self, told: "LoadOptions") -> "LoadOptions":
        """These options where they are given, else those of `told`."""
        return dataclasses.replace(told, **{k: v for k, v in vars(self).items() if v is not None})


AS_IT_IS = LoadOptions()
