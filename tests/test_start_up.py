"""If this fails, a command takes seconds to print its help or to refuse a wrong flag."""

import json
from pathlib import Path
import subprocess
import sys

import pytest

ROOT = Path(__file__).parents[1]
# What takes long to import, together some five seconds of CPU time.
HEAVY = ("jax", "flax", "optax", "orbax", "grain", "mujoco", "scipy", "matplotlib", "pyarrow", "av", "sentencepiece")
# Tools that import a part of it to know their flags, but no JAX.
TOOLS = ("data", "checkpoints", "doctor", "worlds.tabletop", "worlds.libero")
# Runs a script or a module as `python` does; then says on stderr what was imported and how long it computed.
CHILD = """
import json, runpy, sys, time
what, *sys.argv = sys.argv[1:]
sys.path.insert(0, ".")
code = 0
try:
    (runpy.run_path if what.endswith(".py") else runpy.run_module)(what, run_name="__main__")
except SystemExit as e:
    code = e.code
print(json.dumps([code or 0, time.process_time(), list(sys.modules)]), file=sys.stderr)
"""


def start(what: str, *args: str) -> tuple[int, float, set[str], str]:
    """(exit status, seconds of CPU time, heavy packages imported, what was printed) of one call."""
    done = subprocess.run([sys.executable, "-c", CHILD, what, what, *args], cwd=ROOT, capture_output=True, text=True)
    *printed, measured = done.stderr.splitlines()
    code, seconds, modules = json.loads(measured)
    return code, seconds, {name.partition(".")[0] for name in modules} & set(HEAVY), done.stdout + "\n".join(printed)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("infer.py --help", "--ckpt"),
        ("train.py --help", "pi05_subtask_tabletop"),
        ("train.py --config pi05_subtask_tabletop --help", "--model.action-horizon"),
    ],
)
def test_help_imports_nothing_heavy(call, expected):
    code, seconds, heavy, printed = start(*call.split())
    assert code == 0 and expected in printed
    assert not heavy
    assert seconds < 3  # some 0.5 s; several times that on a slow machine, and still less than JAX alone takes there


@pytest.mark.parametrize("tool", TOOLS)
def test_help_of_the_tools_imports_no_jax(tool):
    code, _, heavy, printed = start(f"openpi_ar.{tool}", "--help")
    assert code == 0 and f"python -m openpi_ar.{tool}" in printed
    assert not heavy & {"jax", "flax", "optax", "orbax", "grain"}


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("infer.py --ckpt tabletop --rolout 3", "--rolout"),
        ("train.py --config debug --num-stps 3", "--num-steps"),
        ("train.py --config no_such", "did you mean"),
    ],
)
def test_a_wrong_flag_is_refused_before_anything_heavy_is_imported(call, expected):
    code, _, heavy, printed = start(*call.split())
    assert code == 2 and expected in printed
    assert not heavy


def test_a_policy_imports_neither_loader_nor_simulator():
    """With JAX, Flax, Orbax and what they import themselves, but not what training, datasets and worlds need."""
    assert start("openpi_ar.policy.checkpoint")[2] == {"jax", "flax", "optax", "orbax", "sentencepiece"}


def test_the_measurement_would_see_a_heavy_import():
    """Negative control: a module that needs JAX."""
    assert "jax" in start("openpi_ar.types")[2]
