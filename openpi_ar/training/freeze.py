"""Which parameters are frozen: a table of path patterns (`TrainConfig.frozen`).

Frozen parameters take part in the forward pass only: no gradient, no optimizer moments and no average exist for them.
The others are a nested dict, named as in a checkpoint (`params.split`); where nothing is frozen they are the model
itself.
"""

from fnmatch import fnmatchcase
import re
from typing import Any

import jax
import jax.numpy as jnp

from openpi_ar.config import TrainConfig
from openpi_ar.errors import UserError
from openpi_ar.models.vlm import VLA
from openpi_ar.params import leaf_paths

_KEPT_FLOAT32 = re.compile(r"(^|[/_])(scale|bias)$")
"""Norms and biases: they take no memory to speak of, and what a norm's weight differs from 1 by is lost in bfloat16."""


def is_frozen(path: str, table: tuple[str, ...]) -> bool:
    """Whether the last pattern of the table that matches the path freezes it."""
    for pattern in reversed(table):
        if fnmatchcase(path, pattern.removeprefix("!")):
            return not pattern.startswith("!")
    return False


def frozen_paths(cfg: TrainConfig, model: VLA) -> frozenset[str]:
    """Paths of the parameters that the config freezes. `model` may be abstract.

    Raises UserError for patterns that match nothing, all at once, and for a table that leaves nothing to train.
    """
    paths = leaf_paths(model)
    idle = [p for p in cfg.frozen if not any(fnmatchcase(path, p.removeprefix("!")) for path in paths)]
    if idle:
        raise UserError(
            f"frozen: {', '.join(map(repr, idle))} matches no parameter; paths begin with "
            f"{', '.join(dict.fromkeys(path.split('/')[0] for path in paths))}, as in {paths[0]!r}"
        )
    found = frozenset(path for path in paths if is_frozen(path, cfg.frozen))
    if len(found) == len(paths):
        raise UserError(f"frozen: {' '.join(cfg.frozen)} leaves nothing to train; add a pattern with ! in front")
    return found


def stored(cfg: TrainConfig, model: VLA) -> VLA:
    """The model in the dtypes that training keeps it in: float32, and `frozen_dtype` for frozen weights."""
    frozen = frozen_paths(cfg, model)

    def dtype(path: str) -> Any:
        return cfg.frozen_dtype if path in frozen and not _KEPT_FLOAT32.search(path) else jnp.float32

    leaves, structure = jax.tree.flatten(model)
    cast = [jnp.asarray(leaf, dtype(path)) for path, leaf in zip(leaf_paths(model), leaves, strict=True)]
    return jax.tree.unflatten(structure, cast)
