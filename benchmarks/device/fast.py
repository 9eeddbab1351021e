"""Inference: ours and the baseline in turns, and how far each is from what the device could do.

Each row is compiled, compared with the baseline, timed and written before the next is compiled; ours of what matters
most before any baseline. Full size: bfloat16, three cameras, 200 prompt tokens, 25 generated tokens, chunks of 50
actions, 10 steps.
"""

import dataclasses
from typing import Any

import jax

from benchmarks.device.plan import Stage
from benchmarks.device.record import Record
from benchmarks.device.setting import ROWS, Row, Setting
from benchmarks.roofline import data_sheet
from benchmarks.sizes import SIZES
from benchmarks.timing import Device, measure_device, run_in_turns

SECONDS = 1.5
"""Time spent on the runs of one row."""
_HEADLINES = ("actions", "text_and_actions", "right_draft")
"""Ours of these come before any baseline is compiled."""


class Bench:
    """Times rows of a setting against what the device could do at best: its measured rates and its data sheet's."""

    def __init__(self, record: Record, size: str, dtype: str):
        self._record, self._seconds = record, SECONDS if size == "full" else 0.0
        device, self.rates = jax.devices()[0], measure_device(dtype)
        self.sheet = data_sheet(device.device_kind)
        rates = {"measured": self.rates, "data_sheet": self.sheet}
        self._bounds: dict[str, Device] = {name: rate for name, rate in rates.items() if rate is not None}
        record.add(
            "device",
            {
                "kind": device.device_kind,
                "platform": device.platform,
                "jax": jax.__version__,
                "dtype": dtype,
                "memory": (device.memory_stats() or {}).get("bytes_limit"),
                **{name: dataclasses.asdict(rate) for name, rate in self._bounds.items()},
            },
        )

    def measure(self, name: str, setting: Setting, row: Row) -> dict[str, Any]:
        """Compiles and compares the programs of a row, times them in turns, and writes what was found."""
        calls = {"ours": row.ours} | ({} if row.baseline is None else {"baseline": row.baseline()})
        programs, results, found = {}, {}, {}
        for path, call in calls.items():
            self._record.check_time()
            programs[path], read = setting.program(call)
            results[path] = programs[path].call()
            # Read from the cache, its time says nothing about compiling.
            found[f"{path}_compile_s"] = None if read else programs[path].compile_s
            found[f"{path}_peak_gb"] = programs[path].peak / 1e9
        found |= row.compare(*results.values())
        share = row.share(results["ours"])
        del results
        seconds = min(self._seconds, max(self._record.left - 1, 0))
        run_in_turns(programs, seconds=seconds, least=7 if self._seconds else 3, most=100)
        for path, program in programs.items():
            found |= {f"{path}_ms": 1e3 * program.median / share, f"{path}_p95_ms": 1e3 * program.p95 / share}
        found["runs"] = len(programs["ours"].times)
        if row.baseline is not None:
            found["ratio"] = programs["baseline"].median / programs["ours"].median
        for kind, device in self._bounds.items():
            bound = 1e3 * row.work.bound(device)
            found |= {f"bound_{kind}_ms": bound, f"times_bound_{kind}": found["ours_ms"] / bound}
        self._record.add(name, found)
        return found


def run(stage: Stage, size: str, record: Record) -> None:
    """All rows, as far as the time reaches."""
    setting = Setting(SIZES[size], {})
    bench = Bench(record, size, setting.dtype)
    record.say(f"{bench.rates.flops / 1e12:.3g} TFLOP/s, {bench.rates.bandwidth / 1e12:.3g} TB/s")
    rows = ROWS if size == "full" else {name: make for name, make in ROWS.items() if "camera" not in name}
    for name in _HEADLINES:
        with record.attempt(name):
            record.say(f"{name} {bench.measure(name, setting, rows[name](setting).alone)['ours_ms']:.3g} ms", name)
    for name, make in rows.items():
        with record.attempt(name):
            row = make(setting)
            if name in _HEADLINES and row.baseline is None:
                continue
            found = bench.measure(name, setting, row)
            ratio = f" ({found['ratio']:.2f}x)" if "ratio" in found else ""
            record.say(f"{name} {found['ours_ms']:.3g} ms{ratio}", name)
