"""SentencePiece behind a small surface: ids in, ids out, and which ids text may be made of."""

from pathlib import Path
import re

import numpy as np
import sentencepiece

from openpi_ar.errors import UserError
from openpi_ar.files import openpi_cache_root

EMBEDDED = Path(__file__).parent / "assets" / "tabletop.model"
PALIGEMMA_URL = "gs://big_vision/paligemma_tokenizer.model"
PALIGEMMA_MIRROR = "https://storage.googleapis.com/big_vision/paligemma_tokenizer.model"

FAST_TAIL = 128 + 2048
"""Last ids of PaliGemma's vocabulary that robot models use for FAST action tokens: openpi maps token k of 2,048 to
vocab_size - 1 - 128 - k. That covers every <loc> and <seg> id and 1,024 rare text pieces."""

# Pieces that are neither control pieces nor text: locations, segments, spare and chat pieces of Gemma and PaliGemma.
_PLACE = re.compile(r"<(loc\d{4}|seg\d{3})>")
_NOT_TEXT = re.compile(r"<(loc\d{4}|seg\d{3}|unused\d+|mask|2mass|start_of_turn|end_of_turn)>|\[@BOS@\]")


class Tokenizer:
    """A SentencePiece model.

    vocab_size    number of ids.
    pad_id, eos_id, bos_id, unk_id
    allowed_text  bool [vocab_size]: what decoding may emit as text. EOS and text pieces; no other control ids, no
                  <loc>, <seg> or <unused> pieces, no id of the action tail.
    places        bool [vocab_size]: PaliGemma's <loc> and <seg> pieces, which detection and segmentation write.
    model_bytes   the serialised model, as stored in checkpoints.

    Args:
        model_bytes: content of a SentencePiece `.model` file.
        action_tail: how many ids at the vocabulary's end are action tokens. None: `FAST_TAIL` if the vocabulary has
            PaliGemma's <loc> pieces, else 0.

    Raises:
        UserError: the bytes are no SentencePiece model, it has no BOS or EOS, or it puts a space in front of every
            text (then a prompt and its answer, encoded apart, are not the tokens of the two encoded together).
    """

    def __init__(self, model_bytes: bytes, *, action_tail: int | None = None):
        self.model_bytes = model_bytes
        self._sp = sentencepiece.SentencePieceProcessor()
        try:
            self._sp.LoadFromSerializedProto(model_bytes)
        except RuntimeError as e:
            raise UserError(f"not a SentencePiece model ({len(model_bytes)} bytes): give a .model file") from e
        self.vocab_size: int = self._sp.vocab_size()
        self.eos_id, self.bos_id, self.unk_id = self._sp.eos_id(), self._sp.bos_id(), self._sp.unk_id()
        self.pad_id = max(self._sp.pad_id(), 0)
        if self.eos_id < 0 or self.bos_id < 0:
            raise UserError("the SentencePiece model lacks a BOS or EOS piece: train it with bos_id and eos_id set")
        if self._sp.encode("a", out_type=str)[0].startswith("▁"):
            raise UserError("the SentencePiece model adds a space before every text: set add_dummy_prefix=false")
        pieces = [self._sp.id_to_piece(i) for i in range(self.vocab_size)]
        if action_tail is None:
            action_tail = FAST_TAIL if "<loc0000>" in pieces else 0
        self.allowed_text = np.array([self._is_text(i, piece) for i, piece in enumerate(pieces)])
        self.allowed_text[self.vocab_size - action_tail :] = False
        self.allowed_text[self.eos_id] = True
        self.places = np.array([_PLACE.fullmatch(piece) is not None for piece in pieces])

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without BOS and EOS. Raises UserError if it is not valid Unicode."""
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise UserError(f"text is not valid Unicode: {text!r}") from e
        return self._sp.encode(text, out_type=int)

    def decode(self, ids: list[int]) -> str:
        """Text of ids; control ids are left out, bytes that are not UTF-8 become U+FFFD.

        With the embedded tokenizer `decode(encode(text)) == text` for every text, except that U+2581, which
        SentencePiece uses for the space, comes back as one.
        """
        return self._sp.decode(ids)

    def piece(self, token: int) -> str:
        """The human-readable piece of an id."""
        return self._sp.id_to_piece(token)

    def _is_text(self, i: int, piece: str) -> bool:
        sp = self._sp
        return not (sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) or _NOT_TEXT.fullmatch(piece))


def load_tokenizer(spec: str) -> Tokenizer:
    """`embedded` (shipped), `paligemma` (from the cache, never downloaded) or the path of a `.model` file.

    Raises UserError if the file is not there, saying where to get it and where to put it.
    """
    if spec == "embedded":
        return Tokenizer(EMBEDDED.read_bytes())
    paths = paligemma_paths() if spec == "paligemma" else (Path(spec).expanduser(),)
    if found := next(filter(Path.is_file, paths), None):
        return Tokenizer(found.read_bytes())
    if spec == "paligemma":
        raise UserError(
            f"PaliGemma's tokenizer is not in the cache: run python -m openpi_ar.text fetch paligemma; without a "
            f"network, copy {PALIGEMMA_URL} (public, 4 MB) to {paths[0]}, or set OPENPI_DATA_HOME to the cache that "
            f"holds it"
        )
    raise UserError(f"tokenizer {spec!r} is neither `embedded`, `paligemma` nor an existing SentencePiece .model file")


def paligemma_paths() -> tuple[Path, Path]:
    """Where PaliGemma's model is looked for: openpi's own cache layout first."""
    cache = openpi_cache_root()
    return cache / "big_vision" / "paligemma_tokenizer.model", cache / "paligemma_tokenizer.model"
