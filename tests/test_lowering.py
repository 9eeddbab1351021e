"""If this fails, the full-size programs cannot be compiled for a GPU or a TPU, or hold what they must not: logits of a
whole sequence, float64, a way back to the host.

They are traced from shapes and lowered for devices that are not here; nothing is computed or allocated.
"""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding
import pytest

from benchmarks import baseline
from benchmarks.sizes import SIZES
from configs import PRESETS
from openpi_ar.algorithms.act import act
from openpi_ar.algorithms.flow import denoise
from openpi_ar.algorithms.prefill import prefill
from openpi_ar.algorithms.sampling import Sampling
from openpi_ar.models import family
from openpi_ar.training import memory, sharding
from openpi_ar.training.optimizer import make_optimizer
from openpi_ar.training.sharding_pi0 import PI0
from openpi_ar.training.state import train_key
from openpi_ar.training.step import make_train_step
from openpi_ar.types import Observation, Tokens

pytestmark = pytest.mark.slow

FULL = PRESETS["pi05_subtask"]
CFG, PROMPT, TOKENS = FULL.model, SIZES["full"].prompt, SIZES["full"].tokens
MESH = AbstractMesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
"""Eight devices that are not here."""
TO_THE_HOST = re.compile(r"\w*callback\w*|\binfeed\b|\boutfeed\b|stablehlo\.(?:send|recv)\b")


def lowered(jitted: Any, *args: Any) -> dict[str, str]:
    """The program's text on each platform."""
    traced = jitted.trace(*args)
    return {name: traced.lower(lowering_platforms=(name,)).as_text() for name in ("cuda", "tpu")}


def rows_of_logits(text: str) -> int:
    """Most rows of any array that is as wide as the vocabulary, tables of embeddings aside."""
    shapes = {tuple(map(int, s.split("x")[:-1])) for s in re.findall(r"tensor<((?:\d+x)+)[a-z]", text)}
    wide = [shape for shape in shapes if CFG.vocab_size in shape and CFG.vlm.width not in shape]
    return max((math.prod(shape) // CFG.vocab_size for shape in wide), default=0)


def problems(texts: dict[str, str], logits: int) -> list[str]:
    """What the programs must not hold: more rows of logits than these, float64, a way to the host."""
    found = []
    for name, text in texts.items():
        if (rows := rows_of_logits(text)) > logits:
            found.append(f"{name}: {rows} rows of logits")
        if re.search(r"[<x]f64\b", text):
            found.append(f"{name}: float64")
        found += [f"{name}: {word}" for word in sorted({*TO_THE_HOST.findall(text)})]
    return found


def step_arguments(cfg, placement=None):
    """(jitted train step, abstract state, batch and key), on the mesh's devices if there is a placement."""
    state, where = memory.abstract_state(cfg), None
    if placement is not None:
        where = sharding.shardings(state, placement)
        state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, where)
    step = make_train_step(cfg, make_optimizer(cfg.optimizer, cfg.num_steps), where)
    batch = memory.abstract_batch(cfg, None if placement is None else placement.batch)
    return step, state, batch, jax.eval_shape(lambda: train_key(cfg))


def inference_arguments(rows: int = 1, where: tuple[Any, Any] = (None, None)):
    """(model in its inference form, observation, noise, text), abstract; `where`: shardings of model and rows."""

    def inputs():
        images = jnp.zeros((rows, len(CFG.cameras), *CFG.siglip.image_size, 3), jnp.uint8)
        seen, state = jnp.ones(images.shape[:2], bool), jnp.zeros((rows, CFG.state_dim))
        obs = Observation(images, seen, Tokens.of(jnp.zeros((rows, PROMPT), jnp.int32)), state)
        text = jnp.zeros((rows, TOKENS), jnp.int32), jnp.ones((rows, TOKENS), bool)
        return obs, jnp.zeros((rows, CFG.action_horizon, CFG.action_dim)), text

    model = jax.eval_shape(lambda m: m.for_inference("bfloat16"), family.abstract(CFG))
    placed = [
        jax.tree.map(lambda x, s=s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree)
        for tree, s in zip((model, jax.eval_shape(inputs)), where, strict=True)
    ]
    return placed[0], *placed[1]


SAMPLING = Sampling(eos_id=1, max_new_tokens=TOKENS)


def talk_and_act(model, obs, noise, draft=None):
    return act(model, obs, noise, SAMPLING, num_steps=10, draft=draft)


def test_the_training_step():
    texts = lowered(*step_arguments(FULL))
    assert problems(texts, logits=0) == []  # the head is computed 2,048 columns at a time
    for text in texts.values():
        assert text.count("tf.aliasing_output") > 80  # the state is donated: old and new never coexist


def test_the_training_step_in_pieces():
    cfg = dataclasses.replace(FULL, fsdp_devices=4)
    texts = lowered(*step_arguments(cfg, sharding.Placement(MESH, PI0)))
    assert problems(texts, logits=0) == []
    for text in texts.values():
        table = rf"%arg\d+: tensor<{CFG.vocab_size}x{CFG.vlm.width}x(f32|bf16)> {{sdy.sharding = #sdy.sharding<@mesh, "
        cut = re.findall(table + r'\[\{\}, \{"fsdp"\}\]>', text)
        assert len(cut) == 4  # the parameter, its average and its two moments: none is whole on a device
        rows = re.findall(r'tensor<32x3x224x224x3xui8> {sdy.sharding = #sdy.sharding<@mesh, \[\{"data", "fsdp"\}', text)
        assert rows


def test_talking_and_acting():
    model, obs, noise, text = inference_arguments()
    assert problems(lowered(jax.jit(talk_and_act), model, obs, noise), logits=1) == []
    # A draft's own tokens are checked at once, and no token of the prompt.
    assert problems(lowered(jax.jit(talk_and_act), model, obs, noise, text), logits=TOKENS) == []


def test_talking_and_acting_on_several_devices():
    placement = sharding.Placement(MESH, PI0)
    where = NamedSharding(MESH, jax.sharding.PartitionSpec()), placement.batch
    model, obs, noise, _ = inference_arguments(8, where)
    assert problems(lowered(jax.jit(talk_and_act), model, obs, noise), logits=8) == []


def test_prefill_and_denoising():
    model, obs, noise, _ = inference_arguments()
    start = jax.jit(lambda m, o: prefill(m, o, last_only=True))
    assert problems(lowered(start, model, obs), logits=0) == []
    cache = jax.eval_shape(lambda m, o: prefill(m, o, last_only=True)[1], model, obs)
    texts = lowered(jax.jit(lambda m, o, c, x: denoise(m, o, c, x, num_steps=10)), model, obs, cache, noise)
    assert problems(texts, logits=0) == []
    for text in texts.values():
        # One loop whose length is a constant of the program: what a GPU can record and replay as a whole.
        assert text.count("stablehlo.while") == 1
        assert re.search(r"cond \{\s+%\w+ = stablehlo.constant dense<10> : tensor<i32>", text)


def test_each_thing_that_is_searched_for_is_found():
    cfg, prompt = FULL, FULL.text.max_prompt_tokens + FULL.text.max_target_tokens - 1
    _, state, batch, key = step_arguments(cfg)
    loss = jax.jit(jax.grad(lambda m, b, k: baseline.loss(m, b, k, 10.0, 1.0)))
    rows = cfg.batch_size * prompt  # the baseline's logits are those of all text
    assert problems(lowered(loss, state.model, batch, key), logits=0)[0] == f"cuda: {rows} rows of logits"

    model, obs, _, _ = inference_arguments()

    def chatty(m, o):
        jax.debug.print("{}", o.state.sum())
        return m.embed_text(o.prompt.ids)

    here = jax.jit(chatty).trace(model, obs).lower(lowering_platforms=("cpu",)).as_text()
    assert [p for p in problems({"cpu": here}, logits=0) if "callback" in p]
    with pytest.raises(ValueError, match="different from the lowering platform"):  # nor can it be lowered elsewhere
        lowered(jax.jit(chatty), model, obs)
    with jax.enable_x64(True):
        wide = jax.jit(lambda m, o: m.embed_text(o.prompt.ids).astype(jnp.float64))
        assert problems(lowered(wide, model, obs), logits=0) == ["cuda: float64", "tpu: float64"]
