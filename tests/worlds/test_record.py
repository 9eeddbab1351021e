"""Broken if this fails: the teacher, that is the expert, its recovery from mishaps, or what is recorded of it."""

import numpy as np
import pytest

from openpi_ar.worlds.tabletop import record
from openpi_ar.worlds.tabletop.expert import approached, expert_action, parse_subtask
from openpi_ar.worlds.tabletop.tasks import Layout, Task, clear_task, known_subtasks, next_subtask, pair_task
from openpi_ar.worlds.tabletop.world import ACTIONS, Tabletop
from tests.prompt_fixtures import parse_prompt

LAYOUT = Layout(
    ("red", "blue"), np.array([(0.0, -0.05), (0.1, 0.03)]), np.zeros(2), np.array([-0.1, 0.0, 0.15]), opening=0.09
)


@pytest.fixture(scope="module")
def world() -> Tabletop:
    return Tabletop()


@pytest.fixture(scope="module")
def episodes(world: Tabletop) -> list[record.Episode]:
    return [record.record_episode(Tabletop((16, 16)), (5, i), 1.0) for i in range(6)]


def act(world: Tabletop, subtask: str | None = None) -> np.ndarray:
    """The expert's action now, for the task or another subtask."""
    facts = world.facts()
    return expert_action(facts, subtask or next_subtask(world.task, facts))


def run(world: Tabletop, limit: int = 200, subtask: str | None = None) -> dict:
    for _ in range(limit):
        _, _, terminated, truncated, info = world.step(act(world, subtask), render=False)
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
        for _ in range(60):
            action = act(world) if spoil == "open" else np.array([0.0, 0.0, 0.2, -1.0])
            action[3] = -1.0
            info = world.step(action, render=False)[4]
        assert info["blocks_placed"] == 0


def test_expert_recovers_from_a_drop_and_from_a_miss(world: Tabletop):
    task = clear_task("left", ("red", "blue"))
    for mishap in ("drop", "miss"):
        world.reset(0, task=task, layout=LAYOUT, render=False)
        happened = 0
        for _ in range(world.max_steps):
            facts, action = world.facts(), act(world)
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
    with pytest.raises(KeyError):
        expert_action(world.facts(), "pick up the green block")


def test_demonstrations_are_complete(episodes: list[record.Episode]):
    for episode in episodes:
        frames, said = len(episode.state), episode.subtasks
        assert episode.images.shape == (frames, 2, 16, 16, 3) and episode.images.dtype == np.uint8
        assert episode.action.shape == (frames, len(ACTIONS)) and len(said) == frames
        assert set(np.unique(episode.action[:, 3])) == {-1.0, 1.0}
        assert said[0].startswith("pick up")
        assert said[-5:] == ["done"] * 5
        task: Task = parse_prompt(episode.prompt, ("red", "yellow", "green", "blue", "purple"))
        asked = {f"place the {color} block in the {name} bin" for color, name in task.targets}
        assert {text for text in said if text.startswith("place")} <= asked
        assert not episode.commanded


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


def test_a_hopeless_expert_is_reported(world: Tabletop, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(record, "expert_action", lambda facts, subtask: np.zeros(4, np.float32))
    monkeypatch.setattr(record, "_MAX_ATTEMPTS", 1)
    with pytest.raises(RuntimeError, match="failed 1 attempts"):
        record.record_episode(world, (0,), 0.0)


def test_commanded_episodes_are_marked_and_follow_no_prompt():
    small = Tabletop((8, 8))
    how = {"commanded": 0.5, "asked": ("red", "green", "blue")}
    found = [record.record_episode(small, (3, i), 1.0, **how) for i in range(8)]
    assert 1 <= sum(e.commanded for e in found) <= 7
    named = {word for e in found for text in e.subtasks for word in text.split()}
    assert not named & {"purple", "yellow"}
