"""pi0.5, actions only, with openpi's prompt (`Task: ..., State: ...;`)."""

import dataclasses

from configs.pi05_subtask import PI05_SUBTASK, TABLETOP_FROM_NOTHING, actions_only
from openpi_ar.config import LeRobotData

PI05 = dataclasses.replace(actions_only(PI05_SUBTASK), name="pi05")
# No commanded episodes: without a subtask, the prompt alone decides what to do.
PI05_TABLETOP = dataclasses.replace(
    actions_only(TABLETOP_FROM_NOTHING),
    name="pi05_tabletop",
    data=LeRobotData("world://tabletop?episodes=1000&pairs=0.45"),
)
