"""Broken if this fails: tokens of a prompt or target carry wrong bits, or padding stands between them."""

import numpy as np
import pytest

from openpi_ar.errors import UserError
from openpi_ar.text.segments import Segment, Special, pack, readable
from openpi_ar.text.tokenizer import Tokenizer, load_tokenizer
from openpi_ar.types import Kind

SUBTASK = {"kind": Kind.SUBTASK, "causal": True, "loss": True}
ACTION = {"kind": Kind.ACTION, "causal": True, "loss": True, "hidden": True}


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return load_tokenizer("embedded")


def test_segments_are_concatenated_before_they_are_padded(tok):
    a = pack(tok, [Segment(" go", **SUBTASK), Segment([7, 8], **ACTION), Segment(Special.EOS, **ACTION)], 10)
    text = tok.encode(" go")
    n = len(text)
    assert a["ids"].tolist() == [*text, 7, 8, tok.eos_id] + [tok.pad_id] * (7 - n)
    assert a["valid"].tolist() == [True] * (n + 3) + [False] * (7 - n)
    assert a["kind"].tolist() == [Kind.SUBTASK] * n + [Kind.ACTION] * 3 + [Kind.PROMPT] * (7 - n)
    assert a["hidden"].tolist() == [False] * n + [True] * 3 + [False] * (7 - n)
    assert a["loss"].tolist() == a["causal"].tolist() == a["valid"].tolist()
    assert {k: v.dtype for k, v in a.items() if v.dtype != bool} == {"ids": np.int32, "kind": np.int8}


def test_two_segments_are_the_tokens_of_one(tok):
    one, two = [Segment([5, 6, 7], **SUBTASK)], [Segment([5], **SUBTASK), Segment([6, 7], **SUBTASK)]
    for name, value in pack(tok, one, 6).items():
        np.testing.assert_array_equal(pack(tok, two, 6)[name], value)
    # Negative control: a segment with a bit of its own shows.
    other = pack(tok, [Segment([5], **SUBTASK), Segment([6, 7], **{**SUBTASK, "hidden": True})], 6)
    assert (other["hidden"] != pack(tok, one, 6)["hidden"]).any()


def test_no_segments_are_padding(tok):
    a = pack(tok, [], 4)
    assert not any(a[name].any() for name in ("valid", "causal", "loss", "hidden", "kind"))


def test_a_budget_that_is_too_small_names_the_flag_and_the_need(tok):
    prompt = [Segment(Special.BOS), Segment([5] * 4)]
    assert pack(tok, prompt, 5)["valid"].all()
    with pytest.raises(
        UserError, match=r"prompt takes 5 tokens but the budget is 4: set --text.max-prompt-tokens to 5"
    ):
        pack(tok, prompt, 4)
    target = [Segment(" pick up", **SUBTASK), Segment([5] * 4, **ACTION)]
    need = len(tok.encode(" pick up")) + 4
    with pytest.raises(UserError, match=rf"target takes {need} .*--text.max-target-tokens to {need} .*pick up<4 ids>"):
        pack(tok, target, 4)


def test_a_users_eos_is_text(tok):
    assert tok.eos_id not in pack(tok, [Segment("<eos>")], 16)["ids"]
    assert readable([Segment(Special.BOS), Segment("a"), Segment(Special.EOS)]) == "a<eos>"
