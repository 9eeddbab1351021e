"""How sure a model is of the text that it has generated."""

from typing import Any

import numpy as np

from openpi_ar.algorithms.sampling import Generated
from openpi_ar.errors import UserError


def confidence(logprobs: np.ndarray, margins: np.ndarray, *, given: bool = False) -> dict[str, Any]:
    """The entries of a result that tell how sure its text is.

    Args:
        logprobs: log-probability of each generated token [n], of the ids that decoding allowed.
        margins: by how much each exceeds that of the next best id [n]; infinite where no other was allowed.
        given: the text was not generated: nothing is known of it.

    Returns:
        `logprobs` float32 [n]; `logprob`, their sum: exp(logprob) is the probability of the whole text, its end
        included; `margin`, the smallest finite one: the lead over the runner-up where the choice was closest. Without
        generated tokens `logprob` is None, without a choice `margin` is.

    Raises:
        UserError: as `check_finite`.
    """
    check_finite(logprobs)
    if given or not len(logprobs):
        return {"logprobs": np.zeros(0, np.float32), "logprob": None, "margin": None}
    choices = margins[np.isfinite(margins)]
    return {
        "logprobs": np.asarray(logprobs, np.float32),
        "logprob": float(logprobs.sum()),
        "margin": float(choices.min()) if len(choices) else None,
    }


def row_of(text: Generated, row: int, *, given: bool = False) -> tuple[list[int], dict[str, Any]]:
    """(the ids of a row of numpy arrays, its `confidence`)."""
    ids, logprobs, margins = (np.asarray(x[row])[text.valid[row]] for x in (text.ids, text.logprobs, text.margins))
    return ids.tolist(), confidence(logprobs, margins, given=given)


def check_finite(logprobs: np.ndarray) -> None:
    """Raises UserError if one is no number, as when logits are NaN or infinite: such a text means nothing."""
    if np.isnan(logprobs).any():
        raise UserError(
            "the model's logits are NaN or infinite, so its text means nothing: look for such values in the parameters "
            "of the checkpoint, or compute in float32 if they overflow"
        )
