"""Which subtasks were completed before a frame, from its episode's labels: what a sample tells of the past.

A run is consecutive frames of one label; a label of a single frame is none. While a session asks once in a while, what
it knows is late: the call at which a new subtask is generated does not know yet that the last one is completed, and nor
does the next, which has to confirm it (`Session.remember`). If training told of a change at once, its histories alone
would say which subtask it is now, and a model that learnt that would never begin a new one. So a change is told two
frames after it at the earliest, and `LateHistory` makes it later still.
"""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class History:
    """The runs of labels of N frames.

    run     run of each frame [N]; frames without a label, or with one of their own, belong to the one before.
    begins  first frame of each run [R].
    known   first frame of each run at which a session that is asked at every frame knows of it [R].
    texts   text of each run [R]; "" where an episode begins without a label.
    first   first run of each run's episode [R].
    """

    run: np.ndarray
    begins: np.ndarray
    known: np.ndarray
    texts: tuple[str, ...]
    first: np.ndarray

    @staticmethod
    def of(texts: tuple[str, ...], labels: np.ndarray, starts: np.ndarray) -> "History":
        """From the index of each frame's text [N] (-1: none) and the first frame of each episode, and N: [E + 1]."""
        episode = np.repeat(starts[:-1], np.diff(starts))
        run, _ = _runs(labels, episode)
        single = np.bincount(run, labels >= 0, minlength=1)[run] < 2
        labels = np.where(single, -1, labels)
        run, filled = _runs(labels, episode)
        begins = np.flatnonzero(np.diff(run, prepend=-1))
        # The second frame with a label confirms it.
        count = np.cumsum(labels >= 0)
        nth = count - (count - (labels >= 0))[begins][run]
        second = np.flatnonzero((nth == 2) & (labels >= 0))
        known = begins.copy()
        known[run[second]] = second + 1
        named = tuple(texts[i] if i >= 0 else "" for i in filled[begins].tolist())
        return History(run, begins, known, named, run[episode[begins]])

    def before(self, run: int, most: int) -> tuple[str, ...]:
        """Texts of the last `most` runs before this one in its episode."""
        done = [text for text in self.texts[int(self.first[run]) : run] if text]
        return tuple(done[-most:])

    def told(self, frame: int, most: int) -> dict[str, Any]:
        """Entries of a sample: `done`, what a session that is asked at every frame knows to be completed;
        `done_before`, what it knew before the last change; `done_age`, frames since then."""
        run = int(self.run[frame])
        earlier = self.before(max(run - 1, int(self.first[run])), most)
        done = self.before(run, most) if frame >= self.known[run] else earlier
        return {"done": done, "done_before": earlier, "done_age": frame - int(self.begins[run])}


def _runs(labels: np.ndarray, episode: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(run, label) of each frame [N], the label being that of the last frame with one in its episode.

    `episode` is the first frame of each frame's episode [N].
    """
    frames = np.arange(len(labels))
    last = np.maximum.accumulate(np.where(labels >= 0, frames, -1))
    filled = np.where(last >= episode, labels[np.maximum(last, 0)], -1)
    changed = frames == episode
    changed[1:] |= np.diff(filled) != 0
    return np.cumsum(changed) - 1, filled


@dataclasses.dataclass(frozen=True)
class LateHistory:
    """Tells a training row of the last change as late as a session may learn it: 2 to `most` + 1 frames after, drawn.

    most  frames of two calls, and those by which a model notices a change late.
    """

    most: int

    def __call__(self, raw: dict, rng: np.random.Generator) -> dict:
        if "done" not in raw:
            return raw
        late = raw["done_age"] < 2 + int(rng.integers(self.most))
        return {**raw, "done": raw["done_before"]} if late else raw
