"""The rows of a batch: how many, whose sessions, and their subtasks as tokens."""

from collections.abc import Sequence
import contextlib
from typing import Any

from openpi_ar.algorithms.continuations import Continuations
from openpi_ar.data.inputs import InputTransform, stack_rows
from openpi_ar.errors import UserError
from openpi_ar.policy.session import Session
from openpi_ar.types import Tokens

_SPARE = 16
"""Room for texts of sessions in a table of likely ones, whose size is rounded up to a multiple of this."""


def padded(rows: list[Any], count: int) -> list[Any]:
    """The rows of a batch, the first one again where there are fewer than `count`."""
    return rows + rows[:1] * (count - len(rows))


def count_rows(raws: Sequence[Any], batch_size: int | None) -> int:
    """Rows of the batch, padding included. Raises UserError for more observations than fit, or none."""
    if not raws or (batch_size is not None and len(raws) > batch_size):
        raise UserError(f"a batch must hold 1 to {batch_size or 'any number of'} observations, found {len(raws)}")
    return batch_size or len(raws)


def row_sessions(sessions: Sequence[Session] | None, given: int, seed: int) -> Sequence[Session]:
    """The sessions of a batch; None: new ones of that seed. Raises UserError unless each row has one of its own."""
    if sessions is None:
        return [Session(seed) for _ in range(given)]
    different = len({id(session) for session in sessions})
    if len(sessions) != given or different != given:
        raise UserError(
            f"a batch needs a session of its own for each of the {given} observations, found {len(sessions)} sessions, "
            f"{different} of them different: make one for each robot with policy.session(seed)"
        )
    return sessions


def subtask_tokens(transform: InputTransform, subtasks: Sequence[str]) -> Tokens:
    """Subtasks as the model's template writes them, a row each (numpy).

    Raises UserError if the model writes none, there is none, or one is empty or longer than the budget.
    """
    if not transform.writes_text:
        name = transform.cfg.text.template
        raise UserError(f"template {name!r} has no subtask: this model only acts, so it has no text")
    if not subtasks:
        raise UserError("the list of subtasks is empty: give one or more")
    return Tokens(**stack_rows([transform.target({"subtask": s}) for s in subtasks]))


def forced_tokens(
    transform: InputTransform, subtasks: Sequence[str | None] | None, given: int, rows: int
) -> Tokens | None:
    """The texts that a batch's rows are made to have; None if none is. Raises UserError as `subtask_tokens`, or if only
    some rows have one."""
    forced = [s for s in subtasks or () if s is not None]
    if subtasks is None or not forced:
        return None
    if not len(subtasks) == len(forced) == given:
        raise UserError(f"give a subtask for each of the {given} observations or for none, found {list(subtasks)}")
    return subtask_tokens(transform, padded(forced, rows))


class LikelyTexts:
    """What decoding may expect: the subtasks that a checkpoint knows, and what sessions have generated.

    known   token ids of the subtasks; those that are longer than the budget are left out.
    budget  most tokens of a text.
    """

    def __init__(self, transform: InputTransform, subtasks: Sequence[str], budget: int):
        self.known: list[list[int]] = []
        self._budget, self._eos = budget, transform.tokenizer.eos_id
        for subtask in subtasks if budget else ():
            with contextlib.suppress(UserError):
                target = transform.target({"subtask": subtask})
                self.known.append(target["ids"][target["valid"]].tolist())
        # Of one size whatever the sessions hold, so that one program serves all calls.
        self._rows = -(-(len(self.known) + _SPARE) // _SPARE) * _SPARE

    def table(self, sessions: Sequence[Session] = ()) -> Continuations | None:
        """The texts of the sessions, then the known ones; None without known ones."""
        if not self.known:
            return None
        texts = dict.fromkeys(text for session in sessions for text in session.texts)
        return Continuations.of([*texts, *self.known], self._budget, self._eos, rows=self._rows)
