"""A trained model as a function of observations: `load("tabletop").infer(raw)`; of images and a question:
`load_talker(path).answer(images, question)`."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openpi_ar.policy.checkpoint import load, load_talker
    from openpi_ar.policy.policy import Policy
    from openpi_ar.policy.session import Session
    from openpi_ar.policy.talker import Talker

__all__ = ["Policy", "Session", "Talker", "load", "load_talker"]
_HOME = {
    "Policy": "policy",
    "Session": "session",
    "Talker": "talker",
    "load": "checkpoint",
    "load_talker": "checkpoint",
}


def __getattr__(name: str) -> Any:
    # Imported when asked for: the modules beside the policy need no JAX.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
