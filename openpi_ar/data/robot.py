"""One robot as a model meets it: its observations are read here, once. `data/transforms.py` converts its numbers."""

import collections
from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np

from openpi_ar.data import transforms
from openpi_ar.errors import UserError
from openpi_ar.robot_spec import ANY, IMAGES, PROMPT, STATE, RobotSpec, split_key
from openpi_ar.textfile import as_text


@dataclasses.dataclass(frozen=True, eq=False)
class Reading:
    """The parts of one observation.

    images    uint8 [h w 3] by the model's camera names; the model's other cameras are masked. At least one.
    state     float32 [P_real], in the units and signs that models know, before normalisation. None: there is none.
    prompt    what to do. None: the observation has none, and neither has the robot.
    question  what to answer, of a template that answers questions. None: there is none.
    template  name of the row's template. None: the config's.
    done      subtasks that are completed, the last one last. None: the observation does not say.
    """

    images: Mapping[str, np.ndarray]
    state: np.ndarray | None
    prompt: str | None
    question: str | None = None
    template: str | None = None
    done: tuple[str, ...] | None = None


class Robot:
    """Reads raw observations by a robot's schema.

    Args:
        spec: the robot, as models of one kind are trained on it (`RobotSpec.of_model`).
        cameras: the model's.
        state_dims: dimensions of the statistics, which must be the robot's.
        action_dims: the same for actions.

    Raises:
        UserError: the robot feeds cameras that the model lacks, or names dimensions that are not there.
    """

    def __init__(self, spec: RobotSpec, cameras: Sequence[str], state_dims: int, action_dims: int):
        spec.check_cameras(cameras)
        spec.check_dims(state_dims, action_dims)
        self.spec, self.state_dims, self.action_dims = spec, state_dims, action_dims
        self._who = f"robot {spec.name} sends" if spec.name else "the model reads"
        # Where each image is looked for: by its own names, else by shorter ones that mean no other image.
        self._places = {key: (camera, *_places(key, camera)) for key, camera in spec.cameras.items()}
        short = collections.Counter(place for _, _, places in self._places.values() for place in places)
        self._ambiguous = {place for place, count in short.items() if count > 1}
        self._known = {*short, *(place for _, places, _ in self._places.values() for place in places)}
        self._known |= {f"{IMAGES}/{name}" for name in spec.unused}
        self._state = [(key, *_part(key), dims) for key, dims in spec.state.items()]

    def read(self, raw: Mapping[str, Any]) -> Reading:
        """Reads an observation. Raises UserError naming, as the robot calls it, what is missing or does not fit.

        Besides its raw key an image may go by the key's last part or by the model's camera name, alone or in
        raw["images"], where that means one image and one camera; cameras that raw["masked"] names are left out. The
        state is either its parts under their keys or the whole under "state"; without any of it the reading has none.
        """
        flat = _flatten(raw)
        images, question = self._images(flat, set(raw.get("masked", ()))), raw.get("question")
        question = None if question is None else as_text(question, "the question")
        done = None if raw.get("done") is None else _texts(raw["done"])
        return Reading(images, self._state_vector(flat), self.prompt(raw), question, raw.get("template"), done)

    def prompt(self, raw: Mapping[str, Any]) -> Any:
        """The observation's prompt (`textfile.as_text`); by default the robot's own. Raises UserError."""
        prompt = raw.get(PROMPT)
        return self.spec.prompt if prompt is None else as_text(prompt, "the prompt")

    def no_state(self) -> UserError:
        """The error for a reading that lacks the state it needs."""
        return UserError(f"{self._state_names} must be {self.state_dims} numbers, found none")

    def _images(self, flat: Mapping[str, Any], masked: set[str]) -> dict[str, np.ndarray]:
        found = {}
        for key, (camera, own, short) in self._places.items():
            there = [place for place in own if place in flat] or [
                place for place in short if place in flat and place not in self._ambiguous
            ]
            if len(there) > 1:
                raise UserError(f"image {_first(key)!r} of camera {camera!r} may be {' or '.join(there)}: send one")
            place = there[0] if there else None
            if masked & {*own, *short} or (place is None and key in self.spec.optional):
                continue
            if place is None:
                others = [k for k in flat if k not in (PROMPT, STATE, "done", *(path for _, path, _, _ in self._state))]
                raise UserError(
                    f"image {_first(key)!r} of camera {camera!r} is missing: {self._who} "
                    f"{', '.join(map(_first, self._places))}; found "
                    f"{', '.join(others) or 'no image'}; name the camera in observation['masked'] to go without it"
                )
            found[camera] = to_uint8_image(flat[place], f"image {_first(key)!r} of camera {camera!r}")
        strange = [k for k in flat if k.startswith(f"{IMAGES}/") and k not in self._known]
        if strange and ANY not in self.spec.unused:
            raise UserError(f"no image {strange[0]!r} is known: {self._who} {', '.join(map(_first, self._places))}")
        if not found:
            raise UserError("every camera is masked: at least one image is needed")
        return found

    def _state_vector(self, flat: Mapping[str, Any]) -> np.ndarray | None:
        if any(flat.get(path) is not None for _, path, _, _ in self._state):
            x = np.concatenate([self._numbers(flat, *part) for part in self._state])
        elif flat.get(STATE) is not None:
            x = self._numbers(flat, STATE, STATE, slice(None), self.spec.state_dims)
        else:
            return None
        if x.shape != (self.state_dims,):
            raise UserError(f"{self._state_names} must be {self.state_dims} numbers, found {list(x.shape)}")
        if not np.isfinite(x).all():
            raise UserError(f"{self._state_names} holds values that are not finite: {x.tolist()}")
        return transforms.state_to_model(self.spec, x).astype(np.float32)

    def _numbers(self, flat: Mapping[str, Any], key: str, path: str, part: slice, dims: int) -> np.ndarray:
        """One part of the state."""
        found = np.atleast_1d(np.asarray(flat.get(path)))
        value = found[part]
        dims = dims or (self.state_dims if len(self._state) == 1 else 0)
        if value.dtype.kind not in "fiu" or value.ndim != 1 or (dims and value.shape != (dims,)):
            what = "nothing" if path not in flat else f"{found.dtype} {list(found.shape)}"
            raise UserError(f"observation[{key!r}] must be {dims or 'a list of'} numbers, found {what}")
        return value.astype(np.float64)

    @property
    def _state_names(self) -> str:
        return " and ".join(f"observation[{name!r}]" for name in self.spec.state)


def _texts(done: Any) -> tuple[str, ...]:
    """The completed subtasks of an observation. Raises UserError if they are no texts."""
    if isinstance(done, str | bytes) or not isinstance(done, Sequence | np.ndarray):
        raise UserError(f"observation['done'] must be a list of the completed subtasks, found {done!r}")
    texts = tuple(as_text(text, f"observation['done'], entry {i},") for i, text in enumerate(done, 1))
    if not all(text.strip() for text in texts):
        raise UserError(f"observation['done'] holds an empty text: leave it out, found {list(texts)}")
    return texts


def _flatten(raw: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in raw.items():
        name = f"{prefix}{key}".replace(".", "/")
        part = _flatten(value, f"{name}/") if isinstance(value, Mapping) else {name: value}
        if twice := flat.keys() & part.keys():
            raise UserError(f"the observation gives {min(twice)!r} twice, as one key and in parts: send one")
        flat |= part
    return flat


def _part(key: str) -> tuple[str, slice]:
    """A key of the state as `_flatten` has it, and which of its dimensions are meant."""
    name, part = split_key(key)
    return name.replace(".", "/"), part


def _first(key: str) -> str:
    """The first of the names that an image may have, for messages."""
    return key.split("|")[0]


def _places(key: str, camera: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Where the image of a raw key is looked for: by its own names; by their last parts and the camera's name."""
    keys = key.replace(".", "/").split("|")
    own = dict.fromkeys(place for name in keys for place in (name, f"{IMAGES}/{name}"))
    names = [*(name.rsplit("/", 1)[-1] for name in keys), camera]
    short = dict.fromkeys(place for name in names for place in (name, f"{IMAGES}/{name}"))
    return tuple(own), tuple(place for place in short if place not in own)


def to_uint8_image(image: np.ndarray, name: str) -> np.ndarray:
    """An image as robots send it to uint8 [h w 3]: floats in [0, 1] are scaled and cut off, channels may come first.

    As openpi's `_parse_image`. Raises UserError, beginning with `name`, if it is no such image or has no pixels.
    """
    given = image = np.asarray(image)
    if image.dtype.kind == "f":
        # An epsilon above 1 (decoders, resizing) still gives 255; anything more is another scale.
        if image.size and not (image.min() >= 0 and 255 * image.max() < 256):
            raise UserError(
                f"{name}: a float image must lie in [0, 1], found {image.min():.4g} to {image.max():.4g}; "
                "send uint8 or divide by 255"
            )
        image = (255 * image).astype(np.uint8)
    image = np.moveaxis(image, 0, -1) if image.ndim == 3 and image.shape[0] == 3 else image
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
        raise UserError(
            f"{name} must be a uint8 RGB image [height width 3] of one pixel or more, found {given.dtype} "
            f"{list(given.shape)}"
        )
    return image
