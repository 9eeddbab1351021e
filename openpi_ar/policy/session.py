"""What lasts from one call of a policy to the next. It belongs to the caller: robots share no noise and no drafts."""

import numpy as np

Draft = tuple[np.ndarray, np.ndarray]
"""ids int32 [M] and valid bool [M] of a text that may be generated again."""

_TEXTS = 16


class Session:
    """The calls of one robot to a policy: `policy.infer(raw, session=session)` uses it and brings it up to date.

    Args:
        seed: of the random key. The noise of call n follows from it, whoever else is in the batch.

    Attributes:
        key: data of the JAX key, uint32; every call splits it.
        draft: the last generated text; the next call checks it instead of decoding it again. None (which you may set):
            there is none. The text does not depend on it, only the time that it takes.
        texts: token ids of the texts that were generated, the last one first, 16 at most: how the next may go on.
        chunk: the last actions, normalised, float32 [A X]. None before the first call.
        executed: actions of `chunk` that the robot has executed. The caller counts them; a new chunk starts at 0.
        task: the prompt of the last call. None before the first call.
        subtask: the standing text, the last one that two calls in a row gave; "" before there is one. A text of one
            call alone is a slip, and completes nothing.
        done: subtasks that are completed, the last one last, as many as the model reads (`text.memory`). You may set
            it.
    """

    def __init__(self, seed: int = 0):
        import jax  # here, because those who only plan episodes need no JAX

        self.key = np.asarray(jax.random.key_data(jax.random.key(seed)))
        self.draft: Draft | None = None
        self.texts: list[tuple[int, ...]] = []
        self.chunk: np.ndarray | None = None
        self.executed = 0
        self.task: str | None = None
        self.subtask, self._last = "", ""
        self.done: tuple[str, ...] = ()

    def begin(self, task: str | None) -> None:
        """Records what the next call asks for. What was completed of another task is forgotten."""
        if self.task is not None and task != self.task:
            self.subtask, self._last, self.done = "", "", ()
        self.task = task

    def remember(self, subtask: str, most: int) -> None:
        """Records the text of a call: if it is not the standing one, and the last call gave it too, the standing one is
        completed. At most `most` are kept."""
        if subtask == self._last != self.subtask:
            self.done = (*self.done, self.subtask)[-most:] if self.subtask else self.done
            self.subtask = subtask
        self._last = subtask

    def advance(self, key: np.ndarray, draft: Draft | None, chunk: np.ndarray) -> None:
        """Records one call: the next key, the text that was generated (None: it was given) and the actions."""
        self.key, self.chunk, self.executed = key, chunk, 0
        if draft is not None:
            self.draft, text = draft, tuple(draft[0][draft[1]].tolist())
            self.texts = [text, *(t for t in self.texts if t != text)][:_TEXTS]
