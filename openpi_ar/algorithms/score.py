"""How likely each of several texts is: all of them in one pass, behind one prefix."""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from openpi_ar.algorithms.losses import predictors
from openpi_ar.algorithms.sampling import Sampling, log_probability
from openpi_ar.models.cache import Cache
from openpi_ar.models.vlm import VLM, embed_tokens
from openpi_ar.types import Array, Tokens

_AT_ONCE = 8
"""Texts whose logits exist at the same time: 20 tokens of a 257,152-wide head are 20 MB a text."""


def score(
    model: VLM, cache: Cache, last_hidden: Float[Array, "1 D"], texts: Tokens, sampling: Sampling
) -> Float[Array, "N T"]:
    """Log-probability of every token of each text [N T], 0 in its padding, given the prefix of the one row of `cache`.

    `last_hidden` predicts the first token. The probabilities are those that `generate` reports: the softmax over the
    ids that the constraint of `sampling`, which must have no state, allows. A text that ends with EOS includes its
    probability.
    """
    count, length = texts.ids.shape
    hidden, _ = model.tower.extend(embed_tokens(model, texts), cache.repeat(count).reserve(length))
    before = predictors(jnp.repeat(last_hidden, count, axis=0), hidden, jnp.asarray(texts.valid))

    def one(row: tuple[Array, Array]) -> Array:
        states, ids = row
        return log_probability(sampling.constrained(model.logits(states), ()), ids)

    each = jax.lax.map(one, (before, jnp.asarray(texts.ids)), batch_size=_AT_ONCE)
    return jnp.where(texts.valid, each, 0.0)
