"""The policy's compiled programs: random numbers, talk-and-act in one, and its stages apart, for timing."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from openpi_ar.algorithms import decode
from openpi_ar.algorithms.generate import as_draft
from openpi_ar.config import TrainConfig
from openpi_ar.models.pi0 import Pi0
from openpi_ar.types import Array, Observation, Tokens

Draft = tuple[Array, Array]
"""ids and valid [B M] of texts that may be generated again; nothing valid: no draft."""


class Drawn(NamedTuple):
    """Random numbers of one call, row by row: data of the keys of the next call, of the keys of sampled text; noise [B A X]."""

    next_keys: Array
    text_keys: Array
    noise: Array


class Programs:
    """Jitted functions of a model in its inference form (`Pi0.prepared`).

    Args:
        cfg: denoising steps, action sizes.
        budget: tokens generated before acting; 0: none.
        speech: arguments of `generate`.
    """

    def __init__(self, cfg: TrainConfig, *, budget: int, speech: dict[str, Any]):
        self._steps, self._speech = cfg.decode.denoise_steps, speech
        self.budget = budget
        self.drafts = cfg.decode.draft and cfg.decode.temperature == 0.0 and budget > 0
        self.chunk = (cfg.model.action_horizon, cfg.model.action_dim)
        self.draw = jax.jit(self._draw)
        self.act = jax.jit(self._act)
        self.images = jax.jit(lambda model, obs: model.embed_images(obs))
        self.prefill = jax.jit(self._prefill)
        self.generate = jax.jit(self._generate)
        self.flow = jax.jit(self._flow)

    def _draw(self, keys: Array) -> Drawn:
        """From the key data [B k] of the rows, each row by itself, so that none depends on its batch."""
        split = jax.vmap(jax.random.split)
        after = split(jax.random.wrap_key_data(jnp.asarray(keys)))
        now = split(after[:, 1])
        noise = jax.vmap(lambda key: jax.random.normal(key, self.chunk))(now[:, 1])
        return Drawn(jax.random.key_data(after[:, 0]), jax.random.key_data(now[:, 0]), noise)

    def _act(
        self,
        model: Pi0,
        obs: Observation,
        keys: Array,
        noise: Array,
        text: Tokens | None = None,
        draft: Draft | None = None,
        table: Array | None = None,
    ) -> decode.Act:
        out, cache = self._prefill(model, obs, text, model.embed_images(obs), draft)
        said = known(text, obs.images.shape[0])
        if text is None and self.budget:
            said, cache = self._generate(model, cache, out, keys, draft)
        return decode.Act(
            ids=said.ids, valid=said.valid, steps=said.steps, actions=self._flow(model, obs, cache, noise, table)
        )

    def _guess(self, draft: Draft | None) -> Tokens | None:
        if draft is None:
            return None
        return as_draft(*draft, max_tokens=self._speech["max_tokens"], eos_id=self._speech["eos_id"])

    def _prefill(
        self, model: Pi0, obs: Observation, text: Tokens | None, images: Array, draft: Draft | None = None
    ) -> tuple[decode.Prefill, decode.KVCache]:
        return decode.prefill(model, obs, self._guess(draft) if text is None else text, image_tokens=images, lean=True)

    def _generate(
        self, model: Pi0, cache: decode.KVCache, out: decode.Prefill, keys: Array, draft: Draft | None = None
    ) -> tuple[decode.Generated, decode.KVCache]:
        guess, key = self._guess(draft), jax.random.wrap_key_data(jnp.asarray(keys[0]))
        return decode.generate(model, cache, out.prompt_last, key, draft=guess, draft_hidden=out.text, **self._speech)

    def _flow(self, model: Pi0, obs: Observation, cache: decode.KVCache, noise: Array, table: Array | None) -> Array:
        return decode.denoise(model, obs, cache, noise, num_steps=self._steps, table=table)


def known(text: Tokens | None, batch: int) -> decode.Generated:
    """A text that is given; None: no text."""
    if text is not None:
        return decode.Generated.known(text.ids, text.valid)
    return decode.Generated.known(jnp.zeros((batch, 0), jnp.int32), jnp.zeros((batch, 0), bool))


def stacked_drafts(drafts: list[tuple[np.ndarray, np.ndarray] | None], budget: int) -> Draft:
    """Drafts of a batch's rows, cut to the budget; empty for rows without one, so that one program serves all calls."""
    ids, valid = np.zeros((len(drafts), budget), np.int32), np.zeros((len(drafts), budget), bool)
    for row, draft in enumerate(drafts):
        if draft is not None:
            n = min(budget, len(draft[0]))
            ids[row, :n], valid[row, :n] = draft[0][:n], draft[1][:n]
    return ids, valid
