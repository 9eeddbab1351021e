"""Figures that are on disk as soon as they exist, and the time that is left for more of them."""

from collections.abc import Iterator
import contextlib
import json
from pathlib import Path
import time
from typing import Any

from openpi_ar import files

ENOUGH_S = 3.0
"""With less time left, nothing new is begun."""


class OutOfTime(Exception):
    """The stage's time is over; what it has found is written."""


class Record:
    """The figures of one stage: `<folder>/<file>.json` holds those of every stage that shares the file, by its name.

    `line` is what the command prints of the stage, as far as it got.
    """

    def __init__(self, folder: Path, file: str, stage: str, seconds: float):
        self.folder, self._path, self._stage = folder, folder / f"{file}.json", stage
        self._began = time.monotonic()
        self._ends = self._began + seconds
        folder.mkdir(parents=True, exist_ok=True)
        self._said: dict[str, str] = {}
        self.figures: dict[str, Any] = {"complete": False, "line": ""}
        self._write()

    @property
    def left(self) -> float:
        """Seconds until the stage's time is over."""
        return self._ends - time.monotonic()

    def check_time(self, needed: float = ENOUGH_S) -> None:
        """Raises OutOfTime if there are not so many seconds left."""
        if self.left < needed:
            raise OutOfTime

    def add(self, name: str, value: Any) -> None:
        """Writes one figure, or a dictionary of them."""
        self.figures[name] = value
        self._write()

    def say(self, part: str, name: str = "") -> None:
        """Adds to the stage's line, or takes the place of what was said under this name."""
        self._said[name or part] = part
        self.add("line", ", ".join(self._said.values()))

    @contextlib.contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """An error in the block becomes `errors`, and the stage continues. Its seconds are written."""
        self.check_time()
        began = time.monotonic()
        try:
            yield
        except OutOfTime:
            raise
        except Exception as e:
            known = self.figures.get("errors", {})
            self.add("errors", {**known, name: f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"})
            self.say(f"{name} FAILED ({type(e).__name__})")
        took = round(time.monotonic() - began, 1)
        self.add("seconds_of", {**self.figures.get("seconds_of", {}), name: took})

    def end(self) -> None:
        """Marks the stage as complete."""
        self.add("complete", True)

    def _write(self) -> None:
        self.figures["seconds"] = round(time.monotonic() - self._began, 1)
        body = {**read(self._path), self._stage: self.figures}
        part = self._path.with_suffix(".part")  # a process that is killed while it writes loses nothing
        files.write_json(part, body, "--out")
        part.replace(self._path)


def read(path: Path) -> dict[str, Any]:
    """The stages in a file; none if there is no such file."""
    return json.loads(path.read_text()) if path.is_file() else {}
