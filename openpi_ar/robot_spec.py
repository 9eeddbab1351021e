"""The schema of a robot: what its observations are called, and what lies between its numbers and those that a model
learns.

Plain data. `data/robot.py` reads observations by it, `data/robots.py` has the table of robots and reads files of your
own.
"""

from collections.abc import Sequence
import dataclasses
import re

from openpi_ar.errors import UserError

IMAGES, STATE, PROMPT = "images", "state", "prompt"
ANY = "*"
"""In `RobotSpec.unused`: other images than those of `cameras` may be there, whatever they are called."""
MASKED = ("none", "")
"""In place of a feature: the camera is masked."""

_SLICE = re.compile(r"^(?P<name>[^\[\]]+)(\[(?P<start>\d*)(?P<colon>:?)(?P<stop>\d*)\])?$")


@dataclasses.dataclass(frozen=True)
class Variant:
    """What a released pi0 or pi0.5 was trained with on a robot, and its parameters do not tell."""

    horizon: int = 50
    """Actions in a chunk."""
    template: str = "openpi"
    """A key of `openpi_ar.text.templates.TEMPLATES`."""
    delta: tuple[bool, ...] = ()
    """Action dimensions that the model predicts relative to the state; dimensions past its end are absolute."""


@dataclasses.dataclass(frozen=True)
class RobotSpec:
    """One robot, or, with fields left out, what is known of the robot that a dataset was recorded with.

    Raw keys are paths joined by "/" or ".": "images/cam_high" is `raw["images"]["cam_high"]` as well as
    `raw["images/cam_high"]` and `raw["images.cam_high"]`. In a LeRobot dataset they are its features.
    """

    name: str = ""
    """For messages and files; empty: a dataset's robot without a name."""
    cameras: dict[str, str] = dataclasses.field(default_factory=dict)
    """Raw key of an image -> camera of the model. The model's other cameras are masked. "a|b": either key. Empty, in a
    training config: each camera of the model goes by its own name."""
    state: dict[str, int] = dataclasses.field(default_factory=dict)
    """Raw keys of the state's parts and their dimensions, concatenated in this order; 0: whatever is there. A key may
    end in a slice: "observation.state[0:7]". Empty, in a training config: "observation.state"."""
    action_dims: int = 0
    """The model's first action dimensions are the robot's; 0: those of the statistics."""
    actions: tuple[str, ...] = ("action",)
    """Features of a LeRobot dataset that are the action, side by side; slices as in `state`."""
    action_names: tuple[str, ...] = ()
    """What the dimensions of the action are called, for people; empty: what a dataset calls them, else numbers."""
    delta_mask: tuple[int, ...] = ()
    """Runs of action dimensions, openpi's `make_bool_mask`: `6 -1` is six that are learnt relative to the state, then
    one absolute. Dimensions past its end are absolute."""
    flips: tuple[int, ...] = ()
    """Signs, 1 or -1, of the first dimensions of state and actions: between the robot's joints and the models'."""
    inverted_grippers: tuple[int, ...] = ()
    """Dimensions of state and actions that hold inverted grippers: x becomes 1 - x."""
    aloha_grippers: tuple[int, ...] = ()
    """Dimensions of state and actions that hold ALOHA's grippers: converted to those that pi's base models know."""
    optional: tuple[str, ...] = ()
    """Raw keys of cameras that may be left out (masked then)."""
    unused: tuple[str, ...] = ()
    """Names in raw["images"] that the robot sends and no model reads."""
    prompt: str | None = None
    """What to do, for observations without a prompt."""
    asset_ids: tuple[str, ...] = ()
    """Directories under a checkpoint's `assets/` that openpi puts this robot's statistics in."""
    pi0: Variant | None = None
    """Of released pi0 models; None: openpi's defaults, and `delta_mask`."""
    pi05: Variant | None = None
    """Of released pi0.5 models."""

    def __hash__(self) -> int:
        # The one that dataclasses write cannot hash dicts, and a config is a static argument of jitted functions.
        return hash((self.name, frozenset(self.cameras.items()), frozenset(self.state.items()), self.actions))

    def __post_init__(self):
        problems = []
        if len(set(self.cameras.values())) != len(self.cameras):
            problems.append(f"cameras must name each camera of the model once, found {self.cameras}")
        if any(not isinstance(n, int) or n < 0 for n in (*self.state.values(), self.action_dims)):
            problems.append(f"dimensions must be positive, found state {self.state}, action_dims {self.action_dims}")
        if wrong := [key for key in (*self.state, *self.actions) if not _SLICE.match(key)]:
            problems.append(f"{wrong[0]!r} is neither a key nor one with a slice, key[3] or key[0:7]")
        if unknown := set(self.optional) - set(self.cameras):
            problems.append(f"optional names {', '.join(sorted(unknown))}, which cameras does not")
        if set(self.flips) - {1, -1}:
            problems.append(f"flips must be signs +-1, found {self.flips}")
        if any(type(run) is not int or not 0 < abs(run) < 1000 for run in self.delta_mask):
            problems.append(f"delta_mask must be runs, 6 -1: six relative, one absolute; found {self.delta_mask}")
        if both := set(self.aloha_grippers) & set(self.inverted_grippers):
            problems.append(f"dimension {min(both)} is both an ALOHA gripper and an inverted one")
        if any(v is not None and v.horizon < 1 for v in (self.pi0, self.pi05)):
            problems.append("horizon must be positive")
        if not problems and self.state_dims and self.action_dims:
            problems += self._misfits(self.state_dims, self.action_dims)
        if problems:
            raise ValueError(f"robot {self.name!r}: " + "; ".join(problems))

    @property
    def state_dims(self) -> int:
        """Dimensions of the concatenated state; 0: not known."""
        return sum(self.state.values()) if all(self.state.values()) else 0

    @property
    def delta(self) -> tuple[bool, ...]:
        """Action dimensions that are learnt relative to the state, by `delta_mask`."""
        return make_mask(*self.delta_mask)

    def variant(self, kind: str) -> Variant:
        """What a released model of that kind, "pi0" or "pi05", was trained with."""
        own = self.pi05 if kind == "pi05" else self.pi0
        own = own or Variant(template="openpi" if kind == "pi05" else "openpi_pi0")
        return dataclasses.replace(own, delta=self.delta) if self.delta_mask else own

    def of_model(self, kind: str) -> "RobotSpec":
        """The robot as models of that kind, "pi0" or "pi05", are trained on it: `delta_mask` holds, no variant."""
        return dataclasses.replace(self, delta_mask=mask_runs(self.variant(kind).delta), pi0=None, pi05=None)

    def check_cameras(self, cameras: Sequence[str]) -> None:
        """Raises UserError if the robot feeds cameras that the model lacks."""
        strange = [camera for camera in self.cameras.values() if camera not in cameras]
        if strange and set(self.cameras) & set(cameras):
            key, camera = next(pair for pair in self.cameras.items() if pair[0] in cameras)
            raise UserError(
                f"robot {self.name}: cameras has feature and camera the wrong way round, {key}: {camera}; write "
                f"{camera}: {key}, the feature first"
            )
        if strange:
            raise UserError(
                f"robot {self.name} feeds camera {', '.join(strange)}, but the model reads {', '.join(cameras)}: it is "
                f"not a model for this robot. To train one set --model.cameras {' '.join(self.cameras.values())}, or "
                "name the model's cameras in the robot's file"
            )

    def check_dims(self, state: int, actions: int) -> None:
        """Raises UserError if something is said of dimensions that states or actions of that many do not have."""
        if problems := self._misfits(state, actions):
            raise UserError(f"robot {self.name!r}: " + "; ".join(problems))

    def _misfits(self, state: int, actions: int) -> list[str]:
        dims, problems = min(state, actions), []
        if len(self.flips) > dims:
            problems.append(f"flips must be up to {dims} signs +-1, found {len(self.flips)}")
        if len(self.action_names) not in (0, actions):
            problems.append(f"action_names must be {actions} names, found {len(self.action_names)}")
        for name in ("aloha_grippers", "inverted_grippers"):
            if any(not 0 <= i < dims for i in getattr(self, name)):
                problems.append(f"{name} must be dimensions under {dims}, found {getattr(self, name)}")
        for name, delta in (
            ("delta_mask", self.delta),
            *((f"{k}.delta", self.variant(k).delta) for k in ("pi0", "pi05")),
        ):
            if len(delta) > dims:
                problems.append(f"{name} must be of {dims} dimensions at most, found {len(delta)}")
                break
        return problems


def make_mask(*runs: int) -> tuple[bool, ...]:
    """(6, -1) -> six times True, once False: openpi's shorthand for masks."""
    return tuple(run > 0 for run in runs for _ in range(abs(run)))


def mask_runs(mask: Sequence[bool]) -> tuple[int, ...]:
    """Inverse of `make_mask`."""
    runs: list[int] = []
    for relative in mask:
        if runs and (runs[-1] > 0) == relative:
            runs[-1] += 1 if relative else -1
        else:
            runs.append(1 if relative else -1)
    return tuple(runs)


def split_key(key: str) -> tuple[str, slice]:
    """ "observation.state[0:7]" -> its name and the slice; without brackets all of it. Raises UserError."""
    m = _SLICE.match(key)
    if m is None or (m["start"] == m["stop"] == m["colon"] == ""):
        raise UserError(f"{key!r} is neither a feature nor one with a slice: write name, name[3] or name[0:7]")
    start, stop = (int(m[end]) if m[end] else None for end in ("start", "stop"))
    if start is not None and not m["colon"]:
        stop = start + 1
    return m["name"], slice(start, stop)


def plain(cameras: Sequence[str]) -> RobotSpec:
    """The robot that sends `{"images": {camera: image}, "state": ...}` by the model's camera names, and maybe more."""
    return RobotSpec(cameras={f"{IMAGES}/{camera}": camera for camera in cameras}, state={STATE: 0}, unused=(ANY,))
