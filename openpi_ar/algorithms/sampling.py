"""How the next token is chosen: greedily or at random, from which part of the distribution, under which constraint."""

import dataclasses
from typing import Any, Protocol, runtime_checkable

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int
import numpy as np

from openpi_ar.config import DecodeConfig
from openpi_ar.text.tokenizer import Tokenizer
from openpi_ar.types import Array


@runtime_checkable
class Constraint(Protocol):
    """Which ids may come next. A pytree, so that it can be an argument of a compiled program.

    Its state, in the decode loop, is a pytree of arrays whose first axis is the batch, or `()` if it has none.
    """

    def init(self, batch: int) -> Any:
        """The state before the first token."""
        ...

    def mask(self, state: Any) -> Bool[Array, "*b V"]:
        """Ids that may come next, at least one: [V] for all rows, or [B V]."""
        ...

    def advance(self, state: Any, token: Int[Array, " B"]) -> Any:
        """The state after this token."""
        ...


@runtime_checkable
class FewIds(Constraint, Protocol):
    """A constraint that can list what it allows: the head then computes nothing else."""

    def candidates(self, state: Any) -> tuple[Int[Array, "B F"], Bool[Array, "B F"]]:
        """The ids that may come next in ascending order, and which of them count: at least one of each row."""
        ...

    def forced(self, state: Any, width: int) -> tuple[Int[Array, "B w"], Bool[Array, "B w"]]:
        """The next tokens as far as there is no choice, at most `width` and without EOS, and which there are."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AllowedIds:
    """The same ids everywhere: no special, location or action ids in text. It must allow the end of the text."""

    allowed: Bool[Array, " V"]

    def init(self, batch: int) -> Any:
        return ()

    def mask(self, state: Any) -> Bool[Array, " V"]:
        return jnp.asarray(self.allowed)

    def advance(self, state: Any, token: Int[Array, " B"]) -> Any:
        return state


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How text is generated. By default greedily, from all ids.

    eos_id          ends a row.
    max_new_tokens  most tokens of a row, the end included; 0: no text.
    temperature     divides the logits; 0 is greedy, and `top_k` and `top_p` then change nothing.
    top_k           only the k most likely ids, and those as likely as the last of them; 0: all.
    top_p           only the most likely ids that together reach this probability (A. Holtzman et al., "The Curious Case
                    of Neural Text Degeneration", ICLR 2020), after temperature and `top_k`; 1: all.
    constraint      which ids may come next; None: all.
    """

    eos_id: int
    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    constraint: Constraint | None = None

    def __post_init__(self):
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                "sampling needs temperature >= 0, top_k >= 0 and 0 < top_p <= 1, found "
                f"{self.temperature}, {self.top_k} and {self.top_p}"
            )

    @property
    def greedy(self) -> bool:
        """Nothing is drawn: no random keys are needed."""
        return self.temperature == 0.0

    def init(self, batch: int) -> Any:
        """State of the constraint before the first token."""
        return () if self.constraint is None else self.constraint.init(batch)

    def advance(self, state: Any, token: Int[Array, " B"], on: Bool[Array, " B"]) -> Any:
        """State of the constraint after this token, in the rows that are `on`."""
        if self.constraint is None:
            return state

        def pick(new: Array, old: Array) -> Array:
            return jnp.where(on.reshape(-1, *[1] * (new.ndim - 1)), new, old)

        return jax.tree.map(pick, self.constraint.advance(state, token), state)

    @property
    def lists(self) -> bool:
        """The constraint can list the ids that may come next."""
        return isinstance(self.constraint, FewIds)

    def candidates(self, state: Any) -> tuple[Int[Array, "B F"], Bool[Array, "B F"]] | None:
        """`FewIds.candidates`; None if the constraint lists none."""
        return self.constraint.candidates(state) if isinstance(self.constraint, FewIds) else None

    def forced(self, state: Any, width: int) -> tuple[Int[Array, "B w"], Bool[Array, "B w"]] | None:
        """`FewIds.forced`; None if the constraint lists none."""
        return self.constraint.forced(state, width) if isinstance(self.constraint, FewIds) else None

    def constrained(self, logits: Float[Array, "*b V"], state: Any) -> Float[Array, "*b V"]:
        """Logits with those of the ids that may not come next at -inf."""
        return logits if self.constraint is None else jnp.where(self.constraint.mask(state), logits, -jnp.inf)

    def choose(self, logits: Float[Array, "B V"], keys: Array | None) -> Int[Array, " B"]:
        """The next token of each row from its constrained logits, drawn with the row's own key unless greedy."""
        if self.greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        if keys is None:
            raise ValueError(f"sampling at temperature {self.temperature} needs a random key per row")
        return jax.vmap(jax.random.categorical)(keys, self.filtered(logits)).astype(jnp.int32)

    def filtered(self, logits: Float[Array, "*b V"]) -> Float[Array, "*b V"]:
        """Logits that are drawn from: tempered, with -inf outside `top_k` and `top_p`. Of a temperature above 0."""
        logits = logits / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            least = jax.lax.top_k(logits, self.top_k)[0][..., -1:]
            logits = jnp.where(logits < least, -jnp.inf, logits)
        if self.top_p < 1:
            falling = -jnp.sort(-logits, axis=-1)
            p = jax.nn.softmax(falling, axis=-1)
            kept = jnp.cumsum(p, axis=-1) - p < self.top_p  # what comes before does not reach it yet: the first is kept
            least = jnp.min(jnp.where(kept, falling, jnp.inf), axis=-1, keepdims=True)
            logits = jnp.where(logits < least, -jnp.inf, logits)
        return logits


jax.tree_util.register_dataclass(
    Sampling,
    data_fields=["constraint"],
    meta_fields=["eos_id", "max_new_tokens", "temperature", "top_k", "top_p"],
)


@nnx.dataclass
class Generated(nnx.Pytree):
    """Decoded tokens. A row is valid up to and including its EOS; after it come zeros.

    logprobs  log-probability of each token under the model's own softmax over the ids that the constraint allowed: at
              temperature 1 and before `top_k` and `top_p`, however the token was chosen. 0 where it was given.
    margins   by how much each log-probability exceeds that of the next best id (`certainty`). 0 where it was given.
    steps     passes through the model that it took, the same for all rows; 0 if a draft was right.
    """

    ids: Int[Array, "B M"] = nnx.data()
    valid: Bool[Array, "B M"] = nnx.data()
    logprobs: Float[Array, "B M"] = nnx.data()
    margins: Float[Array, "B M"] = nnx.data()
    steps: Int[Array, ""] = nnx.data()

    @classmethod
    def given(cls, ids: Int[Array, "B M"], valid: Bool[Array, "B M"]) -> "Generated":
        """Text that was given, not decoded."""
        nothing = jnp.zeros(ids.shape, jnp.float32)
        return cls(jnp.asarray(ids), jnp.asarray(valid), nothing, nothing, steps=jnp.zeros((), jnp.int32))


def text_sampling(cfg: DecodeConfig, tokenizer: Tokenizer, vocab_size: int, max_new_tokens: int) -> Sampling:
    """Sampling of text as configured, from a model's `vocab_size` ids. Ids past the tokenizer's own are no text."""
    allowed = np.pad(tokenizer.allowed_text, (0, vocab_size - tokenizer.vocab_size))
    return Sampling(
        tokenizer.eos_id, max_new_tokens, cfg.temperature, cfg.top_k, cfg.top_p, AllowedIds(jnp.asarray(allowed))
    )


def log_probability(logits: Float[Array, "*b V"], token: Int[Array, "*b"]) -> Float[Array, "*b"]:
    """Log-probability of the token under the softmax of the logits."""
    return certainty(logits, token)[0]


def certainty(logits: Float[Array, "*b V"], token: Int[Array, "*b"]) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
    """(log-probability of the token under the softmax of the logits, by how much it exceeds that of any other token).

    The difference is negative if another token was likelier, and infinite if no other was allowed.
    """
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
    others = jnp.where(jnp.arange(logits.shape[-1]) == token[..., None], -jnp.inf, logits)
    return chosen - jax.nn.logsumexp(logits, axis=-1), chosen - others.max(-1)


def row_keys(key: Array, batch: int) -> Array:
    """A random key for each row. A row's key does not depend on how many rows there are."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(batch))
