"""The cache of compiled programs on disk, one directory per kind of processor; programs that run once."""

from collections.abc import Callable
import hashlib
import os
from pathlib import Path
import platform
from typing import Any

import jax

from openpi_ar.files import cache_root

_SHORTEST_S = 0.2
"""Programs that compile faster are not written: a policy has dozens of small ones."""


def keep_compiled_programs() -> Path | None:
    """Has JAX write compiled programs to `<cache_root>/xla/<processor>` and read them from there.

    JAX's own variables come first: `JAX_COMPILATION_CACHE_DIR`, `JAX_ENABLE_COMPILATION_CACHE=false` (write none) and
    `JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS`. Returns the directory in use, None if there is none.
    """
    if not jax.config.values["jax_enable_compilation_cache"]:
        return None
    directory: str | None = jax.config.values["jax_compilation_cache_dir"]
    if directory is None:
        directory = str(cache_root() / "xla" / _processor())
        jax.config.update("jax_compilation_cache_dir", directory)
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", _SHORTEST_S)
    return Path(directory)


def run_once(program: Callable[..., Any], *args: Any) -> Any:
    """`program(*args)` as one jitted program that a process needs once.

    On a CPU it is compiled without optimisation, in half the time: meant for programs that only rearrange their
    arguments.
    """
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(program, compiler_options=quick)(*args)


def _processor() -> str:
    """A name that differs between processors: machines share home directories, code for one may not run on another."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        features = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"
