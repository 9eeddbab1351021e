"""Broken if this fails: a LeRobot dataset is read with other values, frames, tasks or subtasks than LeRobot reads."""

import dataclasses
import pickle
import shutil
import sys
from types import SimpleNamespace

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from openpi_ar.config import LeRobotData
from openpi_ar.data.lerobot import frame_cache
from openpi_ar.data.lerobot.columns import read_columns
from openpi_ar.data.lerobot.load import load_lerobot, map_cameras
from openpi_ar.data.lerobot.meta import choose_episodes, read_meta
from openpi_ar.data.lerobot.video import probe, read_frames
from openpi_ar.errors import UserError
from tests.lerobot_fixtures import (
    CAMERAS,
    DATASETS,
    GOLDEN,
    HORIZON,
    LENGTHS,
    STARTS,
    SUBTASKS,
    TASKS,
    broken,
    edit_column,
    edit_json,
    pixels,
    rows,
    source,
    sources,
)


@pytest.mark.parametrize("name", DATASETS)
def test_samples_hold_what_the_files_hold(name):
    data, expected = source(GOLDEN / name), rows(name)
    assert len(data) == len(expected) == sum(LENGTHS)
    episode = np.repeat(range(3), LENGTHS)
    for i in range(len(data)):
        sample = data[i]
        np.testing.assert_array_equal(sample["state"], np.float32(expected[i]["observation.state"]))
        np.testing.assert_array_equal(sample["actions"][0], np.float32(expected[i]["action"]))
        assert sample["prompt"] == TASKS[episode[i]]
        assert sample["subtask"] == SUBTASKS[i]
        assert sample["supervise_text"] and sample["masked"] == ()
    # A frozen value, should both readers err the same way.
    np.testing.assert_allclose(data[0]["actions"][0, :3], [0.05364056, -0.04179200, -0.03124994], rtol=1e-6)


@pytest.mark.parametrize("name", DATASETS)
def test_chunks_repeat_the_last_action_of_their_own_episode_and_say_so(name):
    """LeRobot's window: rows clamp(i + d, start, end - 1), padding where i + d leaves the episode."""
    data, expected = source(GOLDEN / name), rows(name)
    for e, (start, length) in enumerate(zip(STARTS, LENGTHS, strict=True)):
        for i in range(start, start + length):
            steps = [min(i + d, start + length - 1) for d in range(HORIZON)]
            np.testing.assert_array_equal(data[i]["actions"], np.float32([expected[s]["action"] for s in steps]))
            assert data[i]["action_valid"].tolist() == [i + d < start + length for d in range(HORIZON)], e
    long = dataclasses.replace(data, horizon=50)  # longer than every episode
    assert long[STARTS[1]]["actions"].shape == (50, 7)
    assert long[STARTS[1]]["action_valid"].sum() == LENGTHS[1]


@pytest.mark.parametrize("camera", CAMERAS)
@pytest.mark.parametrize("name", DATASETS)
def test_every_frame_is_its_own_picture(name, camera):
    data, recorded = source(GOLDEN / name), pixels(camera)
    read = np.stack([data[i]["images"][camera] for i in range(len(data))])
    assert read.dtype == np.uint8
    if "images" in name:
        np.testing.assert_array_equal(read, recorded)
        return
    # Frame for frame what the files hold, in order.
    meta = read_meta(GOLDEN / name)
    files = dict.fromkeys(e.videos[f"observation.images.{camera}"].path for e in meta.episodes)
    passing = [f.to_ndarray(format="rgb24") for path in files for f in av.open(str(path)).decode(video=0)]
    np.testing.assert_array_equal(read, np.stack(passing))
    # And the pictures that were recorded, but for what AV1 at crf 30 loses.
    error = np.abs(read.astype(int)[:, None] - recorded[None]).mean((2, 3, 4))
    assert np.diag(error).mean() < 2.5 and np.diag(error).max() < 4.0
    # Negative control: key frames are nearest to their own picture; what is between them may look like the one before.
    nearest = error.argmin(1)
    place = np.arange(60) if name == "v30_video" else np.concatenate([np.arange(n) for n in LENGTHS])
    np.testing.assert_array_equal(nearest[place % 2 == 0], np.flatnonzero(place % 2 == 0))
    assert np.abs(nearest - np.arange(60)).max() <= 1


@pytest.mark.parametrize("name", ["v21_video", "v30_video"])
def test_a_frame_sought_alone_is_the_frame_decoded_in_passing(name):
    meta = read_meta(GOLDEN / name)
    frames = read_columns(meta, meta.episodes, [])
    for e, episode in enumerate(meta.episodes):
        stamps = frames.timestamps[STARTS[e] : STARTS[e] + LENGTHS[e]]
        passing = list(read_frames(meta, episode, meta.cameras[0], stamps, range(LENGTHS[e])))
        for i in (0, 1, 8, LENGTHS[e] - 1):
            np.testing.assert_array_equal(next(read_frames(meta, episode, meta.cameras[0], stamps, [i])), passing[i])
        some = list(read_frames(meta, episode, meta.cameras[0], stamps, [3, 4, 11]))
        np.testing.assert_array_equal(np.stack(some), np.stack(passing)[[3, 4, 11]])


def test_video_headers():
    meta = read_meta(GOLDEN / "v30_video")
    info = probe(meta.episodes[2].videos[meta.cameras[0]].path)
    assert (info.codec, info.fps, info.height, info.width) == ("av1", 10.0, 64, 64)
    assert [e.videos[meta.cameras[1]].start for e in meta.episodes] == [0.0, 2.0, 3.8]


def test_both_conventions_give_the_same_labels_and_each_can_be_asked_for():
    by_index = source(GOLDEN / "v30_video", subtasks="index")
    by_language = source(GOLDEN / "v30_images_lang", subtasks="language")
    said = [[s[i]["subtask"] for i in range(60)] for s in (by_index, by_language)]
    assert said[0] == said[1] == list(SUBTASKS)
    with pytest.raises(UserError, match="no feature 'subtask_index'"):
        source(GOLDEN / "v30_images_lang", subtasks="index")
    with pytest.raises(UserError, match="no feature 'language_persistent'"):
        source(GOLDEN / "v30_video", subtasks="language")


def test_timelines_start_in_order_of_time_and_before_the_first_entry_nothing_is_said(tmp_path):
    path = broken(tmp_path, "v30_images_lang")

    def shuffle(column: list) -> None:
        for row in column:
            row.reverse()
            for entry in row:
                entry["timestamp"] += 0.2
            row.append({**row[0], "style": "plan", "content": "not a subtask", "timestamp": 0.0})

    edit_column(path / "data/chunk-000/file-000.parquet", "language_persistent", shuffle)
    data, _, remarks = sources(path)
    assert len(data) == 60 - 3 * 2
    assert "6 of 60 frames have no subtask" in remarks[0] and "episode 0, frame 0" in remarks[0]
    assert data[0]["subtask"] == SUBTASKS[0] and data[7]["subtask"] == SUBTASKS[7]  # frame 9: begins at 0.9 s
    assert data[6]["subtask"] == SUBTASKS[0]


def test_frame_tasks_as_subtasks(tmp_path):
    """Every second frame's task differs: it is what is said, and the prompt comes from the config."""
    path = broken(tmp_path, "v30_video")
    edit_column(
        path / "data/chunk-000/file-000.parquet", "task_index", lambda c: c.__setitem__(slice(1, None, 2), [1] * 30)
    )
    data = source(path, subtasks="task", prompt="tidy up")
    assert [data[i]["subtask"] for i in range(2)] == [TASKS[0], TASKS[1]]
    assert data.prompts == ("tidy up",)
    assert [source(path)[i]["prompt"] for i in range(2)] == [TASKS[0], TASKS[1]]
    with pytest.raises(UserError, match="--data.prompt"):
        source(path, subtasks="task")


def test_unlabelled_frames_are_skipped_counted_and_named(tmp_path):
    path = broken(tmp_path, "v30_video")
    file = path / "data/chunk-000/file-000.parquet"
    edit_column(file, "subtask_index", lambda c: c.__setitem__(slice(22, 25), [-1, None, -1]))
    train, _, remarks = sources(path)
    assert len(train) == 57 and "3 of 60" in remarks[0] and f"{file}: episode 1, frame 2" in remarks[0]
    # A model that says nothing uses them.
    assert len(sources(path, needs_subtask=False)[0]) == 60


def test_episodes_can_be_chosen_and_are_held_out_whole():
    train, held_out, remarks = sources(GOLDEN / "v30_video", held_out=0.3)
    assert not set(train.rows) & set(held_out.rows) and len(train) + len(held_out) == 60 and not remarks
    assert len(held_out) in LENGTHS
    again = sources(GOLDEN / "v30_video", held_out=0.3)[1]
    np.testing.assert_array_equal(held_out.rows, again.rows)
    one = source(GOLDEN / "v30_video", episodes=(1,))
    assert len(one) == LENGTHS[1] and one.prompts == (TASKS[1],)
    full = source(GOLDEN / "v30_video")
    np.testing.assert_array_equal(one[3]["images"]["base_0_rgb"], full[23]["images"]["base_0_rgb"])
    np.testing.assert_array_equal(one[17]["actions"], full[37]["actions"])
    with pytest.raises(UserError, match="no episode 7"):
        choose_episodes(read_meta(GOLDEN / "v30_video"), (1, 7))
    with pytest.raises(UserError, match="0 held out|0 usable"):
        sources(GOLDEN / "v30_video", episodes=(1,), held_out=0.5)


def test_statistics_are_numpys_over_the_training_frames():
    train, _, _ = sources(GOLDEN / "v21_video", held_out=0.3)
    x = np.array([r["action"] for r in rows("v21_video")])[train.rows]
    stats = train.norm_stats("z_score")["actions"]
    np.testing.assert_allclose(stats.mean, x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats.q99, np.quantile(x, 0.99, axis=0), rtol=1e-5)
    assert stats.mode == "z_score"


def test_features_side_by_side_and_scalars_are_vectors():
    data = source(
        GOLDEN / "v30_video", state=("observation.state", "timestamp"), actions=("action", "observation.state")
    )
    assert data[3]["state"].shape == (8,) and data[3]["state"][7] == np.float32(0.3)
    assert data[0]["actions"].shape == (HORIZON, 14)


def test_frames_are_decoded_once_and_survive_the_videos(tmp_path, monkeypatch):
    path, cfg = broken(tmp_path, "v30_video"), {"cache_dir": str(tmp_path / "cache"), "frames": "cache"}
    first = source(path, size=(32, 48), **cfg)
    image = first[25]["images"]["base_0_rgb"]
    assert image.shape == (32, 48, 3) and not image[:, :8].any() and image[:, 8:40].any()
    monkeypatch.setattr(frame_cache, "read_frames", None)  # nothing is decoded any more
    np.testing.assert_array_equal(source(path, size=(32, 48), **cfg)[25]["images"]["base_0_rgb"], image)
    monkeypatch.undo()
    # Another size, other episodes or another file are other caches.
    meta = read_meta(path)
    frames = read_columns(meta, meta.episodes, [])
    some = read_columns(meta, meta.episodes[:2], [])
    places = {frame_cache.cache_path(f, c, s) for f in (frames, some) for c in meta.cameras for s in ((8, 8), (8, 9))}
    assert len(places) == 8
    video = meta.episodes[0].videos[meta.cameras[0]].path
    before = frame_cache.cache_path(frames, meta.cameras[0], (8, 8))
    video.touch()
    assert frame_cache.cache_path(frames, meta.cameras[0], (8, 8)) != before


@pytest.mark.parametrize("frames", ["cache", "decode"])
def test_a_source_goes_to_another_process_without_its_pixels(tmp_path, frames):
    data = source(GOLDEN / "v30_video", size=(96, 96), frames=frames, cache_dir=str(tmp_path))
    sent = pickle.dumps(data)
    assert len(sent) < 60_000 < 60 * 96 * 96 * 3
    a, b = data[33], pickle.loads(sent)[33]
    for camera in CAMERAS:
        np.testing.assert_array_equal(a["images"][camera], b["images"][camera])
    np.testing.assert_array_equal(a["actions"], b["actions"])


def test_a_cache_that_failed_leaves_nothing(tmp_path):
    path = broken(tmp_path, "v21_video")
    video = path / "videos/chunk-000/observation.images.base_0_rgb/episode_000002.mp4"
    video.write_bytes(video.read_bytes()[:1500])
    with pytest.raises(UserError, match="episode 2"):
        source(path, frames="cache", cache_dir=str(tmp_path / "cache"))
    assert not list((tmp_path / "cache/lerobot").iterdir())


def test_cache_that_does_not_fit_the_disk_is_refused(tmp_path, monkeypatch):
    usage = dataclasses.make_dataclass("Usage", ["free"])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1000))
    with pytest.raises(UserError, match="--data.frames decode"):
        source(GOLDEN / "v30_video", frames="cache", cache_dir=str(tmp_path))


def test_cameras_map_by_name_by_pair_or_to_nothing():
    meta = read_meta(GOLDEN / "v30_video")
    full = {name: f"observation.images.{name}" for name in CAMERAS}
    assert map_cameras(meta, CAMERAS, ()) == full
    assert map_cameras(meta, ("a", "b"), ("a=left_wrist_0_rgb", "b=none")) == {"a": full["left_wrist_0_rgb"], "b": None}
    for given, words in (
        ((), "model camera 'front' has no feature.*front=observation.images.left_wrist_0_rgb"),
        (("front=top",), "nothing is known of 'top'"),
        (("side=none",), "'side' is no camera of the model"),
    ):
        with pytest.raises(UserError, match=words):
            map_cameras(meta, ("base_0_rgb", "front"), given)
    with pytest.raises(UserError, match="all are none"):
        map_cameras(meta, ("a",), ("a=none",))
    cfg = LeRobotData(str(GOLDEN / "v30_video"), ("x=base_0_rgb", "y=none"), held_out=0.0, frames="decode")
    sample = load_lerobot(cfg, 2, ("x", "y"), (64, 64), needs_subtask=True)[0][0]
    assert list(sample["images"]) == ["x"] and sample["masked"] == ("y",)


def test_v20_reads_as_v21(tmp_path):
    path = broken(tmp_path, "v21_images")
    edit_json(path / "meta/info.json", lambda info: info.update(codebase_version="v2.0"))
    assert len(source(path)) == 60


def test_a_name_on_the_hub_is_downloaded_once_and_read(monkeypatch, tmp_path):
    asked = []

    def download(name: str, **options: object) -> str:
        asked.append((name, options))
        if name == "no/where":
            raise OSError("401 Client Error\nmore of it")
        return str(GOLDEN / "v30_video")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=download))
    assert len(source("someone/toys@v3.0")) == 60
    assert asked == [("someone/toys", {"repo_type": "dataset", "revision": "v3.0"})]
    with pytest.raises(UserError, match="no/where is neither .*: 401 Client Error;"):
        source("no/where")
    # A directory of that name comes first.
    shutil.copytree(GOLDEN / "v21_video", tmp_path / "some/one")
    assert read_meta("some/one").version == "v2.1" and len(asked) == 2
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"openpi-ar\[remote\]"):
        source("a/b")
    with pytest.raises(UserError, match="is not a directory"):
        source(tmp_path / "nothing")


def test_arrays_of_two_dimensions_and_shuffled_texts_are_read(tmp_path):
    """Older files keep the texts in an unnamed pandas index, and not in order of their number."""
    path = broken(tmp_path, "v30_video")
    file = path / "data/chunk-000/file-000.parquet"
    grid = np.arange(60 * 6, dtype=np.float32).reshape(60, 2, 3)
    pq.write_table(
        pq.read_table(file).append_column("grid", pa.array(grid.tolist(), pa.list_(pa.list_(pa.float32())))), file
    )
    entry = {"dtype": "float32", "shape": [2, 3], "names": None}
    edit_json(path / "meta/info.json", lambda info: info["features"].update(grid=entry))
    tasks = pq.read_table(path / "meta/tasks.parquet").take([1, 0]).rename_columns(["task_index", "__index_level_0__"])
    pq.write_table(tasks, path / "meta/tasks.parquet")
    data = source(path, state=("grid", "observation.state"))
    np.testing.assert_array_equal(data[25]["state"][:6], grid[25].ravel())
    assert data[25]["state"].shape == (13,) and data[25]["prompt"] == TASKS[1]
    entry["shape"] = [2, 2]
    edit_json(path / "meta/info.json", lambda info: info["features"].update(grid=entry))
    with pytest.raises(UserError, match=r"'grid' must hold 4 numbers in each of 60 frames .*found 6"):
        source(path, state=("grid",))
