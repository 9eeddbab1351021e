"""If this fails, what a checkpoint says and does through the policy is not what its model computes."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openpi_ar.algorithms.flow import denoise
from openpi_ar.algorithms.generate import generate
from openpi_ar.algorithms.prefill import prefill
from openpi_ar.algorithms.sampling import AllowedIds, Sampling, log_probability
from openpi_ar.checkpoints import store
from openpi_ar.data.inputs import InputTransform, collate
from openpi_ar.errors import UserError
from openpi_ar.models.vlm import VLA
from openpi_ar.policy import Policy, programs
from openpi_ar.text.templates import TEMPLATES, text_status
from openpi_ar.text.tokenizer import load_tokenizer
from openpi_ar.types import Observation, Tokens
from tests.checkpoint_fixtures import tabletop_stats


def raw_observation(seed: int, prompt: str = "put the red block in the left bin") -> dict:
    rng = np.random.default_rng(seed)
    images = {name: rng.integers(0, 256, (32, 32, 3), np.uint8) for name in ("front", "wrist")}
    return {"images": images, "state": rng.uniform(0.0, 0.1, 4).astype(np.float32), "prompt": prompt}


def collate_target(policy: Policy, text: str) -> Tokens:
    return Tokens(**{name: a[None] for name, a in policy.transform.target({"subtask": text}).items()})


@pytest.fixture
def policy(tiny_policy: Policy) -> Policy:
    return tiny_policy


def test_images_resized_on_the_device_are_those_resized_on_the_host(policy, monkeypatch):
    raws = [raw_observation(1), raw_observation(2)]
    rng = np.random.default_rng(3)
    for raw in raws:
        raw["images"] = {name: rng.integers(0, 256, (45, 60, 3), np.uint8) for name in raw["images"]}
    readings = [policy.robot.read(raw) for raw in raws]
    native = policy.transform.observations(readings, 2, resize=False)
    assert native.images.shape == (2, 2, 45, 60, 3)
    seen, want = (
        jax.jit(lambda m, o: m.embed_images(o))(policy._model, obs)
        for obs in (native, collate([policy.transform.observation(raw) for raw in raws]))
    )
    np.testing.assert_array_equal(seen, want)
    shapes, read = [], policy.transform.observations
    monkeypatch.setattr(policy.transform, "observations", lambda *a, **k: shapes.append(k) or read(*a, **k))
    for on_device in (False, True):
        monkeypatch.setattr(policy, "_resizes", on_device)
        policy.infer(raws[0])
    assert [k["resize"] for k in shapes] == [True, False]
    monkeypatch.undo()
    raws[1]["images"]["front"] = raws[1]["images"]["front"][:40]  # of several sizes: the host makes them one
    readings = [policy.robot.read(raw) for raw in raws]
    assert policy.transform.observations(readings, 2, resize=False).images.shape == (2, 2, 32, 32, 3)


def test_infer_is_the_three_calls_on_the_stored_parameters(policy, tiny_checkpoint):
    """Stacked parameters, no policy: prefill, generate, denoise by hand with the keys that seed 0 gives."""
    cfg, model, tok, stats = store.load_policy_checkpoint(tiny_checkpoint)
    transform = InputTransform(cfg, tok, stats)
    obs = collate([transform.observation(raw_observation(3))])
    assert isinstance(obs, Observation)
    _, now = jax.random.split(jax.random.key(0))
    _, noise_key = jax.random.split(now)
    allowed = jnp.asarray([*tok.allowed_text, *[False] * 16])

    def by_hand(model: VLA, obs: Observation):
        out, cache = prefill(model, obs)
        sampling = Sampling(tok.eos_id, cfg.text.max_target_tokens, constraint=AllowedIds(allowed))
        text, cache = generate(model, cache, out.prompt_last, sampling)
        noise = jax.random.normal(noise_key, (1, 4, 4))
        return text, denoise(model, obs, cache, noise, num_steps=10)

    said, actions = jax.jit(by_hand)(model, obs)
    low, high = transform.action_stats.q01, transform.action_stats.q99
    real = (np.asarray(actions[0]) + 1) / 2 * (high - low) + low
    ids = np.asarray(said.ids)[0][np.asarray(said.valid)[0]].tolist()

    result = policy.infer(raw_observation(3))
    np.testing.assert_allclose(result["actions"], real, atol=1e-4)
    assert result["actions"].shape == (4, 4)
    assert result["subtask"] == TEMPLATES["subtask"].parse(tok, ids) != ""
    assert result["text_status"] == text_status(ids, tok.eos_id)
    assert np.abs(policy.infer(raw_observation(4))["actions"] - real).max() > 0.01


def test_staged_path_gives_the_same_numbers(policy):
    one = policy.infer(raw_observation(1))
    staged = policy.infer(raw_observation(1), timing=True)
    np.testing.assert_allclose(staged["actions"], one["actions"], atol=1e-5)
    assert staged["subtask"] == one["subtask"]
    assert set(one["timing"]) == {"prepare", "model", "total"}
    assert set(staged["timing"]) == {"images", "prefill", "text", "flow", "total"}
    assert staged["timing"]["total"] >= sum(staged["timing"][k] for k in ("images", "prefill", "text", "flow"))

    forced = policy.infer(raw_observation(1), subtask="done")
    staged = policy.infer(raw_observation(1), subtask="done", timing=True)
    np.testing.assert_allclose(staged["actions"], forced["actions"], atol=1e-5)
    assert staged["subtask"] == forced["subtask"] == "done"


def with_text(tiny_checkpoint, **changes) -> Policy:
    cfg, model, tok, stats = store.load_policy_checkpoint(tiny_checkpoint)
    return Policy(dataclasses.replace(cfg, text=dataclasses.replace(cfg.text, **changes)), model, tok, stats)


def test_reprompted_actions_are_those_of_the_subtask_as_the_task(tiny_checkpoint):
    """As openpi's pi0.5 would be asked: by an action-only policy whose prompt is the subtask."""
    # Room for the tokens of any text: such a model writes bytes that take several each when they are read back.
    policy = with_text(tiny_checkpoint, conditioning="reprompt", max_prompt_tokens=64)
    acting = with_text(tiny_checkpoint, template="openpi", max_prompt_tokens=64)
    raws = [raw_observation(1), raw_observation(2, "clear the table into the left bin")]
    texts = ["pick up the red block", "place it in the left bin"]
    noise = np.random.default_rng(0).normal(size=(2, 4, 4)).astype(np.float32)
    forced = policy.infer_batch(raws, subtasks=texts, noise=noise, batch_size=3)
    want = acting.infer_batch([{**r, "prompt": t} for r, t in zip(raws, texts, strict=True)], noise=noise)
    for got, w in zip(forced, want, strict=True):
        np.testing.assert_allclose(got["actions"], w["actions"], atol=1e-5)
    # The task is not seen any more, to the last bit; appended text leaves it in sight.
    other = {**raws[0], "prompt": "put the blue block in the right bin"}
    first, second = (policy.infer(r, subtask="done", noise=noise[0])["actions"] for r in (raws[0], other))
    np.testing.assert_array_equal(first, second)
    appending = with_text(tiny_checkpoint)
    first, second = (appending.infer(r, subtask="done", noise=noise[0])["actions"] for r in (raws[0], other))
    assert np.abs(first - second).max() > 1e-4  # control

    # Generated text: the same text as without, and the actions of that text; so in stages, and with a draft.
    out = policy.infer(raws[0], noise=noise[0])
    assert out["subtask"] == appending.infer(raws[0])["subtask"] != ""
    want = acting.infer({**raws[0], "prompt": out["subtask"]}, noise=noise[0])
    np.testing.assert_allclose(out["actions"], want["actions"], atol=1e-5)
    staged = policy.infer(raws[0], noise=noise[0], timing=True)
    np.testing.assert_allclose(staged["actions"], out["actions"], atol=1e-5)
    assert set(staged["timing"]) == {"images", "prefill", "text", "reprompt", "flow", "total"}
    session = policy.session()
    policy.infer(raws[0], session=session)
    drafted = policy.infer(raws[0], session=session, noise=noise[0])
    np.testing.assert_allclose(drafted["actions"], out["actions"], atol=1e-5)
    tight = with_text(tiny_checkpoint, conditioning="reprompt")
    task = acting.infer(raws[0], noise=noise[0])["actions"]
    np.testing.assert_allclose(tight.infer(raws[0], noise=noise[0])["actions"], task, atol=1e-5)
    with pytest.raises(UserError, match="writes none"):
        with_text(tiny_checkpoint, conditioning="reprompt", template="openpi")
    with pytest.raises(UserError, match="unknown template"):
        with_text(tiny_checkpoint, conditioning="reprompt", action_template="opnpi")


def test_a_call_is_a_function_of_its_arguments(policy):
    raw, other = raw_observation(1), raw_observation(2, "clear the table into the left bin")
    first = policy.infer(raw)
    policy.infer_batch([other, raw], sessions=[policy.session(5), policy.session(6)])
    again = policy.infer(raw)
    np.testing.assert_array_equal(again["actions"], first["actions"])
    assert again["subtask"] == first["subtask"]
    assert np.abs(policy.infer(raw, seed=1)["actions"] - first["actions"]).max() > 1e-3
    for row in policy.infer_batch([raw, raw]):
        np.testing.assert_allclose(row["actions"], first["actions"], atol=1e-5)


def test_an_observation_is_read_once(policy, monkeypatch):
    """Reading images, state and prompt apart, or again for the actions, would do most of the host's work twice."""
    reads, read = [], policy.robot.read
    monkeypatch.setattr(policy.robot, "read", lambda raw: reads.append(raw) or read(raw))
    raws = [raw_observation(1), raw_observation(2)]
    policy.infer_batch(raws, batch_size=4)
    assert [id(raw) for raw in reads] == [id(raw) for raw in raws]


def test_noise_that_is_given_is_used_as_it_is(policy):
    raw = raw_observation(1)
    zeros, ones = (policy.infer(raw, noise=np.full((4, 4), x))["actions"] for x in (0.0, 1.0))
    assert np.abs(zeros - ones).max() > 1e-3
    both = policy.infer_batch([raw, raw], noise=np.stack([np.zeros((4, 4)), np.ones((4, 4))]))
    np.testing.assert_allclose(both[0]["actions"], zeros, atol=1e-5)
    np.testing.assert_allclose(both[1]["actions"], ones, atol=1e-5)
    session = policy.session()
    noise = np.asarray(policy._programs.draw(session.key[None]).noise)
    np.testing.assert_array_equal(
        policy.infer(raw, session=session)["actions"], policy.infer(raw, noise=noise, seed=9)["actions"]
    )
    with pytest.raises(UserError, match=r"noise must be \[4, 4\] or \[1, 4, 4\], found \[8, 4\]"):
        policy.infer(raw, noise=np.zeros((8, 4)))


def test_a_padded_batch_answers_each_row_as_it_would_alone(policy):
    raws = [
        raw_observation(i, prompt) for i, prompt in enumerate(("done", "clear the table into the left bin", "sort"))
    ]
    results = policy.infer_batch(raws, batch_size=4)
    assert len(results) == 3
    for raw, result in zip(raws, results, strict=True):
        assert policy.infer(raw)["subtask"] == result["subtask"]
    full = policy.infer_batch([*raws, raws[0]], batch_size=4)  # the padding is the first row
    again = policy.infer_batch(raws, batch_size=4)
    for a, b in zip(full, again, strict=False):
        np.testing.assert_array_equal(a["actions"], b["actions"])
    assert len({r["subtask"] for r in results}) > 1  # otherwise the comparison above says little


def test_one_program_serves_all_calls_of_one_batch_size(policy, monkeypatch):
    raws = [raw_observation(i) for i in range(4)]
    policy.infer_batch(raws, batch_size=4)

    def traced(*args, **kwargs):
        raise AssertionError("compiled again")

    monkeypatch.setattr(programs, "act", traced)
    for n in (1, 2, 3):
        assert len(policy.infer_batch(raws[:n], batch_size=4)) == n
    with pytest.raises(AssertionError, match="compiled again"):
        policy.infer_batch(raws, batch_size=5)


def test_forced_subtask_is_what_is_acted_on(policy):
    raw, actions = raw_observation(2), {}
    for text in ("pick up the red block", "done"):
        result = policy.infer(raw, subtask=text)
        assert (result["subtask"], result["text_status"]) == (text, "ok")
        actions[text] = result["actions"]
    assert np.abs(actions["done"] - actions["pick up the red block"]).max() > 1e-3
    with pytest.raises(UserError, match="for each of the 2 observations or for none"):
        policy.infer_batch([raw, raw], subtasks=["done", None])


def test_only_text_is_ever_said(policy):
    """A model that would rather say BOS, padding or the ids that only it has than anything else."""
    loud = nnx.clone(policy._model)
    table = np.array(loud.embedder.table[...])
    forbidden = np.array(
        [policy.tokenizer.pad_id, policy.tokenizer.bos_id, policy.tokenizer.unk_id, *range(1024, 1040)]
    )
    # Ten directions with both signs, 30 times longer than other rows: one of them has the largest logit.
    sign = np.where(np.arange(len(forbidden)) % 2, 30, -30)[:, None]
    table[forbidden] = sign * table[100 + np.arange(len(forbidden)) // 2]
    loud.embedder.table = nnx.Param(jnp.asarray(table))
    for i in range(4):
        obs = policy.transform.observations([policy.robot.read(raw_observation(i))], 1)
        run, drawn = policy._programs, policy._drawn([policy.session()], 1, None)
        out, _ = prefill(loud, obs)
        assert int(loud.logits(out.prompt_last)[0].argmax()) in forbidden
        said = run.act(loud, obs, drawn.text_keys, drawn.noise)[0].text
        ids = np.asarray(said.ids)[np.asarray(said.valid)]
        assert len(ids) and not set(ids.tolist()) & set(forbidden.tolist())


def test_degenerate_text_is_named():
    eos = 1
    assert text_status([5, 6, eos], eos) == "ok"
    assert text_status([eos], eos) == "ok"
    assert text_status([], eos) == "ok"
    assert text_status([5, 6, 7], eos) == "truncated"
    assert text_status([4] + [9] * 8, eos) == "loop"
    assert text_status([4] + [9] * 8 + [eos], eos) == "loop"
    assert text_status([4] + [9] * 7 + [eos], eos) == "ok"
    assert text_status([9, 8] * 8, eos) == "truncated"


def test_questions_are_answered_from_images_and_question_alone(policy):
    raw = {"images": raw_observation(1)["images"]}
    answer = policy.answer(raw, "what is this?")
    assert set(answer) == {"answer", "text_status", "logprobs", "logprob", "margin", "boxes", "stray_tokens", "timing"}
    assert answer["answer"] == policy.answer({**raw, "state": np.ones(4) * 0.1}, "what is this?")["answer"]
    assert set(answer["timing"]) == {"images", "prefill", "text", "total"}
    answers = [policy.answer({"images": raw_observation(i)["images"]}, q)["answer"] for i in (1, 2, 3) for q in "ab"]
    assert len(set(answers)) > 1
    with pytest.raises(UserError, match="question"):
        policy.answer(raw, "  ")


def test_scores_are_the_models_probabilities_of_the_texts(policy):
    texts = ["done", "pick up the red block", "place it in the left bin"]
    allowed = np.pad(policy.tokenizer.allowed_text, (0, 1040 - policy.tokenizer.vocab_size))
    for seed in (1, 2):
        raw = raw_observation(seed)
        scores = policy.score(raw, texts)
        obs = collate([policy.transform.observation(raw)])
        for text, score in zip(texts, scores, strict=True):
            target = collate_target(policy, text)
            out, _ = prefill(policy._model, obs, target)
            logits = policy._model.logits(jnp.concatenate([out.prompt_last[:, None], out.text[:, :-1]], axis=1))
            each = log_probability(jnp.where(allowed, logits, -jnp.inf), target.ids)
            assert score == pytest.approx(float(each[target.valid].sum()), abs=1e-3)
        assert len(set(scores.tolist())) == 3 and (scores < 0).all()
        out = policy.infer(raw)
        assert out["logprob"] == pytest.approx(float(out["logprobs"].sum()), abs=1e-5)
    for wrong, message in (([], "is empty"), ([""], "subtask"), (["very " * 100], "the target takes")):
        with pytest.raises(UserError, match=message):
            policy.score(raw_observation(1), wrong)
    forced = policy.infer(raw_observation(1), subtask="done")
    assert (len(forced["logprobs"]), forced["logprob"], forced["margin"]) == (0, None, None)


def test_only_listed_subtasks_come_out_with_and_without_a_draft(tiny_checkpoint):
    texts = ("done", "pick up the red block", "pick up the blue block", "place it in the left bin")
    policy = Policy.from_checkpoint(tiny_checkpoint, subtasks=texts)
    session = policy.session()
    for seed in range(4):
        raw = raw_observation(seed)
        out, drafted = policy.infer(raw), policy.infer(raw, session=session)
        assert out["subtask"] in texts and out["text_status"] == "ok"
        assert drafted["subtask"] == out["subtask"] and drafted["logprob"] == pytest.approx(out["logprob"], abs=1e-3)
        again = policy.infer(raw, session=session)
        assert again["subtask"] == out["subtask"] and again["margin"] == pytest.approx(out["margin"], abs=1e-3)


def test_the_callers_way_of_decoding_replaces_the_checkpoints(tiny_checkpoint, tiny_policy):
    one = Policy.from_checkpoint(tiny_checkpoint, denoise_steps=1, subtasks=["done"])
    assert one.cfg.decode == dataclasses.replace(tiny_policy.cfg.decode, denoise_steps=1, subtasks=("done",))
    raw = raw_observation(0)
    steps = [policy.infer(raw, subtask="done")["actions"] for policy in (one, tiny_policy)]
    assert np.abs(steps[0] - steps[1]).max() > 1e-3  # one step, and not ten
    with pytest.raises(TypeError, match="denoising_steps"):
        Policy.from_checkpoint(tiny_checkpoint, denoising_steps=1)


def test_known_subtasks_take_fewer_passes_and_change_no_text(tiny_checkpoint):
    """The table may hold what the model writes, in part or wrongly: texts and actions stay those without it."""
    cfg, model, tok, stats = store.load_policy_checkpoint(tiny_checkpoint)
    plain = Policy(cfg, model, tok, stats)
    raws = [raw_observation(seed) for seed in range(4)]
    want = [plain.infer(raw) for raw in raws]
    # The tiny model writes no proper text, so what it writes is known as ids: from a session that has seen it.
    known = Policy(
        dataclasses.replace(cfg, subtasks=("done", "pick up the red block", "very " * 40)), model, tok, stats
    )
    assert len(known._likely.known) == 2  # what does not fit the budget is no subtask to expect
    session = known.session()
    for turn in range(2):
        for raw, w in zip(raws, want, strict=True):
            session.draft = None
            got = known.infer(raw, session=session, noise=np.zeros((4, 4), np.float32))
            assert got["subtask"] == w["subtask"] and got["logprob"] == pytest.approx(w["logprob"], abs=1e-3)
            assert got["passes"] <= w["passes"]
            if turn:  # two blocks carry ten tokens; one more where another text begins in the same way
                assert got["passes"] <= 3 < w["passes"]
    assert len(session.texts) == len({w["subtask"] for w in want})
    off = Policy(dataclasses.replace(known.cfg, decode=dataclasses.replace(cfg.decode, block=1)), model, tok, stats)
    assert [off.infer(raw)["passes"] for raw in raws] == [w["passes"] for w in want]


def test_logits_that_are_no_numbers_are_an_error_not_a_text(tiny_checkpoint):
    cfg, model, tok, stats = store.load_policy_checkpoint(tiny_checkpoint)
    model.embedder.table[...] = model.embedder.table[...].at[300, 0].set(jnp.nan)
    broken = Policy(cfg, model, tok, stats)
    with pytest.raises(UserError, match="NaN or infinite"):
        broken.infer(raw_observation(1))
    with pytest.raises(UserError, match="NaN or infinite"):
        broken.answer(raw_observation(1), "what is this?")
    with pytest.raises(UserError, match="NaN or infinite"):
        broken.score(raw_observation(1), ["done"])


def test_measured_times_are_apart_and_the_first_call_too(policy):
    result = policy.measure(raw_observation(1), repeats=3)
    assert list(result["timing"]) == ["images", "prefill", "text", "flow", "total", "first_call"]
    assert all(ms > 0 for ms in result["timing"].values())
    np.testing.assert_array_equal(result["actions"], policy.infer(raw_observation(1))["actions"])
    assert list(policy.measure(raw_observation(1))["timing"]) == ["first_call"]  # no stage is compiled
    asked = policy.measure_answer({"images": raw_observation(1)["images"]}, "what?", repeats=1)
    assert list(asked["timing"]) == ["images", "prefill", "text", "total", "first_call"]


def test_a_model_that_only_acts_says_nothing_and_cannot_be_told_what_to_say(tiny_checkpoint):
    cfg, model, tok, stats = store.load_policy_checkpoint(tiny_checkpoint)
    cfg = dataclasses.replace(cfg, text=dataclasses.replace(cfg.text, template="openpi"))
    policy = Policy(cfg, model, tok, stats)
    result = policy.infer(raw_observation(1))
    assert (result["subtask"], result["text_status"], result["actions"].shape) == ("", "ok", (4, 4))
    with pytest.raises(UserError, match="only acts"):
        policy.infer(raw_observation(1), subtask="done")


def test_wrong_input_is_refused_before_anything_runs(policy, tiny_checkpoint):
    raw = raw_observation(1)
    for change, message in (
        ({"state": np.zeros(5)}, "4 numbers"),
        ({"state": np.array([0, 0, np.nan, 0.0])}, "not finite"),
        ({"images": {"front": raw["images"]["front"]}}, "'wrist' is missing"),
        ({"prompt": "  "}, "prompt"),
        ({"prompt": "very " * 100}, "tokens but the budget is"),
    ):
        with pytest.raises(UserError, match=message):
            policy.infer({**raw, **change})
    for raws in ([], [raw] * 3):
        with pytest.raises(UserError, match="1 to 2 observations"):
            policy.infer_batch(raws, batch_size=2)
    cfg, model, *_ = store.load_policy_checkpoint(tiny_checkpoint)
    model.cfg = dataclasses.replace(cfg.model, vocab_size=512)
    with pytest.raises(UserError, match="1024 pieces but the model reads 512"):
        Policy(cfg, model, load_tokenizer("embedded"), tabletop_stats())
