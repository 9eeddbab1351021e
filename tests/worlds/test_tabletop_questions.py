"""If this fails, the tabletop teaches wrong answers, or its dataset does not hold the questions that it asked."""

import dataclasses

import numpy as np
import pyarrow.parquet as pq
import pytest

from openpi_ar.data.lerobot.load import load_lerobot
from openpi_ar.data.lerobot.questions import read_questions
from openpi_ar.data_config import LeRobotData
from openpi_ar.worlds.tabletop import dataset
from openpi_ar.worlds.tabletop.dataset import Demonstrations, decode_blocks, record_dataset
from openpi_ar.worlds.tabletop.questions import KINDS, all_questions, kind_of, known_questions, sample_question
from openpi_ar.worlds.tabletop.scene import BIN_CENTER, COLORS
from openpi_ar.worlds.tabletop.tasks import Facts

DEMOS = Demonstrations(episodes=2, seed=7, image_size=(32, 32))


def at(place: tuple[float, float] | str, z: float = 0.02) -> np.ndarray:
    x, y = BIN_CENTER[place] if isinstance(place, str) else place
    return np.array([x, y, z])


def facts(held: str | None = None, **blocks: np.ndarray) -> Facts:
    return Facts(np.array([0.0, 0.0, 0.1]), 0.05, blocks, held)


def test_answers_of_moments_done_by_hand():
    start = facts(red=at((-0.1, 0.0)), blue=at((0.05, 0.0)), green=at((0.055, -0.1)))
    asked = all_questions(start)
    assert asked["held"] == [("what colour is the block in the gripper?", "none")]
    assert asked["table"] == [("how many blocks are on the table?", "three")]
    assert set(asked["bin"]) == {(f"what is in the {name} bin?", "nothing") for name in ("left", "middle", "right")}
    sides = dict(asked["side"])
    assert sides["is the red block left of the blue one?"] == "yes"
    assert sides["is the blue block left of the red one?"] == "no"
    assert "is the green block left of the blue one?" not in sides and len(sides) == 4  # half a centimetre apart
    assert asked["done"] == [("what was just done?", "nothing")]

    lifted = facts("red", red=at((0.0, 0.0), 0.12), blue=at("left"), green=at("left"), yellow=at((0.1, 0.0)))
    asked = {kind: dict(questions) for kind, questions in all_questions(lifted).items()}
    assert list(asked["held"].values()) == ["red"] and list(asked["table"].values()) == ["one"]
    assert asked["bin"]["what is in the left bin?"] == "green and blue"  # in the order of COLORS
    assert list(asked["done"].values()) == ["picked up the red block"]
    # A block that is still held over a bin is not in it; two in bins do not tell which was last.
    above = facts("red", red=at("right", 0.05), blue=at("left"))
    asked = {kind: dict(questions) for kind, questions in all_questions(above).items()}
    assert asked["bin"]["what is in the right bin?"] == "nothing" and not asked["done"]
    one, two = facts(red=at("right"), blue=at((0, 0))), facts(red=at("right"), blue=at("left"))
    assert dict(all_questions(one)["done"]) == {"what was just done?": "placed the red block in the right bin"}
    assert not all_questions(two)["done"]


def test_every_question_is_known_and_kinds_come_equally_often():
    moment = facts("red", red=at((0.0, 0.0), 0.12), blue=at("left"), yellow=at((0.1, 0.0)))
    rng = np.random.default_rng(0)
    drawn = [sample_question(rng, moment) for _ in range(2000)]
    counts = np.array([sum(kind == k for kind, *_ in drawn) for k in KINDS])
    assert abs(counts - 400).max() < 90  # five deviations of a binomial count
    for kind, question, answer in drawn:
        assert (
            question in known_questions()
            and kind_of(question) == kind
            and (question, answer) in all_questions(moment)[kind]
        )
    assert len(known_questions()) == len(set(known_questions())) == 3 + 3 + len(COLORS) * (len(COLORS) - 1)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return record_dataset(tmp_path_factory.mktemp("q") / "demos", DEMOS, images="png", subtasks="index", questions=True)


def test_the_dataset_holds_the_questions_and_their_answers_are_true(recorded):
    """Against the blocks' positions that the dataset holds itself."""
    cfg = LeRobotData(path=str(recorded), held_out=0.0, frames="decode")
    source, *_ = load_lerobot(cfg, 4, ("front", "wrist"), (32, 32), needs_subtask=True)
    rows = read_questions(source)
    frames = source.table.frames
    assert len(rows) == sum((e.length + 1) // 2 for e in frames.episodes)
    blocks = decode_blocks(np.concatenate([_column(recorded, dataset.POSES)]))
    seen = set()
    for row in rows:
        assert tuple(row.images) == ("front", "wrist")
        kind = kind_of(row.question)
        seen.add(kind)
        episode, number = (int(part.split()[-1]) for part in row.where.rsplit(": ", 1)[-1].split(","))
        at_now = blocks[int(frames.starts[episode]) + number]
        if kind == "side":
            first, second = (row.question.split()[i] for i in (2, 7))
            x = [at_now[COLORS.index(color)][0] for color in (first, second)]
            assert row.answer == ("yes" if x[0] < x[1] else "no")
        if kind == "table":
            low = [b for b in at_now if np.isfinite(b).all() and b[2] < 0.03 and b[1] < 0.12]
            assert abs(("zero", "one", "two", "three", "four", "five").index(row.answer) - len(low)) <= 1
    assert seen == set(KINDS)


def test_questions_change_nothing_else(recorded, tmp_path):
    plain = record_dataset(tmp_path / "plain", DEMOS, images="png", subtasks="index")
    for name in ("observation.state", "action", dataset.POSES, "subtask_index"):
        np.testing.assert_array_equal(_column(recorded, name), _column(plain, name))
    names = {
        name for name, root in (("asked", recorded), ("plain", plain)) if "language_events" in _table(root).column_names
    }
    assert names == {"asked"}
    other = record_dataset(tmp_path / "other", dataclasses.replace(DEMOS, seed=8), images="png", subtasks="index")
    assert len(_column(other, "action")) != len(_column(plain, "action"))  # control


def _table(root):
    return pq.read_table(next((root / "data").glob("*/*.parquet")))


def _column(root, name):
    return np.array(_table(root)[name].to_pylist())
