"""If this fails, our numbers are no longer openpi's: module by module, then whole models, each with a wrong variant."""

from pathlib import Path

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openpi_ar.algorithms.flow import Steps, velocity
from openpi_ar.algorithms.prefill import prefill
from openpi_ar.checkpoints import export
from openpi_ar.checkpoints.load import load_model
from openpi_ar.checkpoints.options import LoadOptions
from openpi_ar.doctor import __main__ as cli
from openpi_ar.doctor.verify import HIDDEN, VELOCITY, verify
from openpi_ar.models import layers
from openpi_ar.models.cache import StackedCache, action_mask, positions, prefix_lm_mask
from openpi_ar.models.layers import rotary, sincos_embedding
from openpi_ar.models.pi0 import Pi0
from openpi_ar.types import Observation, Tokens

GOLDEN = Path(__file__).parents[1] / "golden"
CLEARLY_WRONG = 20
"""A wrong variant must miss the bound by this factor."""


@pytest.fixture(scope="module")
def model() -> Pi0:
    return load_model(GOLDEN / "pi05").model


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    files = [np.load(GOLDEN / "pi05" / name) for name in ("inputs.npz", "outputs.npz")]
    return {k: v for f in files for k, v in f.items()}


def gap(ours, theirs, where=...) -> float:
    return float(np.abs(np.asarray(ours, np.float64) - np.asarray(theirs, np.float64))[where].max())


def observation(golden) -> Observation:
    cameras = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    ids, valid = golden["tokenized_prompt"], golden["tokenized_prompt_mask"]
    return Observation(
        images=np.stack([golden[f"image/{c}"] for c in cameras], 1),
        image_mask=np.stack([golden[f"image_mask/{c}"] for c in cameras], 1),
        prompt=Tokens.of(ids, valid),
        state=golden["state"],
    )


# ----------------------------------------------------------------------------------------------------------------------
# one module at a time, fed with the golden's own intermediate arrays
# ----------------------------------------------------------------------------------------------------------------------


def test_siglip(model, golden, monkeypatch):
    image, tokens = golden["image/base_0_rgb"], golden["img_tokens/base_0_rgb"]

    def run(m):
        return jax.jit(lambda m, x: m.img(x, jnp.dtype("float32")))(m, image)

    assert gap(run(model), tokens) <= HIDDEN
    monkeypatch.setitem(layers.ACTIVATIONS, "gelu_tanh", layers.ACTIVATIONS["gelu"])
    assert gap(run(nnx.clone(model)), tokens) > CLEARLY_WRONG * HIDDEN / 10  # exact GELU is 5e-4 from tanh's at most


def test_embedder_and_logits(model, golden):
    ids, tokens = golden["tokenized_prompt"], golden["prefix_tokens"][:, -16:]
    assert gap(model.embed_text(ids), tokens) == 0
    assert gap(model.embedder.table[...][ids], tokens) > CLEARLY_WRONG * HIDDEN  # not scaled by sqrt(width)
    subtask = load_model(GOLDEN / "pi05_subtask").model
    out = np.load(GOLDEN / "pi05_subtask" / "outputs.npz")
    hidden, logits = out["train/prefix_out"][:, -24:-1], out["train/logits"]
    assert gap(subtask.logits(hidden), logits) <= 1e-4
    assert gap(subtask.logits(hidden) * 8, logits) > CLEARLY_WRONG * 1e-4


def first_block(model: Pi0, golden, shift: int = 0, plus_one: bool = True):
    """(keys of layer 0, keys of layer 1) from the golden's embedded prefix."""
    valid, tokens = golden["prefix_mask"], jnp.asarray(golden["prefix_tokens"])
    layers = [jax.tree.map(lambda a, i=i: a[i], model.vlm.blocks.layers) for i in (0, 1)]
    if not plus_one:
        for layer in layers:
            layer.attn_norm.scale[...] = layer.attn_norm.scale[...] - 1
    sin, cos = rotary(positions(valid) + shift, model.vlm.head_dim)
    mask = prefix_lm_mask(valid, np.zeros_like(valid))

    def run(layers):
        x, (k0, _) = layers[0](tokens, sin, cos, mask, None, None)
        return k0, layers[1](x, sin, cos, mask, None, None)[1][0]

    return jax.jit(run)(layers)


def test_a_gemma_block(model, golden, monkeypatch):
    valid, keys = golden["prefix_mask"], golden["sample10/kv_cache_k"]
    for layer, k in enumerate(first_block(model, golden)):
        assert gap(k, keys[layer], valid) <= HIDDEN
    for k, true in zip(first_block(model, golden, shift=1), keys, strict=False):
        assert gap(k, true, valid) > CLEARLY_WRONG * HIDDEN
    assert gap(first_block(model, golden, plus_one=False)[0], keys[0], valid) > CLEARLY_WRONG * HIDDEN
    monkeypatch.setitem(layers.ACTIVATIONS, "gelu_tanh", layers.ACTIVATIONS["gelu"])
    assert gap(first_block(nnx.clone(model), golden)[1], keys[1], valid) > 2 * HIDDEN


def test_adarms_tower(model, golden):
    def run(m):
        valid = jnp.asarray(golden["prefix_mask"])
        k, v = (jnp.asarray(golden[f"sample10/kv_cache_{x}"]) for x in "kv")
        cache = StackedCache.full(k, v, valid, jnp.zeros_like(valid))
        tokens, cond = jnp.asarray(golden["suffix_tokens"])[:, None], jnp.asarray(golden["adarms_cond"])[:, None]
        return m.action_tower.reader(cache, m.suffix_causal)(tokens, cond)[:, 0]

    assert gap(jax.jit(run)(model), golden["suffix_out"]) <= HIDDEN
    swapped = nnx.clone(model)
    kernel = swapped.expert.blocks.layers.attn_norm.modulation.kernel
    scale, shift, gate = jnp.split(kernel[...], 3, axis=-1)
    kernel[...] = jnp.concatenate([shift, scale, gate], axis=-1)
    assert gap(jax.jit(run)(swapped), golden["suffix_out"]) > CLEARLY_WRONG * HIDDEN


def test_time_embedding_and_condition(model, golden):
    t = jnp.asarray(golden["time"])
    assert gap(sincos_embedding(t, 64), golden["time_posemb"]) == 0  # the same operations in the same order
    assert gap(sincos_embedding(t, 64, max_period=8.0), golden["time_posemb"]) > CLEARLY_WRONG * HIDDEN
    angle = np.float64(golden["time"])[:, None] / (4e-3 * 1e3 ** np.linspace(0, 1, 32)) * 2 * np.pi
    exact = np.concatenate([np.sin(angle), np.cos(angle)], -1)
    assert gap(sincos_embedding(t, 64, exact=True), exact) <= 5e-7  # two roundings of values up to pi
    assert gap(sincos_embedding(t, 64), exact) > 1e-5
    tokens, cond = model.embed_suffix(observation(golden), jnp.asarray(golden["x_t"])[:, None], t[:, None])
    assert gap(tokens[:, 0], golden["suffix_tokens"]) <= HIDDEN
    assert gap(cond[:, 0], golden["adarms_cond"]) <= HIDDEN


def test_velocity_projection(model, golden):
    hidden = jnp.asarray(golden["suffix_out"])[:, None]
    assert gap(model.project_velocity(hidden)[:, 0], golden["v_t"]) <= VELOCITY
    assert gap(model.project_velocity(hidden[..., ::-1])[:, 0], golden["v_t"]) > CLEARLY_WRONG * VELOCITY


def test_euler_times_are_openpis(golden):
    np.testing.assert_array_equal(Steps(10).times()[:-1], golden["sample10/time_trace"])
    assert gap(1 - np.arange(10) / 10, golden["sample10/time_trace"]) > 0


# ----------------------------------------------------------------------------------------------------------------------
# whole models
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("checkpoint", "folder", "dtype", "quantities"),
    [
        ("pi0", "pi0", "float32", 18),
        ("pi05", "pi05", "float32", 19),
        ("pi05", "pi05", "bfloat16", 17),
        ("pi05_subtask", "pi05_subtask", "float32", 27),
        ("torch_pi0/openpi_layout_bf16", "torch_pi0", "float32", 11),
        ("torch_pi0/lerobot_layout", "torch_pi0", "float32", 11),
    ],
)
def test_whole_model(checkpoint, folder, dtype, quantities):
    differences, _ = verify(GOLDEN / checkpoint, GOLDEN / folder, compute_dtype=dtype)
    assert [f"{d.name}: {d.largest:.1e}" for d in differences if not d.ok] == []
    assert len(differences) == quantities


def test_flow_gradients_are_openpis(model, golden):
    obs = observation(golden)

    def loss(m):
        _, cache = prefill(m, obs)
        v = velocity(m, obs, cache, jnp.asarray(golden["x_t"]), jnp.asarray(golden["time"]))
        return jnp.square(v - golden["u_t"]).mean()

    grads = jax.jit(jax.grad(loss))(model)
    for ours, theirs in (
        (grads.action_out.kernel, "action_out_proj/kernel"),
        (grads.action_in.kernel, "action_in_proj/kernel"),
        (grads.vlm.norm.scale, "PaliGemma/llm/final_norm/scale"),
        (grads.img.head.kernel, "PaliGemma/img/head/kernel"),
        (grads.img.pos_embedding, "PaliGemma/img/pos_embedding"),
    ):
        want = golden[f"grad/{theirs}"]
        assert gap(ours[...], want.reshape(ours.shape)) <= 1e-4 * max(1.0, np.abs(want).max()), theirs


@pytest.mark.slow
def test_verify_command(tmp_path, capsys):
    """A changed weight is found, named, and ends in exit code 1; a directory that is no golden in 2."""
    folder = GOLDEN / "torch_pi0"
    cli.main(["verify", str(folder / "lerobot_layout"), str(folder), "--json", str(tmp_path / "ok.json")])
    assert "verified: all 11 quantities agree" in capsys.readouterr().out
    loaded = load_model(folder / "lerobot_layout", LoadOptions(siglip_heads=4))
    loaded.model.action_out.bias[...] = loaded.model.action_out.bias[...] + 0.01
    export.convert(loaded, tmp_path / "changed", "torch")
    with pytest.raises(SystemExit) as e:
        cli.main(["verify", str(tmp_path / "changed"), str(folder)])
    assert e.value.code == 1
    assert "v_t" in capsys.readouterr().out.split("FAILED: ")[-1]
    with pytest.raises(SystemExit) as e:
        cli.main(["verify", str(folder / "lerobot_layout"), str(tmp_path)])
    assert e.value.code == 2
    assert "is no golden" in capsys.readouterr().err


def test_a_converted_checkpoint_still_agrees(tmp_path):
    """Its configuration travels along; without, it would run with PyTorch's time embedding. The golden says whose it is."""
    loaded = load_model(GOLDEN / "pi05")
    export.convert(loaded, tmp_path / "torch", "torch")
    assert load_model(tmp_path / "torch").config == loaded.config
    (tmp_path / "torch" / "assets" / "config.json").unlink()
    assert load_model(tmp_path / "torch").config.exact_time
    differences, _ = verify(tmp_path / "torch", GOLDEN / "pi05")
    assert [d.name for d in differences if not d.ok] == []


def test_head_counts_are_found_by_trying():
    differences, notes = verify(GOLDEN / "torch_pi0" / "openpi_layout_bf16", GOLDEN / "torch_pi0")
    assert any("siglip_heads 4" in note for note in notes)
    assert all(d.ok for d in differences)
    wrong, _ = verify(GOLDEN / "torch_pi0" / "openpi_layout_bf16", GOLDEN / "torch_pi0", siglip_heads=2)
    assert not all(d.ok for d in wrong)


def test_positions_and_masks_are_openpis(model, golden):
    valid = golden["prefix_mask"]
    np.testing.assert_array_equal(np.asarray(positions(valid))[valid], golden["positions"][:, : valid.shape[1]][valid])
    keys = jnp.zeros((1, *valid.shape, 1, 1))
    cache = StackedCache.full(keys, keys, jnp.asarray(valid), jnp.zeros_like(valid))
    mask = action_mask(cache, model.suffix_causal, 1)
    rows = golden["full_attn_mask"][:, valid.shape[1] :]
    np.testing.assert_array_equal(np.asarray(mask), rows)
