"""Broken if this fails: what people's datasets really hold stops a command, or is read as something else."""

import io
import json
import sys

import pytest

from openpi_ar.data.__main__ import main
from tests.lerobot_fixtures import broken


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_output_goes_into_a_pipe_of_any_encoding(tmp_path, monkeypatch, encoding):
    path = broken(tmp_path, "v21_video")
    file = path / "meta/tasks.jsonl"
    tasks = [json.loads(line) for line in file.read_text().splitlines()]
    tasks[0]["task"] = "把红色方块放进碗里"
    file.write_text("".join(json.dumps(task) + "\n" for task in tasks))
    pipe = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    with pytest.raises(UnicodeEncodeError):  # what the pipe does by itself
        pipe.write(tasks[0]["task"])
    monkeypatch.setattr(sys, "stdout", pipe)
    main(["inspect", str(path)])
    pipe.flush()
    assert "left_wrist_0_rgb" in pipe.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
