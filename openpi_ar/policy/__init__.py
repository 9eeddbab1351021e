"""A trained model as a function of observations: `load("tabletop").infer(raw)`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openpi_ar.policy.policy import Policy

__all__ = ["Policy"]


def __getattr__(name: str) -> Any:
    # Imported when asked for: the modules beside the policy need no JAX.
    if name == "Policy":
        from openpi_ar.policy.policy import Policy

        return Policy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
