"""How fast, against the baseline and against the device: `python -m benchmarks.run inference --size mid --device cpu`.

Every ratio is baseline time / our time of programs that return the same numbers (checked before timing) and were run in
turns. The bound is what the device's own matmul and copy rates allow: the larger of FLOPs / FLOP rate and compulsory
traffic (arguments and results) / bandwidth.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
from rich.console import Console
from rich.table import Table
import tyro

from benchmarks import growth, inference, training
from benchmarks.sizes import SIZES, Size
from benchmarks.timing import Device, Program, measure_device
from openpi_ar import files, flags
from openpi_ar.errors import command_line


@dataclasses.dataclass(frozen=True)
class Args:
    """Times inference or training, ours and the baseline in turns; or how ours grows with its inputs."""

    what: tyro.conf.Positional[Literal["inference", "training", "all", "growth"]] = "all"
    """`growth`: time against tokens decoded, prompt, cameras and batch, without the baseline."""
    size: Literal["tiny", "mid", "mid-vocab", "full"] = "mid"
    """`mid-vocab`: mid with the 257,152 ids of real checkpoints; inference takes 2 GB."""
    device: Literal["cpu", "gpu", "tpu"] = "cpu"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of parameters and matmuls at inference; auto: float32 on CPU, bfloat16 elsewhere. Training is float32."""
    seconds: float = 20.0
    """Time spent on each row of the table."""
    json: Path | None = None
    """Write all figures to this file."""
    plot: Path | None = None
    """Draw `growth` into this file."""


def repeats(stage: str, size: Size) -> tuple[int, int]:
    """(times the body of the stage's loop runs, which XLA's cost analysis counts once; what its time is divided by)."""
    return {"token": (1, size.tokens), "denoise": (size.steps, 1)}.get(stage, (1, 1))


def figures(stage: str, p: Program, size: Size, device: Device) -> dict[str, float | None]:
    """All numbers of one row. The bound is left out where the program has several loops: it is its parts' sum."""
    loops, share = repeats(stage, size)
    flops = None if p.flops is None else p.flops * loops
    known = flops is not None and stage != "text_and_actions"
    bound = device.bound(flops, p.compulsory * loops) if known and flops is not None else None
    return {
        "median_ms": 1e3 * p.median / share,
        "p95_ms": 1e3 * p.p95 / share,
        "runs": len(p.times),
        "compile_s": p.compile_s,
        "peak_mb": p.peak / 1e6,
        "gflop": None if flops is None else flops / 1e9,
        "xla_gb": None if p.bytes_accessed is None else p.bytes_accessed * loops / 1e9,
        "bound_ms": None if bound is None else 1e3 * bound,
        "times_bound": None if bound is None else p.median / share / bound,
    }


def add_whole_bound(rows: dict[str, dict[str, dict[str, Any]]], size: Size) -> None:
    """The bound of the whole program is the sum of its stages'."""
    if "token" not in rows:
        return
    parts = {s: rows[s]["ours"]["bound_ms"] for s in ("vision", "prefill", "token", "denoise")}
    if any(b is None for b in parts.values()):
        return
    for path, row in rows["text_and_actions"].items():
        if path.endswith("known text"):  # passes of several tokens, which have no stage that counts them
            continue
        tokens = 0 if path.endswith("draft") else size.tokens
        row["bound_ms"] = parts["vision"] + parts["prefill"] + parts["denoise"] + parts["token"] * tokens
        row["times_bound"] = row["median_ms"] / row["bound_ms"]


def show(rows: dict[str, dict[str, dict[str, Any]]], ratios: dict[str, float], console: Console) -> None:
    """The table, then the ratios."""
    names = ("median_ms", "p95_ms", "compile_s", "peak_mb", "gflop", "xla_gb", "bound_ms", "times_bound")
    table = Table("stage", "path", *(n.replace("_", " ") for n in names))
    for stage, paths in rows.items():
        for path, row in paths.items():
            table.add_row(stage, path, *("" if row[n] is None else f"{row[n]:.2f}" for n in names))
    console.print(table)
    ratio = Table("baseline / ours", "")
    for name, value in ratios.items():
        ratio.add_row(name, f"{value:.2f}")
    console.print(ratio)


def show_growth(args: Args, dtype: str) -> None:
    """Measures, prints, and if asked writes and draws."""
    found = growth.run(SIZES[args.size], dtype, args.seconds)
    table = Table("against", "what", "")
    for row in growth.rows(found):
        table.add_row(*row)
    Console(width=140).print(table)
    files.write_json(args.json, found)
    if args.plot is not None:
        growth.plot(found, args.plot, f"{args.size}, {jax.devices()[0].device_kind}, {dtype}")


def compare(args: Args, dtype: str) -> None:
    """Ours and the baseline in turns: measures, prints, and if asked writes."""
    size = SIZES[args.size]
    device = measure_device(dtype)
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    ratios: dict[str, float] = {}
    gaps: dict[str, float] = {}
    for what in ("inference", "training") if args.what == "all" else (args.what,):
        if what == "inference":
            found, new, apart = inference.run(size, dtype, args.seconds)
        else:
            found, new, apart = training.run(size, args.seconds)
        rows |= {s: {k: figures(s, p, size, device) for k, p in group.items()} for s, group in found.items()}
        ratios, gaps = ratios | new, gaps | apart
    add_whole_bound(rows, size)
    console = Console(width=140)
    console.print(
        f"{args.size}, {jax.devices()[0].device_kind}, {dtype}: matmul {device.flops / 1e9:.0f} GFLOP/s, "
        f"copy {device.bandwidth / 1e9:.1f} GB/s"
    )
    show(rows, ratios, console)
    if args.json is not None:
        report = {
            "size": args.size,
            "device": jax.devices()[0].device_kind,
            "dtype": dtype,
            "measured": dataclasses.asdict(device),
            "stages": rows,
            "ratios": ratios,
            "largest_differences": gaps,
        }
        files.write_json(args.json, report)


def main(args: Args) -> None:
    files.check_file(args.json, "--json")
    files.check_file(args.plot, "--plot", *files.FIGURES)
    jax.config.update("jax_platforms", {"gpu": "cuda"}.get(args.device, args.device))
    # Compile times are measured: nothing may come from an earlier run.
    jax.config.update("jax_enable_compilation_cache", False)
    dtype = args.dtype if args.dtype != "auto" else ("float32" if args.device == "cpu" else "bfloat16")
    (show_growth if args.what == "growth" else compare)(args, dtype)


if __name__ == "__main__":
    with command_line():
        main(flags.parse(Args, None, "python -m benchmarks.run"))
