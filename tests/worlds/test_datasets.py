"""Broken if this fails: the address of a world's dataset gives another dataset than it says, a half-written one, or
none."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from openpi_ar.config import LeRobotData
from openpi_ar.data.lerobot.load import load_lerobot
from openpi_ar.data.lerobot.source import LeRobotSource
from openpi_ar.data.sources import load_sources
from openpi_ar.errors import UserError
from openpi_ar.worlds import datasets
from openpi_ar.worlds.tabletop import dataset
from openpi_ar.worlds.tabletop.__main__ import main
from openpi_ar.worlds.tabletop.dataset import Demonstrations, cache_path, cached_dataset, record_dataset
from openpi_ar.worlds.tabletop.record import record_episode
from openpi_ar.worlds.tabletop.world import CAMERAS, Tabletop
from tests.data_fixtures import DEBUG
from tests.lerobot_fixtures import GOLDEN

SMALL = Demonstrations(episodes=3, seed=7, image_size=(16, 16), commanded=0.5)


def read(path: str | Path) -> LeRobotSource:
    """All frames, as recorded."""
    cfg = LeRobotData(str(path), held_out=0.0, frames="decode")
    return load_lerobot(cfg, 3, CAMERAS, (16, 16), needs_subtask=True)[0]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def address(cache: str) -> str:
    return "world://tabletop?episodes=3&seed=7&image_size=16x16&commanded=0.5"


def test_an_address_is_the_recording_frame_for_frame(address: str, cache: str):
    source, row, world = read(datasets.local(address, cache)), 0, Tabletop((16, 16))
    for i in range(3):
        episode = record_episode(world, (7, i), 1.0, commanded=0.5)
        for t in range(len(episode.state)):
            raw = source[row]
            for c, camera in enumerate(CAMERAS):
                np.testing.assert_array_equal(raw["images"][camera], episode.images[t, c])
            np.testing.assert_array_equal(raw["state"], episode.state[t])
            np.testing.assert_array_equal(raw["actions"][0], episode.action[t])
            assert (raw["prompt"], raw["subtask"]) == (episode.prompt, episode.subtasks[t])
            assert raw["supervise_text"] is not episode.commanded
            row += 1
    assert row == len(source)
    assert {source[i]["supervise_text"] for i in range(len(source))} == {True, False}


def test_it_is_recorded_once_and_with_any_number_of_processes_the_same(address, cache, tmp_path, monkeypatch):
    path = datasets.local(address, cache)
    two = record_dataset(tmp_path / "two", SMALL, images="png", subtasks="index", questions=True, workers=2)
    files = {p.relative_to(path): p.read_bytes() for p in Path(path).rglob("*") if p.is_file()}
    assert files == {p.relative_to(two): p.read_bytes() for p in two.rglob("*") if p.is_file()}
    monkeypatch.setattr(dataset, "record_dataset", lambda *a, **k: pytest.fail("recorded again"))
    assert datasets.local(address, cache) == path
    with pytest.raises(pytest.fail.Exception, match="again"):  # control: another seed is another dataset
        datasets.local(address.replace("seed=7", "seed=8"), cache)


def test_every_parameter_and_the_generator_name_another_place(monkeypatch):
    changes = {"episodes": 4, "seed": 6, "image_size": (16, 18), "noise": 0.5, "commanded": 0.3}
    changes |= {"asked": ("red", "blue"), "pairs": 0.1, "split": "back"}
    assert set(changes) == {f.name for f in dataclasses.fields(Demonstrations)}
    paths = [cache_path(dataclasses.replace(SMALL, **{k: v})) for k, v in changes.items()]  # type: ignore[arg-type]
    monkeypatch.setattr(dataset, "GENERATOR_VERSION", 0)
    assert len({cache_path(SMALL), *paths}) == len(changes) + 1
    monkeypatch.setenv("OPENPI_AR_CACHE", "/elsewhere")
    assert cache_path(SMALL).is_relative_to("/elsewhere")


def test_a_half_written_dataset_is_never_seen(tmp_path, monkeypatch):
    one = dataclasses.replace(SMALL, episodes=2)
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "encode_blocks", lambda _: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            cached_dataset(one, str(tmp_path))
    assert not list(cache_path(one, str(tmp_path)).parents[1].iterdir())
    assert len(read(cached_dataset(one, str(tmp_path))).table.frames.episodes) == 2


def test_of_two_that_record_at_once_the_first_to_end_provides_it(tmp_path, monkeypatch):
    one, record = dataclasses.replace(SMALL, episodes=1, commanded=0.0), dataset.record_dataset

    def slow(*args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(dataset, "record_dataset", record)
            cached_dataset(one, str(tmp_path))  # another process, which began and ended meanwhile
        (first := cache_path(one, str(tmp_path)) / "mark").touch()
        assert first.exists()
        return record(*args, **kwargs)

    monkeypatch.setattr(dataset, "record_dataset", slow)
    path = cached_dataset(one, str(tmp_path))
    assert (path / "mark").exists() and len(read(path)) > 0
    assert [p.name for p in path.parents[1].iterdir()] == [path.parent.name]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("world://tabeltop?episodes=3", "no world 'tabeltop': datasets are written by tabletop"),
        ("world://", "no world ''"),
        ("world://tabletop?episode=3", "no parameter 'episode': there are episodes, "),
        ("world://tabletop?episodes=3&episodes=4", "episodes must be given once"),
        ("world://tabletop?episodes", "episodes must be given once, as episodes=VALUE"),
        ("world://tabletop?episodes=many", "episodes must be a whole number, found 'many'"),
        ("world://tabletop?noise=nan", "noise must be a number, found 'nan'"),
        ("world://tabletop?image_size=64", "image_size must be height and width such as 64x64, found '64'"),
        (
            "world://tabletop?episodes=0&noise=-1",
            "episodes must be 1 or more, found 0; noise must be 0 or more, found -1",
        ),
        ("world://tabletop?image_size=0x8", "image_size must be positive, found 0x8"),
        ("world://tabletop?commanded=1.5&pairs=-0.1", r"commanded must lie in \[0, 1\], found 1.5; pairs must"),
        ("world://tabletop?split=forth", "split must be train or back, found 'forth'"),
        ("world://tabletop?asked=red,pink", "asked must be two or more of red, .*, found red, pink"),
    ],
)
def test_a_wrong_address_is_one_line_that_says_what_there_is(tmp_path, path, words):
    with pytest.raises(UserError, match=words) as error:
        datasets.local(path, str(tmp_path))
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_other_paths_are_left_alone():
    assert datasets.local("my/demos") == "my/demos" and datasets.local("owner/name@main") == "owner/name@main"


def test_it_may_be_mixed_with_others(address, cache):
    data = LeRobotData(
        str(GOLDEN / "v30_video"), cache_dir=cache, cameras=("front=base_0_rgb|front", "wrist=left_wrist_0_rgb|wrist")
    )
    data = dataclasses.replace(
        data, mix=(f"{address}=0.5",), state=("observation.state[0:4]",), actions=("action[0:4]",)
    )
    train, _, remarks = load_sources(dataclasses.replace(DEBUG, data=data), datasets.local)
    assert any("weight 0.5" in line and cache in line for line in remarks)
    assert {"open the drawer", "pick up the red block"} & set(train.prompts) and len(train) > 60


def test_recorded_datasets_are_inspectable_and_errors_are_one_line(capsys, tmp_path):
    flags = ["--episodes", "1", "--images", "png", "--image-size", "16", "16"]
    main(["record", str(tmp_path / "out"), *flags])
    assert "1 episodes" in capsys.readouterr().out and len(read(tmp_path / "out")) > 20
    for argv, words in (
        (["record", str(tmp_path / "out"), *flags], "exists: name a new directory"),
        (["record", str(tmp_path / "new"), "--asked", "red"], "asked must be two or more"),
        (["pretrain", str(tmp_path)], "exists: name a new directory"),
        (["pretrain", str(tmp_path / "new"), "--like", "nowhere"], "nowhere does not exist"),
    ):
        with pytest.raises(SystemExit) as error:
            main(argv)
        err = capsys.readouterr().err
        assert error.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and words in err
    assert not (tmp_path / "new").exists()
