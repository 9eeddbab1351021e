"""One command for the minutes in which a GPU is at hand.

    bash benchmarks/device_prepare.sh            # where there is a network and this package's environment
    python -m benchmarks.device --out DIR        # on the GPU's machine

Stages in the order of their worth (`plan.py`), each a process of its own with a time limit: one that crashes, runs out
of memory or hangs is a line, and the next begins. Figures are written as soon as they exist. Compiled programs are kept
in `.device/programs`: a second call soon after continues where the first was out of time.
"""

import argparse
import importlib.util
import os
from pathlib import Path
import signal
import subprocess
import sys
import time
from typing import NamedTuple

from benchmarks.device.plan import PREPARED, ROOT, SITE, STAGE
from benchmarks.device.record import read

_GRACE_S = 4.0
"""A stage stops by itself when its time is over; so much later it is killed."""
_LEAST_S = 8.0
"""With less time left, no stage is started: JAX alone takes this long to find the device."""


class Outcome(NamedTuple):
    """How a process ended: a word for its line, and the last of what it wrote to stderr."""

    status: str
    stderr: str


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.device",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, required=True, help="directory of the figures, a file for each subject")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything; obeyed to seconds")
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny: a rehearsal, also on a CPU")
    parser.add_argument("--stages", nargs="+", choices=STAGE, default=list(STAGE), help="only these, in this order")
    return parser.parse_args(argv)


def missing_packages() -> list[str]:
    """Packages that neither the machine nor `.device/site` has."""
    needed = ("jax", "flax", "optax", "orbax", "numpy", "sentencepiece", "einops", "jaxtyping", "PIL", "safetensors")
    return [name for name in needed if importlib.util.find_spec(name) is None]


def environment(flags: str) -> dict[str, str]:
    """Of a stage's process."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    given = " ".join(filter(None, [os.environ.get("XLA_FLAGS"), flags]))
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "XLA_FLAGS": given,
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(PREPARED / "programs")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92"),
        "TF_CPP_MIN_LOG_LEVEL": os.environ.get("TF_CPP_MIN_LOG_LEVEL", "2"),
    }


def launch(command: list[str], env: dict[str, str], seconds: float) -> Outcome:
    """Runs a command in a process group of its own, which is killed when the time is over, or with this process."""
    process = subprocess.Popen(
        command, env=env, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, process_group=0
    )
    try:
        _, stderr = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return Outcome("killed: its time was over", process.communicate()[1][-4000:])
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    code = process.returncode
    ended = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return Outcome("ok" if code == 0 else f"FAILED ({ended})", stderr[-4000:])


def main(argv: list[str] | None = None) -> None:
    """Runs the stages. Exit code 0 if none failed, 1 if one did, 2 if nothing could be run."""
    began = time.monotonic()
    sys.path.append(str(SITE))
    args = arguments(argv)
    if lacking := missing_packages():
        print(
            f"error: no package {', '.join(lacking)} here: run benchmarks/device_prepare.sh where there is a network",
            file=sys.stderr,
        )
        raise SystemExit(2)
    args.out = args.out.absolute()
    args.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # a stage must not outlive this process
    ends, failed = began + 60 * args.minutes, False
    with (args.out / "log.txt").open("a") as log:

        def say(line: str) -> None:
            print(line, flush=True)
            print(line, file=log, flush=True)

        for stage in (STAGE[name] for name in args.stages):
            left = ends - time.monotonic() - _GRACE_S
            if left < _LEAST_S:
                say(f"{stage.name:<20}not run: the time is over")
                continue
            seconds, start = min(stage.seconds if args.size == "full" else left, left), time.monotonic()
            command = [sys.executable, "-m", "benchmarks.device.stage", stage.name, "--out", str(args.out)]
            command += ["--size", args.size, "--seconds", str(seconds)]
            outcome = launch(command, environment(stage.flags), seconds + _GRACE_S)
            found = read(args.out / f"{stage.file}.json").get(stage.name, {})
            parts = [outcome.status, found.get("line"), found.get("error")]
            took = time.monotonic() - start
            say(f"{stage.name:<20}{took:5.0f} s  {'; '.join(filter(None, parts))}")
            if outcome.status != "ok":
                failed = True
                print(outcome.stderr, file=log, flush=True)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
