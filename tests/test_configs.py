"""Broken if this fails: a preset cannot be built, does not travel through a checkpoint, or a flag does not reach it."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from configs import HELP, PRESETS, get_preset
from openpi_ar import config_json
from openpi_ar.config import LeRobotData, TabletopData
from openpi_ar.errors import UserError
from openpi_ar.text.segments import pack
from openpi_ar.text.templates import TEMPLATES
from openpi_ar.text.tokenizer import load_tokenizer
from openpi_ar.training import cli, experiment
from openpi_ar.training.optimizer import make_optimizer
from openpi_ar.training.state import init_state


def parse(line: str) -> cli.Arguments:
    return cli.parse(line.split(), HELP, get_preset)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_initialises_abstractly_at_full_size(name):
    cfg = PRESETS[name]
    experiment.check_config(cfg)
    state = jax.eval_shape(lambda: init_state(cfg, make_optimizer(cfg.optimizer, cfg.num_steps)))
    parameters = sum(x.size for x in jax.tree.leaves(state.model))
    average = sum(x.size for x in jax.tree.leaves(state.ema))
    assert average == (0 if cfg.optimizer.ema_decay is None else parameters)
    assert cfg.text.template in TEMPLATES
    if isinstance(cfg.data, LeRobotData):
        # PaliGemma 3B, Gemma 300M and their joints.
        adapters = 0.1e9 if "lora" in name else 0
        assert 3.2e9 < parameters < 3.4e9 + adapters
    else:
        assert parameters < 4e6


def test_full_size_towers_have_the_public_parameter_counts():
    cfg = PRESETS["pi0"]
    model = jax.eval_shape(lambda: init_state(cfg, make_optimizer(cfg.optimizer, cfg.num_steps))).model

    def count(part) -> int:
        return sum(x.size for x in jax.tree.leaves(part))

    # The published PaliGemma 3B has 2,923,466,480, of which 64 * 2048 pad the vocabulary from 257,152 to 257,216.
    assert count(model.img) + count(model.embedder) + count(model.vlm) == 2_923_466_480 - 64 * 2048
    assert count(model.expert) == 311_464_960


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip(name):
    cfg = PRESETS[name]
    assert config_json.loads(config_json.dumps(cfg)) == cfg
    swapped = dataclasses.replace(
        cfg, data=LeRobotData(path="/x"), optimizer=dataclasses.replace(cfg.optimizer, ema_decay=None)
    )
    assert config_json.loads(config_json.dumps(swapped)) == swapped


def test_json_is_complete_and_flat_names_are_the_flags():
    cfg = PRESETS["debug"]
    body = json.loads(config_json.dumps(cfg))
    assert body["data"]["type"] == "TabletopData"
    assert body["model"]["siglip"]["image_size"] == [32, 32]
    flat = config_json.flatten(cfg)
    assert flat["model.vlm.width"] == 16 and flat["data.type"] == "TabletopData" and flat["data.episodes"] == 3


def test_json_of_an_older_version_takes_defaults():
    body = json.loads(config_json.dumps(PRESETS["debug"]))
    del body["data"]["prompt_swap"], body["wandb"]
    assert config_json.loads(json.dumps(body)) == PRESETS["debug"]


def test_json_of_an_older_version_may_use_older_names():
    body = json.loads(config_json.dumps(PRESETS["debug"]))
    del body["loss"]["subtask_weight"], body["loss"]["answer_weight"]
    loss = config_json.loads(json.dumps(body | {"loss": body["loss"] | {"text_weight": 0.5}})).loss
    assert (loss.subtask_weight, loss.answer_weight, loss.action_token_weight) == (0.5, 0.5, 1.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"modle": 1}, "no field modle"),
        ({"data": {"type": "RLDS"}}, "TabletopData, LeRobotData, found 'RLDS'"),
        ({"model": 3}, "model"),
        ({"model": {"siglip": {"image_size": [3, 33]}}}, "patch_size"),
        ({"optimizer": {"lr": 1}}, "optimizer: OptimizerConfig has no field lr"),
    ],
)
def test_json_that_does_not_fit_is_refused(change, words):
    body = json.loads(config_json.dumps(PRESETS["debug"])) | change
    with pytest.raises(UserError, match=words):
        config_json.loads(json.dumps(body), source="f.json")
    with pytest.raises(UserError, match="not JSON"):
        config_json.loads("{", source="f.json")


def test_flags_reach_every_depth():
    args = parse(
        "--config debug --exp-name x --model.vlm.width 24 --model.siglip.image-size 32 64 --optimizer.ema-decay None "
        "--loss.knowledge-insulation --data.episodes 5 --model.dtype bfloat16 --resume"
    )
    cfg = args.config
    assert (args.resume, args.overwrite) == (True, False)
    assert (cfg.name, cfg.exp_name, cfg.model.vlm.width, cfg.data) == (
        "debug",
        "x",
        24,
        dataclasses.replace(PRESETS["debug"].data, episodes=5),
    )
    assert cfg.model.siglip.image_size == (32, 64)
    assert cfg.optimizer.ema_decay is None and cfg.loss.knowledge_insulation and cfg.model.dtype == "bfloat16"
    # Everything else is the preset's.
    assert cfg.model.expert == PRESETS["debug"].model.expert


def test_full_size_preset_takes_tabletop_data_through_flags():
    cfg = parse("--config pi05 --data tabletop --data.episodes 9 --model.cameras front wrist").config
    assert cfg.data == TabletopData(episodes=9)
    assert cfg.model.cameras == ("front", "wrist")


def test_help_lists_the_presets_and_a_presets_fields(capsys):
    for line, words in (
        ("--help", [*PRESETS, "--resume", "--overwrite"]),
        ("--config debug --help", ["--model.vlm.width", "--data.prompt-swap", "--optimizer.peak-lr"]),
    ):
        with pytest.raises(SystemExit) as e:
            parse(line)
        assert e.value.code == 0
        out = capsys.readouterr().out
        assert all(word in out for word in words)


@pytest.mark.parametrize("name", [n for n, c in PRESETS.items() if isinstance(c.data, TabletopData)])
def test_text_budgets_hold_everything_the_tabletop_says(name):
    from openpi_ar.worlds.tabletop.tasks import known_prompts, known_subtasks

    text, tok = PRESETS[name].text, load_tokenizer("embedded")
    assert tok.vocab_size <= PRESETS[name].model.vocab_size
    states = np.random.default_rng(0).uniform(-1.2, 1.2, (5, 4))
    template = TEMPLATES[text.template]
    longest = max(len(tok.encode(template.prompt_text(p, s))) + 1 for p in known_prompts() for s in states)
    assert longest <= text.max_prompt_tokens
    if template.target is not None:
        for subtask in known_subtasks():
            assert pack(tok, template.target_segments(subtask), text.max_target_tokens)["valid"].any()
