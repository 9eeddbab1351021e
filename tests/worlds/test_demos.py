"""If this fails, the teacher fails: the expert, its recovery from mishaps, or the recorded demonstrations."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from openpi_ar.worlds.tabletop import record
from openpi_ar.worlds.tabletop.demos import DemoConfig, Demos, TabletopDemos, cache_path, load_or_generate
from openpi_ar.worlds.tabletop.expert import Expert, approached, expert_action, parse_subtask
from openpi_ar.worlds.tabletop.tasks import Layout, Task, clear_task, known_subtasks, pair_task, parse_prompt
from openpi_ar.worlds.tabletop.world import ACTION_DIM, Tabletop

ARRAYS = ("images", "state", "action", "prompt_id", "subtask_id", "episode_index")
LAYOUT = Layout(
    ("red", "blue"), np.array([(0.0, -0.05), (0.1, 0.03)]), np.zeros(2), np.array([-0.1, 0.0, 0.15]), opening=0.09
)


@pytest.fixture(scope="module")
def world() -> Tabletop:
    return Tabletop()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DemoConfig:
    return DemoConfig(episodes=6, seed=5, image_size=(16, 16), cache_dir=str(tmp_path_factory.mktemp("demos")))


@pytest.fixture(scope="module")
def demos(config: DemoConfig) -> Demos:
    return load_or_generate(config, workers=0)


def run(world: Tabletop, limit: int = 200, subtask: str | None = None) -> dict:
    expert = Expert(world, subtask)
    for _ in range(limit):
        _, _, terminated, truncated, info = world.step(expert.act(), render=False)
        if terminated or truncated:
            break
    return info


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_expert_succeeds(world: Tabletop, split: str):
    for seed in range(10):
        world.reset(seed, split=split, render=False)  # type: ignore[arg-type]
        assert run(world)["success"], f"seed {seed}"


def test_expert_moves_at_all_the_right_things(world: Tabletop):
    """Negative control: the same world with the hand kept still, or never closing, does not succeed."""
    for spoil in ("still", "open"):
        world.reset(0, render=False)
        expert = Expert(world)
        for _ in range(60):
            action = expert.act() if spoil == "open" else np.array([0.0, 0.0, 0.2, -1.0])
            action[3] = -1.0
            info = world.step(action, render=False)[4]
        assert info["blocks_placed"] == 0


def test_expert_recovers_from_a_drop_and_from_a_miss(world: Tabletop):
    task = clear_task("left", ("red", "blue"))
    for mishap in ("drop", "miss"):
        world.reset(0, task=task, layout=LAYOUT, render=False)
        expert, happened = Expert(world), 0
        for _ in range(world.max_steps):
            facts, action = world.facts(), expert.act()
            carried = facts.held is not None and facts.tool[2] > 0.09
            early = facts.held is None and facts.tool[2] < 0.11 and action[3] < 0
            if happened < 3 and (carried if mishap == "drop" else early or happened):
                action[3] = -1.0 if mishap == "drop" else 1.0
                happened += 1
            _, _, terminated, _, info = world.step(action, render=False)
            if terminated:
                break
        assert happened > 0
        assert info["success"], mishap


def test_expert_follows_a_given_subtask(world: Tabletop):
    task = clear_task("left", ("red", "blue"))
    world.reset(0, task=task, layout=LAYOUT, render=False)
    assert approached(world.facts()) is None
    info = run(world, 20, "pick up the blue block")  # the task itself would take red first
    assert info["held"] == "blue"
    assert info["positions"]["blue"][2] > 0.08
    assert approached(world.facts()) == "blue"
    info = run(world, 20, "place the blue block in the right bin")
    assert info["held"] is None
    assert info["positions"]["blue"][0] > 0
    assert info["positions"]["blue"][1] > 0.08
    # With another block in hand: put it down first, on the table.
    world.reset(0, task=task, layout=LAYOUT, render=False)
    run(world, 20, "pick up the blue block")
    info = run(world, 30, "pick up the red block")
    assert info["held"] == "red"
    assert info["positions"]["blue"][2] < 0.03
    assert info["positions"]["blue"][1] < 0.07


def test_every_subtask_can_be_parsed_and_others_are_refused(world: Tabletop):
    assert len(known_subtasks()) == 5 + 5 * 3 + 1
    assert parse_subtask("place the blue block in the left bin") == ("blue", "left")
    assert [parse_subtask(subtask) for subtask in known_subtasks()][-1] == (None, None)
    world.reset(0, task=pair_task("red", "left", "blue", "left"), layout=LAYOUT, render=False)
    for bad in ("", "pick up the pink block", "place the red block in the upper bin"):
        with pytest.raises(ValueError, match="unknown subtask"):
            expert_action(world.facts(), bad)
        with pytest.raises(ValueError, match="unknown subtask"):
            Expert(world, bad or "nothing")
    with pytest.raises(KeyError):
        expert_action(world.facts(), "pick up the green block")


def test_demonstrations_are_complete(demos: Demos):
    frames = len(demos.state)
    assert demos.images.shape == (frames, 2, 16, 16, 3)
    assert demos.images.dtype == np.uint8
    assert demos.camera_names == ("front", "wrist")
    assert demos.action.shape == (frames, ACTION_DIM)
    assert all(len(getattr(demos, name)) == frames for name in ARRAYS)
    assert set(np.unique(demos.action[:, 3])) == {-1.0, 1.0}
    assert not demos.images.flags.writeable
    for episode in range(6):
        here = demos.episode_index == episode
        said = [demos.subtasks[i] for i in demos.subtask_id[here]]
        assert said[0].startswith("pick up")
        assert said[-5:] == ["done"] * 5
        assert len(set(demos.prompt_id[here])) == 1
        task: Task = parse_prompt(demos.prompts[demos.prompt_id[here][0]], ("red", "yellow", "green", "blue", "purple"))
        asked = {f"place the {color} block in the {name} bin" for color, name in task.targets}
        assert {text for text in said if text.startswith("place")} <= asked
    assert (np.diff(demos.episode_index) >= 0).all()


def test_recorded_actions_are_the_clean_answer(world: Tabletop):
    """The executed action is disturbed, the recorded one is not: grip labels close only where the state is a grasp."""
    noisy = record.record_episode(world, (1, 0), 1.0)
    clean = record.record_episode(world, (1, 0), 0.0)
    assert len(noisy.state) >= len(clean.state)
    assert not np.array_equal(noisy.state[: len(clean.state)], clean.state)
    for episode in (noisy, clean):
        seeking = [text.startswith("pick") for text in episode.subtasks] & (episode.state[:, 3] > 0.08)
        closing = seeking & (episode.action[:, 3] > 0)
        assert closing.any()
        assert (episode.state[closing, 2] < 0.04).all()


def test_the_cache_and_any_number_of_workers_give_the_same(config: DemoConfig, demos: Demos, tmp_path: Path):
    again = load_or_generate(config, workers=0)
    parallel = load_or_generate(dataclasses.replace(config, cache_dir=str(tmp_path)), workers=2)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(demos, name), getattr(again, name))
        np.testing.assert_array_equal(getattr(demos, name), getattr(parallel, name))
    assert TabletopDemos(config).path.name == cache_path(dataclasses.replace(config, cache_dir="/elsewhere")).name
    other = load_or_generate(dataclasses.replace(config, seed=6, episodes=1), workers=0)
    assert not np.array_equal(other.images[0], demos.images[0])


def test_a_half_written_cache_is_never_read(config: DemoConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fresh = dataclasses.replace(config, cache_dir=str(tmp_path), episodes=1)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("openpi_ar.worlds.tabletop.demos._as_npy", fail)
        with pytest.raises(OSError, match="disk full"):
            load_or_generate(fresh, workers=0)
    assert not list(cache_path(fresh).parent.iterdir())
    assert load_or_generate(fresh, workers=0).episode_index.max() == 0


def test_the_environment_variable_moves_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENPI_AR_CACHE", str(tmp_path))
    assert cache_path(DemoConfig()).is_relative_to(tmp_path)


def test_bad_configs_are_named(tmp_path: Path):
    for bad in ({"episodes": 0}, {"noise": -1.0}, {"seed": -1}, {"image_size": (0, 8)}):
        with pytest.raises(ValueError, match="at least"):
            load_or_generate(DemoConfig(cache_dir=str(tmp_path), **bad))
    with pytest.raises(ValueError, match="workers"):
        load_or_generate(DemoConfig(cache_dir=str(tmp_path)), workers=-1)


def test_a_hopeless_expert_is_reported(world: Tabletop, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(record, "expert_action", lambda facts, subtask: np.zeros(4, np.float32))
    monkeypatch.setattr(record, "_MAX_ATTEMPTS", 1)
    with pytest.raises(RuntimeError, match="failed 1 attempts"):
        record.record_episode(world, (0,), 0.0)


def test_commanded_episodes_are_marked_and_follow_no_prompt(tmp_path: Path):
    base = DemoConfig(episodes=8, seed=3, image_size=(8, 8), cache_dir=str(tmp_path))
    demos = load_or_generate(dataclasses.replace(base, commanded=0.5, asked=("red", "green", "blue")), workers=0)
    told = [bool(demos.commanded[demos.episode_index == e].all()) for e in range(8)]
    assert told == [bool(demos.commanded[demos.episode_index == e].any()) for e in range(8)]
    assert 1 <= sum(told) <= 7
    named = {word for i in np.unique(demos.subtask_id) for word in demos.subtasks[i].split()}
    assert not named & {"purple", "yellow"}
    assert not load_or_generate(base, workers=0).commanded.any()
    assert cache_path(base) != cache_path(dataclasses.replace(base, commanded=0.5))
    with pytest.raises(ValueError, match="commanded must be in"):
        load_or_generate(dataclasses.replace(base, commanded=1.5))
    with pytest.raises(ValueError, match="pairs must be in"):
        load_or_generate(dataclasses.replace(base, pairs=-0.1))
    with pytest.raises(ValueError, match="asked two or more"):
        load_or_generate(dataclasses.replace(base, asked=("red",)))
