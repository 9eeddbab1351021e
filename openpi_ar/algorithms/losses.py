"""`loss = 10 * flow + subtask cross-entropy`, from one prefill and one velocity per noise draw."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from openpi_ar.algorithms.cross_entropy import token_losses
from openpi_ar.algorithms.decode import prefill, velocities
from openpi_ar.config import LossConfig
from openpi_ar.models.cache import KVCache
from openpi_ar.models.pi0 import Pi0
from openpi_ar.types import Array, Batch, Observation, Tokens

Metrics = dict[str, Float[Array, ""]]


def mean_where(x: Float[Array, "*d"], mask: Array) -> Float[Array, ""]:
    """Mean of x where mask holds; 0 where it holds nowhere."""
    return jnp.sum(jnp.where(mask, x, 0.0)) / jnp.maximum(mask.sum(), 1)


class Counts(NamedTuple):
    """What the parts of the loss are divided by, at least 1 each: the supervised tokens, rows with supervised text, rows
    whose first token is supervised, and action entries of a batch. A slice of a batch is divided by its share of the whole
    batch's, so that the mean over slices is the loss of the whole."""

    tokens: Float[Array, ""]
    rows: Float[Array, ""]
    firsts: Float[Array, ""]
    entries: Float[Array, ""]


def scored_tokens(target: Tokens) -> Bool[Array, "B T"]:
    """Tokens that the cross-entropy counts."""
    return jnp.asarray(target.loss) & target.valid


def text_counts(target: Tokens) -> Counts:
    """The counts of a target alone: `entries` is 1."""
    scored = scored_tokens(target)
    parts = (scored, scored.any(-1), scored[:, 0])
    return Counts(*(jnp.maximum(p.sum(), 1).astype(jnp.float32) for p in parts), entries=jnp.float32(1))


def batch_counts(batch: Batch) -> Counts:
    """The counts of a batch."""
    entries = jnp.maximum(jnp.asarray(batch.action_mask).sum(), 1).astype(jnp.float32)
    return text_counts(batch.target)._replace(entries=entries)


def text_loss(
    model: Pi0,
    prompt_last: Float[Array, "B D"],
    hidden: Float[Array, "B T D"],
    target: Tokens,
    counts: Counts | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Cross-entropy of the target text given its teacher-forced hidden states. The target is right-padded.

    The last prompt token predicts the first target token, each target token the next one. Only these T rows go through
    the vocabulary-wide head, a slice of it at a time (`cross_entropy.py`). Every supervised token weighs the same.
    `exact_match` is the fraction of supervised rows whose every token is the arg max, which is when greedy decoding
    returns exactly the target; `first_token` the fraction whose first one is.
    """
    counts = text_counts(target) if counts is None else counts
    predicts = jnp.concatenate([prompt_last[:, None], hidden[:, :-1]], axis=1)
    flat = predicts.reshape(-1, predicts.shape[-1])
    each, best = token_losses(flat, model.embedder.table[...], jnp.asarray(target.ids).reshape(-1))
    each, best = each.reshape(target.ids.shape), best.reshape(target.ids.shape)
    scored = scored_tokens(target)
    ce = jnp.sum(jnp.where(scored, each, 0.0)) / counts.tokens
    right = (best == target.ids) | ~scored
    metrics: Metrics = {
        "text_ce": ce,
        "exact_match": jnp.sum(right.all(-1) & scored.any(-1)) / counts.rows,
        "first_token": jnp.sum(right[:, 0] & scored[:, 0]) / counts.firsts,
    }
    return ce, metrics


def sample_time(key: Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Flow times: Beta(1.5, 1) * 0.999 + 0.001 (openpi `pi0.py`; more weight near noise)."""
    # The quantile function of Beta(1.5, 1) is u ** (1 / 1.5), exact and cheaper than a rejection sampler.
    return jax.random.uniform(key, shape) ** (1 / 1.5) * 0.999 + 0.001


def flow_error(
    model: Pi0,
    obs: Observation,
    cache: KVCache,
    actions: Float[Array, "B A X"],
    noise: Float[Array, "B n A X"],
    t: Float[Array, "B n"],
) -> Float[Array, "B n A X"]:
    """Squared error of the velocity per entry: x_t = t * noise + (1 - t) * actions, target u = noise - actions."""
    w, clean = t[:, :, None, None], actions[:, None]
    v = velocities(model, obs, cache, w * noise + (1 - w) * clean, t)
    return jnp.square(v - (noise - clean))


def flow_loss(
    model: Pi0, batch: Batch, cache: KVCache, key: Array, draws: int, counts: Counts | None = None
) -> Float[Array, ""]:
    """Flow-matching loss, averaged over `draws` independent (noise, time) pairs per row that share one prefix."""
    actions = jnp.asarray(batch.actions)
    noise_key, time_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, (actions.shape[0], draws, *actions.shape[1:]))
    t = sample_time(time_key, noise.shape[:2])
    error = flow_error(model, batch.observation, cache, actions, noise, t)
    entries = (batch_counts(batch) if counts is None else counts).entries
    return jnp.sum(jnp.where(jnp.asarray(batch.action_mask)[:, None], error, 0.0)) / (draws * entries)


def compute_loss(
    model: Pi0, batch: Batch, key: Array, cfg: LossConfig, counts: Counts | None = None, said: Tokens | None = None
) -> tuple[Float[Array, ""], Metrics]:
    """The training loss and its parts: `loss`, `flow`, `text_ce`, `exact_match`, `first_token` (float32 scalars).

    The ground-truth text is the text run of the prefill, so the actions are conditioned on it exactly as they are on
    generated text at inference. `counts` stand in for the batch's own where it is a slice of a larger one. `said` is fed
    in place of the true text, which stays the target.
    """
    counts = batch_counts(batch) if counts is None else counts
    out, cache = prefill(model, batch.observation, batch.target if said is None else said)
    assert out.text is not None
    ce, metrics = text_loss(model, out.prompt_last, out.text, batch.target, counts)
    if cfg.knowledge_insulation:
        cache = jax.lax.stop_gradient(cache)
    flow = flow_loss(model, batch, cache, key, cfg.flow_draws, counts)
    loss = cfg.flow_weight * flow + cfg.text_weight * ce
    return loss, {"loss": loss, "flow": flow, **metrics}
