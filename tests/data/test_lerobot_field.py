"""Broken if this fails: what people's datasets really hold stops a command, or is read as something else."""

from collections.abc import Callable
import json
from pathlib import Path
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from openpi_ar.data.__main__ import main
from openpi_ar.data.lerobot.load import map_cameras
from openpi_ar.data.lerobot.meta import read_meta
from openpi_ar.errors import UserError
from tests.lerobot_fixtures import (
    CAMERAS,
    GOLDEN,
    add_feature,
    add_texts,
    broken,
    edit_json,
    source,
    sources,
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
# one bad part does not block the whole
# ----------------------------------------------------------------------------------------------------------------------


def test_inspect_shows_what_there_is_and_names_what_is_missing(capsys, tmp_path):
    path = broken(tmp_path, "v21_video")
    assert "missing" not in printed(capsys, "inspect", path)
    (path / f"videos/chunk-000/{WRIST}/episode_000001.mp4").unlink()
    (path / f"videos/chunk-000/{TOP}/episode_000000.mp4").write_bytes(b"")
    (path / "data/chunk-000/episode_000002.parquet").unlink()
    out = printed(capsys, "inspect", path)
    assert "observation.state" in out and "open the drawer" in out and "av1" in out
    assert f"camera {WRIST}: 1 of 3 video files missing" in out and "episode_000001.mp4 (episode 1)" in out
    assert "1 of 3 data files missing, the first is" in out and "episode_000002.parquet (episode 2)" in out
    assert "episode_000000.mp4 (episode_000000.mp4, frame 0) cannot be opened" in out
    shutil.rmtree(path / "videos")
    assert f"camera {TOP}: 3 of 3 video files missing" in printed(capsys, "inspect", path)


def _other_rate(path: Path) -> None:
    add_feature(path, "cam.tactile", dtype="video", shape=[64, 64, 3], names=None, info={"video.fps": 5})


def _unknown_place(path: Path) -> None:
    add_feature(path, "cam.tactile", dtype="video", shape=[64, 64, 3], names=None)


def _no_file(path: Path) -> None:
    _unknown_place(path)
    edit_json(path / "meta/info.json", lambda info: info.update(codebase_version="v2.1", chunks_size=1000))
    info = json.loads((GOLDEN / "v21_video/meta/info.json").read_text())
    edit_json(path / "meta/info.json", lambda body: body.update({k: info[k] for k in ("data_path", "video_path")}))
    for part in ("data", "videos", "meta/episodes.jsonl", "meta/tasks.jsonl", "meta/subtasks.jsonl"):
        whole, here = GOLDEN / "v21_video" / part, path / part
        shutil.rmtree(here, ignore_errors=True)
        (shutil.copytree if whole.is_dir() else shutil.copy)(whole, here)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_other_rate, "'cam.tactile' is recorded as video.fps 5, but the dataset's fps is 10"),
        (_unknown_place, "does not say where the video of camera 'cam.tactile', episode 0 is"),
        (_no_file, "cam.tactile/episode_000000.mp4 is missing .*'cam.tactile', episode 0"),
    ],
)
def test_a_camera_that_is_not_used_does_no_harm(capsys, tmp_path, damage, words):
    path = broken(tmp_path, "v30_video")
    damage(path)
    assert "cam.tactile" in printed(capsys, "inspect", path)
    assert "60 rows" in printed(capsys, "stats", path)
    assert source(path)[0]["images"].keys() == set(CAMERAS)
    with pytest.raises(UserError, match=words) as e:  # used, it is an error
        source(path, cameras=("base_0_rgb=tactile",))[0]
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"dtype": "tensor<bf16>", "shape": [7]}, "has no column extra"),
        ({"dtype": None, "shape": [7]}, "feature 'extra' has dtype None"),
        ({"dtype": "float32", "shape": "7"}, "feature 'extra' has shape '7'"),
        ({"dtype": "float32", "shape": [-1, 0.5]}, "feature 'extra' has shape"),
        ({}, "feature 'extra' has dtype None"),
    ],
)
def test_a_feature_that_is_not_used_does_no_harm(capsys, tmp_path, entry, words):
    path = broken(tmp_path, "v21_images")
    add_feature(path, "extra", **entry)
    assert "extra" in printed(capsys, "inspect", path)
    assert len(source(path)) == 60
    assert words in refused(capsys, "stats", path, "--state", "extra")


def test_files_and_columns_of_what_is_not_asked_for_are_not_needed(tmp_path):
    path = broken(tmp_path, "v21_video")
    for file in path.rglob("*episode_000001.*"):
        file.unlink()
    data = source(path, episodes=(0, 2))
    assert len(data) == 42 and data[30]["images"].keys() == set(CAMERAS)
    with pytest.raises(UserError, match=r"episode_000001.parquet is missing \(episode 1\)"):
        source(path)
    edit_json(path / "meta/info.json", lambda info: info["features"].pop("task_index"))
    assert source(path, episodes=(0,), prompt="tidy up")[0]["prompt"] == "tidy up"
    with pytest.raises(UserError, match="no feature 'task_index'"):
        source(path, episodes=(0,))


def test_a_place_that_cannot_be_written_is_said_before_the_work(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "bad").mkdir()
    err = refused(capsys, "stats", tmp_path / "bad", "--out", tmp_path / "file/stats")
    assert "file/stats cannot be written: Not a directory" in err  # not that there is no dataset


def test_a_dataset_without_episodes_is_shown_and_not_read(capsys, tmp_path):
    path = broken(tmp_path, "v21_images")
    (path / "meta/episodes.jsonl").write_text("")
    edit_json(path / "meta/info.json", lambda info: info.update(total_episodes=0))
    assert "0 of 0 to 0 frames" in printed(capsys, "inspect", path)
    assert "has no episodes" in refused(capsys, "stats", path)


def test_texts_that_are_not_used_are_not_read(capsys, tmp_path):
    path = broken(tmp_path, "v30_video")
    for name in ("tasks", "subtasks"):
        (path / f"meta/{name}.parquet").write_bytes(b"PAR1")
    assert "60 rows" in printed(capsys, "stats", path)
    data = source(path, prompt="tidy up", needs_subtask=False, subtasks="none")
    assert data[0]["prompt"] == "tidy up"
    with pytest.raises(SystemExit):
        main(["inspect", str(path)])
    shown = capsys.readouterr()
    assert "observation.state" in shown.out and "tasks.parquet is not a readable parquet file" in shown.err


# ----------------------------------------------------------------------------------------------------------------------
# kinds of features
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "feature", "words"),
    [
        ("v21_images", "instruction", "'instruction' of .* holds texts, not numbers"),
        ("v21_images", TOP, f"{TOP!r} of .* holds images, not numbers"),
        ("v30_video", TOP, f"{TOP!r} of .* holds videos, not numbers"),
        ("v30_images_lang", "language_persistent", "'language_persistent' of .* holds rows of language"),
    ],
)
@pytest.mark.parametrize("flag", ["--state", "--actions"])
def test_numbers_are_asked_of_features_of_numbers(capsys, tmp_path, name, feature, words, flag):
    path = broken(tmp_path, name)
    if feature == "instruction":
        add_texts(path, feature, lambda n: ["open it"] * n)
    err = refused(capsys, "stats", path, flag, feature)
    assert words.split(" of ")[0] in err and words.split("holds")[1] in err


def _column(name: str, values: Callable[[int], pa.Array]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        file = path / DATA_3
        table = pq.read_table(file)
        pq.write_table(table.set_column(table.column_names.index(name), name, values(table.num_rows)), file)

    return apply


COLUMNS = [
    ("action", lambda n: pa.array(["left"] * n), "'action' holds string, not numbers"),
    ("action", lambda n: pa.array([[0.0] * 6, [0.0] * 8] * (n // 2)), "7 numbers in each of 60 frames, found 6, 8"),
    ("action", lambda n: pa.array([None, *[[0.0] * 7] * (n - 1)]), "7 numbers in each of 60 frames, found nothing, 7"),
    ("observation.state", lambda n: pa.array([{"x": 1.0}] * n), "holds struct<x: double>, not numbers"),
    ("observation.state", lambda n: pa.array([[1e300] * 7] * n), "is inf"),
    ("task_index", lambda n: pa.array([0.5] * n), "task_index is 0.5, expected a whole number"),
    ("task_index", lambda n: pa.array(["0"] * n), "'task_index' holds string, not numbers"),
    ("task_index", lambda n: pa.array([float("inf")] * n), "task_index is inf, expected a whole number"),
    ("episode_index", lambda n: pa.array([None] * n, pa.int64()), "episode 0 has 0 frames, meta/ says 20"),
    ("timestamp", lambda n: pa.array([None] * n, pa.float32()), "frame 0: timestamp is nan"),
    ("timestamp", lambda n: pa.array(np.arange(n)[::-1] / 10), "frame 0: timestamp is 5.9"),
    ("frame_index", lambda n: pa.array([True] * n), "frame 0: frame_index is"),
    ("subtask_index", lambda n: pa.array([[0, 1]] * n), "'subtask_index' must hold 1 numbers in each of 60 frames"),
]


@pytest.mark.parametrize(("name", "values", "words"), COLUMNS, ids=[words[:40] for _, _, words in COLUMNS])
def test_columns_of_another_type_are_named(tmp_path, name, values, words):
    path = broken(tmp_path, "v30_video")
    _column(name, values)(path)
    with pytest.raises(UserError) as e:
        source(path)
    assert words in str(e.value) and "\n" not in str(e.value)


def test_columns_of_a_wider_type_hold_the_same(tmp_path):
    path, whole = broken(tmp_path, "v30_video"), source(GOLDEN / "v30_video")
    table = pq.read_table(path / DATA_3)
    actions = pa.array(table["action"].to_pylist(), pa.large_list(pa.float64()))
    _column("action", lambda n: actions)(path)
    _column("task_index", lambda n: table["task_index"].cast(pa.float32()))(path)
    add_feature(path, "said", dtype="string", shape=[1], names=None)
    said = pa.array([whole[i]["subtask"] for i in range(60)]).dictionary_encode()
    pq.write_table(pq.read_table(path / DATA_3).append_column("said", said), path / DATA_3)
    data = source(path, subtasks="said")
    for i in (0, 25, 59):
        np.testing.assert_array_equal(data[i]["actions"], whole[i]["actions"])
        assert (data[i]["prompt"], data[i]["subtask"]) == (whole[i]["prompt"], whole[i]["subtask"])


# ----------------------------------------------------------------------------------------------------------------------
# names
# ----------------------------------------------------------------------------------------------------------------------


def test_a_name_is_exact_or_the_one_last_part_or_an_error_with_the_nearest_first(capsys, tmp_path):
    path = broken(tmp_path, "v21_images")
    meta = read_meta(path)
    assert meta.find("observation.state") == meta.find("state") == meta.find("observation/state") == "observation.state"
    with pytest.raises(UserError, match=r"no feature 'acton': it has action, "):
        meta.find("acton")
    with pytest.raises(UserError, match=r"no feature 'other.state': it has observation.state, "):
        meta.find("other.state")  # a whole name is not cut
    assert map_cameras(meta, ("a", "b"), ("a=x|base_0_rgb", f"b={WRIST}")) == {"a": TOP, "b": WRIST}
    assert sources(path, state=("state",), cameras=("left_wrist_0_rgb=none", f"base_0_rgb={TOP}"))[2][0] == (
        "by their last part: state is observation.state"
    )
    add_feature(path, "depth.base_0_rgb", dtype="image", shape=[64, 64, 3], names=None)
    add_feature(path, "goal.state", dtype="float32", shape=[7], names=None)
    meta = read_meta(path)
    with pytest.raises(UserError, match="'state': observation.state and goal.state both end so"):
        meta.find("state")
    for given, words in (
        (("a=base_0_rgb", "b=none"), f"'a' may be {TOP} or depth.base_0_rgb"),
        (("a=other.base_0_rgb", "b=none"), "nothing is known of 'other.base_0_rgb'"),
        (("a",), "'a' is not model camera=feature"),
        ((f"a={TOP}", f"a={WRIST}", "b=none"), "given twice"),
    ):
        with pytest.raises(UserError, match=words):
            map_cameras(meta, ("a", "b"), given)
