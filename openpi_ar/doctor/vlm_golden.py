"""What a golden of a vision-language model compares: image features, logits, greedy text, scores of a given text.

inputs.npz   image_uint8 [B h w 3]; prompt_ids, prompt_len: BOS ... newline; suffix_ids, suffix_len: text and EOS
outputs.npz  image_features, row<b>/last_logits, row<b>/greedy_ids, row<b>/tf_logits, row<b>/tf_logp, ...

The rows, of different lengths, go through the model as one batch here; the reference computed each alone.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from openpi_ar.algorithms.generate import generate
from openpi_ar.algorithms.losses import predictors, text_loss
from openpi_ar.algorithms.prefill import prefill
from openpi_ar.algorithms.sampling import Sampling
from openpi_ar.doctor.goldens import Compare, Difference, Golden
from openpi_ar.models.vlm import VLM
from openpi_ar.types import Array, Kind, Observation, Tokens

# Float32 bounds on the largest absolute difference. The references differ among themselves by 1.9e-6 in image features,
# 1.3e-5 in logits and 3e-6 in log-probabilities; the smallest planted fault, an eps of 1e-5 in norms instead of 1e-6,
# moves logits by 8e-5 and log-probabilities by 2.6e-5.
FEATURES, LOGITS, LOGP = 5e-6, 3e-5, 1e-5
# Bounds on the mean in bfloat16, whose distance to float32 in the references themselves is 0.014 to 0.022 on logits.
BFLOAT16 = {FEATURES: 0.02, LOGITS: 0.03, LOGP: 0.04}

INPUTS = ("image_uint8", "prompt_ids", "prompt_len", "suffix_ids", "suffix_len")
NO_EOS = -1


def is_vlm(a: Golden) -> bool:
    """Whether the golden is of a model that only writes text."""
    return "prompt_ids" in a


def observation(a: Golden) -> Observation:
    """The golden's images and prompts as one batch."""
    images = a["image_uint8"][:, None]
    return Observation(
        images=images,
        image_mask=np.ones(images.shape[:2], bool),
        prompt=Tokens.of(a["prompt_ids"], _up_to(a["prompt_len"], a["prompt_ids"])),
        state=np.zeros((len(images), 0), np.float32),
    )


def written(ids: np.ndarray, lengths: np.ndarray) -> Tokens:
    """Text that the model is given: causal and supervised."""
    return Tokens.of(ids, _up_to(lengths, ids), kind=Kind.ANSWER, causal=True, loss=True)


def _up_to(lengths: np.ndarray, ids: np.ndarray) -> np.ndarray:
    return np.arange(ids.shape[1]) < np.asarray(lengths)[:, None]


@jax.jit
def told(model: VLM, obs: Observation, text: Tokens) -> tuple[Array, Array]:
    """(logits of the tokens of a text, the text loss), prefix bidirectional and text causal."""
    out, _ = prefill(model, obs, text)
    assert out.text is not None
    logits = model.logits(predictors(out.prompt_last, out.text, jnp.asarray(text.valid)))
    return logits, text_loss(model, out.prompt_last, out.text, text)[0]


@jax.jit
def _free(model: VLM, obs: Observation, sampling: Sampling) -> tuple[Array, Array]:
    """(logits after the prompt, greedy ids) of the inference form."""
    out, cache = prefill(model, obs, last_only=True)
    return model.logits(out.prompt_last), generate(model, cache, out.prompt_last, sampling)[0].ids


def differences(model: VLM, a: Golden, compare: Compare) -> Iterator[Difference]:
    """Every quantity that the golden has, by `compare(name, ours, bound)`. Both forms of the model are run."""
    obs = observation(a)
    features = jax.jit(lambda model, obs: model.embed_images(obs))(model, obs)
    yield from compare("image_features", features, FEATURES)
    fast = jax.jit(lambda m: m.for_inference())(model)
    suffix, lengths = a["suffix_ids"], a["suffix_len"]
    logits, _ = told(model, obs, written(suffix, lengths))
    logp = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(suffix)[..., None], axis=-1)[..., 0]
    steps = next((v.shape[-1] for k, v in a.items() if k.endswith("greedy_ids")), 1)
    last, ids = _free(fast, obs, Sampling(NO_EOS, steps))
    greedy, _ = told(model, obs, written(np.asarray(ids), np.full(len(suffix), steps)))
    for b, n in enumerate(lengths):
        yield from compare(f"row{b}/last_logits", last[b], LOGITS)
        yield from compare(f"row{b}/greedy_ids", ids[b], 0.0)
        yield from compare(f"row{b}/greedy_logits", greedy[b], LOGITS)
        yield from compare(f"row{b}/tf_logits", logits[b, :n], LOGITS)
        yield from compare(f"row{b}/tf_logp", logp[b, :n], LOGP)
        alone = jax.tree.map(lambda x, b=b: x[b : b + 1], (obs, written(suffix, lengths)))
        yield from compare(f"row{b}/tf_loss", told(model, *alone)[1], LOGP)
    yield from compare("batch/greedy_ids", ids, 0.0)
    for name in ("batch/tf_loss_left", "batch/tf_loss_right"):
        yield from compare(name, told(model, obs, written(suffix, lengths))[1], LOGP)
    if "batch/greedy_eos_id" in a:
        ended = _free(fast, obs, Sampling(int(a["batch/greedy_eos_id"]), steps))[1]
        yield from compare("batch/greedy_ids_eos", ended, 0.0)
