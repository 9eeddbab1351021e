"""A raw observation or sample -> the model's arrays. Training and the policy share this, so they cannot differ.

    raw observation  {"images": {camera: uint8 [h w 3]}, "state": [P_real], "prompt": str}
                     optional: "masked": names of cameras to go without; "template": name, default `text.template`
    raw sample       also {"actions": [A X_real], "action_valid": bool [A], "subtask": str}
                     optional: "supervise_text": bool, whether the text is in the loss
    raw question     {"images", "question": str, "answer": str, "template": "vqa"}: a sample that only trains text

Real dimensions come from the normalisation statistics; the model's are padded with zeros. With a `RobotSpec`, raw is what that
robot sends, under its own names and in its own units, and actions come back in those.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from openpi_ar.config import TrainConfig
from openpi_ar.data import robots
from openpi_ar.data.normalize import NormStats
from openpi_ar.data.robot_spec import RobotSpec
from openpi_ar.data.shards import place
from openpi_ar.data.transforms import pad_dims
from openpi_ar.errors import UserError
from openpi_ar.images import resize_with_pad
from openpi_ar.text.segments import Segment, TokenArrays, pack
from openpi_ar.text.templates import Template, get_template
from openpi_ar.text.tokenizer import Tokenizer
from openpi_ar.types import Batch, Observation, Tokens

Arrays = dict[str, Any]
"""Nested dict of numpy arrays: images, image_mask, state, prompt (a dict), and for samples target (a dict), actions,
action_mask."""


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
    def writes_text(self) -> bool:
        """The config's template has a target: the model is trained to write something before it acts."""
        return self.template({}).target is not None

    def template(self, raw: Mapping[str, Any]) -> Template:
        """The row's template: `raw["template"]`, by default the config's. Raises UserError if there is none of that name."""
        return get_template(raw.get("template") or self.cfg.text.template)

    def observation(self, raw: Mapping[str, Any], *, resize: bool = True) -> Arrays:
        """Arrays of one observation, no batch axis. Raises UserError naming what is missing or does not fit.

        A state that is missing and not needed (see `normalised_state`) becomes zeros. Without `resize`, images of one size
        stay as they are, for the model to resize them.
        """
        images, mask = self._images(raw, resize)
        state = self.normalised_state(raw)
        # The state enters the prompt before it is padded: openpi's order, and padding says nothing.
        prompt = pack(self.tokenizer, self.prompt_segments(raw, state), self.cfg.text.max_prompt_tokens)
        state = np.zeros(self.state_stats.dims, np.float32) if state is None else state
        return {
            "images": images,
            "image_mask": mask,
            "prompt": prompt,
            "state": pad_dims(state, self.cfg.model.state_dim),
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
                actions = self.robot.actions_to_model(actions, self.state(raw), self.cfg.model.kind)
            arrays["actions"] = pad_dims(self.action_stats.normalize(actions), dims)
            counted = dims if self.cfg.loss.average_padded_dims else self.action_stats.dims
            valid = np.asarray(raw["action_valid"], bool)
            arrays["action_mask"] = valid[:, None] & (np.arange(dims) < counted)[None]
        arrays["target"] = self.target(raw)
        return arrays

    def target(self, raw: Mapping[str, Any]) -> TokenArrays:
        """What the model is to write, as arrays; all padding if the row's template has no target."""
        return pack(self.tokenizer, self.target_segments(raw), self.cfg.text.max_target_tokens)

    def prompt_segments(self, raw: Mapping[str, Any], state: np.ndarray | None) -> list[Segment]:
        """Segments of the row's prompt, from `normalised_state` of it. Raises UserError as `Template.prompt_text`."""
        template = self.template(raw)
        name = "question" if template.key == "answer" and raw.get("question") is not None else "prompt"
        task = raw.get(name) if name == "question" or self.robot is None else self.robot.prompt_of(raw)
        if not isinstance(task, str) or not task.strip():
            raise UserError(f"observation[{name!r}] must be a text that says what to do, found {task!r}")
        return template.prompt_segments(task, state)

    def target_segments(self, raw: Mapping[str, Any]) -> list[Segment]:
        """Segments of what the model is to write; none if the row's template has no target. Raises UserError."""
        template = self.template(raw)
        if template.target is None:
            return []
        text = raw.get(template.key)
        if not isinstance(text, str) or not text.strip():
            raise UserError(
                f"template {template.name!r} trains the model to write sample[{template.key!r}], found {text!r}: annotate "
                f"the data or use an action-only template (--text.template openpi)"
            )
        return template.target_segments(text, supervised=bool(raw.get("supervise_text", True)))

    def actions_to_real(self, actions: np.ndarray, raws: Sequence[Mapping[str, Any]] = ()) -> np.ndarray:
        """Model actions [... A X] to the robot's units and dimensions, float32 [... A X_real].

        With a robot, actions are [B A X] and `raws` the B observations they were asked for with: actions may be relative
        to their states.
        """
        real = self.action_stats.unnormalize(np.asarray(actions)[..., : self.action_stats.dims])
        if self.robot is None:
            return real
        states = np.stack([self.state(raw) for raw in raws])
        return self.robot.actions_from_model(real, states, self.cfg.model.kind).astype(np.float32)

    def normalised_state(self, raw: Mapping[str, Any]) -> np.ndarray | None:
        """The normalised state [P_real]; None if there is none and the row does without: no actions, and a template that
        needs no state. Raises UserError if it does not fit."""
        given = raw.get("state") if self.robot is None else self.robot.state_vector(raw)
        if given is None and not self.template(raw).needs_state and raw.get("actions") is None:
            return None
        return self.state_stats.normalize(self._checked(given))

    def state(self, raw: Mapping[str, Any]) -> np.ndarray:
        """The observation's state before normalisation [P_real]. Raises UserError if it is missing or does not fit."""
        return self._checked(raw.get("state") if self.robot is None else self.robot.state_vector(raw))

    def _checked(self, state: Any) -> np.ndarray:
        dims, names = self.state_stats.dims, ["state"] if self.robot is None else list(self.robot.state)
        where = " and ".join(f"observation[{name!r}]" for name in names)
        value = np.asarray(state)
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
