"""Demonstrations on LIBERO as a LeRobot v3.0 dataset, its features named as robot `libero` reads them."""

from collections.abc import Iterable
from pathlib import Path

from openpi_ar.data.lerobot.write import Images, LeRobotWriter, Spec, Subtasks
from openpi_ar.data.robots import ROBOTS
from openpi_ar.worlds.libero.record import Episode
from openpi_ar.worlds.libero.world import FPS

STATE = ("x", "y", "z", "turn_x", "turn_y", "turn_z", "finger_1", "finger_2")
ACTION = ("x", "y", "z", "turn_x", "turn_y", "turn_z", "grip")


def write_libero(
    out: str | Path,
    episodes: Iterable[Episode],
    image_size: tuple[int, int],
    *,
    images: Images = "h264",
    subtasks: Subtasks = "both",
) -> Path:
    """Writes the episodes as they come and returns the dataset's directory, which appears when it is complete.

    Raises UserError if `out` exists already, the codec cannot take images of this size, or there are no episodes.
    """
    robot = ROBOTS["libero"]
    cameras = tuple(key.rsplit("/", 1)[-1] for key in robot.cameras)
    state = next(iter(robot.state)).rsplit("/", 1)[-1]
    spec = Spec(
        fps=FPS,
        robot_type=robot.name,
        cameras=cameras,
        image_size=image_size,
        vectors={state: STATE, robot.actions[0]: ACTION},
        images=images,
        subtasks=subtasks,
    )
    with LeRobotWriter(out, spec) as writer:
        for episode in episodes:
            pixels = {name: episode.images[:, i] for i, name in enumerate(cameras)}
            vectors = {state: episode.state, robot.actions[0]: episode.action}
            writer.add(episode.prompt, pixels, vectors, subtasks=episode.subtasks)
    return writer.root
