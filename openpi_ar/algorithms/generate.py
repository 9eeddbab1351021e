"""Autoregressive text, one token a step: the decode loop."""

import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from openpi_ar.algorithms.draft import check_draft, without_draft
from openpi_ar.algorithms.sampling import Sampling, certainty
from openpi_ar.models.cache import Cache
from openpi_ar.models.vlm import VLM, Run
from openpi_ar.types import Array, Tokens


@nnx.dataclass
class Generated(nnx.Pytree):
    """Decoded tokens. A row is valid up to and including its EOS; after it come zeros.

    logprobs  log-probability of each token under the model's own softmax over the ids that the constraint allowed: at
              temperature 1 and before `top_k` and `top_p`, however the token was chosen. 0 where it was given.
    margins   by how much each log-probability exceeds that of the next best id (`sampling.certainty`); 0 where it
              was given.
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
        ids, valid = jnp.asarray(ids), jnp.asarray(valid)
        return cls(ids=ids, valid=valid, logprobs=nothing, margins=nothing, steps=jnp.zeros((), jnp.int32))


@nnx.dataclass
class _State(nnx.Pytree):
    """State of the decode loop: a row has chosen `step` tokens, of which `last` is not in the cache yet.

    Rows are at different steps when different parts of their drafts were right. `count`: passes through the model.
    """

    count: Int[Array, ""] = nnx.data()
    step: Int[Array, " B"] = nnx.data()
    last: Int[Array, " B"] = nnx.data()
    done: Bool[Array, " B"] = nnx.data()
    ids: Int[Array, "B M"] = nnx.data()
    valid: Bool[Array, "B M"] = nnx.data()
    logprobs: Float[Array, "B M"] = nnx.data()
    margins: Float[Array, "B M"] = nnx.data()
    constraint: Any = nnx.data()
    cache: Cache = nnx.data()


def generate(
    model: VLM,
    cache: Cache,
    last_hidden: Float[Array, "B D"],
    sampling: Sampling,
    *,
    keys: Array | None = None,
    draft: Tokens | None = None,
    draft_hidden: Float[Array, "B T D"] | None = None,
) -> tuple[Generated, Cache]:
    """Decodes until each row has written EOS or `sampling.max_new_tokens` tokens; `last_hidden` predicts the first.

    EOS ends the text but is not written to the cache: nothing ever attends to it, so the loop stops on the step that
    emits it. (Training marks it `hidden` for the same reason.) `keys`, one per row, are needed unless decoding is
    greedy; a row's text depends on its own key alone.

    A `draft` (from `as_draft`) was the text of the prefill that gave `cache` and its hidden states. Each row keeps the
    tokens that it would have written and goes on from there; the others become holes in the cache. The text is that of
    decoding without a draft. Raises ValueError if the text is not greedy, or if it is not and there are no keys.
    """
    most = sampling.max_new_tokens

    def live(state: _State) -> Array:
        # A text cut off at its budget takes one step more, which writes its last token to the cache and drops the next.
        return ~state.done & (state.step <= most)

    def record(state: _State, logits: Array) -> _State:
        """Chooses a token from constrained logits and records it for unfinished rows; overflow is dropped."""
        on = live(state)
        token = sampling.choose(logits, None if keys is None else jax.vmap(jax.random.fold_in)(keys, state.step))
        here = (jnp.arange(most) == state.step[:, None]) & on[:, None]
        logprob, margin = certainty(logits, token)
        return dataclasses.replace(
            state,
            step=state.step + on,
            last=jnp.where(on, token, 0),
            done=state.done | (on & (token == sampling.eos_id) & (state.step < most)),
            ids=jnp.where(here, token[:, None], state.ids),
            valid=state.valid | here,
            logprobs=jnp.where(here, logprob[:, None], state.logprobs),
            margins=jnp.where(here, margin[:, None], state.margins),
            constraint=sampling.advance(state.constraint, token, on),
        )

    def body(state: _State) -> _State:
        on = live(state)[:, None]
        run = Run(model.embed_text(state.last[:, None]), on, jnp.ones_like(on), jnp.zeros_like(on))
        hidden, cache = model.tower.extend(run, state.cache)
        state = dataclasses.replace(state, count=state.count + 1, cache=cache)
        return record(state, sampling.constrained(model.logits(hidden[:, 0]), state.constraint))

    if draft is None:
        begin = without_draft(model, last_hidden, sampling)
    else:
        begin = check_draft(model, last_hidden, draft, draft_hidden, sampling)
        cache = cache.invalidate(jnp.arange(draft.ids.shape[1]) < begin.agreed[:, None])
    kept = jnp.arange(most) < begin.agreed[:, None]
    start = _State(
        count=jnp.zeros((), jnp.int32),
        step=begin.agreed,
        last=jnp.zeros_like(begin.agreed),
        done=jnp.zeros(kept.shape[0], bool),
        ids=jnp.where(kept, begin.ids, 0),
        valid=kept,
        logprobs=jnp.where(kept, begin.logprobs, 0.0),
        margins=jnp.where(kept, begin.margins, 0.0),
        constraint=begin.constraint,
        cache=cache.reserve(most),
    )
    end = jax.lax.while_loop(lambda s: live(s).any(), body, record(start, begin.logits))
    text = Generated(ids=end.ids, valid=end.valid, logprobs=end.logprobs, margins=end.margins, steps=end.count)
    return text, end.cache.compact()
