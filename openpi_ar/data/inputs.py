"""A raw observation or sample -> the model's arrays. Training and the policy share this, so they cannot differ.

    raw observation  {"images": {camera: uint8 [h w 3]}, "state": [P_real], "prompt": str}
                     optional: "masked": names of cameras to go without; "template": name, default `text.template`;
                     "done": the subtasks that are completed [str], for `text.memory`
    raw sample       also {"actions": [A X_real], "action_valid": bool [A], "subtask": str}
                     optional: "supervise_text": bool, whether the text is in the loss
    raw question     {"images", "question": str, "answer": str, "template": "vqa"}: a sample that only trains text

This is the plain form, by the model's camera names; another robot sends its own names and units (`data/robot.py`), and
its actions come back in those. Real dimensions come from the normalisation statistics; the model's are padded with
zeros.
"""

from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
from typing import Any

import jax
import numpy as np

from openpi_ar.config import InferenceConfig, TrainConfig
from openpi_ar.data.normalize import NormStats
from openpi_ar.data.robot import Reading, Robot
from openpi_ar.data.shards import place
from openpi_ar.data.transforms import actions_from_model, actions_to_model, pad_dims
from openpi_ar.errors import UserError
from openpi_ar.images import resize_with_pad
from openpi_ar.robot_spec import plain
from openpi_ar.text.segments import Segment, Special, TokenArrays, pack
from openpi_ar.text.templates import TEMPLATES, Template, get_template, text_status
from openpi_ar.text.tokenizer import Tokenizer
from openpi_ar.types import Batch, Observation, Tokens

Arrays = dict[str, Any]
"""Numpy arrays: images, image_mask, state, prompt (a dict); of samples also target (a dict), actions, action_mask, and
action_prompt (a dict) where actions have a prompt of their own."""
_NOTHING = (Segment(Special.BOS),)
"""The prompt of actions that are not there."""


class InputTransform:
    """Checks, resizes, normalises, tokenizes and pads. Holds no state besides its configuration.

    Args:
        cfg: model, template, token budgets and robot.
        tokenizer: of the prompts.
        stats: normalisation statistics of "state" and "actions"; longer ones than the robot's are cut to it.
        average_padded_dims: padded action dimensions count in the loss (`LossConfig.average_padded_dims`).

    Raises:
        UserError: the robot has more dimensions than the model or the statistics, or cameras that the model lacks; the
            actions' prompt cannot hold a subtask, or the prompt no completed ones.
    """

    def __init__(
        self,
        cfg: InferenceConfig,
        tokenizer: Tokenizer,
        stats: Mapping[str, NormStats],
        *,
        average_padded_dims: bool = False,
    ):
        self.cfg, self.tokenizer = cfg, tokenizer
        spec = cfg.robot or plain(cfg.model.cameras)
        self.state_stats = stats["state"].first(spec.state_dims, "state")
        self.action_stats = stats["actions"].first(spec.action_dims, "actions")
        self.robot = Robot(spec, cfg.model.cameras, self.state_stats.dims, self.action_stats.dims)
        self._average_padded_dims = average_padded_dims
        if self.reprompts and (self.template().key != "subtask" or self.template().target is None):
            raise UserError(
                f"text.conditioning reprompt puts the subtask into the actions' prompt, but template "
                f"{cfg.text.template!r} writes none: use one that does ('subtask'), or --text.conditioning append"
            )
        self.template(cfg.text.action_template)
        self._check_memory()
        for name, real, model in (
            ("state", self.state_stats.dims, cfg.model.state_dim),
            ("action", self.action_stats.dims, cfg.model.action_dim),
        ):
            if real > model:
                raise UserError(
                    f"the data's {name}s have {real} dimensions but model.{name}_dim is {model}: set "
                    f"--model.{name}-dim to {real} or more"
                )

    @classmethod
    def for_training(cls, cfg: TrainConfig, tokenizer: Tokenizer, stats: Mapping[str, NormStats]) -> "InputTransform":
        """The transform of a run, which its policy shares."""
        return cls(cfg.inference, tokenizer, stats, average_padded_dims=cfg.loss.average_padded_dims)

    def _check_memory(self) -> None:
        text = self.cfg.text
        if text.memory < 0:
            raise UserError(f"text.memory must be 0 or more, found {text.memory}")
        if text.memory and not self.template().remembers:
            names = ", ".join(name for name, template in TEMPLATES.items() if template.remembers)
            raise UserError(
                f"text.memory is {text.memory}, but template {text.template!r} has no place for completed subtasks: "
                f"use one of {names}, or --text.memory 0"
            )

    @property
    def reprompts(self) -> bool:
        """Actions see a prompt of their own, with the subtask in it (`text.conditioning`)."""
        return self.cfg.text.conditioning == "reprompt"

    @property
    def writes_text(self) -> bool:
        """The config's template has a target: the model is trained to write something before it acts."""
        return self.template().target is not None

    def template(self, name: str | None = None) -> Template:
        """The template of that name, as a row's `raw["template"]` gives it; None: the config's. Raises UserError."""
        return get_template(name or self.cfg.text.template)

    def observation(self, raw: Mapping[str, Any]) -> Arrays:
        """Arrays of one observation, no batch axis. Raises UserError naming what is missing or does not fit."""
        return self.arrays(self.robot.read(raw))

    def observations(self, readings: Sequence[Reading], rows: int, *, resize: bool = True) -> Observation:
        """A batch of that many rows, numpy, in as few tokens as it takes (`shrink`). Raises UserError as `arrays`.

        Rows that are not read repeat the first one. Without `resize`, images stay as they are if all are of one size.
        """
        sizes = {image.shape[:2] for reading in readings for image in reading.images.values()}
        size = sizes.pop() if len(sizes) == 1 and not resize else None
        arrays = [self.arrays(reading, size=size) for reading in readings]
        stacked = stack_rows([*arrays, *arrays[:1] * (rows - len(arrays))])
        return shrink(Observation(**{**stacked, "prompt": Tokens(**stacked["prompt"])}), self.cfg.decode.prompt_buckets)

    def arrays(self, reading: Reading, *, needs_state: bool = False, size: tuple[int, int] | None = None) -> Arrays:
        """Arrays of what was read, images of `size` (None: the model's). Raises UserError if something does not fit.

        A state that is missing becomes zeros, unless the template or `needs_state` asks for it.
        """
        cameras, (height, width) = self.cfg.model.cameras, size or self.cfg.model.siglip.image_size
        images = np.zeros((len(cameras), height, width, 3), np.uint8)
        for i, camera in enumerate(cameras):
            if camera in reading.images:
                images[i] = resize_with_pad(reading.images[camera], height, width)
        if reading.state is None and (needs_state or self.template(reading.template).needs_state):
            raise self.robot.no_state()
        state = self._state(reading)
        state = np.zeros(self.state_stats.dims, np.float32) if state is None else state
        return {
            "images": images,
            "image_mask": np.array([camera in reading.images for camera in cameras]),
            "prompt": self.prompt(self.prompt_segments(reading)),
            "state": pad_dims(state, self.cfg.model.state_dim),
        }

    def prompt_segments(self, reading: Reading) -> list[Segment]:
        """Segments of the prompt. Raises UserError if there is no task, no state for it, or no memory for what is
        completed."""
        template, memory = self.template(reading.template), self.cfg.text.memory
        if reading.done and not memory:
            raise UserError(
                "observation['done'] tells which subtasks are completed, but this model was trained without a memory "
                "(text.memory 0): leave it out"
            )
        done = (reading.done or ())[-memory:] if template.remembers else ()
        return template.prompt_segments(template.task(reading.prompt, reading.question), self._state(reading), done)

    def recall(self, reading: Reading, done: Sequence[str]) -> Reading:
        """The reading with what a session has completed, unless it says so itself.

        The oldest are left out where the prompt has no room for all: a robot does not stop for what a model writes.
        """
        if reading.done is not None or not self.cfg.text.memory:
            return reading
        known = tuple(done[-self.cfg.text.memory :])
        while known:
            with contextlib.suppress(UserError):
                told = dataclasses.replace(reading, done=known)
                self.prompt(self.prompt_segments(told))
                return told
            known = known[1:]
        return reading

    def _state(self, reading: Reading) -> np.ndarray | None:
        """The state, normalised. It enters a prompt before it is padded: openpi's order; padding carries nothing."""
        return None if reading.state is None else self.state_stats.normalize(reading.state)

    def prompt(self, segments: Sequence[Segment]) -> TokenArrays:
        """A prompt as arrays. Raises UserError if it takes more tokens than its budget."""
        return pack(self.tokenizer, segments, self.cfg.text.max_prompt_tokens)

    def sample(self, raw: Mapping[str, Any]) -> Arrays:
        """Arrays of one training sample. A row without `actions` (questions and answers) trains the text only."""
        acts = raw.get("actions") is not None
        reading = self.robot.read(raw)
        arrays = self.arrays(reading, needs_state=acts)
        horizon, dims = self.cfg.model.action_horizon, self.cfg.model.action_dim
        if not acts:
            arrays["actions"] = np.zeros((horizon, dims), np.float32)
            arrays["action_mask"] = np.zeros((horizon, dims), bool)
        else:
            actions = np.asarray(raw["actions"])
            if actions.shape != (horizon, self.action_stats.dims) or not np.isfinite(actions).all():
                raise UserError(
                    f"sample['actions'] must be finite numbers [{horizon} {self.action_stats.dims}] (action_horizon, "
                    f"dimensions of the statistics), found {actions.dtype} {list(actions.shape)}"
                )
            assert reading.state is not None  # otherwise `arrays` has refused the row
            actions = actions_to_model(self.robot.spec, actions, reading.state)
            arrays["actions"] = pad_dims(self.action_stats.normalize(actions), dims)
            counted = dims if self._average_padded_dims else self.action_stats.dims
            valid = np.asarray(raw["action_valid"], bool)
            arrays["action_mask"] = valid[:, None] & (np.arange(dims) < counted)[None]
        arrays["target"] = self.target(raw)
        if self.reprompts:
            subtask = raw.get("subtask") if self.template(reading.template).key == "subtask" else None
            arrays["action_prompt"] = self.action_prompt(reading, subtask or "") if acts else self.prompt(_NOTHING)
        return arrays

    def action_prompt(self, reading: Reading, subtask: str) -> TokenArrays:
        """The prompt that actions see with `text.conditioning` reprompt: the subtask in place of the task.

        An empty subtask leaves the task where it is. Raises UserError if the prompt takes more tokens than its budget.
        """
        template = self.template(self.cfg.text.action_template)
        task = subtask.strip() or template.task(reading.prompt)
        return self.prompt(template.prompt_segments(task, self._state(reading)))

    def action_prompts(self, readings: Sequence[Reading], subtasks: Sequence[str], rows: int) -> Tokens:
        """`action_prompt` of each generated subtask, numpy, in as few tokens as it takes.

        One that takes more tokens than there is room for leaves the task where it is: a robot does not stop for what a
        model writes. Rows that are not read repeat the first one.
        """
        prompts = []
        for reading, subtask in zip(readings, subtasks, strict=True):
            try:
                prompts.append(self.action_prompt(reading, subtask))
            except UserError:
                prompts.append(self.action_prompt(reading, ""))
        stacked = stack_rows(prompts + prompts[:1] * (rows - len(prompts)))
        return shrink_prompt(Tokens(**stacked), self.cfg.decode.prompt_buckets)

    def target(self, raw: Mapping[str, Any]) -> TokenArrays:
        """What the model is to write, as arrays; all padding if the row's template has no target."""
        return pack(self.tokenizer, self.target_segments(raw), self.cfg.text.max_target_tokens)

    def target_segments(self, raw: Mapping[str, Any]) -> list[Segment]:
        """Segments of what the model is to write; none if the row's template has no target. Raises UserError."""
        template = self.template(raw.get("template"))
        if template.target is None:
            return []
        text = raw.get(template.key)
        if not isinstance(text, str) or not text.strip():
            raise UserError(
                f"template {template.name!r} trains the model to write sample[{template.key!r}], found {text!r}: "
                "annotate the data or use an action-only template (--text.template openpi)"
            )
        return template.target_segments(text, supervised=bool(raw.get("supervise_text", True)))

    def actions_to_real(self, actions: np.ndarray, readings: Sequence[Reading]) -> np.ndarray:
        """Model actions [B A X] to the robot's units and dimensions, float32 [B A X_real].

        They may be relative to the states of the B readings that they were asked for with.
        """
        real = self.action_stats.unnormalize(np.asarray(actions)[..., : self.action_stats.dims])
        states = [reading.state for reading in readings if reading.state is not None]
        if len(states) < len(readings):
            raise self.robot.no_state()
        return actions_from_model(self.robot.spec, real, np.stack(states)).astype(np.float32)

    def text(self, reading: Reading, ids: Sequence[int]) -> tuple[str, str]:
        """What the row's template has written with the ids that were generated, and `text_status` of them."""
        template = self.template(reading.template)
        return template.parse(self.tokenizer, list(ids)), text_status(ids, self.tokenizer.eos_id)


def stack_rows(rows: Sequence[Arrays]) -> Arrays:
    """Rows of equal structure to one with a leading batch axis, still numpy."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)


def to_device(arrays: Arrays, sharding: jax.sharding.Sharding | None = None) -> Any:
    """Stacked arrays to the model's types, on the device: a Batch if they hold actions, else an Observation."""
    a = place(arrays, sharding)
    obs = Observation(images=a["images"], image_mask=a["image_mask"], prompt=Tokens(**a["prompt"]), state=a["state"])
    if "actions" not in a:
        return obs
    actions, own = {name: a[name] for name in ("actions", "action_mask")}, a.get("action_prompt")
    prompt = None if own is None else Tokens(**own)
    return Batch(observation=obs, target=Tokens(**a["target"]), **actions, action_prompt=prompt)


def collate(rows: Sequence[Arrays]) -> Any:
    """A Batch of `sample` rows, or an Observation of `observation` rows."""
    return to_device(stack_rows(rows))


def shrink_prompt(prompt: Tokens, buckets: Sequence[int]) -> Tokens:
    """The prompts (numpy) cut to the smallest bucket that holds them."""
    longest = int(np.flatnonzero(np.asarray(prompt.valid).any(0)).max(initial=0)) + 1
    size = min((b for b in buckets if b >= longest), default=prompt.ids.shape[1])
    return jax.tree.map(lambda a: a[:, :size], prompt)


def shrink(obs: Observation, buckets: Sequence[int]) -> Observation:
    """The same observation (numpy) without cameras that no row has, prompts cut to the smallest bucket.

    Neither holds a position, so the numbers stay the same. Each number of cameras and each bucket has its own program.
    """
    seen = np.asarray(obs.image_mask).any(0)
    images, mask = obs.images[:, seen], obs.image_mask[:, seen]
    return dataclasses.replace(obs, images=images, image_mask=mask, prompt=shrink_prompt(obs.prompt, buckets))
