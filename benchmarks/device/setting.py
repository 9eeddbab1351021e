"""A model with random weights, its inputs, and what is timed on it: pairs of our program and the baseline's."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import baseline
from benchmarks.device.weights import random_tree
from benchmarks.roofline import Roofline, Work
from benchmarks.sizes import Size, make_observation
from benchmarks.timing import Program, compile_program
from openpi_ar.algorithms.act import Act, act
from openpi_ar.algorithms.continuations import Continuations
from openpi_ar.algorithms.flow import denoise
from openpi_ar.algorithms.generate import generate
from openpi_ar.algorithms.prefill import prefill
from openpi_ar.algorithms.sampling import AllowedIds, Sampling
from openpi_ar.compilation import counted, run_once
from openpi_ar.models import family
from openpi_ar.models.vlm import VLA
from openpi_ar.types import Array, Observation

CHUNKS, BLOCK = 8, 8
_NO_EOS = -1


@dataclasses.dataclass(frozen=True)
class Call:
    """A function and its arguments; the name is that of its compiled program."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


def nothing(*results: Any) -> dict[str, Any]:
    """No figures."""
    return {}


@dataclasses.dataclass(frozen=True)
class Row:
    """One figure: our program and the baseline's (made when it is asked for), and the least work that it takes.

    share    what the time is divided by, given our result.
    compare  figures from both results; without a baseline from ours.
    """

    ours: Call
    baseline: Callable[[], Call] | None
    work: Work
    share: Callable[[Any], int] = lambda result: 1
    compare: Callable[..., dict[str, Any]] = nothing

    @property
    def alone(self) -> "Row":
        """Without the baseline, and what compares with it."""
        return self if self.baseline is None else dataclasses.replace(self, baseline=None, compare=nothing)


def apart(ours: Array, theirs: Array) -> dict[str, Any]:
    return {"largest_difference": float(jnp.abs(ours - theirs).max())}


class Setting:
    """Makes rows by their names (`ROWS`). `model` changes the configuration.

    float32 on a CPU, as policies compute there, bfloat16 elsewhere.
    """

    def __init__(self, size: Size, model: dict[str, Any], *, rows: int = 1, cameras: int | None = None):
        cpu = jax.default_backend() == "cpu"
        self.dtype = "float32" if cpu else "bfloat16"
        cfg = dataclasses.replace(size.model, dtype=self.dtype, **model)
        self.size, self.cfg = dataclasses.replace(size, model=cfg), cfg
        self.cameras = len(cfg.cameras) if cameras is None else cameras
        self.prefix = self.cameras * cfg.siglip.num_tokens + size.prompt
        self.obs = make_observation(self.size, batch=rows, cameras=self.cameras)
        self.noise = jax.random.normal(jax.random.key(2), (rows, cfg.action_horizon, cfg.action_dim))
        # An argument of the programs, as in a policy: nothing of it is known when they are compiled.
        allowed = AllowedIds(jnp.ones(cfg.vocab_size, bool))
        self.sampling = Sampling(eos_id=_NO_EOS, max_new_tokens=size.tokens, constraint=allowed)
        self.roofline = Roofline(cfg, rows, 4 if cpu else 2)
        self._programs: dict[str, tuple[Program, bool]] = {}

    def program(self, call: Call) -> tuple[Program, bool]:
        """The compiled program of a call, and whether it was read from the cache of an earlier process."""
        if call.name not in self._programs:
            with counted() as found:
                program = compile_program(call.function, *call.arguments)
            self._programs[call.name] = program, found.read > 0
        return self._programs[call.name]

    def result(self, call: Call) -> Any:
        return self.program(call)[0].call()

    @functools.cached_property
    def model(self) -> VLA:
        """Stacked layers, as the baseline reads them."""
        return random_tree(family.abstract(self.cfg), self.dtype)

    @functools.cached_property
    def fast(self) -> VLA:
        """The inference form."""
        return run_once(lambda m: m.for_inference(), self.model)

    def sharing(self, *, rows: int = 1, cameras: int | None = None) -> "Setting":
        """The same model before other inputs."""
        other = Setting(self.size, {}, rows=rows, cameras=cameras)
        other.__dict__ |= {"model": self.model, "fast": self.fast}
        return other

    # ---- intermediate results, each by the program that is timed -----------------------------------------------------

    @functools.cached_property
    def images(self) -> Array:
        return self.result(self.vision().ours)

    @functools.cached_property
    def prefilled(self) -> tuple[Array, Any]:
        """(hidden state that predicts the first token, cache)."""
        return self.result(self.prefill().ours)

    @functools.cached_property
    def prefilled0(self) -> tuple[Array, Any]:
        """(logits of the first token, cache with room) of the baseline."""
        baseline = self.prefill().baseline
        assert baseline is not None
        return self.result(baseline())

    @functools.cached_property
    def text(self) -> Array:
        """Greedy ids [B M]."""
        return self.result(self.text_and_actions().ours).text.ids

    def _whole(self, m: VLA, o: Observation, x: Array, sampling: Sampling, draft: Any = None) -> Act:
        return act(m, o, x, sampling, num_steps=self.size.steps, draft=draft)

    # ---- rows --------------------------------------------------------------------------------------------------------

    def actions(self) -> Row:
        """Images and prompt to actions, no text."""
        silent, steps = Sampling(eos_id=_NO_EOS, max_new_tokens=0), self.size.steps

        def ours(m: VLA, o: Observation, x: Array) -> Array:
            return act(m, o, x, silent, num_steps=steps).actions

        def theirs(m: VLA, o: Observation, x: Array) -> Array:
            return baseline.denoise(m, o, baseline.prefill(m, o)[1], x, steps)

        work = self.roofline.vision(self.cameras) + self.roofline.prefill(self.prefix)
        work += self.roofline.denoise(self.prefix, steps)
        inputs = (self.obs, self.noise)
        return Row(
            Call("actions", ours, (self.fast, *inputs)),
            lambda: Call("actions0", theirs, (self.model, *inputs)),
            work,
            compare=apart,
        )

    def text_and_actions(self) -> Row:
        """The text first, then actions that are conditioned on it."""
        n, steps = self.size.tokens, self.size.steps

        def theirs(m: VLA, o: Observation, x: Array) -> Any:
            return baseline.text_and_actions(m, o, x, n, steps, last=True)

        def compare(a: Act, b: Any) -> dict[str, Any]:
            return {"same_tokens": float((a.text.ids == b[0]).mean()), **apart(a.actions, b[1])}

        work = self.actions().work + self.roofline.token(self.prefix + n // 2).times(n)
        inputs = (self.obs, self.noise)
        return Row(
            Call("whole", self._whole, (self.fast, *inputs, self.sampling)),
            lambda: Call("whole0", theirs, (self.model, *inputs)),
            work,
            compare=compare,
        )

    def right_draft(self) -> Row:
        """The same with the text itself as the draft: it is checked, not decoded (in bfloat16 up to ties)."""
        draft = (self.text, jnp.ones(self.text.shape, bool))
        call = Call("drafted", self._whole, (self.fast, self.obs, self.noise, self.sampling, draft))
        # The prefix's prefill reads the weights: the draft adds FLOPs and the reading of the head.
        more = Work(self.roofline.prefill(self.size.tokens).flops, self.cfg.vocab_size * self.cfg.vlm.width * 2)
        return Row(call, None, self.actions().work + more, compare=lambda out: {"steps": int(out.text.steps)})

    def vision(self) -> Row:
        def ours(m: VLA, o: Observation) -> Array:
            return m.embed_images(o)

        return Row(
            Call("vision", ours, (self.fast, self.obs)),
            lambda: Call("vision0", baseline.embed_images, (self.model, self.obs)),
            self.roofline.vision(self.cameras),
            compare=apart,
        )

    def prefill(self) -> Row:
        def ours(m: VLA, o: Observation, images: Array) -> Any:
            out, cache = prefill(m, o, image_tokens=images, last_only=True)
            return out.prompt_last, cache

        def theirs(m: VLA, o: Observation, images: Array) -> Any:
            hidden, cache = baseline.prefill(m, o, images=images, room=self.size.tokens)
            # The subtask fork's: of openpi's 968 rows of logits at full size, 967 are not read.
            return baseline.first_logits(m, hidden, last=True), cache

        inputs = (self.obs, self.images)
        return Row(
            Call("prefill", ours, (self.fast, *inputs)),
            lambda: Call("prefill0", theirs, (self.model, *inputs)),
            self.roofline.prefill(self.prefix),
        )

    def token(self) -> Row:
        """One of the generated tokens."""
        (last, cache), n = self.prefilled, self.size.tokens

        def ours(m: VLA, c: Any, x: Array, sampling: Sampling) -> Any:
            return generate(m, c, x, sampling)

        def theirs(m: VLA, c: Any, x: Array) -> Any:
            return baseline.generate(m, c, x, n)

        return Row(
            Call("token", ours, (self.fast, cache, last, self.sampling)),
            lambda: Call("token0", theirs, (self.model, *self.prefilled0[::-1])),
            self.roofline.token(self.prefix + n // 2),
            share=lambda result: n,
        )

    def block(self) -> Row:
        """One pass over several tokens, of a text that is known to be likely."""
        last, cache = self.prefilled
        likely = Continuations.of(np.asarray(self.text).tolist(), self.size.tokens, _NO_EOS)

        def ours(m: VLA, c: Any, x: Array, sampling: Sampling, likely: Continuations) -> Any:
            return generate(m, c, x, sampling, continuations=likely, block=BLOCK)

        def passes(out: Any) -> int:
            return int(out[0].steps)

        call = Call("block", ours, (self.fast, cache, last, self.sampling, likely))
        work = self.roofline.token(self.prefix)
        work = Work(BLOCK * work.flops, work.bytes)
        return Row(call, None, work, share=passes, compare=lambda out: {"passes": passes(out)})

    def denoise(self) -> Row:
        cache = self.prefilled[1]

        def ours(m: VLA, o: Observation, c: Any, x: Array) -> Array:
            return denoise(m, o, c, x, num_steps=self.size.steps)

        def theirs(m: VLA, o: Observation, c: Any, x: Array) -> Array:
            return baseline.denoise(m, o, c, x, self.size.steps)

        return Row(
            Call("denoise", ours, (self.fast, self.obs, cache, self.noise)),
            lambda: Call("denoise0", theirs, (self.model, self.obs, self.prefilled0[1], self.noise)),
            self.roofline.denoise(self.prefix, self.size.steps),
            compare=apart,
        )

    def chunks(self) -> Row:
        """Several action chunks from one prefix."""
        _, cache = self.prefilled
        noise = jax.random.normal(jax.random.key(5), (CHUNKS, *self.noise.shape[1:]))

        def ours(m: VLA, o: Observation, c: Any, x: Array) -> Array:
            many = jax.tree.map(lambda a: jnp.repeat(a, CHUNKS, axis=0), o)
            return denoise(m, many, c.repeat(CHUNKS), x, num_steps=self.size.steps)

        call = Call("chunks", ours, (self.fast, self.obs, cache, noise))
        return Row(call, None, self.roofline.denoise(self.prefix, self.size.steps, CHUNKS))


ROWS: dict[str, Callable[[Setting], Row]] = {
    "actions": Setting.actions,
    "text_and_actions": Setting.text_and_actions,
    "right_draft": Setting.right_draft,
    "token": Setting.token,
    "denoise": Setting.denoise,
    "prefill": Setting.prefill,
    "vision": Setting.vision,
    "block": Setting.block,
    "chunks": Setting.chunks,
    "actions_2_cameras": lambda s: s.sharing(cameras=2).actions(),
    "actions_1_camera": lambda s: s.sharing(cameras=1).actions(),
}
"""In the order of their worth."""
