"""The one home of measured figures, `docs/results.json`: commands write it, README and the pages of docs/ quote it.

    python -m benchmarks.results record tabletop.train -- python infer.py --ckpt tabletop --rollout 100 --json {json}
    python -m benchmarks.results quote            # brings the figures of all pages up to date

`record` runs the command and keeps every number of the JSON that it wrote (to `{json}`, where the command names it),
how long the command took, the command itself, the date and the machine. A page quotes a number by a comment behind it,
which readers do not see: `99 %<!--tabletop.train:success-->`. The comment names the entry and the path of the number in
its JSON. Number of decimals and unit are the page's: `%` is 100 times the fraction, `minutes` a 60th of the seconds.
"""

from collections.abc import Iterator
import dataclasses
import datetime as dt
import fnmatch
import json
import os
from pathlib import Path
import re
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from typing import Annotated, Any

import tyro

from openpi_ar import flags
from openpi_ar.errors import UserError, command_line

ROOT = Path(__file__).parents[1]
FILE = ROOT / "docs" / "results.json"

_NUMBER = r"-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?"
_UNIT = r"%|ms|s|minutes|hours|frames/s|samples/s|episodes|tests|GB/s|GB|MB|MiB|k"
QUOTE = re.compile(
    rf"(?P<number>{_NUMBER})(?P<space>[ ]?)(?P<unit>{_UNIT})?(?P<bold>\*\*)?<!--(?P<entry>[\w.-]+):(?P<path>[^<>]+)-->"
)
_FACTORS = {"%": 100.0, "minutes": 1 / 60, "hours": 1 / 3600}
# Code is no claim: flags, addresses and file names may hold any number.
_CODE = re.compile(r"```.*?```|`[^`\n]*`|^    .*?$", re.DOTALL | re.MULTILINE)
# What only a measurement can say. Sizes and counts without these units are properties of the code.
_MEASURED = re.compile(rf"(?P<number>{_NUMBER})[ ]?(?:%|ms|frames/s|samples/s|minutes|hours)(?![\w/])")


def pages() -> list[Path]:
    """README and the pages of docs/. Notebooks (`docs/lab/`) are dated: what they say was so on that day."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def load() -> dict[str, Any]:
    """All entries by key."""
    return json.loads(FILE.read_text())


def look_up(entries: dict[str, Any], entry: str, path: str) -> float:
    """The number of an entry at a path. Raises UserError if there is none."""
    if entry not in entries:
        raise UserError(f"docs/results.json has no entry {entry!r}; it has {', '.join(entries)}")
    values = entries[entry]["values"]
    if path not in values:
        raise UserError(f"docs/results.json: entry {entry!r} has no {path!r}; it has {', '.join(values)}")
    return values[path]


def written(value: float, like: str, unit: str | None) -> str:
    """The value as a page writes it: with the decimals of `like` and in its unit.

    >>> written(0.98765, "71", "%"), written(1103.0, "20.5", "minutes"), written(3.14159e-5, "1.0e-5", None)
    ('99', '18.4', '3.1e-5')
    """
    value *= _FACTORS.get(unit or "", 1.0)
    mantissa, _, exponent = like.partition("e")
    decimals = len(mantissa.partition(".")[2])
    if exponent:
        digits, power = f"{value:.{decimals}e}".split("e")
        return f"{digits}e{int(power)}"
    return f"{value:,.{decimals}f}" if "," in like or abs(value) >= 10_000 else f"{value:.{decimals}f}"


def quoted(text: str, entries: dict[str, Any]) -> str:
    """A page with the figures that the entries have."""

    def replace(found: re.Match[str]) -> str:
        value = look_up(entries, found["entry"], found["path"])
        return written(value, found["number"], found["unit"]) + found[0][len(found["number"]) :]

    return QUOTE.sub(replace, text)


def differences(text: str, entries: dict[str, Any]) -> Iterator[str]:
    """What is wrong with the figures of a page: those that the entries contradict, and those that quote nothing."""
    for found in QUOTE.finditer(text):
        expected = written(look_up(entries, found["entry"], found["path"]), found["number"], found["unit"])
        if expected != found["number"]:
            yield f"{found['entry']}:{found['path']} is {expected}, the page says {found['number']}"
    bare = QUOTE.sub("", _CODE.sub("", text))
    for found in _MEASURED.finditer(bare):
        yield f"{found[0]!r} quotes no result: write <!--entry:path--> behind it"


def numbers(report: Any, prefix: str = "") -> dict[str, float]:
    """The numbers of a JSON by their paths. Lists (episodes, repeated times) and truth values are left out."""
    if isinstance(report, dict):
        return {p: v for key, value in report.items() for p, v in numbers(value, f"{prefix}/{key}").items()}
    if isinstance(report, bool) or not isinstance(report, int | float):
        return {}
    return {prefix[1:]: float(f"{report:.6g}")}


def cpu_seconds() -> float:
    """User and system time of all processes that this one started and waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@dataclasses.dataclass(frozen=True)
class Record:
    """Run a command and keep the numbers that it writes."""

    key: tyro.conf.Positional[str]
    """Name of the entry, e.g. `tabletop.train`."""
    command: tyro.conf.Positional[tuple[str, ...]]
    """What to run, behind `--`; `{json}` is the file that it writes its numbers to."""
    machine: str = f"{os.cpu_count()} CPU cores"
    """On what, in words."""
    keep: tuple[str, ...] = ("*",)
    """Paths of the numbers to keep, as patterns of a shell: `ratios/*`."""

    def run(self) -> None:
        if not self.command:
            raise UserError("name the command to run behind --: record KEY -- python infer.py ... --json {json}")
        with tempfile.TemporaryDirectory() as folder:
            out, began, cpu = Path(folder) / "out.json", time.perf_counter(), cpu_seconds()
            done = subprocess.run([word.replace("{json}", str(out)) for word in self.command], cwd=ROOT, check=False)
            if done.returncode:
                raise UserError(f"the command ended with exit status {done.returncode}: nothing is recorded")
            found = numbers(json.loads(out.read_text())) if out.exists() else {}
        values = {path: v for path, v in found.items() if any(fnmatch.fnmatch(path, k) for k in self.keep)}
        values["seconds"] = round(time.perf_counter() - began, 2)
        values["cpu_seconds"] = round(cpu_seconds() - cpu, 2)
        entry = {
            "command": shlex.join(self.command).replace("'{json}'", "{json}"),
            "date": dt.date.today().isoformat(),
            "machine": self.machine,
            "values": values,
        }
        # Read at the end: another command may have been recorded in the meantime.
        entries = load() | {self.key: entry}
        FILE.write_text(json.dumps(dict(sorted(entries.items())), indent=2) + "\n")


@dataclasses.dataclass(frozen=True)
class Quote:
    """Write the figures of `docs/results.json` into all pages that quote them."""

    def run(self) -> None:
        entries = load()
        for page in pages():
            text = page.read_text()
            if (new := quoted(text, entries)) != text:
                page.write_text(new)
                print(f"changed {page.relative_to(ROOT)}", file=sys.stderr)


Command = Annotated[Record, tyro.conf.subcommand("record")] | Annotated[Quote, tyro.conf.subcommand("quote")]


def main(argv: list[str] | None = None) -> None:
    """Entry point. Bad input ends with one line on stderr and exit code 2."""
    with command_line():
        flags.parse(Command, argv, "python -m benchmarks.results", description=__doc__).run()


if __name__ == "__main__":
    main()
