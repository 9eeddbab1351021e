"""If this fails, a policy with a memory reads another past than it was trained on, or robots share theirs."""

import dataclasses

import numpy as np
import pytest

from openpi_ar.checkpoints import store
from openpi_ar.policy import Policy, Session
from tests.data_fixtures import SUBTASKS, in_runs, sources
from tests.policy.test_policy import raw_observation

MEMORY = 2


@pytest.fixture(scope="module")
def policy(tiny_checkpoint) -> Policy:
    cfg, *parts = store.load_policy_checkpoint(tiny_checkpoint)
    text = dataclasses.replace(cfg.text, memory=MEMORY, max_prompt_tokens=48)
    return Policy(dataclasses.replace(cfg, text=text), *parts)


@pytest.fixture
def prompts(policy: Policy, monkeypatch) -> list[list[str]]:
    """The prompts of every call, as texts."""
    seen, read = [], policy.transform.observations

    def spied(*args, **options):
        obs = read(*args, **options)
        rows = zip(obs.prompt.ids, obs.prompt.valid, strict=True)
        seen.append([policy.tokenizer.decode(ids[valid].tolist()) for ids, valid in rows])
        return obs

    monkeypatch.setattr(policy.transform, "observations", spied)
    return seen


def observation(raw: dict) -> dict:
    return {key: raw[key] for key in ("images", "state", "prompt")}


def test_an_episode_played_again_has_the_prompts_of_its_dataset(policy, prompts):
    """Byte for byte: the labels through a session, against what training reads; two robots in one batch."""
    data = dataclasses.replace(sources(in_runs())[0], memory=MEMORY)
    episodes = [range(7), range(12, 21)]
    sessions = [Session(), Session()]
    for frames in zip(*episodes, strict=False):
        raws = [data[i] for i in frames]
        policy.infer_batch([observation(r) for r in raws], subtasks=[r["subtask"] for r in raws], sessions=sessions)
        trained = [policy.transform.sample(raw)["prompt"] for raw in raws]
        assert prompts[-1] == [policy.tokenizer.decode(p["ids"][p["valid"]].tolist()) for p in trained]
    told = {text.count("; ") + 1 if "Done: " in text else 0 for rows in prompts for text in rows}
    assert told == {0, 1, MEMORY}
    assert {len(session.done) for session in sessions} == {MEMORY}
    # Control: without a session there is no past.
    policy.infer(observation(raws[0]), subtask="done")
    assert "Done: " not in prompts[-1][0]


def test_what_the_model_generates_is_remembered_and_of_another_task_forgotten(policy, prompts, monkeypatch):
    """A text of one call alone is a slip, one without an end none at all."""
    calls = ["a", "slip", "a", "a", "b b", "b", "a", "b", "b", "c", "c", "d", "d", "e"]
    said = iter([(text, "truncated" if text == "b b" else "ok") for text in calls])
    monkeypatch.setattr(policy.transform, "text", lambda reading, ids: next(said))
    session, raw = Session(), raw_observation(0)
    for _ in calls[:-1]:
        policy.infer(raw, session=session)
    assert session.done == ("b", "c") and session.subtask == "d"
    pasts = [rows[0].partition(", State:")[0].partition("Done: ")[2] for rows in prompts]
    assert pasts == [*[""] * 9, "a", "a", "a; b", "a; b"]
    policy.infer({**raw, "prompt": "clear the table into the left bin"}, session=session)
    assert "Done: " not in prompts[-1][0] and session.done == () and session.subtask == ""


def test_the_caller_may_tell_the_past(policy, prompts):
    session, raw = Session(), raw_observation(1)
    session.done = ("from the session",)
    policy.infer(raw, session=session, subtask="done")
    policy.infer({**raw, "done": ["one", "two", "three"]}, session=session, subtask="done")
    policy.infer({**raw, "done": []}, session=session, subtask="done")
    assert [rows[0].partition(", State:")[0].partition("left bin")[2] for rows in prompts] == [
        ", Done: from the session",
        ", Done: two; three",
        "",
    ]


def test_a_past_that_is_too_long_loses_its_oldest(policy, prompts):
    """What a model has generated stops no robot; what a caller tells is an error."""
    session, raw = Session(), raw_observation(1)
    session.done = ("a very long story about every block on the table " * 3, SUBTASKS[0])
    policy.infer(raw, session=session, subtask="done")
    assert f", Done: {SUBTASKS[0]}, State:" in prompts[-1][0]
    with pytest.raises(Exception, match="the prompt takes .* tokens but the budget is 48"):
        policy.infer({**raw, "done": session.done}, subtask="done")


def test_without_a_memory_a_session_changes_no_prompt(tiny_policy: Policy):
    session, raw = Session(), raw_observation(2)
    for subtask in SUBTASKS:
        tiny_policy.infer(raw, session=session, subtask=subtask)
    assert session.done == () and session.subtask == ""


def test_actions_with_a_prompt_of_their_own_see_the_subtask_alone(policy):
    """As released pi0.5 models read it: the past decides the subtask, the subtask the actions."""
    cfg = dataclasses.replace(policy.cfg, text=dataclasses.replace(policy.cfg.text, conditioning="reprompt"))
    transform = type(policy.transform)(cfg, policy.tokenizer, {
        "state": policy.transform.state_stats, "actions": policy.transform.action_stats,
    })  # fmt: skip
    raw = {**sources()[0][3], "done": SUBTASKS[:1]}
    arrays = transform.sample(raw)
    told, own = (
        policy.tokenizer.decode(arrays[k]["ids"][arrays[k]["valid"]].tolist()) for k in ("prompt", "action_prompt")
    )
    assert f"Done: {SUBTASKS[0]}," in told
    assert own.startswith(f"Task: {raw['subtask']}, State: ") and "Done" not in own
    plain = transform.sample({**raw, "done": ()})["action_prompt"]
    np.testing.assert_array_equal(arrays["action_prompt"]["ids"], plain["ids"])
