"""If this fails, `python infer.py --question` no longer answers about a user's images, or ends bad input with a traceback."""

import dataclasses
import json
from pathlib import Path

import numpy as np
from PIL import Image
import pytest

import infer
from openpi_ar.checkpoints import export
from openpi_ar.model_config import VitConfig
from openpi_ar.models import family
from openpi_ar.params import flatten
from openpi_ar.policy import load_talker, show
from openpi_ar.policy.checkpoint import check_talks
from tests.checkpoint_fixtures import CFG, abstract, write
from tests.model_fixtures import random_like, tiny_config
from tests.policy.test_talker import CFG as PALIGEMMA
from tests.policy.test_talker import IMAGE, paligemma_like
from tests.test_infer import fails


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A PaliGemma with its tokenizer, two pictures, and files that are none."""
    where = tmp_path_factory.mktemp("questions")
    (where / "ckpt").mkdir()
    export.save_safetensors(where / "ckpt", flatten(random_like(family.abstract(PALIGEMMA), 0.3)), PALIGEMMA, "torch")
    (where / "ckpt" / "tokenizer.model").write_bytes(paligemma_like())
    Image.fromarray(IMAGE).save(where / "a.png")
    Image.fromarray(IMAGE[::-1]).save(where / "b=1.png")
    (where / "empty.png").write_bytes(b"")
    (where / "cut.png").write_bytes((where / "a.png").read_bytes()[:300])
    (where / "text.png").write_text("hello")
    np.savez(where / "none.npz", image=IMAGE[:0])
    return where


def test_a_plain_paligemma_answers(folder, capsys):
    argv = ["--ckpt", str(folder / "ckpt"), "--images", str(folder / "a.png"), str(folder / "b=1.png")]
    infer.main([*argv, "--question", "what is on the table?", "--json", str(folder / "o.json")])
    written = json.loads((folder / "o.json").read_text())
    want = load_talker(folder / "ckpt").answer([IMAGE, IMAGE[::-1]], "what is on the table?")
    assert written["answer"] == want["answer"] and written["prompt"] == "what is on the table?"
    np.testing.assert_allclose(written["logprobs"], want["logprobs"], atol=1e-4)
    assert f"answer:  {want['answer']}" in capsys.readouterr().out


def test_a_detection_is_listed_drawn_and_written(folder, capsys, monkeypatch):
    said = "<loc0256><loc0512><loc0768><loc1023> red $cup <loc0000>"
    monkeypatch.setattr("openpi_ar.text.tokenizer.Tokenizer.decode", lambda self, ids: said)
    argv = ["--ckpt", str(folder / "ckpt"), "--images", str(folder / "a.png"), "--question", "detect red cup"]
    infer.main([*argv, "--json", str(folder / "d.json"), "--plot", str(folder / "d.png")])
    (box,) = json.loads((folder / "d.json").read_text())["boxes"]
    assert box["label"] == "red $cup" and box["code"] is None
    np.testing.assert_allclose(box["box"], (10, 15, 30, 30 * 1023 / 1024))  # of 40 x 30 pixels
    out = capsys.readouterr().out
    assert "red $cup" in out and "15.0" in out and "note: 1 <loc> or <seg> tokens" in out
    with Image.open(folder / "d.png") as drawn:
        assert drawn.size[0] > 300


def test_the_box_is_drawn_where_it_is(tmp_path):
    """Its colour is on its sides and neither inside nor outside."""
    box = {"label": "", "box": (50.0, 25.0, 150.0, 75.0), "code": None}
    show.draw_boxes(tmp_path / "d.png", np.zeros((200, 100, 3), np.uint8), {"prompt": "", "answer": "", "boxes": [box]})
    drawn = np.asarray(Image.open(tmp_path / "d.png").convert("RGB")).astype(int)
    dark = np.argwhere(drawn.sum(-1) == 0)
    (top, left), (bottom, right) = dark.min(0), dark.max(0)
    blue = np.argwhere((drawn[..., 2] - drawn[..., 0] > 80)[top:bottom, left:right])
    scale = (bottom - top) / 200
    np.testing.assert_allclose(blue.min(0) / scale, (50, 25), atol=3)
    np.testing.assert_allclose(blue.max(0) / scale, (150, 75), atol=3)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (["--question", "  "], ["--question is empty"]),
        (["--images", "empty.png"], ["empty.png", "is not a readable image"]),
        (["--images", "cut.png"], ["cut.png", "is not a readable image"]),
        (["--images", "text.png"], ["text.png", "is not a readable image"]),
        (["--images", "nowhere.png"], ["'nowhere.png' does not exist"]),
        (["--images", "a.png", "x=a.png"], ["camera=file", "'a.png'"]),
        (["--images", "x="], ["camera=file", "'x='"]),
        (["--observation", "none.npz"], ["image must be", "one pixel or more", "[0, 30, 3]"]),
        (["--question", "what " * 300], ["tokens but the budget is"]),
        (["--robot", "droid"], ["no action tower"]),
    ],
)
def test_bad_questions_are_one_line(folder, capsys, monkeypatch, change, parts):
    monkeypatch.chdir(folder)
    given = {"--images": ["a.png"], "--question": ["what is it?"]}
    given |= {change[0]: change[1:]}
    if change[0] == "--observation":
        del given["--images"]
    argv = [word for flag, values in given.items() for word in (flag, *values)]
    message = fails(["--ckpt", "ckpt", *argv], capsys)
    assert [part for part in parts if part not in message] == []


def test_a_question_about_no_image_says_what_is_missing(folder, capsys):
    message = fails(["--ckpt", str(folder / "ckpt"), "--question", "what?"], capsys)
    assert "no action tower" in message and "--images a.png" in message
    assert "no action tower" in fails(["--ckpt", str(folder / "ckpt")], capsys)


def test_numbers_that_are_none_are_one_line(folder, tmp_path, capsys):
    model = random_like(family.abstract(PALIGEMMA), 0.3)
    model.vlm.norm.scale[...] = model.vlm.norm.scale[...] * np.nan
    export.save_safetensors(tmp_path, flatten(model), PALIGEMMA, "torch")
    (tmp_path / "tokenizer.model").write_bytes(paligemma_like())
    argv = ["--ckpt", str(tmp_path), "--images", str(folder / "a.png"), "--question", "what?"]
    with pytest.warns(UserWarning, match="not finite"):
        assert "logits are NaN" in fails(argv, capsys)


def test_what_only_acts_is_not_asked(folder, tmp_path, capsys):
    """A run of actions from nothing, a pi0 of openpi's; but a pi0.5 of openpi's answers."""
    asked = ["--images", str(folder / "a.png"), "--question", "what?"]
    acts = dataclasses.replace(CFG, text=dataclasses.replace(CFG.text, template="openpi"))
    write(tmp_path / "acts", acts, [random_like(abstract(acts), 0.3)])
    message = fails(["--ckpt", str(tmp_path / "acts"), *asked], capsys)
    assert "only acts" in message and "'openpi', which writes no text" in message
    both = dataclasses.replace(acts, data=dataclasses.replace(acts.data, questions=0.5))
    write(tmp_path / "both", both, [random_like(abstract(both), 0.3)])
    check_talks(tmp_path / "both")
    for pi05 in (False, True):
        vit = VitConfig(width=24, depth=2, mlp_dim=40, num_heads=2, patch_size=8, image_size=(16, 16))
        cfg = tiny_config(pi05=pi05, vocab_size=1600, siglip=vit)
        target = tmp_path / cfg.kind
        target.mkdir()
        export.save_safetensors(target, flatten(random_like(family.abstract(cfg), 0.3)), cfg, "torch")
        (target / "tokenizer.model").write_bytes(paligemma_like())
        if pi05:
            # A robot's model: its images are fitted in, and it takes neither state nor robot.
            infer.main(["--ckpt", str(target), *asked])
            assert "answer:" in capsys.readouterr().out
        else:
            assert "is a pi0, which was not trained to write text" in fails(["--ckpt", str(target), *asked], capsys)
