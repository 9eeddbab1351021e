"""Prompt templates: data that yields the segments of a row's prompt and target. Rows of a batch may differ in theirs.

Only the target is causal and supervised: a bidirectional target would be learnt by copying. The target's EOS is
`hidden`: at inference nothing reads it, because decoding stops when it is chosen, so the action tower must not see it
in training.
"""

from collections.abc import Sequence
import dataclasses
import re
import string
from typing import Any

import numpy as np

from openpi_ar.errors import UserError
from openpi_ar.kinds import Kind
from openpi_ar.lookup import nearest
from openpi_ar.text.segments import Segment, Special
from openpi_ar.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Template:
    """What follows BOS, and what the model is to write.

    name         key of `TEMPLATES`; `raw["template"]` of a row, `text.template` of a config.
    prompt       with {task}, {state} if the state is written into the prompt, and {done} if the template `remembers`.
    target       with {text}; EOS follows it. None if the model writes nothing.
    kind         of the target's tokens.
    needs_state  a row must have a state: it is written into the prompt, or the row acts from it.
    cleans       task and text are lower-cased and lose one closing punctuation mark, which the template brings itself,
                 and "_" and line breaks of the text become spaces (openpi's forks).
    typed        leave the task as it was typed: it is the prompt.
    done         what takes the place of {done}, with {texts}: the subtasks that are completed, in their order, joined
                 by "; ". Without any, nothing takes it.
    """

    name: str
    prompt: str
    target: str | None = None
    kind: Kind = Kind.SUBTASK
    needs_state: bool = True
    cleans: bool = False
    typed: bool = False
    done: str = ""

    @property
    def remembers(self) -> bool:
        """The prompt has a place for the subtasks that are completed (`text.memory`)."""
        return bool(self.done)

    @property
    def key(self) -> str:
        """Key of a raw sample that holds the text to write: "subtask" or "answer"."""
        return self.kind.label

    def prompt_text(self, task: str, state: np.ndarray | None = None, done: Sequence[str] = ()) -> str:
        """The prompt after BOS. `state` is normalised [P]; templates without {state} ignore it. `done` are the subtasks
        that are completed, the last one last.

        Raises UserError if the task is empty, the state is missing or not finite, or a template that does not remember
        is told what is completed.
        """
        words = task.strip() if self.typed else self._clean(task)
        if not words.strip():
            raise UserError("the prompt is empty: say what to do")
        if done and not self.remembers:
            raise UserError(f"template {self.name!r} has no place for completed subtasks, found {list(done)}")
        slots = {"task": words, "done": self.done.format(texts="; ".join(map(self.canonical, done))) if done else ""}
        if "{state}" not in self.prompt:
            return self.prompt.format(**slots)
        if state is None:
            raise UserError(f"template {self.name!r} writes the state into the prompt, but no state was given")
        return self.prompt.format(**slots, state=" ".join(map(str, discretize_state(state))))

    def target_text(self, text: str) -> str:
        """The target before EOS. Raises UserError if the text is empty or the template has no target."""
        words = self.canonical(text)
        if self.target is None:
            raise UserError(f"template {self.name!r} writes no text: use one that does, such as 'subtask'")
        if not words.strip():
            raise UserError(f"the {self.key} is empty: annotate it or leave the sample out of the text loss")
        return self.target.format(text=words)

    def task(self, prompt: Any, question: Any = None) -> str:
        """What the row asks: of a template that answers the question, if there is one, else the prompt.

        Raises UserError if it is no text or empty.
        """
        name, task = ("question", question) if self.key == "answer" and question is not None else ("prompt", prompt)
        if not isinstance(task, str) or not task.strip():
            raise UserError(f"observation[{name!r}] must be a text that says what to do, found {task!r}")
        return task

    def prompt_segments(self, task: str, state: np.ndarray | None = None, done: Sequence[str] = ()) -> list[Segment]:
        """BOS and the prompt: bidirectional and not supervised. Raises UserError as `prompt_text`."""
        return [Segment(Special.BOS), Segment(self.prompt_text(task, state, done))]

    def target_segments(self, text: str, *, supervised: bool = True) -> list[Segment]:
        """The target and a hidden EOS: causal, and in the loss if `supervised`. Raises UserError as `target_text`."""
        bits: dict[str, Any] = {"kind": self.kind, "causal": True, "loss": supervised}
        return [Segment(self.target_text(text), **bits), Segment(Special.EOS, hidden=True, **bits)]

    def canonical(self, text: str) -> str:
        """The text as the template writes it: what `parse` returns for an exact copy of the target."""
        return self._clean(text) if self.cleans else text.strip()

    def parse(self, tokenizer: Tokenizer, ids: list[int]) -> str:
        """The subtask or answer in generated ids, without EOS, everything after it and the template's own text."""
        if tokenizer.eos_id in ids:
            ids = ids[: ids.index(tokenizer.eos_id)]
        before, after = (self.target or "{text}").split("{text}")
        text = tokenizer.decode(ids).removeprefix(before)
        if after:
            text = text.split(after)[0]
            # Generation may have ended in the middle of what follows the text.
            for n in range(len(after) - 1, 0, -1):
                if text.endswith(after[:n]):
                    text = text[:-n]
                    break
        return text.strip()

    def _clean(self, text: str) -> str:
        text = text.strip().replace("_", " ").replace("\n", " ")
        if not self.cleans:
            return text
        text = text.lower()
        return text[:-1] if text[-1:] in set(string.punctuation) else text


TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        # openpi, pi0.5.
        Template("openpi", "Task: {task}, State: {state};\nAction: "),
        # openpi, pi0 and the state-less pi05_libero.
        Template("openpi_pi0", "{task}\n"),
        # Ours. The prompt ends without a space, the target begins with one: " pick" is one piece, " " + "pick" two.
        Template("subtask", "Task: {task}{done}, State: {state};\nSubtask:", " {text}", done=", Done: {texts}"),
        # BrunoFANG1/openpi_subtask_generation, zero-shot on pi05_base.
        Template(
            "openpi_subtask_generation",
            "Task: {task}.{done} Subtask: ",
            "{text}.;\nAction: ",
            cleans=True,
            done=" Done: {texts}.",
        ),
        # Ke-Wang1017/openpi_subtask.
        Template(
            "openpi_subtask",
            "Task: {task}.;{done} State: {state}; Subtask: ",
            "{text}.;\nAction: ",
            cleans=True,
            done=" Done: {texts};",
        ),
        # PaliGemma's visual question answering.
        Template("vqa", "answer en {task}\n", "{text}", kind=Kind.ANSWER, needs_state=False),
        # Its other tasks, which begin with the task's name: "caption en", "detect cup ; plate", "segment cup".
        Template("paligemma", "{task}\n", "{text}", kind=Kind.ANSWER, needs_state=False, typed=True),
    )
}


# How PaliGemma's tasks begin, in the languages of Crossmodal-3600, which its captions and questions are pre-trained in
# (arXiv 2407.07726, section 3.2). Anything else is a question in plain words.
_LANGUAGES = (
    "ar bn cs da de el en es fa fi fil fr he hi hr hu id it iw ja ko mi nl no pl pt quz ro ru sv sw te th tr uk vi zh"
)
_PLACES = re.compile(r"(detect|segment)\s+\S")
_TASK = re.compile(rf"(answer|cap|caption|describe|question)\s+({_LANGUAGES.replace(' ', '|')})\b|ocr$")


def question_template(question: str) -> Template:
    """The template of a question: one of PaliGemma's own prompts goes through as typed, the others are `answer en`."""
    typed = asks_for_places(question) or _TASK.match(question.strip())
    return TEMPLATES["paligemma" if typed else "vqa"]


def asks_for_places(question: str) -> bool:
    """Whether it is answered with <loc> and <seg> tokens."""
    return _PLACES.match(question.strip()) is not None


def get_template(name: str) -> Template:
    """The template of that name. Raises UserError listing all names, nearest first."""
    if name not in TEMPLATES:
        raise UserError(f"unknown template {name!r}: choose one of {', '.join(nearest(str(name), TEMPLATES))}")
    return TEMPLATES[name]


def discretize_state(state: np.ndarray) -> np.ndarray:
    """Normalised state [P] to integers: 256 bins over [-1, 1]; as in openpi, anything below -1 gives -1.

    Raises UserError if a value is not finite.
    """
    if not np.isfinite(state).all():
        raise UserError(f"state must be finite numbers, found {np.asarray(state).tolist()}")
    return np.digitize(state, bins=np.linspace(-1, 1, 256 + 1)[:-1]) - 1


LOOP = 8
"""A token generated this many times in a row is a loop, not language."""


def text_status(ids: Sequence[int], eos_id: int) -> str:
    """ "loop", "truncated" (no EOS) or "ok" for generated ids; no ids at all (a model that writes nothing) is "ok"."""
    if any(len(set(ids[i : i + LOOP])) == 1 for i in range(len(ids) - LOOP + 1)):
        return "loop"
    return "truncated" if len(ids) and eos_id not in ids else "ok"
