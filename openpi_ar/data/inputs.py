"""A raw observation or sample -> the model's arrays. Training and the policy share this, so they cannot differ.

    raw observation  {"images": {camera: uint8 [h w 3]}, "state": [P_real], "prompt": str, "masked": camera names, optional}
    raw sample       also {"actions": [A X_real], "action_valid": bool [A], "subtask": str, "supervise_text": bool, optional}

Real dimensions come from the normalisation statistics; the model's are padded with zeros. With a `RobotSpec`, raw is what that
robot sends, under its own names and in its own units, and actions come back in those.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from openpi_ar.config import TrainConfig
from openpi_ar.data import robots
from openpi_ar.data.normalize import NormStats
from openpi_ar.data.robot_spec import RobotSpec
from openpi_ar.data.shards import place
from openpi_ar.data.transforms import pad_dims
from openpi_ar.errors import UserError
from openpi_ar.text import prompts
from openpi_ar.text.tokenizer import Tokenizer
from openpi_ar.types import Batch, Observation, Tokens

Arrays = dict[str, Any]
"""Nested dict of numpy arrays: images, image_mask, state, prompt (a dict), and for samples target (a dict), actions,
action_mask."""


def resize_with_pad(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [h w 3] to [height width 3]: bilinear, aspect kept, black borders (openpi's `resize_with_pad`).

    `models/resize.py` is the same inside a program.
    """
    h, w = image.shape[:2]
    if (h, w) == (height, width):
        return image
    ratio = max(w / width, h / height)
    new_h, new_w = max(1, int(h / ratio)), max(1, int(w / ratio))
    top, left = (height - new_h) // 2, (width - new_w) // 2
    out = np.zeros((height, width, 3), np.uint8)
    small = Image.fromarray(image).resize((new_w, new_h), resample=Image.Resampling.BILINEAR)
    out[top : top + new_h, left : left + new_w] = np.asarray(small)
    return out


class InputTransform:
    """Checks, resizes, normalises, tokenizes and pads. Holds no state besides its configuration.

    Args:
        cfg: model, template and token budgets.
        tokenizer: of the prompts.
        stats: normalisation statistics of "state" and "actions"; longer ones than the robot's are cut to it.
        robot: what raw observations are; None: the robot whose LeRobot dataset the config trains on, which may also send
            this module's own form; for other data that form only.

    Raises:
        UserError: the robot has more dimensions than the model or the statistics, or cameras that the model lacks.
    """

    def __init__(
        self, cfg: TrainConfig, tokenizer: Tokenizer, stats: Mapping[str, NormStats], robot: RobotSpec | None = None
    ):
        self.cfg, self.tokenizer = cfg, tokenizer
        self.state_stats, self.action_stats = stats["state"], stats["actions"]
        robot = robot or robots.of_config(cfg, self.state_stats.dims, self.action_stats.dims)
        self.robot = robot
        if robot is not None:
            self.state_stats = self.state_stats.first(robot.state_dims or self.state_stats.dims, "state")
            self.action_stats = self.action_stats.first(robot.action_dims or self.action_stats.dims, "actions")
            robot.check_dims(self.state_stats.dims, self.action_stats.dims)
            if strange := [c for c in robot.cameras.values() if c not in cfg.model.cameras]:
                raise UserError(
                    f"robot {robot.name} feeds camera {', '.join(strange)}, but the model reads "
                    f"{', '.join(cfg.model.cameras)}: it is not a model for this robot"
                )
        for name, real, model in (
            ("state", self.state_stats.dims, cfg.model.state_dim),
            ("action", self.action_stats.dims, cfg.model.action_dim),
        ):
            if real > model:
                raise UserError(
                    f"the data's {name}s have {real} dimensions but model.{name}_dim is {model}: set "
                    f"--model.{name}-dim to {real} or more"
                )

    @property
    def says_text(self) -> bool:
        """The template has a target: the model is trained to say something before it acts."""
        return prompts.TEMPLATES[self.cfg.text.template].target is not None

    def observation(self, raw: Mapping[str, Any], *, needs_state: bool = True, resize: bool = True) -> Arrays:
        """Arrays of one observation, no batch axis. Raises UserError naming what is missing or does not fit.

        Without `needs_state`, a state that is left out is taken to be the average one. Without `resize`, images of one
        size stay as they are, for the model to resize them.
        """
        images, mask = self._images(raw, resize)
        state = self.state(raw, needed=needs_state)
        prompt = raw.get("prompt") if self.robot is None else self.robot.prompt_of(raw)
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"observation['prompt'] must be a text that says what to do, found {prompt!r}")
        normalised = self.state_stats.normalize(state)
        text = self.cfg.text
        # The state enters the prompt before it is padded: openpi's order, and padding says nothing.
        tokens = prompts.encode_prompt(self.tokenizer, text.template, prompt, normalised, text.max_prompt_tokens)
        return {
            "images": images,
            "image_mask": mask,
            "prompt": tokens,
            "state": pad_dims(normalised, self.cfg.model.state_dim),
        }

    def sample(self, raw: Mapping[str, Any]) -> Arrays:
        """Arrays of one training sample. A row without `actions` (questions and answers) trains the text only."""
        arrays = self.observation(raw)
        horizon, dims = self.cfg.model.action_horizon, self.cfg.model.action_dim
        if raw.get("actions") is None:
            arrays["actions"] = np.zeros((horizon, dims), np.float32)
            arrays["action_mask"] = np.zeros((horizon, dims), bool)
        else:
            actions = np.asarray(raw["actions"])
            if actions.shape != (horizon, self.action_stats.dims) or not np.isfinite(actions).all():
                raise UserError(
                    f"sample['actions'] must be finite numbers [{horizon} {self.action_stats.dims}] (action_horizon, "
                    f"dimensions of the statistics), found {actions.dtype} {list(actions.shape)}"
                )
            if self.robot is not None:
                actions = self.robot.actions_to_model(actions, self.state(raw), self.cfg.model.pi05)
            arrays["actions"] = pad_dims(self.action_stats.normalize(actions), dims)
            counted = dims if self.cfg.loss.average_padded_dims else self.action_stats.dims
            valid = np.asarray(raw["action_valid"], bool)
            arrays["action_mask"] = valid[:, None] & (np.arange(dims) < counted)[None]
        arrays["target"] = self.target(raw)
        return arrays

    def target(self, raw: Mapping[str, Any]) -> prompts.TokenArrays:
        """The text to be said; all padding if the template has none."""
        budget = self.cfg.text.max_target_tokens
        if not self.says_text:
            tokens = {"ids": np.zeros(budget, np.int32), "kind": np.zeros(budget, np.int8)}
            return tokens | {bit: np.zeros(budget, bool) for bit in ("valid", "causal", "loss", "hidden")}
        subtask = raw.get("subtask")
        if not isinstance(subtask, str) or not subtask.strip():
            raise UserError(
                f"template {self.cfg.text.template!r} trains the model to say the subtask, but sample['subtask'] is "
                f"{subtask!r}: annotate the data or use an action-only template (--text.template openpi)"
            )
        tokens = prompts.encode_target(self.tokenizer, self.cfg.text.template, subtask, budget)
        if not raw.get("supervise_text", True):
            tokens = {**tokens, "loss": np.zeros(budget, bool)}
        return tokens

    def actions_to_real(self, actions: np.ndarray, raws: Sequence[Mapping[str, Any]] = ()) -> np.ndarray:
        """Model actions [... A X] to the robot's units and dimensions, float32 [... A X_real].

        With a robot, actions are [B A X] and `raws` the B observations they were asked for with: actions may be relative
        to their states.
        """
        real = self.action_stats.unnormalize(np.asarray(actions)[..., : self.action_stats.dims])
        if self.robot is None:
            return real
        states = np.stack([self.state(raw) for raw in raws])
        return self.robot.actions_from_model(real, states, self.cfg.model.pi05).astype(np.float32)

    def state(self, raw: Mapping[str, Any], *, needed: bool = True) -> np.ndarray:
        """The observation's state before normalisation [P_real]. Raises UserError if it does not fit."""
        value = raw.get("state") if self.robot is None else self.robot.state_vector(raw)
        if value is None and not needed:
            return self.state_stats.mean.astype(np.float32)
        dims, names = self.state_stats.dims, ["state"] if self.robot is None else list(self.robot.state)
        where = " and ".join(f"observation[{name!r}]" for name in names)
        value = np.asarray(value)
        if value.dtype.kind not in "fiu" or value.shape != (dims,):
            raise UserError(f"{where} must be {dims} numbers, found {value.dtype} {list(value.shape)}")
        if not np.isfinite(value).all():
            raise UserError(f"{where} holds values that are not finite: {value.tolist()}")
        return value.astype(np.float32)

    def _images(self, raw: Mapping[str, Any], resize: bool) -> tuple[np.ndarray, np.ndarray]:
        if self.robot is None:
            images, masked = raw.get("images"), set(raw.get("masked", ()))
        else:
            images = self.robot.images(raw)
            masked = set(self.cfg.model.cameras) - set(images)
        if not isinstance(images, Mapping):
            raise UserError(f"observation['images'] must map camera names to images, found {type(images).__name__}")
        mask = np.zeros(len(self.cfg.model.cameras), bool)
        found: dict[int, np.ndarray] = {}
        for i, name in enumerate(self.cfg.model.cameras):
            if name in masked:
                continue
            if name not in images:
                raise UserError(
                    f"camera {name!r} is missing: the model reads {', '.join(self.cfg.model.cameras)}, the observation "
                    f"has {', '.join(map(str, images)) or 'none'}; name it in observation['masked'] to go without it"
                )
            image = np.asarray(images[name])
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
                raise UserError(
                    f"camera {name!r} must be a uint8 RGB image [height width 3], found {image.dtype} "
                    f"{list(image.shape)}"
                )
            found[i], mask[i] = image, True
        if not found:
            raise UserError("every camera is masked: at least one image is needed")
        sizes = {image.shape[:2] for image in found.values()}
        height, width = sizes.pop() if len(sizes) == 1 and not resize else self.cfg.model.siglip.image_size
        stack = np.zeros((len(mask), height, width, 3), np.uint8)
        for i, image in found.items():
            stack[i] = resize_with_pad(image, height, width)
        return stack, mask


def stack_rows(rows: Sequence[Arrays]) -> Arrays:
    """Rows of equal structure to one with a leading batch axis, still numpy."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)


def to_device(arrays: Arrays, sharding: jax.sharding.Sharding | None = None) -> Batch | Observation:
    """Stacked arrays to the model's types, on the device. A Batch if they hold actions."""
    a = place(arrays, sharding)
    obs = Observation(images=a["images"], image_mask=a["image_mask"], prompt=Tokens(**a["prompt"]), state=a["state"])
    if "actions" not in a:
        return obs
    return Batch(observation=obs, target=Tokens(**a["target"]), actions=a["actions"], action_mask=a["action_mask"])


def collate(rows: Sequence[Arrays]) -> Batch | Observation:
    """A Batch of `sample` rows, or an Observation of `observation` rows."""
    return to_device(stack_rows(rows))
