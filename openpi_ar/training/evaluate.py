"""Held-out evaluation: losses, generated text, how far actions are off in the robot's units, and whether the prompt
matters to the model at all.
"""

from collections.abc import Sequence
from functools import partial

import jax
import numpy as np

from openpi_ar.algorithms.act import Act
from openpi_ar.algorithms.generate import Generated
from openpi_ar.algorithms.sampling import text_sampling
from openpi_ar.config import TrainConfig
from openpi_ar.data.inputs import InputTransform, stack_rows, to_device
from openpi_ar.data.loader import Source, evaluation_batches
from openpi_ar.data.shards import place
from openpi_ar.models.vlm import VLA
from openpi_ar.training.metrics import averaged
from openpi_ar.training.sharding import Placement
from openpi_ar.training.step import make_act, make_eval_loss
from openpi_ar.types import Observation, Tokens

_SHOWN = 4


class Evaluator:
    """The same held-out rows with the same noise each time, so that figures of different steps compare.

    Call it with a model: returns (metrics, [(true text, generated text)]). Metrics are the means of the losses over all
    batches and, from talking and acting on the first batch:

        <kind>_generated_exact   fraction of generated texts that equal the truth, over rows with a target of the kind
        action_error, action_mse mean absolute and squared error over valid steps and dimensions of rows with actions;
        also by
                                 dimension, `action_error_<i>` and `action_mse_<i>`
        swap_action, swap_text   if rows with actions have different prompts: each is asked again with the same images,
                                 state and noise but the prompt of another one. Mean absolute change of its actions, and
                                 fraction of rows whose text changes; both near zero mean that the prompt is ignored

    What no row can be measured on is left out. Rows without actions (questions) change no figure of the others.
    """

    def __init__(self, cfg: TrainConfig, source: Source, transform: InputTransform, placement: Placement | None = None):
        sharding = None if placement is None else placement.batch
        self._transform = transform
        self._batches = evaluation_batches(
            source, transform, batch_size=cfg.batch_size, batches=cfg.eval_batches, sharding=sharding
        )
        raw, _ = self._batches[0]
        self._acting = np.array([r.get("actions") is not None for r in raw])
        self._writing = np.array([transform.template(r.get("template")).target is not None for r in raw])
        self._loss = make_eval_loss(cfg.loss)
        budget = cfg.text.max_target_tokens if self._writing.any() else 0
        sampling = text_sampling(cfg.decode, transform.tokenizer, cfg.model.vocab_size, budget)
        # Every process sees the whole answer: all of them decide by the same figures.
        replicated = None if placement is None else placement.replicated
        self._act = make_act(
            cfg.decode, sampling, replicated, reprompts=transform.reprompts and bool(self._acting.any())
        )
        self._sharding = sharding
        self._key = jax.random.key(cfg.seed)
        self._swapped = self._with_swapped_prompts(sharding)

    def __call__(self, model: VLA) -> tuple[dict[str, float], list[tuple[str, str]]]:
        metrics = averaged([self._loss(model, batch, self._key) for _, batch in self._batches])
        raw, batch = self._batches[0]
        act = self._act(model, batch.observation, self._key, partial(self._prompts, raw))
        metrics |= self._action_errors(raw, act)
        metrics |= self._swap_sensitivity(model, raw, act)
        exact, texts = self._generated(raw, act)
        shown = np.linspace(0, len(texts), min(_SHOWN, len(texts)), endpoint=False).astype(int)
        return metrics | exact, [texts[i] for i in shown]

    def _generated(self, raw: Sequence[dict], act: Act) -> tuple[dict[str, float], list[tuple[str, str]]]:
        """(`<kind>_generated_exact` of each kind, [(true text, generated text)] of the rows with a target)."""
        ids, valid = np.asarray(act.text.ids), np.asarray(act.text.valid)
        exact: dict[str, list[bool]] = {}
        texts = []
        for i in np.flatnonzero(self._writing).tolist():
            template = self._transform.template(raw[i].get("template"))
            truth = template.canonical(raw[i][template.key])
            text = template.parse(self._transform.tokenizer, ids[i][valid[i]].tolist())
            exact.setdefault(template.key, []).append(truth == text)
            texts.append((truth, text))
        return {f"{kind}_generated_exact": float(np.mean(hits)) for kind, hits in exact.items()}, texts

    def _prompts(self, raw: Sequence[dict], text: Generated) -> Tokens:
        """The prompts that actions see, where they have one of their own. Rows without actions have a neighbour's."""
        ids, valid = np.asarray(text.ids), np.asarray(text.valid)
        acting = np.flatnonzero(self._acting).tolist()
        readings = [self._transform.robot.read(raw[i]) for i in acting]
        written = [self._transform.text(r, ids[i][valid[i]].tolist())[0] for i, r in zip(acting, readings, strict=True)]
        prompts = self._transform.action_prompts(readings, written, len(acting))
        neighbour = np.maximum(np.cumsum(self._acting) - 1, 0)
        return place(jax.tree.map(lambda a: a[neighbour], prompts), self._sharding)

    def _real_actions(self, raw: Sequence[dict], act: Act, rows: np.ndarray) -> np.ndarray:
        """Actions of these rows (bool [B]) in the robot's units."""
        readings = [self._transform.robot.read(raw[i]) for i in np.flatnonzero(rows).tolist()]
        return self._transform.actions_to_real(np.asarray(act.actions)[rows], readings)

    def _action_errors(self, raw: Sequence[dict], act: Act) -> dict[str, float]:
        if not self._acting.any():
            return {}
        real, rows = self._real_actions(raw, act, self._acting), [raw[i] for i in np.flatnonzero(self._acting).tolist()]
        valid = np.stack([r["action_valid"] for r in rows])
        difference = (real - np.stack([r["actions"] for r in rows]))[valid]
        metrics = {}
        for name, each in (("action_error", np.abs(difference)), ("action_mse", np.square(difference))):
            by_dimension = each.mean(0)
            metrics[name] = float(by_dimension.mean())
            metrics |= {f"{name}_{i}": float(e) for i, e in enumerate(by_dimension)}
        return metrics

    def _with_swapped_prompts(self, sharding: jax.sharding.Sharding | None) -> tuple[np.ndarray, Observation] | None:
        """(rows that another prompt could be found for, the first batch with those prompts); None if there are none."""
        raw, _ = self._batches[0]
        acting = np.flatnonzero(self._acting).tolist()
        prompts = [raw[i].get("prompt") for i in acting]
        changed, rows = np.zeros(len(raw), bool), list(raw)
        for at, (i, prompt) in enumerate(zip(acting, prompts, strict=True)):
            other = next((p for p in (*prompts[at:], *prompts) if p != prompt), prompt)
            changed[i], rows[i] = other != prompt, {**raw[i], "prompt": other}
        if not changed.any():
            return None
        obs = to_device(stack_rows([self._transform.observation(row) for row in rows]), sharding)
        assert isinstance(obs, Observation)
        return changed, obs

    def _swap_sensitivity(self, model: VLA, raw: Sequence[dict], act: Act) -> dict[str, float]:
        if self._swapped is None:
            return {}
        changed, obs = self._swapped
        swapped = self._act(model, obs, self._key, partial(self._prompts, raw))
        a, b = (self._real_actions(raw, x, changed) for x in (act, swapped))
        metrics = {"swap_action": float(np.abs(a - b).mean())}
        if (writing := changed & self._writing).any():
            same = (np.asarray(act.text.ids) == np.asarray(swapped.text.ids)).all(-1)[writing]
            metrics["swap_text"] = float(1.0 - same.mean())
        return metrics
