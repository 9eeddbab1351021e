"""If this fails, PaliGemma's numbers are no longer those of transformers and big_vision; each check finds a planted fault."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openpi_ar.algorithms.prefill import prefill
from openpi_ar.checkpoints.load import load_model
from openpi_ar.checkpoints.options import LoadOptions
from openpi_ar.doctor import vlm_golden
from openpi_ar.doctor.goldens import comparison, read_arrays
from openpi_ar.doctor.verify import verify
from openpi_ar.doctor.vlm_golden import FEATURES, LOGITS, LOGP
from openpi_ar.models import layers
from openpi_ar.models.paligemma import PaliGemma
from openpi_ar.types import Tokens
from tests.format_fixtures import GOLDEN

FOLDER = GOLDEN / "paligemma"
FLOAT32 = LoadOptions(dtype="float32")


@pytest.fixture(scope="module")
def model() -> PaliGemma:
    return load_model(FOLDER / "hf_bf16", FLOAT32).model


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return read_arrays(FOLDER, "float32")


@pytest.mark.parametrize(
    ("checkpoint", "dtype", "quantities"),
    [
        ("hf_bf16", "float32", 23),
        # big_vision's vocabulary has no rows of padding: the softmax is over fewer rows.
        ("big_vision.npz", "float32", 15),
        ("hf_bf16", "bfloat16", 10),
    ],
)
def test_features_logits_text_and_scores_are_the_references(checkpoint, dtype, quantities):
    differences, _ = verify(FOLDER / checkpoint, FOLDER, compute_dtype=dtype)
    assert [f"{d.name}: {d.largest:.1e}" for d in differences if not d.ok] == []
    assert len(differences) == quantities


def found(model, golden, *names: str) -> set[str]:
    """Quantities that are out of their bounds."""
    only = {k: v for k, v in golden.items() if not names or k.split("/")[-1] in (*names, *vlm_golden.INPUTS)}
    return {d.name.split("/")[-1] for d in vlm_golden.differences(model, only, comparison(only, None)) if not d.ok}


def changed(model: PaliGemma, **tower) -> PaliGemma:
    """The model with other constants of its tower."""
    new = nnx.clone(model)
    for block in (new.vlm.blocks.layers.attn_norm, new.vlm.blocks.layers.mlp_norm, new.vlm.norm):
        block.eps = tower.get("eps", block.eps)
    new.vlm.rope_base = tower.get("rope_base", new.vlm.rope_base)
    return new


@pytest.mark.slow
def test_the_bounds_find_the_smallest_fault(model, golden):
    """An eps of 1e-5 in the norms, which no id and no probability of a first token would show."""
    assert found(model, golden, "last_logits", "tf_logp", "greedy_ids") == set()
    assert found(changed(model, eps=1e-5), golden, "last_logits", "tf_logp", "greedy_ids") == {"last_logits", "tf_logp"}
    assert "greedy_ids" in found(changed(model, rope_base=50_000.0), golden, "greedy_ids")


def test_exact_gelu_is_found_in_the_features(model, golden, monkeypatch):
    def gap() -> float:
        # A trace of its own: one of the doctor's, made with the wrong function, would serve every later test.
        features = jax.jit(lambda model, obs: model.embed_images(obs))(nnx.clone(model), vlm_golden.observation(golden))
        return float(np.abs(np.asarray(features) - golden["image_features"]).max())

    assert gap() <= FEATURES
    monkeypatch.setitem(layers.ACTIVATIONS, "gelu_tanh", layers.ACTIVATIONS["gelu"])
    assert gap() > 10 * FEATURES


def shown(model, golden, **prompt) -> float:
    """Largest difference of the logits after the prompts, whose bits are changed."""
    obs = vlm_golden.observation(golden)
    obs = dataclasses.replace(obs, prompt=dataclasses.replace(obs.prompt, **prompt))
    logits = model.logits(jax.jit(prefill)(model, obs)[0].prompt_last)
    want = np.stack([golden[f"row{b}/last_logits"] for b in range(len(logits))])
    return float(np.abs(np.asarray(logits) - want).max())


def test_the_prompt_is_bidirectional_and_padding_holds_no_position(model, golden):
    ids, n = golden["prompt_ids"], golden["prompt_len"]
    assert shown(model, golden) <= LOGITS
    assert shown(model, golden, causal=np.ones(ids.shape, bool)) > 1
    assert shown(model, golden, valid=np.ones(ids.shape, bool)) > 1
    # The same tokens on the right of their padding: the same numbers.
    left = np.stack([np.roll(row, len(row) - k) for row, k in zip(ids, n, strict=True)])
    valid = np.arange(ids.shape[1]) >= ids.shape[1] - n[:, None]
    assert shown(model, golden, ids=left, valid=valid) <= LOGITS


def test_a_suffix_that_sees_itself_whole_is_not_scored_as_the_reference_does(model, golden):
    """The forward without labels of transformers 4.53: everything bidirectional."""
    obs, suffix = vlm_golden.observation(golden), vlm_golden.written(golden["suffix_ids"], golden["suffix_len"])
    _, right = vlm_golden.told(model, obs, suffix)
    _, wrong = vlm_golden.told(model, obs, dataclasses.replace(suffix, causal=np.zeros_like(suffix.causal)))
    assert abs(float(right) - golden["batch/tf_loss_right"]) <= LOGP < abs(float(wrong) - golden["batch/tf_loss_right"])


@pytest.mark.parametrize("name", ["valid", "causal", "loss"])
def test_a_float_mask_is_refused_and_says_why(name):
    additive = np.where(np.arange(4) < 2, 0.0, -np.inf).astype(np.float32)[None]
    for mask in (additive, jnp.asarray(additive, "bfloat16"), additive.tolist()):
        with pytest.raises(ValueError, match=f"mask '{name}' must be boolean, found .*float.*the opposite"):
            Tokens.of(np.zeros((1, 4), np.int32), **{name: mask})
    assert Tokens.of(np.zeros((1, 4), np.int32), **{name: np.array([[1, 1, 0, 0]])}).valid.dtype == bool


def test_features_have_a_bound_of_their_own(model, golden):
    dark = golden | {"image_uint8": golden["image_uint8"] // 255 * 255}
    assert found(model, golden, "image_features") == set() != found(model, dark, "image_features")
    assert FEATURES < LOGITS
