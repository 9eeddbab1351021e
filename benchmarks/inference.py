"""Inference by stages: vision, prefill, decoding per token, denoising, and text with actions as one program."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import baseline
from benchmarks.sizes import Size, make_model, make_observation
from benchmarks.timing import Program, compile_program, run_in_turns
from openpi_ar.algorithms.act import act
from openpi_ar.algorithms.choice import choose
from openpi_ar.algorithms.continuations import Continuations
from openpi_ar.algorithms.flow import denoise
from openpi_ar.algorithms.generate import Generated, generate
from openpi_ar.algorithms.prefill import prefill
from openpi_ar.algorithms.sampling import AllowedIds, Sampling
from openpi_ar.models.vlm import VLA, embed_tokens
from openpi_ar.types import Array, Kind, Observation, Tokens

Programs = dict[str, dict[str, Program]]
"""By stage, then "ours" and "baseline"."""

BLOCK = 8
"""Tokens of a pass where it is known how the text may go on: the default of `decode.block`."""
_NO_EOS = -1


def sampling_of(size: Size) -> Sampling:
    """Greedy text of a fixed length. Which ids are allowed is an argument of the programs, as nothing is known of it
    when they are compiled."""
    allowed = AllowedIds(jnp.ones(size.model.vocab_size, bool))
    return Sampling(eos_id=_NO_EOS, max_new_tokens=size.tokens, constraint=allowed)


def certain(text: Generated) -> tuple[Array, Array, Array, Array]:
    """What a policy reads of a text: ids, how sure the model is of them, passes."""
    return text.ids, text.logprobs, text.margins, text.steps


class Ours:
    """The fast path as functions of (model, arrays), settings bound."""

    def __init__(self, size: Size):
        self.size = size

    def prepare(self, model: VLA) -> Any:
        return model.for_inference()

    def prefill(self, model: VLA, obs: Observation, images: Array) -> Any:
        out, cache = prefill(model, obs, image_tokens=images, last_only=True)
        return out.prompt_last, cache

    def generate(self, model: VLA, cache: Any, last: Array, sampling: Sampling) -> Any:
        text, cache = generate(model, cache, last, sampling)
        return certain(text), cache

    def step(self, model: VLA, cache: Any, ids: Array, sampling: Sampling) -> Any:
        """One pass over these tokens of one row, and the choice after each."""
        run = embed_tokens(model, Tokens.of(ids, kind=Kind.SUBTASK, causal=True))
        hidden, _ = model.tower.extend(run, cache.reserve(ids.shape[1]))
        return choose(model, hidden[0], sampling, ())

    def denoise(self, model: VLA, obs: Observation, cache: Any, noise: Array) -> Array:
        return denoise(model, obs, cache, noise, num_steps=self.size.steps)

    def whole(self, model: VLA, obs: Observation, noise: Array, sampling: Sampling, draft: Any, table: Any) -> Any:
        """Text and actions; with the last text as a draft, and a table of texts, if there are any."""
        known = {"draft": draft, "continuations": table, "block": BLOCK}
        out = act(model, obs, noise, sampling, num_steps=self.size.steps, **known)
        return certain(out.text), out.actions


def close(ours: Array, theirs: Array, dtype: str) -> float:
    """Largest difference; AssertionError if it is more than another order of summation explains."""
    gap = float(jnp.max(jnp.abs(jnp.asarray(ours, jnp.float32) - jnp.asarray(theirs, jnp.float32))))
    assert gap < (2e-3 if dtype == "float32" else 0.2), f"the two paths differ by {gap}"
    return gap


def programs(size: Size, dtype: str, *, batch: int = 1) -> tuple[Programs, dict[str, float]]:
    """All stages compiled for both, and how far their results are apart."""
    model, obs = make_model(size.model, dtype), make_observation(size, batch=batch)
    cfg, n, last_only = size.model, size.tokens, size.last_logits
    noise = jax.random.normal(jax.random.key(2), (batch, cfg.action_horizon, cfg.action_dim))
    ours, sampling = Ours(size), sampling_of(size)
    fast = ours.prepare(model)
    found: Programs = {}

    def add(stage: str, our: tuple[Any, ...], their: tuple[Any, ...]) -> tuple[Any, Any]:
        found[stage] = {"ours": compile_program(*our), "baseline": compile_program(*their)}
        return found[stage]["ours"].call(), found[stage]["baseline"].call()

    seen, seen0 = add(
        "vision", (lambda m, o: m.embed_images(o), fast, obs), (lambda m, o: baseline.embed_images(m, o), model, obs)
    )
    gaps = {"vision": close(seen, seen0, dtype)}

    def prefill0(m: VLA, o: Observation, images: Array) -> Any:
        hidden, cache = baseline.prefill(m, o, images=images, room=n)
        return baseline.first_logits(m, hidden, last=last_only), cache

    (last, cache), (logits0, cache0) = add("prefill", (ours.prefill, fast, obs, seen), (prefill0, model, obs, seen))
    gaps["prefill"] = close(jax.jit(lambda m, x: m.logits(x))(fast, last), logits0[:, 0], dtype)
    ((ids, *_), after), (ids0, cache0) = add(
        "token",
        (ours.generate, fast, cache, last, sampling),
        (lambda m, c, x: baseline.generate(m, c, x, n), model, cache0, logits0),
    )
    # In bfloat16 the two orders of summation may tie differently.
    assert dtype != "float32" or jnp.array_equal(ids, ids0), f"generated {ids} and {ids0}"
    if batch == 1:
        tokens = {"ours": ids[:, :1], f"ours, {BLOCK} tokens": jnp.resize(ids, (1, BLOCK))}
        found["pass"] = {k: compile_program(ours.step, fast, cache, x, sampling) for k, x in tokens.items()}
    actions, actions0 = add(
        "denoise",
        (ours.denoise, fast, obs, after, noise),
        (lambda m, o, c, x: baseline.denoise(m, o, c, x, size.steps), model, obs, cache0, noise),
    )
    gaps["denoise"] = close(actions, actions0, dtype)
    ((ids, *_), actions), whole0 = add(
        "text_and_actions",
        (ours.whole, fast, obs, noise, sampling, None, None),
        (lambda m, o, x: baseline.text_and_actions(m, o, x, n, size.steps, last=last_only), model, obs, noise),
    )
    gaps["text_and_actions"] = close(actions, whole0[1], dtype)
    # The same baseline program serves all rows: it has no use for a draft or a table.
    for name, (draft, table, passes) in known_texts(ids, n).items():
        program = compile_program(ours.whole, fast, obs, noise, sampling, (draft, jnp.ones(draft.shape, bool)), table)
        found["text_and_actions"][f"ours, {name}"] = program
        (again, *_, steps), actions = program.call()
        assert dtype != "float32" or int(steps) == passes, f"{name}: {steps} passes in place of {passes}"
        assert dtype != "float32" or jnp.array_equal(again, whole0[0]), f"{name}: the text has changed"
        gaps[f"text_and_actions, {name}"] = close(actions, whole0[1], dtype)
    return found, gaps


def known_texts(ids: Array, tokens: int) -> dict[str, tuple[Array, Continuations | None, int]]:
    """(draft, table of texts, passes that are left) where the draft is right, and where it is wrong from its first
    token on but the table knows the text."""
    rows = np.asarray(ids).tolist()
    table = Continuations.of([*([t ^ 1 for t in row] for row in rows), *rows], tokens, _NO_EOS, rows=16)
    return {"right draft": (ids, None, 0), "known text": (ids ^ 1, table, math.ceil(tokens / BLOCK))}


def run(size: Size, dtype: str, seconds: float) -> tuple[Programs, dict[str, float], dict[str, float]]:
    """(programs with their times, ratios baseline / ours, gaps)."""
    found, gaps = programs(size, dtype)
    for pair in found.values():
        run_in_turns(pair, seconds=seconds)
    whole, step = found["text_and_actions"], found["pass"]
    ratios = {
        "decode_token": found["token"]["baseline"].median / found["token"]["ours"].median,
        "denoise": found["denoise"]["baseline"].median / found["denoise"]["ours"].median,
        "text_and_actions": whole["baseline"].median / whole["ours"].median,
        "text_and_actions_draft": whole["baseline"].median / whole["ours, right draft"].median,
        "text_and_actions_known": whole["baseline"].median / whole["ours, known text"].median,
        # Of our own: what a pass of a block costs, in passes of one token.
        "block": step[f"ours, {BLOCK} tokens"].median / step["ours"].median,
    }
    return found, ratios, gaps
