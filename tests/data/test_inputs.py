"""Broken if this fails: the model is fed other arrays than it was trained on, or bad observations pass unnoticed."""

import dataclasses

import numpy as np
import pytest

from openpi_ar.data.inputs import collate
from openpi_ar.errors import UserError
from openpi_ar.text.segments import pack
from openpi_ar.text.templates import TEMPLATES
from openpi_ar.text.tokenizer import load_tokenizer
from openpi_ar.types import Batch, Kind, Observation
from tests.data_fixtures import HORIZON, PLAIN, sources, transform


def raw(**changes) -> dict:
    return {**sources()[0][5], **changes}


def test_observation_has_every_part_in_its_place():
    t = transform(state_dim=6)
    arrays = t.observation(raw())
    assert arrays["images"].shape == (2, 32, 32, 3)
    assert (arrays["images"][0] == 5).all() and (arrays["images"][1] == 105).all()
    assert arrays["image_mask"].all()
    normalised = t.state_stats.normalize(raw()["state"])
    np.testing.assert_array_equal(arrays["state"], [*normalised, 0, 0])
    segments = TEMPLATES["subtask"].prompt_segments(raw()["prompt"], normalised)
    expected = pack(load_tokenizer("embedded"), segments, PLAIN.text.max_prompt_tokens)
    np.testing.assert_array_equal(arrays["prompt"]["ids"], expected["ids"])


def test_camera_order_is_the_configs():
    arrays = transform(cameras=("wrist", "front")).observation(raw())
    assert (arrays["images"][0] == 105).all() and (arrays["images"][1] == 5).all()


def test_masked_camera_is_black_and_unseen():
    images = {"front": raw()["images"]["front"]}
    arrays = transform().observation(raw(images=images, masked=["wrist"]))
    np.testing.assert_array_equal(arrays["image_mask"], [True, False])
    assert not arrays["images"][1].any()


def test_sample_masks_padding_and_episode_end():
    t = transform(action_dim=6)
    end = sources()[0][6]  # the first episode's last frame
    arrays = t.sample(end)
    assert arrays["action_mask"].shape == (HORIZON, 6)
    np.testing.assert_array_equal(arrays["action_mask"][0], [True] * 4 + [False] * 2)
    assert not arrays["action_mask"][1:].any()
    np.testing.assert_array_equal(arrays["actions"][:, 4:], 0)
    every = dataclasses.replace(PLAIN, loss=dataclasses.replace(PLAIN.loss, average_padded_dims=True))
    assert transform(every, action_dim=6).sample(end)["action_mask"][0].all()


def test_actions_round_trip_to_real_units():
    t = transform(action_dim=6)
    sample = raw()
    real = t.actions_to_real(t.sample(sample)["actions"][None], [t.robot.read(sample)])[0]
    assert real.shape == (HORIZON, 4)
    np.testing.assert_allclose(real, sample["actions"], atol=1e-4)


def test_target_is_supervised_only_when_asked():
    t = transform()
    on, off = t.sample(raw()), t.sample(raw(supervise_text=False))
    np.testing.assert_array_equal(on["target"]["loss"], on["target"]["valid"])
    assert not off["target"]["loss"].any()
    np.testing.assert_array_equal(on["target"]["ids"], off["target"]["ids"])
    assert TEMPLATES["subtask"].parse(t.tokenizer, on["target"]["ids"].tolist()) == raw()["subtask"]


def test_reprompted_samples_hold_the_prompt_of_an_action_only_row_with_the_subtask_as_its_task():
    text = dataclasses.replace(PLAIN.text, conditioning="reprompt")
    t = transform(dataclasses.replace(PLAIN, text=text))
    acting = transform(
        dataclasses.replace(PLAIN, text=dataclasses.replace(text, template="openpi", conditioning="append"))
    )
    row, plain = t.sample(raw()), transform().sample(raw())
    want = acting.sample(raw(prompt=raw()["subtask"]))["prompt"]
    for name, array in want.items():
        np.testing.assert_array_equal(row["action_prompt"][name], array)
    assert "action_prompt" not in plain
    for part in ("prompt", "target"):  # what is generated does not change
        for name, array in plain[part].items():
            np.testing.assert_array_equal(row[part][name], array)
    batch = collate([row, t.sample(question())])
    assert isinstance(batch, Batch) and batch.action_prompt is not None
    np.testing.assert_array_equal(batch.action_prompt.valid.sum(-1), [want["valid"].sum(), 1])
    with pytest.raises(UserError, match="budget"):
        t.sample(raw(subtask="very " * 20))


def test_action_only_template_writes_nothing():
    t = transform(dataclasses.replace(PLAIN, text=dataclasses.replace(PLAIN.text, template="openpi")))
    sample = raw()
    del sample["subtask"]
    assert not t.writes_text
    assert not t.sample(sample)["target"]["valid"].any()


def test_row_without_actions_trains_text_only():
    sample = raw()
    del sample["actions"]
    assert not transform().sample(sample)["action_mask"].any()


def question(**changes) -> dict:
    row = {"images": raw()["images"], "question": "is it red?", "answer": "yes", "template": "vqa"}
    return {k: v for k, v in {**row, **changes}.items() if v is not None}


def test_a_question_row_needs_neither_state_nor_actions():
    t = transform(state_dim=6)
    row = t.sample(question())
    n, m = int(row["prompt"]["valid"].sum()), int(row["target"]["valid"].sum())
    assert t.tokenizer.decode(row["prompt"]["ids"][:n].tolist()) == "answer en is it red?\n"
    assert t.tokenizer.decode(row["target"]["ids"][:m].tolist()) == "yes"
    assert set(row["target"]["kind"][:m].tolist()) == {Kind.ANSWER} and row["target"]["loss"][:m].all()
    assert not row["state"].any() and not row["action_mask"].any()
    same = t.sample(question(question=None, prompt="is it red?"))
    np.testing.assert_array_equal(same["prompt"]["ids"], row["prompt"]["ids"])
    # A state that is there is not thrown away, and one that does not fit is refused.
    assert t.sample(question(state=np.ones(4)))["state"][:4].any()
    with pytest.raises(UserError, match="must be 4 numbers"):
        t.sample(question(state=np.ones(3)))


def test_rows_of_several_templates_stack_to_one_batch():
    t = transform()
    batch = collate([t.sample(raw()), t.sample(question()), t.sample(raw(template="openpi"))])
    assert isinstance(batch, Batch)
    kinds = [set(np.asarray(batch.target.kind)[i][np.asarray(batch.target.valid)[i]].tolist()) for i in range(3)]
    assert kinds == [{Kind.SUBTASK}, {Kind.ANSWER}, set()]
    assert np.asarray(batch.action_mask).any((1, 2)).tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"template": "vqaa"}, "unknown template 'vqaa': choose one of vqa, "),
        ({"answer": None}, r"template 'vqa' .*sample\['answer'\], found None"),
        ({"question": " "}, r"observation\['question'\] must be a text"),
        ({"template": "subtask", "prompt": "go", "subtask": "pick"}, "must be 4 numbers"),
        ({"actions": np.zeros((HORIZON, 4)), "action_valid": np.ones(HORIZON, bool)}, "must be 4 numbers"),
    ],
)
def test_bad_questions_are_refused_by_name(changes, words):
    with pytest.raises(UserError, match=words):
        transform().sample(question(**changes))


def test_collate_makes_the_models_types():
    t = transform()
    batch, obs = collate([t.sample(raw())] * 3), collate([t.observation(raw())] * 2)
    assert isinstance(batch, Batch) and isinstance(obs, Observation)
    assert batch.actions.shape == (3, HORIZON, 4)
    assert obs.images.shape == (2, 2, 32, 32, 3)


FRONT = np.zeros((32, 32, 3), np.uint8)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"images": {"front": FRONT}},
            "camera 'wrist' is missing: the model reads images/front, images/wrist; found images/front",
        ),
        (
            {"images": {"front": FRONT, "wrist": FRONT + 2.0}},
            "image 'images/wrist' of camera 'wrist': a float image must lie in .*divide by 255",
        ),
        ({"images": {"front": FRONT[0], "wrist": FRONT}}, r"camera 'front' .*\[32, 3\]"),
        ({"images": {"front": FRONT[..., :1], "wrist": FRONT}}, r"camera 'front' .*\[32, 32, 1\]"),
        ({"images": None}, "camera 'front' is missing"),
        ({"masked": ["front", "wrist"]}, "every camera is masked"),
        ({"state": np.zeros(3)}, r"must be 4 numbers, found float64 \[3\]"),
        ({"state": np.array([0, 0, np.nan, 0])}, "not finite"),
        ({"state": ["a", "b", "c", "d"]}, "must be 4 numbers"),
        ({"state": None}, "must be 4 numbers"),
        ({"prompt": "  "}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": "put the block " * 40}, "budget"),
        ({"actions": np.zeros((HORIZON, 3))}, r"actions.*\[4 4\].*\[4, 3\]"),
        ({"actions": np.full((HORIZON, 4), np.inf)}, "finite"),
        ({"subtask": ""}, "annotate the data"),
        ({"subtask": None}, "annotate the data"),
        ({"subtask": "pick up " * 40}, "budget"),
    ],
)
def test_bad_samples_are_refused_by_name(changes, words):
    with pytest.raises(UserError, match=words):
        transform().sample(raw(**changes))


def test_robot_larger_than_the_model_is_refused():
    with pytest.raises(UserError, match=r"actions have 4 dimensions but model.action_dim is 3"):
        transform(action_dim=3)
