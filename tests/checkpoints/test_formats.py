"""If this fails, a public checkpoint no longer loads, loads wrongly, or what we write is not what others read."""

import dataclasses
import errno
import functools
import gzip
import http.server
import json
from pathlib import Path
import shutil
import threading
from typing import ClassVar

from flax import nnx
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from openpi_ar.algorithms.decode import prefill
from openpi_ar.checkpoints import __main__ as cli
from openpi_ar.checkpoints import export, infer_config, names, remote, sources, store
from openpi_ar.checkpoints.load import Loaded, load_model
from openpi_ar.config import GEMMA_2B, GEMMA_300M, ModelConfig, SigLIPConfig, TowerConfig
from openpi_ar.errors import UserError
from openpi_ar.models.pi0 import Pi0
from openpi_ar.models.vit import resample_pos_embedding
from openpi_ar.params import flatten
from openpi_ar.types import Observation, Tokens

GOLDEN = Path(__file__).parents[1] / "golden"
LEROBOT, TORCH = GOLDEN / "torch_pi0" / "lerobot_layout", GOLDEN / "torch_pi0" / "openpi_layout_bf16"
KEYS = json.loads(gzip.decompress((GOLDEN / "keys" / "public_checkpoints.json.gz").read_bytes()))
FULL = {
    "pi0": ModelConfig(pi05=False, vlm=GEMMA_2B, expert=GEMMA_300M, action_horizon=50),
    "pi05": ModelConfig(pi05=True, vlm=GEMMA_2B, expert=GEMMA_300M, action_horizon=50),
}


def params(loaded) -> dict[str, np.ndarray]:
    return {k: np.asarray(v) for k, v in flatten(loaded.model).items()}


def assert_equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


# ----------------------------------------------------------------------------------------------------------------------
# the name table against the full-size public checkpoints
# ----------------------------------------------------------------------------------------------------------------------


def key_source(name: str) -> sources.Source:
    layout = "openpi" if "jax" in name or "paligemma" in name else "torch"
    specs = {}
    for key, (shape, _) in KEYS[name].items():
        key = key.replace("params/", "PaliGemma/", 1) if name.startswith("paligemma") else key
        specs[names.canonical_torch(key) if layout == "torch" else key] = sources.Spec(
            tuple(shape), np.dtype("float32")
        )
    kind = "paligemma" if name.startswith("paligemma") else layout
    return sources.Source(kind, layout, Path(name), specs, lambda n: np.zeros(0))


@pytest.mark.parametrize("name", [n for n in KEYS if n != "paligemma_pt224_npz"])
def test_every_public_key_is_used_once_or_ignored_with_a_reason(name):
    source = key_source(name)
    found, left, ignored = infer_config.match(source)
    assert left == []
    assert len(found) + len(ignored) == len(KEYS[name]) == len(source.specs)
    assert all(": " in line for line in ignored)
    sizes, clashes = infer_config.solve(source, found, {"n": 16, "K": 1})
    assert clashes == []
    cfg = infer_config.model_config(source, found, sizes, {"action_horizon": 50})
    want = FULL["pi05" if "pi05" in name else "pi0"]
    if "lora" in name:
        assert (cfg.vlm.lora_rank, cfg.expert.lora_rank) == (16, 32)
    else:
        assert cfg == want
        # 812 tensors of which one, the second tower's head, is not read.
        assert {"torch": {777, 778, 812, 813}, "openpi": {50, 51}}[source.layout] & {len(KEYS[name])}
    # Every parameter of ours is set.
    abstract = nnx.eval_shape(lambda: Pi0(cfg, rngs=nnx.Rngs(0)))
    ours = {k: v.shape for k, v in flatten(abstract).items()}
    assert {item.row.ours for item in found} == set(ours)
    for row in {item.row for item in found}:
        assert infer_config.expected_shape(" ".join(x for x in (row.layers, row.layout) if x), sizes) == ours[row.ours]


def test_paligemma_keys_fill_the_first_tower():
    source = key_source("paligemma_pt224_npz")
    found, left, _ = infer_config.match(source)
    assert (len(found), left) == (32, [])
    sizes, clashes = infer_config.solve(source, found, {"n": 16, "K": 1})
    cfg = infer_config.model_config(source, found, sizes, {"action_horizon": 50})
    assert clashes == []
    assert (cfg.vlm, cfg.expert, cfg.siglip) == (GEMMA_2B, GEMMA_300M, SigLIPConfig())


def test_table_names_are_unique():
    for column in (
        [r.ours for r in names.TABLE],
        [r.openpi for r in names.TABLE],
        [n for r in names.TABLE for n in r.torch],
    ):
        assert len(column) == len(set(column))


# ----------------------------------------------------------------------------------------------------------------------
# loading
# ----------------------------------------------------------------------------------------------------------------------


def test_one_model_in_three_formats_is_one_model():
    """LeRobot's file and openpi's PyTorch file were written by those libraries from the same weights."""
    a, b = load_model(LEROBOT, siglip_heads=4), load_model(TORCH, siglip_heads=4, dtype="float32")
    assert (a.kind, b.kind) == ("lerobot", "torch")
    assert a.config == b.config
    assert_equal(params(a), params(b))
    assert a.config.expert == TowerConfig(width=32, depth=4, mlp_dim=96, num_heads=8, num_kv_heads=1, head_dim=16)
    assert (a.config.action_horizon, a.config.pi05, a.config.siglip.depth) == (6, False, 3)
    assert any(names.EXPERT_HEAD in note for note in a.notes)
    # As stored if not told otherwise.
    assert params(load_model(TORCH, siglip_heads=4))["vlm/blocks/layers/q/w"].dtype == ml_dtypes.bfloat16


def test_training_checkpoints_of_openpi_end_in_value():
    loaded = load_model(GOLDEN / "pi05" / "params")
    assert loaded.kind == "openpi"
    assert loaded.config.action_horizon == 50  # told nowhere beside params/
    assert any("action_horizon 50" in note for note in loaded.notes)
    assert load_model(GOLDEN / "pi05").config.action_horizon == 6
    assert load_model(GOLDEN / "pi05", action_horizon=9).config.action_horizon == 9


@pytest.mark.parametrize("kept", ["embed_tokens", "lm_head", "both"])
def test_embedding_under_either_name(tmp_path, kept):
    tensors = load_file(LEROBOT / "model.safetensors")
    for name in list(tensors):
        if kept == "embed_tokens" and name.endswith("paligemma.lm_head.weight"):
            del tensors[name]
        if kept == "lm_head" and name.endswith("embed_tokens.weight"):
            del tensors[name]
        if kept == "both" and name.endswith("paligemma.lm_head.weight"):
            tensors[name] = tensors[name] + 1  # untied by training: the embedding wins
    save_file(tensors, tmp_path / "model.safetensors")
    assert_equal(params(load_model(tmp_path, siglip_heads=4)), params(load_model(LEROBOT, siglip_heads=4)))


def test_shards(tmp_path):
    tensors = load_file(LEROBOT / "model.safetensors")
    half = sorted(tensors)[: len(tensors) // 2]
    parts = {
        "a.safetensors": {k: tensors[k] for k in half},
        "b.safetensors": {k: v for k, v in tensors.items() if k not in half},
    }
    for name, part in parts.items():
        save_file(part, tmp_path / name)
    index = {"weight_map": {k: name for name, part in parts.items() for k in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_equal(params(load_model(tmp_path, siglip_heads=4)), params(load_model(LEROBOT, siglip_heads=4)))
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(UserError, match=r"shards that are not beside it: b\.safetensors"):
        load_model(tmp_path)


def test_mixed_types_stay_mixed_and_agree(tmp_path):
    """openpi's PyTorch training keeps norms and projections in float32 and the rest in bfloat16."""
    tensors = load_file(LEROBOT / "model.safetensors")
    mixed = {
        k: v if "norm" in k or k.startswith("model.action") else v.astype(ml_dtypes.bfloat16)
        for k, v in tensors.items()
    }
    save_file(mixed, tmp_path / "model.safetensors")
    loaded = params(load_model(tmp_path, siglip_heads=4))
    assert loaded["vlm/blocks/layers/attn_norm/scale"].dtype == np.float32
    assert loaded["vlm/blocks/layers/q/w"].dtype == ml_dtypes.bfloat16
    full = params(load_model(tmp_path, siglip_heads=4, dtype="float32"))
    assert_equal(full, params(load_model(LEROBOT, siglip_heads=4)))  # the values were bfloat16's all along


@pytest.mark.slow
def test_paligemma_npz_fills_the_vlm_and_says_so(tmp_path):
    base = load_model(GOLDEN / "pi0")
    arrays = {k: np.asarray(v) for k, v in export.to_openpi(params(base)).items()}
    wanted = {row.openpi for row in names.TABLE if row.ours.startswith(("img/", "vlm/", "embedder/"))}
    keep = {k.replace("PaliGemma/", "params/"): v for k, v in arrays.items() if k in wanted}
    assert len(keep) == 32
    np.savez(tmp_path / "pt.npz", **keep)
    loaded = load_model(tmp_path / "pt.npz")
    assert loaded.kind == "paligemma"
    assert any("keep their random init" in note and "expert/" in note for note in loaded.notes)
    a, b = params(loaded), params(base)
    for name in a:
        if name.startswith(("img/", "vlm/", "embedder/")):
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    assert float(np.abs(a["expert/blocks/layers/q/w"]).max()) > 0


@pytest.mark.slow
def test_lora_is_inferred_and_exported(tmp_path):
    cfg = load_model(GOLDEN / "pi0").config
    tower = lambda t, rank: TowerConfig(
        t.width, t.depth, t.mlp_dim, t.num_heads, t.num_kv_heads, t.head_dim, lora_rank=rank
    )
    cfg = ModelConfig(**{**vars(cfg), "vlm": tower(cfg.vlm, 2), "expert": tower(cfg.expert, 3)})
    leaves, treedef = jax.tree.flatten(nnx.eval_shape(lambda: Pi0(cfg, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    model = treedef.unflatten([jax.numpy.asarray(0.3 * rng.normal(size=x.shape), x.dtype) for x in leaves])
    source = Loaded(model, cfg, "ours", tmp_path / "none", ())
    export.convert(source, tmp_path / "openpi", "openpi")
    back = load_model(tmp_path / "openpi", action_horizon=cfg.action_horizon)
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


# ----------------------------------------------------------------------------------------------------------------------
# export
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["pi0", "pi05"])
def test_round_trip_through_all_formats_is_exact(start, tmp_path, capsys):
    before = load_model(GOLDEN / start)
    source = tmp_path / "openpi0"
    shutil.copytree(GOLDEN / start / "params", source / "params")
    (source / "assets" / "arm").mkdir(parents=True)
    (source / "assets" / "arm" / "norm_stats.json").write_text('{"norm_stats": {}}')
    heads = str(before.config.siglip.num_heads)
    for i, to in enumerate(("torch", "lerobot", "ours", "openpi")):
        target = tmp_path / f"{to}{i + 1}"
        cli.main(["convert", str(source), str(target), "--to", to, "--siglip-heads", heads, "--action-horizon", "6"])
        assert (target / "assets" / "arm" / "norm_stats.json").read_text() == '{"norm_stats": {}}'
        source = target
    after = load_model(source, action_horizon=6)
    assert_equal(params(after), params(before))
    assert after.config == before.config
    assert not list(tmp_path.glob(".*"))  # no scratch directory left


def test_torch_file_has_openpis_keys_shapes_ties_and_padding_head(tmp_path):
    """Against the file that openpi's own converter wrote from the same weights."""
    loaded = load_model(TORCH, siglip_heads=4)
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
    loaded = load_model(LEROBOT, siglip_heads=4)
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

    loaded = load_model(GOLDEN / "pi05")
    export.convert(loaded, tmp_path / "out", "openpi")
    tree = ocp.PyTreeCheckpointer().restore((tmp_path / "out" / "params").absolute())
    ours, want = flatten(tree["params"]), export.to_openpi(params(loaded))
    assert set(ours) == set(want)
    assert set(tree) == {"params"}
    for name, value in ours.items():
        np.testing.assert_array_equal(value, want[name])
    assert ours["PaliGemma/img/pos_embedding"].shape[0] == 1


def test_bfloat16_export_and_inspect(tmp_path, capsys):
    cli.main(["convert", str(GOLDEN / "pi05"), str(tmp_path / "half"), "--to", "openpi", "--dtype", "bfloat16"])
    assert all(v.dtype == ml_dtypes.bfloat16 for v in params(load_model(tmp_path / "half")).values())
    cli.main(["inspect", str(tmp_path / "half")])
    said = capsys.readouterr().out
    for words in ("openpi, JAX (orbax)", "pi0.5", "bfloat16 571,912", "horizon 50", "64 x 64", "no tensor tells it"):
        assert words in said, words


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


# ----------------------------------------------------------------------------------------------------------------------
# other image sizes
# ----------------------------------------------------------------------------------------------------------------------


def test_position_embedding_is_resampled_as_big_vision_does():
    """Bilinear between corner-aligned patch centres, computed here by hand."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(16 * 16, 3)).astype(np.float32)
    for new in ((27, 27), (8, 20), (16, 16)):
        ours = resample_pos_embedding(table, (16, 16), new).reshape(*new, 3)
        grid = table.reshape(16, 16, 3).astype(np.float64)
        y, x = (np.linspace(0, 15, n) for n in new)
        y0, x0 = np.minimum(y.astype(int), 14), np.minimum(x.astype(int), 14)
        fy, fx = (y - y0)[:, None, None], (x - x0)[None, :, None]
        rows = grid[y0] * (1 - fy) + grid[y0 + 1] * fy
        want = rows[:, x0] * (1 - fx) + rows[:, x0 + 1] * fx
        np.testing.assert_allclose(ours, want, atol=1e-5)
    half_pixel = jax.image.resize(table.reshape(16, 16, 3), (27, 27, 3), "linear")
    assert np.abs(resample_pos_embedding(table, (16, 16), (27, 27)).reshape(27, 27, 3) - half_pixel).max() > 0.05


@pytest.mark.slow
def test_384_pixels_are_27_patches_a_side():
    """Two cameras and 32 tokens: 2 * 729 + 32 = 1490 slots, and what the 6 pixels at the edge show changes nothing."""
    loaded = load_model(TORCH, siglip_heads=4, dtype="float32", image_size=(384, 384), cameras=("base", "wrist"))
    assert loaded.config.siglip.grid == (27, 27)
    images = np.random.default_rng(0).uniform(-1, 1, (1, 2, 384, 384, 3)).astype(np.float32)
    prompt = Tokens.of(np.arange(32)[None])
    obs = Observation(
        images=images, image_mask=np.ones((1, 2), bool), prompt=prompt, state=np.zeros((1, 8), np.float32)
    )
    run = jax.jit(lambda m, o: prefill(m, o)[0].hidden)
    hidden = np.asarray(run(loaded.model, obs))
    assert hidden.shape == (1, 1490, 64)
    assert np.isfinite(hidden).all()
    for edge, changes in ((378, False), (377, True)):
        other = images.copy()
        other[:, :, edge:, :] = 0
        other[:, :, :, edge:] = 0
        assert (
            np.abs(np.asarray(run(loaded.model, dataclasses.replace(obs, images=other))) - hidden).max() > 0
        ) == changes


def test_a_larger_non_square_image_and_five_cameras_run():
    loaded = load_model(GOLDEN / "pi05", image_size=(96, 160), cameras=tuple("abcde"))
    assert loaded.config.siglip.grid == (6, 10)
    assert any("resampled from (4, 4) to (6, 10)" in note for note in loaded.notes)
    images = np.random.default_rng(0).uniform(-1, 1, (1, 5, 96, 160, 3)).astype(np.float32)
    prompt = Tokens.of(np.arange(8)[None])
    obs = Observation(
        images=images, image_mask=np.ones((1, 5), bool), prompt=prompt, state=np.zeros((1, 8), np.float32)
    )
    out, cache = jax.jit(prefill)(loaded.model, obs)
    assert out.hidden.shape[1] == 5 * 60 + 8
    assert np.isfinite(out.hidden).all()


# ----------------------------------------------------------------------------------------------------------------------
# bad input
# ----------------------------------------------------------------------------------------------------------------------


def refused(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as e:
        cli.main(list(argv))
    assert e.value.code == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("error: ")
    assert "\n" not in err
    return err


def damaged(tmp_path: Path, change) -> Path:
    tensors = load_file(LEROBOT / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def test_files_that_are_no_checkpoints(tmp_path, capsys):
    whole = (LEROBOT / "model.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "truncated" in refused(capsys, "inspect", str(tmp_path / "cut.safetensors"))
    (tmp_path / "text.safetensors").write_text("I am no tensor\n")
    assert "cannot be read as safetensors" in refused(capsys, "inspect", str(tmp_path / "text.safetensors"))
    (tmp_path / "x.npz").write_bytes(b"nothing")
    assert "cannot be read as an .npz" in refused(capsys, "inspect", str(tmp_path / "x.npz"))
    assert "does not exist" in refused(capsys, "inspect", str(tmp_path / "absent"))
    (tmp_path / "empty").mkdir()
    assert "no checkpoint that is known" in refused(capsys, "inspect", str(tmp_path / "empty"))
    assert "expected a .safetensors" in refused(capsys, "inspect", str(Path(__file__)))


def test_all_offenders_at_once(tmp_path, capsys):
    def spoil(t):
        del t["model.action_out_proj.bias"]
        layers = "model.paligemma_with_expert.gemma_expert.model.layers"
        t[f"{layers}.2.mlp.down_proj.weight"] = np.zeros((32, 95), np.float32)
        t["model.action_extra"] = np.zeros(3, np.float32)

    err = refused(
        capsys, "convert", str(damaged(tmp_path, spoil)), str(tmp_path / "out"), "--to", "openpi", "--siglip-heads", "4"
    )
    for words in (
        "action_out_proj.bias: missing",
        "layers.2.mlp.down_proj.weight: expected [32, 96], found [32, 95]",
        "action_extra: no tensor of the model",
    ):
        assert words in err
    assert not (tmp_path / "out").exists()


def test_another_model_family(tmp_path, capsys):
    save_file(
        {f"transformer.h.{i}.attn.weight": np.zeros((4, 4), np.float32) for i in range(6)},
        tmp_path / "model.safetensors",
    )
    assert "holds another model" in refused(capsys, "inspect", str(tmp_path))


def test_an_orbax_directory_with_a_missing_array(tmp_path, capsys):
    shutil.copytree(GOLDEN / "pi05" / "params", tmp_path / "params")
    for file in (tmp_path / "params").rglob("d/*"):
        file.unlink()
    err = refused(capsys, "convert", str(tmp_path), str(tmp_path / "out"), "--to", "torch")
    assert "cannot be read" in err
    assert not list(tmp_path.glob(".out*"))
    (tmp_path / "params" / "_METADATA").unlink()
    assert "half-written" in refused(capsys, "inspect", str(tmp_path))


def test_nan_weights_are_named(tmp_path):
    def spoil(t):
        t["model.action_in_proj.bias"][3] = np.nan

    with pytest.warns(UserWarning, match="action_in_proj/bias holds values that are not finite"):
        load_model(damaged(tmp_path, spoil), siglip_heads=4)


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


# ----------------------------------------------------------------------------------------------------------------------
# remote checkpoints
# ----------------------------------------------------------------------------------------------------------------------


class Handler(http.server.SimpleHTTPRequestHandler):
    """A web server that knows ranges and remembers what it was asked for."""

    asked: ClassVar[list[str]] = []

    def log_message(self, *_):
        pass

    def do_GET(self):
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            return super().do_GET()
        data, start = path.read_bytes(), 0
        spec = self.headers.get("Range")
        if spec:
            first, _, last = spec.removeprefix("bytes=").partition("-")
            start, end = int(first), int(last) + 1 if last else len(data)
        else:
            end = len(data)
        body = data[start:end]
        type(self).asked.append(f"{path.name} {start}")
        self.send_response(206 if spec else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(body)))
        if spec:
            self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{len(data)}")
        self.end_headers()
        self.wfile.write(body)
        return None


@pytest.fixture
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("www")
    shutil.copytree(TORCH, folder / "ckpt")
    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        Handler.asked = []
        yield f"http://127.0.0.1:{httpd.server_port}", folder
        httpd.shutdown()


def test_http_is_cached_and_resumed(server, tmp_path, monkeypatch):
    url, folder = server
    monkeypatch.setenv("OPENPI_DATA_HOME", str(tmp_path))
    whole = (folder / "ckpt" / "model.safetensors").read_bytes()
    target = tmp_path / url.removeprefix("http://").replace(":", "_") / "ckpt" / "model.safetensors"
    target.parent.mkdir(parents=True)
    Path(f"{target}.partial").write_bytes(whole[:100_000])  # an interrupted try
    local = remote.local_copy(f"{url}/ckpt/model.safetensors")
    assert local == target
    assert local.read_bytes() == whole
    assert "model.safetensors 0" not in Handler.asked[-1:]
    assert any(int(line.split()[1]) >= 100_000 for line in Handler.asked)
    count = len(Handler.asked)
    assert remote.local_copy(f"{url}/ckpt/model.safetensors") == local
    assert len(Handler.asked) == count  # from the cache
    assert_equal(params(load_model(local, siglip_heads=4)), params(load_model(TORCH, siglip_heads=4)))


def test_a_directory_of_links_is_a_checkpoint(server, tmp_path, monkeypatch):
    url, _ = server
    monkeypatch.setenv("OPENPI_DATA_HOME", str(tmp_path))
    assert_equal(params(load_model(f"{url}/ckpt", siglip_heads=4)), params(load_model(TORCH, siglip_heads=4)))
    assert not list(tmp_path.rglob("*.partial"))


def test_file_addresses_and_directories(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENPI_DATA_HOME", str(tmp_path / "cache"))
    loaded = load_model(f"file://{GOLDEN / 'pi05'}")
    assert_equal(params(loaded), params(load_model(GOLDEN / "pi05")))
    assert not list((tmp_path / "cache").rglob("*.partial"))


def test_unreachable_addresses(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENPI_DATA_HOME", str(tmp_path))
    err = refused(capsys, "inspect", "http://127.0.0.1:9/none/model.safetensors")
    assert "cannot be downloaded" in err
    assert "expected a local path, a hub id or an address" in refused(capsys, "inspect", "ftp://x/y")
