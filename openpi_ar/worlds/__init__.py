"""Simulated worlds: they write LeRobot datasets and drive a policy; nothing else knows one."""

import importlib
from pathlib import Path
from types import ModuleType

from openpi_ar.errors import UserError
from openpi_ar.lookup import nearest

NAMES = ("tabletop", "libero")
"""Worlds that can be played."""


def robot_file(name: str) -> str:
    """The file of a world's own robot in place of the world's name; the name of any other robot as it is."""
    file = Path(__file__).parent / name / "robot.yaml"
    return str(file) if file.is_file() else name


def open_world(name: str) -> ModuleType:
    """The module `episodes` of a world: `open_episodes(play)` makes what `rollout.run_rollouts` plays, `ACTION_NAMES`
    are for people. Raises UserError if there is no such world.
    """
    if name not in NAMES:
        raise UserError(f"there is no world {name!r}: there are {', '.join(nearest(name, NAMES))}")
    return importlib.import_module(f"openpi_ar.worlds.{name}.episodes")  # a simulator is imported when it is asked for
