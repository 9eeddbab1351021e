"""If this fails, a public PaliGemma checkpoint no longer opens under one of its names, or as another model than it is."""

import dataclasses
import json
from pathlib import Path
import re

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs import get_preset
from openpi_ar.checkpoints import __main__ as cli
from openpi_ar.checkpoints import export
from openpi_ar.checkpoints.load import load_model
from openpi_ar.checkpoints.options import LoadOptions
from openpi_ar.checkpoints.paligemma import FAMILY, names
from openpi_ar.errors import UserError
from openpi_ar.model_config import ModelConfig, PaliGemmaConfig, TowerConfig, VitConfig
from openpi_ar.models import family
from openpi_ar.params import flatten
from openpi_ar.training.initial import load_initial
from openpi_ar.training.sharding import TABLES, spec
from tests.format_fixtures import GOLDEN, assert_equal, golden, params, refused

FOLDER = GOLDEN / "paligemma"
HF = FOLDER / "hf_bf16"
# From the golden's names, which are those of the public files (transformers 4.41 to 4.53), to those of other versions.
NAMINGS = {
    "public": (),
    "memory_4.52": (
        ("language_model.model.", "model.language_model."),
        ("vision_tower.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    ),
    "saved_5.24": (("vision_tower.vision_model.", "vision_tower."),),
    "memory_5.24": (
        ("language_model.model.", "model.language_model."),
        ("vision_tower.vision_model.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    ),
}


def tensors(naming: str = "public") -> dict[str, np.ndarray]:
    out = {}
    for name, array in load_file(HF / "model.safetensors").items():
        for old, new in NAMINGS[naming]:
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
        out[name] = array
    return out


def written(folder: Path, arrays: dict[str, np.ndarray], **settings) -> Path:
    """A checkpoint of these tensors, with the golden's config.json and changes of it."""
    save_file(arrays, folder / "model.safetensors")
    body = json.loads((HF / "config.json").read_text())
    for key, value in settings.items():
        part, _, field = key.partition("__")
        body[f"{part}_config"][field] = value
    (folder / "config.json").write_text(json.dumps(body))
    return folder


def npz(folder: Path, **changes) -> Path:
    arrays = dict(np.load(FOLDER / "big_vision.npz")) | changes
    np.savez(folder / "pt.npz", **arrays)
    return folder / "pt.npz"


def test_the_golden_is_this_model():
    loaded = golden(HF, LoadOptions())
    siglip = VitConfig(width=24, depth=3, mlp_dim=40, num_heads=3, patch_size=14, image_size=(56, 56))
    vlm = TowerConfig(width=48, depth=3, mlp_dim=96, num_heads=4, num_kv_heads=1, head_dim=16)
    assert loaded.config == PaliGemmaConfig(siglip, vlm, vocab_size=320, dtype=loaded.config.dtype)
    assert (loaded.kind, loaded.notes) == ("transformers", ())
    assert {v.dtype for v in params(loaded).values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert load_model(FOLDER / "big_vision.npz").kind == "big_vision"


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("head", [None, "lm_head.weight", "language_model.lm_head.weight"])
def test_every_naming_is_the_same_model(naming, head, tmp_path):
    arrays = tensors(naming)
    if head is not None:
        table = next(v for k, v in arrays.items() if k.endswith("embed_tokens.weight"))
        arrays[head] = table + 1 if head == "lm_head.weight" else table  # the embedding wins
    assert_equal(params(load_model(written(tmp_path, arrays))), params(golden(HF, LoadOptions())))


def test_a_head_alone_is_the_embedding(tmp_path):
    arrays = tensors()
    arrays["lm_head.weight"] = arrays.pop(names.EMBED_TOKENS)
    assert_equal(params(load_model(written(tmp_path, arrays))), params(golden(HF, LoadOptions())))


def test_shards_of_it(tmp_path):
    arrays = tensors()
    parts = {f"model-0000{i}-of-00003.safetensors": dict(list(arrays.items())[i::3]) for i in range(3)}
    written(tmp_path, arrays)
    (tmp_path / "model.safetensors").unlink()
    for name, part in parts.items():
        save_file(part, tmp_path / name)
    index = {"weight_map": {k: name for name, part in parts.items() for k in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_equal(params(load_model(tmp_path)), params(golden(HF, LoadOptions())))


def test_big_visions_file_holds_the_same_values_in_either_type(tmp_path):
    want = params(golden(HF, LoadOptions(dtype="float32")))
    want["embedder/table"] = want["embedder/table"][:256]
    assert_equal(params(load_model(FOLDER / "big_vision.npz")), want)
    half = {k: v.astype(ml_dtypes.bfloat16) for k, v in np.load(FOLDER / "big_vision.npz").items()}
    assert_equal(params(load_model(npz(tmp_path, **half), LoadOptions(dtype="float32"))), want)


def test_config_json_says_what_no_tensor_does(tmp_path):
    arrays = tensors()
    for key in [k for k in arrays if re.search("layers.*(k|v)_proj.weight", k) and "language" in k]:
        arrays[key] = np.concatenate([arrays[key], arrays[key]])
    changes = {
        "text__num_key_value_heads": 2,
        "text__rms_norm_eps": 1e-5,
        "text__rope_theta": 5e4,
        "vision__layer_norm_eps": 1e-5,
    }
    cfg = load_model(written(tmp_path, arrays, **changes)).config
    assert (cfg.vlm.num_kv_heads, cfg.vlm.head_dim, cfg.vlm.norm_eps, cfg.vlm.rope_base) == (2, 16, 1e-5, 5e4)
    assert (cfg.siglip.norm_eps, cfg.siglip.num_heads) == (1e-5, 3)
    newer = {"text__rope_parameters": {"rope_theta": 2e4}, "vision__hidden_act": "gelu"}
    cfg = load_model(written(tmp_path, tensors(), **newer)).config
    assert (cfg.vlm.rope_base, cfg.siglip.activation) == (2e4, "gelu")
    with pytest.raises(UserError, match="text_config.hidden_activation 'relu'.*expected gelu_pytorch_tanh"):
        load_model(written(tmp_path, tensors(), text__hidden_activation="relu"))
    with pytest.raises(UserError, match="model_type is 'gemma2': only PaliGemma's first version"):
        load_model(written(tmp_path, tensors(), text__model_type="gemma2"))


def test_grids_of_any_shape(tmp_path):
    table = np.random.default_rng(0).normal(size=(1, 15, 24)).astype(np.float32)
    oblong = npz(tmp_path, **{"params/img/pos_embedding": table})
    loaded = load_model(oblong, LoadOptions(image_size=(42, 70)))
    assert loaded.config.siglip.grid == (3, 5)
    np.testing.assert_array_equal(loaded.model.img.pos_embedding[...], table[0])
    with pytest.raises(UserError, match="15 position embeddings are no square grid: give the image size"):
        load_model(oblong)
    with pytest.raises(UserError, match="15 position embeddings are no square grid, so they cannot be resampled"):
        load_model(oblong, LoadOptions(image_size=(56, 56)))
    larger = load_model(HF, LoadOptions(image_size=(84, 56)))
    assert larger.config.siglip.grid == (6, 4) and any("from (4, 4) to (6, 4)" in note for note in larger.notes)
    # The file's own image size tells the grid that a larger one is made from.
    arrays = tensors()
    key = next(k for k in arrays if k.endswith("position_embedding.weight"))
    arrays[key] = table[0].astype(arrays[key].dtype)
    written(tmp_path, arrays, vision__image_size=[42, 70])
    assert load_model(tmp_path).config.siglip.grid == (3, 5)
    assert any("from (3, 5) to (4, 4)" in n for n in load_model(tmp_path, LoadOptions(image_size=(56, 56))).notes)


def test_what_it_writes_is_what_it_reads(tmp_path, capsys):
    cli.main(["convert", str(FOLDER / "big_vision.npz"), str(tmp_path / "hf"), "--to", "torch"])
    back = load_file(tmp_path / "hf" / "model.safetensors")
    theirs = load_file(HF / "model.safetensors")
    assert back.keys() == theirs.keys()
    for name, array in back.items():
        rows = len(array)
        np.testing.assert_array_equal(array, theirs[name][:rows].astype(np.float32), err_msg=name)
    ours, read = load_model(tmp_path / "hf"), load_model(FOLDER / "big_vision.npz")
    assert ours.config == read.config and ours.notes == ()
    assert_equal(params(ours), params(read))
    assert "which can be written as torch, not openpi" in refused(
        capsys, "convert", str(HF), str(tmp_path / "o"), "--to", "openpi"
    )
    cli.main(["inspect", str(HF)])
    said = capsys.readouterr().out
    for words in ("transformers (safetensors)", "PaliGemma", "56 x 56", "cannot act", "vocabulary 320"):
        assert words in said, words
    assert "horizon" not in said


def test_pi0_starts_from_it(tmp_path):
    """Its parameters are pi0's first tower and SigLIP; the action tower keeps its init, and a note says so."""
    read = load_model(FOLDER / "big_vision.npz")
    expert = dataclasses.replace(read.config.vlm, width=16, mlp_dim=24)
    model = ModelConfig(
        read.config.siglip, read.config.vlm, 256, expert=expert, cameras=("image",), action_dim=4, state_dim=4
    )
    cfg = dataclasses.replace(get_preset("debug"), model=model, init_from=str(FOLDER / "big_vision.npz"))
    loaded, notes = load_initial(cfg)
    have, want = flatten(loaded), params(read)
    for path, array in want.items():
        np.testing.assert_array_equal(have[path], array, err_msg=path)
    assert have.keys() - want.keys() == {p for p in have if p.startswith(("expert/", "action_", "time_"))}
    assert any("keep their init: action_in, action_out, expert, time_mlp_in" in note for note in notes)
    assert float(np.abs(np.asarray(have["expert/blocks/layers/q/w"])).max()) > 0


def test_tables_name_every_parameter_and_no_other():
    lora = dataclasses.replace(golden(HF, LoadOptions()).config.vlm, lora_rank=2)
    cfg = dataclasses.replace(golden(HF, LoadOptions()).config, vlm=lora)
    shapes = flatten(family.abstract(cfg))
    assert shapes.keys() == FAMILY.by_path.keys()
    assert all(spec(TABLES[PaliGemmaConfig], path, like.shape, 2) is not None for path, like in shapes.items())


def test_what_only_pi0_has_is_not_asked_of_it():
    loaded = golden(HF, LoadOptions())
    with pytest.raises(UserError, match="has no action tower: it answers questions and cannot act"):
        loaded.acting()
    assert set(export.to_openpi(params(loaded), loaded.config)) == set(np.load(FOLDER / "big_vision.npz").files)
