"""If this fails, a config value of the decoder or of the vision transformer no longer means what Llama, DINOv2 and SigLIP need."""

import dataclasses
from pathlib import Path

from einops import rearrange
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from openpi_ar.algorithms.generate import generate
from openpi_ar.algorithms.prefill import prefill
from openpi_ar.algorithms.sampling import Sampling
from openpi_ar.model_config import ModelConfig, TowerConfig, VitConfig
from openpi_ar.models.decoder import Embedder, Tower
from openpi_ar.models.fused import FusedTower
from openpi_ar.models.vit import VisionTransformer
from openpi_ar.models.vlm import VLM, Run
from openpi_ar.params import with_leaves
from openpi_ar.types import Observation, Tokens
from tests.model_fixtures import max_diff

FOLDER = Path(__file__).parents[1] / "golden" / "openvla"
BOUND = 2e-5
"""Float32 through three or four blocks, two orders of summation; values of order 1."""
LLAMA = TowerConfig(
    width=32,
    depth=3,
    mlp_dim=72,
    num_heads=4,
    num_kv_heads=4,
    head_dim=8,
    norm_offset=0.0,
    activation="silu",
    scaled_embeddings=False,
    tied_head=False,
)
DINO = VitConfig(
    width=32,
    depth=4,
    mlp_dim=128,
    num_heads=4,
    image_size=(56, 56),
    activation="gelu",
    layer_scale=True,
    lead_tokens=5,
    tap=-2,
    final_norm=False,
)
SIGLIP = VitConfig(
    width=24, depth=3, mlp_dim=89, num_heads=3, image_size=(56, 56), activation="gelu", tap=-2, final_norm=False
)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(FOLDER / "golden.npz"))


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    files = sorted(FOLDER.glob("*.safetensors"))
    return {k: v.astype(np.float32) for file in files for k, v in load_file(file).items()}


def filled(build, arrays: dict[str, np.ndarray]):
    """The module with those of the arrays that it has a place for; every other parameter is 0."""
    tree = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), nnx.eval_shape(build))
    for path, value in arrays.items():
        try:
            tree = with_leaves(tree, {path: jnp.asarray(value)})
        except KeyError:  # a variant without it
            continue
    return tree


def stacked(weights: dict[str, np.ndarray], name: str, depth: int, axes: str, **sizes: int) -> np.ndarray:
    return np.stack([rearrange(weights[name.format(i)], axes, **sizes) for i in range(depth)])


def llama(weights, cfg: TowerConfig = LLAMA) -> Tower:
    def rows(name: str, axes: str) -> np.ndarray:
        return stacked(weights, f"language_model.model.layers.{{}}.{name}.weight", 3, axes, **sizes)

    sizes: dict[str, int] = {}
    arrays = {
        "blocks/layers/attn_norm/scale": rows("input_layernorm", "D -> D"),
        "blocks/layers/mlp_norm/scale": rows("post_attention_layernorm", "D -> D"),
        "blocks/layers/mlp/gate_up": np.stack([rows(f"mlp.{x}_proj", "F D -> D F") for x in ("gate", "up")], 1),
        "blocks/layers/mlp/down": rows("mlp.down_proj", "D F -> F D"),
        "norm/scale": weights["language_model.model.norm.weight"],
    }
    sizes["H"] = 8
    arrays["blocks/layers/q/w"] = rows("self_attn.q_proj", "(N H) D -> N D H")
    arrays["blocks/layers/kv/w"] = np.stack([rows(f"self_attn.{x}_proj", "(K H) D -> K D H") for x in "kv"], 1)
    arrays["blocks/layers/out/w"] = rows("self_attn.o_proj", "D (N H) -> N H D")
    return filled(lambda: Tower(cfg, adaptive=False, rngs=nnx.Rngs(0)), arrays)


def vit(weights, prefix: str, cfg: VitConfig) -> VisionTransformer:
    def rows(name: str, axes: str, **sizes: int) -> np.ndarray:
        return stacked(weights, f"{prefix}.blocks.{{}}.{name}", cfg.depth, axes, **sizes)

    block, heads = "blocks/layers", {"c": 3, "N": cfg.num_heads}
    arrays = {
        "patch_kernel": rearrange(weights[f"{prefix}.patch_embed.proj.weight"], "D C p q -> p q C D"),
        "patch_bias": weights[f"{prefix}.patch_embed.proj.bias"],
        "pos_embedding": weights[f"{prefix}.pos_embed"][0],
        "norm/scale": weights[f"{prefix}.norm.weight"],
        "norm/bias": weights[f"{prefix}.norm.bias"],
        f"{block}/attn/out/w": rows("attn.proj.weight", "D (N H) -> N H D", N=cfg.num_heads),
        f"{block}/attn/out_bias": rows("attn.proj.bias", "D -> D"),
    }
    qkv = rows("attn.qkv.weight", "(c N H) D -> c D N H", **heads)
    bias = rows("attn.qkv.bias", "(c N H) -> c N H", **heads)
    for i, x in enumerate("qkv"):
        arrays |= {f"{block}/attn/{x}/w": qkv[:, i], f"{block}/attn/{x}_bias": bias[:, i]}
    for i in (1, 2):
        arrays[f"{block}/norm{i}/scale"] = rows(f"norm{i}.weight", "D -> D")
        arrays[f"{block}/norm{i}/bias"] = rows(f"norm{i}.bias", "D -> D")
        arrays[f"{block}/fc{i}/kernel"] = rows(f"mlp.fc{i}.weight", "o i -> i o")
        arrays[f"{block}/fc{i}/bias"] = rows(f"mlp.fc{i}.bias", "o -> o")
        if f"{prefix}.blocks.0.ls1.scale_factor" in weights:
            arrays[f"{block}/gamma{i}"] = rows(f"ls{i}.scale_factor", "D -> D")
    if f"{prefix}.cls_token" in weights:
        lead = np.concatenate([weights[f"{prefix}.cls_token"][0], weights[f"{prefix}.reg_token"][0]])
        arrays["lead"] = lead[: cfg.lead_tokens]
    return filled(lambda: VisionTransformer(cfg, None, rngs=nnx.Rngs(0)), arrays)


def images(golden, channels: slice) -> np.ndarray:
    return rearrange(golden["pixel_values"][:, channels], "B C h w -> B h w C")


def see(tower: VisionTransformer, x: np.ndarray) -> jax.Array:
    return jax.jit(lambda m, x: m(x, jnp.dtype("float32")))(tower, x)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"activation": "gelu_tanh"},
        {"norm_eps": 1e-3},
        {"qkv_bias": False},
        {"layer_scale": False},
        {"lead_tokens": 0},
        {"tap": -1},
        {"final_norm": True},
    ],
    ids=str,
)
def test_dinov2_is_timms_and_each_of_its_conventions_matters(weights, golden, change):
    tower = vit(weights, "vision_backbone.featurizer", dataclasses.replace(DINO, **change))
    gap = max_diff(see(tower, images(golden, slice(0, 3))), golden["dino_features"])
    assert gap > 10 * BOUND if change else gap < BOUND


@pytest.mark.parametrize("change", [{}, {"activation": "gelu_tanh"}, {"tap": -1}], ids=str)
def test_timms_siglip_is_siglip_with_exact_gelu(weights, golden, change):
    tower = vit(weights, "vision_backbone.fused_featurizer", dataclasses.replace(SIGLIP, **change))
    gap = max_diff(see(tower, images(golden, slice(3, 6))), golden["siglip_features"])
    assert gap > 10 * BOUND if change else gap < BOUND


def prompt(golden) -> Run:
    x = jnp.asarray(golden["inputs_embeds"])
    yes = jnp.ones(x.shape[:2], bool)
    return Run(x, yes, yes, ~yes)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "change",
    [{}, {"norm_offset": 1.0}, {"norm_eps": 1e-3}, {"activation": "gelu_tanh"}, {"rope_base": 1e3}],
    ids=str,
)
def test_llama_is_transformers_and_each_of_its_conventions_matters(weights, golden, change, fused):
    tower = llama(weights, dataclasses.replace(LLAMA, **change))
    if fused:
        tower = FusedTower(tower, jnp.dtype("float32"), decodes=True)
    hidden, _ = jax.jit(lambda m, run: m.extend(run))(tower, prompt(golden))
    gap = max_diff(hidden, golden["hidden_after_final_norm"])
    assert gap > 10 * BOUND if change else gap < BOUND


class Llama(nnx.Module):
    """A `VLM` of another family than the package has: its prompt is embedded elsewhere, all of it is causal."""

    def __init__(self, tower, embedder, run: Run):
        self.cfg, self.tower, self.embedder, self.run = ModelConfig(), tower, embedder, nnx.data(run)

    def embed(self, obs, image_tokens=None) -> Run:
        return self.run

    def embed_images(self, obs):
        return jnp.zeros((2, 0, 32))

    def embed_text(self, ids):
        return self.embedder.encode(ids)

    def head_weight(self):
        return self.embedder.weight

    def logits(self, hidden):
        return self.embedder.logits(hidden)

    # Part of the protocol; who generates takes the model in the form that it is given.
    def unstacked(self):
        pytest.fail("generating asked for another form of the model")

    def for_inference(self, dtype=None):
        pytest.fail("generating asked for another form of the model")


@pytest.mark.parametrize(
    ("fused", "scaled", "tied"),
    [(False, False, False), (True, False, False), (False, True, False), (False, False, True)],
)
def test_another_family_generates_with_the_same_loop(weights, golden, fused, scaled, tied):
    """Greedy ids of OpenVLA's language model, by algorithms that know it through the protocol alone; with pad rows in the head."""
    table, head = (weights[f"language_model.{name}.weight"] for name in ("model.embed_tokens", "lm_head"))
    embedder = filled(
        lambda: Embedder(384, 32, rngs=nnx.Rngs(0), scaled=scaled, tied=tied), {"table": table, "head": head}
    )
    tower = llama(weights)
    model = Llama(FusedTower(tower, jnp.dtype("float32"), decodes=True) if fused else tower, embedder, prompt(golden))
    assert isinstance(model, VLM)
    obs = Observation(
        images=np.zeros((2, 1, 1, 1, 3), np.uint8),
        image_mask=np.ones((2, 1), bool),
        prompt=Tokens.of(np.zeros((2, 1), np.int32)),
        state=np.zeros((2, 1), np.float32),
    )

    def run(model: Llama):
        out, cache = prefill(model, obs, last_only=True)
        return model.logits(out.prompt_last), generate(model, cache, out.prompt_last, Sampling(-1, 7))[0]

    logits, text = jax.jit(run)(model)
    right = (np.asarray(text.ids) == golden["action_ids"]).all()
    if scaled or tied:  # controls
        assert not right
        return
    assert right
    assert max_diff(logits, golden["prefill_last_logits"]) < 10 * BOUND
    p = jax.nn.log_softmax(golden["decode_logits"])
    want = np.take_along_axis(np.asarray(p), golden["action_ids"][..., None], -1)[..., 0]
    assert max_diff(text.logprobs, want) < 10 * BOUND
