"""Held-out evaluation: losses, what the model says, how far its actions are off in the robot's units, and whether it
listens to its prompt at all.
"""

from collections.abc import Sequence

import jax
import numpy as np

from openpi_ar.algorithms.decode import Act
from openpi_ar.config import TrainConfig
from openpi_ar.data.inputs import InputTransform, stack_rows, to_device
from openpi_ar.data.loader import Source, evaluation_batches
from openpi_ar.models.pi0 import Pi0
from openpi_ar.training.sharding import Placement
from openpi_ar.training.step import make_act, make_eval_loss
from openpi_ar.types import Observation

_SHOWN = 4


class Evaluator:
    """The same held-out frames with the same noise each time, so that figures of different steps compare.

    Call it with a model: returns (metrics, [(true subtask, said subtask)]). Metrics are the means of the losses over
    all batches and, from talking and acting on the first batch: `said_exact` (fraction of decoded subtasks that equal
    the truth), `action_error` (mean absolute error over valid steps and dimensions), `action_mse` (mean squared error) and
    both by dimension, `action_error_<i>` and `action_mse_<i>`.

    Prompt-swap sensitivity, where the frames have different prompts: each row is asked again with the same images, state and
    noise but the prompt of another row. `swap_action` is the mean absolute change of its actions, `swap_said` the fraction
    of rows that then say something else; both near zero mean that the prompt is ignored.
    """

    def __init__(self, cfg: TrainConfig, source: Source, transform: InputTransform, placement: Placement | None = None):
        sharding = None if placement is None else placement.batch
        self._cfg, self._transform = cfg, transform
        self._batches = evaluation_batches(
            source, transform, batch_size=cfg.batch_size, batches=cfg.eval_batches, sharding=sharding
        )
        tokenizer = transform.tokenizer
        self._loss = make_eval_loss(cfg.loss)
        self._act = make_act(
            cfg.decode,
            max_tokens=cfg.text.max_target_tokens if transform.writes_text else 0,
            eos_id=tokenizer.eos_id,
            # A model may have more embeddings than the tokenizer has pieces; nothing may be said with those.
            allowed=np.pad(tokenizer.allowed_text, (0, cfg.model.vocab_size - tokenizer.vocab_size)),
            # Every process sees the whole answer: all of them decide by the same figures.
            where=None if placement is None else placement.replicated,
        )
        self._key = jax.random.key(cfg.seed)
        self._swapped = self._with_swapped_prompts(sharding)

    def __call__(self, model: Pi0) -> tuple[dict[str, float], list[tuple[str, str]]]:
        rows = [self._loss(model, batch, self._key) for _, batch in self._batches]
        metrics = {name: float(np.mean([float(r[name]) for r in rows])) for name in rows[0]}
        raw, batch = self._batches[0]
        act = self._act(model, batch.observation, self._key)
        metrics |= self._action_errors(raw, np.asarray(act.actions))
        metrics |= self._swap_sensitivity(model, raw, act)
        if not self._transform.writes_text:
            return metrics, []
        said = [
            self._subtask(ids[valid]) for ids, valid in zip(np.asarray(act.ids), np.asarray(act.valid), strict=True)
        ]
        truth = [self._transform.template(r).canonical(r["subtask"]) for r in raw]
        metrics["said_exact"] = float(np.mean([a == b for a, b in zip(truth, said, strict=True)]))
        shown = np.linspace(0, len(raw), min(_SHOWN, len(raw)), endpoint=False).astype(int)
        return metrics, [(truth[i], said[i]) for i in shown]

    def _subtask(self, ids: np.ndarray) -> str:
        return self._transform.template({}).parse(self._transform.tokenizer, ids.tolist())

    def _action_errors(self, raw: Sequence[dict], actions: np.ndarray) -> dict[str, float]:
        real = self._transform.actions_to_real(actions, raw)
        valid = np.stack([r["action_valid"] for r in raw])
        difference = (real - np.stack([r["actions"] for r in raw]))[valid]
        metrics = {}
        for name, each in (("action_error", np.abs(difference)), ("action_mse", np.square(difference))):
            by_dimension = each.mean(0)
            metrics[name] = float(by_dimension.mean())
            metrics |= {f"{name}_{i}": float(e) for i, e in enumerate(by_dimension)}
        return metrics

    def _with_swapped_prompts(self, sharding: jax.sharding.Sharding | None) -> tuple[np.ndarray, Observation] | None:
        """(rows that another prompt could be found for, the first batch with those prompts); None if there are none."""
        raw, _ = self._batches[0]
        said = [r.get("prompt") for r in raw]
        other = [next((p for p in (*said[i:], *said) if p != said[i]), said[i]) for i in range(len(said))]
        changed = np.array([a != b for a, b in zip(said, other, strict=True)])
        if not changed.any():
            return None
        rows = [self._transform.observation({**r, "prompt": p}) for r, p in zip(raw, other, strict=True)]
        obs = to_device(stack_rows(rows), sharding)
        assert isinstance(obs, Observation)
        return changed, obs

    def _swap_sensitivity(self, model: Pi0, raw: Sequence[dict], act: Act) -> dict[str, float]:
        if self._swapped is None:
            return {}
        changed, obs = self._swapped
        swapped = self._act(model, obs, self._key)
        a, b = (self._transform.actions_to_real(np.asarray(x.actions), raw)[changed] for x in (act, swapped))
        metrics = {"swap_action": float(np.abs(a - b).mean())}
        if self._transform.writes_text:
            same = (np.asarray(act.ids) == np.asarray(swapped.ids)).all(-1)[changed]
            metrics["swap_said"] = float(1.0 - same.mean())
        return metrics
