"""The parameters that a run starts from: any public checkpoint, one of ours, or towers that have learned where things are."""

import jax
import jax.numpy as jnp

from openpi_ar.checkpoints.load import load_model
from openpi_ar.checkpoints.options import LoadOptions
from openpi_ar.config import TrainConfig
from openpi_ar.data.inputs import InputTransform
from openpi_ar.data.layout import TrainingSource
from openpi_ar.models.vlm import VLA
from openpi_ar.params import check_fit, flatten, split, with_leaves
from openpi_ar.training import distributed
from openpi_ar.training.state import init_model
from openpi_ar.worlds.tabletop.pretrain_naming import pretrain_naming
from openpi_ar.worlds.tabletop.pretrain_vision import pretrain_vision

_ADAPTERS = ("lora_a", "lora_b")


def load_initial(cfg: TrainConfig) -> tuple[VLA, tuple[str, ...]]:
    """(model of `cfg` with the parameters of `cfg.init_from`, what the user should know).

    Adapters that the checkpoint lacks keep their init, so training starts at exactly what was loaded. Anything else that is
    missing, left over or of another shape is an error that lists it all. Each array is converted to the dtype that training
    keeps and its source let go before the next.

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
    del loaded
    fresh = {path for path in want if path not in have and path.endswith(_ADAPTERS)}
    needed = {path: like for path, like in want.items() if path not in fresh}
    check_fit(needed, have, f"{cfg.init_from} with config {cfg.name}")
    values = {path: jnp.asarray(have.pop(path), like.dtype) for path, like in needed.items()}
    if fresh:
        # Of the whole init only these are computed: the rest is dead code.
        values |= flatten(jax.jit(lambda: split(init_model(cfg), needed))())
        notes = (*notes, f"{len(fresh)} adapters are not in the checkpoint and start at zero effect")
    return with_leaves(abstract, values), notes


def initial_model(cfg: TrainConfig, source: TrainingSource, transform: InputTransform) -> VLA:
    """The model of `init_from`, or a random one whose vision tower has learned where things are; its tower 1 then learns what
    a text names."""
    quiet = not distributed.is_primary()
    if cfg.init_from:
        model, notes = load_initial(cfg)
        distributed.say(f"starting from {cfg.init_from}", *notes)
    else:
        model = jax.jit(lambda: init_model(cfg))()
    if (steps := cfg.data.vision_steps) and not cfg.init_from:
        model, error = pretrain_vision(model, source, steps=steps, seed=cfg.seed, quiet=quiet)
        distributed.say(f"vision tower: objects placed to {error:.2f} cm after {steps} steps")
        model = distributed.same_everywhere(model)  # each process has trained it, and machines may round differently
    if steps := cfg.data.naming_steps:
        model, error = pretrain_naming(model, source, transform, steps=steps, seed=cfg.seed, quiet=quiet)
        distributed.say(f"tower 1: named objects placed to {error:.2f} cm after {steps} steps")
        model = distributed.same_everywhere(model)
    return model
