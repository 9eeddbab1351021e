"""Tests compile many tiny programs and run each a few times: compile fast rather than well, and no program twice in a
run."""

import atexit
import os
import re
import shutil
import subprocess
import sys
import tempfile

# No optimisation (half the time of the suite), and kernels by XLA's plain emitters where it still has them: those by
# way of MLIR take four times as long to make. One thread compiles a program: the other core has the other half of the
# tests.
_FAST = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)


def known_flags(flags: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the flags that the installed XLA knows. It aborts on any other, so that a process of its own asks (0.4
    s)."""
    parse = [sys.executable, "-c", "from jaxlib import xla_client; xla_client.CompileOptions()"]
    while flags:
        asked = subprocess.run(parse, env={**os.environ, "XLA_FLAGS": " ".join(flags)}, capture_output=True, text=True)
        if asked.returncode == 0:
            break
        unknown = set(re.findall(r"--xla_\w+", asked.stderr.partition("Unknown flag")[2].partition("\n")[0]))
        kept = tuple(flag for flag in flags if flag.partition("=")[0] not in unknown)
        flags = kept if len(kept) < len(flags) else ()  # it failed for another reason: none is worth it
    return flags


# Compiled programs are shared by all processes of one run, and by no other: nothing goes into the user's own cache, and
# nothing that is tested comes from it. The workers inherit flags and directory of the process that starts them.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *known_flags(_FAST)]).strip()
    _PROGRAMS = tempfile.mkdtemp(prefix="openpi_ar_tests_")
    atexit.register(shutil.rmtree, _PROGRAMS, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _PROGRAMS
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "true"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
