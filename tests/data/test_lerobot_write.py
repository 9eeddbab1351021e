"""Broken if this fails: exported datasets lose or change data, or are not laid out as LeRobot's own."""

import dataclasses
import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from openpi_ar.config import LeRobotData
from openpi_ar.data.lerobot.load import load_lerobot
from openpi_ar.data.lerobot.meta import read_meta
from openpi_ar.data.lerobot.stats import pixel_counts, pixel_stats, vector_stats
from openpi_ar.data.lerobot.write import LeRobotWriter, Spec
from openpi_ar.errors import UserError
from openpi_ar.worlds.tabletop.dataset import write_dataset
from openpi_ar.worlds.tabletop.record import Episode, record_episode
from openpi_ar.worlds.tabletop.world import Tabletop
from tests.lerobot_fixtures import GOLDEN

CAMERAS = ("front", "wrist")
HORIZON = 5


@pytest.fixture(scope="module")
def episodes() -> list[Episode]:
    """Four episodes of the tabletop, some of them commanded."""
    world = Tabletop((64, 64))
    return [record_episode(world, (0, i), 1.0, commanded=0.5) for i in range(4)]


def write(out, episodes, images="png", subtasks="both"):
    return write_dataset(out, episodes, (64, 64), images=images, subtasks=subtasks)


def read_back(path, **fields):
    cfg = LeRobotData(**({"path": str(path), "held_out": 0.0, "frames": "decode"} | fields))
    return load_lerobot(cfg, HORIZON, CAMERAS, (64, 64), needs_subtask=True)[0]


@pytest.mark.parametrize("subtasks", ["both", "index", "language"])
@pytest.mark.parametrize(("images", "loss"), [("png", 0.0), ("h264", 5.0), ("av1", 6.5)])
def test_the_reader_gives_back_the_same_samples(tmp_path, episodes, images, loss, subtasks):
    data, row = read_back(write(tmp_path / "out", episodes, images, subtasks)), 0
    for episode in episodes:
        last = len(episode.state) - 1
        for t in range(last + 1):
            if images == "png" or row % 7 == 0:
                raw, steps = data[row], np.arange(t, t + HORIZON)
                np.testing.assert_array_equal(raw["state"], episode.state[t])
                np.testing.assert_array_equal(raw["actions"], episode.action[np.minimum(steps, last)])
                np.testing.assert_array_equal(raw["action_valid"], steps <= last)
                assert (raw["prompt"], raw["subtask"]) == (episode.prompt, episode.subtasks[t])
                assert raw["supervise_text"] is not episode.commanded
                for c, camera in enumerate(CAMERAS):
                    error = np.abs(raw["images"][camera].astype(int) - episode.images[t, c]).mean()
                    assert error <= loss
            row += 1
    assert row == len(data)
    if subtasks == "both":
        other = read_back(tmp_path / "out", subtasks="language")
        assert [other[i]["subtask"] for i in range(len(other))] == [data[i]["subtask"] for i in range(len(data))]


def test_files_are_laid_out_as_lerobots_own(tmp_path, episodes):
    """Same files, same info fields, same columns of the same types as what LeRobot's library wrote."""
    out, theirs = write(tmp_path / "out", episodes, "av1", "index"), GOLDEN / "v30_video"

    def names(root) -> set[str]:
        files = {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()}
        cameras = zip(("front", "wrist"), ("base_0_rgb", "left_wrist_0_rgb"), strict=True)
        swap = {f"observation.images.{a}": f"observation.images.{b}" for a, b in cameras}
        return {"/".join(swap.get(part, part) for part in name.split("/")) for name in files}

    assert names(out) == names(theirs) | {"meta/stats.json"}  # left out of the copy
    info, their_info = (json.loads((root / "meta/info.json").read_text()) for root in (out, theirs))
    assert list(info) == list(their_info)
    for key, f in their_info["features"].items():
        ours = info["features"][key.replace("base_0_rgb", "front").replace("left_wrist_0_rgb", "wrist")]
        assert ours["dtype"] == f["dtype"] and set(ours) == set(f), key
    for file in ("data/chunk-000/file-000.parquet", "meta/tasks.parquet", "meta/subtasks.parquet"):
        a, b = pq.read_schema(out / file), pq.read_schema(theirs / file)
        for field in b:
            if field.name not in ("action", "observation.state"):  # other robots
                assert str(a.field(field.name).type).removeprefix("large_") == str(field.type).removeprefix("large_")
    assert json.loads(pq.read_schema(out / "meta/tasks.parquet").metadata[b"pandas"])["index_columns"] == ["task"]
    a, b = (pq.read_schema(r / "meta/episodes/chunk-000/file-000.parquet") for r in (out, theirs))
    for field in b:
        name = field.name.replace("base_0_rgb", "front").replace("left_wrist_0_rgb", "wrist")
        assert a.field(name).type == field.type, name
    assert pq.ParquetFile(out / "data/chunk-000/file-000.parquet").num_row_groups == 4
    language = pq.read_schema(write(tmp_path / "lang", episodes, "png", "language") / "data/chunk-000/file-000.parquet")
    their_language = pq.read_schema(GOLDEN / "v30_images_lang/data/chunk-000/file-000.parquet")
    for name in ("language_persistent", "language_events"):
        assert str(language.field(name).type) == str(their_language.field(name).type)


def test_statistics_are_those_of_the_data(tmp_path, episodes):
    stats = json.loads((write(tmp_path / "out", episodes, "png") / "meta/stats.json").read_text())
    action = np.concatenate([e.action for e in episodes]).astype(np.float64)
    np.testing.assert_allclose(stats["action"]["mean"], action.mean(0), rtol=1e-9)
    np.testing.assert_allclose(stats["action"]["q10"], np.quantile(action, 0.1, axis=0), rtol=1e-9)
    assert stats["action"]["count"] == [len(action)]
    front = np.concatenate([e.images[:, 0] for e in episodes]) / 255.0
    entry = stats["observation.images.front"]
    for name, value in (("mean", front.mean((0, 1, 2))), ("std", front.std((0, 1, 2))), ("max", front.max((0, 1, 2)))):
        np.testing.assert_allclose(np.ravel(entry[name]), value, atol=1e-9)
    np.testing.assert_allclose(np.ravel(entry["q50"]), np.quantile(front, 0.5, axis=(0, 1, 2)), atol=1 / 255)
    assert np.shape(entry["q99"]) == (3, 1, 1)


def test_statistics_of_lerobot_itself_are_ours():
    """min, max, mean and std that LeRobot computed for an episode, from its own columns."""
    row = pq.read_table(GOLDEN / "v30_video/meta/episodes/chunk-000/file-000.parquet").slice(1, 1).to_pylist()[0]
    table = pq.read_table(GOLDEN / "v30_video/data/chunk-000/file-000.parquet").slice(20, 18)
    ours = vector_stats(np.array(table["action"].to_pylist(), np.float32))
    for name in ("min", "max", "mean", "std", "count"):
        np.testing.assert_allclose(ours[name], row[f"stats/action/{name}"], rtol=1e-5)
    # Negative control: another episode's differ.
    other = vector_stats(np.array(pq.read_table(table.schema and GOLDEN / "v30_video/data/chunk-000/file-000.parquet")
                                  .slice(0, 20)["action"].to_pylist(), np.float32))  # fmt: skip
    assert not np.allclose(other["mean"], row["stats/action/mean"], rtol=1e-2)


def test_pixel_statistics_add_up():
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    counts = pixel_counts(images[:2]) + pixel_counts(images[2:])
    stats = pixel_stats(counts, 6)
    np.testing.assert_allclose(np.ravel(stats["std"]), (images / 255).std((0, 1, 2)), rtol=1e-9)
    np.testing.assert_allclose(np.ravel(stats["min"]), (images / 255).min((0, 1, 2)))
    assert stats["count"] == [6]


def small(tmp_path, **fields) -> LeRobotWriter:
    spec = Spec(10, "toy", ("cam",), (16, 16), {"observation.state": ("x",), "action": ("x",)}, images="h264")
    return LeRobotWriter(tmp_path / "out", dataclasses.replace(spec, **fields))


def episode(length: int, value: float = 0.0) -> dict:
    x = np.full((length, 1), value, np.float32)
    images = {"cam": np.full((length, 16, 16, 3), int(value) * 20, np.uint8)}
    return {"images": images, "vectors": {"observation.state": x, "action": x}, "subtasks": ["a"] * length}


@pytest.mark.parametrize("images", ["h264", "png"])
def test_files_roll_over_and_each_episode_is_found_in_its_own(tmp_path, images, monkeypatch):
    monkeypatch.setattr("openpi_ar.data.lerobot.write._DATA_MB", 0)
    monkeypatch.setattr("openpi_ar.data.lerobot.encode.VIDEO_MB", 0)
    monkeypatch.setattr("openpi_ar.data.lerobot.encode.CHUNK", 2)
    with small(tmp_path, images=images) as writer:
        for e in range(5):
            writer.add(f"task {e}", **episode(3 + e, e))
    meta = read_meta(tmp_path / "out")
    assert len({e.data for e in meta.episodes}) == 5 and meta.episodes[4].data.parent.name == "chunk-002"
    if images == "h264":
        assert len({e.videos["cam"].path for e in meta.episodes}) > 1
    cfg = LeRobotData(str(tmp_path / "out"), held_out=0.0, frames="decode")
    data = load_lerobot(cfg, 2, ("cam",), (16, 16), needs_subtask=True)[0]
    for i, e in enumerate(np.repeat(range(5), range(3, 8))):
        assert data[i]["state"] == e and data[i]["prompt"] == f"task {e}"
        assert abs(int(data[i]["images"]["cam"].mean()) - 20 * e) < 4


def test_nothing_is_left_of_a_dataset_that_was_not_finished(tmp_path):
    with pytest.raises(RuntimeError), small(tmp_path) as writer:
        writer.add("task", **episode(3))
        raise RuntimeError
    with pytest.raises(UserError, match="no episode"), small(tmp_path):
        pass
    with pytest.raises(ValueError, match="3 subtasks, but action"), small(tmp_path) as writer:
        short = episode(3)
        writer.add("task", **(short | {"vectors": short["vectors"] | {"action": np.zeros((2, 1))}}))
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_refused_first(tmp_path):
    with pytest.raises(UserError, match="out exists: name a new directory"):
        (tmp_path / "out").mkdir()
        small(tmp_path)
    for fields, words in (({"image_size": (17, 16)}, "even"), ({"images": "av1"}, "at least 64")):
        with pytest.raises(UserError, match=words):
            small(tmp_path / "new", **fields)
    assert not (tmp_path / "new").exists()


def test_commanded_episodes_are_never_held_out(tmp_path, episodes):
    """Their text does not follow from the prompt, so nobody could be judged by it."""
    marked = [dataclasses.replace(e, commanded=i in (0, 1, 3)) for i, e in enumerate(episodes)]
    cfg = LeRobotData(str(write(tmp_path / "out", marked)), held_out=0.2, frames="decode")
    train, held_out, _ = load_lerobot(cfg, HORIZON, CAMERAS, (64, 64), needs_subtask=True)
    of = np.repeat(np.arange(4), [len(e.state) for e in episodes])
    np.testing.assert_array_equal(held_out.rows, np.flatnonzero(of == 2))
    np.testing.assert_array_equal(train.rows, np.flatnonzero(of != 2))
    # Without subtasks their actions would follow from nothing that the model sees.
    cfg = dataclasses.replace(cfg, held_out=0.0)
    acting, _, remarks = load_lerobot(cfg, HORIZON, CAMERAS, (64, 64), needs_subtask=False)
    np.testing.assert_array_equal(acting.rows, np.flatnonzero(of == 2))
    assert any("their prompt does not tell" in line for line in remarks)
