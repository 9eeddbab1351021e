"""Held-out evaluation: losses, what the model says, and how far its actions are off in the robot's units."""

from collections.abc import Sequence

import jax
import numpy as np

from openpi_ar.config import TrainConfig
from openpi_ar.data.inputs import InputTransform
from openpi_ar.data.loader import Source, evaluation_batches
from openpi_ar.models.pi0 import Pi0
from openpi_ar.text import prompts
from openpi_ar.training.step import make_act, make_eval_loss

_SHOWN = 4


class Evaluator:
    """The same held-out frames with the same noise each time, so that figures of different steps compare.

    Call it with a model: returns (metrics, [(true subtask, said subtask)]). Metrics are the means of the losses over
    all batches and, from talking and acting on the first batch: `said_exact` (fraction of decoded subtasks that equal
    the truth), `action_error` (mean absolute error over valid steps and dimensions) and `action_error_<i>` by dimension.
    """

    def __init__(
        self, cfg: TrainConfig, source: Source, transform: InputTransform, sharding: jax.sharding.Sharding | None = None
    ):
        self._cfg, self._transform = cfg, transform
        self._batches = evaluation_batches(
            source, transform, batch_size=cfg.batch_size, batches=cfg.eval_batches, sharding=sharding
        )
        tokenizer = transform.tokenizer
        self._loss = make_eval_loss(cfg.loss)
        self._act = make_act(
            cfg.decode,
            max_tokens=cfg.text.max_target_tokens if transform.says_text else 0,
            eos_id=tokenizer.eos_id,
            # A model may have more embeddings than the tokenizer has pieces; nothing may be said with those.
            allowed=np.pad(tokenizer.allowed_text, (0, cfg.model.vocab_size - tokenizer.vocab_size)),
        )
        self._key = jax.random.key(cfg.seed)

    def __call__(self, model: Pi0) -> tuple[dict[str, float], list[tuple[str, str]]]:
        rows = [self._loss(model, batch, self._key) for _, batch in self._batches]
        metrics = {name: float(np.mean([float(r[name]) for r in rows])) for name in rows[0]}
        raw, batch = self._batches[0]
        act = self._act(model, batch.observation, self._key)
        metrics |= self._action_errors(raw, np.asarray(act.actions))
        if not self._transform.says_text:
            return metrics, []
        said = [
            self._subtask(ids[valid]) for ids, valid in zip(np.asarray(act.ids), np.asarray(act.valid), strict=True)
        ]
        truth = [prompts.canonical(self._cfg.text.template, r["subtask"]) for r in raw]
        metrics["said_exact"] = float(np.mean([a == b for a, b in zip(truth, said, strict=True)]))
        shown = np.linspace(0, len(raw), min(_SHOWN, len(raw)), endpoint=False).astype(int)
        return metrics, [(truth[i], said[i]) for i in shown]

    def _subtask(self, ids: np.ndarray) -> str:
        return prompts.parse_target(self._transform.tokenizer, self._cfg.text.template, ids.tolist())

    def _action_errors(self, raw: Sequence[dict], actions: np.ndarray) -> dict[str, float]:
        real = self._transform.actions_to_real(actions, raw)
        valid = np.stack([r["action_valid"] for r in raw])
        error = np.abs(real - np.stack([r["actions"] for r in raw]))[valid].mean(0)
        return {"action_error": float(error.mean()), **{f"action_error_{i}": float(e) for i, e in enumerate(error)}}
