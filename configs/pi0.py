"""pi0, actions only: the state is a token of the action tower and time is mixed into the actions."""

import dataclasses

from configs.pi05 import PI05, PI05_TABLETOP

# openpi gives pi0 48 prompt tokens: its prompt does not carry the state.
PI0 = dataclasses.replace(
    PI05,
    name="pi0",
    model=dataclasses.replace(PI05.model, pi05=False),
    text=dataclasses.replace(PI05.text, template="openpi_pi0", max_prompt_tokens=48),
)
PI0_TABLETOP = dataclasses.replace(
    PI05_TABLETOP,
    name="pi0_tabletop",
    model=dataclasses.replace(PI05_TABLETOP.model, pi05=False),
    text=dataclasses.replace(PI05_TABLETOP.text, template="openpi_pi0"),
)
