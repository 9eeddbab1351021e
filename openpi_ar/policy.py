"""The host's side of the model: a raw observation in, a subtask and actions in real units out.

    raw dict -> InputTransform -> one jitted `act` (uint8 images in, tokens and normalised actions out) -> text, real units

`infer(..., timing=True)` runs the same stages jitted apart, so that each can be timed; the numbers it returns are the same.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from pathlib import Path
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from openpi_ar.algorithms import decode
from openpi_ar.checkpoints.foreign import load_policy_parts
from openpi_ar.config import TrainConfig
from openpi_ar.data.inputs import Arrays, InputTransform, collate
from openpi_ar.data.normalize import NormStats
from openpi_ar.data.robots import RobotSpec
from openpi_ar.errors import UserError
from openpi_ar.models.pi0 import Pi0
from openpi_ar.text import prompts
from openpi_ar.text.tokenizer import Tokenizer
from openpi_ar.types import Array, Observation, Text

STAGES = ("images", "prefill", "text", "flow")
LOOP = 8
"""A token said this many times in a row is a loop, not language."""

Raw = Mapping[str, Any]
Result = dict[str, Any]


class Policy:
    """A trained model as a function of observations.

    Args:
        cfg: the run's configuration.
        model: its parameters, layers stacked; unstacked here, once.
        tokenizer: the checkpoint's.
        stats: normalisation statistics of "state" and "actions".
        robot: takes this robot's observations as it sends them and gives actions that it can execute.
        seed: of the noise that actions are denoised from (and of sampled text). Every call draws anew.

    Raises:
        UserError: tokenizer, statistics or robot do not fit the model.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        model: Pi0,
        tokenizer: Tokenizer,
        stats: Mapping[str, NormStats],
        robot: RobotSpec | None = None,
        *,
        seed: int = 0,
    ):
        if tokenizer.vocab_size > cfg.model.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} pieces but the model reads {cfg.model.vocab_size}: "
                "use the tokenizer that the model was trained with"
            )
        self.cfg, self.tokenizer, self.robot = cfg, tokenizer, robot
        self.transform = InputTransform(cfg, tokenizer, stats, robot)
        self._question = InputTransform(_with_template(cfg, "vqa"), tokenizer, stats, robot)
        self._model = model.unstacked()
        self._budget = cfg.text.max_target_tokens if self.transform.says_text else 0
        allowed = np.pad(tokenizer.allowed_text, (0, cfg.model.vocab_size - tokenizer.vocab_size))
        self._speech = {
            "max_tokens": cfg.text.max_target_tokens,
            "eos_id": tokenizer.eos_id,
            "allowed": jnp.asarray(allowed),
            "temperature": cfg.decode.temperature,
        }
        self._act = jax.jit(self._act_in_one)
        self._images = jax.jit(lambda model, obs: model.embed_images(obs))
        self._prefill = jax.jit(lambda model, obs, text, tokens: decode.prefill(model, obs, text, image_tokens=tokens))
        self._generate = jax.jit(
            lambda model, cache, last, key: decode.generate(model, cache, last, key, **self._speech)
        )
        self._flow = jax.jit(self._denoise_from)
        self.reseed(seed)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        robot: str | None = None,
        asset_id: str | None = None,
        horizon: int | None = None,
        seed: int = 0,
    ) -> "Policy":
        """The policy of a checkpoint: a step or experiment of ours, or with a robot's name openpi's or LeRobot's.

        Arguments as of `load_policy_parts`. Raises UserError if it is not whole or the arguments do not fit it.
        """
        return cls(*load_policy_parts(path, robot, asset_id=asset_id, horizon=horizon), seed=seed)

    def reseed(self, seed: int) -> None:
        """Start the sequence of noises anew: the same calls then give the same results."""
        self._key = jax.random.key(seed)

    @property
    def cameras(self) -> tuple[str, ...]:
        """Cameras of the model, in its order: the images of an observation, unless a robot has names of its own."""
        return self.cfg.model.cameras

    def infer(self, raw: Raw, *, subtask: str | None = None, timing: bool = False) -> Result:
        """What to say and do now.

        Args:
            raw: {"images": {camera: uint8 [h w 3]}, "state": [P_real], "prompt": str}, real units; with a robot, what it
                sends (`RobotSpec`).
            subtask: have the model act as if it had said this.
            timing: time the stages apart (slower than the usual path, which is one program).

        Returns:
            `subtask` (empty for models that say nothing), `text_status` ("ok"; "truncated": no EOS within the budget;
            "loop": the same token 8 times in a row), `actions` float32 [A X_real] in real units, and `timing` in ms:
            `prepare` and `model`, or `images`, `prefill`, `text`, `flow`; and `total`. The first call compiles.

        Raises:
            UserError: the observation does not fit the model, or `subtask` does not fit the template.
        """
        return self.infer_batch([raw], subtasks=[subtask], timing=timing)[0]

    def infer_batch(
        self,
        raws: Sequence[Raw],
        *,
        subtasks: Sequence[str | None] | None = None,
        batch_size: int | None = None,
        timing: bool = False,
    ) -> list[Result]:
        """`infer` for several observations in one call; `timing` is the whole batch's.

        Args:
            raws: one to `batch_size` observations.
            subtasks: forced subtask of each, all or none given.
            batch_size: pad to this many rows, so that batches of all sizes share one compiled program.
            timing: as in `infer`.
        """
        start = time.perf_counter()
        rows = [self.transform.observation(raw) for raw in raws]
        obs, text = self._stack(rows, batch_size), self._forced_text(subtasks, len(rows), batch_size)
        prepared = time.perf_counter()
        if timing:
            out, ms = self._staged(obs, text)
        else:
            out = jax.block_until_ready(self._act(self._model, obs, self._next_key(), text))
            ms = {"prepare": _ms(prepared - start), "model": _ms(time.perf_counter() - prepared)}
        actions = self.transform.actions_to_real(np.asarray(out.actions)[: len(rows)], raws)
        ids, valid = np.asarray(out.ids), np.asarray(out.valid)
        ms["total"] = _ms(time.perf_counter() - start)
        results = []
        for row in range(len(rows)):
            said, status = self._read(self.cfg.text.template, ids[row][valid[row]].tolist())
            results.append({"subtask": said, "text_status": status, "actions": actions[row], "timing": ms})
        return results

    def answer(self, raw: Raw, question: str) -> Result:
        """The answer to a question about the images, by PaliGemma's VQA template; no actions.

        Args:
            raw: as in `infer`; its prompt is not read, and its state may be left out.
            question: in plain words.

        Returns:
            `answer`, `text_status` and `timing` as in `infer`.
        """
        start = time.perf_counter()
        row = self._question.observation({**raw, "prompt": question}, needs_state=False)
        out, ms = self._staged(self._stack([row], None), None, act=False)
        ms["total"] = _ms(time.perf_counter() - start)
        said, status = self._read("vqa", np.asarray(out.ids)[0][np.asarray(out.valid)[0]].tolist())
        return {"answer": said, "text_status": status, "timing": ms}

    def measure(self, raw: Raw, *, subtask: str | None = None, question: str | None = None, repeats: int = 5) -> Result:
        """The result of one `infer` (or, with a question, `answer`) with `timing` measured over several calls.

        `timing` in ms, on warm programs, medians of `repeats` calls: each stage, and `total` from the raw observation to
        real units (for `infer` as one program, so less than the sum of its stages). `first_call` is the first call's
        total, compilation included if this shape was new.
        """
        if question is not None:
            calls = [self.answer(raw, question) for _ in range(1 + repeats)]
            result, warm, staged = calls[0], calls[1:], calls[1:]
        else:
            calls = [self.infer(raw, subtask=subtask) for _ in range(1 + repeats)]
            result, warm = calls[0], calls[1:]
            staged = [self.infer(raw, subtask=subtask, timing=True) for _ in range(1 + repeats)][1:]
        first = result["timing"]["total"]
        names = [name for name in STAGES if name in staged[0]["timing"]]
        medians = {name: float(np.median([r["timing"][name] for r in staged])) for name in names}
        medians["total"] = float(np.median([r["timing"]["total"] for r in warm]))
        return {**result, "timing": {**medians, "first_call": first}}

    def _act_in_one(self, model: Pi0, obs: Observation, key: jax.Array, text: Text | None) -> decode.Act:
        speech = {**self._speech, "max_tokens": self._budget}
        return decode.act(model, obs, key, num_steps=self.cfg.decode.denoise_steps, text=text, **speech)

    def _denoise_from(self, model: Pi0, obs: Observation, cache: decode.KVCache, key: Array) -> Array:
        shape = (obs.images.shape[0], self.cfg.model.action_horizon, self.cfg.model.action_dim)
        noise = jax.random.normal(key, shape)
        return decode.denoise(model, obs, cache, noise, num_steps=self.cfg.decode.denoise_steps)

    def _staged(self, obs: Observation, text: Text | None, *, act: bool = True) -> tuple[decode.Act, dict[str, float]]:
        """`_act_in_one` as separate programs; the keys are split as in `decode.act`. `act=False`: text only."""
        text_key, noise_key = jax.random.split(self._next_key())
        clock = _Stopwatch()
        tokens = clock.lap("images", self._images(self._model, obs))
        out, cache = clock.lap("prefill", self._prefill(self._model, obs, text, tokens))
        batch = obs.images.shape[0]
        said = decode.Generated(ids=jnp.zeros((batch, 0), jnp.int32), valid=jnp.zeros((batch, 0), bool))
        if text is not None:
            said = decode.Generated(ids=text.ids, valid=text.valid)
        elif self._budget or not act:
            said, cache = self._generate(self._model, cache, out.prompt_last, text_key)
        clock.lap("text", (said, cache))
        shape = (batch, self.cfg.model.action_horizon, self.cfg.model.action_dim)
        if not act:
            return decode.Act(ids=said.ids, valid=said.valid, actions=jnp.zeros(shape)), clock.ms
        actions = clock.lap("flow", self._flow(self._model, obs, cache, noise_key))
        return decode.Act(ids=said.ids, valid=said.valid, actions=actions), clock.ms

    def _next_key(self) -> jax.Array:
        self._key, now = jax.random.split(self._key)
        return now

    def _stack(self, rows: list[Arrays], batch_size: int | None) -> Observation:
        missing = _missing(len(rows), batch_size)
        obs = collate([*rows, *rows[:1] * missing])
        assert isinstance(obs, Observation)
        return obs

    def _forced_text(self, subtasks: Sequence[str | None] | None, rows: int, batch_size: int | None) -> Text | None:
        if subtasks is None or all(s is None for s in subtasks):
            return None
        if len(subtasks) != rows or any(s is None for s in subtasks):
            raise UserError(f"give a subtask for each of the {rows} observations or for none, found {list(subtasks)}")
        if not self.transform.says_text:
            raise UserError(
                f"template {self.cfg.text.template!r} has no subtask: this model only acts, so none can be forced"
            )
        targets = [self.transform.target({"subtask": s}) for s in subtasks]
        targets += targets[:1] * _missing(rows, batch_size)
        return Text(**{name: jnp.asarray(np.stack([t[name] for t in targets])) for name in targets[0]})

    def _read(self, template: str, ids: list[int]) -> tuple[str, str]:
        said = prompts.parse_target(self.tokenizer, template, ids)
        return said, text_status(ids, self.tokenizer.eos_id)


def text_status(ids: Sequence[int], eos_id: int) -> str:
    """ "loop", "truncated" or "ok" for generated ids; no ids at all (a model that says nothing) is "ok"."""
    if any(len(set(ids[i : i + LOOP])) == 1 for i in range(len(ids) - LOOP + 1)):
        return "loop"
    return "truncated" if len(ids) and eos_id not in ids else "ok"


class _Stopwatch:
    """Times of consecutive stages in ms, each waited for."""

    def __init__(self):
        self.ms: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str, value: Any) -> Any:
        jax.block_until_ready(value)
        now = time.perf_counter()
        self.ms[name] = _ms(now - self._last)
        self._last = now
        return value


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)


def _missing(rows: int, batch_size: int | None) -> int:
    if not rows or (batch_size is not None and rows > batch_size):
        raise UserError(f"a batch must hold 1 to {batch_size or 'any number of'} observations, found {rows}")
    return 0 if batch_size is None else batch_size - rows


def _with_template(cfg: TrainConfig, template: str) -> TrainConfig:
    return dataclasses.replace(cfg, text=dataclasses.replace(cfg.text, template=template))
