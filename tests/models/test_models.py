"""If this fails, the towers no longer compute what openpi's compute, or no longer build at every size."""

import dataclasses
import gzip
import json
import math
from pathlib import Path

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import get_preset
from openpi_ar.algorithms import losses
from openpi_ar.algorithms.prefill import prefill
from openpi_ar.config import LossConfig
from openpi_ar.model_config import GEMMA_2B, GEMMA_300M, ModelConfig, TowerConfig, VitConfig
from openpi_ar.models import family, layers
from openpi_ar.models.cache import StackedCache, positions, prefix_lm_mask
from openpi_ar.models.vit import VisionTransformer
from openpi_ar.models.vlm import Run
from tests.model_fixtures import max_diff, ragged_batch, tiny_config, tiny_model

KEYS = Path(__file__).parents[1] / "golden" / "keys" / "public_checkpoints.json.gz"


@pytest.mark.parametrize(("pi05", "horizon", "count"), [(True, 10, 3_353_433_872), (False, 50, 3_238_048_528)])
def test_full_size_parameter_count_is_openpis(pi05, horizon, count):
    cfg = ModelConfig(pi05=pi05, action_horizon=horizon)
    model = family.abstract(cfg)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model)) == count


@pytest.mark.parametrize("name", ["pi05", "pi0"])
def test_full_size_shapes_are_openpis(name):
    """Every array of openpi's full-size tree has a counterpart of the same shape here, and nothing is left over."""
    public = json.loads(gzip.decompress(KEYS.read_bytes()))
    theirs = [tuple(shape) for shape, _ in public[f"openpi_jax_{name}"].values()]
    model = family.abstract(ModelConfig(pi05=name == "pi05"))
    ours = [leaf.shape for leaf in jax.tree.leaves(model)]
    # The one difference in form: openpi keeps a leading 1 on the position embedding.
    assert sorted(ours) == sorted((256, 1152) if s == (1, 256, 1152) else s for s in theirs)


@pytest.mark.parametrize("name", ["pi05_subtask_lora", "pi0"])
def test_a_model_of_shapes_only_is_that_of_random_keys(name):
    """It is built without keys, because random numbers take ten times as long to trace."""
    cfg = get_preset(name).model
    shapes, random = family.abstract(cfg), nnx.eval_shape(lambda: family.create(cfg, rngs=nnx.Rngs(0)))
    assert jax.tree.structure(shapes) == jax.tree.structure(random)
    described = [[(x.shape, x.dtype) for x in jax.tree.leaves(model)] for model in (shapes, random)]
    assert described[0] == described[1]
    assert np.std(layers.normal_init(jax.random.key(0), (99,))) > 0.5  # only without a key it is zeros


def test_towers_must_share_heads():
    with pytest.raises(ValueError, match="share keys and values"):
        ModelConfig(vlm=GEMMA_2B, expert=TowerConfig(1024, 18, 4096, 8, 1, 128))
    with pytest.raises(ValueError, match="smaller than siglip.patch_size"):
        ModelConfig(siglip=VitConfig(image_size=(13, 224)))
    assert ModelConfig().expert is GEMMA_300M


def test_prefix_lm_mask_table():
    def mask(causal, valid=None):
        causal = jnp.array([causal], bool)
        valid = jnp.ones_like(causal) if valid is None else jnp.array([valid], bool)
        return np.asarray(prefix_lm_mask(valid, causal)[0]).astype(int).tolist()

    assert mask([0, 0, 1, 1]) == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert mask([1, 1, 0]) == [[1, 0, 0], [1, 1, 1], [1, 1, 1]]
    assert mask([0, 0, 1], [1, 0, 1]) == [[1, 0, 0], [0, 0, 0], [1, 0, 1]]
    assert positions(jnp.array([[1, 0, 1, 1]], bool)).tolist() == [[0, 0, 1, 2]]


def test_rms_norm_against_float64():
    x = np.random.default_rng(0).normal(size=(2, 3, 16)) * 3
    norm = layers.RMSNorm(16)
    norm.scale[...] = jnp.linspace(-0.5, 0.5, 16)
    want = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * (1 + np.linspace(-0.5, 0.5, 16))
    got, gate = norm(jnp.asarray(x, jnp.float32))
    assert gate is None
    assert max_diff(got, want) < 2e-6  # a few float32 roundings of values up to 4
    assert max_diff(got, want / (1 + np.linspace(-0.5, 0.5, 16))) > 0.1  # control: the scale's +1 matters


def test_ada_rms_chunks_are_scale_shift_gate():
    norm = layers.AdaRMSNorm(4, rngs=nnx.Rngs(0))
    norm.modulation.bias[...] = jnp.array([1.0] * 4 + [2.0] * 4 + [3.0] * 4)
    x = jnp.array([[[1.0, -1.0, 1.0, -1.0]]])
    y, gate = norm(x, jnp.zeros((1, 1, 4)))
    assert max_diff(y, x * 2.0 + 2.0) < 1e-5  # x has unit rms up to eps 1e-6
    assert max_diff(gate, 3.0) == 0.0


def test_rope_depends_on_relative_position_only():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

    def score(i, j):
        turned_q = layers.rotate(q, *layers.rotary(jnp.array([[i]]), 8))
        turned_k = layers.rotate(k, *layers.rotary(jnp.array([[j]]), 8))
        return float((turned_q * turned_k).sum())

    assert abs(score(3, 1) - score(12, 10)) < 1e-5
    assert abs(score(3, 1) - score(3, 2)) > 1e-3  # control
    # split halves, base 10,000: the first pair of (0, h/2) turns by one radian a position
    turned = layers.rotate(jnp.eye(8)[None, None, :1], *layers.rotary(jnp.array([[1]]), 8))[0, 0, 0]
    want = np.zeros(8)
    want[0], want[4] = np.cos(1.0), np.sin(1.0)
    assert max_diff(turned, want) < 1e-6


def test_grouped_attention_against_plain_numpy():
    """GQA over two runs of keys equals one softmax over their concatenation, head by head."""
    rng = np.random.default_rng(1)
    q = rng.normal(size=(2, 3, 4, 5))
    k, v = rng.normal(size=(2, 2, 7, 2, 5))
    mask = rng.random((2, 3, 7)) < 0.7
    mask[..., 0] = True
    want = np.zeros_like(q)
    for b, t, n in np.ndindex(2, 3, 4):
        logits = np.where(mask[b, t], k[b, :, n // 2] @ q[b, t, n], -np.inf)
        p = np.exp(logits - logits.max())
        want[b, t, n] = (p / p.sum()) @ v[b, :, n // 2]
    f32 = [jnp.asarray(a, jnp.float32) for a in (q, k, v)]
    got = layers.attend(f32[0], [(f32[1][:, :4], f32[2][:, :4]), (f32[1][:, 4:], f32[2][:, 4:])], jnp.asarray(mask))
    assert max_diff(got, want) < 2e-6


def test_sincos_embedding_periods():
    emb = layers.sincos_embedding(jnp.array([0.0, 1.0, 0.004]), 8)
    assert emb[0].tolist() == [0.0] * 4 + [1.0] * 4
    assert abs(float(emb[1, 3]) - math.sin(2 * math.pi / 4.0)) < 1e-6  # slowest: period 4
    assert abs(float(emb[2, 0]) - math.sin(2 * math.pi)) < 1e-5  # fastest: period 0.004
    with pytest.raises(ValueError, match="even width"):
        layers.sincos_embedding(jnp.zeros(1), 7)


def test_patch_embedding_is_a_strided_convolution():
    cfg = tiny_config().siglip
    vit = VisionTransformer(cfg, 16, rngs=nnx.Rngs(0))
    vit.blocks = vit.blocks.unstacked()
    vit.blocks.layers = nnx.List([])
    vit.blocks.depth = 0
    images = jax.random.uniform(jax.random.key(1), (2, *cfg.image_size, 3), minval=-1)
    conv = jax.lax.conv_general_dilated(
        images, vit.patch_kernel[...], (8, 8), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    want = vit.head(vit.norm(conv.reshape(2, -1, cfg.width) + vit.patch_bias[...] + vit.pos_embedding[...]))
    stackless = vit.head(
        vit.norm(
            jnp.einsum(
                "bypxqc,pqcd->byxd",
                images.reshape(2, 2, 8, 3, 8, 3),
                vit.patch_kernel[...],
            ).reshape(2, -1, cfg.width)
            + vit.patch_bias[...]
            + vit.pos_embedding[...]
        )
    )
    assert max_diff(want, stackless) < 1e-5


def random_run(width: int, batch: int = 2, length: int = 5) -> Run:
    """Causal tokens that are all valid."""
    yes = jnp.ones((batch, length), bool)
    return Run(jax.random.normal(jax.random.key(0), (batch, length, width)), yes, yes, ~yes)


def test_unstacked_and_remat_change_nothing():
    model = tiny_model()
    rematted = tiny_model(tiny_config(remat=True))
    run = random_run(32)

    def grad(m):
        return jax.jit(jax.grad(lambda m: jnp.square(m.vlm.extend(run)[0]).sum()))(m)

    (h1, kv1), (h2, kv2) = (
        jax.jit(f)(model) for f in (lambda m: m.vlm.extend(run), lambda m: m.unstacked().vlm.extend(run))
    )
    assert max_diff(h1, h2) < 5e-6  # same arithmetic, other fusions; values of order 3
    assert max(map(max_diff, kv1.keys_values, kv2.keys_values)) < 5e-6
    a, b = jax.tree.leaves(grad(model)), jax.tree.leaves(grad(rematted))
    assert max(max_diff(x, y) / (1 + float(np.abs(x).max())) for x, y in zip(a, b, strict=True)) < 1e-5


def test_attention_of_the_library_computes_the_same(monkeypatch):
    """Both forms of a prefill and the gradient of a training step, with a masked camera and holes between tokens."""
    cfg = tiny_config()
    model = tiny_model(cfg)
    other = jax.tree.unflatten(
        jax.tree.structure(family.abstract(dataclasses.replace(cfg, attention="xla"))), jax.tree.leaves(model)
    )
    batch, key = ragged_batch(cfg), jax.random.key(0)
    real = batch.target.valid

    def computed(model):
        loss = jax.grad(lambda m: losses.compute_loss(m, batch, key, LossConfig())[0])
        out = jax.jit(lambda m: prefill(m, batch.observation, batch.target))(model)[0]
        fast = jax.jit(lambda m: prefill(m.for_inference(), batch.observation, batch.target, last_only=True))(model)[0]
        return out.text[real], fast.text[real], jax.tree.leaves(jax.jit(loss)(model))

    def apart(a, b):
        return max(max_diff(x, y) / (1 + float(np.abs(x).max())) for x, y in zip(a, b, strict=True))

    plain, library = computed(model), computed(other)
    # Two orders of summation over three layers, float32; hidden states of order 3.
    assert max_diff(plain[0], library[0]) < 1e-5 and max_diff(plain[1], library[1]) < 1e-5
    assert apart(plain[2], library[2]) < 1e-5
    # Negative control: the kernel without its mask, which both forms then must show.
    right = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *a, mask=None, **k: right(*a, **k))
    unmasked = computed(other)
    assert max_diff(plain[0], unmasked[0]) > 1e-2 and max_diff(plain[1], unmasked[1]) > 1e-2
    assert apart(plain[2], unmasked[2]) > 1e-2


def test_cache_append_is_where_it_says():
    k = jnp.arange(2 * 1 * 2 * 1 * 1, dtype=jnp.float32).reshape(2, 1, 2, 1, 1)
    yes = jnp.ones((1, 2), bool)
    cache = StackedCache.full(k, -k, yes, ~yes).reserve(1)
    assert cache.valid.tolist() == [[True, True, False]]
    cache = cache.append(k[:, :, :1] + 10, k[:, :, :1], yes[:, :1], yes[:, :1])
    assert cache.k[:, 0, :, 0, 0].tolist() == [[0.0, 1.0, 10.0], [2.0, 3.0, 12.0]]
    assert (cache.next_pos.tolist(), cache.action_pos.tolist(), int(cache.fill)) == ([3], [2], 3)
    assert cache.reserve(2).valid.tolist() == [[True, True, True, False, False]]


def test_bfloat16_stays_close_and_keeps_float32_logits():
    model = tiny_model()
    half = tiny_model(tiny_config(dtype="bfloat16"))
    run = random_run(32)
    a, _ = model.vlm.extend(run)
    b, _ = half.vlm.extend(dataclasses.replace(run, x=run.x.astype(jnp.bfloat16)))
    assert b.dtype == jnp.bfloat16
    assert half.logits(b).dtype == jnp.float32
    assert 1e-3 < float(jnp.abs(a - b).mean()) < 0.05  # 8 bits of mantissa through three blocks


def test_inference_form_gives_the_same_numbers_with_adapters_too():
    """Fused matmuls, merged adapters and the rows that are asked for, against the plain tower."""
    base = tiny_config()
    cfg = tiny_config(
        vlm=dataclasses.replace(base.vlm, lora_rank=2), expert=dataclasses.replace(base.expert, lora_rank=3)
    )
    model = tiny_model(cfg)
    fused, run = model.for_inference(), random_run(cfg.vlm.width)
    picked = np.array([[4, 1], [0, 0]])
    plain, cache = jax.jit(lambda m: m.vlm.extend(run))(model)
    ours, fused_cache = jax.jit(lambda m: m.vlm.extend(run))(fused)
    few, few_cache = jax.jit(lambda m: m.vlm.extend(run, rows=picked))(fused)
    np.testing.assert_allclose(ours, plain, atol=5e-5)
    np.testing.assert_allclose(few, np.take_along_axis(np.asarray(plain), picked[..., None], 1), atol=5e-5)
    for other in (fused_cache, few_cache):
        for a, b in zip(other.keys_values, cache.keys_values, strict=True):
            np.testing.assert_allclose(a, b, atol=5e-5)
    # control: without the adapters the numbers are others
    unadapted = nnx.clone(model)
    for layer in (unadapted.vlm.blocks.layers.q, unadapted.vlm.blocks.layers.out):
        layer.lora_b[...] = jnp.zeros_like(layer.lora_b[...])
    other = jax.jit(lambda m: m.vlm.extend(run))(unadapted)[0]
    assert float(jnp.abs(other - plain).max()) > 1e-3
    assert fused.embedder.table.dtype == jnp.float32
    half = model.for_inference("bfloat16")
    assert half.vlm.blocks[0].qkv.dtype == jnp.bfloat16 and half.action_in.kernel.dtype == jnp.float32


@pytest.mark.parametrize("form", ["stacked", "unstacked", "for_inference"])
def test_a_cache_extended_in_pieces_is_that_of_one_pass(form):
    """A bidirectional run, then causal ones with holes between, appended a few at a time; then read by the action tower."""
    cfg = tiny_config()
    model = tiny_model(cfg) if form == "stacked" else getattr(tiny_model(cfg), form)()
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 9, cfg.vlm.width)), jnp.float32)
    valid = jnp.array([[1, 0, 1, 1, 1, 0, 1, 1, 1], [1, 1, 1, 0, 1, 1, 1, 0, 1]], bool)
    causal = jnp.broadcast_to(jnp.arange(9) >= 3, (2, 9))
    hidden = jnp.zeros((2, 9), bool).at[0, 4].set(True)
    run = Run(x, valid, causal, hidden)
    tokens = jnp.asarray(rng.normal(size=(2, 1, 4, cfg.expert.width)), jnp.float32)
    cond = jnp.asarray(rng.normal(size=(2, 1, cfg.expert.width)), jnp.float32)

    def pieces(m, run, *cuts):
        outs, cache = [], None
        for start, stop in zip((0, *cuts), (*cuts, 9), strict=True):
            part = jax.tree.map(lambda a, i=start, j=stop: a[:, i:j], run)
            # More room than is used: what is left over becomes a hole at the next `reserve`.
            out, cache = m.tower.extend(part, None if cache is None else cache.reserve(stop - start + 1))
            outs.append(out)
        read = [m.action_tower.reader(c, m.suffix_causal)(tokens, cond) for c in (cache, cache.compact())]
        return jnp.concatenate(outs, axis=1), cache.next_pos, cache.action_pos, read

    h1, *pos1, read1 = jax.jit(lambda m: pieces(m, run))(model)
    h2, *pos2, read2 = jax.jit(lambda m: pieces(m, run, 3, 4, 7))(model)
    assert max_diff(h1[valid], h2[valid]) < 2e-5
    for a, b in zip(pos1, pos2, strict=True):
        assert a.tolist() == b.tolist() == ([7, 7] if a is pos1[0] else [6, 7])
    assert max(max_diff(a, read1[0]) for a in (*read1, *read2)) < 2e-5
    # control: a hole that is taken for a token moves everything after it
    late = dataclasses.replace(run, valid=valid.at[0, 5].set(True))
    assert max_diff(h1[0, 6], jax.jit(lambda m: pieces(m, late, 3, 4, 7))(model)[0][0, 6]) > 1e-3
