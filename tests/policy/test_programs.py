"""If this fails, a smaller or remembered program says or does something else."""

import dataclasses

import jax
import numpy as np
import pytest

from openpi_ar.checkpoints import store
from openpi_ar.data.inputs import shrink
from openpi_ar.policy import Policy, programs
from tests.model_fixtures import act, greedy, max_diff, noise_for, ragged_observation, tiny_config, tiny_model
from tests.policy.test_policy import raw_observation


def test_dropped_cameras_and_cut_prompts_change_nothing():
    cfg = tiny_config()
    model, obs = tiny_model(cfg).for_inference(), ragged_observation(cfg)
    masks = np.array(obs.image_mask)
    masks[:, 0] = False
    wide = jax.tree.map(lambda a: np.pad(a, [(0, 0), (0, 9)]), obs.prompt)
    obs = dataclasses.replace(obs, image_mask=masks, prompt=wide)
    small = shrink(obs, (5, 8, 12))
    assert small.images.shape[1] == 1 and small.prompt.ids.shape == (3, 8)  # the longest prompt has 7 tokens
    assert shrink(obs, (5,)).prompt.ids.shape == (3, 16)
    a, b = (act(model, o, noise_for(cfg), greedy(4), num_steps=2) for o in (obs, small))
    np.testing.assert_array_equal(a.text.ids, b.text.ids)
    assert max_diff(a.actions, b.actions) < 2e-5


def test_what_was_said_is_checked_not_decoded_again(tiny_checkpoint):
    cfg, model, tok, stats = store.load_policy_checkpoint(tiny_checkpoint)
    policy = Policy(cfg, model, tok, stats)
    assert policy.warmup().keys() == {cfg.text.max_prompt_tokens}
    steps, run = [], policy._programs.act

    def spied(*args, **options):
        out, ms = run(*args, **options)
        steps.append(int(out.text.steps))
        return out, ms

    policy._programs.act = spied
    raw, other = raw_observation(1), raw_observation(2, "clear the table into the left bin")
    session = policy.session()
    texts = [policy.infer(r, session=session)["subtask"] for r in (raw, raw, other, raw)]
    assert steps[0] > 0 == steps[1]
    assert texts[0] == texts[1] == texts[3]
    session.draft = None
    assert policy.infer(raw, session=session)["subtask"] == texts[0] and steps[-1] == steps[0]
    # Without a session nothing is remembered.
    assert [policy.infer(raw)["subtask"] for _ in range(2)] == [texts[0]] * 2 and steps[-2:] == steps[:1] * 2
    off = Policy(dataclasses.replace(cfg, decode=dataclasses.replace(cfg.decode, draft=False)), model, tok, stats)
    session = off.session()
    assert [off.infer(r, session=session)["subtask"] for r in (raw, other)] == [texts[0], texts[2]]


def test_after_warming_up_prompts_of_all_lengths_are_served_without_compiling(tiny_checkpoint, monkeypatch):
    cfg, model, tok, stats = store.load_policy_checkpoint(tiny_checkpoint)
    left = "put the red block in the left bin"
    raws = [raw_observation(1, prompt) for prompt in ("done", left, f"{left}, then the blue block in the right bin")]
    transform = Policy(cfg, model, tok, stats).transform
    lengths = [int(transform.observation(raw)["prompt"]["valid"].sum()) for raw in raws]
    assert lengths[0] < lengths[1] < lengths[2]
    cfg = dataclasses.replace(cfg, decode=dataclasses.replace(cfg.decode, prompt_buckets=tuple(lengths[:2])))
    policy = Policy(cfg, model, tok, stats)
    assert policy.warmup(batch_size=2).keys() == {*lengths[:2], cfg.text.max_prompt_tokens}

    def traced(*args, **kwargs):
        raise AssertionError("compiled again")

    monkeypatch.setattr(programs, "act", traced)
    for raw in raws:
        sessions = [policy.session(), policy.session()]
        for _ in range(2):  # without an earlier text to check, and with one
            assert len(policy.infer_batch([raw, raw], sessions=sessions)) == 2
    with pytest.raises(AssertionError, match="compiled again"):
        policy.infer_batch(raws)


def test_dtype_follows_the_device():
    assert programs.inference_dtype("auto") == ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    assert programs.inference_dtype("bfloat16") == "bfloat16"


def test_the_resize_follows_the_device():
    assert programs.resizes_on_device("auto") == (jax.default_backend() != "cpu")
    assert programs.resizes_on_device("device") and not programs.resizes_on_device("host")
