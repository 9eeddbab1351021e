"""Trains the embedded tokenizer: `python -m openpi_ar.worlds.tabletop.train_tokenizer [--out FILE]`."""

import dataclasses
import io
from pathlib import Path

import sentencepiece

from openpi_ar import files, flags
from openpi_ar.errors import command_line
from openpi_ar.text.tokenizer import EMBEDDED, Tokenizer
from openpi_ar.worlds.tabletop.corpus import sentences

VOCAB_SIZE = 1024

MARKERS = ("Task:", "▁State:", "Subtask:", "▁Subtask:", "Action:", "\n")
"""Fixed words of the templates, one piece each; a prompt's end so never merges with what is generated next."""
STATE_BINS = tuple(f"▁{n}" for n in range(-1, 256))
"""Every value of a discretised state, with the space before it."""
DIGITS = tuple("0123456789")


def train() -> bytes:
    """The serialised model: byte-pair pieces, bytes for everything else, text taken as it is (no normalisation).

    Pieces: pad 0, eos 1, bos 2, unk 3, then markers, state values and digits, 256 bytes, words and letters.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences()),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        user_defined_symbols=[*MARKERS, *STATE_BINS, *DIGITS],
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


@dataclasses.dataclass(frozen=True)
class Args:
    """Trains the embedded tokenizer."""

    out: Path = EMBEDDED
    """Where to write the SentencePiece model."""


def main(argv: list[str] | None = None) -> None:
    """Trains, writes and prints what came out."""
    with command_line():
        out = flags.parse(Args, argv, "python -m openpi_ar.worlds.tabletop.train_tokenizer").out
        files.check_file(out, "--out")
        model = train()
        with files.writing(out, "name another file with --out"):
            out.write_bytes(model)
        print(f"{out}: {Tokenizer(model).vocab_size} pieces, {len(model)} bytes")


if __name__ == "__main__":
    main()
