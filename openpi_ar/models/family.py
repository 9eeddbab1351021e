"""Builds the model of a config: the only place that knows which families there are."""

from typing import overload

from flax import nnx

from openpi_ar.model_config import ModelConfig, PaliGemmaConfig
from openpi_ar.models.layers import ShapesOnly
from openpi_ar.models.paligemma import PaliGemma
from openpi_ar.models.pi0 import Pi0
from openpi_ar.models.vlm import VLA, VLM


@overload
def create(cfg: ModelConfig, *, rngs: nnx.Rngs) -> VLA: ...
@overload
def create(cfg: PaliGemmaConfig, *, rngs: nnx.Rngs) -> VLM: ...
def create(cfg: PaliGemmaConfig, *, rngs: nnx.Rngs) -> VLM:
    """A model with random parameters."""
    return Pi0(cfg, rngs=rngs) if isinstance(cfg, ModelConfig) else PaliGemma(cfg, rngs=rngs)


@overload
def abstract(cfg: ModelConfig) -> VLA: ...
@overload
def abstract(cfg: PaliGemmaConfig) -> VLM: ...
def abstract(cfg: PaliGemmaConfig) -> VLM:
    """The same model with shapes in place of arrays, in some 30 ms at any size."""
    return nnx.eval_shape(lambda: create(cfg, rngs=ShapesOnly()))
