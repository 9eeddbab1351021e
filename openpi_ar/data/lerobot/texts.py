"""Tasks and subtasks as texts: what counts as a text, and the files that number them."""

from pathlib import Path
from typing import Any

from openpi_ar.data.lerobot.parquet import is_text, read_table, to_rows
from openpi_ar.errors import UserError
from openpi_ar.textfile import read_lines, whole_number

_NONE = ("null", "none", "nan")
"""What programs write where there is no text."""


def text_of(value: Any, where: str) -> str:
    """The text, stripped; "" for what stands for none: null, NaN, and these as words. Raises UserError for the rest."""
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if not isinstance(value, str):
        raise UserError(f"{where} is {value!r}, expected a text")
    try:
        value.encode()
    except UnicodeEncodeError as e:
        raise UserError(f"{where} is {value!r}: it holds half a character, which is no text") from e
    text = value.strip()
    return "" if text.lower() in _NONE else text


def read_texts(file: Path, kind: str) -> dict[int, str]:
    """Index -> text of a file of `kind` ("task") and `{kind}_index`. Raises UserError naming the file and row.

    In parquet the texts may be a pandas index under another name.
    """
    index, column = f"{kind}_index", kind
    if file.suffix == ".jsonl":
        rows = [row for _, row in read_lines(file)]
    else:
        table = read_table(file, where=f"the {kind}s")
        column = _column(table.schema, kind, file)
        rows = to_rows(table, file)
    texts: dict[int, str] = {}
    for number, row in enumerate(rows, 1):
        where = f"{file}, entry {number}"
        if column not in row:
            raise UserError(f"{where} has no {kind!r}: it has {', '.join(row) or 'nothing'}")
        text = text_of(row[column], f"{where}: {kind}")
        if texts.setdefault(key := whole_number(row, index, where), text) != text:
            raise UserError(f"{where}: {index} {key} is {text!r}, and {texts[key]!r} before: each needs its own index")
    return texts


def _column(schema: Any, kind: str, file: Path) -> str:
    texts = [field.name for field in schema if is_text(field.type)]
    for name in (kind, "__index_level_0__", *(texts if len(texts) == 1 else ())):
        if name in schema.names:
            return name
    raise UserError(f"{file} must have a column {kind!r} of texts: it has {', '.join(schema.names) or 'none'}")
