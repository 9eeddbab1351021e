"""How many passes through the model a new subtask takes: `python -m benchmarks.passes --json passes.json`.

LIBERO's labels as its scripted expert gives them, task by task, and a model that writes each without a mistake: no
weights, no simulator. Decoding, the check of drafts and the table of known texts are the policy's own code; the model's
tower only tells the token that comes next, whatever stands before it.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
from pathlib import Path
from typing import Any, Literal

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from openpi_ar import files, flags
from openpi_ar.algorithms.continuations import Continuations
from openpi_ar.algorithms.draft import as_draft
from openpi_ar.algorithms.generate import generate
from openpi_ar.algorithms.prefill import prefill
from openpi_ar.algorithms.sampling import Constraint, Sampling
from openpi_ar.algorithms.trie import Trie
from openpi_ar.errors import command_line
from openpi_ar.model_config import PaliGemmaConfig
from openpi_ar.models.cache import Cache, positions
from openpi_ar.models.vlm import VLM, Run, embed_tokens
from openpi_ar.text.tokenizer import load_tokenizer
from openpi_ar.types import Array, Observation, Tokens
from openpi_ar.worlds.libero.tasks import DONE, TASKS, known_subtasks, pick_up, put

MOST = 48
"""Budget of a text: more than any label has."""
_ROWS = 32
"""Texts of a table, whatever it holds, so that one program serves all."""
Text = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Args:
    """Counts the passes of each label of LIBERO's tasks that differs from the one before."""

    tokens: Literal["words", "embedded", "paligemma"] = "words"
    """`words`: a token a word, as vocabularies of 256,000 pieces have them; else the pieces of that tokenizer."""
    block: int = 8
    """Tokens of a pass at most."""
    json: Path | None = None
    """Write the means to this file."""


@nnx.dataclass
class Slots(Cache):
    """A cache of nothing: only which slots are taken."""

    @property
    def keys_values(self) -> tuple[Array, Array]:
        raise NotImplementedError("there are no keys and values")

    def reserve(self, slots: int) -> "Slots":
        return dataclasses.replace(self, **self._reserved(slots))

    def repeat(self, times: int) -> "Slots":
        return dataclasses.replace(self, **self._repeated(times))


class Writer:
    """A `vlm.VLM` that writes one text [M], one row, a prompt of one token. Hidden states are one-hot next tokens."""

    cfg = PaliGemmaConfig()

    def __init__(self, text: Array, vocab_size: int):
        self.text, self.vocab_size = text, vocab_size

    @property
    def tower(self) -> "Writer":
        return self

    def extend(self, run: Run, cache: Cache | None = None, *, rows: Array | None = None) -> tuple[Array, Cache]:
        at = jnp.clip(positions(run.valid, cache), 0, self.text.shape[0] - 1)
        hidden = jax.nn.one_hot(self.text[at], self.vocab_size)
        if rows is not None:
            hidden = jnp.take_along_axis(hidden, rows[..., None], axis=1)
        if cache is None:
            return hidden, Slots(run.valid, run.hidden, jnp.asarray(run.valid.shape[1], jnp.int32))
        return hidden, dataclasses.replace(cache, **cache._marked(run.valid, run.hidden))

    def embed_text(self, ids: Array) -> Array:
        return jnp.zeros((*ids.shape, self.vocab_size))

    def embed_images(self, obs: Observation) -> Array:
        return jnp.zeros((obs.images.shape[0], 0, self.vocab_size))

    def embed(self, obs: Observation, image_tokens: Array | None = None) -> Run:
        return embed_tokens(self, obs.prompt)

    def head_weight(self) -> Array:
        return jnp.eye(self.vocab_size)

    def logits(self, hidden: Array) -> Array:
        return hidden

    def unstacked(self) -> "Writer":
        return self

    def for_inference(self, dtype: str | None = None) -> "Writer":
        return self


def make_counter(vocab_size: int, eos_id: int, block: int) -> Callable[..., int]:
    """`passes(text, draft, table, constraint)`, of ids without the EOS; no draft: None. AssertionError if another text
    comes out."""

    @jax.jit
    def decode(text: Array, ids: Array, valid: Array, table: Continuations, constraint: Constraint | None) -> Any:
        model: VLM = Writer(text, vocab_size)
        sampling = Sampling(eos_id, MOST, constraint=constraint)
        prompt = Tokens.of(jnp.zeros((1, 1), jnp.int32))
        obs = Observation(jnp.zeros((1, 0, 2, 2, 3)), jnp.zeros((1, 0), bool), prompt, jnp.zeros((1, 0)))
        draft = as_draft(ids, valid, sampling)
        out, cache = prefill(model, obs, draft)
        options = {"draft": draft, "draft_hidden": out.text, "continuations": table, "block": block}
        return generate(model, cache, out.prompt_last, sampling, **options)[0]

    def padded(text: Sequence[int]) -> np.ndarray:
        return np.array([*text, *[eos_id] * (MOST - len(text))], np.int32)

    def passes(text: Text, draft: Text | None, table: Sequence[Text], constraint: Constraint | None = None) -> int:
        known = Continuations.of(table, MOST, eos_id, rows=_ROWS)
        right = (padded(draft or ()), np.arange(MOST) < len(draft or ()))
        out = decode(padded(text), *(x[None] for x in right), known, constraint)
        written = tuple(np.asarray(out.ids)[0][np.asarray(out.valid)[0]].tolist())
        assert written == (*text, eos_id), f"{written} in place of {text}"
        return int(out.steps)

    return passes


def labels(task: int) -> list[str]:
    """The labels of one task, in the order in which its expert gives them."""
    return [*(label for name in TASKS[task].objects for label in (pick_up(name), put(name))), DONE]


def encoder(tokens: str) -> tuple[Callable[[str], Text], int, int]:
    """(ids of a label, number of ids, id of EOS)."""
    if tokens != "words":
        tokenizer = load_tokenizer(tokens)
        return lambda label: tuple(tokenizer.encode(" " + label)), tokenizer.vocab_size, tokenizer.eos_id
    words = {word: i + 2 for i, word in enumerate(sorted({w for label in known_subtasks() for w in label.split()}))}
    return lambda label: tuple(words[word] for word in label.split()), len(words) + 2, 1


def changes(task: int, encode: Callable[[str], Text]) -> Iterator[tuple[Text, Text | None, list[Text]]]:
    """(text, the one before it, all before it with the last one first) of each label of a task."""
    texts = [encode(label) for label in labels(task)]
    for i, text in enumerate(texts):
        yield text, texts[i - 1] if i else None, texts[:i][::-1]


def measure(args: Args) -> dict[str, Any]:
    """Mean passes of a changed text by what is known; how many such texts there are, and their mean tokens."""
    encode, vocab_size, eos_id = encoder(args.tokens)
    passes = make_counter(vocab_size, eos_id, args.block)
    known = {task: [encode(label) for label in labels(task)] for task in TASKS}
    every = list(dict.fromkeys(encode(label) for label in known_subtasks()))
    trie = Trie.of([[*text, eos_id] for text in every], vocab_size, eos_id)
    found: dict[str, list[int]] = {}
    lengths: list[int] = []
    for task in TASKS:
        others = list(dict.fromkeys(text for other in TASKS if other != task for text in known[other]))
        for text, before, session in changes(task, encode):
            for name, table, constraint in (
                ("token_by_token", [], None),
                ("known", [*session, *every], None),
                ("task_held_out", [*session, *others], None),
                ("list_alone", [], trie),
                ("list_and_known", [*session, *every], trie),
            ):
                found.setdefault(name, []).append(passes(text, before, table, constraint))
            lengths.append(len(text))
    means = {name: float(np.mean(counts)) for name, counts in found.items()}
    return {"passes": means, "texts": len(lengths), "tokens": float(np.mean(lengths))}


def main(args: Args) -> None:
    files.check_file(args.json, "--json")
    found = measure(args)
    table = Table("what is known", "passes of a changed text")
    for name, mean in found["passes"].items():
        table.add_row(name.replace("_", " "), f"{mean:.2f}")
    Console().print(table)
    files.write_json(args.json, found)


if __name__ == "__main__":
    with command_line():
        main(flags.parse(Args, None, "python -m benchmarks.passes"))
