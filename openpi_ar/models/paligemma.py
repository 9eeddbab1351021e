"""PaliGemma: SigLIP and a Gemma tower that writes text. pi0 is this and an action tower (`models/pi0.py`)."""

import dataclasses

from flax import nnx
import jax.numpy as jnp
from jaxtyping import Float, Int

from openpi_ar.images import resize_with_pad_on_device
from openpi_ar.model_config import PaliGemmaConfig
from openpi_ar.models.decoder import Embedder, Tower
from openpi_ar.models.fused import FusedTower, cast_matrices
from openpi_ar.models.vit import VisionTransformer
from openpi_ar.models.vlm import Run, embed_tokens
from openpi_ar.types import Array, Observation, as_mask


class PaliGemma(nnx.Module):
    """A `vlm.VLM`: images first, then the prompt, all of it bidirectional."""

    def __init__(self, cfg: PaliGemmaConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        vlm, how = cfg.vlm, {"remat": cfg.recomputed, "attention": cfg.attention}
        self.img = VisionTransformer(cfg.siglip, vlm.width, rngs=rngs, **how)
        self.embedder = Embedder(cfg.vocab_size, vlm.width, rngs=rngs, scaled=vlm.scaled_embeddings, tied=vlm.tied_head)
        self.vlm: Tower | FusedTower = Tower(vlm, adaptive=False, rngs=rngs, **how)

    @property
    def dtype(self) -> jnp.dtype:
        """Compute dtype of the towers."""
        return jnp.dtype(self.cfg.dtype)

    @property
    def tower(self) -> Tower | FusedTower:
        """The tower of images and text."""
        return self.vlm

    def head_weight(self) -> Float[Array, "V D"]:
        """Weight of the vocabulary's head."""
        return self.embedder.weight

    def unstacked(self) -> "PaliGemma":
        """The same model with its layers as lists: unrolled programs (see `models.stack`)."""
        new = nnx.clone(self)
        assert isinstance(self.vlm, Tower) and isinstance(new.vlm, Tower), "this is an inference form already"
        new.img.blocks = self.img.blocks.unstacked()
        new.vlm.blocks = self.vlm.blocks.unstacked()
        return new

    def for_inference(self, dtype: str | None = None) -> "PaliGemma":
        """The inference form (see `models.fused`), computing in `dtype` (None: as configured) with weights kept in it.

        What is computed in float32 in any case (norms, patches) stays float32.
        """
        dtype = dtype or self.cfg.dtype
        new = nnx.clone(self)
        assert isinstance(self.vlm, Tower), "this is an inference form already"
        new.cfg = dataclasses.replace(self.cfg, dtype=dtype, remat=False)
        new.img.blocks = cast_matrices(self.img.blocks.unstacked(), jnp.dtype(dtype))
        new.embedder.table = nnx.Param(self.embedder.table[...].astype(dtype))
        if self.embedder.head is not None:
            new.embedder.head = nnx.Param(self.embedder.head[...].astype(dtype))
        new.vlm = FusedTower(self.vlm, jnp.dtype(dtype), decodes=True)
        return new

    def embed_images(self, obs: Observation) -> Float[Array, "B T D"]:
        """Tokens of all images in one batched call of the vision tower; T = images * patches, image-major.

        uint8 images of another size than the model's are fitted in first, with black borders, as on the host. Raises
        ValueError for a model whose images are stretched: that is done on the host.
        """
        batch, cameras = obs.images.shape[:2]
        size = self.cfg.siglip.image_size
        images = jnp.asarray(obs.images).reshape(-1, *obs.images.shape[2:])
        if images.dtype == jnp.uint8:
            if images.shape[1:3] != size and not self.cfg.keeps_aspect:
                raise ValueError(f"images of {images.shape[1:3]} must be stretched to {size} before they come here")
            images = resize_with_pad_on_device(images, *size).astype(jnp.float32) / 127.5 - 1.0
        tokens = self.img(images.astype(jnp.float32), self.dtype)
        return tokens.reshape(batch, cameras * tokens.shape[1], tokens.shape[2])

    def embed_text(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Token embeddings in the compute dtype."""
        return self.embedder.encode(ids).astype(self.dtype)

    def embed(self, obs: Observation, image_tokens: Float[Array, "B _ D"] | None = None) -> Run:
        """Images first, then the prompt. Images are bidirectional; a masked camera holds no position."""
        images = self.embed_images(obs) if image_tokens is None else image_tokens
        seen = as_mask(obs.image_mask, "image_mask")
        seen = jnp.repeat(seen, images.shape[1] // obs.image_mask.shape[1], axis=1)
        no = jnp.zeros_like(seen)
        return Run(x=images, valid=seen, causal=no, hidden=no).then(embed_tokens(self, obs.prompt))

    def logits(self, hidden: Float[Array, "*b D"]) -> Float[Array, "*b V"]:
        """Float32 next-token logits of hidden states."""
        return self.embedder.logits(hidden)
