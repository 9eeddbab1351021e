"""One robot: what its observations are called, how many dimensions they have, and what is done to its numbers before a model
learns them, forward beside inverse. The table of robots, and files of your own, are in `data/robots.py`.
"""

from collections.abc import Mapping
import dataclasses
import re
from typing import Any

import numpy as np

from openpi_ar.data import transforms
from openpi_ar.errors import UserError
from openpi_ar.text.templates import TEMPLATES

IMAGES, STATE, ACTIONS, PROMPT = "images", "state", "actions", "prompt"
ANY = "*"
"""In `RobotSpec.unused`: other images than those of `cameras` may be there, whatever they are called."""

_SLICE = re.compile(r"^(?P<name>[^\[\]]+)(\[(?P<start>\d*)(?P<colon>:?)(?P<stop>\d*)\])?$")


@dataclasses.dataclass(frozen=True)
class Variant:
    """What differs between pi0 and pi0.5 on the same robot."""

    horizon: int = 50
    """Actions in a chunk; parameters do not tell it."""
    template: str = "openpi"
    """A key of `openpi_ar.text.templates.TEMPLATES`."""
    delta: tuple[bool, ...] = ()
    """Action dimensions that the model predicts relative to the state; dimensions past its end are absolute."""


@dataclasses.dataclass(frozen=True)
class RobotSpec:
    """One robot. Plain data: `robots.dumps` and `robots.loads` take it to JSON and back.

    Raw keys are paths joined by "/" or ".": "images/cam_high" is `raw["images"]["cam_high"]` as well as
    `raw["images/cam_high"]` and `raw["images.cam_high"]`.
    """

    name: str
    cameras: dict[str, str]
    """Raw key of an image -> camera of the model. The model's other cameras are masked. "a|b": either key."""
    state: dict[str, int]
    """Raw keys of the state's parts and their dimensions, concatenated in this order; 0: whatever is there. A key may end in
    a slice: "observation.state[0:7]"."""
    action_dims: int = 0
    """The model's first action dimensions are the robot's; 0: those of the statistics."""
    pi0: Variant = Variant(template="openpi_pi0")
    pi05: Variant = Variant()
    actions: tuple[str, ...] = ("action",)
    """Features of a LeRobot dataset that are the action, side by side; slices as in `state`."""
    optional: tuple[str, ...] = ()
    """Raw keys of cameras that may be left out (masked then)."""
    unused: tuple[str, ...] = ()
    """Names in raw["images"] that the robot sends and no model reads."""
    flips: tuple[int, ...] = ()
    """Signs between the robot's joints and those of the runtime that the base models were trained with."""
    aloha_grippers: tuple[int, ...] = ()
    """Dimensions of state and actions that hold ALOHA grippers."""
    inverted_grippers: tuple[int, ...] = ()
    """Dimensions of state and actions that hold grippers of the other sense: x becomes 1 - x."""
    asset_ids: tuple[str, ...] = ()
    """Directories under a checkpoint's `assets/` that openpi puts this robot's statistics in."""
    prompt: str | None = None
    """What to do if an observation does not say it."""

    def __post_init__(self):
        problems = []
        if not self.cameras or len(set(self.cameras.values())) != len(self.cameras):
            problems.append(f"cameras must name at least one image, each for its own camera, found {self.cameras}")
        if not self.state or any(not isinstance(n, int) or n < 0 for n in self.state.values()) or self.action_dims < 0:
            problems.append(f"dimensions must be positive, found state {self.state}, action_dims {self.action_dims}")
        if wrong := [key for key in (*self.state, *self.actions) if not _SLICE.match(key)]:
            problems.append(f"{wrong[0]!r} is neither a key nor one with a slice, key[3] or key[0:7]")
        if unknown := set(self.optional) - set(self.cameras):
            problems.append(f"optional names {', '.join(sorted(unknown))}, which cameras does not")
        if set(self.flips) - {1, -1}:
            problems.append(f"flips must be signs +-1, found {self.flips}")
        if both := set(self.aloha_grippers) & set(self.inverted_grippers):
            problems.append(f"dimension {min(both)} is both an ALOHA gripper and an inverted one")
        if self.state_dims and self.action_dims:
            problems += self._misfits(self.state_dims, self.action_dims)
        for kind, v in (("pi0", self.pi0), ("pi05", self.pi05)):
            if v.horizon < 1:
                problems.append(f"{kind}: horizon must be positive, found {v.horizon}")
            if v.template not in TEMPLATES:
                problems.append(f"{kind}: unknown template {v.template!r}; choose one of {', '.join(TEMPLATES)}")
        if problems:
            raise ValueError(f"robot {self.name!r}: " + "; ".join(problems))

    @property
    def state_dims(self) -> int:
        """Dimensions of the concatenated state; 0: not known."""
        return sum(self.state.values()) if all(self.state.values()) else 0

    def check_dims(self, state: int, actions: int) -> None:
        """Raises UserError if something is said of dimensions that states or actions of that many do not have."""
        if problems := self._misfits(state, actions):
            raise UserError(f"robot {self.name!r}: " + "; ".join(problems))

    def _misfits(self, state: int, actions: int) -> list[str]:
        dims, problems = min(state, actions), []
        if len(self.flips) > dims:
            problems.append(f"flips must be up to {dims} signs +-1, found {len(self.flips)}")
        for name in ("aloha_grippers", "inverted_grippers"):
            if any(not 0 <= i < dims for i in getattr(self, name)):
                problems.append(f"{name} must be dimensions under {dims}, found {getattr(self, name)}")
        for kind, v in (("pi0", self.pi0), ("pi05", self.pi05)):
            if len(v.delta) > dims:
                problems.append(f"{kind}: delta no longer than {dims}, found {len(v.delta)}")
        return problems

    def variant(self, kind: str) -> Variant:
        """What a model of this kind is fed (`ModelConfig.kind`)."""
        return {"pi0": self.pi0, "pi05": self.pi05}[kind]

    def images(self, raw: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Images [h w 3] by the model's camera names; those in raw["masked"] are left out.

        Besides its raw key an image may go by the key's last part or by the model's camera name, alone or in
        raw["images"]. Raises UserError naming an image that is missing, or one in raw["images"] that is none of these.
        """
        flat, masked = _flatten(raw), set(raw.get("masked", ()))
        found, known = {}, {f"{IMAGES}/{name}" for name in self.unused}
        for key, camera in self.cameras.items():
            places = _places(key, camera)
            known |= set(places)
            present = [place for place in places if place in flat]
            if masked & set(places) or (not present and key in self.optional):
                continue
            if not present:
                others = [k for k in flat if k not in (PROMPT, STATE, *map(_path, self.state))]
                raise UserError(
                    f"image {_first(key)!r} is missing: robot {self.name} sends {', '.join(map(_first, self.cameras))}; found "
                    f"{', '.join(others) or 'no image'}"
                )
            found[camera] = transforms.to_uint8_image(flat[present[0]], key)
        strange = [k for k in flat if k.startswith(f"{IMAGES}/") and k not in known]
        if strange and ANY not in self.unused:
            raise UserError(
                f"robot {self.name} has no image {strange[0]!r}: it sends {', '.join(map(_first, self.cameras))}"
            )
        return found

    def state_vector(self, raw: Mapping[str, Any]) -> np.ndarray | None:
        """The state in the runtime's convention, float64 [P_real]; None if raw holds none of it.

        Either its parts under their keys, or the whole under "state". Raises UserError if a part is missing or misfit.
        """
        flat = _flatten(raw)
        if any(_path(key) in flat for key in self.state):
            parts = [_part(self.name, flat, key, dims) for key, dims in self.state.items()]
            x = np.concatenate(parts)
        elif STATE in flat:
            x = _part(self.name, flat, STATE, self.state_dims)
        else:
            return None
        return self.state_to_model(x)

    def state_to_model(self, state: np.ndarray) -> np.ndarray:
        """The robot's states [... P_real] in the runtime's convention, before normalisation; float64."""
        x = transforms.flip(np.asarray(state, np.float64), self.flips)
        grippers, inverted = list(self.aloha_grippers), list(self.inverted_grippers)
        if grippers:
            x[..., grippers] = transforms.aloha_gripper_state_to_pi(x[..., grippers])
        x[..., inverted] = transforms.invert(x[..., inverted])
        return x

    def actions_to_model(self, actions: np.ndarray, state: np.ndarray, kind: str) -> np.ndarray:
        """The robot's actions [... A X_real] as a model predicts them before normalisation.

        `state` [... P_real] as `state_vector` gives it.
        """
        return transforms.to_delta(self.absolute_to_model(actions), state, self.variant(kind).delta)

    def absolute_to_model(self, actions: np.ndarray) -> np.ndarray:
        """`actions_to_model` [... X_real] without its last part, which makes them relative to the state."""
        x = transforms.flip(np.asarray(actions, np.float64), self.flips)
        grippers, inverted = list(self.aloha_grippers), list(self.inverted_grippers)
        x[..., grippers] = transforms.aloha_gripper_action_to_pi(x[..., grippers])
        x[..., inverted] = transforms.invert(x[..., inverted])
        return x

    def actions_from_model(self, actions: np.ndarray, state: np.ndarray, kind: str) -> np.ndarray:
        """Inverse of `actions_to_model`."""
        x = transforms.to_absolute(np.asarray(actions, np.float64), state, self.variant(kind).delta)
        grippers, inverted = list(self.aloha_grippers), list(self.inverted_grippers)
        x[..., inverted] = transforms.invert(x[..., inverted])
        x[..., grippers] = transforms.aloha_gripper_action_from_pi(x[..., grippers])
        return transforms.flip(x, self.flips)

    def prompt_of(self, raw: Mapping[str, Any]) -> Any:
        """The prompt as text, from bytes or a numpy scalar too; the robot's own if raw has none."""
        prompt = raw.get(PROMPT)
        if isinstance(prompt, np.ndarray | np.generic) and np.ndim(prompt) == 0:
            prompt = prompt.item()
        if isinstance(prompt, bytes):
            prompt = prompt.decode(errors="replace")
        return self.prompt if prompt is None else prompt


def split_key(key: str) -> tuple[str, slice]:
    """ "observation.state[0:7]" -> its name and the slice; without brackets all of it. Raises UserError."""
    m = _SLICE.match(key)
    if m is None or (m["start"] == m["stop"] == m["colon"] == ""):
        raise UserError(f"{key!r} is neither a feature nor one with a slice: write name, name[3] or name[0:7]")
    start, stop = (int(m[end]) if m[end] else None for end in ("start", "stop"))
    if start is not None and not m["colon"]:
        stop = start + 1
    return m["name"], slice(start, stop)


def _flatten(raw: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in raw.items():
        name = f"{prefix}{key}".replace(".", "/")
        flat |= _flatten(value, f"{name}/") if isinstance(value, Mapping) else {name: value}
    return flat


def _path(key: str) -> str:
    """A key of the state as `_flatten` has it."""
    return split_key(key)[0].replace(".", "/")


def _first(key: str) -> str:
    """The first of the names that an image may have, for messages."""
    return key.split("|")[0]


def _places(key: str, camera: str) -> list[str]:
    """Where the image of a raw key is looked for, in this order."""
    names = [n for k in key.replace(".", "/").split("|") for n in (k, k.rsplit("/", 1)[-1])]
    return [place for name in (*names, camera) for place in (name, f"{IMAGES}/{name}")]


def _part(robot: str, flat: Mapping[str, Any], key: str, dims: int) -> np.ndarray:
    found = np.atleast_1d(np.asarray(flat.get(_path(key))))
    value = found[split_key(key)[1]]
    if value.dtype.kind not in "fiu" or value.ndim != 1 or (dims and value.shape != (dims,)):
        what = "nothing" if _path(key) not in flat else f"{found.dtype} {list(found.shape)}"
        raise UserError(f"observation[{key!r}] of robot {robot} must be {dims or 'a list of'} numbers, found {what}")
    return value.astype(np.float64)
