"""If this fails, a fine-tune of LeRobot is fed by other statistics, cameras or prompts than it was trained with, or LeRobot
cannot read what we write."""

import json
from pathlib import Path
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from openpi_ar.checkpoints import __main__ as cli
from openpi_ar.checkpoints import assets, lerobot, lerobot_write
from openpi_ar.checkpoints.load import inspect
from openpi_ar.checkpoints.options import LoadOptions
from openpi_ar.data.normalize import NormStats, save_norm_stats
from openpi_ar.data.robots import ROBOTS
from openpi_ar.errors import UserError
from openpi_ar.policy import checkpoint as policies
from openpi_ar.robot_spec import make_mask
from openpi_ar.text.tokenizer import load_tokenizer
from tests.format_fixtures import GOLDEN, LEROBOT, STATISTICS, processors

# LeRobot's own definitions (`lerobot/policies/pi0/configuration_pi0.py`, `pi05`, `configs/policies.py`) of 0.4.
NAMES = (
    "type n_obs_steps input_features output_features device use_amp use_peft push_to_hub repo_id private tags license "
    "pretrained_path paligemma_variant action_expert_variant dtype chunk_size n_action_steps max_state_dim "
    "max_action_dim num_inference_steps image_resolution empty_cameras tokenizer_max_length normalization_mapping"
)
FIELDS = set(NAMES.split())
RELATIVE = ["use_relative_actions", "relative_exclude_joints", "action_feature_names"]


def by_lerobot(x: np.ndarray, norm: str) -> np.ndarray:
    """`_apply_transform` of LeRobot's `normalize_processor.py`."""
    s = {name: np.float32(array) for name, array in STATISTICS.items()}
    if norm == "IDENTITY":
        return x
    if norm == "MEAN_STD":
        return (x - s["mean"]) / (s["std"] + 1e-8)
    low, high = {"MIN_MAX": ("min", "max"), "QUANTILES": ("q01", "q99"), "QUANTILE10": ("q10", "q90")}[norm]
    return 2 * (x - s[low]) / (s[high] - s[low]) - 1


def change(folder: Path, **fields) -> None:
    body = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(body | fields))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, Path]:
    """A pi0 and a pi0.5 of LeRobot's, on cameras of its own, without statistics."""
    root = tmp_path_factory.mktemp("trained")
    shape = lambda n: {"type": "STATE", "shape": [n]}
    for kind in ("pi0", "pi05"):
        cli.main(["convert", str(GOLDEN / kind), str(root / kind), "--to", "lerobot", "--action-horizon", "4"])
        heads = {"siglip_heads": 2, "num_kv_heads": 1}  # as no LeRobot of this size exists
        inputs = {f"observation.images.{c}": {"type": "VISUAL", "shape": [3, 64, 64]} for c in ("image", "image2")}
        inputs |= {
            "observation.state": shape(8),
            "observation.images.empty_camera_0": inputs["observation.images.image"],
        }
        change(root / kind, input_features=inputs, output_features={"action": shape(8) | {"type": "ACTION"}}, **heads)
        for file in (*(root / kind).glob(lerobot.FILES), root / kind / "assets" / "config.json"):
            file.unlink()
    return {kind: root / kind for kind in ("pi0", "pi05")}


@pytest.fixture
def tune(trained, tmp_path):
    return lambda kind="pi05": Path(shutil.copytree(trained[kind], tmp_path / "tune"))


def said(folder: Path, **options) -> assets.Said:
    looked = inspect(folder)
    return assets.read(looked.matched.source, looked.acting(), **options)


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
@pytest.mark.parametrize(
    ("state", "action"),
    [("QUANTILES", "QUANTILES"), ("MEAN_STD", "MEAN_STD"), ("MIN_MAX", "IDENTITY"), ("IDENTITY", "QUANTILE10")],
)
def test_statistics_of_processors_are_applied_as_lerobot_does(tune, tmp_path, kind, state, action):
    folder = processors(tune(kind), state, action)
    x = np.random.default_rng(1).normal(size=(5, 8))
    for copy in (folder, tmp_path / "ours"):
        stats = said(copy).stats
        np.testing.assert_allclose(stats["state"].normalize(x), by_lerobot(x, state), atol=2e-5)
        np.testing.assert_allclose(stats["actions"].unnormalize(by_lerobot(x, action)), x, atol=2e-5)
        if copy is folder:  # ours has them too, in the one way that openpi applies to this kind of model
            cli.main(["convert", str(folder), str(tmp_path / "ours"), "--to", "ours"])
    assert stats["state"].mode == stats["actions"].mode == {"pi0": "z_score", "pi05": "quantile"}[kind]
    # And back: LeRobot's own files, whatever else they hold.
    cli.main(["convert", str(tmp_path / "ours"), str(tmp_path / "back"), "--to", "lerobot"])
    kept = sorted(file.name for file in folder.glob(lerobot.FILES))
    assert kept == sorted(file.name for file in (tmp_path / "back").glob(lerobot.FILES)) and len(kept) == 4
    assert all((folder / name).read_bytes() == (tmp_path / "back" / name).read_bytes() for name in kept)
    # Unless the statistics are others since.
    save_norm_stats(
        tmp_path / "ours" / "assets", {name: s.floored() for name, s in dict.fromkeys(stats, changed(stats)).items()}
    )
    cli.main(["convert", str(tmp_path / "ours"), str(tmp_path / "changed"), "--to", "lerobot"])
    np.testing.assert_allclose(said(tmp_path / "changed").stats["state"].mean, 7)


def changed(stats: dict[str, NormStats]) -> NormStats:
    ones = np.ones(8)
    return NormStats(7 * ones, ones, 6 * ones, 8 * ones, stats["state"].mode)


def test_statistics_among_the_parameters(tune):
    """LeRobot before 0.4; buffers that were never set are infinite."""
    folder = tune("pi0")
    tensors = load_file(folder / "model.safetensors")
    for value in (1.0, np.inf):
        for where, feature in (("normalize_inputs", "observation_state"), ("unnormalize_outputs", "action")):
            for name in ("mean", "std"):
                tensors[f"model.{where}.buffer_{feature}.{name}"] = np.float32(value * STATISTICS[name])
        save_file(tensors, folder / "model.safetensors")
        stats = said(folder).stats
        if value == 1.0:
            np.testing.assert_allclose(stats["state"].mean, STATISTICS["mean"], rtol=1e-6)
            np.testing.assert_allclose(stats["actions"].std, STATISTICS["std"], rtol=1e-6)
    assert stats is None


def test_a_fine_tune_needs_no_robot(tune, monkeypatch):
    monkeypatch.setattr(policies, "load_tokenizer", lambda name: load_tokenizer("embedded"))
    folder = processors(
        tune(), "QUANTILES", "QUANTILES", renames={"observation.images.front": "observation.images.image"}
    )
    change(folder, tokenizer_max_length=77, num_inference_steps=5)
    parts = policies.load_policy_parts(folder)
    robot = parts.cfg.robot
    assert parts.cfg.model.cameras == ("image", "image2", "empty_camera_0")
    assert list(robot.cameras.values()) == ["image", "image2"]  # the third is masked
    assert next(iter(robot.cameras)) == "observation.images.front|observation.images.image"
    assert (robot.state, robot.action_dims, robot.delta_mask) == ({"observation.state": 8}, 8, ())
    assert (parts.cfg.text.template, parts.cfg.text.max_prompt_tokens, parts.cfg.decode.denoise_steps) == (
        "openpi",
        77,
        5,
    )
    assert parts.cfg.model.action_horizon == 4


@pytest.mark.parametrize("through", ["", "ours", "torch"])
def test_a_robots_cameras_are_the_models_in_order(tune, tmp_path, monkeypatch, through):
    monkeypatch.setattr(policies, "load_tokenizer", lambda name: load_tokenizer("embedded"))
    folder = processors(tune(), "QUANTILES", "QUANTILES")
    if through:
        cli.main(["convert", str(folder), str(tmp_path / through), "--to", through])
        folder = tmp_path / through
    parts = policies.load_policy_parts(folder, "libero")
    assert parts.cfg.robot.cameras == {"observation/image": "image", "observation/wrist_image": "image2"}
    assert any("observation/image is image" in note for note in parts.notes)
    # LeRobot's prompt, not that of openpi's model for LIBERO.
    assert parts.cfg.text.template == "openpi" and ROBOTS["libero"].variant("pi05").template == "openpi_pi0"
    with pytest.raises(UserError, match="robot aloha sends 3 images .* but the model reads 2 .image, image2.: write"):
        policies.load_policy_parts(folder, "aloha")


def test_relative_actions(tune):
    names = ["shoulder", "elbow", "wrist", "gripper.pos"]
    folder = processors(tune(), "QUANTILES", "QUANTILES", exclude_joints=["Gripper"], action_names=names)
    assert said(folder).config.robot.delta == make_mask(3, -1, 4)


def test_no_statistics_at_all_is_said(tune):
    with pytest.raises(UserError, match="holds no normalisation statistics"):
        policies.load_policy_parts(tune())


@pytest.mark.parametrize(
    ("file", "body", "words"),
    [
        ("policy_preprocessor.json", "[]", "expected a JSON object"),
        ("policy_preprocessor.json", '{"steps": {}}', "steps must be a list"),
        ("policy_postprocessor.json", '{"steps": [{"registry_name": "unnormalizer_processor", "state_file": "../x"}]}', "'../x'"),
        ("policy_preprocessor.json", '{"steps": [{"registry_name": "normalizer_processor", "config": 3}]}', "must be an object"),
        ("policy_preprocessor_step_1_normalizer_processor.safetensors", "{}", "cannot be read as safetensors"),
    ],
)  # fmt: skip
def test_damaged_processors_are_one_line(tune, file, body, words):
    folder = processors(tune(), "QUANTILES", "QUANTILES")
    (folder / file).write_text(body)
    with pytest.raises(UserError, match=words) as e:
        said(folder)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("norm", "words"), [("NONE", "expected one of IDENTITY, MEAN_STD"), ("QUANTILE10", "lacks q10, q90")]
)
def test_a_way_to_normalise_that_is_not_there(tune, norm, words, monkeypatch):
    monkeypatch.delitem(STATISTICS, "q10")
    monkeypatch.delitem(STATISTICS, "q90")
    with pytest.raises(UserError, match=words):
        said(processors(tune(), norm, "QUANTILES"))


# ----------------------------------------------------------------------------------------------------------------------
# what we write
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_processors_are_written_as_lerobot_writes_them(tmp_path, kind):
    source = tmp_path / "openpi"
    shutil.copytree(GOLDEN / kind, source)
    stats = NormStats(*(np.asarray(STATISTICS[name][:7]) for name in ("mean", "std", "q01", "q99")), mode="z_score")
    if kind == "pi05":
        stats = NormStats(stats.mean, stats.std, stats.q01, stats.q99)
    save_norm_stats(source / "assets" / "arm", {"state": stats, "actions": stats})
    cli.main(["convert", str(source), str(tmp_path / "out"), "--to", "lerobot"])
    names = {"pi0": ["rename_observations_processor", "to_batch_processor", "pi0_new_line_processor", "tokenizer_processor",
                     "device_processor", "normalizer_processor"],
             "pi05": ["rename_observations_processor", "to_batch_processor", "normalizer_processor",
                      "pi05_prepare_state_tokenizer_processor_step", "tokenizer_processor", "device_processor"]}  # fmt: skip
    pre, post = (json.loads((tmp_path / "out" / f"policy_{x}processor.json").read_text()) for x in ("pre", "post"))
    assert pre["name"] == "policy_preprocessor"
    assert [step["registry_name"] for step in pre["steps"]] == names[kind]
    assert [step["registry_name"] for step in post["steps"]] == ["unnormalizer_processor", "device_processor"]
    at = names[kind].index("normalizer_processor")
    assert pre["steps"][at]["state_file"] == f"policy_preprocessor_step_{at}_normalizer_processor.safetensors"
    tensors = load_file(tmp_path / "out" / pre["steps"][at]["state_file"])
    np.testing.assert_allclose(tensors["observation.state.q99"], stats.q99, rtol=1e-6)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert set(config) <= FIELDS  # LeRobot refuses others
    # LeRobot cuts the model's actions to this before it applies statistics of as many dimensions.
    assert config["output_features"]["action"]["shape"] == [7] == config["input_features"]["observation.state"]["shape"]
    norm = {"pi0": "MEAN_STD", "pi05": "QUANTILES"}[kind]
    assert pre["steps"][at]["config"]["norm_map"] == {"VISUAL": "IDENTITY", "STATE": norm, "ACTION": norm}
    assert config["normalization_mapping"] == pre["steps"][at]["config"]["norm_map"]


def test_relative_actions_are_written_and_read_back(tune, tmp_path):
    folder = processors(tune(), "QUANTILES", "QUANTILES", exclude_joints=["b"], action_names=["a", "b", "c"])
    for file in (folder / "assets").glob("*"):
        file.unlink()
    cfg = said(folder).inference
    theirs = dict.fromkeys(("state", "actions"), changed({"state": said(folder).stats["state"]}))
    lerobot_write.write(tmp_path, cfg, theirs, "float16")
    config = json.loads((tmp_path / "config.json").read_text())
    assert set(config) <= {*FIELDS, *RELATIVE} and config["dtype"] == "float32" and config["use_relative_actions"]
    back, stats = lerobot.read(tmp_path, config, None, cfg.model)
    assert back.robot.delta == cfg.robot.delta == make_mask(1, -1, 6)
    assert assets.same_map(stats, theirs)


def test_statistics_longer_than_the_robot_are_cut(tune, tmp_path):
    """openpi's may be padded to the model's dimensions; LeRobot applies them to the features as they are."""
    cfg = said(processors(tune(), "QUANTILES", "QUANTILES")).inference
    padded = NormStats(*(np.pad(STATISTICS[name], (0, 24)) for name in ("mean", "std", "q01", "q99")))
    lerobot_write.write(tmp_path, cfg, {"state": padded, "actions": padded}, "float32")
    _, stats = lerobot.read(tmp_path, json.loads((tmp_path / "config.json").read_text()), None, cfg.model)
    assert stats["state"].dims == stats["actions"].dims == 8
    np.testing.assert_allclose(stats["actions"].q99, STATISTICS["q99"], rtol=1e-6)


def test_lerobots_own_config_has_every_field_that_we_write():
    """The golden was written by LeRobot itself, of a version that knows relative actions."""
    theirs = set(json.loads((LEROBOT / "config.json").read_text()))
    assert {*FIELDS, *RELATIVE} - {"tokenizer_max_length"} <= theirs | {"tokenizer_max_length"}


def test_options_are_not_shadowed_by_files(tune):
    looked = inspect(tune(), LoadOptions(cameras=("a", "b"), action_horizon=9))
    assert (looked.acting().cameras, looked.acting().action_horizon) == (("a", "b"), 9)
