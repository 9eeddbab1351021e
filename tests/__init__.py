"""Tests compile many tiny programs and run each a few times: compile fast rather than well, and no program twice in a run."""

import atexit
import os
import shutil
import tempfile

# No optimisation (half the time of the suite), and kernels by XLA's plain emitters: those by way of MLIR take four times as
# long to make. One thread compiles a program: the other core has the other half of the tests.
_FAST = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FAST}".strip()

# Compiled programs are shared by all processes of one run, and by no other: nothing goes into the user's own cache, and
# nothing that is tested comes from it. The workers inherit the directory of the process that starts them.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _PROGRAMS = tempfile.mkdtemp(prefix="openpi_ar_tests_")
    atexit.register(shutil.rmtree, _PROGRAMS, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _PROGRAMS
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "true"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
