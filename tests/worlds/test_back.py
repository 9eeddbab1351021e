"""Broken if this fails: the task that needs a memory can be done without one, or its labels are not what is to be
done."""

from collections.abc import Callable

import numpy as np
import pytest

from openpi_ar.policy.session import Session
from openpi_ar.worlds.protocol import Play
from openpi_ar.worlds.rollout import RolloutConfig, run_rollouts
from openpi_ar.worlds.tabletop import dataset, questions, record, scene, tasks
from openpi_ar.worlds.tabletop.episodes import TabletopEpisodes
from openpi_ar.worlds.tabletop.expert import expert_action
from openpi_ar.worlds.tabletop.tasks import Facts, Layout, back_task, next_subtask
from openpi_ar.worlds.tabletop.world import HOLD_STEPS, Tabletop

TASK = back_task("red", "left")
PLAN = [
    "pick up the red block",
    "place the red block in the left bin",
    "pick up the red block",
    "place the red block in the right bin",
]


@pytest.fixture(scope="module")
def world() -> Tabletop:
    return Tabletop()


def play(world: Tabletop, say: Callable[[Tabletop], str], steps: int = 200) -> tuple[list[str], bool]:
    """The subtasks that were carried out, each run once, and whether the task succeeded."""
    said: list[str] = []
    for _ in range(min(steps, world.max_steps)):
        text = say(world)
        said += [text] * (said[-1:] != [text])
        _, _, terminated, _, info = world.step(expert_action(world.facts(), text), render=False)
        if terminated:
            return said, True
    return said, bool(info["success"])


def truth(world: Tabletop) -> str:
    return next_subtask(world.task, world.facts())


def by_sight(world: Tabletop) -> str:
    """The best rule that sees one moment: always into the other bin."""
    facts, (color, _) = world.facts(), world.task.targets[0]
    if not tasks.is_lifted(facts, color):
        return tasks.pick_up(color)
    return tasks.place(color, "left" if facts.blocks[color][0] > 0 else "right")


def test_the_expert_goes_there_and_back(world: Tabletop):
    assert TASK.prompt == "move the red block to the left bin and back" and TASK.targets[1] == ("red", "right")
    world.reset(0, task=TASK, render=False)
    said, success = play(world, truth)
    assert said == [*PLAN, "done"] and success
    for seed in range(8):
        world.reset(seed, split="back", render=False)
        (color, there), (_, home) = world.task.targets
        assert world.facts().bins.of(world.facts().blocks[color]) == home != there
        assert play(world, truth)[1], seed


def test_one_frame_has_two_right_subtasks(world: Tabletop):
    """The last moment of an episode as the first one of another: equal pixels, equal state, another label."""
    world.reset(0, task=TASK, render=False)
    assert play(world, truth)[1]
    end, label = world._observe(render=True), truth(world)
    pose = world._data.joint("block0").qpos
    yaw = 2 * np.arctan2(pose[6], pose[3])
    again = Layout(("red",), pose[None, :2].copy(), np.array([yaw]), world.facts().tool, world.facts().opening)

    def settled(layout: Layout) -> tuple[dict, str]:
        """A step of a hand that stays where it is: a block is set down a tenth of a millimetre too high."""
        world.reset(0, task=TASK, layout=layout, render=False)
        start, *_, info = world.step(expert_action(world.facts(), "done"))
        return start, info["subtask"]

    start, label_then = settled(again)
    for camera in world.cameras:
        np.testing.assert_array_equal(start["images"][camera], end["images"][camera])
    # What is left of a difference is a micrometre: no bin of the state in a prompt (over a millimetre) shows it.
    np.testing.assert_allclose(start["state"], end["state"], atol=1e-6)
    assert (label, label_then) == ("done", "pick up the red block")
    # Control: the block is in the picture, and half a pixel of it shows.
    moved, _ = settled(Layout(("red",), again.xy - [[0.003, 0]], again.yaw, again.tool, again.opening))
    assert not np.array_equal(moved["images"]["front"], end["images"]["front"])


def test_what_one_moment_shows_is_not_enough(world: Tabletop):
    """Whoever begins without a memory does not end, and whoever ends does not begin."""
    for rule in (by_sight, lambda _: "done"):
        for seed in range(3):
            world.reset(seed, split="back", render=False)
            assert not play(world, rule)[1]


def test_success_is_to_leave_the_block_alone_at_the_end(world: Tabletop):
    world.reset(0, task=TASK, render=False)
    play(world, truth, 30)
    assert world.facts().completed == 4
    info = world._info()
    assert not info["success"] and info["blocks_placed"] == 1.0
    for _ in range(HOLD_STEPS - 10):
        assert not world.step(expert_action(world.facts(), "done"), render=False)[2]
    for _ in range(10):  # once more, and back again: too late
        info = world.step(expert_action(world.facts(), "pick up the red block"), render=False)[4]
    assert info["held"] == "red" and info["out_of_order"]
    for _ in range(HOLD_STEPS + 20):
        info = world.step(expert_action(world.facts(), "place the red block in the right bin"), render=False)[4]
    assert info["held"] is None and not info["success"]


def test_a_dropped_block_completes_nothing(world: Tabletop):
    """What is completed was done: a block that falls on its way is to be placed still."""
    world.reset(0, task=TASK, render=False)
    while truth(world) == PLAN[0]:
        world.step(expert_action(world.facts(), PLAN[0]), render=False)
    for _ in range(3):
        facts = world.facts()
        world.step(np.array([*facts.tool, -1.0]), render=False)
    assert world.facts().held is None and truth(world) == PLAN[1] and world._info()["blocks_placed"] == 0.0
    assert play(world, truth) == ([*PLAN[1:], "done"], True)


def test_demonstrations_have_the_whole_plan_and_rest_at_its_end():
    episodes = [record.record_episode(Tabletop((8, 8)), (5, i), 1.0, split="back") for i in range(3)]
    for episode in episodes:
        said = [text for i, text in enumerate(episode.subtasks) if not i or text != episode.subtasks[i - 1]]
        color = episode.prompt.split()[2]
        assert [s.split()[0] for s in said] == ["pick", "place", "pick", "place", "done"] and color in said[0]
        assert episode.subtasks.count("done") > HOLD_STEPS and not episode.commanded
        assert not any(text == "what was just done?" and "picked" not in a for text, a in episode.questions.values())


def test_questions_know_the_bins_of_the_scene():
    block = np.array([*scene.TWO_BINS.center["right"], 0.022])
    facts = Facts(scene.HOME, 0.09, {"red": block}, None, scene.TWO_BINS)
    asked = questions.all_questions(facts)
    assert dict(asked["bin"]) == {"what is in the left bin?": "nothing", "what is in the right bin?": "red"}
    assert asked["done"] == [] and dict(asked["table"]) == {"how many blocks are on the table?": "zero"}


def test_the_usual_dataset_is_called_as_before(monkeypatch):
    """A frozen name: the datasets in people's caches are found, and those of the new tasks are others."""
    usual = dataset.cache_path(dataset.Demonstrations())
    assert usual.parent.name == "9b37399417f00d1e"
    assert dataset.cache_path(dataset.Demonstrations(split="back")) != usual
    with pytest.raises(ValueError, match="commanded must be 0 with split=back"):
        dataset.Demonstrations(split="back", commanded=0.1).check()


class Remembers:
    """Carries out the plan by counting the calls of its own session at which something changed."""

    def __init__(self) -> None:
        self.first: list[tuple[str, ...]] = []
        self.known: list[Session] = []

    def infer_batch(self, raws, *, subtasks=None, sessions=None, batch_size=None):
        plans = []
        for raw, session in zip(raws, sessions, strict=True):
            facts: Facts = raw["world"].facts()
            if session not in self.known:
                self.known.append(session)
                self.first.append(session.done)
            text = next_subtask(raw["world"].task, facts)
            session.remember(text, 4)
            plans.append({"subtask": text, "text_status": "ok", "actions": np.stack([expert_action(facts, text)] * 2)})
        return plans


def test_every_episode_begins_without_a_past():
    class Open(Tabletop):
        def _observe(self, render: bool) -> dict:
            return {**super()._observe(render), "world": self}

    policy = Remembers()
    how = RolloutConfig(episodes=3, batch=2)
    played = run_rollouts(policy, how, lambda: TabletopEpisodes(Play(split="back"), Open((8, 8))), progress=False)
    assert policy.first == [(), (), ()]
    assert played.means["success"] == 1.0 and played.means["subtask_accuracy"] == 1.0
    assert "and back" in played.episodes[0].prompt
