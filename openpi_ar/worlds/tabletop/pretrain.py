"""What a tabletop model may learn before it imitates: where everything is, and what a text names.

The recipe ends in a checkpoint that `train.py --init-from` starts from.
"""

import dataclasses
from pathlib import Path

import jax

from openpi_ar.checkpoints import store
from openpi_ar.config import TrainConfig
from openpi_ar.data.inputs import InputTransform
from openpi_ar.data.sources import load_sources
from openpi_ar.errors import UserError
from openpi_ar.models.vlm import VLA
from openpi_ar.text.tokenizer import load_tokenizer
from openpi_ar.training.initial import load_initial
from openpi_ar.training.state import init_model
from openpi_ar.training.store import CheckpointStore
from openpi_ar.worlds import datasets
from openpi_ar.worlds.tabletop.poses import posed
from openpi_ar.worlds.tabletop.pretrain_naming import pretrain_naming
from openpi_ar.worlds.tabletop.pretrain_vision import pretrain_vision


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model, what a checkpoint of it carries, and the errors in centimetres by what was learnt."""

    model: VLA
    assets: store.Assets
    errors: dict[str, float]


def pretrain(cfg: TrainConfig, *, vision_steps: int, naming_steps: int, quiet: bool = False) -> Pretrained:
    """The model of `cfg`, from `cfg.init_from` or random, after `vision_steps` of `pretrain_vision` and `naming_steps`
    of `pretrain_naming` on the training frames of `cfg.data`; 0 leaves a stage out.

    Raises UserError if the data does not hold the places of its blocks, or the model's template has no subtask.
    """
    if min(vision_steps, naming_steps) < 0 or not vision_steps + naming_steps:
        raise UserError(
            f"steps must be 0 or more and not all 0, found {vision_steps} (vision), {naming_steps} (naming)"
        )
    source, _, _ = load_sources(cfg, datasets.local)
    frames = posed(source)
    stats = source.norm_stats(cfg.model.norm_mode)
    tokenizer = load_tokenizer(cfg.text.tokenizer)
    transform = InputTransform.for_training(cfg, tokenizer, stats)
    if naming_steps and not transform.writes_text:
        raise UserError(f"template {cfg.text.template!r} has no subtask that could name a block: set --naming-steps 0")
    model = load_initial(cfg)[0] if cfg.init_from else jax.jit(lambda: init_model(cfg))()
    errors = {}
    if vision_steps:
        model, errors["vision"] = pretrain_vision(model, frames, steps=vision_steps, seed=cfg.seed, quiet=quiet)
    if naming_steps:
        model, errors["naming"] = pretrain_naming(
            model, frames, transform, steps=naming_steps, seed=cfg.seed, quiet=quiet
        )
    return Pretrained(model, store.Assets(cfg, tokenizer, stats), errors)


def save(found: Pretrained, out: Path, step: int) -> Path:
    """Writes the model and its assets as step `step` of the experiment `out`; returns the step's directory."""
    writer = CheckpointStore(out, keep_last=1)
    writer.save_for_policy(step, found.model, found.assets)
    writer.close()
    return out / str(step)
