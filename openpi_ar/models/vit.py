"""A vision transformer without pooling, SigLIP or DINOv2 by its config: images to one token per patch.

SigLIP as in big_vision's `vit.py`, DINOv2 with registers as in timm's `vision_transformer.py`. Patch embedding and
position embedding are float32, the pre-LN blocks in the compute dtype.
"""

from einops import rearrange
from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Float
import numpy as np

from openpi_ar.compilation import attention_on
from openpi_ar.model_config import VitConfig
from openpi_ar.models.layers import ACTIVATIONS, Einsum, LayerNorm, Linear, fan_in_init, matmul, normal_init
from openpi_ar.models.stack import Stack, narrow
from openpi_ar.types import Array


def resample_pos_embedding(
    table: Float[np.ndarray, "_ D"], old: tuple[int, int], new: tuple[int, int]
) -> Float[np.ndarray, "_ D"]:
    """A position embedding for another grid of patches (height, width), row-major, on the host.

    big_vision's own (`models/vit.py`, `resample_posemb`, by which PaliGemma's higher resolutions were made):
    `scipy.ndimage.zoom` of order 1, that is bilinear with the corner patches kept in place and no antialiasing.
    """
    from scipy import ndimage  # half a second to import, and seldom needed

    grid = np.asarray(table).reshape(*old, -1)
    zoomed = np.asarray(ndimage.zoom(grid, (new[0] / old[0], new[1] / old[1], 1), order=1))
    return zoomed.reshape(new[0] * new[1], -1)


class Attention(nnx.Module):
    """Full multi-head self-attention. Queries, keys and values have biases if `qkv_bias`; the output has one."""

    def __init__(self, width: int, num_heads: int, *, rngs: nnx.Rngs, qkv_bias: bool = True, attention: str = "auto"):
        self.attention = attention
        head_dim = width // num_heads
        into = (width, num_heads, head_dim)
        self.q, self.k, self.v = (Einsum("BTD,DNH->BTNH", into, fan_in=width, rngs=rngs) for _ in range(3))
        biases = (nnx.Param(jnp.zeros((num_heads, head_dim))) if qkv_bias else None for _ in range(3))
        self.q_bias, self.k_bias, self.v_bias = biases
        self.out = Einsum("BTNH,NHD->BTD", (num_heads, head_dim, width), fan_in=width, rngs=rngs)
        self.out_bias = nnx.Param(jnp.zeros((width,)))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        pairs = ((self.q, self.q_bias), (self.k, self.k_bias), (self.v, self.v_bias))
        q, k, v = (
            narrow(product(x)) if bias is None else narrow(product(x)) + bias[...].astype(x.dtype)
            for product, bias in pairs
        )
        kernel = attention_on(self.attention, x.dtype)
        # Scales by head_dim ** -0.5; softmax in float32. Without a mask this is as plain as it gets.
        y = jax.nn.dot_product_attention(q, k, v, implementation="cudnn" if kernel == "cudnn" else "xla")
        return narrow(self.out(y)) + self.out_bias[...].astype(x.dtype)


class Block(nnx.Module):
    """Pre-LN transformer block; with LayerScale, each branch has a learned factor per channel."""

    def __init__(self, cfg: VitConfig, *, rngs: nnx.Rngs, attention: str = "auto"):
        self.activation = cfg.activation
        self.norm1 = LayerNorm(cfg.width, eps=cfg.norm_eps)
        self.attn = Attention(cfg.width, cfg.num_heads, rngs=rngs, qkv_bias=cfg.qkv_bias, attention=attention)
        self.norm2 = LayerNorm(cfg.width, eps=cfg.norm_eps)
        self.fc1 = Linear(cfg.width, cfg.mlp_dim, rngs=rngs)
        self.fc2 = Linear(cfg.mlp_dim, cfg.width, rngs=rngs)
        # 1e-5 is what DINOv2 starts from.
        gammas = (nnx.Param(jnp.full((cfg.width,), 1e-5)) if cfg.layer_scale else None for _ in range(2))
        self.gamma1, self.gamma2 = gammas

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        x = x + _scaled(self.attn(self.norm1(x)), self.gamma1)
        return x + _scaled(self.fc2(ACTIVATIONS[self.activation](self.fc1(self.norm2(x)))), self.gamma2)


def _scaled(x: Float[Array, "B T D"], gamma: nnx.Param | None) -> Float[Array, "B T D"]:
    return x if gamma is None else x * gamma[...].astype(x.dtype)


class VisionTransformer(nnx.Module):
    """Images, normalised as the weights expect them, to tokens row-major over the patch grid.

    `out_dim` is the width of the head's output; without a head (None) the tokens are as wide as the blocks. `remat` and
    `attention` are those of the model's config.
    """

    def __init__(
        self,
        cfg: VitConfig,
        out_dim: int | None,
        *,
        rngs: nnx.Rngs,
        remat: str | None = None,
        attention: str = "auto",
    ):
        self.patch, self.blocks_run = nnx.static(cfg.patch_size), cfg.blocks_run
        p = cfg.patch_size
        self.patch_kernel = nnx.Param(fan_in_init(rngs.params(), (p, p, 3, cfg.width), 3 * p * p))
        self.patch_bias = nnx.Param(jnp.zeros((cfg.width,)))
        pos = normal_init(rngs.params(), (cfg.num_tokens, cfg.width))
        self.pos_embedding = nnx.Param(pos * cfg.width**-0.5)
        self.blocks = Stack(lambda r: Block(cfg, rngs=r, attention=attention), cfg.depth, rngs=rngs, remat=remat)
        self.norm = LayerNorm(cfg.width, eps=cfg.norm_eps) if cfg.final_norm else None
        self.head = None if out_dim is None else Linear(cfg.width, out_dim, rngs=rngs)
        lead = (cfg.lead_tokens, cfg.width)
        self.lead = nnx.Param(0.02 * normal_init(rngs.params(), lead)) if cfg.lead_tokens else None

    def __call__(self, images: Float[Array, "B h w 3"], dtype: jnp.dtype) -> Float[Array, "B T D"]:
        p = self.patch
        # As a convolution without padding: 384 pixels are 27 patches of 14, the last 6 pixels belong to none.
        images = images[:, : images.shape[1] // p * p, : images.shape[2] // p * p]
        # A convolution whose stride is its kernel size is one matmul on patches (and 1.6x faster that way on CPU).
        patches = rearrange(images, "B (y p) (x q) c -> B (y x) (p q c)", p=p, q=p)
        kernel = rearrange(self.patch_kernel[...], "p q c D -> (p q c) D").astype(jnp.float32)
        x = matmul(patches, kernel) + self.patch_bias[...] + self.pos_embedding[...]
        if self.lead is not None:
            lead = jnp.broadcast_to(self.lead[...].astype(x.dtype), (x.shape[0], *self.lead[...].shape))
            x = jnp.concatenate([lead, x], axis=1)
        x, _ = self.blocks(lambda block, x, _: (block(x), None), x.astype(dtype), count=self.blocks_run)
        if self.lead is not None:
            x = x[:, self.lead[...].shape[0] :]
        x = x if self.norm is None else self.norm(x)
        return x if self.head is None else self.head(x)
