"""How programs are compiled: what was chosen for each kind of device and by which figure; their cache on disk, one
directory per kind of processor; programs that run once.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import hashlib
import os
from pathlib import Path
import platform
import time
from typing import Any, Literal, cast

import jax

from openpi_ar.errors import UserError
from openpi_ar.files import ANOTHER_CACHE, cache_root, check_directory

_SHORTEST_S = 0.2
"""Programs that compile faster are not written: a policy has dozens of small ones."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """What is used on a kind of device, and the figure that chose it."""

    value: str
    figure: str


FLAGS: dict[str, tuple[Choice, ...]] = {"gpu": (), "tpu": ()}
"""XLA's flags by JAX's name of the backend. None is set without a figure of `python -m benchmarks.device`: no such
device has been measured yet (docs/gpu.md), and a flag that helps one program may slow down another."""
ATTENTION: dict[str, Choice] = {}
"""What `attention: auto` is, by backend; `plain` where there is no entry, since nothing was measured there."""
_VARIABLES = {"gpu": "XLA_FLAGS", "tpu": "LIBTPU_INIT_ARGS"}


def add_flags() -> None:
    """Puts `FLAGS` into the variables from which XLA takes them, when it first looks for devices. What is set there
    already is left as it is."""
    for backend, choices in FLAGS.items():
        given = os.environ.get(_VARIABLES[backend], "").split()
        names = {flag.partition("=")[0] for flag in given}
        added = [choice.value for choice in choices if choice.value.partition("=")[0] not in names]
        if added:
            os.environ[_VARIABLES[backend]] = " ".join([*given, *added])


def attention_on(wanted: str, dtype: Any) -> Literal["plain", "xla", "cudnn"]:
    """The kernel for `wanted`, the config's `attention`, on the device at hand.

    Raises UserError where cuDNN is asked for and has no kernel: without an NVIDIA GPU, or in float32.
    """
    backend, half = jax.default_backend(), jax.numpy.dtype(dtype).itemsize == 2
    if wanted == "auto":
        chosen = ATTENTION[backend].value if backend in ATTENTION else "plain"
        return cast(Any, chosen if half or chosen != "cudnn" else "plain")
    if wanted == "cudnn" and (backend != "gpu" or not half):
        found = f"the device is a {backend.upper()}" if backend != "gpu" else f"the model computes in {dtype}"
        raise UserError(
            f"attention cudnn needs an NVIDIA GPU and bfloat16, but {found}: use --model.attention auto"
            + ("" if backend != "gpu" else ", or --model.dtype bfloat16")
        )
    return cast(Any, wanted)


def keep_compiled_programs() -> Path | None:
    """Has JAX write compiled programs to `<cache_root>/xla/<processor>` and read them from there; adds `FLAGS` first.

    JAX's own variables come first: `JAX_COMPILATION_CACHE_DIR`, `JAX_ENABLE_COMPILATION_CACHE=false` (write none) and
    `JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS`. Returns the directory in use, None if there is none. Where it cannot
    be written, programs are read from it and none is kept.
    """
    add_flags()
    if not jax.config.values["jax_enable_compilation_cache"]:
        return None
    given: str | None = jax.config.values["jax_compilation_cache_dir"]
    if given is not None:
        return Path(given)
    directory, shortest = None, _SHORTEST_S
    try:
        directory = cache_root() / "xla" / _processor()
        check_directory(directory, ANOTHER_CACHE)
    except UserError as e:
        print(f"note: compiled programs are not kept: {e}", flush=True)
        if directory is None or not directory.is_dir():
            return None
        shortest = float("inf")
    jax.config.update("jax_compilation_cache_dir", str(directory))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", shortest)
    return directory


@dataclasses.dataclass
class Programs:
    """What a block took: its seconds, and programs compiled and read from the cache on disk, small ones aside."""

    seconds: float = 0.0
    compiled: int = 0
    read: int = 0

    def __str__(self) -> str:
        """ "compiled in 3.1 s", "read from the cache in 0.2 s", or of some programs each."""
        if self.compiled and self.read:
            what = f"{self.compiled} programs compiled and {self.read} read from the cache"
        else:
            what = "compiled" if self.compiled else "read from the cache" if self.read else "done"
        return f"{what} in {self.seconds:.1f} s"


@contextlib.contextmanager
def counted() -> Iterator[Programs]:
    """The account of the block, complete at its end."""
    found, began, hits = Programs(), time.perf_counter(), 0

    def on_event(event: str, **_: Any) -> None:
        nonlocal hits
        hits += event == "/jax/compilation_cache/cache_hits"

    def on_duration(event: str, duration_secs: float, **_: Any) -> None:
        nonlocal hits
        if event == "/jax/core/compile/backend_compile_duration":
            found.read += hits
            found.compiled += not hits and duration_secs > _SHORTEST_S
            hits = 0

    jax.monitoring.register_event_listener(on_event)
    jax.monitoring.register_event_duration_secs_listener(on_duration)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_listener(on_event)
        jax.monitoring.unregister_event_duration_listener(on_duration)
        found.seconds = time.perf_counter() - began


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
