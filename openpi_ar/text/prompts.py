"""Prompt templates as data, and their tokens with the four bits of `types.Tokens`.

Only the target is causal and supervised: a bidirectional target would be learnt by copying. The target's EOS is `hidden`:
nothing reads it at inference, where decoding stops as it is chosen, so the action tower must not see it in training.
"""

from collections.abc import Sequence
import dataclasses
import string

import numpy as np

from openpi_ar.errors import UserError
from openpi_ar.text.tokenizer import Tokenizer
from openpi_ar.types import Kind

EOS = "<eos>"
"""In a template this stands for the EOS id; in a user's text it is just text."""

TokenArrays = dict[str, np.ndarray]
"""ids int32, valid, causal, loss, hidden bool, each [max_tokens], right-padded: the fields of `types.Tokens`."""


@dataclasses.dataclass(frozen=True)
class Template:
    """What is written after BOS, and what the model is to say.

    prompt     with {task} and, if the state is written into the prompt, {state}.
    target     with {text}, ending in <eos>; None if the model says nothing.
    lower      lower-case the task and the text.
    full_stop  drop one closing punctuation mark of the task and the text: the template brings its own.
    verbatim   leave "_" and line breaks of the text to be said as they are (openpi's forks turn them into spaces).
    """

    prompt: str
    target: str | None = None
    lower: bool = False
    full_stop: bool = False
    verbatim: bool = True

    @property
    def affixes(self) -> tuple[str, str]:
        """What the target puts before and after the text, EOS left out."""
        before, after = (self.target or "{text}").removesuffix(EOS).split("{text}")
        return before, after


TEMPLATES: dict[str, Template] = {
    # openpi, pi0.5.
    "openpi": Template("Task: {task}, State: {state};\nAction: "),
    # openpi, pi0 and the state-less pi05_libero.
    "openpi_pi0": Template("{task}\n"),
    # Ours. The prompt ends without a space, the target begins with one: " pick" is one piece, " " + "pick" two.
    "subtask": Template("Task: {task}, State: {state};\nSubtask:", " {text}<eos>"),
    # BrunoFANG1/openpi_subtask_generation, zero-shot on pi05_base.
    "openpi_subtask_generation": Template(
        "Task: {task}. Subtask: ", "{text}.;\nAction: <eos>", lower=True, full_stop=True, verbatim=False
    ),
    # Ke-Wang1017/openpi_subtask.
    "openpi_subtask": Template(
        "Task: {task}.; State: {state}; Subtask: ",
        "{text}.;\nAction: <eos>",
        lower=True,
        full_stop=True,
        verbatim=False,
    ),
    # PaliGemma's visual question answering.
    "vqa": Template("answer en {task}\n", "{text}<eos>"),
}


def discretize_state(state: np.ndarray) -> np.ndarray:
    """Normalised state [P] to integers: 256 bins over [-1, 1]; as in openpi, anything below -1 gives -1.

    Raises UserError if a value is not finite.
    """
    if not np.isfinite(state).all():
        raise UserError(f"state must be finite numbers, found {np.asarray(state).tolist()}")
    return np.digitize(state, bins=np.linspace(-1, 1, 256 + 1)[:-1]) - 1


def format_prompt(template: str, task: str, state: np.ndarray | None = None) -> str:
    """The prompt's text. Raises UserError if the task is empty or a state is needed and not given."""
    t = _template(template)
    words = _clean(t, task)
    if not words.strip():
        raise UserError("the prompt is empty: say what to do")
    if "{state}" not in t.prompt:
        return t.prompt.format(task=words)
    if state is None:
        raise UserError(f"template {template!r} writes the state into the prompt, but no state was given")
    return t.prompt.format(task=words, state=" ".join(map(str, discretize_state(state))))


def format_target(template: str, text: str) -> str:
    """The target's text, EOS left out. Raises UserError if it is empty or the template has no target."""
    t = _template(template)
    if t.target is None:
        raise UserError(f"template {template!r} has no text to say: use one that has, such as 'subtask'")
    words = canonical(template, text)
    if not words.strip():
        raise UserError("the text to be said is empty: annotate it or leave the sample out of the text loss")
    before, after = t.affixes
    return before + words + after


def canonical(template: str, text: str) -> str:
    """The text as the template has it said: what `parse_target` returns when it was said exactly."""
    t = _template(template)
    return text.strip() if t.verbatim else _clean(t, text)


def encode_prompt(tok: Tokenizer, template: str, task: str, state: np.ndarray | None, max_tokens: int) -> TokenArrays:
    """Tokens of the prompt, BOS first: bidirectional and not supervised.

    Args:
        tok: tokenizer.
        template: key of `TEMPLATES`.
        task: what to do, or the question.
        state: normalised state [P]; ignored by templates without one.
        max_tokens: length of the arrays.

    Raises:
        UserError: unknown template, empty task, state missing or not finite, or more tokens than `max_tokens`.
    """
    ids = [tok.bos_id, *tok.encode(format_prompt(template, task, state))]
    return _arrays(tok, ids, max_tokens, "prompt", target=False)


def encode_target(tok: Tokenizer, template: str, text: str, max_tokens: int) -> TokenArrays:
    """Tokens of the text to be said, EOS last: all causal, all supervised, EOS hidden.

    Raises UserError as `encode_prompt`, and if the template has no target.
    """
    ids = [*tok.encode(format_target(template, text)), tok.eos_id]
    return _arrays(tok, ids, max_tokens, "text to be said", target=True)


def parse_target(tok: Tokenizer, template: str, ids: list[int]) -> str:
    """The bare subtask or answer in generated ids: EOS and everything after dropped, the template's affixes removed."""
    if tok.eos_id in ids:
        ids = ids[: ids.index(tok.eos_id)]
    before, after = _template(template).affixes
    said = tok.decode(ids).removeprefix(before)
    if after:
        said = said.split(after)[0]
        # Cut short in the middle of what follows the text.
        for n in range(len(after) - 1, 0, -1):
            if said.endswith(after[:n]):
                said = said[:-n]
                break
    return said.strip()


LOOP = 8
"""A token said this many times in a row is a loop, not language."""


def text_status(ids: Sequence[int], eos_id: int) -> str:
    """ "loop", "truncated" or "ok" for generated ids; no ids at all (a model that says nothing) is "ok"."""
    if any(len(set(ids[i : i + LOOP])) == 1 for i in range(len(ids) - LOOP + 1)):
        return "loop"
    return "truncated" if len(ids) and eos_id not in ids else "ok"


def _template(name: str) -> Template:
    if name not in TEMPLATES:
        raise UserError(f"unknown template {name!r}: choose one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def _clean(t: Template, text: str) -> str:
    text = text.lower() if t.lower else text
    text = text.strip().replace("_", " ").replace("\n", " ")
    if t.full_stop and text and text[-1] in string.punctuation:
        text = text[:-1]
    return text


def _arrays(tok: Tokenizer, ids: list[int], max_tokens: int, what: str, *, target: bool) -> TokenArrays:
    if len(ids) > max_tokens:
        raise UserError(
            f"the {what} takes {len(ids)} tokens but the budget is {max_tokens}: shorten it, or train with a larger "
            f"--text.max-{'target' if target else 'prompt'}-tokens"
        )
    padded = np.full(max_tokens, tok.pad_id, np.int32)
    padded[: len(ids)] = ids
    valid = np.arange(max_tokens) < len(ids)
    none = np.zeros(max_tokens, bool)
    return {
        "ids": padded,
        "valid": valid,
        "causal": valid.copy() if target else none.copy(),
        "loss": valid.copy() if target else none.copy(),
        "hidden": valid & (padded == tok.eos_id) if target else none.copy(),
        "kind": np.full(max_tokens, Kind.SUBTASK if target else Kind.PROMPT, np.int8),
    }
