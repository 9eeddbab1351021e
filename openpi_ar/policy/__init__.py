"""A trained model as a function of observations: `load("tabletop").infer(raw)`."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openpi_ar.policy.checkpoint import load
    from openpi_ar.policy.policy import Policy
    from openpi_ar.policy.session import Session

__all__ = ["Policy", "Session", "load"]
_HOME = {"Policy": "policy", "Session": "session", "load": "checkpoint"}


def __getattr__(name: str) -> Any:
    # Imported when asked for: the modules beside the policy need no JAX.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
