"""The schema of training data: a LeRobot dataset, and what the robot that it was recorded with sends to a policy."""

from collections.abc import Sequence
import dataclasses
from typing import Literal

from openpi_ar.robot_spec import ANY, MASKED, STATE, RobotSpec, split_key


@dataclasses.dataclass(frozen=True)
class LeRobotData:
    """A LeRobot dataset, version 2.1 or 3.0."""

    path: str = ""
    """Directory of the dataset (the one that holds `meta/`), its name on the Hugging Face hub, or the address of one
    that a simulated world writes into the cache on first use: `world://tabletop?episodes=1000` (docs/data.md)."""
    cameras: tuple[str, ...] = ()
    """`model_camera=feature` pairs; `model_camera=none` masks it, `top|none` does where there is no `top`. A camera
    that is not named takes the robot's feature or, if the robot names none, that of its own name (`base_0_rgb`:
    `observation.images.base_0_rgb`)."""
    state: tuple[str, ...] = ()
    """Features that are the state, side by side; `state[0:7]` takes some dimensions of one. Empty: the robot's."""
    actions: tuple[str, ...] = ()
    """Features that are the action, side by side; slices as in `state`. Empty: the robot's."""
    robot: RobotSpec = dataclasses.field(default_factory=RobotSpec)
    """What the dataset's robot calls its features, and what is done to states and actions before they are normalised
    (and undone to the actions of the trained model). `--robot` fills it (docs/robots.md)."""
    subtasks: str = "auto"
    """Where subtask labels come from: `index` (`subtask_index` and meta/subtasks.parquet), `language`
    (`language_persistent`), `task` (the task of each frame), `none`, a feature of texts, or `auto`: what is there."""
    prompt: str = ""
    """Said in place of every episode's task."""
    mix: tuple[str, ...] = ()
    """Further datasets, `PATH=WEIGHT` each: rows drawn from it for every one of `path`. The other fields hold for all
    of them, `episodes` for `path` alone. A folder with `vqa.jsonl` holds questions and answers (docs/data.md)."""
    questions: float = 0.0
    """Rows of questions and answers that the datasets hold themselves (style `vqa` in LeRobot's `language_events`), for
    every row of their robot data. 0.25: a fifth of all rows. A folder of questions (`vqa.jsonl`) goes into `mix`."""
    episodes: tuple[int, ...] = ()
    """Episodes to use; empty: all."""
    held_out: float = 0.05
    """Fraction of the episodes that training never sees (at least one); 0: evaluate on training frames."""
    frames: Literal["cache", "decode"] = "cache"
    """`cache`: decode every frame once and keep it on disk at the model's image size. `decode`: at every read."""
    cache_dir: str | None = None
    """None: `$OPENPI_AR_CACHE`, else `~/.cache/openpi_ar`."""
    prompt_swap: float = 0.0
    """Fraction of training rows whose task is replaced by another one and whose text is not supervised: their actions
    can only be predicted from the subtask, which makes the conditioning on it real."""

    def filled(self, cameras: Sequence[str]) -> "LeRobotData":
        """The same with the fields of its robot in place of what is not given. `cameras` are the model's."""
        robot, given = self.robot, {entry.partition("=")[0]: entry for entry in self.cameras}
        if robot.cameras:
            keys = {camera: key + "|none" * (key in robot.optional) for key, camera in robot.cameras.items()}
            given = {camera: f"{camera}={keys.get(camera, 'none')}" for camera in cameras} | given
        return dataclasses.replace(
            self,
            cameras=tuple(given.values()),
            state=self.state or tuple(robot.state) or ("observation.state",),
            actions=self.actions or robot.actions,
            prompt=self.prompt or robot.prompt or "",
        )

    def reader(self, cameras: Sequence[str]) -> RobotSpec:
        """The robot that the dataset was recorded with, as a policy meets it: it sends what the features are called, or
        the plain form by the names of the model's `cameras`."""
        data = self.filled(cameras)
        given = {name: key for name, _, key in (entry.partition("=") for entry in data.cameras)}
        keys = {camera: given.get(camera, camera).split("|") for camera in cameras}
        seen = {camera: [k for k in names if k not in MASKED] for camera, names in keys.items()}
        # LeRobot's own name of a camera that goes by its last part.
        full = {
            k: f"observation.images.{k.rsplit('/', 1)[-1]}" for names in seen.values() for k in names if "." not in k
        }
        named = {c: "|".join([*names, *(full[k] for k in names if k in full)]) for c, names in seen.items() if names}
        state = [f"observation.{key}" if split_key(key)[0] == STATE else key for key in data.state]
        return dataclasses.replace(
            self.robot,
            cameras={key: camera for camera, key in named.items()},
            state=dict.fromkeys(state, 0),
            action_dims=0,
            actions=data.actions,
            optional=tuple(key for camera, key in named.items() if set(keys[camera]) & set(MASKED)),
            unused=(ANY,),
            prompt=data.prompt or None,
        )
