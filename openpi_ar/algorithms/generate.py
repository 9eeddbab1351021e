"""Autoregressive text, one token a step: the decode loop."""

import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from openpi_ar.algorithms.draft import check_draft, without_draft
from openpi_ar.algorithms.sampling import Generated, Sampling, certainty
from openpi_ar.models.cache import Cache
from openpi_ar.models.vlm import VLM, Run
from openpi_ar.types import Array, Tokens


@nnx.dataclass
class _State(nnx.Pytree):
    """State of the decode loop: a row has chosen `step` tokens, of which `last` is not in the cache yet.

    Rows are at different steps when different parts of their drafts were right.
    """

    step: Int[Array, " B"] = nnx.data()
    last: Int[Array, " B"] = nnx.data()
    done: Bool[Array, " B"] = nnx.data()
    text: Generated = nnx.data()
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
        text = Generated(
            ids=jnp.where(here, token[:, None], state.text.ids),
            valid=state.text.valid | here,
            logprobs=jnp.where(here, logprob[:, None], state.text.logprobs),
            margins=jnp.where(here, margin[:, None], state.text.margins),
            steps=state.text.steps,
        )
        return dataclasses.replace(
            state,
            step=state.step + on,
            last=jnp.where(on, token, 0),
            done=state.done | (on & (token == sampling.eos_id) & (state.step < most)),
            text=text,
            constraint=sampling.advance(state.constraint, token, on),
        )

    def body(state: _State) -> _State:
        on = live(state)[:, None]
        run = Run(model.embed_text(state.last[:, None]), on, jnp.ones_like(on), jnp.zeros_like(on))
        hidden, cache = model.tower.extend(run, state.cache)
        text = dataclasses.replace(state.text, steps=state.text.steps + 1)
        state = dataclasses.replace(state, text=text, cache=cache)
        return record(state, sampling.constrained(model.logits(hidden[:, 0]), state.constraint))

    if draft is None:
        begin = without_draft(model, last_hidden, sampling)
    else:
        begin = check_draft(model, last_hidden, draft, draft_hidden, sampling)
        cache = cache.invalidate(jnp.arange(draft.ids.shape[1]) < begin.agreed[:, None])
    zero = jnp.zeros_like(begin.agreed)
    start = _State(begin.agreed, zero, zero > 0, begin.text, begin.constraint, cache.reserve(most))
    end = jax.lax.while_loop(lambda s: live(s).any(), body, record(start, begin.logits))
    return end.text, end.cache.compact()
