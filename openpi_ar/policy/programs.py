"""The policy's compiled programs: talk-and-act in one, and its stages apart, for timing; what warms them up."""

from collections.abc import Callable
import dataclasses
from functools import partial
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from openpi_ar.algorithms.act import Act, RunStage, act, act_on, call, talk
from openpi_ar.algorithms.continuations import Continuations
from openpi_ar.algorithms.flow import Steps
from openpi_ar.algorithms.generate import Generated
from openpi_ar.algorithms.prefill import prefill
from openpi_ar.algorithms.sampling import Sampling
from openpi_ar.algorithms.score import score
from openpi_ar.config import InferenceConfig
from openpi_ar.model_config import ModelConfig
from openpi_ar.models.vlm import VLA
from openpi_ar.types import Array, Observation, Tokens

Draft = tuple[Array, Array]
"""ids and valid [B M] of texts that may be generated again; nothing valid: no draft."""


class Drawn(NamedTuple):
    """Random numbers of one call, row by row.

    next_keys  data of the keys of the sessions' next call [B k].
    text_keys  data of the keys that text is sampled with [B k].
    noise      [B A X].
    """

    next_keys: Array
    text_keys: Array
    noise: Array


class Stages:
    """Runs the stages of a composition as programs of their own (`algorithms.act`), and times them."""

    def __init__(self):
        self._programs: dict[str, Callable[..., Any]] = {}

    def timed(self) -> tuple[Callable[..., Any], dict[str, float]]:
        """The composition's `run`, and the milliseconds of each stage that it has run."""
        ms: dict[str, float] = {}

        def run(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
            began = time.perf_counter()
            value = jax.block_until_ready(self._programs.setdefault(name, jax.jit(function))(*arguments))
            ms[name] = milliseconds(time.perf_counter() - began)
            return value

        return run, ms


def milliseconds(seconds: float) -> float:
    """Rounded to microseconds."""
    return round(1000 * seconds, 3)


def inference_dtype(wanted: str) -> str:
    """`auto` is float32 on CPU, where one-row bfloat16 matmuls are 2 to 13 times slower, and bfloat16 elsewhere."""
    if wanted != "auto":
        return wanted
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def resizes_on_device(wanted: str) -> bool:
    """`auto`: where there is a device besides the CPU. There the resize costs the control loop nothing."""
    return wanted == "device" or (wanted == "auto" and jax.default_backend() != "cpu")


def blank_observation(
    cfg: ModelConfig, batch: int, cameras: int, prompt: int, image_size: tuple[int, int] | None = None
) -> Observation:
    """Black images (None: of the model's size) and a prompt that fills its slots, to compile and warm up with."""
    return Observation(
        images=np.zeros((batch, cameras, *(image_size or cfg.siglip.image_size), 3), np.uint8),
        image_mask=np.ones((batch, cameras), bool),
        prompt=Tokens.of(np.zeros((batch, prompt), np.int32)),
        state=np.zeros((batch, cfg.state_dim), np.float32),
    )


class Programs:
    """Jitted functions of a model in its inference form (`for_inference`).

    Args:
        cfg: denoising steps, action sizes.
        sampling: of the text before actions; its budget is 0 for models that only act.
        answers: texts are scored by its probabilities.
    """

    def __init__(self, cfg: InferenceConfig, sampling: Sampling, answers: Sampling):
        self._steps, self._sampling, self._answers = Steps.of(cfg.decode), sampling, answers
        self.budget = sampling.max_new_tokens
        self.drafts = cfg.decode.draft and sampling.greedy and self.budget > 0
        self._block = cfg.decode.block
        self.expects = self._block > 1 and sampling.greedy and self.budget > 0
        self.chunk = (cfg.model.action_horizon, cfg.model.action_dim)
        self.draw, self.score = jax.jit(self._draw), jax.jit(self._score)
        self._compiled: list[Callable[..., Any]] = [jax.jit(f) for f in (self._act, self._talk, self._act_on)]
        self._acting = Stages()

    def denoising(self, cfg: InferenceConfig) -> "Programs":
        """The same for another way of denoising."""
        return Programs(cfg, self._sampling, self._answers)

    def act(
        self,
        model: VLA,
        obs: Observation,
        keys: Array,
        noise: Array,
        text: Tokens | None = None,
        draft: Draft | None = None,
        table: Array | None = None,
        likely: Continuations | None = None,
        *,
        prompts: Callable[[Generated], Tokens] | None = None,
        timing: bool = False,
    ) -> tuple[Act, dict[str, float]]:
        """Text and actions, as one program; with `timing` as one for each stage, and their milliseconds.

        Where the actions see a prompt of their own, `prompts` makes it of the text, on the host: two programs.
        """
        functions: list[Callable[..., Any]] = self._compiled
        ms: dict[str, float] = {}
        if timing:
            run, ms = self._acting.timed()
            functions = [partial(f, run=run) for f in (self._act, self._talk, self._act_on)]
        together, talk, act_on = functions
        if prompts is None:
            return together(model, obs, keys, noise, text, draft, table, likely), ms
        generated, images = talk(model, obs, keys, text, draft, likely)
        own = dataclasses.replace(obs, prompt=prompts(generated))
        return Act(text=generated, actions=act_on(model, own, images, noise, table)), ms

    def _talk(
        self,
        model: VLA,
        obs: Observation,
        keys: Array,
        text: Tokens | None,
        draft: Draft | None,
        likely: Continuations | None,
        run: RunStage = call,
    ) -> tuple[Generated, Array]:
        known = {"text": text, "draft": draft, "continuations": likely, "block": self._block}
        out = talk(model, obs, self._sampling, keys=wrapped_keys(self._sampling, keys), **known, run=run)
        return out.text, out.images

    def _act_on(
        self, model: VLA, obs: Observation, images: Array, noise: Array, table: Array | None, run: RunStage = call
    ) -> Array:
        return act_on(model, obs, images, noise, num_steps=self._steps, table=table, run=run)

    def _score(self, model: VLA, obs: Observation, texts: Tokens) -> Array:
        """Log-probabilities [N T] of the tokens of each text, for the one observation."""
        out, cache = prefill(model, obs, last_only=True)
        return score(model, cache, out.prompt_last, texts, self._answers)

    def _draw(self, keys: Array) -> Drawn:
        """Splits the rows' keys (their data, [B k]), each row by itself, so that none depends on its batch."""
        split = jax.vmap(jax.random.split)
        after = split(jax.random.wrap_key_data(jnp.asarray(keys)))
        now = split(after[:, 1])
        noise = jax.vmap(lambda key: jax.random.normal(key, self.chunk))(now[:, 1])
        return Drawn(jax.random.key_data(after[:, 0]), jax.random.key_data(now[:, 0]), noise)

    def _act(
        self,
        model: VLA,
        obs: Observation,
        keys: Array,
        noise: Array,
        text: Tokens | None,
        draft: Draft | None,
        table: Array | None,
        likely: Continuations | None,
        run: RunStage = call,
    ) -> Act:
        options = {"keys": wrapped_keys(self._sampling, keys), "text": text, "draft": draft, "table": table, "run": run}
        known = {"continuations": likely, "block": self._block}
        return act(model, obs, noise, self._sampling, num_steps=self._steps, **options, **known)


def wrapped_keys(sampling: Sampling, keys: Array) -> Array | None:
    """The rows' keys from their data; None where nothing is drawn."""
    return None if sampling.greedy else jax.random.wrap_key_data(jnp.asarray(keys))


def stacked_drafts(drafts: list[tuple[np.ndarray, np.ndarray] | None], budget: int) -> Draft:
    """Drafts of a batch's rows, cut to the budget; empty for rows without one, so that one program serves all calls."""
    ids, valid = np.zeros((len(drafts), budget), np.int32), np.zeros((len(drafts), budget), bool)
    for row, draft in enumerate(drafts):
        if draft is not None:
            n = min(budget, len(draft[0]))
            ids[row, :n], valid[row, :n] = draft[0][:n], draft[1][:n]
    return ids, valid
