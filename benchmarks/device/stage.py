"""One stage, in a process of its own: `python -m benchmarks.device.stage fast --out DIR --size full --seconds 150`."""

import argparse
import importlib
from pathlib import Path
import sys
import traceback

from benchmarks.device.plan import SITE, STAGE
from benchmarks.device.record import OutOfTime, Record


def main(argv: list[str] | None = None) -> None:
    """Runs it; exit code 1 if it failed. Whatever it has found by then is written."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("name", choices=STAGE)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", required=True)
    parser.add_argument("--seconds", type=float, required=True)
    args = parser.parse_args(argv)
    stage = STAGE[args.name]
    sys.path.append(str(SITE))
    record = Record(args.out, stage.file, stage.name, args.seconds)
    try:
        importlib.import_module(f"benchmarks.device.{stage.module}").run(stage, args.size, record)
        record.end()
    except OutOfTime:
        record.say("out of time")
    except Exception as e:
        traceback.print_exc()
        record.add("error", f"{type(e).__name__}: {' '.join(str(e).split())[:300]}")
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
