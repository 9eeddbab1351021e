"""If this fails, a checkpoint that talks does not answer as its model does, or places its boxes elsewhere than in the image."""

import dataclasses
import io
from pathlib import Path

import jax
import numpy as np
import pytest
import sentencepiece

from openpi_ar.algorithms.generate import generate
from openpi_ar.algorithms.prefill import prefill
from openpi_ar.algorithms.sampling import Sampling
from openpi_ar.checkpoints import export
from openpi_ar.config import DecodeConfig, TextConfig
from openpi_ar.errors import UserError
from openpi_ar.images import fit, unfit
from openpi_ar.model_config import PaliGemmaConfig, TowerConfig, VitConfig
from openpi_ar.models import family
from openpi_ar.params import flatten
from openpi_ar.policy import Policy, Talker, load, load_talker
from openpi_ar.policy import talker as talkers
from openpi_ar.text.places import Place, find_places
from openpi_ar.text.templates import TEMPLATES, question_template
from openpi_ar.text.tokenizer import Tokenizer
from openpi_ar.types import Observation, Tokens
from tests.model_fixtures import random_like

LOCS = [f"<loc{i:04d}>" for i in range(1024)]
SEGS = [f"<seg{i:03d}>" for i in range(128)]
RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (40, 30, 3), np.uint8)
CFG = PaliGemmaConfig(
    siglip=VitConfig(width=24, depth=2, mlp_dim=40, num_heads=3, patch_size=14, image_size=(28, 42)),
    vlm=TowerConfig(width=48, depth=2, mlp_dim=96, num_heads=4, num_kv_heads=2, head_dim=16),
    vocab_size=1600,
    dtype="float32",
)


def paligemma_like() -> bytes:
    """A small SentencePiece model with PaliGemma's special pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["what is on the table", "detect cup ; plate", "answer en caption"] * 4),
        model_writer=model,
        model_type="bpe",
        vocab_size=1500,
        hard_vocab_limit=False,
        byte_fallback=True,
        minloglevel=2,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        add_dummy_prefix=False,
        user_defined_symbols=["\n", *LOCS, *SEGS],
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A random PaliGemma of transformers' layout with a tokenizer beside it."""
    folder = tmp_path_factory.mktemp("paligemma")
    model = random_like(family.abstract(CFG), 0.3)
    export.save_safetensors(folder, flatten(model), CFG, "torch")
    (folder / "tokenizer.model").write_bytes(paligemma_like())
    return folder


@pytest.fixture(scope="module")
def talker(checkpoint) -> Talker:
    return load_talker(checkpoint)


def ids_by_hand(talker: Talker, images: list[np.ndarray], prompt: str, allowed=None, steps: int = 128) -> list[int]:
    """Greedy ids of the stacked model, without programs or padding."""
    tok, size = talker.tokenizer, CFG.siglip.image_size
    pixels = np.stack([fit(image, *size, keeps_aspect=False) for image in images])[None]
    ids = np.array([[tok.bos_id, *tok.encode(prompt)]], np.int32)
    obs = Observation(pixels, np.ones((1, len(images)), bool), Tokens.of(ids), np.zeros((1, 0), np.float32))
    model = talker._model
    out, cache = jax.jit(prefill)(model, obs)
    made, _ = jax.jit(generate)(model, cache, out.prompt_last, Sampling(tok.eos_id, steps, constraint=allowed))
    return np.asarray(made.ids)[0][np.asarray(made.valid)[0]].tolist()


@pytest.mark.parametrize(
    ("question", "prompt"),
    [
        ("what is on the table?", "answer en what is on the table?\n"),
        ("  what_is it?\n", "answer en what is it?\n"),
        ("answer de was ist das?", "answer de was ist das?\n"),
        ("caption en", "caption en\n"),
        ("detect red_cup ; plate", "detect red_cup ; plate\n"),
        ("segment cup", "segment cup\n"),
        ("describe the table", "answer en describe the table\n"),
        ("detect", "answer en detect\n"),
        ("answering machines?", "answer en answering machines?\n"),
    ],
)
def test_prompts_of_paligemma_go_through_as_typed(question, prompt):
    assert question_template(question).prompt_text(question) == prompt


def test_the_answer_is_the_models_own(talker):
    """Also with two images; both templates' prompts; and the program's padding changes nothing."""
    for images in ([IMAGE], [IMAGE, IMAGE[::-1]]):
        for question in ("what is on the table?", "caption en"):
            prompt = question_template(question).prompt_text(question)
            ids = ids_by_hand(talker, images, prompt, talker._answers.constraint)
            assert talker.answer(images, question)["answer"] == TEMPLATES["vqa"].parse(talker.tokenizer, ids)
    assert talker.answer(IMAGE, "caption en")["answer"] == talker.answer({"any name": IMAGE}, "caption en")["answer"]
    assert talker.answer(IMAGE, "caption en")["answer"] != talker.answer(IMAGE[::-1], "caption en")["answer"]


def test_places_may_be_written_where_they_are_asked_for_and_nowhere_else(checkpoint, talker):
    tok = talker.tokenizer
    assert tok.places.sum() == 1024 + 128 and not (tok.places & tok.allowed_text).any()
    ids = ids_by_hand(talker, [IMAGE], "detect cup\n", talker._pointing.constraint)
    answer = talker.answer(IMAGE, "detect cup")
    assert answer["answer"] == TEMPLATES["paligemma"].parse(tok, ids)
    assert "<loc" in answer["answer"] or "<seg" in answer["answer"]  # 1,152 of 1,500 ids of a random model
    assert "<loc" not in talker.answer(IMAGE, "what is it?")["answer"]
    assert answer["stray_tokens"] == answer["answer"].count("<loc") + answer["answer"].count("<seg") - sum(
        4 + len(box["code"] or ()) for box in answer["boxes"]
    )
    # No id of PaliGemma's own vocabulary is an action token; of a robot model's the last ones are.
    plain, robot = tok, Tokenizer(tok.model_bytes)
    assert plain.allowed_text.sum() > robot.allowed_text.sum()


def test_boxes_are_in_pixels_of_the_users_image(talker, monkeypatch):
    said = (
        "<loc0256><loc0512><loc0768><loc1023> red cup ; <loc0000><loc0000><loc0512><loc0512>"
        + "".join(SEGS[:16])
        + " plate <loc0001>"
    )
    monkeypatch.setattr(talkers.Tokenizer, "decode", lambda self, ids: said)
    answer = talker.answer(IMAGE, "detect red cup ; plate")  # 40 x 30, stretched
    assert [box["label"] for box in answer["boxes"]] == ["red cup", "plate"]
    np.testing.assert_allclose(answer["boxes"][0]["box"], (10, 15, 30, 30 * 1023 / 1024))
    np.testing.assert_allclose(answer["boxes"][1]["box"], (0, 0, 20, 15))
    assert [box["code"] for box in answer["boxes"]] == [None, tuple(range(16))]
    assert answer["stray_tokens"] == 1


def test_boxes_come_back_from_under_the_black_borders():
    """A corner marked in the original is where `unfit` says, through either way to the model's size."""
    image = np.zeros((100, 50, 3), np.uint8)
    image[60:80, 10:40] = 255
    for keeps in (True, False):
        seen = fit(image, 224, 336, keeps_aspect=keeps)[..., 0] > 127
        rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
        box = (rows[0] / 224, columns[0] / 336, (rows[-1] + 1) / 224, (columns[-1] + 1) / 336)
        np.testing.assert_allclose(unfit(box, (100, 50), 224, 336, keeps_aspect=keeps), (60, 10, 80, 40), atol=0.5)
    assert unfit((0.0, 0.0, 1.0, 1.0), (100, 50), 224, 336, keeps_aspect=True) == (0, 0, 100, 50)


def test_answers_that_are_no_detections():
    assert find_places("no cup") == ([], 0)
    assert find_places("<loc0001><loc0002><loc0003>cup") == ([], 3)
    assert find_places("<loc0001><loc0002><loc0003><loc0004>") == ([Place("", (1, 2, 3, 4))], 0)
    assert find_places("<loc9999>" * 4 + "<seg001>" * 3 + " cup")[1] == 3


def test_bfloat16_is_computed_in_bfloat16(checkpoint):
    half = load_talker(checkpoint, dtype="bfloat16")
    assert half._model.cfg.dtype == "bfloat16" and half._model.embedder.table[...].dtype == "bfloat16"
    assert isinstance(half.answer(IMAGE, "caption en")["answer"], str)


@pytest.mark.parametrize(
    ("images", "question", "words"),
    [
        (IMAGE, "  ", "question is empty"),
        ([], "what?", "no image"),
        (IMAGE[:0], "what?", r"image 1 must be a uint8 RGB image .* one pixel or more, found uint8 \[0, 30, 3\]"),
        ([IMAGE, IMAGE[..., 0]], "what?", r"image 2 .* found uint8 \[40, 30\]"),
        ({"x": IMAGE * 1.0}, "what?", "must lie in"),
        (IMAGE, "what " * 300, "tokens but the budget is"),
    ],
)
def test_what_is_no_question_or_no_image(talker, images, question, words):
    with pytest.raises(UserError, match=words):
        talker.answer(images, question)


def test_logits_that_are_not_numbers(checkpoint):
    broken = load_talker(checkpoint)
    broken._model.vlm.norm.scale[...] = broken._model.vlm.norm.scale[...] * np.nan
    with pytest.raises(UserError, match="logits are NaN"):
        broken.answer(IMAGE, "what?")


def test_it_cannot_act_and_says_so(checkpoint):
    policy = load(checkpoint)
    assert isinstance(policy, Talker) and not isinstance(policy, Policy)
    with pytest.raises(UserError, match="no action tower"):
        policy.infer({})
    with pytest.raises(UserError, match="no action tower"):
        Policy.from_checkpoint(checkpoint)


def test_a_tokenizer_is_needed(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENPI_DATA_HOME", str(tmp_path))
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    with pytest.raises(UserError, match="PaliGemma's tokenizer is not in the cache"):
        load_talker(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes((checkpoint / "tokenizer.model").read_bytes())
    assert load_talker(tmp_path).tokenizer.vocab_size == load_talker(checkpoint).tokenizer.vocab_size
    with pytest.raises(UserError, match="has 1[0-9]+ pieces but the model reads 1000"):
        small = dataclasses.replace(CFG, vocab_size=1000)
        tok = Tokenizer(paligemma_like())
        Talker(random_like(family.abstract(small), 0.3), tok, TextConfig(), DecodeConfig())


def test_a_policy_answers_as_the_talker_of_its_checkpoint(tiny_checkpoint, tiny_policy):
    """Without a robot, a state and statistics; the same images by their names, in order, or in an observation."""
    talker = load_talker(tiny_checkpoint)
    images = {"wrist": IMAGE, "front": IMAGE[::-1].copy()}
    ordered = [images["front"], images["wrist"]]
    want = tiny_policy.answer({"images": images}, "what is it?")["logprobs"].tolist()
    for policy, shown in ((talker, images), (talker, ordered), (tiny_policy, ordered)):
        assert policy.answer(shown, "what is it?")["logprobs"].tolist() == want
    assert talker.answer(ordered[::-1], "what is it?")["logprobs"].tolist() != want
    with pytest.raises(UserError, match="no camera 'top': it reads front, wrist"):
        talker.answer({"top": IMAGE}, "what?")
