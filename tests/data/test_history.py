"""If this fails, a model with a memory is trained on another past than the one that its session knows when it acts."""

import dataclasses

import numpy as np
import pytest

from openpi_ar.data.check import check_histories
from openpi_ar.data.history import History, LateHistory
from openpi_ar.data.inputs import InputTransform
from openpi_ar.data.loader import Loader, in_turn
from openpi_ar.data.mixture import Mixture
from openpi_ar.data.prompt_swap import PromptSwap
from openpi_ar.errors import UserError
from openpi_ar.policy.session import Session
from openpi_ar.text.tokenizer import load_tokenizer
from tests.data_fixtures import PLAIN, PROMPTS, SUBTASKS, in_runs, sources, transform
from tests.lerobot_fixtures import DATASETS, GOLDEN, STARTS, source
from tests.lerobot_fixtures import SUBTASKS as RECORDED

TEXTS = ("a", "b", "c")


def session_done(labels: list[int], most: int, every: int = 1) -> dict[int, tuple[str, ...]]:
    """What a session knows before each of its calls, one every few frames; it generates the frames' labels."""
    session, known = Session(), {}
    for frame in range(0, len(labels), every):
        known[frame] = session.done
        if labels[frame] >= 0:
            session.remember(TEXTS[labels[frame]], most)
    return known


def random_labels(rng: np.random.Generator, shortest: int = 1, gaps: bool = True) -> list[int]:
    return [x for _ in range(12) for x in [int(rng.integers(-gaps, 3))] * int(rng.integers(shortest, shortest + 4))]


@pytest.mark.parametrize("most", [1, 2, 5])
def test_a_sample_tells_what_a_session_would_know(most):
    """Against the session itself, over episodes side by side, with stretches that have no label."""
    rng = np.random.default_rng(most)
    episodes = [random_labels(rng) for _ in range(20)]
    starts = np.cumsum([0, *map(len, episodes)])
    history = History.of(TEXTS, np.concatenate(episodes), starts)
    early = 0
    for start, labels in zip(starts.tolist(), episodes, strict=False):
        for frame, done in session_done(labels, most).items():
            told = history.told(start + frame, most)
            assert told["done"] == done
            early += history.before(int(history.run[start + frame]), most) != done
    assert early > 100  # control: a change that is told at once is another history


@pytest.mark.parametrize("every", [2, 3, 5])
def test_a_late_history_is_that_of_a_session_that_asks_seldom(every):
    rng = np.random.default_rng(every)
    labels = random_labels(rng, shortest=2 * every, gaps=False)
    history = History.of(TEXTS, np.array(labels), np.array([0, len(labels)]))
    differ = 0
    for frame, done in session_done(labels, 3, every).items():
        told = history.told(frame, 3)
        assert (told["done"] if told["done_age"] >= 2 * every else told["done_before"]) == done
        differ += told["done"] != done
    assert differ > 1


def test_how_late_is_drawn_up_to_the_most():
    late = LateHistory(4)
    counts = []
    for age in range(7):
        raw = {"done": ("a", "b"), "done_before": ("a",), "done_age": age}
        drawn = [late(raw, np.random.default_rng(i))["done"] for i in range(400)]
        counts.append(sum(done == ("a",) for done in drawn) / 400)
    # Uniform over 2 to 5 frames; three standard deviations of a fraction of 400.
    np.testing.assert_allclose(counts, [1, 1, 0.75, 0.5, 0.25, 0, 0], atol=0.075)
    question = {"question": "what is it?"}
    assert late(question, np.random.default_rng(0)) is question


@pytest.mark.parametrize("name", DATASETS)
def test_every_way_of_recording_subtasks_gives_the_same_past(name):
    data = dataclasses.replace(source(GOLDEN / name), memory=2)
    for e, start in enumerate(STARTS):
        end = (*STARTS, len(data))[e + 1]
        for i in range(start, end):
            # The labels of an episode differ from each other, and each has two frames or more.
            before = [x for x in dict.fromkeys(RECORDED[start:i]) if RECORDED[start:i].count(x) > 1]
            assert data[i]["done"] == tuple(before[:-1][-2:]), (name, i)
    assert {len(data[i]["done"]) for i in range(len(data))} == {0, 1, 2}
    assert "done" not in source(GOLDEN / name)[30]


def test_the_loader_tells_the_past_and_without_a_memory_batches_are_as_they_were():
    train = sources(in_runs())[0]
    with_memory = dataclasses.replace(train, memory=2)
    cfg = dataclasses.replace(PLAIN, text=dataclasses.replace(PLAIN.text, memory=2, max_prompt_tokens=64))
    remembering, swap = transform(cfg), PromptSwap(PROMPTS, 0.3)

    def batch(data, how, change):
        loader = Loader(data, how, batch_size=8, seed=1, augment=change)
        return next(loader)

    told = batch(with_memory, remembering, in_turn(swap, LateHistory(4)))
    texts = [remembering.tokenizer.decode(ids[valid].tolist()) for ids, valid in _prompts(told)]
    assert {", Done: " in text for text in texts} == {True, False}
    assert any(f", Done: {SUBTASKS[0]}; {SUBTASKS[1]}, State: " in text for text in texts)
    plain, as_ever = (batch(train, transform(), change) for change in (in_turn(swap, LateHistory(4)), swap))
    np.testing.assert_array_equal(plain.observation.prompt.ids, as_ever.observation.prompt.ids)
    np.testing.assert_array_equal(told.target.ids, plain.target.ids)  # the same rows: only their prompts differ


def _prompts(batch):
    return zip(np.asarray(batch.observation.prompt.ids), np.asarray(batch.observation.prompt.valid), strict=True)


def test_prompts_that_can_grow_too_long_are_found_before_training():
    data = dataclasses.replace(sources(in_runs())[0], memory=2)
    text = dataclasses.replace(PLAIN.text, memory=2, max_prompt_tokens=64)
    cfg = dataclasses.replace(PLAIN, text=text)
    mixed = Mixture((data, data), (1.0, 1.0))
    check_histories(cfg, data, transform(cfg))
    assert mixed.histories == data.histories and len(data.histories) > 6
    longest = max(
        len(transform(cfg).tokenizer.encode(transform(cfg).template().prompt_text(p, np.ones(4), d)))
        for p, d in data.histories
    )
    short = dataclasses.replace(cfg, text=dataclasses.replace(text, max_prompt_tokens=longest))
    with pytest.raises(UserError, match=rf"text.memory 2 a prompt can take {longest + 1} tokens, .* is {longest}"):
        check_histories(short, mixed, transform(short))
    check_histories(PLAIN, sources()[0], transform())  # no memory, nothing to look at


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ({"memory": -1}, "text.memory must be 0 or more, found -1"),
        ({"memory": 1, "template": "openpi"}, "template 'openpi' has no place .* use one of subtask, openpi_subtask_"),
    ],
)
def test_a_memory_that_cannot_be_written_is_refused(text, words):
    cfg = dataclasses.replace(PLAIN, text=dataclasses.replace(PLAIN.text, **text))
    with pytest.raises(UserError, match=words):
        InputTransform.for_training(cfg, load_tokenizer("embedded"), sources()[0].norm_stats())


@pytest.mark.parametrize(
    ("memory", "done", "words"),
    [
        (0, ["a"], "trained without a memory .*text.memory 0.*: leave it out"),
        (2, "a; b", "must be a list of the completed subtasks, found 'a; b'"),
        (2, 3, "must be a list"),
        (2, ["a", 3], r"observation\['done'\], entry 2, is 3, expected a text"),
        (2, ["a", " "], "holds an empty text"),
    ],
)
def test_a_past_that_cannot_be_read_is_refused(memory, done, words):
    cfg = dataclasses.replace(PLAIN, text=dataclasses.replace(PLAIN.text, memory=memory))
    with pytest.raises(UserError, match=words):
        transform(cfg).observation({**sources()[0][0], "done": done})
