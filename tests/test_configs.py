"""Broken if this fails: a preset cannot be built, does not travel through a checkpoint, or a flag does not reach it."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from configs import HELP, PRESETS, get_preset
from openpi_ar import config_json
from openpi_ar.config import LeRobotData
from openpi_ar.data.robots import ROBOTS
from openpi_ar.errors import UserError
from openpi_ar.robot_spec import RobotSpec
from openpi_ar.text.segments import pack
from openpi_ar.text.templates import TEMPLATES
from openpi_ar.text.tokenizer import load_tokenizer
from openpi_ar.training import cli, experiment
from openpi_ar.training.optimizer import make_optimizer
from openpi_ar.training.state import init_state
from openpi_ar.worlds import datasets
from openpi_ar.worlds.tabletop.dataset import Demonstrations


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
    if not cfg.world:
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
    copy = config_json.loads(config_json.dumps(cfg))
    assert copy == cfg
    assert hash(copy) == hash(cfg)  # a static argument of jitted functions
    swapped = dataclasses.replace(
        cfg, data=LeRobotData(path="/x"), optimizer=dataclasses.replace(cfg.optimizer, ema_decay=None)
    )
    assert config_json.loads(config_json.dumps(swapped)) == swapped


def test_json_is_complete_and_flat_names_are_the_flags():
    cfg = PRESETS["debug"]
    body = json.loads(config_json.dumps(cfg))
    assert body["data"]["path"] == "world://tabletop?episodes=3&image_size=32x32" and body["world"] == "tabletop"
    assert body["model"]["siglip"]["image_size"] == [32, 32]
    flat = config_json.flatten(cfg)
    assert flat["model.vlm.width"] == 16 and flat["data.path"] == cfg.data.path


def test_a_run_on_the_tabletops_own_kind_of_data_reads_its_dataset():
    """Earlier versions had a dataclass for it, and pre-training steps among its fields."""
    body = json.loads(config_json.dumps(PRESETS["debug"]))
    old = {"type": "TabletopData", "episodes": 2200, "seed": 1, "image_size": [64, 48], "noise": 1.0, "cache_dir": None}
    old |= {"vision_steps": 5, "naming_steps": 6, "commanded": 0.5, "asked": [], "pairs": 0.6, "prompt_swap": 0.1}
    del body["world"]
    cfg = config_json.loads(json.dumps(body | {"data": old}))
    path = "world://tabletop?episodes=2200&seed=1&image_size=64x48&noise=1.0&commanded=0.5&pairs=0.6"
    assert (cfg.data, cfg.world) == (LeRobotData(path, prompt_swap=0.1), "tabletop")
    asked = config_json.loads(json.dumps(body | {"data": old | {"asked": ["red", "blue"]}})).data.path
    demos = datasets.parse(Demonstrations, asked.partition("?")[2], asked)
    assert (demos.episodes, demos.image_size, demos.asked, demos.pairs) == (2200, (64, 48), ("red", "blue"), 0.6)
    recorded = {"type": "LeRobotData", "path": "demos", "vision_steps": 1000, "naming_steps": 0}
    cfg = config_json.loads(json.dumps(body | {"data": recorded}))
    assert (cfg.data, cfg.world) == (LeRobotData("demos"), "")
    with pytest.raises(UserError, match="LeRobotData has no field dream_steps"):  # control: not every field is let go
        config_json.loads(json.dumps(body | {"data": recorded | {"dream_steps": 1}}))


def test_json_of_an_older_version_takes_defaults():
    body = json.loads(config_json.dumps(PRESETS["debug"]))
    del body["data"]["prompt_swap"], body["wandb"]
    assert config_json.loads(json.dumps(body)) == PRESETS["debug"]


def test_json_of_an_older_version_may_use_older_names():
    body = json.loads(config_json.dumps(PRESETS["debug"]))
    del body["loss"]["subtask_weight"], body["loss"]["answer_weight"]
    loss = config_json.loads(json.dumps(body | {"loss": body["loss"] | {"text_weight": 0.5}})).loss
    assert (loss.subtask_weight, loss.answer_weight, loss.action_token_weight) == (0.5, 0.5, 1.0)


def test_an_inference_config_says_what_it_is():
    robot = ROBOTS["droid"].of_model("pi05")
    for cfg in (PRESETS["debug"].inference, dataclasses.replace(PRESETS["debug"].inference, robot=robot)):
        text = config_json.dumps(cfg)
        assert json.loads(text)["type"] == "InferenceConfig"
        assert config_json.loads(text) == cfg
    with pytest.raises(UserError, match="InferenceConfig has no field exp_name"):
        config_json.loads(json.dumps({"type": "InferenceConfig", "exp_name": "x"}))


def test_robots_of_older_runs_are_read():
    """Before robots had one schema, a config held these fields of one, and the features beside them."""
    old = {
        "type": "LeRobotData",
        "path": "/x",
        "cameras": ["base=observation.images.top", "wrist=none"],
        "state": ["observation.state[0:7]"],
        "actions": ["action[0:7]"],
        "prompt": "",
        "robot": {
            "name": "arm",
            "delta_mask": [6, -1],
            "flips": [1, -1],
            "inverted_grippers": [6],
            "aloha_grippers": [],
        },
    }
    body = json.loads(config_json.dumps(PRESETS["debug"])) | {"data": old}
    plain = config_json.loads(
        json.dumps(body | {"data": old | {"state": ["observation.state"], "actions": ["action"]}})
    )
    assert (plain.data.state, plain.data.actions) == ((), ())  # what were the defaults are so still
    robot = config_json.loads(json.dumps(body)).data.reader(("base", "wrist"))
    assert robot == RobotSpec(
        name="arm",
        cameras={"observation.images.top": "base"},
        state={"observation.state[0:7]": 0},
        actions=("action[0:7]",),
        delta_mask=(6, -1),
        flips=(1, -1),
        inverted_grippers=(6,),
        unused=("*",),
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"modle": 1}, "no field modle"),
        ({"data": {"type": "RLDS"}}, "data must be one of LeRobotData, found 'RLDS'"),
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
        "--loss.knowledge-insulation --data.episodes 5 6 --model.dtype bfloat16 --resume"
    )
    cfg = args.config
    assert (args.resume, args.overwrite) == (True, False)
    assert (cfg.name, cfg.exp_name, cfg.model.vlm.width, cfg.data) == (
        "debug",
        "x",
        24,
        dataclasses.replace(PRESETS["debug"].data, episodes=(5, 6)),
    )
    assert cfg.model.siglip.image_size == (32, 64)
    assert cfg.optimizer.ema_decay is None and cfg.loss.knowledge_insulation and cfg.model.dtype == "bfloat16"
    # Everything else is the preset's.
    assert cfg.model.expert == PRESETS["debug"].model.expert


def test_full_size_preset_takes_a_worlds_data_through_flags():
    cfg = parse("--config pi05 --data.path world://tabletop?episodes=9 --model.cameras front wrist").config
    assert cfg.data == LeRobotData("world://tabletop?episodes=9")
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


@pytest.mark.parametrize("name", [n for n, c in PRESETS.items() if c.world == "tabletop"])
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


@pytest.mark.parametrize("flag", ["--data.vision-steps 0", "--data.naming_steps=0", "--data lerobot"])
def test_a_retired_flag_that_changes_nothing_is_left_out(flag):
    assert parse(f"--config debug {flag} --seed 3").config == parse("--config debug --seed 3").config


@pytest.mark.parametrize(
    ("flag", "advice"),
    [
        ("--data.vision-steps 100", "worlds.NAME pretrain"),
        ("--data.naming-steps", "worlds.NAME pretrain"),
        ("--data tabletop", "--data.path"),
        ("--data.commanded=0.5", "world://"),
        ("--loss.text-weight 2", "--loss.subtask-weight"),
    ],
)
def test_a_retired_flag_says_what_took_its_place(flag, advice):
    with pytest.raises(UserError, match=f"earlier version: .*{advice}"):
        parse(f"--config debug {flag}")
