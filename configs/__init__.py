"""Presets: name -> configuration. A preset is a Python value; make your own with `dataclasses.replace`."""

from configs.debug import DEBUG
from configs.pi0 import PI0, PI0_TABLETOP
from configs.pi05 import PI05, PI05_TABLETOP
from configs.pi05_subtask import PI05_SUBTASK, PI05_SUBTASK_LORA, PI05_SUBTASK_TABLETOP
from openpi_ar.config import TrainConfig
from openpi_ar.errors import UserError
from openpi_ar.lookup import nearest

HELP: dict[str, tuple[TrainConfig, str]] = {
    c.name: (c, text)
    for c, text in (
        (
            PI05_SUBTASK_TABLETOP,
            "fine-tunes the shipped checkpoint, which talks and acts on the tabletop; two CPU cores. Start here",
        ),
        (PI05_TABLETOP, "pi0.5 on the tabletop, actions only (state in the prompt, AdaRMS time)"),
        (PI0_TABLETOP, "pi0 on the tabletop, actions only (state token, time mixed into the actions)"),
        (DEBUG, "a tiny model on a handful of episodes: seconds, for tests"),
        (PI05_SUBTASK, "full-size pi0.5 (So400m, Gemma 2B + 300M) that generates its subtask; LeRobot data"),
        (PI05_SUBTASK_LORA, "the same with low-rank adapters on frozen bfloat16 towers: for one smaller GPU"),
        (PI05, "full-size pi0.5, actions only, openpi's prompt; LeRobot data"),
        (PI0, "full-size pi0, actions only; LeRobot data"),
    )
}
PRESETS: dict[str, TrainConfig] = {name: cfg for name, (cfg, _) in HELP.items()}


def get_preset(name: str) -> TrainConfig:
    """The preset of that name. Raises UserError that lists all, the nearest first."""
    if name in PRESETS:
        return PRESETS[name]
    near = nearest(name, PRESETS)
    raise UserError(f"unknown config {name!r}; did you mean {near[0]}? Presets: {', '.join(near)}")
