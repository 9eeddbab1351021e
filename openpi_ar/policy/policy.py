"""The host's side of the model: a raw observation in, a subtask and actions in real units out.

    raw dict -> InputTransform -> one jitted `act` (uint8 images in, tokens and normalised actions out) -> text, real units

`infer(..., timing=True)` runs the same stages jitted apart, so that each can be timed; the numbers it returns are the same.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from openpi_ar.algorithms import decode
from openpi_ar.compilation import keep_compiled_programs
from openpi_ar.config import TrainConfig
from openpi_ar.data.inputs import Arrays, InputTransform, collate
from openpi_ar.data.normalize import NormStats
from openpi_ar.data.robot_spec import RobotSpec
from openpi_ar.errors import UserError
from openpi_ar.models.pi0 import Pi0
from openpi_ar.policy.host import (
    Stopwatch,
    blank_observation,
    inference_dtype,
    milliseconds,
    resizes_on_device,
    shrink,
)
from openpi_ar.policy.load import load_policy_parts
from openpi_ar.policy.programs import Draft, Programs
from openpi_ar.text.templates import Template, text_status
from openpi_ar.text.tokenizer import Tokenizer
from openpi_ar.types import Observation, Tokens

STAGES = ("images", "prefill", "text", "flow")
Raw = Mapping[str, Any]
Result = dict[str, Any]


class Policy:
    """A trained model as a function of observations.

    Args:
        cfg: the run's configuration.
        model: its parameters, layers stacked; brought into the inference form here, once.
        tokenizer: the checkpoint's.
        stats: normalisation statistics of "state" and "actions".
        robot: takes this robot's observations as it sends them and gives actions that it can execute. None: the robot whose
            dataset it was trained on.
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
        self.cfg, self.tokenizer = cfg, tokenizer
        self.transform = InputTransform(cfg, tokenizer, stats, robot)
        self.robot = robot = self.transform.robot
        dtype = inference_dtype(cfg.decode.dtype)
        self._model = jax.jit(lambda m: m.prepared(dtype))(model)
        self._table = jax.jit(lambda m: decode.flow_table(m, cfg.decode.denoise_steps))(self._model)
        self._budget = cfg.text.max_target_tokens if self.transform.writes_text else 0
        allowed = np.pad(tokenizer.allowed_text, (0, cfg.model.vocab_size - tokenizer.vocab_size))
        programs = Programs(
            cfg,
            budget=self._budget,
            speech={
                "max_tokens": cfg.text.max_target_tokens,
                "eos_id": tokenizer.eos_id,
                "allowed": jnp.asarray(allowed),
                "temperature": cfg.decode.temperature,
            },
        )
        self._act, self._images, self._prefill = programs.act, programs.images, programs.prefill
        self._generate, self._flow = programs.generate, programs.flow
        self._draft = programs.draft
        self._resizes = resizes_on_device(cfg.decode.resize)
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
        keep_compiled_programs()
        return cls(*load_policy_parts(path, robot, asset_id=asset_id, horizon=horizon), seed=seed)

    def reseed(self, seed: int) -> None:
        """Start the sequence of noises anew and forget what was said: the same calls then give the same results."""
        self._key = jax.random.key(seed)
        self.forget()

    def forget(self) -> None:
        """Check no earlier text in the next call. What is said does not depend on it, only the time that takes."""
        self._said: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def cameras(self) -> tuple[str, ...]:
        """Cameras of the model, in its order: the images of an observation, unless a robot has names of its own."""
        return self.cfg.model.cameras

    def warmup(
        self, batch_size: int = 1, cameras: int | None = None, image_size: tuple[int, int] | None = None
    ) -> dict[int, float]:
        """Compiles (and runs once) the program of every prompt bucket, so that no later call has to.

        `batch_size` is that of the calls to come, `cameras` how many they show (None: all), `image_size` their height and
        width (None: the model's), which matters where images are resized on the device. Returns seconds by prompt length.
        """
        cfg, took = self.cfg.model, {}
        longest = self.cfg.text.max_prompt_tokens
        count = len(cfg.cameras) if cameras is None else cameras
        for size in sorted({longest, *(b for b in self.cfg.decode.prompt_buckets if b < longest)}):
            obs = blank_observation(cfg, batch_size, count, size, image_size if self._resizes else None)
            start = time.perf_counter()
            none = self._draft(batch_size, None)
            jax.block_until_ready(self._act(self._model, obs, jax.random.key(0), None, none, self._table))
            took[size] = time.perf_counter() - start
        return took

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
        rows = self._observations(raws)
        obs, text = self._stack(rows, batch_size), self._forced_text(subtasks, len(rows), batch_size)
        draft = None if text is not None else self._draft(obs.images.shape[0], self._said)
        prepared = time.perf_counter()
        if timing:
            out, ms = self._staged(obs, text, draft)
        else:
            out = jax.block_until_ready(self._act(self._model, obs, self._next_key(), text, draft, self._table))
            ms = {"prepare": milliseconds(prepared - start), "model": milliseconds(time.perf_counter() - prepared)}
        actions = self.transform.actions_to_real(np.asarray(out.actions)[: len(rows)], raws)
        ids, valid = np.asarray(out.ids), np.asarray(out.valid)
        if text is None:
            self._said = ids, valid
        ms["total"] = milliseconds(time.perf_counter() - start)
        results = []
        for row in range(len(rows)):
            said, status = self._read(self.transform.template(raws[row]), ids[row][valid[row]].tolist())
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
        raw = {**raw, "question": question, "template": "vqa"}
        row = self.transform.observation(raw)
        out, ms = self._staged(self._stack([row], None), None, None, act=False)
        ms["total"] = milliseconds(time.perf_counter() - start)
        said, status = self._read(
            self.transform.template(raw), np.asarray(out.ids)[0][np.asarray(out.valid)[0]].tolist()
        )
        return {"answer": said, "text_status": status, "timing": ms}

    def measure(self, raw: Raw, *, subtask: str | None = None, question: str | None = None, repeats: int = 5) -> Result:
        """The result of one `infer` (or, with a question, `answer`) with `timing` measured over several calls.

        `timing` in ms, on warm programs, medians of `repeats` calls: each stage, and `total` from the raw observation to
        real units (for `infer` as one program, so less than the sum of its stages). `first_call` is the first call's
        total, compilation included if this shape was new. The text is decoded in every call, not checked.
        """
        if question is not None:
            calls = [self.answer(raw, question) for _ in range(1 + repeats)]
            result, warm, staged = calls[0], calls[1:], calls[1:]
        else:

            def fresh(timing: bool) -> Result:
                self.forget()
                return self.infer(raw, subtask=subtask, timing=timing)

            calls = [fresh(timing=False) for _ in range(1 + repeats)]
            result, warm = calls[0], calls[1:]
            staged = [fresh(timing=True) for _ in range(1 + repeats)][1:]
        first = result["timing"]["total"]
        names = [name for name in STAGES if name in staged[0]["timing"]]
        medians = {name: float(np.median([r["timing"][name] for r in staged])) for name in names}
        medians["total"] = float(np.median([r["timing"]["total"] for r in warm]))
        return {**result, "timing": {**medians, "first_call": first}}

    def _staged(
        self, obs: Observation, text: Tokens | None, draft: Draft | None, *, act: bool = True
    ) -> tuple[decode.Act, dict[str, float]]:
        """`_act_in_one` as separate programs; the keys are split as in `decode.act`. `act=False`: text only."""
        text_key, noise_key = jax.random.split(self._next_key())
        clock = Stopwatch()
        tokens = clock.lap("images", self._images(self._model, obs))
        out, cache = clock.lap("prefill", self._prefill(self._model, obs, text, tokens, draft))
        batch = obs.images.shape[0]
        said = decode.Generated.known(jnp.zeros((batch, 0), jnp.int32), jnp.zeros((batch, 0), bool))
        if text is not None:
            said = decode.Generated.known(text.ids, text.valid)
        elif self._budget or not act:
            said, cache = self._generate(self._model, cache, out, text_key, draft)
        clock.lap("text", (said, cache))
        shape = (batch, self.cfg.model.action_horizon, self.cfg.model.action_dim)
        if not act:
            return decode.Act(ids=said.ids, valid=said.valid, steps=said.steps, actions=jnp.zeros(shape)), clock.ms
        actions = clock.lap("flow", self._flow(self._model, obs, cache, noise_key, self._table))
        return decode.Act(ids=said.ids, valid=said.valid, steps=said.steps, actions=actions), clock.ms

    def _observations(self, raws: Sequence[Raw]) -> list[Arrays]:
        if self._resizes:
            rows = [self.transform.observation(raw, resize=False) for raw in raws]
            if len({row["images"].shape for row in rows}) == 1:
                return rows
        return [self.transform.observation(raw) for raw in raws]

    def _next_key(self) -> jax.Array:
        self._key, now = jax.random.split(self._key)
        return now

    def _stack(self, rows: list[Arrays], batch_size: int | None) -> Observation:
        missing = _missing(len(rows), batch_size)
        obs = collate([*rows, *rows[:1] * missing])
        assert isinstance(obs, Observation)
        return shrink(obs, self.cfg.decode.prompt_buckets)

    def _forced_text(self, subtasks: Sequence[str | None] | None, rows: int, batch_size: int | None) -> Tokens | None:
        if subtasks is None or all(s is None for s in subtasks):
            return None
        if len(subtasks) != rows or any(s is None for s in subtasks):
            raise UserError(f"give a subtask for each of the {rows} observations or for none, found {list(subtasks)}")
        if not self.transform.writes_text:
            raise UserError(
                f"template {self.cfg.text.template!r} has no subtask: this model only acts, so none can be forced"
            )
        targets = [self.transform.target({"subtask": s}) for s in subtasks]
        targets += targets[:1] * _missing(rows, batch_size)
        return Tokens(**{name: jnp.asarray(np.stack([t[name] for t in targets])) for name in targets[0]})

    def _read(self, template: Template, ids: list[int]) -> tuple[str, str]:
        return template.parse(self.tokenizer, ids), text_status(ids, self.tokenizer.eos_id)


def _missing(rows: int, batch_size: int | None) -> int:
    if not rows or (batch_size is not None and rows > batch_size):
        raise UserError(f"a batch must hold 1 to {batch_size or 'any number of'} observations, found {rows}")
    return 0 if batch_size is None else batch_size - rows
