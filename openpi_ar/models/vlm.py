"""What algorithms know of a model: protocols, and the run of embedded tokens that models make and towers read.

A family (pi0, ...) is one config and one module that satisfies them; `models/family.py` builds it.
"""

from typing import Protocol, runtime_checkable

from flax import nnx
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from openpi_ar.model_config import ModelConfig, PaliGemmaConfig
from openpi_ar.models.cache import Cache
from openpi_ar.types import Array, Observation, Tokens, as_mask


@nnx.dataclass
class Run(nnx.Pytree):
    """Embedded tokens with the bits that decide who sees whom (see `types.Tokens`).

    valid   token is real; others are holes that hold no position.
    causal  token opens a new attention block.
    hidden  token is invisible to the action tower.
    """

    x: Float[Array, "B T D"] = nnx.data()
    valid: Bool[Array, "B T"] = nnx.data()
    causal: Bool[Array, "B T"] = nnx.data()
    hidden: Bool[Array, "B T"] = nnx.data()

    def then(self, other: "Run") -> "Run":
        """This run followed by another one."""
        pairs = ((getattr(self, name), getattr(other, name)) for name in ("x", "valid", "causal", "hidden"))
        return Run(*(jnp.concatenate(pair, axis=1) for pair in pairs))


@runtime_checkable
class Tower(Protocol):
    """A decoder in one of its forms. It makes the cache that it needs itself and is the only writer of it."""

    def extend(
        self, run: Run, cache: Cache | None = None, *, rows: Int[Array, "B R"] | None = None
    ) -> tuple[Float[Array, "B _ D"], Cache]:
        """(hidden states after the final norm, the cache with the run in it).

        Positions and the mask follow from the bits of run and cache. Without a cache one is made that is full:
        `reserve` slots before the next call. With `rows`, only the hidden states of these tokens come out.
        """
        ...


@runtime_checkable
class CacheReader(Protocol):
    """The action tower over a cache that it only reads; what depends on the cache alone is computed already."""

    def __call__(
        self, tokens: Float[Array, "B n T E"], cond: Float[Array, "B n E"] | None, table: Array | None = None
    ) -> Float[Array, "B n T E"]:
        """Hidden states after the final norm. `cond` conditions AdaRMS (None: there is none); `table` is what one step
        of `ActionTower.modulations` gives for it."""
        ...


@runtime_checkable
class ActionTower(Protocol):
    """A decoder that reads the cache of another one and writes nothing."""

    def reader(self, cache: Cache, causal: Bool[Array, " T"], draws: int = 1) -> CacheReader:
        """Reads `cache` with `draws` chunks of T tokens per row, side by side, that do not see each other.

        Every token sees the visible slots of the cache, and its own chunk as the `causal` bits say.
        """
        ...

    def modulations(self, cond: Float[Array, "*b E"] | None) -> Float[Array, "*b m W"] | None:
        """Scale, shift and gate of every norm under these conditions, to be computed once where conditions recur.

        None if there is no condition or this form computes them layer by layer.
        """
        ...


@runtime_checkable
class VLM(Protocol):
    """A vision-language model: observations in, next-token logits out."""

    cfg: PaliGemmaConfig

    @property
    def tower(self) -> Tower:
        """The decoder of images and text."""
        ...

    def head_weight(self) -> Float[Array, "V D"]:
        """Weight of the vocabulary's head, for losses that compute it slice by slice."""
        ...

    def embed_images(self, obs: Observation) -> Float[Array, "B _ D"]:
        """Tokens of all cameras, camera-major."""
        ...

    def embed_text(self, ids: Int[Array, "*b"]) -> Float[Array, "*b D"]:
        """Embeddings of token ids."""
        ...

    def embed(self, obs: Observation, image_tokens: Float[Array, "B _ D"] | None = None) -> Run:
        """Images and prompt in the family's order. `image_tokens` (of `embed_images`) are computed if not given."""
        ...

    def logits(self, hidden: Float[Array, "*b D"]) -> Float[Array, "*b V"]:
        """Float32 next-token logits of hidden states."""
        ...

    def unstacked(self) -> "VLM":
        """The same model with its layers as lists: programs are unrolled."""
        ...

    def for_inference(self, dtype: str | None = None) -> "VLM":
        """The inference form: the same numbers, fewer and larger products, weights in `dtype` (None: the config's)."""
        ...


@runtime_checkable
class VLA(VLM, Protocol):
    """A vision-language model with an action tower that denoises action chunks by flow matching."""

    cfg: ModelConfig

    def unstacked(self) -> "VLA": ...

    def for_inference(self, dtype: str | None = None) -> "VLA": ...

    @property
    def action_tower(self) -> ActionTower:
        """The decoder of action tokens."""
        ...

    @property
    def suffix_causal(self) -> Bool[Array, " T"]:
        """`causal` bits of the tokens of one chunk."""
        ...

    def time_condition(self, t: Float[Array, "*b"]) -> Float[Array, "*b E"] | None:
        """AdaRMS condition of flow times; None if time is mixed into the tokens."""
        ...

    def embed_suffix(
        self, obs: Observation, x_t: Float[Array, "B n A X"], t: Float[Array, "B n"]
    ) -> tuple[Float[Array, "B n T E"], Float[Array, "B n E"] | None]:
        """Tokens of n noisy chunks per row, and their conditions (`time_condition`)."""
        ...

    def project_velocity(self, hidden: Float[Array, "B n T E"]) -> Float[Array, "B n A X"]:
        """Float32 velocities of the chunks' hidden states."""
        ...


def embed_tokens(model: VLM, tokens: Tokens) -> Run:
    """A run of text."""
    return Run(model.embed_text(tokens.ids), *(as_mask(getattr(tokens, n), n) for n in ("valid", "causal", "hidden")))
