"""The training loss, `10 * flow + cross-entropy of each kind of token`: one prefill, one velocity per noise draw."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Num

from openpi_ar.algorithms.cross_entropy import token_losses
from openpi_ar.algorithms.flow import velocities
from openpi_ar.algorithms.prefill import prefill
from openpi_ar.config import LossConfig
from openpi_ar.models.cache import Cache
from openpi_ar.models.vlm import VLA, VLM
from openpi_ar.types import Array, Batch, Kind, Observation, Tokens

Metrics = dict[str, Float[Array, ""]]
_TEXT = ("ce", "exact_match", "first_token")
KINDS = (Kind.SUBTASK, Kind.ANSWER, Kind.ACTION)
"""What a model may be trained to write, in the order of the arrays [K]."""
PARTS = ("flow", *(kind.label for kind in KINDS))
"""Parts of the loss. The names of a part's metrics begin with it; `<part>_count` is how much it was measured on."""


class Counts(NamedTuple):
    """What the parts of the loss are divided by: supervised tokens, rows with such tokens, and rows whose first token
    of the kind is one, each by kind; and action entries. A slice of a batch is divided by its share of the batch's."""

    tokens: Float[Array, " K"]
    rows: Float[Array, " K"]
    firsts: Float[Array, " K"]
    entries: Float[Array, ""]

    def metrics(self) -> Metrics:
        """`<part>_count` of each part: a part that counts nothing has no meaningful metrics."""
        counts = {f"{kind.label}_count": self.tokens[k] for k, kind in enumerate(KINDS)}
        return {"flow_count": self.entries, **counts}


def _supervised(target: Tokens) -> tuple[Bool[Array, "K B T"], Bool[Array, "K B T"]]:
    """Supervised tokens by kind, and of them the first tokens that a row has of the kind."""
    of_kind = (jnp.asarray(target.kind) == jnp.array(KINDS)[:, None, None]) & target.valid
    firsts = of_kind & (jnp.cumsum(of_kind, axis=-1) == 1)
    return of_kind & target.loss, firsts & target.loss


def text_counts(target: Tokens) -> Counts:
    """The counts of a target alone: `entries` is 0."""
    scored, firsts = _supervised(target)
    counts = (scored.sum((1, 2)), scored.any(-1).sum(-1), firsts.sum((1, 2)))
    return Counts(*(n.astype(jnp.float32) for n in counts), entries=jnp.float32(0))


def batch_counts(batch: Batch) -> Counts:
    """The counts of a batch."""
    return text_counts(batch.target)._replace(entries=jnp.asarray(batch.action_mask).sum().astype(jnp.float32))


def per(total: Num[Array, "*k"], count: Float[Array, "*k"]) -> Float[Array, "*k"]:
    """A total divided by its count; the total, which is 0, where nothing was counted."""
    return total / jnp.where(count > 0, count, 1.0)


def predictors(prompt_last: Float[Array, "B D"], hidden: Float[Array, "B T D"], valid: Bool[Array, "B T"]) -> Array:
    """Hidden states [B T D] that predict the target's tokens: each is that of the last valid token before the slot, for
    the first valid one the prompt's last. Padding may stand anywhere."""
    slots = jnp.where(valid, jnp.arange(1, valid.shape[1] + 1), 0)
    before = jnp.pad(jax.lax.cummax(slots, axis=1)[:, :-1], [(0, 0), (1, 0)])
    return jnp.take_along_axis(jnp.concatenate([prompt_last[:, None], hidden], axis=1), before[..., None], axis=1)


def text_loss(
    model: VLM,
    prompt_last: Float[Array, "B D"],
    hidden: Float[Array, "B T D"],
    target: Tokens,
    cfg: LossConfig | None = None,
    counts: Counts | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """(sum over kinds of weight * cross-entropy, metrics) of the target given its teacher-forced hidden states.

    Each kind's cross-entropy is the mean over its supervised tokens of the batch. Only these T rows go through the
    vocabulary-wide head, a slice of it at a time (`cross_entropy.py`). Metrics are, with `<kind>` the label of each
    kind:

        <kind>_ce            cross-entropy
        <kind>_exact_match   fraction of rows with supervised tokens of the kind in which each is the arg max, which is
                             when greedy decoding returns exactly the target
        <kind>_first_token   fraction of rows in which the first one is
    """
    counts = text_counts(target) if counts is None else counts
    cfg = cfg or LossConfig()
    predicts = predictors(prompt_last, hidden, jnp.asarray(target.valid))
    flat = predicts.reshape(-1, predicts.shape[-1])
    each, best = token_losses(flat, model.head_weight(), jnp.asarray(target.ids).reshape(-1))
    each, best = each.reshape(target.ids.shape), best.reshape(target.ids.shape)
    scored, firsts = _supervised(target)
    ce = per(jnp.where(scored, each, 0.0).sum((1, 2)), counts.tokens)
    right = (best == target.ids) | ~scored
    exact = per((right.all(-1) & scored.any(-1)).sum(-1), counts.rows)
    first = per((right & firsts).sum((1, 2)), counts.firsts)
    loss, metrics = jnp.float32(0), {}
    for k, kind in enumerate(KINDS):
        loss += getattr(cfg, f"{kind.label}_weight") * ce[k]
        metrics |= {f"{kind.label}_{name}": x[k] for name, x in zip(_TEXT, (ce, exact, first), strict=True)}
    return loss, metrics


def sample_time(key: Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Flow times: Beta(1.5, 1) * 0.999 + 0.001 (openpi `pi0.py`; more weight near noise)."""
    # The quantile function of Beta(1.5, 1) is u ** (1 / 1.5), exact and cheaper than a rejection sampler.
    return jax.random.uniform(key, shape) ** (1 / 1.5) * 0.999 + 0.001


def flow_error(
    model: VLA,
    obs: Observation,
    cache: Cache,
    actions: Float[Array, "B A X"],
    noise: Float[Array, "B n A X"],
    t: Float[Array, "B n"],
) -> Float[Array, "B n A X"]:
    """Squared error of the velocity per entry: x_t = t * noise + (1 - t) * actions, target u = noise - actions."""
    w, clean = t[:, :, None, None], actions[:, None]
    v = velocities(model, obs, cache, w * noise + (1 - w) * clean, t)
    return jnp.square(v - (noise - clean))


def flow_loss(
    model: VLA, batch: Batch, cache: Cache, key: Array, draws: int, counts: Counts | None = None
) -> Float[Array, ""]:
    """Flow-matching loss, averaged over `draws` independent (noise, time) pairs per row that share one prefix."""
    actions = jnp.asarray(batch.actions)
    noise_key, time_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, (actions.shape[0], draws, *actions.shape[1:]))
    t = sample_time(time_key, noise.shape[:2])
    error = flow_error(model, batch.observation, cache, actions, noise, t)
    entries = (batch_counts(batch) if counts is None else counts).entries
    return per(jnp.sum(jnp.where(jnp.asarray(batch.action_mask)[:, None], error, 0.0)), draws * entries)


def compute_loss(
    model: VLA, batch: Batch, key: Array, cfg: LossConfig, counts: Counts | None = None, fed: Tokens | None = None
) -> tuple[Float[Array, ""], Metrics]:
    """The training loss and its parts: `loss`, `flow` and those of `text_loss` (float32 scalars).

    The true text is the text run of the prefill, so the actions are conditioned on it exactly as they are on generated
    text at inference. `counts` stand in for the batch's own where it is a slice of a larger one. `fed` is fed in place
    of the true text, which stays the target. With an `action_prompt` the actions see a second prefill, of that prompt
    and the same image tokens.
    """
    counts = batch_counts(batch) if counts is None else counts
    images = None if batch.action_prompt is None else model.embed_images(batch.observation)
    text = batch.target if fed is None else fed
    out, cache = prefill(model, batch.observation, text, image_tokens=images)
    assert out.text is not None
    if batch.action_prompt is not None:
        _, cache = prefill(
            model, dataclasses.replace(batch.observation, prompt=batch.action_prompt), image_tokens=images
        )
    ce, metrics = text_loss(model, out.prompt_last, out.text, batch.target, cfg, counts)
    if cfg.knowledge_insulation:
        cache = jax.lax.stop_gradient(cache)
    flow = flow_loss(model, batch, cache, key, cfg.flow_draws, counts)
    loss = cfg.flow_weight * flow + ce
    return loss, {"loss": loss, "flow": flow, **metrics}
