"""Layers shared by the towers: linear maps, norms, the gated MLP, rotary embedding, attention, time embedding.

Parameters are float32 at construction and may be cast to bfloat16 for inference. Each layer computes its matmuls in the
dtype of its input; norms, softmax and rotations are float32 inside and return the dtype of their input.
"""

from collections.abc import Callable, Sequence
import math
import re
from typing import Any

from einops import rearrange
from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int
import numpy as np

from openpi_ar.compilation import attention_on
from openpi_ar.types import Array, check_mask

# Masked logits. Finite, so that a row that may attend to nothing (a padded query) stays finite too.
MASKED = -2.3819763e38


class ShapesOnly(nnx.Rngs):
    """In place of random keys where a model is built for its shapes alone: random numbers take long to trace."""

    def __init__(self):
        pass

    def params(self) -> None:
        """No key."""

    def split(self, count: int) -> "ShapesOnly":
        return self


def normal_init(key: jax.Array | None, shape: tuple[int, ...]) -> Array:
    """Standard normal; zeros without a key (`ShapesOnly`)."""
    return jnp.zeros(shape) if key is None else jax.random.normal(key, shape)


def fan_in_init(key: jax.Array | None, shape: tuple[int, ...], fan_in: int) -> Array:
    """Truncated normal of variance 1 / fan_in (LeCun), for weights whose input axes are not the leading ones."""
    if key is None:
        return jnp.zeros(shape)
    # 0.8796 is the standard deviation of a unit normal cut at two sigma.
    return jax.random.truncated_normal(key, -2.0, 2.0, shape) * (1.0 / (math.sqrt(fan_in) * 0.87962566103423978))


def matmul(x: Float[Array, "*d i"], w: Float[Array, "i o"]) -> Float[Array, "*d o"]:
    """`x @ w` over flattened rows: XLA:CPU computes the weight's gradient 2x slower when it sums over two axes."""
    return (x.reshape(-1, x.shape[-1]) @ w).reshape(*x.shape[:-1], w.shape[-1])


def lora_specs(spec: str) -> tuple[str, str]:
    """The two einsums that a low-rank pair replaces `spec` by: the weight's last two axes become (in, r) and (r, out).

    As openpi's `lora.py`: an axis of the weight that the output lacks (heads, in the output projection) is summed over
    in each of the two, not across both.
    """
    x, w, out = re.split(r",|->", spec)
    into, outof = w[-2], w[-1]
    low = out.replace(outof, "r")
    return f"{x},{w.replace(outof, 'r')}->{low}", f"{low},{w.replace(into, 'r')}->{out}"


def lora_init(rngs: nnx.Rngs, shape: tuple[int, ...], rank: int) -> tuple[nnx.Param, nnx.Param] | tuple[None, None]:
    """The adapters of a weight of this shape (None for rank 0): small noise, and zero so that training starts at w."""
    if not rank:
        return None, None
    a = 0.01 * normal_init(rngs.params(), (*shape[:-1], rank))
    return nnx.Param(a), nnx.Param(jnp.zeros((*shape[:-2], rank, shape[-1])))


def merge_lora(w: nnx.Param, a: nnx.Param | None, b: nnx.Param | None, *, summed: bool = False) -> Array:
    """The weight [*d i o] that does what `w` and its adapters [*d i r], [*d r o] (None: it has none) do together, in
    the dtype of `w`, added in float32. `summed`: the second adapter acts on the sum over the first axis."""
    if a is None or b is None:
        return w[...]
    outof = b[...].sum(0, keepdims=True) if summed else b[...]
    delta = jnp.einsum("...ir,...ro->...io", a[...].astype(jnp.float32), outof.astype(jnp.float32))
    return (w[...].astype(jnp.float32) + delta).astype(w[...].dtype)


class Einsum(nnx.Module):
    """`einsum(spec, x, w)` in the dtype of x, plus the low-rank adapters' output if there are any."""

    def __init__(self, spec: str, shape: tuple[int, ...], *, fan_in: int, rngs: nnx.Rngs, lora_rank: int = 0):
        self.spec = spec
        self.w = nnx.Param(fan_in_init(rngs.params(), shape, fan_in))
        self.lora_a, self.lora_b = lora_init(rngs, shape, lora_rank)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        y = jnp.einsum(self.spec, x, self.w[...].astype(x.dtype))
        if self.lora_a is None or self.lora_b is None:
            return y
        into, outof = lora_specs(self.spec)
        return y + jnp.einsum(
            outof, jnp.einsum(into, x, self.lora_a[...].astype(x.dtype)), self.lora_b[...].astype(x.dtype)
        )


class Linear(nnx.Module):
    """`x @ kernel + bias` in the dtype of x."""

    def __init__(self, in_dim: int, out_dim: int, *, rngs: nnx.Rngs, zero_init: bool = False):
        shape = (in_dim, out_dim)
        self.kernel = nnx.Param(jnp.zeros(shape) if zero_init else fan_in_init(rngs.params(), shape, in_dim))
        self.bias = nnx.Param(jnp.zeros((out_dim,)))

    def __call__(self, x: Float[Array, "*d i"]) -> Float[Array, "*d o"]:
        return matmul(x, self.kernel[...].astype(x.dtype)) + self.bias[...].astype(x.dtype)


class LayerNorm(nnx.Module):
    """LayerNorm with bias."""

    def __init__(self, dim: int, *, eps: float = 1e-6):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((dim,)))
        self.bias = nnx.Param(jnp.zeros((dim,)))

    def __call__(self, x: Float[Array, "*d D"]) -> Float[Array, "*d D"]:
        x32 = x.astype(jnp.float32)
        mean = x32.mean(-1, keepdims=True)
        var = jnp.square(x32 - mean).mean(-1, keepdims=True)
        y = (x32 - mean) * jax.lax.rsqrt(var + self.eps) * self.scale[...] + self.bias[...]
        return y.astype(x.dtype)


def _rms(x: Float[Array, "*d D"], eps: float) -> Float[Array, "*d D"]:
    x32 = x.astype(jnp.float32)
    return x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + eps)


class RMSNorm(nnx.Module):
    """RMSNorm whose factor is `offset + scale`: Gemma stores its distance from 1, Llama the factor itself."""

    def __init__(self, dim: int, *, eps: float = 1e-6, offset: float = 1.0):
        self.eps, self.offset = eps, offset
        self.scale = nnx.Param(jnp.full((dim,), 1.0 - offset))

    def __call__(self, x: Float[Array, "*d D"], cond: Array | None = None) -> tuple[Float[Array, "*d D"], None]:
        """Returns the normed input and no gate."""
        return (_rms(x, self.eps) * (self.offset + self.scale[...])).astype(x.dtype), None


class AdaRMSNorm(nnx.Module):
    """RMSNorm whose scale, shift and residual gate come from a condition (openpi `gemma.py`; adaLN-zero of DiT).

    The map starts at zero, so an untrained block passes its input on unchanged.
    """

    def __init__(self, dim: int, *, rngs: nnx.Rngs, eps: float = 1e-6):
        self.eps = eps
        self.modulation = Linear(dim, 3 * dim, rngs=rngs, zero_init=True)

    def __call__(
        self, x: Float[Array, "B T D"], cond: Float[Array, "B n D"] | None
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
        """Returns the modulated norm of x and the gate of the residual branch that follows.

        The T tokens are n equal groups (flow draws), each with its own condition.
        """
        assert cond is not None, "this tower is conditioned: it needs a condition"
        modulation = jnp.repeat(self.modulation(cond.astype(x.dtype)), x.shape[1] // cond.shape[1], axis=1)
        return self.modulated(x, modulation)

    def modulated(
        self, x: Float[Array, "B T D"], modulation: Float[Array, "... W"]
    ) -> tuple[Float[Array, "B T D"], Float[Array, "... D"]]:
        """The norm of x with a modulation's scale and shift, and its gate. One modulation may serve all tokens."""
        scale, shift, gate = jnp.split(modulation, 3, axis=-1)
        return (_rms(x, self.eps) * (1.0 + scale) + shift).astype(x.dtype), gate


ACTIVATIONS: dict[str, Callable[[Array], jax.Array]] = {
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "silu": jax.nn.silu,
}


class GatedMLP(nnx.Module):
    """Gemma's and Llama's feed-forward: `down(activation(gate(x)) * up(x))`; gate and up are one weight [2 D F]."""

    def __init__(self, dim: int, hidden: int, *, rngs: nnx.Rngs, activation: str = "gelu_tanh", lora_rank: int = 0):
        self.activation = activation
        self.gate_up = nnx.Param(fan_in_init(rngs.params(), (2, dim, hidden), dim))
        self.down = nnx.Param(fan_in_init(rngs.params(), (hidden, dim), hidden))
        self.gate_up_lora_a, self.gate_up_lora_b = lora_init(rngs, (2, dim, hidden), lora_rank)
        self.down_lora_a, self.down_lora_b = lora_init(rngs, (hidden, dim), lora_rank)

    def __call__(self, x: Float[Array, "*d D"]) -> Float[Array, "*d D"]:
        # Two matmuls, not one einsum over the stacked weight, whose backward pass is slower on CPU.
        gate, up = (self._matmul(x, self.gate_up, self.gate_up_lora_a, self.gate_up_lora_b, i) for i in (0, 1))
        y = ACTIVATIONS[self.activation](gate) * up
        return self._matmul(y, self.down, self.down_lora_a, self.down_lora_b, ...)

    @staticmethod
    def _matmul(x: Array, w: nnx.Param, a: nnx.Param | None, b: nnx.Param | None, index: Any) -> Array:
        y = matmul(x, w[...].astype(x.dtype)[index])
        if a is None or b is None:
            return y
        return y + matmul(matmul(x, a[...].astype(x.dtype)[index]), b[...].astype(x.dtype)[index])


def rotary(
    positions: Int[Array, "B T"], head_dim: int, base: float = 10_000.0
) -> tuple[Float[Array, "B T 1 h"], Float[Array, "B T 1 h"]]:
    """Sine and cosine of RoPE's angles, computed once and shared by every layer; h = head_dim / 2."""
    timescale = base ** (jnp.arange(head_dim // 2, dtype=jnp.float32) * (2.0 / head_dim))
    angle = positions[..., None, None].astype(jnp.float32) / timescale
    return jnp.sin(angle), jnp.cos(angle)


def rotate(
    x: Float[Array, "B T N H"], sin: Float[Array, "B T 1 h"], cos: Float[Array, "B T 1 h"]
) -> Float[Array, "B T N H"]:
    """RoPE over split halves (not interleaved pairs), in float32."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def attend(
    q: Float[Array, "B T N H"],
    kv: Sequence[tuple[Float[Array, "B _ K H"], Float[Array, "B _ K H"]]],
    mask: Bool[Array, "B T S"],
    attention: str = "plain",
) -> Float[Array, "B T N H"]:
    """Grouped-query attention over several runs of keys, float32 logits and softmax. q comes already scaled.

    The runs (cache, own tokens) are joined in the logits, not in the keys: the cache is read in place, never copied.
    S is the sum of the runs' lengths. `attention` is that of the config; a kernel of the library reads joined keys.
    """
    check_mask(mask, "mask")
    kernel = attention_on(attention, q.dtype)
    if kernel != "plain":
        k, v = (jnp.concatenate(run, axis=1) for run in zip(*kv, strict=True))
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=1.0, implementation=kernel)
    kv_heads = kv[0][0].shape[2]
    # The axes are in the order in which a batched matmul leaves them: the large logits are never transposed.
    q = rearrange(q, "B T (K G) H -> B K T G H", K=kv_heads)
    logits = [jnp.einsum("BKTGH,BSKH->BKTGS", q, k, preferred_element_type=jnp.float32) for k, _ in kv]
    logits = jnp.where(mask[:, None, :, None], jnp.concatenate(logits, axis=-1), MASKED)
    probs = jax.nn.softmax(logits, axis=-1).astype(q.dtype)
    start, parts = 0, []
    for _, v in kv:
        parts.append(jnp.einsum("BKTGS,BSKH->BKTGH", probs[..., start : start + v.shape[1]], v))
        start += v.shape[1]
    return rearrange(sum(parts[1:], start=parts[0]), "B K T G H -> B T (K G) H")


def sincos_embedding(
    t: Float[Array, "*b"], dim: int, min_period: float = 4e-3, max_period: float = 4.0, *, exact: bool = False
) -> Float[Array, "*b dim"]:
    """Sine-cosine embedding of flow time with periods from 4e-3 to 4.0, geometric, float32.

    openpi's JAX code (`posemb_sincos`) computes the angles in float32, its PyTorch code in float64 (`exact`); the two
    differ by up to 1e-4.
    """
    if dim % 2:
        raise ValueError(f"the time embedding needs an even width, found {dim}")
    t = t.astype(jnp.float32)[..., None]
    if exact:
        angle = 2 * math.pi * _cycles(t, 1 / (min_period * (max_period / min_period) ** np.linspace(0, 1, dim // 2)))
    else:
        period = min_period * (max_period / min_period) ** jnp.linspace(0.0, 1.0, dim // 2)
        # Angles reach 1570 rad, where one rounding is 1e-4: the order of operations is openpi's.
        angle = t * (1.0 / period * 2 * math.pi)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def _cycles(t: Float[Array, "*b 1"], frequency: Float[np.ndarray, " d"]) -> Float[Array, "*b d"]:
    """`t * frequency` less a whole number, to 1e-8 as in float64: by float32 parts whose products are exact."""
    high = frequency.astype(np.float32).view(np.uint32) & np.uint32(0xFFFFF000)  # 12 bits of mantissa
    f1 = high.view(np.float32)
    f2 = (frequency - f1).astype(np.float32)
    t1 = jax.lax.reduce_precision(jnp.asarray(t), 8, 11)
    whole = t1 * f1
    return (whole - jnp.round(whole)) + (t1 * f2 + (t - t1) * f1) + (t - t1) * f2
