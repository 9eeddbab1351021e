"""The policy's compiled programs: talk-and-act in one, and its stages apart, for timing."""

from typing import Any

import jax
import numpy as np

from openpi_ar.algorithms import decode
from openpi_ar.algorithms.generate import as_draft
from openpi_ar.config import TrainConfig
from openpi_ar.models.pi0 import Pi0
from openpi_ar.types import Array, Observation, Tokens

Draft = tuple[Array, Array]
"""ids and valid [B M] of what may be said; nothing valid: no guess."""


class Programs:
    """Jitted functions of a model in its inference form (`Pi0.prepared`).

    Args:
        cfg: denoising steps, action sizes.
        budget: tokens said before acting; 0: none.
        speech: arguments of `generate`.
    """

    def __init__(self, cfg: TrainConfig, *, budget: int, speech: dict[str, Any]):
        self._steps, self._budget, self._speech = cfg.decode.denoise_steps, budget, speech
        self._drafts = cfg.decode.draft and cfg.decode.temperature == 0.0 and budget > 0
        self._chunk = (cfg.model.action_horizon, cfg.model.action_dim)
        self.act = jax.jit(self._act)
        self.images = jax.jit(lambda model, obs: model.embed_images(obs))
        self.prefill = jax.jit(self._prefill)
        self.generate = jax.jit(self._generate)
        self.flow = jax.jit(self._flow)

    def draft(self, batch: int, said: Draft | None) -> Draft | None:
        """What each row said last time; empty for rows that are new. None if texts are not to be checked or cannot be.

        Always there otherwise, so that one program serves all calls.
        """
        if not self._drafts:
            return None
        ids, valid = np.zeros((batch, self._budget), np.int32), np.zeros((batch, self._budget), bool)
        if said is not None:
            known = min(batch, len(said[0]))
            ids[:known], valid[:known] = said[0][:known], said[1][:known]
        return ids, valid

    def _act(
        self,
        model: Pi0,
        obs: Observation,
        key: jax.Array,
        text: Tokens | None,
        draft: Draft | None = None,
        table: Array | None = None,
    ) -> decode.Act:
        speech = {**self._speech, "max_tokens": self._budget}
        return decode.act(model, obs, key, num_steps=self._steps, text=text, draft=draft, table=table, **speech)

    def _guess(self, draft: Draft | None) -> Tokens | None:
        if draft is None:
            return None
        return as_draft(*draft, max_tokens=self._speech["max_tokens"], eos_id=self._speech["eos_id"])

    def _prefill(
        self, model: Pi0, obs: Observation, text: Tokens | None, images: Array, draft: Draft | None = None
    ) -> tuple[decode.Prefill, decode.KVCache]:
        return decode.prefill(model, obs, self._guess(draft) if text is None else text, image_tokens=images, lean=True)

    def _generate(
        self, model: Pi0, cache: decode.KVCache, out: decode.Prefill, key: Array, draft: Draft | None = None
    ) -> tuple[decode.Generated, decode.KVCache]:
        guess = self._guess(draft)
        return decode.generate(model, cache, out.prompt_last, key, draft=guess, draft_hidden=out.text, **self._speech)

    def _flow(self, model: Pi0, obs: Observation, cache: decode.KVCache, key: Array, table: Array | None) -> Array:
        noise = jax.random.normal(key, (obs.images.shape[0], *self._chunk))
        return decode.denoise(model, obs, cache, noise, num_steps=self._steps, table=table)
