"""What no program can be faster than: multiplications and bytes of each stage, counted from the model's configuration.

A multiply-add is two FLOPs. Only products with weights and attention count: norms, RoPE and softmax are below 1 %.
Bytes are those that must be read or written once: weights in the compute dtype, the cache, and what a stage returns.
A stage's bound is the larger of FLOPs / FLOP rate and bytes / bandwidth, with rates that were measured on the device
(`timing.measure_device`) or those of its data sheet.
"""

import dataclasses

from benchmarks.timing import Device
from openpi_ar.model_config import ModelConfig, TowerConfig

SHEETS: dict[str, Device] = {
    "H200": Device(989e12, 4.8e12),
    "H100 PCIe": Device(756e12, 2.0e12),
    "H100": Device(989e12, 3.35e12),
    "A100": Device(312e12, 2.04e12),
    "B200": Device(2250e12, 8.0e12),
    "L40S": Device(362e12, 0.864e12),
    "RTX 4090": Device(165e12, 1.008e12),
}
"""Dense bfloat16 FLOP/s with float32 sums, and bytes/s, by a part of the device's name; the first that fits."""


def data_sheet(device_kind: str) -> Device | None:
    """Rates of a device by its name; None: it is not in the table."""
    return next((rates for name, rates in SHEETS.items() if name in device_kind), None)


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOPs, and bytes that have to be moved."""

    flops: float
    bytes: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def times(self, count: int) -> "Work":
        return Work(self.flops * count, self.bytes * count)

    def bound(self, device: Device) -> float:
        """Seconds."""
        return device.bound(self.flops, self.bytes)


def tower_weights(t: TowerConfig) -> int:
    """Weights of all products of a decoder's blocks."""
    heads = t.width * t.head_dim * (2 * t.num_heads + 2 * t.num_kv_heads)
    return t.depth * (heads + 3 * t.width * t.mlp_dim)


def time_weights(cfg: ModelConfig) -> int:
    """Weights that flow time alone goes through: its MLP and the modulation of every norm (pi0.5)."""
    w = cfg.expert.width
    return 2 * w * w + (2 * cfg.expert.depth + 1) * w * 3 * w if cfg.adaptive_time else 2 * w * w + 2 * w * w


def vision_weights(cfg: ModelConfig) -> int:
    s = cfg.siglip
    blocks = s.depth * (4 * s.width**2 + 2 * s.width * s.mlp_dim)
    return blocks + 3 * s.patch_size**2 * s.width + s.width * cfg.vlm.width


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Work of the stages of one model on `rows` observations; `size` bytes a value."""

    cfg: ModelConfig
    rows: int = 1
    size: int = 2

    def vision(self, cameras: int) -> Work:
        """SigLIP over all images at once."""
        s, images = self.cfg.siglip, self.rows * cameras
        scores = 4 * s.num_tokens**2 * s.width * s.depth
        moved = s.image_size[0] * s.image_size[1] * 3 + s.num_tokens * self.cfg.vlm.width * self.size
        weights = vision_weights(self.cfg)
        return Work(
            images * (2 * s.num_tokens * weights + scores),
            self.size * weights + images * moved,
        )

    def prefill(self, tokens: int) -> Work:
        """Tower 1 over the prefix. The last layer computes keys and values alone."""
        t = self.cfg.vlm
        used = tower_weights(t) - self._beyond_keys_and_values(t)
        flops = 2 * tokens * used + self._scores(t, tokens, tokens) * (t.depth - 1) / t.depth
        moved = tokens * (t.width * self.size + self._cache_bytes())
        return Work(self.rows * flops, self.size * used + self.rows * moved)

    def token(self, slots: int, ids: int | None = None) -> Work:
        """One decoded token behind `slots` others, and the logits of `ids` (None: of the vocabulary)."""
        t = self.cfg.vlm
        weights = tower_weights(t) + (self.cfg.vocab_size if ids is None else ids) * t.width
        flops = 2 * weights + self._scores(t, 1, slots)
        return Work(self.rows * flops, self.size * weights + self.rows * slots * self._cache_bytes())

    def denoise(self, slots: int, steps: int, chunks: int = 1) -> Work:
        """Euler steps of `chunks` action chunks per row over a prefix of `slots`; what depends on time alone, once."""
        t, n = self.cfg.expert, self.cfg.suffix_tokens * chunks
        weights = tower_weights(t) + 2 * self.cfg.action_dim * t.width
        flops = 2 * n * weights + self._scores(t, n, slots + self.cfg.suffix_tokens)
        each = Work(self.rows * flops, self.size * weights + self.rows * slots * self._cache_bytes())
        once = time_weights(self.cfg)
        return each.times(steps) + Work(2 * steps * once, self.size * once)

    def training(self, prefix: int, targets: int, draws: int) -> float:
        """FLOPs of forward and backward pass, three times the forward, nothing recomputed: what MFU is counted by."""
        t, e, n = self.cfg.vlm, self.cfg.expert, self.cfg.suffix_tokens * draws
        vision = self.vision(len(self.cfg.cameras)).flops
        text = 2 * prefix * tower_weights(t) + self._scores(t, prefix, prefix)
        head = 2 * targets * self.cfg.vocab_size * t.width
        weights = tower_weights(e) + 2 * self.cfg.action_dim * e.width
        actions = 2 * n * weights + self._scores(e, n, prefix + self.cfg.suffix_tokens)
        return 3 * (vision + self.rows * (text + head + actions + 2 * draws * time_weights(self.cfg)))

    def _cache_bytes(self) -> int:
        """Keys and values of one token in all layers."""
        t = self.cfg.vlm
        return 2 * t.depth * t.num_kv_heads * t.head_dim * self.size

    @staticmethod
    def _scores(t: TowerConfig, queries: int, keys: int) -> float:
        """Products of queries with keys, and of probabilities with values, in all layers of one row."""
        return 4.0 * queries * keys * t.num_heads * t.head_dim * t.depth

    @staticmethod
    def _beyond_keys_and_values(t: TowerConfig) -> int:
        """Weights of one block besides those of keys and values."""
        return tower_weights(t) // t.depth - 2 * t.width * t.num_kv_heads * t.head_dim
