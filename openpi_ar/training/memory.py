"""Memory that a run needs: an estimate from shapes alone, before anything is compiled; then XLA's own account of the
compiled step, before any data or weights are loaded.
"""

from collections.abc import Mapping
import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from openpi_ar.algorithms.cross_entropy import SLICE
from openpi_ar.config import TrainConfig
from openpi_ar.errors import UserError
from openpi_ar.model_config import ModelConfig, TowerConfig
from openpi_ar.params import split
from openpi_ar.training import freeze, sharding
from openpi_ar.training.optimizer import make_optimizer
from openpi_ar.training.state import TrainState, init_state, train_key
from openpi_ar.types import Batch, Observation, Tokens

GIB = 2**30
_F32 = 4
_SURE = 0.75
"""Of an estimate before compiling. It has been up to 18 % above what a step took (docs/lab/scale.md), and what might
fit is for the compiled step to decide."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes per device of a training step."""

    parameters: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    batch: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))

    def table(self) -> list[tuple[str, int]]:
        """(part, bytes) rows, the total last."""
        return [(f.name, getattr(self, f.name)) for f in dataclasses.fields(self)] + [("total", self.total)]


def estimate(cfg: TrainConfig, *, devices: int = 1) -> Estimate:
    """Estimate for one of `devices` devices, each with its share of the batch. Costs no memory itself.

    Parameters, optimizer and average are exact, and only what is trained has the latter two; gradients count once
    (clipping and AdamW fuse over them); activations are those that the backward pass keeps plus the working set of the
    most expensive block. Raises UserError for a table of frozen parameters that does not fit the model.
    """
    state = abstract_state(cfg)
    trained = split(state.model, freeze.frozen_paths(cfg, state.model))
    rows = -(-cfg.batch_size // devices)
    size = functools.partial(sharding.nbytes, sharding.TABLES[type(cfg.model)], fsdp=cfg.fsdp_devices)
    return Estimate(
        parameters=size(state.model),
        gradients=size(trained) * (1 if cfg.optimizer.accumulate == 1 else 2),
        optimizer=size(state.opt_state),
        average=size(state.ema),
        activations=-(-rows // cfg.optimizer.accumulate) * _activation_bytes(cfg),
        batch=nbytes(abstract_batch(cfg)) // devices * 2,  # the one in use and the one on its way
    )


def abstract_state(cfg: TrainConfig) -> TrainState:
    """Shapes and dtypes of the state of a run."""
    tx = make_optimizer(cfg.optimizer, cfg.num_steps)
    return jax.eval_shape(lambda: init_state(cfg, tx))


def abstract_batch(cfg: TrainConfig, where: jax.sharding.Sharding | None = None) -> Batch:
    """Shapes and dtypes of a training batch, and where its rows are."""
    m, (h, w), rows = cfg.model, cfg.model.siglip.image_size, cfg.batch_size

    def text(tokens: int) -> Tokens:
        return Tokens.of(jnp.zeros((rows, tokens), jnp.int32))

    def batch() -> Batch:
        obs = Observation(
            images=jnp.zeros((rows, len(m.cameras), h, w, 3), jnp.uint8),
            image_mask=jnp.zeros((rows, len(m.cameras)), bool),
            prompt=text(cfg.text.max_prompt_tokens),
            state=jnp.zeros((rows, m.state_dim)),
        )
        chunk = (rows, m.action_horizon, m.action_dim)
        own = text(cfg.text.max_prompt_tokens) if cfg.text.conditioning == "reprompt" else None
        return Batch(obs, text(cfg.text.max_target_tokens), jnp.zeros(chunk), jnp.zeros(chunk, bool), own)

    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), jax.eval_shape(batch))


def nbytes(tree: Any) -> int:
    """Bytes of all arrays, abstract or concrete."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def measure(cfg: TrainConfig, step_fn: Any, state: TrainState, batch: Batch) -> Estimate:
    """Memory of the compiled step, per device, as XLA plans it: nothing is run or allocated.

    `step_fn` is a jitted train step; `state` and `batch` are abstract and carry their shardings. State and batch are
    those of the arguments; what the program needs besides (`memory_analysis`: temporaries, and outputs that take no
    argument's place) is gradients and activations.
    """
    return planned(cfg, step_fn.lower(state, batch, train_key(cfg)).compile().memory_analysis(), state, batch)


def planned(cfg: TrainConfig, analysis: Any, state: TrainState, batch: Batch) -> Estimate:
    """Memory of a compiled step, from its `memory_analysis()`."""
    needed = analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    trained = split(state.model, freeze.frozen_paths(cfg, state.model))
    gradients = min(_per_device(trained), needed)
    return Estimate(
        parameters=_per_device(state.model),
        gradients=gradients,
        optimizer=_per_device(state.opt_state),
        average=_per_device(state.ema),
        activations=needed - gradients,
        batch=2 * _per_device(batch),
    )


def _per_device(tree: Any) -> int:
    total = 0
    for x in jax.tree.leaves(tree):
        shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
        total += int(np.prod(shape)) * x.dtype.itemsize
    return total


class Free(NamedTuple):
    """Memory that is free for a run: bytes, and where the figure comes from."""

    bytes: int
    source: str


def available() -> Free:
    """Free memory of the first device if it says so, else of the host."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if limit := stats.get("bytes_limit"):
        return Free(limit - stats.get("bytes_in_use", 0), f"{device.device_kind}")
    return Free(_host_bytes(), "host memory")


def check_fits(cfg: TrainConfig, presets: Mapping[str, TrainConfig], *, devices: int = 1) -> tuple[Estimate, Free]:
    """The estimate and the free memory. Raises UserError naming the presets that would fit, if this one would not even
    if the estimate were a quarter too high.
    """
    need, have = estimate(cfg, devices=devices), available()
    check(cfg, need, have, presets, devices=devices, sure=_SURE)
    return need, have


def check(
    cfg: TrainConfig,
    need: Estimate,
    have: Free,
    presets: Mapping[str, TrainConfig],
    *,
    devices: int = 1,
    sure: float = 1.0,
) -> None:
    """Raises UserError naming the presets that would fit if `need` (the fraction `sure` of it) is more than `have`."""
    if sure * need.total <= have.bytes:
        return
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in need.table()[:-1])
    spread = {name: dataclasses.replace(p, fsdp_devices=cfg.fsdp_devices) for name, p in presets.items()}
    fitting = [name for name, preset in spread.items() if estimate(preset, devices=devices).total <= have.bytes]
    advice = f"presets that fit: {', '.join(fitting)}" if fitting else "no preset fits"
    raise UserError(
        f"training {cfg.name} needs about {need.total / GIB:.1f} GiB ({parts}), but {have.bytes / GIB:.1f} GiB of "
        f"{have.source} is free; {advice}; a smaller --batch-size, --optimizer.accumulate, --optimizer.moment-dtype "
        f"bfloat16 or --optimizer.ema-decay None saves some"
    )


def describe(need: Estimate, have: Free, title: str = "memory of the training step, estimated") -> str:
    """The table that is printed before data and weights are loaded."""
    unit, name = (GIB, "GiB") if need.total >= 10 * GIB else (2**20, "MiB")
    rows = [f"    {part:<12}{size / unit:10,.1f}" for part, size in need.table()]
    return "\n".join([f"{title} ({name}; {have.bytes / GIB:.1f} GiB of {have.source} free):", *rows])


def _host_bytes() -> int:
    """Memory that this process may still use: the machine's, or its control group's if that is less."""
    free = [int(1e18)]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        free.append(int(fields["MemAvailable"].split()[0]) * 1024)
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        if Path(limit).exists() and (text := Path(limit).read_text().strip()).isdigit():
            free.append(int(text) - int(Path(used).read_text()))
    return min(free)


def _activation_bytes(cfg: TrainConfig) -> int:
    """Bytes that the backward pass keeps for one row of the batch, and the working set."""
    m, size = cfg.model, 2 if cfg.model.dtype == "bfloat16" else _F32
    s = m.siglip
    vision = TowerConfig(s.width, s.depth, s.mlp_dim, s.num_heads, s.num_heads, s.width // s.num_heads)
    prefix = len(m.cameras) * s.num_tokens + cfg.text.max_prompt_tokens + cfg.text.max_target_tokens
    prefills = 2 if cfg.text.conditioning == "reprompt" else 1
    suffix = m.suffix_tokens
    towers = [
        (vision, s.num_tokens, s.num_tokens, len(m.cameras)),
        (m.vlm, prefix, prefix, prefills),
        (m.expert, suffix, prefix + suffix, cfg.loss.flow_draws),
    ]
    kept = [_kept(m, t, tokens, keys, size) * t.depth * copies for t, tokens, keys, copies in towers]
    working = [_block(t, tokens, keys, size) * copies for t, tokens, keys, copies in towers]
    # Float32 logits of one slice of the vocabulary, their softmax and gradient; keys and values of every layer with
    # theirs.
    logits = 3 * _F32 * cfg.text.max_target_tokens * min(m.vocab_size, SLICE)
    cache = 4 * m.vlm.depth * prefix * m.vlm.num_kv_heads * m.vlm.head_dim * size
    return sum(kept) + 3 * max(working) // 2 + logits + cache


def _kept(m: ModelConfig, t: TowerConfig, tokens: int, keys: int, size: int) -> int:
    """Bytes that one block keeps for the backward pass: its input only, when the rest is recomputed."""
    if not m.remat:
        return _block(t, tokens, keys, size)
    narrow = 2 * t.width + (t.num_heads + 2 * t.num_kv_heads) * t.head_dim
    products = 2 * t.width + 2 * (t.num_heads + t.num_kv_heads) * t.head_dim + 2 * t.mlp_dim
    scores = t.num_heads * keys * _F32 + t.num_heads * t.head_dim * size
    kept = {"full": 0, "narrow": narrow * size, "weights": products * size, "dots": products * size + scores}[
        m.remat_policy
    ]
    return tokens * (t.width * size + kept)


def _block(t: TowerConfig, tokens: int, keys: int, size: int) -> int:
    """Bytes of all intermediates of one block on one row.

    The counts (residuals and norms, projections before and after RoPE, gate and up with their activation, scores before
    and after softmax) agree within 25 % with `memory_analysis()` of compiled steps of several sizes, on a CPU.
    """
    wide = 6 * t.width + 3 * (t.num_heads + t.num_kv_heads) * t.head_dim + 5 * t.mlp_dim
    scores = 3 * t.num_heads * tokens * keys * _F32
    return tokens * wide * size + scores
