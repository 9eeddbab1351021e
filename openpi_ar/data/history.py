"""Which subtasks were completed before a frame, from its episode's labels: what a sample tells of the past.

A run is consecutive frames of one label. While a session asks once in a while, what it knows is late: the call at which
a new subtask is generated does not know yet that the last one is completed. If training told of a change at once, its
histories alone would say which subtask it is now, and a model that learnt that would never begin a new one. So a change
is told to the frame after it at the earliest, and `LateHistory` makes it later still.
"""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class History:
    """The runs of labels of N frames.

    run     run of each frame [N]; frames without a label belong to the one before.
    begins  first frame of each run [R].
    texts   text of each run [R]; "" where an episode begins without a label.
    first   first run of each run's episode [R].
    """

    run: np.ndarray
    begins: np.ndarray
    texts: tuple[str, ...]
    first: np.ndarray

    @staticmethod
    def of(texts: tuple[str, ...], labels: np.ndarray, starts: np.ndarray) -> "History":
        """From the index of each frame's text [N] (-1: none) and the first frame of each episode, and N: [E + 1]."""
        frames = np.arange(len(labels))
        episode = np.repeat(starts[:-1], np.diff(starts))
        # Each frame's last frame with a label, in its own episode.
        known = np.maximum.accumulate(np.where(labels >= 0, frames, -1))
        filled = np.where(known >= episode, labels[np.maximum(known, 0)], -1)
        changed = np.ones(len(labels), bool)
        changed[1:] = np.diff(filled) != 0
        changed[starts[:-1]] = True
        begins = np.flatnonzero(changed)
        run = np.cumsum(changed) - 1
        named = tuple(texts[i] if i >= 0 else "" for i in filled[begins].tolist())
        return History(run, begins, named, run[episode[begins]])

    def before(self, run: int, most: int) -> tuple[str, ...]:
        """Texts of the last `most` runs before this one in its episode."""
        done = [text for text in self.texts[int(self.first[run]) : run] if text]
        return tuple(done[-most:])

    def told(self, frame: int, most: int) -> dict[str, Any]:
        """Entries of a sample: `done`, what a session that is asked at every frame knows to be completed;
        `done_before`, what it knew before the last change; `done_age`, frames since then."""
        run = int(self.run[frame])
        age = frame - int(self.begins[run])
        earlier = self.before(max(run - 1, int(self.first[run])), most)
        return {"done": self.before(run, most) if age else earlier, "done_before": earlier, "done_age": age}


@dataclasses.dataclass(frozen=True)
class LateHistory:
    """Tells a training row of the last change as late as a session may learn of it: after 1 to `most` frames, drawn.

    most  frames between two calls, and those by which a model notices a change late.
    """

    most: int

    def __call__(self, raw: dict, rng: np.random.Generator) -> dict:
        if "done" not in raw:
            return raw
        late = raw["done_age"] < 1 + int(rng.integers(self.most))
        return {**raw, "done": raw["done_before"]} if late else raw
