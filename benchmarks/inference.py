"""Inference by stages: vision, prefill, decoding per token, denoising, and text with actions as one program."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import baseline
from benchmarks.sizes import Size, make_model, make_observation
from benchmarks.timing import Program, compile_program, run_in_turns
from openpi_ar.algorithms.act import act
from openpi_ar.algorithms.flow import denoise
from openpi_ar.algorithms.generate import generate
from openpi_ar.algorithms.prefill import prefill
from openpi_ar.algorithms.sampling import AllowedIds, Sampling
from openpi_ar.models.vlm import VLA
from openpi_ar.types import Array, Observation

Programs = dict[str, dict[str, Program]]
"""By stage, then "ours" and "baseline"."""

_NO_EOS = -1


class Ours:
    """The fast path as functions of (model, arrays), settings bound."""

    def __init__(self, size: Size):
        self.size = size
        allowed = AllowedIds(np.ones(size.model.vocab_size, bool))
        self.sampling = Sampling(eos_id=_NO_EOS, max_new_tokens=size.tokens, constraint=allowed)

    def prepare(self, model: VLA) -> Any:
        return model.for_inference()

    def prefill(self, model: VLA, obs: Observation, images: Array) -> Any:
        out, cache = prefill(model, obs, image_tokens=images, last_only=True)
        return out.prompt_last, cache

    def generate(self, model: VLA, cache: Any, last: Array) -> Any:
        text, cache = generate(model, cache, last, self.sampling)
        return text.ids, cache

    def denoise(self, model: VLA, obs: Observation, cache: Any, noise: Array) -> Array:
        return denoise(model, obs, cache, noise, num_steps=self.size.steps)

    def whole(self, model: VLA, obs: Observation, noise: Array) -> Any:
        out = act(model, obs, noise, self.sampling, num_steps=self.size.steps)
        return out.text.ids, out.actions

    def drafted(self, model: VLA, obs: Observation, noise: Array, draft: Any) -> Any:
        """`whole` with the previous text as a draft."""
        out = act(model, obs, noise, self.sampling, num_steps=self.size.steps, draft=draft)
        return out.text.ids, out.actions, out.text.steps


def close(ours: Array, theirs: Array, dtype: str) -> float:
    """Largest difference; AssertionError if it is more than another order of summation explains."""
    gap = float(jnp.max(jnp.abs(jnp.asarray(ours, jnp.float32) - jnp.asarray(theirs, jnp.float32))))
    assert gap < (2e-3 if dtype == "float32" else 0.2), f"the two paths differ by {gap}"
    return gap


def programs(size: Size, dtype: str, *, batch: int = 1) -> tuple[Programs, dict[str, float]]:
    """All stages compiled for both, and how far their results are apart."""
    model, obs = make_model(size.model, dtype), make_observation(size, batch=batch)
    cfg, n = size.model, size.tokens
    noise = jax.random.normal(jax.random.key(2), (batch, cfg.action_horizon, cfg.action_dim))
    ours = Ours(size)
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
        return baseline.first_logits(m, hidden), cache

    (last, cache), (logits0, cache0) = add("prefill", (ours.prefill, fast, obs, seen), (prefill0, model, obs, seen))
    gaps["prefill"] = close(jax.jit(lambda m, x: m.logits(x))(fast, last), logits0[:, 0], dtype)
    (ids, cache), (ids0, cache0) = add(
        "token",
        (ours.generate, fast, cache, last),
        (lambda m, c, x: baseline.generate(m, c, x, n), model, cache0, logits0),
    )
    # In bfloat16 the two orders of summation may tie differently.
    assert dtype != "float32" or jnp.array_equal(ids, ids0), f"generated {ids} and {ids0}"
    actions, actions0 = add(
        "denoise",
        (ours.denoise, fast, obs, cache, noise),
        (lambda m, o, c, x: baseline.denoise(m, o, c, x, size.steps), model, obs, cache0, noise),
    )
    gaps["denoise"] = close(actions, actions0, dtype)
    whole, whole0 = add(
        "text_and_actions",
        (ours.whole, fast, obs, noise),
        (lambda m, o, x: baseline.text_and_actions(m, o, x, n, size.steps), model, obs, noise),
    )
    gaps["text_and_actions"] = close(whole[1], whole0[1], dtype)
    # The same baseline program serves both rows: it has no use for a draft.
    right = compile_program(ours.drafted, fast, obs, noise, (whole[0], jnp.ones(whole[0].shape, bool)))
    found["text_and_actions"]["ours, right draft"] = right
    ids, actions, steps = right.call()
    assert dtype != "float32" or int(steps) == 0, f"a right draft took {steps} steps"
    assert dtype != "float32" or jnp.array_equal(ids, whole0[0]), "the draft changed the text"
    gaps["text_and_actions_draft"] = close(actions, whole0[1], dtype)
    return found, gaps


def run(size: Size, dtype: str, seconds: float) -> tuple[Programs, dict[str, float], dict[str, float]]:
    """(programs with their times, ratios baseline / ours, gaps)."""
    found, gaps = programs(size, dtype)
    for pair in found.values():
        run_in_turns(pair, seconds=seconds)
    ratio = {stage: pair["baseline"].median / pair["ours"].median for stage, pair in found.items()}
    ratios = {
        "decode_token": ratio["token"],
        "denoise": ratio["denoise"],
        "text_and_actions": ratio["text_and_actions"],
        "text_and_actions_draft": found["text_and_actions"]["baseline"].median
        / found["text_and_actions"]["ours, right draft"].median,
    }
    return found, ratios, gaps
