"""A vision-language model as a function of images and a question: captions, answers, detection, segmentation.

    question -> template (text/templates.py) -> one prefill and a decode loop -> text -> boxes (text/places.py)

It needs no robot, no state and no statistics, so any checkpoint that writes text will do. A `Policy` is one that also
acts.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from pathlib import Path
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from openpi_ar.algorithms.act import STAGES, talk
from openpi_ar.algorithms.sampling import AllowedIds, text_sampling
from openpi_ar.config import DecodeConfig, TextConfig
from openpi_ar.data.inputs import shrink
from openpi_ar.data.robot import to_uint8_image
from openpi_ar.errors import UserError
from openpi_ar.images import fit, unfit
from openpi_ar.models.vlm import VLM
from openpi_ar.policy.confidence import row_of
from openpi_ar.policy.programs import Stages, milliseconds, wrapped_keys
from openpi_ar.policy.session import Session
from openpi_ar.text.places import GRID, find_places
from openpi_ar.text.segments import pack
from openpi_ar.text.templates import asks_for_places, question_template, text_status
from openpi_ar.text.tokenizer import Tokenizer
from openpi_ar.types import Observation, Tokens

Images = Mapping[str, Any] | Sequence[np.ndarray] | np.ndarray
Result = dict[str, Any]


class Talker:
    """Answers questions about images. It remembers nothing.

    Args:
        model: in its inference form.
        tokenizer: the checkpoint's.
        text: token budgets; the template is the question's.
        decode: how text is sampled.
        notes: what a user should know of the checkpoint.

    Raises:
        UserError: the tokenizer has more pieces than the model reads.
    """

    def __init__(
        self, model: VLM, tokenizer: Tokenizer, text: TextConfig, decode: DecodeConfig, notes: Sequence[str] = ()
    ):
        vocab = model.cfg.vocab_size
        if tokenizer.vocab_size > vocab:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} pieces but the model reads {vocab}: "
                "use the tokenizer that the model was trained with"
            )
        self.tokenizer, self.notes = tokenizer, tuple(notes)
        self._model, self._limits, self._buckets = model, text, decode.prompt_buckets
        self._answers = text_sampling(decode, tokenizer, vocab, text.max_target_tokens)
        places = np.pad(tokenizer.allowed_text | tokenizer.places, (0, vocab - tokenizer.vocab_size))
        self._pointing = dataclasses.replace(self._answers, constraint=AllowedIds(jnp.asarray(places)))
        self._stages = Stages()

    @staticmethod
    def from_checkpoint(path: str | Path, **options: Any) -> "Talker":
        """Answers of any checkpoint that writes text: `openpi_ar.policy.load_talker`, which see."""
        from openpi_ar.policy.checkpoint import load_talker  # imports this module

        return load_talker(path, **options)

    @property
    def cameras(self) -> tuple[str, ...]:
        """Names of the model's images, in its order."""
        return self._model.cfg.cameras

    def infer(self, *_: Any, **__: Any) -> Any:
        """Raises UserError: only a `Policy` acts."""
        raise UserError(
            "this checkpoint has no action tower, so it cannot act; it answers questions about images: "
            "load_talker(path).answer(images, question), or infer.py --images a.png --question TEXT"
        )

    def answer(self, images: Images, question: str, *, seed: int = 0) -> Result:
        """The answer to a question about images.

        Args:
            images: uint8 RGB [h w 3], one, or several in the model's order, or {camera: image} by the model's names
                (whatever their names, if it has only one). Floats in [0, 1] and channels first are understood too.
            question: in plain words, or one of PaliGemma's prompts, taken as typed: `answer en ...`, `caption en`,
                `detect cup ; plate`, `segment cup`.
            seed: of sampled text.

        Returns:
            `answer`: the text, with the <loc> and <seg> tokens of a detection. `boxes`: its objects, each `label`,
            `box` (top, left, bottom, right in pixels of the first image) and `code` (16 numbers of a segmentation's
            mask, or None); `stray_tokens`: <loc> and <seg> tokens that belong to no object. `text_status`: "ok",
            "truncated" (no end within the budget) or "loop". `logprobs`, `logprob` and `margin`: `confidence`.
            `timing` in ms; the first call compiles.

        Raises:
            UserError: the question or an image is empty or no such thing, the question is longer than the budget, or
                the model's logits are not numbers.
        """
        start = time.perf_counter()
        if not isinstance(question, str) or not question.strip():
            raise UserError(f"the question is empty: ask something about the image, found {question!r}")
        template, pixels = question_template(question), self.pictures(images)
        obs = self._observation(
            pixels, pack(self.tokenizer, template.prompt_segments(question), self._limits.max_prompt_tokens)
        )
        sampling = self._pointing if asks_for_places(question) else self._answers
        run, ms = self._stages.timed()
        out = talk(self._model, obs, sampling, keys=wrapped_keys(sampling, Session(seed).key[None]), run=run).text
        ids, sure = row_of(jax.tree.map(np.asarray, out), 0)
        answer = template.parse(self.tokenizer, ids)
        ms["total"] = milliseconds(time.perf_counter() - start)
        status = text_status(ids, self.tokenizer.eos_id)
        places = self._places(answer, pixels[0])
        return {"answer": answer, "text_status": status, **sure, **places, "timing": ms}

    def measure_answer(self, images: Images, question: str, *, seed: int = 0, repeats: int = 0) -> Result:
        """`answer`, with `timing` as in `measured`."""
        return measured(lambda _: self.answer(images, question, seed=seed), repeats)

    def pictures(self, images: Images) -> list[np.ndarray]:
        """The images in the model's order, uint8 [h w 3]. Raises UserError as `answer`."""
        if isinstance(images, Mapping):
            if len(self.cameras) > 1 and (strange := [name for name in images if name not in self.cameras]):
                raise UserError(f"the model has no camera {strange[0]!r}: it reads {', '.join(self.cameras)}")
            named = sorted(
                images.items(), key=lambda item: self.cameras.index(item[0]) if item[0] in self.cameras else 0
            )
        else:
            several = [images] if isinstance(images, np.ndarray) and images.ndim == 3 else images
            named = [(f"image {i}", image) for i, image in enumerate(several, 1)]
        if not named:
            raise UserError("there is no image: give one or more")
        return [to_uint8_image(image, name) for name, image in named]

    def _observation(self, images: list[np.ndarray], prompt: Mapping[str, np.ndarray]) -> Observation:
        """A batch of one row; cameras without an image are left out, as they hold no position."""
        cfg = self._model.cfg
        fitted = [fit(image, *cfg.siglip.image_size, keeps_aspect=cfg.keeps_aspect) for image in images]
        obs = Observation(
            images=np.stack(fitted)[None],
            image_mask=np.ones((1, len(fitted)), bool),
            prompt=Tokens(**jax.tree.map(lambda a: a[None], dict(prompt))),
            state=np.zeros((1, 0), np.float32),
        )
        return shrink(obs, self._buckets)

    def _places(self, answer: str, image: np.ndarray) -> Result:
        """The objects of an answer, in pixels of the image."""
        places, stray = find_places(answer)
        cfg, size = self._model.cfg, (image.shape[0], image.shape[1])
        boxes = []
        for place in places:
            fractions = [side / GRID for side in place.box]
            box = unfit(fractions, size, *cfg.siglip.image_size, keeps_aspect=cfg.keeps_aspect)
            boxes.append({"label": place.label, "box": box, "code": place.code})
        return {"boxes": boxes, "stray_tokens": stray}


def measured(call: Callable[[bool], dict[str, Any]], repeats: int) -> dict[str, Any]:
    """The result of one call, with `timing` measured over several.

    `call(apart)` returns a result with its `timing`: of the stages, apart or in any case, and `total`. `timing` in ms:
    `first_call` is the total of the first call, compilation included if this shape was new. With `repeats` also medians
    of that many calls of warm programs: each stage, which may compile a program for each, and `total`.
    """
    result = call(False)
    first = {"first_call": result["timing"]["total"]}
    if not repeats:
        return {**result, "timing": first}
    warm = [call(False)["timing"] for _ in range(repeats)]
    staged = warm if STAGES[0] in warm[0] else [call(True)["timing"] for _ in range(1 + repeats)][1:]
    medians = {name: float(np.median([ms[name] for ms in staged])) for name in STAGES if name in staged[0]}
    total = float(np.median([ms["total"] for ms in warm]))
    return {**result, "timing": {**medians, "total": total, **first}}
