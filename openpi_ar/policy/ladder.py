"""Which ways from noise to actions are compared; apart from `steps.py`, so that `--help` needs no JAX."""

import dataclasses

from openpi_ar.config import DenoiseMethod


@dataclasses.dataclass(frozen=True)
class Ladder:
    """Every number of steps with every method and every shift."""

    num: tuple[int, ...] = (1, 2, 3, 5, 10)
    """Numbers of steps."""
    methods: tuple[DenoiseMethod, ...] = ("euler", "heun")
    """A step of heun costs two passes through the action tower."""
    shifts: tuple[float, ...] = (1.0,)
    """1: equal steps. Above 1 shorter ones near the noise, below 1 near the actions."""
