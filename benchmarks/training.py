"""Training: the gradient of the text's cross-entropy, and one update."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks import baseline
from benchmarks.inference import Programs, close
from benchmarks.sizes import Size, make_batch, make_model
from benchmarks.timing import Program, compile_program, run_in_turns
from openpi_ar.algorithms.losses import text_loss
from openpi_ar.config import LossConfig, OptimizerConfig, TrainConfig
from openpi_ar.model_config import ModelConfig
from openpi_ar.models import family
from openpi_ar.models.vlm import VLA
from openpi_ar.training.state import TrainState
from openpi_ar.training.step import train_step
from openpi_ar.types import Array, Batch


def _step(model: VLA, batch: Batch, key: Array, cfg: TrainConfig, tx: Any, variant: ModelConfig, draws: int) -> Program:
    """The compiled train step of this variant of the model with so many flow draws."""
    cfg = dataclasses.replace(cfg, model=variant, loss=dataclasses.replace(cfg.loss, flow_draws=draws))
    # What is recomputed is a property of the modules: rebuild them around the same parameters.
    abstract = family.abstract(variant)
    model = jax.tree.unflatten(jax.tree.structure(abstract), jax.tree.leaves(model))
    state = TrainState(step=jnp.zeros((), jnp.int32), model=model, opt_state=jax.jit(tx.init)(model), ema=None)
    return compile_program(lambda s, b, k: train_step(s, b, k, cfg=cfg, tx=tx), state, batch, key)


def programs(size: Size) -> tuple[Programs, dict[str, float]]:
    """Both rows compiled for both ways in float32, and how far their results are apart."""
    model, batch = make_model(size.model, "float32"), make_batch(size)
    cfg = dataclasses.replace(size.model, dtype="float32")
    found: Programs = {}
    prompt = size.prompt
    hidden = jax.random.normal(jax.random.key(3), (size.train_batch, prompt + size.tokens, cfg.vlm.width))

    def our_ce(m: VLA, x: Array, b: Batch) -> Array:
        return text_loss(m, x[:, prompt - 1], x[:, prompt:], b.target)[0]

    def their_ce(m: VLA, x: Array, b: Batch) -> Array:
        return baseline.text_ce(m, x, b.observation.prompt, b.target)

    def gradient(fn: Any) -> Any:
        """By the hidden states and the embedding, the only parameter that counts here."""

        def run(m: VLA, x: Array, b: Batch) -> Any:
            value, (grads, dx) = jax.value_and_grad(fn, argnums=(0, 1))(m, x, b)
            return value, grads.embedder, dx

        return run

    found["ce_grad"] = {
        name: compile_program(gradient(fn), model, hidden, batch)
        for name, fn in (("ours", our_ce), ("baseline", their_ce))
    }
    a, b = (jax.tree.leaves(p.call()) for p in found["ce_grad"].values())
    gaps = {"ce_grad": max(close(x, y, "float32") for x, y in zip(a, b, strict=True))}
    del a, b

    train = TrainConfig(
        name="benchmark",
        model=cfg,
        loss=LossConfig(flow_draws=1),
        optimizer=OptimizerConfig(ema_decay=None),
        batch_size=size.train_batch,
    )
    tx: Any = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4))
    key = jax.random.key(4)
    step_key = jax.random.fold_in(key, 0)
    weights = (train.loss.flow_weight, train.loss.subtask_weight)
    variants = {
        "ours": (cfg, 1),
        "ours, 4 draws": (cfg, 4),
        "ours, remat narrow": (dataclasses.replace(cfg, remat_policy="narrow"), 1),
        "ours, remat weights": (dataclasses.replace(cfg, remat_policy="weights"), 1),
        "ours, remat dots": (dataclasses.replace(cfg, remat_policy="dots"), 1),
        "ours, no remat": (dataclasses.replace(cfg, remat=False), 1),
    }
    found["train_step"] = {
        **{name: _step(model, batch, key, train, tx, *variant) for name, variant in variants.items()},
        "baseline": compile_program(
            lambda m, o, b, k: baseline.train_step(m, o, b, k, weights, tx),
            model,
            jax.jit(tx.init)(model),
            batch,
            step_key,
        ),
    }
    metrics = found["train_step"]["ours"].call()[1]
    gaps["train_step"] = close(metrics["loss"], found["train_step"]["baseline"].call()[2], "float32")
    return found, gaps


def run(size: Size, seconds: float) -> tuple[Programs, dict[str, float], dict[str, float]]:
    """(programs with their times, ratios, gaps). `four_draws` is the cost of 4 flow draws in steps of 1 draw."""
    found, gaps = programs(size)
    for group in found.values():
        run_in_turns(group, seconds=seconds)
    ratios = {stage: group["baseline"].median / group["ours"].median for stage, group in found.items()}
    steps = found["train_step"]
    ratios["four_draws"] = steps["ours, 4 draws"].median / steps["ours"].median
    ce = found["ce_grad"]
    # Arguments and results (the table and its gradient) are the same in both.
    ratios["ce_grad_memory"] = ce["baseline"].temporary / max(ce["ours"].temporary, 1)
    return found, ratios, gaps
