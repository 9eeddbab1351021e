"""If this fails, a directory that users really have is taken for another model, for a damaged one, or for the wrong step."""

import json
from pathlib import Path
import re
import shutil

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file, save_file

from openpi_ar.checkpoints import __main__ as cli
from openpi_ar.checkpoints.load import inspect, load_model
from openpi_ar.checkpoints.sources import open_source
from openpi_ar.params import unflatten
from tests.format_fixtures import GOLDEN, HEADS, LEROBOT, TORCH, assert_equal, golden, params, refused

PALIGEMMA = "paligemma_with_expert.paligemma."


def before_transformers_4_52(name: str) -> str:
    name = name.replace(f"{PALIGEMMA}model.language_model.", f"{PALIGEMMA}language_model.model.")
    name = name.replace(f"{PALIGEMMA}lm_head.", f"{PALIGEMMA}language_model.lm_head.")
    return name.replace(f"{PALIGEMMA}model.", PALIGEMMA)


NAMES = {
    "before_transformers_4_52": before_transformers_4_52,
    "compiled_inside": lambda name: name.replace("model.", "model._orig_mod.", 1),
    "compiled": lambda name: f"_orig_mod.{name}",
    "distributed": lambda name: f"module.{name}",
    "distributed_and_compiled": lambda name: f"module._orig_mod.{name}",
    "sharded": lambda name: f"_fsdp_wrapped_module.{name}".replace("layers.1.", "layers.1._fsdp_wrapped_module."),
    "recomputed": lambda name: re.sub(r"(layers\.\d+\.)", r"\1_checkpoint_wrapped_module.", name),
    "twice": lambda name: f"model.{name}",
    "openpis_distributed": lambda name: name.replace("model.", "module.", 1),
}


def write(folder: Path, tensors: dict[str, np.ndarray], name: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / name)
    return folder


@pytest.mark.parametrize("variant", NAMES)
def test_wrapped_and_older_names_are_the_same_tensors(tmp_path, variant):
    tensors = {NAMES[variant](name): array for name, array in load_file(LEROBOT / "model.safetensors").items()}
    loaded = load_model(write(tmp_path, tensors), HEADS)
    assert loaded.kind == ("torch" if variant == "openpis_distributed" else "lerobot")
    assert_equal(params(loaded), params(golden(LEROBOT)))


def test_two_copies_of_a_model_are_not_one(tmp_path, capsys):
    tensors = load_file(LEROBOT / "model.safetensors")
    both = tensors | {f"_orig_mod.{name}": array for name, array in tensors.items()}
    assert "the same parameter twice" in refused(capsys, "inspect", str(write(tmp_path, both)))


@pytest.mark.parametrize("stored", [(np.float16, ml_dtypes.bfloat16), (np.float16, np.float32), (np.float16,)])
def test_layers_of_several_types_become_one_that_holds_them(tmp_path, capsys, stored):
    tensors = load_file(LEROBOT / "model.safetensors")
    mixed = {name: array.astype(stored["up_proj" in name and len(stored) - 1]) for name, array in tensors.items()}
    write(tmp_path / "c", mixed)
    cli.main(["convert", str(tmp_path / "c"), str(tmp_path / "o"), "--to", "torch", "--siglip-heads", "4"])
    gate_up = params(load_model(tmp_path / "o"))["vlm/blocks/layers/mlp/gate_up"]
    assert gate_up.dtype == (np.float16 if len(stored) == 1 else np.float32)
    np.testing.assert_allclose(gate_up, params(golden(LEROBOT))["vlm/blocks/layers/mlp/gate_up"], atol=1e-3)


def test_numbers_that_are_no_weights_are_refused(tmp_path, capsys):
    tensors = load_file(LEROBOT / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.0.mlp.down_proj.weight"))
    err = refused(capsys, "inspect", str(write(tmp_path, tensors | {name: tensors[name].astype(np.int8)})))
    assert f"{name.removeprefix('model.')}: stored as int8" in err


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_model.bin", "none"])
def test_an_adapter_is_said_to_be_one(tmp_path, capsys, file):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "lerobot/pi05_base"}))
    (tmp_path / "config.json").write_text(json.dumps({"type": "pi05", "use_peft": True}))
    lora = {"base_model.model.model.action_in_proj.lora_A.weight": np.zeros((4, 4), np.float32)}
    write(tmp_path, lora, file) if file != "none" else None
    for given in (tmp_path, tmp_path / file) if file.endswith(".safetensors") else (tmp_path,):
        err = refused(capsys, "inspect", str(given))
        assert "is an adapter (PEFT)" in err and "lerobot/pi05_base" in err and "merge" in err


def test_adapters_beside_or_within_a_model(tmp_path, capsys):
    tensors = load_file(LEROBOT / "model.safetensors")
    lora = {"model.action_in_proj.lora_A.default.weight": np.zeros((4, 4), np.float32)}
    write(write(tmp_path / "beside", tensors), lora, "adapter_model.safetensors")
    assert_equal(params(load_model(tmp_path / "beside", HEADS)), params(golden(LEROBOT)))
    err = refused(capsys, "inspect", str(write(tmp_path / "within", tensors | lora)))
    assert "adapters that are not merged" in err and "lora_A" in err


@pytest.mark.parametrize("by", ["openpi", "openpi_torch", "lerobot"])
def test_an_experiment_is_its_newest_step(tmp_path, by):
    for step in ("000900", "10000", "29999"):
        source = LEROBOT if by == "lerobot" else TORCH if by == "openpi_torch" else GOLDEN / "pi05"
        folder = {"lerobot": Path("checkpoints") / step / "pretrained_model"}.get(by, Path(step))
        shutil.copytree(source, tmp_path / folder, ignore=shutil.ignore_patterns("*.npz", "config.json"))
        (tmp_path / folder / "assets" / "droid").mkdir(parents=True)
    (tmp_path / "wandb_id.txt").write_text("abc")
    (tmp_path / "30000").mkdir()  # a step that was never written
    inner = [tmp_path / "checkpoints", tmp_path / "checkpoints" / "29999"] if by == "lerobot" else []
    for given in (tmp_path, *inner):
        assert "29999" in str(inspect(given, HEADS).matched.source.path)


def test_a_mistyped_path_is_first_of_all_not_there(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "checkpoints/nothere does not exist" in refused(capsys, "inspect", "checkpoints/nothere")
    (tmp_path / "checkpoints" / "somewhere").mkdir(parents=True)
    err = refused(capsys, "inspect", "checkpoints/nothere")
    assert "checkpoints/nothere does not exist" in err and "somewhere" in err and "hf://checkpoints/nothere" in err


def test_pi0_fast_has_no_action_expert(tmp_path, capsys):
    source = open_source(GOLDEN / "pi05")
    kept = [name for name in source.specs if name.startswith("PaliGemma/") and not re.search(r"llm/.*_1/", name)]
    tree = unflatten({name: source.read(name) for name in kept})
    ocp.PyTreeCheckpointer().save(tmp_path / "jax" / "params", {"params": tree})
    tensors = {k: v for k, v in load_file(LEROBOT / "model.safetensors").items() if PALIGEMMA in k}
    for folder in (tmp_path / "jax", write(tmp_path / "torch", tensors)):
        err = refused(capsys, "inspect", str(folder))
        assert "no action expert" in err and "missing" not in err


def test_another_policy_of_lerobots_is_named(tmp_path, capsys):
    write(tmp_path, {f"model.encoder.{i}": np.zeros(3, np.float32) for i in range(9)})
    (tmp_path / "config.json").write_text(json.dumps({"type": "act", "chunk_size": 100}))
    assert "holds another model, act" in refused(capsys, "inspect", str(tmp_path))


@pytest.mark.parametrize("body", ["{}", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {}}'])
def test_an_index_that_names_no_shards(tmp_path, capsys, body):
    (tmp_path / "model.safetensors.index.json").write_text(body)
    assert "index" in refused(capsys, "inspect", str(tmp_path))
