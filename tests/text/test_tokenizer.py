"""If this fails, text does not survive the way to ids and back, or decoding may emit ids that are no text."""

import io
import random

import numpy as np
import pytest
import sentencepiece

from openpi_ar.errors import UserError
from openpi_ar.text import tokenizer as tokenizer_module
from openpi_ar.text.templates import TEMPLATES
from openpi_ar.text.tokenizer import FAST_TAIL, Tokenizer, load_tokenizer
from openpi_ar.worlds.tabletop import train_tokenizer
from openpi_ar.worlds.tabletop.tasks import known_prompts, known_subtasks

HARD_TEXTS = (
    "",
    " ",
    "  two  spaces  ",
    "tab\tand\r\nline\n\nbreaks",
    "hello 🤖👩‍🔧",
    "日本語, naïve, Ωμέγα",
    "<eos> <s> </s> <pad> <unk> <0x0A>",
    "\x00\x7f",
    "Task: State: Subtask: 1e-3 007 12345",
)


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return load_tokenizer("embedded")


def train_model(**options) -> bytes:
    model = io.BytesIO()
    lines = ["pick up the cup", "place the plate on the table", "move"] * 4
    common = {
        "model_type": "bpe",
        "vocab_size": 400,
        "hard_vocab_limit": False,
        "byte_fallback": True,
        "minloglevel": 2,
    }
    ids = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "add_dummy_prefix": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, **{**common, **ids, **options}
    )
    return model.getvalue()


def test_ids_of_the_special_pieces_and_the_size(tok):
    assert (tok.pad_id, tok.eos_id, tok.bos_id, tok.unk_id, tok.vocab_size) == (0, 1, 2, 3, 1024)


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_any_text_comes_back_exactly(tok, text):
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    assert not {tok.pad_id, tok.eos_id, tok.bos_id, tok.unk_id} & set(ids)


def test_random_unicode_comes_back_exactly(tok):
    rng = random.Random(0)
    for _ in range(300):
        chars = (rng.choice((rng.randrange(32, 127), rng.randrange(0x20000))) for _ in range(rng.randrange(30)))
        text = "".join(chr(c) for c in chars if not 0xD800 <= c < 0xE000 and c != 0x2581)
        assert tok.decode(tok.encode(text)) == text
        assert tok.unk_id not in tok.encode(text)


def test_without_byte_fallback_it_would_not():
    plain = Tokenizer(train_model(byte_fallback=False, vocab_size=60))
    assert plain.decode(plain.encode("cup 🤖")) != "cup 🤖"
    assert plain.unk_id in plain.encode("cup 🤖")


def test_lone_surrogates_are_refused(tok):
    with pytest.raises(UserError, match="not valid Unicode"):
        tok.encode("\ud800")


def test_every_state_value_is_one_piece(tok):
    for n in range(-1, 256):
        assert len(tok.encode(f", State: {n};")) - len(tok.encode(", State:;")) == 1, n
    assert len(tok.encode(" State: 12 255 0;")) == 5


def test_tabletop_texts_are_short(tok):
    state = np.array([-1.2, 0.3, 0.9, 1.0])
    prompts = [1 + len(tok.encode(TEMPLATES["subtask"].prompt_text(p, state))) for p in known_prompts()]
    subtasks = [len(tok.encode(TEMPLATES["subtask"].target_text(s))) + 1 for s in known_subtasks()]
    assert (min(prompts), max(prompts)) == (18, 27)
    assert (min(subtasks), max(subtasks)) == (2, 9)  # BOS and EOS included
    words = {w for text in known_prompts() + known_subtasks() for w in text.replace(",", "").split()}
    assert [w for w in words if len(tok.encode(" " + w)) != 1] == []


def test_training_is_deterministic_and_gives_the_shipped_model():
    first, second = train_tokenizer.train(), train_tokenizer.train()
    assert first == second
    new, shipped = Tokenizer(first), load_tokenizer("embedded")
    pieces = [[t.piece(i) for i in range(t.vocab_size)] for t in (new, shipped)]
    assert pieces[0] == pieces[1]


def test_text_mask_of_the_embedded_model(tok):
    assert set(np.flatnonzero(~tok.allowed_text)) == {tok.pad_id, tok.bos_id, tok.unk_id}


def test_text_mask_leaves_out_locations_spare_pieces_and_action_ids():
    special = ["<loc0000>", "<loc1023>", "<seg000>", "<unused7>", "<mask>", "<start_of_turn>"]
    model = train_model(user_defined_symbols=[*special, "<table>", "loc0000"])
    t = Tokenizer(model, action_tail=0)
    by_piece = {t.piece(i): bool(t.allowed_text[i]) for i in range(t.vocab_size)}
    assert not any(by_piece[name] for name in special)
    assert by_piece["<table>"] and by_piece["loc0000"] and by_piece["<0x0A>"] and by_piece["</s>"]
    tail = Tokenizer(model, action_tail=20)
    assert not tail.allowed_text[-20:].any()
    assert t.allowed_text[-20:].all()
    assert (tail.allowed_text == t.allowed_text)[:-20].all()


def test_action_tail_is_on_by_itself_for_paligemma_only(monkeypatch):
    monkeypatch.setattr(tokenizer_module, "FAST_TAIL", 30)
    assert not Tokenizer(train_model(user_defined_symbols=["<loc0000>"])).allowed_text[-30:].any()
    assert Tokenizer(train_model()).allowed_text[-30:].all()
    assert FAST_TAIL == 2176  # 257,152 - 2,176 = 254,976 = 257,152 - 1 - 128 - 2,047, openpi's lowest FAST id


def test_models_that_cannot_be_used_are_refused():
    with pytest.raises(UserError, match="not a SentencePiece model"):
        Tokenizer(b"no model")
    with pytest.raises(UserError, match="adds a space before every text"):
        Tokenizer(train_model(add_dummy_prefix=True))
    with pytest.raises(UserError, match="lacks a BOS or EOS"):
        Tokenizer(train_model(bos_id=-1))


def test_paligemma_is_found_in_the_cache_or_its_place_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENPI_DATA_HOME", str(tmp_path))
    wanted = tmp_path / "big_vision" / "paligemma_tokenizer.model"
    with pytest.raises(UserError) as e:
        load_tokenizer("paligemma")
    assert "gs://big_vision/paligemma_tokenizer.model" in str(e.value) and str(wanted) in str(e.value)

    (tmp_path / "paligemma_tokenizer.model").write_bytes(train_model())
    assert load_tokenizer("paligemma").model_bytes == train_model()
    wanted.parent.mkdir()
    wanted.write_bytes(tokenizer_module.EMBEDDED.read_bytes())
    assert load_tokenizer("paligemma").vocab_size == 1024  # openpi's own layout goes first


def test_a_path_is_read_and_a_wrong_one_named(tmp_path):
    (tmp_path / "my.model").write_bytes(train_model())
    assert load_tokenizer(str(tmp_path / "my.model")).model_bytes == train_model()
    with pytest.raises(UserError, match=r"no\.model"):
        load_tokenizer(str(tmp_path / "no.model"))


def test_the_training_script_writes_a_model(tmp_path, capsys):
    train_tokenizer.main(["--out", str(tmp_path / "t.model")])
    assert Tokenizer((tmp_path / "t.model").read_bytes()).vocab_size == 1024
    assert "1024 pieces" in capsys.readouterr().out
