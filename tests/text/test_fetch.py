"""Broken if this fails: the full-size models' tokenizer is not where it is looked for, or another file takes its place."""

import hashlib

import pytest

from openpi_ar.errors import UserError
from openpi_ar.text import fetch
from openpi_ar.text.__main__ import main
from openpi_ar.text.tokenizer import EMBEDDED, load_tokenizer, paligemma_paths


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENPI_DATA_HOME", str(tmp_path / "cache"))


@pytest.fixture
def right(monkeypatch):
    """The tokenizer that is at hand stands for PaliGemma's."""
    monkeypatch.setattr(fetch, "SHA256", hashlib.sha256(EMBEDDED.read_bytes()).hexdigest())


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_it_is_found_after_it_was_fetched(right, capsys, scheme):
    with pytest.raises(UserError, match="run python -m openpi_ar.text fetch paligemma; without a network, copy"):
        load_tokenizer("paligemma")
    main(["fetch", "paligemma", "--source", f"{scheme}{EMBEDDED}"])
    assert "fetched from" in capsys.readouterr().out
    assert load_tokenizer("paligemma").model_bytes == EMBEDDED.read_bytes()
    assert [p.name for p in paligemma_paths()[0].parent.iterdir()] == ["paligemma_tokenizer.model"]
    main(["fetch", "paligemma", "--source", "/nowhere"])  # not read again
    assert "is there already" in capsys.readouterr().out
    paligemma_paths()[0].write_bytes(b"cut off")
    main(["fetch", "paligemma", "--source", str(EMBEDDED)])
    assert paligemma_paths()[0].read_bytes() == EMBEDDED.read_bytes()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (str(EMBEDDED), "is not PaliGemma's tokenizer: .* expected 8986bb4f"),
        ("/nowhere/x.model", "cannot be read: FileNotFoundError"),
        ("strange://x", "cannot be read|needs one more package"),
    ],
)
def test_anything_else_is_one_line_that_says_how_without_a_network(capsys, source, words):
    with pytest.raises(UserError, match=rf"{words}.*copy it to .*big_vision/paligemma_tokenizer.model"):
        fetch.fetch_paligemma(source)
    with pytest.raises(SystemExit) as e:
        main(["fetch", "paligemma", "--source", source])
    assert e.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert not paligemma_paths()[0].exists()
