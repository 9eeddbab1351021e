"""A checkpoint against a golden: arrays that the reference code computed from known inputs.

Rows of padding and masked cameras are compared nowhere: the references attend from them to everything, which means
nothing.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
from pathlib import Path
import re
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from openpi_ar.algorithms import flow, losses
from openpi_ar.algorithms.generate import generate
from openpi_ar.algorithms.prefill import prefill
from openpi_ar.algorithms.sampling import Sampling
from openpi_ar.checkpoints.load import Inspected, inspect, load_model, read
from openpi_ar.checkpoints.options import Dtype, LoadOptions
from openpi_ar.doctor import vlm_golden
from openpi_ar.doctor.goldens import (
    Arrays,
    Compare,
    Difference,
    Golden,
    action_horizon,
    camera_names,
    comparison,
    image_size,
    input_arrays,
    observation,
    read_arrays,
    text_run,
)
from openpi_ar.errors import UserError
from openpi_ar.models.cache import Cache
from openpi_ar.models.layers import sincos_embedding
from openpi_ar.models.vlm import VLA
from openpi_ar.textfile import read_object, whole_number
from openpi_ar.types import Observation

# Float32 bounds on the largest absolute difference: the rounding of two orders of summation, over 4 to 18 layers.
# Against PyTorch they are looser because a model whose weights came from JAX computes the time embedding in float32.
HIDDEN, VELOCITY, ACTIONS = 5e-5, 1e-4, 5e-4
TORCH_VELOCITY, TORCH_ACTIONS = 3e-4, 1e-3
# bfloat16 rounds differently in every order of operations: the mean is judged. The reference's own distance to its
# float32 result is 0.038 on velocities of deviation 1.43.
BFLOAT16_MEAN = 0.038

# Jitted whole: op by op, a golden takes minutes.
_embed_images = jax.jit(lambda model, obs: model.embed_images(obs))
_prefill = jax.jit(prefill)
_denoise = jax.jit(flow.denoise, static_argnames="num_steps")
_generate = jax.jit(generate)


def verify(
    path: str | Path, golden: Path, *, compute_dtype: Dtype = "float32", siglip_heads: int | None = None
) -> tuple[list[Difference], tuple[str, ...]]:
    """(differences by quantity, notes of the loader).

    The golden's own config.json gives what the checkpoint's shapes do not tell. Where neither tells the number of
    SigLIP heads, the one is taken at which the image tokens agree best, and a note says so.

    Raises UserError if the directory is no golden or of another kind of model, or the checkpoint cannot be loaded or
    has other dimensions.
    """
    arrays = read_arrays(golden, compute_dtype)
    if vlm_golden.is_vlm(arrays):
        return _verify_vlm(path, arrays, compute_dtype, siglip_heads)
    body = read_object(golden / "config.json") if (golden / "config.json").is_file() else {}
    heads, kv_heads = (_number(body, part, key) for part, key in (("siglip", "num_heads"), ("pali", "num_kv_heads")))
    cameras = camera_names(arrays, body.get("image_keys"), golden)
    size, horizon = image_size(arrays, golden), action_horizon(arrays, golden, body.get("kind"))
    known = LoadOptions(
        dtype=None if compute_dtype == "bfloat16" else "float32",
        compute_dtype=compute_dtype,
        image_size=size,
        action_horizon=horizon,
        cameras=cameras,
        num_kv_heads=kv_heads,
        siglip_heads=siglip_heads or heads,
    )
    looked, counts = _head_counts(path, known)
    if looked.grid != looked.config.siglip.grid:
        raise UserError(
            f"{golden}: images of {size[0]} x {size[1]} are {looked.config.siglip.grid} patches, {path} has position "
            f"embeddings for {looked.grid}"
        )
    arrays = Arrays(arrays | input_arrays(arrays, cameras))
    if len(counts) == 1:
        best, notes = read(looked).acting()[0], looked.notes
    else:
        tried = {n: read(inspect(path, dataclasses.replace(known, siglip_heads=n))).acting()[0] for n in counts}
        count = min(counts, key=lambda n: _image_error(tried[n], arrays, cameras))
        note = f"siglip_heads {count}: of {counts}, the image tokens agree best with it"
        best, notes = tried[count], (*looked.notes, note)
    # A converted checkpoint is the same weights: the golden says whose time embedding it was computed with.
    model = nnx.clone(best)
    model.cfg = dataclasses.replace(model.cfg, exact_time="in_tokens" in arrays)
    with jax.default_matmul_precision("highest"):
        return list(_differences(model, arrays, cameras, bfloat16=compute_dtype == "bfloat16")), notes


def _number(body: dict[str, Any], part: str, key: str) -> int | None:
    """A number of a golden's config.json; None: it does not say."""
    inner = body.get(part)
    return whole_number(inner, key, "the golden's config.json", 1) if isinstance(inner, dict) and key in inner else None


def _verify_vlm(
    path: str | Path, arrays: Golden, compute_dtype: Dtype, siglip_heads: int | None
) -> tuple[list[Difference], tuple[str, ...]]:
    """`verify` of a golden of a vision-language model."""
    size = arrays["image_uint8"].shape[1:3]
    dtype = None if compute_dtype == "bfloat16" else "float32"
    options = LoadOptions(dtype=dtype, compute_dtype=compute_dtype, siglip_heads=siglip_heads, image_size=size)
    loaded = load_model(path, options)
    rows = loaded.config.vocab_size
    pads = max((a.shape[-1] for name, a in arrays.items() if name.endswith("logits")), default=rows) - rows
    notes = loaded.notes
    if pads > 0:
        # big_vision's vocabulary ends where the others' padding begins, which takes its share of the softmax.
        arrays = {
            name: a[..., :rows] if name.endswith("logits") else a
            for name, a in arrays.items()
            if "logp" not in name and "loss" not in name
        }
        notes += (f"the checkpoint lacks {pads} rows of the golden's vocabulary: log-probabilities are not compared",)
    with jax.default_matmul_precision("highest"):
        compare = comparison(arrays, vlm_golden.BFLOAT16.get if compute_dtype == "bfloat16" else None)
        return list(vlm_golden.differences(loaded.model, arrays, compare)), notes


def _head_counts(path: str | Path, known: LoadOptions) -> tuple[Inspected, list[int]]:
    """The checkpoint, and the head counts of SigLIP to try: one if options, files or shapes tell it."""
    with contextlib.suppress(*() if known.siglip_heads else (UserError,)):  # the public models' number need not divide
        looked = inspect(path, known)
        if not any(note.startswith("siglip_heads") for note in looked.notes):
            return looked, [looked.config.siglip.num_heads]
    looked = inspect(path, dataclasses.replace(known, siglip_heads=1))
    width = looked.config.siglip.width
    return looked, [n for n in range(1, 33) if width % n == 0 and width // n >= 8]


def _image_error(model: VLA, a: Golden, cameras: tuple[str, ...]) -> float:
    prefix = "" if "in_ids" in a else "train:"
    ours = np.asarray(_embed_images(model, observation(a, prefix)))
    if "image_features" in a:
        golden = a["image_features"].reshape(ours.shape)
    elif "prefix_tokens" in a or "train/prefix_tokens" in a:
        golden = a["prefix_tokens" if "prefix_tokens" in a else "train/prefix_tokens"][:, : ours.shape[1]]
    else:
        golden = np.concatenate([a[f"img_tokens/{c}"] for c in cameras], axis=1)
    return float(np.abs(ours - golden).max())


def _differences(model: VLA, a: Golden, cameras: tuple[str, ...], *, bfloat16: bool) -> Iterator[Difference]:
    torch = "in_tokens" in a
    velocity, actions = (TORCH_VELOCITY, TORCH_ACTIONS) if torch else (VELOCITY, ACTIONS)

    compare = comparison(a, (lambda bound: BFLOAT16_MEAN) if bfloat16 else None)
    if "train:in_ids" in a:
        yield from _subtask(model, a, compare)
        return
    obs = observation(a)
    image_tokens = _embed_images(model, obs)
    per_camera = image_tokens.shape[1] // len(cameras)
    for i, camera in enumerate(cameras):
        yield from compare(f"img_tokens/{camera}", image_tokens[:, i * per_camera : (i + 1) * per_camera], HIDDEN)
    if "image_features" in a:
        yield from compare("image_features", image_tokens.reshape(a["image_features"].shape), HIDDEN)
    tokens = jnp.concatenate([image_tokens, model.embed_text(obs.prompt.ids)], axis=1)
    out, cache = _prefill(model, obs, image_tokens=image_tokens)
    valid = np.asarray(cache.valid)
    for name in ("prefix_tokens", "prefix_embs"):
        yield from compare(name, tokens, HIDDEN)
    for name in ("prefix_out", "prefix_hidden", "sample10/prefill_prefix_out"):
        yield from compare(name, out.hidden, HIDDEN, valid)
    text = image_tokens.shape[1]
    if "text_logits" in a:
        yield from compare("text_logits", model.logits(out.hidden[:, text:]), 1e-4, valid[:, text:])
    for name, array in zip("kv", cache.keys_values, strict=True):
        stored = np.broadcast_to(valid, (array.shape[0], *valid.shape))
        yield from compare(f"sample10/kv_cache_{name}", array, HIDDEN, stored)
    yield from _flow(model, obs, cache, a, "", compare, velocity, actions)


def _flow(
    model: VLA,
    obs: Observation,
    cache: Cache,
    a: Golden,
    prefix: str,
    compare: Compare,
    velocity: float,
    actions: float,
) -> Iterator[Difference]:
    """Everything of the action tower. `prefix` is `train` for the subtask golden."""
    inputs, outputs = (f"{prefix}:", f"{prefix}/") if prefix else ("", "")
    clean, noise, t = (jnp.asarray(a[f"{inputs}in_{name}"]) for name in ("actions", "noise", "time"))
    w = t[:, None, None]
    x_t = jnp.asarray(a["in_x_t"]) if "in_x_t" in a else w * noise + (1 - w) * clean
    yield from compare(f"{outputs}x_t", x_t, 1e-6)
    embedding = sincos_embedding(t, model.cfg.expert.width, exact=model.cfg.exact_time)
    yield from compare(f"{outputs}time_posemb", embedding, HIDDEN)
    suffix, cond = model.embed_suffix(obs, x_t[:, None], t[:, None])
    # Torch's time embedding differs from JAX's by up to 1e-4: see above.
    embedded = velocity if "in_tokens" in a else HIDDEN
    for name in ("suffix_tokens", "suffix_embs"):
        yield from compare(f"{outputs}{name}", suffix[:, 0], embedded)
    if cond is not None:
        yield from compare(f"{outputs}adarms_cond", cond[:, 0], embedded)
    hidden = model.action_tower.reader(cache, model.suffix_causal)(suffix, cond)
    last = hidden[:, 0, -a[f"{outputs}suffix_out"].shape[1] :] if f"{outputs}suffix_out" in a else hidden[:, 0]
    yield from compare(f"{outputs}suffix_out", last, embedded)
    if "suffix_hidden" in a:
        yield from compare("suffix_hidden", hidden[:, 0, -a["suffix_hidden"].shape[1] :], embedded)
    v = model.project_velocity(hidden)[:, 0]
    for name in ("v_t", "v_t_cached"):
        yield from compare(f"{outputs}{name}", v, velocity)
    error = losses.flow_error(model, obs, cache, clean, noise[:, None], t[:, None])[:, 0]
    # A square moves by 2 |v - u| times what the velocity moves by.
    square = velocity * max(1.0, 2 * float(jnp.sqrt(error.max())))
    for name in ("flow_loss_elem", "loss_per_element"):
        yield from compare(f"{outputs}{name}", error, square)
    yield from compare(f"{outputs}flow_loss", error.mean(-1), square)
    for name in [k for k in a if re.fullmatch(r"(sample_)?actions_\d+", k)]:
        steps = int(name.rsplit("_", 1)[1])
        yield from compare(name, _denoise(model, obs, cache, noise, num_steps=steps), actions)


def _subtask(model: VLA, a: Golden, compare: Compare) -> Iterator[Difference]:
    """A subtask model whose text is all causal: cross-entropy, flow, free decoding, actions conditioned on the
    generated text."""
    obs = observation(a, "train:", causal=True)
    out, cache = _prefill(model, obs)
    valid = np.asarray(cache.valid)
    yield from compare("train/prefix_out", out.hidden, HIDDEN, valid)
    ids, seen, loss = a["train:in_ids"], a["train:in_valid"], a["train:token_loss_mask"]
    start = valid.shape[1] - ids.shape[1]
    logits = model.logits(out.hidden[:, start:-1])
    yield from compare("train/logits", logits, 1e-4, seen[:, 1:])
    logp = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(ids)[:, 1:, None], axis=-1)[..., 0]
    yield from compare("train/target_logp", logp, 1e-4, seen[:, 1:])
    # The first token as the prompt, the others as the target: the same sequence as training has it.
    ce = []
    for i in range(len(ids)):
        row = slice(i, i + 1)
        one = dataclasses.replace(
            observation(a, "train:", rows=row), prompt=text_run(ids[row, :1], seen[row, :1], causal=True)
        )
        target = text_run(ids[row, 1:], seen[row, 1:], causal=True, loss=loss[row, 1:])
        result, _ = _prefill(model, one, target)
        assert result.text is not None
        ce.append(losses.text_loss(model, result.prompt_last, result.text, target)[0])
    yield from compare("train/ce_loss", jnp.stack(ce), 1e-4)
    yield from _flow(model, obs, cache, a, "train", compare, VELOCITY, ACTIONS)
    for case in sorted({k.split("/")[0] for k in a if "/nocache_tokens_row" in k}):
        for i in range(len(ids)):
            yield from _decoded(model, a, case, i, compare)


def _decoded(model: VLA, a: Golden, case: str, i: int, compare: Compare) -> Iterator[Difference]:
    """Greedy text of one row, decoded with the cache, and actions on it, against full recomputation without one."""
    name = f"{case}/nocache_{{}}_row{i}"
    obs = observation(a, "sample:", causal=True, rows=slice(i, i + 1))
    if case == "allcam":
        obs = dataclasses.replace(obs, image_mask=np.ones_like(obs.image_mask))
    golden = a[name.format("tokens")]
    out, cache = _prefill(model, obs)
    text, _ = _generate(model, cache, out.prompt_last, Sampling(eos_id=1, max_new_tokens=len(golden)))
    yield from compare(name.format("tokens"), text.ids[0], 0.0)
    given = text_run(golden[None], np.ones((1, len(golden)), bool), causal=True)
    told, cache = _prefill(model, obs, given)
    assert told.text is not None
    predicts = jnp.concatenate([told.prompt_last[:, None], told.text[:, :-1]], axis=1)
    yield from compare(name.format("logits"), model.logits(predicts)[0], 1e-4)
    noise = jnp.asarray(a["sample:in_noise"])[i : i + 1]
    yield from compare(name.format("v0"), flow.velocity(model, obs, cache, noise, jnp.ones(1)), VELOCITY)
    yield from compare(name.format("actions"), _denoise(model, obs, cache, noise, num_steps=10), ACTIONS)
