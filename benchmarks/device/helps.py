"""The same programs under other flags or with another attention, against the figures of the stage `fast`."""

from typing import Any

from benchmarks.device import record as records
from benchmarks.device.fast import Bench
from benchmarks.device.plan import Stage
from benchmarks.device.record import Record
from benchmarks.device.setting import ROWS, Setting
from benchmarks.sizes import SIZES

ENOUGH = 1.03
"""Times faster that a variant must be: two processes on one device differ by a percent or two."""


def verdict(found: dict[str, Any], before: dict[str, Any] | None) -> dict[str, Any]:
    """How many times faster than the same row of `fast`, and whether that is enough to be chosen."""
    if not before or "ours_ms" not in before:
        return {"against_ms": None}
    times = before["ours_ms"] / found["ours_ms"]
    return {"against_ms": before["ours_ms"], "times_faster": times, "helps": times >= ENOUGH}


def run(stage: Stage, size: str, record: Record) -> None:
    """The stage's rows of ours alone."""
    known = records.read(record.folder / "fast.json").get("fast", {})
    record.add("flags", stage.flags)
    record.add("model", stage.options.get("model", {}))
    setting = Setting(SIZES[size], stage.options.get("model", {}))
    bench = Bench(record, size, setting.dtype)
    for name in stage.options["rows"]:
        with record.attempt(name):
            found = bench.measure(name, setting, ROWS[name](setting).alone)
            found |= verdict(found, known.get(name))
            record.add(name, found)
            faster = f" ({found['times_faster']:.2f}x)" if "times_faster" in found else ""
            record.say(f"{name} {found['ours_ms']:.3g} ms{faster}")
