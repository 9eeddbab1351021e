"""Autoregressive text: the decode loop, one token a step, or several where it is known how a text may go on."""

import dataclasses
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from openpi_ar.algorithms.choice import Choice, choose, choose_along
from openpi_ar.algorithms.continuations import Continuations, joined
from openpi_ar.algorithms.draft import check_draft, constraint_states, without_draft
from openpi_ar.algorithms.sampling import Generated, Sampling
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
    continuations: Continuations | None = None,
    block: int = 8,
) -> tuple[Generated, Cache]:
    """Decodes until each row has written EOS or `sampling.max_new_tokens` tokens; `last_hidden` predicts the first.

    EOS ends the text but is not written to the cache: nothing ever attends to it, so the loop stops on the step that
    emits it. (Training marks it `hidden` for the same reason.) `keys`, one per row, are needed unless decoding is
    greedy; a row's text depends on its own key alone.

    A `draft` (from `as_draft`) was the text of the prefill that gave `cache` and its hidden states. Each row keeps the
    tokens that it would have written and goes on from there; the others become holes in the cache. The text is that of
    decoding without a draft.

    With `continuations` a pass carries up to `block` tokens where the table knows how a text may go on: those that the
    model would have chosen itself are kept. The text is the same, in fewer passes. The table matters to nothing else.
    So it is without a table where a constraint that lists the ids which may come next (`sampling.FewIds`) leaves no
    choice.

    Raises ValueError if a draft or continuations are given and the text is not greedy, or if it is not and there are no
    keys.
    """
    most = sampling.max_new_tokens
    if continuations is not None and not sampling.greedy:
        raise ValueError("continuations are checked against greedy text")
    blocks = block > 1 and sampling.greedy and (continuations is not None or sampling.lists)

    def live(state: _State) -> Array:
        # A text cut off at its budget takes one step more, which writes its last token to the cache and drops the next.
        return ~state.done & (state.step <= most)

    def record(state: _State, choices: Choice, agreed: Array, states: Any) -> _State:
        """Records the first `agreed` + 1 of the choices [B T] of unfinished rows; overflow is dropped.

        `states` [T ...] are those of the constraint before each.
        """
        on, batch = live(state), jnp.arange(agreed.shape[0])
        at = jnp.arange(most) - state.step[:, None]
        here = (at >= 0) & (at <= agreed[:, None]) & on[:, None]
        place = jnp.clip(at, 0, choices.ids.shape[1] - 1)
        old = (state.text.ids, state.text.logprobs, state.text.margins)
        ids, logprobs, margins = (
            jnp.where(here, jnp.take_along_axis(new, place, axis=1), x) for new, x in zip(choices, old, strict=True)
        )
        token = choices.ids[batch, agreed]
        before = jax.tree.map(lambda s: s[agreed, batch], states)
        return dataclasses.replace(
            state,
            step=state.step + jnp.where(on, agreed + 1, 0),
            last=jnp.where(on, token, 0),
            done=state.done | (on & (token == sampling.eos_id) & (state.step + agreed < most)),
            text=Generated(ids, state.text.valid | here, logprobs, margins, state.text.steps),
            constraint=sampling.advance(before, token, on),
        )

    def record_one(state: _State, choice: Choice) -> _State:
        """Records one token [B] of each row."""
        states = jax.tree.map(lambda s: s[None], state.constraint)
        return record(state, Choice(*(x[:, None] for x in choice)), jnp.zeros_like(choice.ids), states)

    def step_keys(step: Array) -> Array | None:
        return None if keys is None else jax.vmap(jax.random.fold_in)(keys, step)

    def forward(state: _State, ids: Array, valid: Array) -> tuple[Array, _State]:
        run = Run(model.embed_text(ids), valid, jnp.ones_like(valid), jnp.zeros_like(valid))
        hidden, cache = model.tower.extend(run, state.cache)
        text = dataclasses.replace(state.text, steps=state.text.steps + 1)
        return hidden, dataclasses.replace(state, text=text, cache=cache)

    def one_token(state: _State) -> _State:
        hidden, state = forward(state, state.last[:, None], live(state)[:, None])
        return record_one(state, choose(model, hidden[:, 0], sampling, state.constraint, step_keys(state.step)))

    def one_block(state: _State, proposal: Array, proposed: Array) -> _State:
        """Checks the proposed tokens and records those that are the model's own choice, and its next one."""
        on = live(state)
        ids = jnp.concatenate([state.last[:, None], proposal], axis=1)
        given = jnp.concatenate([on[:, None], proposed], axis=1)
        hidden, state = forward(state, ids, given)
        states = constraint_states(sampling, state.constraint, proposal)
        choices = choose_along(model, hidden, given, sampling, states)
        agreed = jnp.cumprod((choices.ids[:, :-1] == proposal) & proposed, axis=1, dtype=jnp.int32).sum(-1)
        cache = state.cache.retract(block, jnp.where(on, agreed + 1, 0))
        return record(dataclasses.replace(state, cache=cache), choices, agreed, states)

    def propose(state: _State) -> tuple[Array, Array]:
        """(tokens after the last one, which are proposed): those that must come, and what the table knows."""
        forced = sampling.forced(state.constraint, block - 1)
        known = None if continuations is None else continuations.propose(state.text.ids, state.step, block - 1)
        return functools.reduce(joined, [p for p in (forced, known) if p is not None])

    def body(state: _State) -> _State:
        if not blocks:
            return one_token(state)
        (proposal, proposed), on = propose(state), live(state)[:, None]
        proposed &= on & (jnp.arange(block - 1) < most - state.step[:, None])  # not past the budget
        # Rejected tokens take slots where another row keeps more: there must be room for the rest token by token.
        left = most + 1 - jnp.where(on[:, 0], state.step, most).min()
        room = state.cache.fill + block + left <= state.cache.valid.shape[1]
        return jax.lax.cond(proposed.any() & room, lambda s: one_block(s, proposal, proposed), one_token, state)

    if draft is None:
        begin = without_draft(model, last_hidden, sampling, step_keys(jnp.zeros(last_hidden.shape[0], jnp.int32)))
    else:
        begin = check_draft(model, last_hidden, draft, draft_hidden, sampling)
        cache = cache.invalidate(jnp.arange(draft.ids.shape[1]) < begin.agreed[:, None])
    zero = jnp.zeros_like(begin.agreed)
    spare = 2 * block if blocks else 0
    start = _State(begin.agreed, zero, zero > 0, begin.text, begin.constraint, cache.reserve(most + spare))
    end = jax.lax.while_loop(lambda s: live(s).any(), body, record_one(start, begin.choice))
    return end.text, end.cache.compact()
