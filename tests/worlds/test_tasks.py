"""If this fails, training may see held-out tasks, or the labels no longer say what the table shows."""

import dataclasses

import numpy as np
import pytest

from openpi_ar.worlds.tabletop import scene, tasks
from openpi_ar.worlds.tabletop.tasks import Facts, clear_task, next_subtask, pair_task, sort_task
from tests.prompt_fixtures import parse_prompt

BLOCKS = {"red": (-0.1, 0.0, 0.02), "yellow": (0.1, 0.0, 0.02), "blue": (0.0, -0.1, 0.02)}
IN_LEFT, IN_RIGHT = (*scene.BIN_CENTER["left"], 0.02), (*scene.BIN_CENTER["right"], 0.02)


def facts(held: str | None = None, **moved: tuple[float, float, float]) -> Facts:
    blocks = {color: np.array(position) for color, position in {**BLOCKS, **moved}.items()}
    return Facts(np.array([0.0, 0.0, 0.1]), 0.04 if held else 0.09, blocks, held)


def test_training_never_asks_for_what_is_held_out():
    rng = np.random.default_rng(0)
    drawn = [tasks.sample_task(rng)[0] for _ in range(8000)]
    combos = {target for task in drawn for target in task.targets}
    assert not combos & tasks.HELD_OUT_COMBOS
    pairs = {task.targets[0] + task.targets[1] for task in drawn if task.kind == "pair"}
    assert not pairs & tasks.HELD_OUT_PAIRS
    # Everything else is seen, or "held out" would be a gap in the sampling: all other combinations, prompts and
    # subtasks.
    assert combos == {(color, name) for color in scene.COLORS for name in scene.BINS} - tasks.HELD_OUT_COMBOS
    unseen = set(tasks.known_prompts()) - {task.prompt for task in drawn}
    assert all(parse_prompt(prompt, scene.COLORS).is_held_out for prompt in unseen)
    assert {task.kind for task in drawn} == {"clear", "sort", "pair"}
    # No colour is tied to one bin: where it goes must be read in the prompt.
    assert all(len({name for c, name in combos if c == color}) >= 2 for color in scene.COLORS)


def test_pairs_are_asked_for_as_often_as_wished():
    rng = np.random.default_rng(0)
    kinds = [tasks.sample_task(rng, pairs=0.6)[0].kind for _ in range(1000)]
    counts = [kinds.count(kind) for kind in ("pair", "clear", "sort")]
    # Three standard deviations of a binomial count.
    np.testing.assert_allclose(counts, [600, 200, 200], atol=3 * (1000 * 0.6 * 0.4) ** 0.5)
    assert {tasks.sample_task(rng, pairs=1.0)[0].kind for _ in range(20)} == {"pair"}


def test_held_out_episodes_always_contain_something_held_out():
    rng = np.random.default_rng(0)
    drawn = [tasks.sample_task(rng, split="held_out")[0] for _ in range(1000)]
    assert all(task.is_held_out for task in drawn)
    assert {target for task in drawn for target in task.targets} >= tasks.HELD_OUT_COMBOS
    assert {task.targets[0] + task.targets[1] for task in drawn if task.kind == "pair"} >= tasks.HELD_OUT_PAIRS


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_the_three_kinds_are_equally_likely(split: tasks.Split):
    rng = np.random.default_rng(0)
    kinds = [tasks.sample_task(rng, split=split)[0].kind for _ in range(1500)]
    for kind in ("clear", "sort", "pair"):
        assert abs(kinds.count(kind) / 1500 - 1 / 3) < 0.05  # four standard deviations


def test_only_the_colours_asked_for_are_targets():
    rng = np.random.default_rng(0)
    drawn = [tasks.sample_task(rng, asked=("red", "green", "blue")) for _ in range(500)]
    assert {color for task, _ in drawn for color, _ in task.targets} == {"red", "green", "blue"}
    assert {color for _, layout in drawn for color in layout.colors} == set(scene.COLORS)  # the others stand by
    with pytest.raises(ValueError, match="at least two of"):
        tasks.sample_task(rng, asked=("red",))
    with pytest.raises(ValueError, match="at least two of"):
        tasks.sample_task(rng, asked=("red", "mauve"))


def test_a_command_is_a_random_plan_in_its_own_order():
    rng = np.random.default_rng(0)
    plans = [tasks.command_task(rng, "clear the table into the left bin", scene.COLORS) for _ in range(300)]
    assert not {target for plan in plans for target in plan.targets} & tasks.HELD_OUT_COMBOS
    assert len({plan.targets for plan in plans}) > 250
    task = tasks.Task("command", "clear the table into the left bin", (("blue", "right"), ("red", "left")))
    assert next_subtask(task, facts()) == "pick up the blue block"
    assert next_subtask(task, facts(held="red", red=(-0.1, 0.0, 0.1))) == "pick up the blue block"
    assert next_subtask(task, facts(blue=IN_RIGHT)) == "pick up the red block"
    assert not task.is_held_out


def test_held_out_pairs_consist_of_parts_that_are_trained():
    assert len(tasks.HELD_OUT_PAIRS) == 6
    for first, first_bin, second, second_bin in tasks.HELD_OUT_PAIRS:
        assert not {(first, first_bin), (second, second_bin)} & tasks.HELD_OUT_COMBOS


def test_layouts_keep_their_distance_and_hold_the_task():
    rng = np.random.default_rng(1)
    for _ in range(300):
        task, layout = tasks.sample_task(rng)
        assert 2 <= len(layout.colors) == len(set(layout.colors)) <= 4
        assert {color for color, _ in task.targets} <= set(layout.colors)
        gaps = np.linalg.norm(layout.xy[:, None] - layout.xy[None], axis=-1) + np.eye(len(layout.colors))
        assert gaps.min() >= scene.BLOCK_SPACING


def test_prompts_read_back_as_their_task():
    assert len(tasks.known_prompts()) == 3 + 3 * 2 + 5 * 4 * 3 * 3
    for prompt in tasks.known_prompts():
        assert parse_prompt(prompt, scene.COLORS).prompt == prompt
    assert sort_task("right", "middle", ("red", "blue")).targets == (("red", "right"), ("blue", "middle"))
    for wrong in ("put warm colours left and warm colours right", "put warm colours left and cool colours left"):
        with pytest.raises(ValueError, match="unknown prompt"):
            parse_prompt(wrong, scene.COLORS)
    with pytest.raises(ValueError, match="names \\['red'\\]"):
        parse_prompt(pair_task("red", "left", "blue", "left").prompt, ("blue", "green"))


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (facts(), "pick up the red block"),
        (facts(held="red"), "pick up the red block"),  # gripped but still on the table
        (facts(held="red", red=(-0.1, 0.0, 0.1)), "place the red block in the left bin"),
        (facts(held="red", red=(*IN_LEFT[:2], 0.12)), "place the red block in the left bin"),  # over the bin, held
        (facts(red=(*IN_LEFT[:2], 0.12)), "pick up the yellow block"),  # just released
        (facts(red=IN_RIGHT), "pick up the red block"),  # wrong bin
        (facts(yellow=IN_LEFT), "pick up the red block"),
        (facts(red=IN_LEFT, yellow=IN_LEFT, blue=IN_LEFT), "done"),
        (facts(held="blue", blue=(0.0, -0.1, 0.1)), "place the blue block in the left bin"),  # order is free here
    ],
)
def test_subtasks_of_a_free_order(state: Facts, expected: str):
    assert next_subtask(clear_task("left", tuple(BLOCKS)), state) == expected
    assert expected in tasks.known_subtasks()


def test_a_pair_keeps_its_order():
    task = pair_task("blue", "left", "red", "right")
    assert next_subtask(task, facts()) == "pick up the blue block"
    assert next_subtask(task, facts(held="red", red=(-0.1, 0.0, 0.1))) == "pick up the blue block"
    assert next_subtask(task, facts(blue=IN_LEFT)) == "pick up the red block"
    assert next_subtask(task, facts(blue=IN_LEFT, red=IN_RIGHT)) == "done"
    assert not dataclasses.replace(task, kind="clear").is_held_out


def test_a_bin_ends_at_its_inner_walls():
    x, y = scene.BIN_CENTER["left"]
    assert scene.bin_of(np.array([x, y])) == "left"
    assert scene.bin_of(np.array([x + scene.BIN_HALF[0] + 0.002, y])) is None
    assert scene.bin_of(np.array([x, scene.BLOCKS_Y[1]])) is None
