"""`loss = 10 * flow + subtask cross-entropy`, from one prefill and one velocity per noise draw."""

import jax
import jax.numpy as jnp
from jaxtyping import Float
import optax

from openpi_ar.algorithms.decode import prefill, velocities
from openpi_ar.config import LossConfig
from openpi_ar.models.cache import KVCache
from openpi_ar.models.pi0 import Pi0
from openpi_ar.types import Array, Batch, Observation, Text

Metrics = dict[str, Float[Array, ""]]


def mean_where(x: Float[Array, "*d"], mask: Array) -> Float[Array, ""]:
    """Mean of x where mask holds; 0 where it holds nowhere."""
    return jnp.sum(jnp.where(mask, x, 0.0)) / jnp.maximum(mask.sum(), 1)


def text_loss(
    model: Pi0, prompt_last: Float[Array, "B D"], hidden: Float[Array, "B T D"], target: Text
) -> tuple[Float[Array, ""], Metrics]:
    """Cross-entropy of the target text given its teacher-forced hidden states. The target is right-padded.

    The last prompt token predicts the first target token, each target token the next one. Only these T rows go through
    the vocabulary-wide head. Every supervised token weighs the same. `exact_match` is the fraction of supervised rows
    whose every token is the arg max, which is when greedy decoding returns exactly the target; `first_token` the
    fraction whose first one is.
    """
    predicts = jnp.concatenate([prompt_last[:, None], hidden[:, :-1]], axis=1)
    logits = model.logits(predicts)
    scored = jnp.asarray(target.loss) & target.valid
    ce = mean_where(optax.softmax_cross_entropy_with_integer_labels(logits, target.ids), scored)
    right = (jnp.argmax(logits, axis=-1) == target.ids) | ~scored
    rows = scored.any(-1)
    metrics = {
        "text_ce": ce,
        "exact_match": mean_where(right.all(-1).astype(jnp.float32), rows),
        "first_token": mean_where(right[:, 0].astype(jnp.float32), rows & scored[:, 0]),
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


def flow_loss(model: Pi0, batch: Batch, cache: KVCache, key: Array, draws: int) -> Float[Array, ""]:
    """Flow-matching loss, averaged over `draws` independent (noise, time) pairs per row that share one prefix."""
    actions = jnp.asarray(batch.actions)
    noise_key, time_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, (actions.shape[0], draws, *actions.shape[1:]))
    t = sample_time(time_key, noise.shape[:2])
    error = flow_error(model, batch.observation, cache, actions, noise, t)
    return mean_where(error, jnp.broadcast_to(batch.action_mask[:, None], error.shape))


def compute_loss(model: Pi0, batch: Batch, key: Array, cfg: LossConfig) -> tuple[Float[Array, ""], Metrics]:
    """The training loss and its parts: `loss`, `flow`, `text_ce`, `exact_match`, `first_token` (float32 scalars).

    The ground-truth text is the text run of the prefill, so the actions are conditioned on it exactly as they are on
    generated text at inference.
    """
    out, cache = prefill(model, batch.observation, batch.target)
    assert out.text is not None
    ce, metrics = text_loss(model, out.prompt_last, out.text, batch.target)
    if cfg.knowledge_insulation:
        cache = jax.lax.stop_gradient(cache)
    flow = flow_loss(model, batch, cache, key, cfg.flow_draws)
    loss = cfg.flow_weight * flow + cfg.text_weight * ce
    return loss, {"loss": loss, "flow": flow, **metrics}
