"""Broken if this fails: a damaged or unsuitable dataset trains on silently, or ends in a stack trace."""

from collections.abc import Callable
import json
from pathlib import Path

import pytest

from openpi_ar.config import LeRobotData
from openpi_ar.data.lerobot.load import load_lerobot
from openpi_ar.data.lerobot.meta import read_meta
from openpi_ar.data.lerobot.video import probe
from openpi_ar.errors import UserError
from tests.lerobot_fixtures import CAMERAS, GOLDEN, broken, edit_column, edit_json, source, sources

DATA_3 = "data/chunk-000/file-000.parquet"
DATA_2 = "data/chunk-000/episode_000001.parquet"
VIDEO_3 = "videos/observation.images.base_0_rgb/chunk-000/file-000.mp4"
VIDEO_2 = "videos/chunk-000/observation.images.base_0_rgb/episode_000001.mp4"


def read_everything(path: Path) -> None:
    data = source(path)
    for i in range(len(data)):
        data[i]


def info(**fields: object) -> Callable[[Path], None]:
    return lambda path: edit_json(path / "meta/info.json", lambda body: body.update(fields))


def remove(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


def truncate(name: str, keep: float) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[: int(keep * len(content))])

    return apply


def column(file: str, name: str, row: int, value: Callable) -> Callable[[Path], None]:
    return lambda path: edit_column(path / file, name, lambda values: values.__setitem__(row, value(values[row])))


def slow(column: list) -> None:
    column[:] = [2 * t for t in column]


def no_text(path: Path) -> None:
    file = path / "meta/tasks.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[1]["task"] = " "
    file.write_text("\n".join(map(json.dumps, lines)))


NAN = float("nan")
CASES = [
    ("v30_video", remove("meta/info.json"), r"meta/info.json is missing"),
    ("v30_video", remove("meta/tasks.parquet"), r"meta/tasks.parquet is missing"),
    ("v30_video", remove("meta/episodes/chunk-000/file-000.parquet"), r"meta/episodes holds no parquet"),
    ("v30_video", remove(DATA_3), rf"{DATA_3} is missing \(episodes 0 to 2\)"),
    ("v30_video", remove(VIDEO_3), rf"{VIDEO_3} is missing .*base_0_rgb', episode 0"),
    ("v21_video", remove(DATA_2), rf"{DATA_2} is missing \(episode 1\)"),
    ("v21_video", remove(VIDEO_2), rf"{VIDEO_2} is missing .*episode 1"),
    ("v21_video", remove("meta/episodes.jsonl"), r"episodes.jsonl is missing"),
    ("v30_video", truncate("meta/info.json", 0.5), r"info.json is not JSON"),
    ("v30_video", truncate(DATA_3, 0.5), rf"{DATA_3} is not a readable parquet file \(episodes 0 to 2\)"),
    ("v21_video", truncate("meta/tasks.jsonl", 0.8), r"tasks.jsonl line 2 is not JSON"),
    ("v30_video", info(codebase_version="v1.6"), r"codebase_version is 'v1.6', this reads v2.0, v2.1, v3.0"),
    ("v30_video", info(codebase_version=None), r"codebase_version is None"),
    ("v30_video", info(features=None), r"info.json: features is None, expected an object"),
    ("v30_video", info(fps="fast"), r"info.json: fps is 'fast', expected a number above 0"),
    ("v30_video", info(total_episodes=5), r"says 5 episodes, .*lists 3"),
    ("v30_video", info(fps=20), r"'observation.images.base_0_rgb' is recorded as video.fps 10, but the dataset's fps is 20"),
    ("v21_images", info(fps=5), r"episode_000000.parquet: episode 0, frame 2: timestamp is 0.2 s, .*should be 0.4 s"),
    ("v21_images", column(DATA_2, "action", 4, lambda a: [*a[:6], NAN]), rf"{DATA_2}: episode 1, frame 4: dimension 6 of"),
    ("v30_video", column(DATA_3, "action", 41, lambda a: [NAN] * 7), rf"{DATA_3}: episode 2, frame 3: dimension 0 of"),
    ("v30_video", column(DATA_3, "observation.state", 0, lambda a: [float("inf")] * 7), r"frame 0: .*state is inf"),
    ("v30_video", column(DATA_3, "frame_index", 21, lambda i: 5), r"episode 1, frame 1: frame_index is 5"),
    ("v30_video", column(DATA_3, "episode_index", 59, lambda i: 1), r"episode 1 has 1 frames, meta/ says 18"),
    ("v30_video", column(DATA_3, "task_index", 30, lambda i: 9), r"episode 1, frame 10: task_index is 9, .*tasks.parquet"),
    ("v21_video", no_text, r"episode 1, frame 0: task_index is 1, which has no text in .*tasks.jsonl"),
    ("v30_video", column(DATA_3, "subtask_index", 2, lambda i: 8), r"frame 2: subtask_index is 8, .*subtasks.parquet"),
    ("v30_video", remove("meta/subtasks.parquet"), r"no subtask labels .*--text.template openpi"),
    ("v21_images", column(DATA_2, "observation.images.base_0_rgb", 3, lambda x: {"bytes": b"PNG?", "path": None}),
     rf"{DATA_2}: camera .*episode 1, frame 3 is not a readable image"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "damage", "words"), CASES, ids=[words[:40] for _, _, words in CASES])
def test_damage_is_named_in_one_line(tmp_path, name, damage, words):
    path = broken(tmp_path, name)
    read_everything(path)  # negative control: whole, it reads
    damage(path)
    with pytest.raises(UserError, match=words) as e:
        read_everything(path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.6, 0.9])
@pytest.mark.parametrize(("name", "video"), [("v30_video", VIDEO_3), ("v21_video", VIDEO_2)])
def test_truncated_video_names_file_episode_and_frame(tmp_path, name, video, keep):
    path = broken(tmp_path, name)
    truncate(video, keep)(path)
    with pytest.raises(UserError, match=rf"{video}.*episode \d, frame \d+"):
        read_everything(path)


def test_video_that_ends_early_names_the_first_lost_frame(tmp_path):
    """A whole file with too few frames: episode 2's video in the place of the longer episode 3's."""
    path = broken(tmp_path, "v21_video")
    videos = path / "videos/chunk-000/observation.images.base_0_rgb"
    (videos / "episode_000002.mp4").write_bytes((videos / "episode_000001.mp4").read_bytes())
    with pytest.raises(UserError, match=r"episode_000002.mp4 holds no frame at 1.8000 s .*episode 2, frame 18\).*ends"):
        read_everything(path)


def test_video_of_another_rate_is_refused(tmp_path):
    path = broken(tmp_path, "v21_video")
    info(fps=20)(path)
    edit_json(
        path / "meta/info.json", lambda b: [f.get("info", {}).pop("video.fps", 0) for f in b["features"].values()]
    )
    for e in range(3):
        edit_column(path / f"data/chunk-000/episode_{e:06d}.parquet", "timestamp", lambda c: c.__setitem__(
            slice(None), [t / 2 for t in c]))  # fmt: skip
    with pytest.raises(UserError, match=r"episode_000000.mp4 .*episode 0\) has 10 frames a second, info.json says 20"):
        read_everything(path)


def test_a_file_that_is_no_video_is_refused(tmp_path):
    (tmp_path / "a.mp4").write_text("hello")
    with pytest.raises(UserError, match="a.mp4"):
        probe(tmp_path / "a.mp4")


def test_features_that_are_not_there_are_listed(tmp_path):
    with pytest.raises(UserError, match=r"no feature 'actions': it has .*action"):
        source(GOLDEN / "v30_video", actions=("actions",))
    with pytest.raises(UserError, match="holds float32, not texts"):
        source(GOLDEN / "v30_video", subtasks="observation.state")
    with pytest.raises(UserError, match="is not a directory"):
        read_meta(tmp_path / "nothing")
    with pytest.raises(UserError, match="data.held_out"):
        sources(GOLDEN / "v30_video", held_out=1.0)


def test_episodes_shorter_than_a_chunk_are_padded_and_reported():
    cfg = LeRobotData(str(GOLDEN / "v30_video"), held_out=0.0, frames="decode")
    data, _, remarks = load_lerobot(cfg, 21, CAMERAS, (64, 64), needs_subtask=True)
    assert any(
        "2 of 3 episodes are shorter than a chunk of 21 actions and padded (first: episode 0, 20" in r for r in remarks
    )
    assert data[0]["action_valid"].tolist() == [True] * 20 + [False] and len(data) == 60
    assert not any("shorter" in r for r in sources(GOLDEN / "v30_video")[2])


def test_labels_that_are_all_empty_are_no_labels(tmp_path):
    path = broken(tmp_path, "v30_images_lang")
    edit_column(path / DATA_3, "language_persistent", lambda c: c.__setitem__(slice(None), [[]] * 60))
    with pytest.raises(UserError, match="no subtask labels .*language"):
        read_everything(path)
    assert len(sources(path, needs_subtask=False)[0]) == 60
