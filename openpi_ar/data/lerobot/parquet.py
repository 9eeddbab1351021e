"""Parquet files that other programs wrote: what cannot be read is one line naming the file."""

from collections.abc import Sequence
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from openpi_ar.errors import UserError, first_line


def require(path: Path, where: str) -> Path:
    """The path of a file of the dataset. Raises UserError naming it and `where` it is needed, if it is not there."""
    if not os.path.isfile(path):  # False, not an error, for a path that cannot be
        raise UserError(f"{path} is missing ({where}): download or copy the dataset again")
    return path


def read_table(
    path: Path,
    columns: Sequence[str] | None = None,
    *,
    where: str,
    optional: Sequence[str] = (),
    only: pc.Expression | None = None,
) -> pa.Table:
    """These columns (None: all) of a parquet file, and those of `optional` that are there; rows that pass `only`.

    Raises UserError naming the file, `where` (an episode, say) and the column.
    """
    require(path, where)
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
        missing = [name for name in columns or () if names.count(name) != 1]
        wanted = None if columns is None else [*columns, *(name for name in optional if names.count(name) == 1)]
        if not missing:
            return pq.read_table(path, columns=wanted, filters=only)
    except (pa.ArrowException, OSError, ValueError) as e:
        raise UserError(f"{path} is not a readable parquet file ({where}): {first_line(e)}; copy it again") from e
    twice = f" (twice: {missing[0]})" if missing[0] in names else ""
    raise UserError(f"{path} has no column {', '.join(missing)} ({where}): it has {', '.join(sorted(names))}{twice}")


def to_rows(table: pa.Table, path: Path) -> list[dict[str, Any]]:
    """The rows of a file as Python values. Raises UserError naming the file, if texts in it are not UTF-8."""
    try:
        return table.to_pylist()
    except ValueError as e:
        raise UserError(f"{path} holds what cannot be read: {e}") from e


def to_array(column: pa.ChunkedArray, shape: Sequence[int], *, texts: bool, where: str) -> np.ndarray:
    """Numbers [rows dims], `dims` the product of `shape` and NaN where there is none, or texts [rows] (objects).

    Raises UserError, beginning with `where`, if the column holds something else.
    """
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if texts:
        if not is_text(array.type) and not pa.types.is_null(array.type):
            raise UserError(f"{where} must hold texts, as meta/info.json says, found {array.type}")
        try:
            return np.asarray(array.to_pylist(), object)
        except ValueError as e:
            raise UserError(f"{where} holds what is no text: {e}") from e
    rows, dims, found = len(array), math.prod(shape), 1
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    while pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_fixed_size_list(array.type):
        lengths = pc.call_function("list_value_length", [array]).unique().to_pylist()
        if len(lengths) > 1 or None in lengths:
            some = ", ".join("nothing" if n is None else str(n) for n in lengths[:3])
            raise UserError(f"{where} must hold {dims} numbers in each of {rows} frames, found {some}")
        found *= sum(lengths)
        array = array.flatten()
    if not any(test(array.type) for test in (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)):
        raise UserError(f"{where} holds {array.type}, not numbers")
    if found != dims and rows:
        raise UserError(
            f"{where} must hold {dims} numbers in each of {rows} frames (shape {list(shape)} in meta/info.json), found "
            f"{found}"
        )
    flat = array.to_numpy(zero_copy_only=False)
    if flat.dtype == object:  # booleans of which some are null
        flat = flat.astype(np.float64)
    return flat.reshape(rows, dims)


def is_text(kind: pa.DataType) -> bool:
    """Texts of any width, also those stored once each (a dictionary)."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
