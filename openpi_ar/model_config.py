"""The schema of models: one config per family, and those of its towers."""

import dataclasses
from typing import Any, Literal, TypeVar


@dataclasses.dataclass(frozen=True)
class VitConfig:
    """A vision transformer. Default: SigLIP So400m/14 at 224 x 224, as in PaliGemma (big_vision).

    DINOv2 with registers is `lead_tokens=5, layer_scale=True, activation="gelu"`. OpenVLA reads both towers with
    `activation="gelu", tap=-2, final_norm=False`.
    """

    width: int = 1152
    depth: int = 27
    mlp_dim: int = 4304
    num_heads: int = 16
    patch_size: int = 14
    image_size: tuple[int, int] = (224, 224)
    """Height and width in pixels. What exceeds a multiple of the patch size (right and bottom edge) is not seen."""
    activation: Literal["gelu_tanh", "gelu"] = "gelu_tanh"
    """GELU's tanh approximation, or GELU itself."""
    norm_eps: float = 1e-6
    qkv_bias: bool = True
    """Queries, keys and values have biases."""
    layer_scale: bool = False
    """Each branch has a learned factor per channel (DINOv2)."""
    lead_tokens: int = 0
    """Learned tokens before the patches, without positions and dropped at the end: a class token, then registers."""
    tap: int = -1
    """Block whose output is read, from the end: -1 is the last. Later ones are kept for the checkpoint, not run."""
    final_norm: bool = True
    """A LayerNorm after the blocks."""

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along height and width."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def num_tokens(self) -> int:
        """Tokens per camera."""
        return self.grid[0] * self.grid[1]

    @property
    def blocks_run(self) -> int:
        """Blocks that are computed."""
        return self.depth + 1 + self.tap


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """One decoder. Default: Gemma's conventions.

    Llama 2 is `norm_offset=0.0, activation="silu", scaled_embeddings=False, tied_head=False`, with as many key/value
    heads as heads.
    """

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    lora_rank: int = 0
    """Rank of the low-rank adapters on every matrix of the tower (openpi's `lora.py`, scale 1); 0: none."""
    norm_offset: float = 1.0
    """RMSNorm multiplies by offset + scale: Gemma stores the scale as its distance from 1."""
    norm_eps: float = 1e-6
    activation: Literal["gelu_tanh", "silu"] = "gelu_tanh"
    """Of the gated MLP."""
    rope_base: float = 10_000.0
    scaled_embeddings: bool = True
    """Token embeddings are multiplied by sqrt(width). Read of the tower of text only."""
    tied_head: bool = True
    """The vocabulary's head is the embedding table. Read of the tower of text only."""


GEMMA_2B = TowerConfig(width=2048, depth=18, mlp_dim=16384, num_heads=8, num_kv_heads=1, head_dim=256)
GEMMA_300M = TowerConfig(width=1024, depth=18, mlp_dim=4096, num_heads=8, num_kv_heads=1, head_dim=256)


@dataclasses.dataclass(frozen=True)
class PaliGemmaConfig:
    """PaliGemma: SigLIP and one Gemma tower that writes text."""

    siglip: VitConfig = VitConfig()
    vlm: TowerConfig = GEMMA_2B
    vocab_size: int = 257_152
    cameras: tuple[str, ...] = ("image",)
    """Names of images in the order in which the model reads them."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute dtype of matmuls. Norms, softmax, RoPE, logits, losses and the flow state are always float32."""
    remat: bool = True
    """Recompute each block in the backward pass: a block's input is all that is kept."""
    remat_policy: Literal["full", "narrow", "weights", "dots"] = "full"
    """What `remat` recomputes. `full`: everything. `narrow`: all but the narrower products with weights, so the MLP's
    wide ones and attention scores. `weights`: all but the products with weights, so mostly attention scores and
    activation functions. `dots`: all but matmuls. See docs/training.md for what each costs."""
    attention: Literal["auto", "plain", "xla", "cudnn"] = "auto"
    """How attention of many tokens is computed, in training and prefill. `plain`: this package's own, every product
    apart. `xla`, `cudnn`: `jax.nn.dot_product_attention`; `cudnn` is one fused kernel of NVIDIA's, bfloat16 only.
    `auto`: what was fastest on such a device (`compilation.ATTENTION`)."""

    def __post_init__(self):
        if problems := self._problems():
            raise ValueError(f"{type(self).__name__}: " + "; ".join(problems))

    def _problems(self) -> list[str]:
        """What does not fit together."""
        s, v, problems = self.siglip, self.vlm, []
        if small := _not_positive(self):
            return [f"{', '.join(small)} must be 1 or more"]
        if min(s.image_size) < s.patch_size:
            problems.append(f"siglip.image_size {s.image_size} is smaller than siglip.patch_size {s.patch_size}")
        if s.width % s.num_heads:
            problems.append(f"siglip.width {s.width} is not a multiple of siglip.num_heads {s.num_heads}")
        if v.num_heads % v.num_kv_heads:
            problems.append(f"num_heads {v.num_heads} is not a multiple of num_kv_heads {v.num_kv_heads}")
        if not 1 <= s.blocks_run <= s.depth:
            problems.append(f"siglip.tap {s.tap} is no block of siglip.depth {s.depth}, counted from the end")
        return problems

    @property
    def kind(self) -> str:
        """Name of the model type."""
        return "paligemma"

    @property
    def keeps_aspect(self) -> bool:
        """Images of another shape than the model's are fitted in with black borders, as openpi does; otherwise they
        are stretched, as big_vision and the transformers library do for PaliGemma."""
        return False

    @property
    def recomputed(self) -> str | None:
        """What the backward pass recomputes (`remat_policy`); None: nothing."""
        return self.remat_policy if self.remat else None


@dataclasses.dataclass(frozen=True)
class ModelConfig(PaliGemmaConfig):
    """pi0 and pi0.5: PaliGemma and an action tower.

    The towers may differ in everything but depth, heads and head_dim (they share keys and values).
    """

    cameras: tuple[str, ...] = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    """Camera names in the order in which the model reads them."""
    pi05: bool = True
    """True: time enters through AdaRMS, state through the prompt. False (pi0): state token and action-time MLP."""
    expert: TowerConfig = GEMMA_300M
    state_dim: int = 32
    action_dim: int = 32
    """Action dimensions of the model; a robot's own are padded to it with zeros."""
    action_horizon: int = 10
    exact_time: bool = False
    """Angles of the time embedding as in float64 (openpi's PyTorch code), not float32 (its JAX code): 1e-4 apart. A
    loaded checkpoint keeps what it was trained with."""

    def _problems(self) -> list[str]:
        v, e, problems = self.vlm, self.expert, super()._problems()
        if (v.depth, v.num_heads, v.num_kv_heads, v.head_dim) != (e.depth, e.num_heads, e.num_kv_heads, e.head_dim):
            problems.append(
                "the towers share keys and values, so depth, num_heads, num_kv_heads and head_dim must agree: "
                f"vlm {(v.depth, v.num_heads, v.num_kv_heads, v.head_dim)}, "
                f"expert {(e.depth, e.num_heads, e.num_kv_heads, e.head_dim)}"
            )
        return problems

    @property
    def kind(self) -> Literal["pi0", "pi05"]:
        """openpi's name of the model type."""
        return "pi05" if self.pi05 else "pi0"

    @property
    def state_in_prompt(self) -> bool:
        """The state is text in the prompt; otherwise it is a token of the action tower."""
        return self.pi05

    @property
    def adaptive_time(self) -> bool:
        """Flow time conditions the action tower's norms; otherwise it is mixed into its tokens."""
        return self.pi05

    @property
    def norm_mode(self) -> Literal["quantile", "z_score"]:
        """How states and actions are normalised (openpi's `training/config.py`)."""
        return "quantile" if self.pi05 else "z_score"

    @property
    def suffix_tokens(self) -> int:
        """Tokens of the action tower for one chunk."""
        return self.action_horizon if self.state_in_prompt else self.action_horizon + 1

    @property
    def keeps_aspect(self) -> bool:
        return True


def _not_positive(cfg: Any, prefix: str = "") -> list[str]:
    """Names of the sizes of a configuration that are none."""
    found = []
    for name, value in vars(cfg).items():
        if dataclasses.is_dataclass(value):
            found += _not_positive(value, f"{name}.")
        elif type(value) is int and value < (0 if name in ("lora_rank", "lead_tokens") else 1) and name != "tap":
            found.append(f"{prefix}{name} {value}")
    return found


_Config = TypeVar("_Config", bound=PaliGemmaConfig)


def portable(cfg: _Config) -> _Config:
    """The same model on any device: how attention was computed is no part of what was learnt."""
    return dataclasses.replace(cfg, attention="auto")


PI05 = ModelConfig()
"""pi0.5 at full size."""
