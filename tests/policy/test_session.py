"""If this fails, robots that share a policy share noise or texts, or a robot's calls differ from one run to the
next."""

import dataclasses

import numpy as np
import pytest

from openpi_ar.checkpoints import store
from openpi_ar.errors import UserError
from openpi_ar.policy import Policy, Session
from tests.policy.test_policy import raw_observation

PROMPTS = ("done", "clear the table into the left bin", "sort")


def rows(call: int) -> list[dict]:
    return [raw_observation(10 * call + i, prompt) for i, prompt in enumerate(PROMPTS)]


def test_rows_of_a_batch_get_what_each_session_would_get_alone(tiny_policy: Policy):
    """Three robots in one batch, three calls, against three batches of one; texts, drafts and keys are the same
    bits."""
    together, alone = ([Session(seed) for seed in (3, 4, 5)] for _ in range(2))
    noises = []
    for call in range(3):
        a = tiny_policy.infer_batch(rows(call), sessions=together)
        b = [tiny_policy.infer(raw, session=session) for raw, session in zip(rows(call), alone, strict=True)]
        for x, y in zip(a, b, strict=True):
            np.testing.assert_allclose(x["actions"], y["actions"], atol=1e-5)
            assert (x["subtask"], x["text_status"]) == (y["subtask"], y["text_status"])
        for s, t in zip(together, alone, strict=True):
            np.testing.assert_array_equal(s.key, t.key)
            np.testing.assert_array_equal(s.draft, t.draft)
            np.testing.assert_allclose(s.chunk, t.chunk, atol=1e-5)
        drawn = tiny_policy._programs.draw(np.stack([s.key for s in together]))
        noises.append(np.asarray(drawn.noise))
        for s, noise in zip(alone, drawn.noise, strict=True):
            np.testing.assert_array_equal(tiny_policy._programs.draw(s.key[None]).noise[0], noise)
    # Otherwise the comparisons above say little: no two rows or calls have the same noise, nor all rows the same text.
    flat = np.concatenate(noises).reshape(9, -1)
    assert min(np.abs(flat[i] - flat[j]).max() for i in range(9) for j in range(i)) > 0.1
    assert len({tuple(s.draft[0].tolist()) for s in together}) > 1


def test_sampled_text_comes_from_each_sessions_own_key(tiny_checkpoint):
    cfg, *parts = store.load_policy_checkpoint(tiny_checkpoint)
    policy = Policy(dataclasses.replace(cfg, decode=dataclasses.replace(cfg.decode, temperature=1.0)), *parts)
    raws = [rows(0)[1]] * 3
    together, alone = ([Session(seed) for seed in (3, 4, 5)] for _ in range(2))
    batch = [r["subtask"] for r in policy.infer_batch(raws, sessions=together)]
    assert batch == [policy.infer(raw, session=s)["subtask"] for raw, s in zip(raws, alone, strict=True)]
    assert len(set(batch)) == 3  # the same observation, three keys
    assert policy.infer(raws[0], session=alone[0])["subtask"] != batch[0]  # and another key in the next call


def test_interleaved_sessions_never_share_drafts(tiny_policy: Policy, monkeypatch):
    steps, run = [], tiny_policy._programs.act

    def spied(*args, **options):
        out, ms = run(*args, **options)
        steps.append(int(out.text.steps))
        return out, ms

    monkeypatch.setattr(tiny_policy._programs, "act", spied)
    a, b = Session(), Session()
    raws = rows(0)
    for session, raw in ((a, raws[0]), (b, raws[1]), (a, raws[0]), (b, raws[1])):
        tiny_policy.infer(raw, session=session)
    assert steps[0] > 0 and steps[1] > 0 == steps[2] == steps[3]  # each finds its own text, though the other's was last
    tiny_policy.infer(raws[1], session=a)
    assert steps[-1] > 0  # a's text was another one, b's would have been right


def test_a_session_counts_its_calls_and_ends_where_it_is_thrown_away(tiny_policy: Policy):
    raw, session = rows(0)[1], tiny_policy.session(7)
    first = tiny_policy.infer(raw, session=session)
    np.testing.assert_array_equal(first["actions"], tiny_policy.infer(raw, seed=7)["actions"])
    assert session.chunk.shape == (4, 4) and session.executed == 0
    session.executed = 2
    second = tiny_policy.infer(raw, session=session)
    assert session.executed == 0 and np.abs(second["actions"] - first["actions"]).max() > 1e-3
    assert second["subtask"] == first["subtask"]
    draft = session.draft
    tiny_policy.infer(raw, session=session, subtask="done")  # given, not generated
    assert session.draft is draft
    again = tiny_policy.session(7)
    np.testing.assert_array_equal(tiny_policy.infer(raw, session=again)["actions"], first["actions"])


def test_a_batch_needs_a_session_for_each_row(tiny_policy: Policy):
    session = Session()
    for sessions, found in (([session], "found 1 sessions"), ([session] * 3, "1 of them different")):
        with pytest.raises(UserError, match=f"each of the 3 observations, {found}" if len(sessions) == 1 else found):
            tiny_policy.infer_batch(rows(0), sessions=sessions)
