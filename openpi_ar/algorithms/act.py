"""Talk, then act: the stages of inference as one composition.

    images    the vision tower over all cameras              -> image tokens
    prefill   images, prompt and known text through tower 1  -> hidden states, cache
    text      autoregressive text, one token a step          -> tokens, cache
    reprompt  only where actions see a prompt of their own: it and the image tokens through tower 1  -> cache
    flow      Euler steps of the action tower                -> actions

The keys and values of the text are in the cache when the actions are denoised, so they are conditioned on it at no
extra prefill.
"""

from collections.abc import Callable
from typing import Any

from flax import nnx
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from openpi_ar.algorithms.continuations import Continuations
from openpi_ar.algorithms.draft import as_draft
from openpi_ar.algorithms.flow import Guide, Steps, denoise
from openpi_ar.algorithms.generate import Generated, generate
from openpi_ar.algorithms.prefill import Prefill, prefill
from openpi_ar.algorithms.sampling import Sampling
from openpi_ar.models.cache import Cache
from openpi_ar.models.vlm import VLA, VLM
from openpi_ar.types import Array, Observation, Tokens

STAGES = ("images", "prefill", "text", "reprompt", "flow")
RunStage = Callable[..., Any]
"""`run(name, function, *arguments)` runs one stage. Arguments are pytrees; the function depends on nothing else that
changes from call to call, so it may be jitted once by its name, and timed."""


@nnx.dataclass
class Act(nnx.Pytree):
    """Generated (or given) text, and normalised actions."""

    text: Generated = nnx.data()
    actions: Float[Array, "B A X"] = nnx.data()


def call(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Runs a stage as a plain call: what `act` does by default, for a program that holds all of them."""
    return function(*arguments)


def act(
    model: VLA,
    obs: Observation,
    noise: Float[Array, "B A X"],
    sampling: Sampling,
    *,
    num_steps: Steps | int,
    keys: Array | None = None,
    text: Tokens | None = None,
    draft: tuple[Int[Array, "B _"], Bool[Array, "B _"]] | None = None,
    table: Float[Array, "n m W"] | None = None,
    continuations: Continuations | None = None,
    block: int = 1,
    guide: Guide | None = None,
    run: RunStage = call,
) -> Act:
    """Generates text, then denoises actions that are conditioned on it.

    With `text` the model is given its text, and nothing is decoded; a budget of 0 tokens leaves the text out
    (action-only models). `draft` is any earlier text (ids, valid): the right part of it is not decoded again, the
    result is the same. `keys`, `continuations` and `block` are as in `generate`, `table` (of `flow_table`) and `guide`
    as in `denoise`.
    """
    known = {"text": text, "draft": draft, "continuations": continuations}
    talked = talk(model, obs, sampling, keys=keys, **known, block=block, run=run)
    actions = _flow(model, obs, talked.cache, noise, table, num_steps=num_steps, guide=guide, run=run)
    return Act(text=talked.text, actions=actions)


def act_on(
    model: VLA,
    obs: Observation,
    images: Float[Array, "B _ D"],
    noise: Float[Array, "B A X"],
    *,
    num_steps: Steps | int,
    table: Float[Array, "n m W"] | None = None,
    guide: Guide | None = None,
    run: RunStage = call,
) -> Float[Array, "B A X"]:
    """Actions from the prompt of `obs` alone: that of `reprompt`, with the text in it. `images` are those of `talk`."""

    def read(model: VLM, obs: Observation, images: Array) -> Cache:
        return prefill(model, obs, image_tokens=images, last_only=True)[1]

    cache = run("reprompt", read, model, obs, images)
    return _flow(model, obs, cache, noise, table, num_steps=num_steps, guide=guide, run=run)


def _flow(
    model: VLA,
    obs: Observation,
    cache: Cache,
    noise: Array,
    table: Array | None,
    *,
    num_steps: Steps | int,
    guide: Guide | None,
    run: RunStage,
) -> Array:
    def flow(model: VLA, obs: Observation, cache: Cache, noise: Array, table: Array | None) -> Array:
        return denoise(model, obs, cache, noise, num_steps=num_steps, table=table, guide=guide)

    return run("flow", flow, model, obs, cache, noise, table)


@nnx.dataclass
class Talk(nnx.Pytree):
    """Generated (or given) text, the cache with it, and the tokens of the images."""

    text: Generated = nnx.data()
    cache: Cache = nnx.data()
    images: Float[Array, "B _ D"] = nnx.data()


def talk(
    model: VLM,
    obs: Observation,
    sampling: Sampling,
    *,
    keys: Array | None = None,
    text: Tokens | None = None,
    draft: tuple[Int[Array, "B _"], Bool[Array, "B _"]] | None = None,
    continuations: Continuations | None = None,
    block: int = 1,
    run: RunStage = call,
) -> Talk:
    """The stages before the actions. Arguments as in `act`."""
    images = run("images", lambda model, obs: model.embed_images(obs), model, obs)
    known = text
    if text is None and draft is not None and sampling.max_new_tokens:
        known = as_draft(*draft, sampling)

    def read(model: VLM, obs: Observation, known: Tokens | None, images: Array) -> tuple[Prefill, Cache]:
        return prefill(model, obs, known, image_tokens=images, last_only=True)

    def write(
        model: VLM,
        cache: Cache,
        out: Prefill,
        sampling: Sampling,
        keys: Array | None,
        draft: Tokens | None,
        likely: Any,
    ) -> Any:
        known = {"draft": draft, "draft_hidden": out.text, "continuations": likely, "block": block}
        return generate(model, cache, out.prompt_last, sampling, keys=keys, **known)

    out, cache = run("prefill", read, model, obs, known, images)
    if text is not None:
        return Talk(text=Generated.given(text.ids, text.valid), cache=cache, images=images)
    if not sampling.max_new_tokens:
        batch = out.prompt_last.shape[0]
        nothing = Generated.given(jnp.zeros((batch, 0), jnp.int32), jnp.zeros((batch, 0), bool))
        return Talk(text=nothing, cache=cache, images=images)
    generated, cache = run("text", write, model, cache, out, sampling, keys, known, continuations)
    return Talk(text=generated, cache=cache, images=images)
