"""Broken if this fails: a text of a dataset is read as another one, or an odd file ends in a stack trace."""

from collections.abc import Callable
import io
import json
from pathlib import Path
import sys

import numpy as np
import pytest

from openpi_ar.data.__main__ import main
from openpi_ar.data.lerobot.meta import read_meta
from openpi_ar.errors import UserError
from tests.lerobot_fixtures import (
    CAMERAS,
    GOLDEN,
    TASKS,
    add_texts,
    broken,
    edit_column,
    edit_json,
    rewrite_tasks,
    source,
)

TOP, WRIST = (f"observation.images.{name}" for name in CAMERAS)
DATA_3 = "data/chunk-000/file-000.parquet"
EPISODES_3 = "meta/episodes/chunk-000/file-000.parquet"


def printed(capsys, *argv: object) -> str:
    main([str(a) for a in argv])
    return capsys.readouterr().out


def refused(capsys, *argv: object) -> str:
    """The one line that a command ends with, exit code 2."""
    with pytest.raises(SystemExit) as e:
        main([str(a) for a in argv])
    assert e.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


# ----------------------------------------------------------------------------------------------------------------------
# texts
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "latin-1", "gbk", "shift-jis"])
@pytest.mark.parametrize("file", ["tasks.jsonl", "subtasks.jsonl", "episodes.jsonl", "info.json"])
def test_another_encoding_than_utf8_is_named(capsys, tmp_path, file, encoding):
    path = broken(tmp_path, "v21_video")
    text = "öffnen" if encoding == "latin-1" else "開く"
    # A text added to the first object of the file, if it has none of its own to change.
    lines = (path / "meta" / file).read_text().replace("{", f'{{"note": "{text}",', 1)
    (path / "meta" / file).write_text(lines, "utf-8")
    assert source(path)[0]["prompt"] == TASKS[0]  # negative control: as UTF-8 it reads
    (path / "meta" / file).write_text(lines, encoding)
    assert f"{file} is not UTF-8" in refused(capsys, "subtasks" if "sub" in file else "inspect", path)


@pytest.mark.parametrize(
    "inside", ["open\u2028the drawer", "open\x85the drawer", "open\x0b\x1dthe drawer", "öffne 抽屉"]
)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n \n"])
def test_any_text_is_one_line_of_the_file(tmp_path, inside, mark, end):
    path = broken(tmp_path, "v21_video")
    rows = [{"task_index": 1, "task": inside}, {"task_index": 0, "task": TASKS[0]}]
    # JSON escapes control characters; the others stand for themselves.
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (path / "meta/tasks.jsonl").write_bytes(mark + end.join(lines).encode())
    assert source(path)[20]["prompt"] == inside


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ('["open the drawer"]', "tasks.jsonl line 1: expected a JSON object, found list"),
        ('\n{"task_index": 0}', "tasks.jsonl, entry 1 has no 'task': it has task_index"),
        ('{"task": "open"}', "tasks.jsonl, entry 1: task_index is missing, expected a whole number"),
        ('{"task": "open", "task_index": "0"}', "entry 1: task_index is '0', expected a whole number"),
        ('{"task": ["open"], "task_index": 0}', "entry 1: task is ['open'], expected a text"),
        ('{"task": "a", "task_index": 0}\n{"task": "b", "task_index": 0}', "task_index 0 is 'b', and 'a' before"),
        ('{"task": "half \\ud83d", "task_index": 0}', "holds half a character"),
        ("[" * 100_000, "tasks.jsonl line 1 is not JSON"),
        ('{"task": "a", "task_index": %s}' % ("9" * 400), "task_index is 999"),
    ],
)
def test_odd_lines_are_named(capsys, tmp_path, lines, words):
    path = broken(tmp_path, "v21_video")
    (path / "meta/tasks.jsonl").write_text(lines)
    assert words in refused(capsys, "inspect", path)


NO_TEXT = [None, float("nan"), "null", "None", " nan ", "", "NULL"]


@pytest.mark.parametrize("nothing", NO_TEXT)
def test_what_stands_for_no_text_is_no_label(capsys, tmp_path, nothing):
    """By every convention: the frames count as unlabelled, and no model learns the word."""
    jsonl, column, language = (
        broken(tmp_path / str(i), n) for i, n in enumerate(("v21_video", "v30_video", "v30_images_lang"))
    )
    file = jsonl / "meta/subtasks.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[0]["subtask"] = nothing
    file.write_text("\n".join(map(json.dumps, lines)))
    words = nothing if isinstance(nothing, str) else None  # a column of texts holds no NaN
    add_texts(column, "said", lambda n: [words] * 7 + ["reach"] * (n - 7))
    edit_column(language / DATA_3, "language_persistent", lambda rows: [r[0].update(content=words) for r in rows[:20]])
    for path, options in ((jsonl, {}), (column, {"subtasks": "said"}), (language, {})):
        data = source(path, **options)
        assert data.rows[0] == 7, path  # the first seven frames are skipped
        assert not any(s.strip().lower() in ("", "null", "none", "nan") for s in data.subtasks)
    rewrite_tasks(jsonl, lambda rows: rows[1].update(task=nothing))
    with pytest.raises(UserError, match="episode 1, frame 0: task_index is 1, which has no text"):
        source(jsonl)
    assert "(no text)" in printed(capsys, "inspect", jsonl)


def test_texts_are_shown_as_they_are(capsys, tmp_path):
    path = broken(tmp_path, "v21_video")
    rewrite_tasks(path, lambda rows: rows[0].update(task="push [red] [/bold] :smile:"))
    assert "push [red] [/bold] :smile:" in printed(capsys, "inspect", path)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_output_goes_into_a_pipe_of_any_encoding(tmp_path, monkeypatch, encoding):
    path = broken(tmp_path, "v21_video")
    tasks = rewrite_tasks(path, lambda rows: rows[0].update(task="把红色方块放进碗里"))
    pipe = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    with pytest.raises(UnicodeEncodeError):  # what the pipe does by itself
        pipe.write(tasks[0]["task"])
    monkeypatch.setattr(sys, "stdout", pipe)
    main(["inspect", str(path)])
    pipe.flush()
    assert "left_wrist_0_rgb" in pipe.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]


# ----------------------------------------------------------------------------------------------------------------------
# episodes
# ----------------------------------------------------------------------------------------------------------------------


def _episode(row: int, **fields: object) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        file = path / "meta/episodes.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        rows[row].update(fields)
        file.write_text("\n".join(map(json.dumps, rows)))

    return apply


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_episode(1, episode_index=0), "lists episode 0 more than once"),
        (_episode(1, length=0), "episodes.jsonl, entry 2: length is 0, expected a whole number of 1 or more"),
        (_episode(1, length=-3), "length is -3"),
        (_episode(1, length=18.5), "length is 18.5"),
        (_episode(1, length="18"), "length is '18'"),
        (_episode(1, length=True), "length is True"),
        (_episode(1, episode_index=None), "entry 2: episode_index is None"),
        (_episode(1, length=17), "episode 1 has 18 frames, meta/ says 17"),
        (_episode(2, episode_index=7), "episode_000007.parquet is missing (episode 7)"),
    ],
)
def test_odd_episodes_are_named(tmp_path, damage, words):
    path = broken(tmp_path, "v21_video")
    damage(path)
    with pytest.raises(UserError) as e:
        source(path)
    assert words in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("chunks_size", 0, "chunks_size is 0, expected a whole number of 1 or more"),
        (
            "data_path",
            "data/{episode}.parquet",
            "data_path is 'data/{episode}.parquet', expected a path with the fields",
        ),
        ("data_path", None, "data_path is None"),
        ("video_path", None, "does not say where the video of camera"),
        ("total_episodes", "3", "total_episodes is '3'"),
        ("codebase_version", ["v2.1"], "codebase_version is ['v2.1']"),
        ("features", [], "features is []"),
        ("fps", 0, "fps is 0"),
        ("fps", True, "fps is True"),
    ],
)
def test_odd_descriptions_are_named(tmp_path, field, value, words):
    path = broken(tmp_path, "v21_video")
    edit_json(path / "meta/info.json", lambda info: info.update({field: value}))
    with pytest.raises(UserError) as e:
        source(path)[0]
    assert words in str(e.value) and "\n" not in str(e.value)


def test_episodes_with_gaps_and_out_of_order_are_read(tmp_path):
    """Somebody took episode 1 out, and lists the others the other way round."""
    path = broken(tmp_path, "v21_video")
    file = path / "meta/episodes.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[2], lines[0]]))
    edit_json(path / "meta/info.json", lambda info: info.update(total_episodes=2))
    data, whole = source(path), source(GOLDEN / "v21_video")
    assert [e.index for e in data.table.frames.episodes] == [0, 2] and len(data) == 42
    np.testing.assert_array_equal(data[20]["state"], whole[38]["state"])
    np.testing.assert_array_equal(data[20]["images"]["base_0_rgb"], whole[38]["images"]["base_0_rgb"])


@pytest.mark.parametrize(
    ("name", "value"), [("from_timestamp", float("nan")), ("from_timestamp", -1.0), ("file_index", None)]
)
def test_an_episode_without_its_video_is_named(tmp_path, name, value):
    path = broken(tmp_path, "v30_video")
    edit_column(path / EPISODES_3, f"videos/{WRIST}/{name}", lambda c: c.__setitem__(1, value))
    assert read_meta(path).episodes[1].videos.keys() == {TOP}
    data = source(path)
    data[0]  # the others are there
    with pytest.raises(UserError, match=f"where the video of camera '{WRIST}', episode 1 is"):
        data[25]
