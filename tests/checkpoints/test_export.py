"""If this fails, what we write is not what others read, or something half-written is left behind."""

import dataclasses
import errno
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from openpi_ar import config_json
from openpi_ar.checkpoints import __main__ as cli
from openpi_ar.checkpoints import export, store
from openpi_ar.checkpoints.load import load_model
from openpi_ar.checkpoints.options import LoadOptions
from openpi_ar.checkpoints.pi0 import names
from openpi_ar.config import InferenceConfig
from openpi_ar.model_config import ModelConfig, TowerConfig
from openpi_ar.models import family
from openpi_ar.params import flatten
from tests.format_fixtures import GOLDEN, LEROBOT, TORCH, assert_equal, golden, params, refused


@pytest.mark.parametrize("start", ["pi0", "pi05"])
def test_round_trip_through_all_formats_is_exact(start, tmp_path, capsys):
    before = golden(GOLDEN / start)
    source = tmp_path / "openpi0"
    shutil.copytree(GOLDEN / start / "params", source / "params")
    (source / "assets" / "arm").mkdir(parents=True)
    (source / "assets" / "arm" / "norm_stats.json").write_text('{"norm_stats": {}}')
    heads = str(before.config.siglip.num_heads)
    for i, to in enumerate(("torch", "lerobot", "ours", "openpi")):
        target = tmp_path / f"{to}{i + 1}"
        cli.main(["convert", str(source), str(target), "--to", to, "--siglip-heads", heads, "--action-horizon", "6"])
        assert (target / "assets" / "arm" / "norm_stats.json").read_text() == '{"norm_stats": {}}'
        if to == "ours":
            cfg = config_json.read(target / "assets" / "config.json")
            assert isinstance(cfg, InferenceConfig)
            assert (cfg.model.kind, cfg.model.vlm) == (before.config.kind, before.config.vlm)
            assert cfg.text.template == {"pi0": "openpi_pi0", "pi05": "openpi"}[start]
        source = target
    after = load_model(source, LoadOptions(action_horizon=6))
    assert_equal(params(after), params(before))
    assert after.config == before.config
    assert not list(tmp_path.glob(".*"))  # no scratch directory left


def test_torch_file_has_openpis_keys_shapes_ties_and_padding_head(tmp_path):
    """Against the file that openpi's own converter wrote from the same weights."""
    loaded = golden(TORCH)
    export.convert(loaded, tmp_path / "out", "torch")
    with (
        safe_open(TORCH / "model.safetensors", "numpy") as a,
        safe_open(tmp_path / "out" / "model.safetensors", "numpy") as b,
    ):
        assert set(a.keys()) == set(b.keys())
        assert a.metadata()[names.EMBED_TOKENS] == b.metadata()[names.EMBED_TOKENS] == names.LM_HEAD
        for name in a.keys():  # noqa: SIM118
            x, y = a.get_tensor(name), b.get_tensor(name)
            assert (x.shape, x.dtype) == (y.shape, y.dtype), name
            if name != names.EXPERT_HEAD:
                np.testing.assert_array_equal(x, y, err_msg=name)


def test_lerobot_file_has_lerobots_keys_and_config(tmp_path):
    loaded = golden(LEROBOT)
    export.convert(loaded, tmp_path / "out", "lerobot")
    a, b = (load_file(p / "model.safetensors") for p in (LEROBOT, tmp_path / "out"))
    assert set(a) == set(b)
    for name in a:
        if not name.endswith(names.EXPERT_HEAD):
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    theirs, ours = (json.loads((p / "config.json").read_text()) for p in (LEROBOT, tmp_path / "out"))
    for key in ("type", "input_features", "output_features", "chunk_size", "max_action_dim", "normalization_mapping"):
        assert ours[key] == theirs[key], key


def test_openpi_reads_what_we_write(tmp_path):
    """Its `restore_params` asks orbax for the tree under "params" as numpy arrays."""
    import orbax.checkpoint as ocp

    loaded = golden(GOLDEN / "pi05")
    export.convert(loaded, tmp_path / "out", "openpi")
    tree = ocp.PyTreeCheckpointer().restore((tmp_path / "out" / "params").absolute())
    ours, want = flatten(tree["params"]), export.to_openpi(params(loaded), loaded.config)
    assert set(ours) == set(want)
    assert set(tree) == {"params"}
    for name, value in ours.items():
        np.testing.assert_array_equal(value, want[name])
    assert ours["PaliGemma/img/pos_embedding"].shape[0] == 1


@pytest.mark.slow
def test_lora_is_inferred_and_exported(tmp_path):
    cfg = golden(GOLDEN / "pi0").config
    tower = lambda t, rank: TowerConfig(
        t.width, t.depth, t.mlp_dim, t.num_heads, t.num_kv_heads, t.head_dim, lora_rank=rank
    )
    cfg = ModelConfig(**{**vars(cfg), "vlm": tower(cfg.vlm, 2), "expert": tower(cfg.expert, 3)})
    leaves, treedef = jax.tree.flatten(family.abstract(cfg))
    rng = np.random.default_rng(0)
    model = treedef.unflatten([jax.numpy.asarray(0.3 * rng.normal(size=x.shape), x.dtype) for x in leaves])
    source = dataclasses.replace(golden(GOLDEN / "pi0"), model=model, config=cfg)
    export.convert(source, tmp_path / "openpi", "openpi")
    back = load_model(tmp_path / "openpi", LoadOptions(action_horizon=cfg.action_horizon))
    assert (back.config.vlm.lora_rank, back.config.expert.lora_rank) == (2, 3)
    assert_equal(params(back), params(source))
    # PyTorch's port has no adapters: they are merged, and the merged model computes the same.
    export.convert(source, tmp_path / "torch", "torch")
    merged = load_model(tmp_path / "torch")
    x = jax.random.normal(jax.random.key(2), (2, 5, cfg.vlm.width))
    for name in ("q", "kv"):
        a = getattr(jax.tree.map(lambda v: v[1], model.vlm.blocks.layers), name)(x)
        b = getattr(jax.tree.map(lambda v: v[1], merged.model.vlm.blocks.layers), name)(x)
        np.testing.assert_allclose(a, b, atol=2e-4)
    heads = jax.random.normal(jax.random.key(3), (2, 5, cfg.vlm.num_heads, cfg.vlm.head_dim))
    one, two = (jax.tree.map(lambda v: v[1], m.vlm.blocks.layers) for m in (model, merged.model))
    np.testing.assert_allclose(one.out(heads), two.out(heads), atol=2e-4)
    np.testing.assert_allclose(one.mlp(x), two.mlp(x), atol=2e-3)
    assert float(np.abs(one.out.lora_a[...]).max()) > 0.1


def test_a_checkpoint_to_hand_out_is_the_same_policy_and_names_no_machine(tiny_checkpoint, tmp_path):
    cli.main(["convert", str(tiny_checkpoint), str(tmp_path / "small"), "--to", "ours", "--dtype", "bfloat16"])
    cfg, model, _, _ = store.load_policy_checkpoint(tmp_path / "small")
    want_cfg, want, _, _ = store.load_policy_checkpoint(tiny_checkpoint)
    assert cfg == want_cfg
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(model), strict=True):
        assert b.dtype == np.float32
        np.testing.assert_array_equal(np.asarray(a.astype("bfloat16"), np.float32), b)
    assert not (tmp_path / "small" / "train_state").exists()
    texts = [f for f in (tmp_path / "small").rglob("*") if f.suffix in (".txt", ".json")]
    assert texts
    assert not any(str(tmp_path) in f.read_text() for f in texts)


def test_a_full_disk_leaves_nothing(tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export, "write_safetensors", full)
    err = refused(capsys, "convert", str(GOLDEN / "pi05"), str(tmp_path / "out"), "--to", "torch")
    assert "No space left on device" in err
    assert "GB free" in err
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "there").mkdir()
    assert "exists" in refused(capsys, "convert", str(GOLDEN / "pi05"), str(tmp_path / "there"), "--to", "torch")
