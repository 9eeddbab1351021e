"""The parameters that a run starts from: any public checkpoint, or one of ours."""

import jax
import jax.numpy as jnp

from openpi_ar.checkpoints.load import load_model
from openpi_ar.checkpoints.options import LoadOptions
from openpi_ar.config import TrainConfig
from openpi_ar.models.vlm import VLA
from openpi_ar.params import check_fit, flatten, split, with_leaves
from openpi_ar.training.state import init_model

_ADAPTERS = ("lora_a", "lora_b")


def load_initial(cfg: TrainConfig) -> tuple[VLA, tuple[str, ...]]:
    """(model of `cfg` with the parameters of `cfg.init_from`, what the user should know).

    Adapters that the checkpoint lacks keep their init, so training starts at exactly what was loaded; so does the
    action tower where PaliGemma, another family of models, is loaded. Anything else that is missing, left over or of
    another shape is an error that lists it all. Each array is converted to the dtype that training stores, and its
    source freed, before the next.

    Raises UserError, also for whatever `checkpoints.load.load_model` refuses.
    """
    options = LoadOptions(
        action_horizon=cfg.model.action_horizon,
        image_size=cfg.model.siglip.image_size,
        cameras=cfg.model.cameras,
        compute_dtype=cfg.model.dtype,
    )
    loaded = load_model(cfg.init_from, options)
    abstract = jax.eval_shape(lambda: init_model(cfg))
    want, have, notes = flatten(abstract), flatten(loaded.model), loaded.notes
    other_family = type(loaded.config) is not type(cfg.model)
    del loaded
    fresh = {path for path in want if path not in have and (other_family or path.endswith(_ADAPTERS))}
    needed = {path: like for path, like in want.items() if path not in fresh}
    check_fit(needed, have, f"{cfg.init_from} with config {cfg.name}")
    values = {path: jnp.asarray(have.pop(path), like.dtype) for path, like in needed.items()}
    if fresh:
        # Of the whole init only these are computed: the rest is dead code.
        values |= flatten(jax.jit(lambda: split(init_model(cfg), needed))())
        notes = (*notes, f"{len(fresh)} parameters are not in the checkpoint and keep their init: {_parts(fresh)}")
    return with_leaves(abstract, values), notes


def _parts(paths: set[str]) -> str:
    """What the paths belong to: parts of the model, or its adapters."""
    return ", ".join(sorted({"adapters" if path.endswith(_ADAPTERS) else path.split("/")[0] for path in paths}))
