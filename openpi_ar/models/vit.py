"""SigLIP's vision transformer, as big_vision's `vit.py` (no pooling): images to one token per patch.

Patch embedding and position embedding are float32, pre-LN blocks in the compute dtype, tanh-GELU, a final LayerNorm and
a linear head to the language model's width.
"""

from einops import rearrange
from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Float
import numpy as np

from openpi_ar.config import SigLIPConfig
from openpi_ar.models.layers import Einsum, LayerNorm, Linear, fan_in_init, matmul
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
    """Full multi-head self-attention with biases."""

    def __init__(self, width: int, num_heads: int, *, rngs: nnx.Rngs):
        head_dim = width // num_heads
        into = (width, num_heads, head_dim)
        self.q = Einsum("BTD,DNH->BTNH", into, fan_in=width, rngs=rngs)
        self.k = Einsum("BTD,DNH->BTNH", into, fan_in=width, rngs=rngs)
        self.v = Einsum("BTD,DNH->BTNH", into, fan_in=width, rngs=rngs)
        self.q_bias, self.k_bias, self.v_bias = (nnx.Param(jnp.zeros((num_heads, head_dim))) for _ in range(3))
        self.out = Einsum("BTNH,NHD->BTD", (num_heads, head_dim, width), fan_in=width, rngs=rngs)
        self.out_bias = nnx.Param(jnp.zeros((width,)))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        q = narrow(self.q(x)) + self.q_bias[...].astype(x.dtype)
        k = narrow(self.k(x)) + self.k_bias[...].astype(x.dtype)
        v = narrow(self.v(x)) + self.v_bias[...].astype(x.dtype)
        y = jax.nn.dot_product_attention(q, k, v)  # scales by head_dim ** -0.5; softmax in float32
        return narrow(self.out(y)) + self.out_bias[...].astype(x.dtype)


class Block(nnx.Module):
    """Pre-LN transformer block."""

    def __init__(self, cfg: SigLIPConfig, *, rngs: nnx.Rngs):
        self.norm1 = LayerNorm(cfg.width)
        self.attn = Attention(cfg.width, cfg.num_heads, rngs=rngs)
        self.norm2 = LayerNorm(cfg.width)
        self.fc1 = Linear(cfg.width, cfg.mlp_dim, rngs=rngs)
        self.fc2 = Linear(cfg.mlp_dim, cfg.width, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(jax.nn.gelu(self.fc1(self.norm2(x)), approximate=True))


class SigLIP(nnx.Module):
    """Images in [-1, 1] to `out_dim`-wide tokens, row-major over the patch grid."""

    def __init__(self, cfg: SigLIPConfig, out_dim: int, *, rngs: nnx.Rngs, policy: str = "full"):
        self.patch = nnx.static(cfg.patch_size)
        p = cfg.patch_size
        self.patch_kernel = nnx.Param(fan_in_init(rngs.params(), (p, p, 3, cfg.width), 3 * p * p))
        self.patch_bias = nnx.Param(jnp.zeros((cfg.width,)))
        pos = jax.random.normal(rngs.params(), (cfg.num_tokens, cfg.width))
        self.pos_embedding = nnx.Param(pos * cfg.width**-0.5)
        self.blocks = Stack(lambda r: Block(cfg, rngs=r), cfg.depth, rngs=rngs, policy=policy)
        self.norm = LayerNorm(cfg.width)
        self.head = Linear(cfg.width, out_dim, rngs=rngs)

    def __call__(self, images: Float[Array, "B h w 3"], dtype: jnp.dtype, *, remat: bool) -> Float[Array, "B T D"]:
        p = self.patch
        # As a convolution without padding: 384 pixels are 27 patches of 14, the last 6 pixels belong to none.
        images = images[:, : images.shape[1] // p * p, : images.shape[2] // p * p]
        # A convolution whose stride is its kernel size is one matmul on patches (and 1.6x faster that way on CPU).
        patches = rearrange(images, "B (y p) (x q) c -> B (y x) (p q c)", p=p, q=p)
        kernel = rearrange(self.patch_kernel[...], "p q c D -> (p q c) D").astype(jnp.float32)
        x = matmul(patches, kernel) + self.patch_bias[...] + self.pos_embedding[...]
        x, _ = self.blocks(lambda block, x, _: (block(x), None), x.astype(dtype), remat=remat)
        return self.head(self.norm(x))
