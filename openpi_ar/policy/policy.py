"""The host's side of the model: a raw observation in, a subtask and actions in real units out.

    raw dict -> Robot.read -> InputTransform -> one jitted `act` (uint8 images in, tokens and normalised actions out)
             -> text, real units

`infer(..., timing=True)` runs the same stages jitted apart, so that each can be timed; the numbers it returns are the
same.
"""

from collections.abc import Mapping, Sequence
import copy
import dataclasses
from functools import partial
from pathlib import Path
import time
from typing import Any

import jax
import numpy as np

from openpi_ar.algorithms.flow import Steps, flow_table
from openpi_ar.algorithms.generate import Generated
from openpi_ar.algorithms.trie import Trie
from openpi_ar.compilation import run_once
from openpi_ar.config import DenoiseMethod, InferenceConfig
from openpi_ar.data.inputs import InputTransform
from openpi_ar.data.normalize import NormStats
from openpi_ar.data.robot import Reading, Robot
from openpi_ar.errors import UserError
from openpi_ar.models.vlm import VLA
from openpi_ar.policy.confidence import check_finite, row_of
from openpi_ar.policy.programs import (
    Drawn,
    Programs,
    blank_observation,
    inference_dtype,
    milliseconds,
    resizes_on_device,
    stacked_drafts,
)
from openpi_ar.policy.rows import LikelyTexts, count_rows, forced_tokens, padded, row_sessions, subtask_tokens
from openpi_ar.policy.session import Session
from openpi_ar.policy.talker import Images, Result, Talker, measured
from openpi_ar.text.tokenizer import Tokenizer
from openpi_ar.types import Tokens

Raw = Mapping[str, Any]
_flow_table = jax.jit(flow_table, static_argnames="num_steps")


class Policy(Talker):
    """A trained model as a function of observations. It remembers nothing: what lasts is a `Session` of the caller.

    Args:
        cfg: model, text, decoding and robot; of a run `TrainConfig.inference`.
        model: its parameters, layers stacked; brought into the inference form here, once.
        tokenizer: the checkpoint's.
        stats: normalisation statistics of "state" and "actions".
        notes: what a user should know of the checkpoint.

    Raises:
        UserError: tokenizer, statistics or robot do not fit the model.
    """

    _model: VLA

    def __init__(
        self,
        cfg: InferenceConfig,
        model: VLA,
        tokenizer: Tokenizer,
        stats: Mapping[str, NormStats],
        notes: Sequence[str] = (),
    ):
        dtype = inference_dtype(cfg.decode.dtype)
        acting = run_once(lambda m: m.for_inference(dtype), model)
        super().__init__(acting, tokenizer, cfg.text, cfg.decode, notes)
        self.cfg, self._model = cfg, acting
        self.transform = InputTransform(cfg, tokenizer, stats)
        self.robot: Robot = self.transform.robot
        self._table = _flow_table(self._model, num_steps=Steps.of(cfg.decode))
        budget = cfg.text.max_target_tokens if self.transform.writes_text else 0
        sampling = dataclasses.replace(self._answers, max_new_tokens=budget)
        if cfg.decode.subtasks:
            texts = subtask_tokens(self.transform, cfg.decode.subtasks)
            written = [ids[valid].tolist() for ids, valid in zip(texts.ids, texts.valid, strict=True)]
            trie = Trie.of(written, cfg.model.vocab_size, tokenizer.eos_id)
            sampling = dataclasses.replace(sampling, constraint=trie)
        self._programs = Programs(cfg, sampling, self._answers)
        known = cfg.decode.subtasks or cfg.subtasks
        self._likely = LikelyTexts(self.transform, known, budget if self._programs.expects else 0)
        self._resizes = resizes_on_device(cfg.decode.resize)

    @staticmethod
    def from_checkpoint(path: str | Path, **options: Any) -> "Policy":
        """The policy of a checkpoint, as `openpi_ar.policy.load`. Raises UserError if it has no action tower."""
        from openpi_ar.policy.checkpoint import load  # imports this module

        policy = load(path, **options)
        return policy if isinstance(policy, Policy) else policy.infer()

    def denoising(self, num_steps: int, method: DenoiseMethod = "euler", shift: float = 1.0) -> "Policy":
        """The same policy, its parameters shared, with other steps from noise to actions (`flow.Steps`).

        Raises UserError for steps that there cannot be.
        """
        steps = {"denoise_steps": num_steps, "denoise_method": method, "denoise_shift": shift}
        out = copy.copy(self)
        out.cfg = dataclasses.replace(self.cfg, decode=dataclasses.replace(self.cfg.decode, **steps))
        out._table = _flow_table(out._model, num_steps=Steps.of(out.cfg.decode))
        out._programs = self._programs.denoising(out.cfg)
        return out

    @staticmethod
    def session(seed: int = 0) -> Session:
        """What one robot's calls share, for `infer(raw, session=...)`: it belongs to the caller."""
        return Session(seed)

    def warmup(
        self, batch_size: int = 1, cameras: int | None = None, image_size: tuple[int, int] | None = None
    ) -> dict[int, float]:
        """Compiles (and runs once) the program of every prompt bucket, so that no later call has to.

        `batch_size` is that of the calls to come, `cameras` how many they show (None: all), `image_size` their height
        and width (None: the model's), which matters where images are resized on the device. Returns seconds by prompt
        length.
        """
        cfg, took = self.cfg.model, {}
        longest = self.cfg.text.max_prompt_tokens
        count = len(cfg.cameras) if cameras is None else cameras
        for size in sorted({longest, *(b for b in self.cfg.decode.prompt_buckets if b < longest)}):
            obs = blank_observation(cfg, batch_size, count, size, image_size if self._resizes else None)
            start = time.perf_counter()
            _, keys, noise = self._programs.draw(np.stack([Session().key] * batch_size))
            draft = stacked_drafts([None] * batch_size, self._programs.budget) if self._programs.drafts else None
            own = (lambda _, prompt=obs.prompt: prompt) if self.transform.reprompts else None
            arguments = (self._model, obs, keys, noise, None, draft, self._table, self._likely.table())
            jax.block_until_ready(self._programs.act(*arguments, prompts=own)[0])
            took[size] = time.perf_counter() - start
        return took

    def infer(
        self,
        raw: Raw,
        *,
        seed: int = 0,
        noise: np.ndarray | None = None,
        subtask: str | None = None,
        session: Session | None = None,
        timing: bool = False,
    ) -> Result:
        """Generates the subtask and the actions. Without a session the same arguments give the same result.

        Args:
            raw: {"images": {camera: uint8 [h w 3]}, "state": [P_real], "prompt": str}, real units; with a robot, what
                it sends (`RobotSpec`). A model with a memory (`text.memory`) may be told "done", the subtasks that are
                completed, in place of what the session knows.
            seed: of the noise that actions are denoised from, and of sampled text.
            noise: [A X], normalised, in place of the seed's.
            subtask: have the model act as if it had generated this.
            session: in place of `seed`: draws new noise in every call, checks the last text before decoding a new one,
                and knows what is completed: a text that another one follows.
            timing: time the stages apart (slower than the usual path, which is one program).

        Returns:
            `subtask` (empty for models that only act), `text_status` ("ok"; "truncated": no EOS within the budget;
            "loop": the same token 8 times in a row), `logprobs`, `logprob` and `margin` (how sure the model is of the
            text: `confidence`), `passes` (through the model that decoding the batch's texts took), `actions` float32
            [A X_real] in real units, and `timing` in ms: `prepare` and `model`, or `images`, `prefill`, `text`, `flow`;
            and `total`. The first call compiles.

        Raises:
            UserError: the observation or the noise does not fit the model, `subtask` does not fit the template, or the
                model's logits are not numbers.
        """
        sessions = None if session is None else [session]
        return self.infer_batch([raw], seed=seed, noise=noise, subtasks=[subtask], sessions=sessions, timing=timing)[0]

    def infer_batch(
        self,
        raws: Sequence[Raw],
        *,
        seed: int = 0,
        noise: np.ndarray | None = None,
        subtasks: Sequence[str | None] | None = None,
        sessions: Sequence[Session] | None = None,
        batch_size: int | None = None,
        timing: bool = False,
    ) -> list[Result]:
        """`infer` for several observations in one call: each row gets what it would get alone; `timing` is the batch's.

        Args:
            raws: one to `batch_size` observations.
            seed: of every row that has no session.
            noise: [B A X], or [A X] for all rows.
            subtasks: forced subtask of each, all or none given.
            sessions: one for each observation, all different.
            batch_size: pad to this many rows, so that batches of all sizes share one compiled program.
            timing: as in `infer`.
        """
        start = time.perf_counter()
        rows = count_rows(raws, batch_size)
        sessions = row_sessions(sessions, len(raws), seed)
        text = forced_tokens(self.transform, subtasks, len(raws), rows)
        drawn = self._drawn(sessions, rows, noise)
        draft = None
        if text is None and self._programs.drafts:
            draft = stacked_drafts(padded([session.draft for session in sessions], rows), self._programs.budget)
        readings = self._readings(raws, sessions)
        obs = self.transform.observations(readings, rows, resize=not self._resizes)
        prepared = time.perf_counter()
        own = partial(self._action_prompts, readings, rows) if self.transform.reprompts else None
        likely = self._likely.table(sessions) if text is None else None
        arguments = (self._model, obs, drawn.text_keys, drawn.noise, text, draft, self._table, likely)
        out, ms = self._programs.act(*arguments, prompts=own, timing=timing)
        jax.block_until_ready(out)
        if not timing:
            ms = {"prepare": milliseconds(prepared - start), "model": milliseconds(time.perf_counter() - prepared)}
        chunks, written = np.asarray(out.actions), jax.tree.map(np.asarray, out.text)
        for row, (session, key) in enumerate(zip(sessions, np.asarray(drawn.next_keys), strict=False)):
            session.advance(key, (written.ids[row], written.valid[row]) if text is None else None, chunks[row])
        actions = self.transform.actions_to_real(chunks[: len(raws)], readings)
        ms["total"] = milliseconds(time.perf_counter() - start)
        texts = [self._text(reading, written, row, given=text is not None) for row, reading in enumerate(readings)]
        self._remember(sessions, texts)
        whole = {"passes": int(written.steps), "timing": ms}
        return [{"subtask": s, **rest, "actions": actions[i], **whole} for i, (s, rest) in enumerate(texts)]

    def pictures(self, images: Raw | Images) -> list[np.ndarray]:
        """As `Talker.pictures`; a mapping is an observation as in `infer`, of which nothing but the images is read."""
        return super().pictures(self.robot.read(images).images if isinstance(images, Mapping) else images)

    def score(self, raw: Raw, subtasks: Sequence[str]) -> np.ndarray:
        """Log-probability of each subtask as the text for this observation, float32 [N]: its tokens' and its end's.

        All are computed in one pass over one prefix. The probabilities are those of unconstrained text, also where
        `decode.subtasks` limits what is generated. The first call for a number of subtasks compiles.

        Args:
            raw: as in `infer`.
            subtasks: one or more.

        Raises:
            UserError: as `infer`; or there is no subtask, or one that is empty or longer than the budget.
        """
        texts = subtask_tokens(self.transform, subtasks)
        obs = self.transform.observations([self.robot.read(raw)], 1, resize=not self._resizes)
        logprobs = np.asarray(self._programs.score(self._model, obs, texts))
        check_finite(logprobs)
        return logprobs.sum(-1)

    def measure(
        self,
        raw: Raw,
        *,
        seed: int = 0,
        subtask: str | None = None,
        repeats: int = 0,
    ) -> Result:
        """The result of one `infer`, with `timing` as in `talker.measured`.

        The `total` of `infer` is that of one program, so less than the sum of its stages. The text is decoded in every
        call, not checked.
        """

        def call(apart: bool) -> Result:
            return self.infer(raw, seed=seed, subtask=subtask, timing=apart)  # no session: every call decodes its text

        return measured(call, repeats)

    def _readings(self, raws: Sequence[Raw], sessions: Sequence[Session]) -> list[Reading]:
        """The observations, with what the sessions have completed."""
        readings = [self.robot.read(raw) for raw in raws]
        if not self.cfg.text.memory:
            return readings
        for reading, session in zip(readings, sessions, strict=True):
            session.begin(reading.prompt)
        return [self.transform.recall(r, session.done) for r, session in zip(readings, sessions, strict=True)]

    def _remember(self, sessions: Sequence[Session], texts: Sequence[tuple[str, Result]]) -> None:
        """Tells the sessions what was generated. A text without an end is none that was trained on."""
        for session, (text, rest) in zip(sessions, texts, strict=True):
            if self.cfg.text.memory and text and rest["text_status"] == "ok":
                session.remember(text, self.cfg.text.memory)

    def _text(self, reading: Reading, text: Generated, row: int, *, given: bool = False) -> tuple[str, Result]:
        """The text of a row of numpy arrays, and what else a result holds of it."""
        ids, sure = row_of(text, row, given=given)
        written, status = self.transform.text(reading, ids)
        return written, {"text_status": status, **sure}

    def _action_prompts(self, readings: Sequence[Reading], rows: int, text: Generated) -> Tokens:
        """The prompts that actions see, from the generated text of the rows."""
        ids, valid = np.asarray(text.ids), np.asarray(text.valid)
        subtasks = [self.transform.text(r, ids[i][valid[i]].tolist())[0] for i, r in enumerate(readings)]
        return self.transform.action_prompts(readings, subtasks, rows)

    def _drawn(self, sessions: Sequence[Session], batch: int, noise: np.ndarray | None) -> Drawn:
        """The random numbers of a call. Rows of padding have those of the first row."""
        drawn = self._programs.draw(np.stack(padded([session.key for session in sessions], batch)))
        if noise is None:
            return drawn
        given, chunk, rows = np.asarray(noise, np.float32), self._programs.chunk, len(sessions)
        if given.shape not in (chunk, (rows, *chunk)):
            raise UserError(f"noise must be {list(chunk)} or {[rows, *chunk]}, found {list(given.shape)}")
        return drawn._replace(noise=np.stack(padded(list(np.broadcast_to(given, (rows, *chunk))), batch)))
