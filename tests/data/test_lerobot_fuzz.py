"""Broken if this fails: some damaged dataset ends in a stack trace, or is read as something that its files do not
hold."""

from collections.abc import Callable
import contextlib
import copy
import io
import json
from pathlib import Path
import shutil
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from openpi_ar.data.__main__ import main
from openpi_ar.data.lerobot.source import LeRobotSource
from openpi_ar.errors import UserError
from tests.data.mutations import change_json, mutate_bytes, mutate_text
from tests.lerobot_fixtures import DATASETS, GOLDEN, sources

# ----------------------------------------------------------------------------------------------------------------------
# mutations: each changes some file of a dataset
# ----------------------------------------------------------------------------------------------------------------------


def column_of(rng: np.random.Generator, values: list) -> pa.Array:
    """Another column of as many rows: of another type, with other values, or with some lost."""
    n, i = len(values), int(rng.integers(max(1, len(values))))

    def inside() -> list:
        """Some values within values: a coordinate, a row of language, the bytes of a picture."""
        changed = copy.deepcopy(values)
        for _ in range(3):
            change_json(rng, changed[i:] or changed)
        return changed[:n] + [None] * (n - len(changed))

    kinds: list[Callable[[], list]] = [
        inside,
        inside,
        lambda: [None] * n,
        lambda: ["text"] * n,
        lambda: [b"\xff\xfe"] * n,
        lambda: [[1.0, 2.0]] * n,
        lambda: [[0.5] * int(rng.integers(0, 9)) for _ in values],
        lambda: [{"bytes": b"PNG", "path": "x.png"}] * n,
        lambda: [float("nan")] * n,
        lambda: [-1] * n,
        lambda: [2**40] * n,
        lambda: [1e300] * n,
        lambda: [True] * n,
        lambda: [0.5] * n,
        lambda: [*values[:i], None, *values[i + 1 :]],
        lambda: list(rng.permutation(np.array([*values, None], object))[:n]),
        lambda: [*values[:i], values[0], *values[i + 1 :]],
    ]
    made = kinds[rng.integers(len(kinds))]()
    try:
        return pa.array(made)
    except (pa.ArrowException, OverflowError):
        return pa.array([str(value) for value in made])


def mutate_parquet(rng: np.random.Generator, file: Path) -> None:
    table = pq.read_table(file)
    names = table.column_names
    name = names[rng.integers(len(names))]
    at, what = names.index(name), rng.integers(8)
    if what == 0:
        table = table.remove_column(at)
    elif what == 1:
        table = table.rename_columns([f"{n}_" if n == name else n for n in names])
    elif what == 2:
        table = table.append_column(names[rng.integers(len(names))], table[name])  # twice of one name
    elif what == 3:
        table = table.take(pa.array(rng.integers(0, len(table), rng.integers(0, len(table) + 2))))
    elif what == 4:
        table = table.set_column(at, name, table[name].dictionary_encode() if pa.types.is_primitive(table[name].type)
                                 or pa.types.is_large_string(table[name].type) else table[name])  # fmt: skip
    else:
        table = table.set_column(at, name, column_of(rng, table[name].to_pylist()))
    pq.write_table(table, file)


def mutate(rng: np.random.Generator, path: Path) -> str:
    """Damages one or two files of a dataset; returns their names."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    meta = [file for file in files if "meta" in file.parts]
    changed = []
    for _ in range(rng.integers(1, 3)):
        chosen = meta if rng.random() < 0.5 else files
        file = chosen[rng.integers(len(chosen))]
        if not file.is_file() or file in changed:
            continue
        changed.append(file)
        if rng.random() < 0.15 or file.suffix == ".mp4":
            mutate_bytes(rng, file)
        elif file.suffix == ".parquet":
            mutate_parquet(rng, file)
        else:
            mutate_text(rng, file)
    return ", ".join(str(file.relative_to(path)) for file in changed)


# ----------------------------------------------------------------------------------------------------------------------
# what has to hold
# ----------------------------------------------------------------------------------------------------------------------


def values_of(path: Path) -> dict[str, set]:
    """Everything that a dataset's files hold: texts, and rows of numbers, without any of our code."""
    rows, texts = [], set()
    for file in path.glob("data/*/*.parquet"):
        with contextlib.suppress(pa.ArrowException, OSError):
            rows += pq.ParquetFile(file).read().to_pylist()

    def strings(value: Any) -> None:
        if isinstance(value, str):
            texts.add(value.strip())
        for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            strings(inner)

    for file in path.glob("meta/*.jsonl"):
        with contextlib.suppress(OSError, ValueError):
            for line in file.read_bytes().decode("utf-8-sig").split("\n"):
                strings(json.loads(line)) if line.strip() else None
    for file in path.glob("meta/*.parquet"):
        with contextlib.suppress(pa.ArrowException, OSError):
            strings(pq.ParquetFile(file).read().to_pylist())
    strings([row.get("language_persistent") for row in rows])
    numbers = {
        key: {np.ravel(np.float32(row[key])).tobytes() for row in rows} for key in ("observation.state", "action")
    }
    return {"texts": texts, **numbers}


def check_samples(path: Path, data: LeRobotSource, rows: list[int]) -> None:
    held = values_of(path)
    for i in rows:
        sample = data[i]
        assert sample["state"].astype(np.float32).tobytes() in held["observation.state"]
        assert sample["actions"][0].astype(np.float32).tobytes() in held["action"]
        assert np.isfinite(sample["state"]).all() and np.isfinite(sample["actions"]).all()
        assert sample["prompt"] in held["texts"] and sample["subtask"] in held["texts"]
        assert not {sample["prompt"].lower(), sample["subtask"].lower()} & {"", "null", "none", "nan"}
        assert all(image.dtype == np.uint8 and image.ndim == 3 for image in sample["images"].values())


def outcome(path: Path, rows: int) -> str:
    """ "read", or the line that reading ends with. Anything else but a UserError of one line is raised."""
    try:
        data = sources(path)[0]
        check_samples(path, data, list(range(0, len(data), max(1, len(data) // rows))))
    except UserError as e:
        assert "\n" not in str(e)
        return str(e)
    return "read"


def inspect(path: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            main(["inspect", str(path)])
        except SystemExit as e:
            assert e.code == 2 and err.getvalue().count("\n") == 1


def try_damaged(tmp_path: Path, seeds: range) -> list[str]:
    outcomes = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        name = DATASETS[seed % len(DATASETS)]
        path = Path(shutil.copytree(GOLDEN / name, tmp_path / f"{seed}"))
        changed = mutate(rng, path)
        try:
            outcomes.append(outcome(path, rows=6))
            if seed % 3 == 0:  # printing takes longer than reading
                inspect(path)
        except Exception as e:
            raise AssertionError(f"seed {seed}, {name}: {changed}: {type(e).__name__} {e}") from e
        shutil.rmtree(path)
    return outcomes


def test_damaged_datasets_are_read_right_or_refused_in_one_line(tmp_path):
    outcomes = try_damaged(tmp_path, range(100))
    read = outcomes.count("read")
    assert 10 < read < 90  # the damage is such that both happen
    assert len(set(outcomes)) > 30  # and of many kinds


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_many_damaged_datasets_are_read_right_or_refused_in_one_line(tmp_path, part):
    try_damaged(tmp_path, range(100 + 300 * part, 400 + 300 * part))
