"""Frames of a LeRobot dataset as raw samples; `load.py` makes such a source."""

from collections.abc import Callable, Mapping
import dataclasses
import functools

import numpy as np

from openpi_ar.data.history import History
from openpi_ar.data.layout import Column, Layout, Numbers
from openpi_ar.data.lerobot.columns import Frames, runs
from openpi_ar.data.normalize import Mode, NormStats, compute_stats
from openpi_ar.data.transforms import absolute_to_model, state_to_model
from openpi_ar.robot_spec import RobotSpec


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """Everything of N frames but the pixels, in memory. `images` gives a camera's frame, uint8 [h w 3].

    state [N S] and actions [N X] float32; prompt_id and subtask_id [N] into `prompts` and `subtasks` (-1: no label);
    supervise bool [N]; last int [N], the last frame of each frame's episode.
    """

    frames: Frames
    images: Mapping[str, Callable[[int], np.ndarray]]
    masked: tuple[str, ...]
    state: np.ndarray
    actions: np.ndarray
    prompts: tuple[str, ...]
    prompt_id: np.ndarray
    subtasks: tuple[str, ...]
    subtask_id: np.ndarray
    supervise: np.ndarray
    last: np.ndarray
    layout: Layout

    @functools.cached_property
    def history(self) -> History:
        """Which subtasks were completed when."""
        return History.of(self.subtasks, self.subtask_id, self.frames.starts)


@dataclasses.dataclass(frozen=True, eq=False)
class LeRobotSource:
    """Random access to some frames, as raw samples for `InputTransform.sample`.

    A sample is the frame and the `horizon` actions from it on. Past the episode's end the last action is repeated and
    `action_valid` is False.
    """

    table: Table
    rows: np.ndarray
    """Indices into the table [rows]."""
    horizon: int
    robot: RobotSpec
    """What is done to states and actions before normalisation; samples are as recorded."""
    memory: int = 0
    """Completed subtasks that a sample tells (`data/history.py`)."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        t, row = self.table, int(self.rows[index])
        steps = np.arange(row, row + self.horizon)
        end = t.last[row]
        label = int(t.subtask_id[row])
        told = t.history.told(row, self.memory) if self.memory else {}
        return {
            "images": {name: read(row) for name, read in t.images.items()},
            "masked": t.masked,
            "state": t.state[row],
            "prompt": t.prompts[int(t.prompt_id[row])],
            "subtask": "" if label < 0 else t.subtasks[label],
            "actions": t.actions[np.minimum(steps, end)],
            "action_valid": steps <= end,
            "supervise_text": bool(t.supervise[row]),
            **told,
        }

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts that occur in these frames."""
        return tuple(self.table.prompts[i] for i in np.unique(self.table.prompt_id[self.rows]))

    @property
    def name(self) -> str:
        """The dataset's directory, for messages."""
        return str(self.table.frames.meta.root)

    @property
    def subtasks(self) -> tuple[str, ...]:
        """The subtasks that occur in these frames, the most frequent first."""
        ids, counts = np.unique(self.table.subtask_id[self.rows], return_counts=True)
        return tuple(self.table.subtasks[i] for i in ids[np.argsort(-counts, kind="stable")] if i >= 0)

    @property
    def histories(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """The prompts that occur in these frames, each with every history."""
        if not self.memory:
            return ()
        t = self.table
        moments = np.unique(np.stack([t.prompt_id[self.rows], t.history.run[self.rows]]), axis=1).T.tolist()
        pairs = dict.fromkeys((t.prompts[prompt], t.history.before(run, self.memory)) for prompt, run in moments)
        return tuple(pairs)

    @property
    def layout(self) -> Layout:
        """Features and their dimensions."""
        return self.table.layout

    def where(self, index: int) -> str:
        """ "FILE: episode E, frame F"."""
        return self.table.frames.where(int(self.rows[index]))

    def unlabelled(self) -> list[str]:
        """Runs of frames of the dataset without a subtask."""
        frames = self.table.frames
        empty = [(a, b) for a, b, label in runs(self.table.subtask_id, frames.starts) if label < 0]
        return [frames.where(a) + (f" to {frames.place(b - 1)[1]}" if b - a > 1 else "") for a, b in empty]

    def numbers(self) -> Numbers:
        """Over all frames of this source; no image is read.

        Actions relative to the state are those of all chunks, each from its own state; absolute ones count once a
        frame.
        """
        t, rows, all_rows = self.table, self.rows, np.arange(len(self.rows))
        state = state_to_model(self.robot, t.state[rows])
        actions = absolute_to_model(self.robot, t.actions)
        delta = self.robot.delta
        by_dimension = [
            self._relative(actions[:, i], state[:, i])
            if i < len(delta) and delta[i]
            else Column(actions[rows, i], all_rows)
            for i in range(actions.shape[1])
        ]
        return {"state": [Column(x, all_rows) for x in state.T], "actions": by_dimension}

    def _relative(self, action: np.ndarray, state: np.ndarray) -> Column:
        """One dimension [frames] of the actions in every chunk, less its state [rows]; none past an episode's end."""
        rows, last = self.rows, self.table.last[self.rows]
        inside = [np.flatnonzero(rows + d <= last) for d in range(self.horizon)]
        values = [action[rows[i] + d] - state[i] for d, i in enumerate(inside)]
        return Column(np.concatenate(values), np.concatenate(inside))

    def norm_stats(self, mode: Mode = "quantile") -> dict[str, NormStats]:
        """Statistics of `numbers`."""
        return {name: compute_stats([c.values for c in columns], mode) for name, columns in self.numbers().items()}
