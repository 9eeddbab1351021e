"""Will it fit? An estimate of a run's memory from shapes alone, made before anything is compiled or loaded."""

from collections.abc import Mapping
import dataclasses
from pathlib import Path

from flax import nnx
import jax

from openpi_ar.config import ModelConfig, TowerConfig, TrainConfig
from openpi_ar.errors import UserError
from openpi_ar.models.pi0 import Pi0

GIB = 2**30
_F32 = 4


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes per device of a data-parallel training step."""

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
    """Estimate for one of `devices` data-parallel devices. Costs no memory itself.

    Parameters, optimizer and average are exact; gradients count once (clipping and AdamW fuse over them); activations
    are those that the backward pass keeps plus the working set of the dearest block.
    """
    model = nnx.eval_shape(lambda: Pi0(cfg.model, rngs=nnx.Rngs(0)))
    parameters = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(model))
    rows = -(-cfg.batch_size // devices)
    m, (h, w) = cfg.model, cfg.model.siglip.image_size
    text_tokens = cfg.text.max_prompt_tokens + cfg.text.max_target_tokens
    row_bytes = len(m.cameras) * h * w * 3 + text_tokens * 8 + m.state_dim * _F32 + m.action_horizon * m.action_dim * 5
    return Estimate(
        parameters=parameters,
        gradients=parameters,
        optimizer=2 * parameters,
        average=0 if cfg.optimizer.ema_decay is None else parameters,
        activations=rows * _activation_bytes(cfg),
        batch=rows * row_bytes * 2,  # the one in use and the one on its way
    )


def available_bytes() -> tuple[int, str]:
    """Free memory of the first device, and where the figure comes from: the device, else the host."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if limit := stats.get("bytes_limit"):
        return limit - stats.get("bytes_in_use", 0), f"{device.device_kind}"
    return _host_bytes(), "host memory"


def check_fits(cfg: TrainConfig, presets: Mapping[str, TrainConfig], *, devices: int = 1) -> tuple[Estimate, int, str]:
    """(estimate, available bytes, their source). Raises UserError naming the presets that would fit if this cannot."""
    need = estimate(cfg, devices=devices)
    have, source = available_bytes()
    if need.total <= have:
        return need, have, source
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in need.table()[:-1])
    fitting = [name for name, preset in presets.items() if estimate(preset, devices=devices).total <= have]
    advice = f"presets that fit: {', '.join(fitting)}" if fitting else "no preset fits"
    raise UserError(
        f"training {cfg.name} needs about {need.total / GIB:.1f} GiB ({parts}), but {have / GIB:.1f} GiB of {source} is "
        f"free; {advice}; a smaller --batch-size or --optimizer.ema-decay None saves some"
    )


def describe(need: Estimate, have: int, source: str) -> str:
    """The table that is printed before anything is compiled."""
    unit, name = (GIB, "GiB") if need.total >= GIB else (2**20, "MiB")
    rows = [f"    {part:<12}{size / unit:10,.1f}" for part, size in need.table()]
    return "\n".join([f"memory of the training step ({name}; {have / GIB:.1f} GiB of {source} free):", *rows])


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
    """Per row of the batch."""
    m, size = cfg.model, 2 if cfg.model.dtype == "bfloat16" else _F32
    s = m.siglip
    vision = TowerConfig(s.width, s.depth, s.mlp_dim, s.num_heads, s.num_heads, s.width // s.num_heads)
    prefix = len(m.cameras) * s.num_tokens + cfg.text.max_prompt_tokens + cfg.text.max_target_tokens
    suffix = m.action_horizon + (0 if m.pi05 else 1)
    towers = [
        (vision, s.num_tokens, s.num_tokens, len(m.cameras)),
        (m.vlm, prefix, prefix, 1),
        (m.expert, suffix, prefix + suffix, cfg.loss.flow_draws),
    ]
    kept = [_kept(m, t, tokens, keys, size) * t.depth * copies for t, tokens, keys, copies in towers]
    working = [_block(t, tokens, keys, size) * copies for t, tokens, keys, copies in towers]
    # Float32 logits, their softmax and their gradient; keys and values of every layer with theirs.
    logits = 3 * _F32 * cfg.text.max_target_tokens * m.vocab_size
    cache = 4 * m.vlm.depth * prefix * m.vlm.num_kv_heads * m.vlm.head_dim * size
    return sum(kept) + 3 * max(working) // 2 + logits + cache


def _kept(m: ModelConfig, t: TowerConfig, tokens: int, keys: int, size: int) -> int:
    """Bytes that one block keeps for the backward pass: its input only, when the rest is recomputed."""
    return tokens * t.width * size if m.remat else _block(t, tokens, keys, size)


def _block(t: TowerConfig, tokens: int, keys: int, size: int) -> int:
    """Bytes of all intermediates of one block on one row.

    The counts (residuals and norms, projections before and after RoPE, gate and up with their activation, scores before
    and after softmax) agree within 25 % with `memory_analysis()` of compiled steps of several sizes, on a CPU.
    """
    wide = 6 * t.width + 3 * (t.num_heads + t.num_kv_heads) * t.head_dim + 5 * t.mlp_dim
    scores = 3 * t.num_heads * tokens * keys * _F32
    return tokens * wide * size + scores
