"""What lasts from one call of a policy to the next. It belongs to the caller, so two robots never share noise or drafts."""

from collections.abc import Sequence

import numpy as np

from openpi_ar.errors import UserError

Draft = tuple[np.ndarray, np.ndarray]
"""ids int32 [M] and valid bool [M] of a text that may be generated again."""


class Session:
    """The calls of one robot to a policy: `policy.infer(raw, session=session)` uses it and brings it up to date.

    Args:
        seed: of the random key. The noise of call n follows from it, whoever else is in the batch.

    Attributes:
        key: data of the JAX key, uint32; every call splits it.
        draft: the last generated text; the next call checks it instead of decoding it anew. None: there is none.
        chunk: the last actions, normalised, float32 [A X]. None before the first call.
        executed: actions of `chunk` that the robot has executed. The caller counts them; a new chunk starts at 0.
    """

    def __init__(self, seed: int = 0):
        import jax  # here, because those who only plan episodes need no JAX

        self.key = np.asarray(jax.random.key_data(jax.random.key(seed)))
        self.draft: Draft | None = None
        self.chunk: np.ndarray | None = None
        self.executed = 0

    def clear_draft(self) -> None:
        """Have the next call decode its text anew. The text does not depend on it, only the time that it takes."""
        self.draft = None

    def advance(self, key: np.ndarray, draft: Draft | None, chunk: np.ndarray) -> None:
        """Records one call: the next key, the text that was generated (None: it was given) and the actions."""
        self.key, self.chunk, self.executed = key, chunk, 0
        self.draft = draft or self.draft


def one_for_each_row(sessions: Sequence[Session] | None, rows: int, seed: int) -> Sequence[Session]:
    """The sessions of a batch; None: new ones of that seed. Raises UserError unless each row has one of its own."""
    if sessions is None:
        return [Session(seed) for _ in range(rows)]
    if len(sessions) != rows or len({id(session) for session in sessions}) != rows:
        raise UserError(
            f"a batch needs a session of its own for each of the {rows} observations, found {len(sessions)} sessions, "
            f"{len({id(session) for session in sessions})} of them different: make one for each robot with policy.session(seed)"
        )
    return sessions
