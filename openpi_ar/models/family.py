"""Builds the model of a config: the only place that knows which families there are."""

from flax import nnx

from openpi_ar.model_config import ModelConfig
from openpi_ar.models.layers import ShapesOnly
from openpi_ar.models.pi0 import Pi0
from openpi_ar.models.vlm import VLA


def create(cfg: ModelConfig, *, rngs: nnx.Rngs) -> VLA:
    """A model with random parameters."""
    return Pi0(cfg, rngs=rngs)


def abstract(cfg: ModelConfig) -> VLA:
    """The same model with shapes in place of arrays, in some 30 ms at any size."""
    return nnx.eval_shape(lambda: create(cfg, rngs=ShapesOnly()))
