"""The pytrees that cross module borders, and the axis legend used in every einsum string and signature.

    B batch      T query tokens   S key slots (cache)   N query heads   K key/value heads   G = N / K
    H head dim   D model width    F mlp width           V vocabulary    L layers            M decoded tokens
    C cameras    P state dims     A action steps (horizon)   X action dims                  n flow draws
    h, w image height and width in pixels

`nnx.Pytree` dataclasses rather than flax.struct: only these pass jaxtyping's import hook under `jax.eval_shape`. Fields
say `nnx.data()` because flax does not recognise a tracer as data on Python 3.11.
"""

from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Int8, UInt8
import numpy as np

from openpi_ar.errors import UserError
from openpi_ar.kinds import Kind

# Batches are built from numpy on the host and become jax arrays when they enter a jitted function.
Array = jax.Array | np.ndarray


def check_mask(mask: Any, name: str) -> None:
    """Raises UserError for a mask of floats: whether it holds factors (1: seen) or what is added to logits (0: seen)
    nothing tells, and taken for the other it hides what should be seen."""
    dtype = mask.dtype if hasattr(mask, "dtype") else np.asarray(mask).dtype
    if jnp.issubdtype(dtype, jnp.floating):
        raise UserError(
            f"mask {name!r} must be boolean, found {dtype}: floats may be factors or summands of attention, which mean "
            f"the opposite; give mask > 0 (1: seen), or mask == 0 (0: seen, -inf: masked)"
        )


def as_mask(mask: Any, name: str) -> jax.Array:
    """A mask as a boolean array on the device. Raises UserError as `check_mask`."""
    check_mask(mask, name)
    return jnp.asarray(mask, bool)


@nnx.dataclass
class Tokens(nnx.Pytree):
    """A run of tokens. Slots are not positions: invalid slots are holes that nothing reads and no position counts.

    ids     token ids.
    valid   slot holds a real token.
    causal  token opens a new attention block: it sees itself and everything before, nothing before sees it.
            A run of causal tokens is autoregressive, a run of non-causal ones is bidirectional.
    loss    token is a supervised target of the cross-entropy.
    hidden  token is invisible to the action tower and holds none of its positions (EOS, FAST action tokens).
    kind    a `Kind`.
    """

    ids: Int[Array, "B T"] = nnx.data()
    valid: Bool[Array, "B T"] = nnx.data()
    causal: Bool[Array, "B T"] = nnx.data()
    loss: Bool[Array, "B T"] = nnx.data()
    hidden: Bool[Array, "B T"] = nnx.data()
    kind: Int8[Array, "B T"] = nnx.data()

    @classmethod
    def of(
        cls,
        ids: Any,
        valid: Any = True,
        *,
        kind: Any = Kind.PROMPT,
        causal: Any = False,
        loss: Any = False,
        hidden: Any = False,
    ) -> "Tokens":
        """A run with these ids [B T]; the other fields are arrays of that shape, or one value for every token.

        A token that is not valid is neither supervised nor hidden. Numpy stays numpy.
        """
        xp = np if isinstance(ids, np.ndarray) else jnp
        ids = xp.asarray(ids).astype(np.int32)

        def bit(value: Any, name: str) -> Any:
            check_mask(value, name)
            return xp.broadcast_to(xp.asarray(value, bool), ids.shape)

        valid = bit(valid, "valid")
        return cls(
            ids=ids,
            valid=valid,
            causal=bit(causal, "causal"),
            loss=bit(loss, "loss") & valid,
            hidden=bit(hidden, "hidden") & valid,
            kind=xp.broadcast_to(xp.asarray(kind, np.int8), ids.shape),
        )


@nnx.dataclass
class Observation(nnx.Pytree):
    """What the model sees. Cameras are stacked in the order of the config's `cameras`.

    images      uint8 in [0, 255] (scaled to [-1, 1] on the device) or float32 already in [-1, 1].
    image_mask  camera is present. A masked camera holds no position and nothing attends to it.
    prompt      tokenized prompt, BOS included.
    state       normalised robot state; read by pi0 (state token), ignored by pi0.5 (state is in the prompt).
    """

    images: UInt8[Array, "B C h w 3"] | Float[Array, "B C h w 3"] = nnx.data()
    image_mask: Bool[Array, "B C"] = nnx.data()
    prompt: Tokens = nnx.data()
    state: Float[Array, "B P"] = nnx.data()


@nnx.dataclass
class Batch(nnx.Pytree):
    """One training batch.

    target       what the model is to write (subtask, answer, action tokens), EOS included; all of it causal.
    actions      normalised action chunks, padded to the model's action dimension.
    action_mask  entry counts in the flow loss: False past an episode's end, in padded dimensions (unless the config
                 asks for openpi's average over all of them), and in rows that carry no actions.
    action_prompt  what the actions see in place of the observation's prompt and the target (`text.conditioning`
                 reprompt). None: they see those.
    """

    observation: Observation = nnx.data()
    target: Tokens = nnx.data()
    actions: Float[Array, "B A X"] = nnx.data()
    action_mask: Bool[Array, "B A X"] = nnx.data()
    action_prompt: Tokens | None = nnx.data(default=None)
