"""The schema: frozen dataclasses only. Presets live in `configs/`; derived values are properties.

Every field is a tyro flag: `python train.py --config debug --model.action-horizon 4 --optimizer.peak-lr 1e-4`.
"""

import dataclasses
from typing import Literal

from openpi_ar.data_config import LeRobotData
from openpi_ar.robot_spec import RobotSpec


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
    """Height and width in pixels. What is left over of a multiple of the patch size is not seen (right and bottom edge)."""
    activation: Literal["gelu_tanh", "gelu"] = "gelu_tanh"
    """GELU's tanh approximation, or GELU itself."""
    norm_eps: float = 1e-6
    qkv_bias: bool = True
    """Queries, keys and values have biases."""
    layer_scale: bool = False
    """Each branch has a learned factor per channel (DINOv2)."""
    lead_tokens: int = 0
    """Learned tokens before the patches: a class token, then registers. They have no position and are dropped at the end."""
    tap: int = -1
    """Block whose output is read, counted from the end: -1 is the last. Later ones are kept, so that a checkpoint stays whole,
    and not computed."""
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

    Llama 2 is `norm_offset=0.0, activation="silu", scaled_embeddings=False, tied_head=False`, with as many key/value heads as
    heads.
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
class ModelConfig:
    """pi0 and pi0.5. The towers may differ in everything but depth, heads and head_dim (they share keys and values)."""

    pi05: bool = True
    """True: time enters through AdaRMS, state through the prompt. False (pi0): state token and action-time MLP."""
    siglip: VitConfig = VitConfig()
    vlm: TowerConfig = GEMMA_2B
    expert: TowerConfig = GEMMA_300M
    vocab_size: int = 257_152
    cameras: tuple[str, ...] = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    """Camera names in the order in which the model reads them."""
    state_dim: int = 32
    action_dim: int = 32
    """Action dimensions of the model; a robot's own are padded to it with zeros."""
    action_horizon: int = 10
    exact_time: bool = False
    """Angles of the time embedding as in float64 (openpi's PyTorch code), not float32 (its JAX code): 1e-4 apart. A loaded
    checkpoint keeps what it was trained with."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute dtype of matmuls. Norms, softmax, RoPE, logits, losses and the flow state are always float32."""
    remat: bool = True
    """Recompute each block in the backward pass: a block's input is all that is kept."""
    remat_policy: Literal["full", "narrow", "weights", "dots"] = "full"
    """What `remat` recomputes. `full`: everything. `narrow`: all but the narrower products with weights, so the MLP's wide
    ones and attention scores. `weights`: all but the products with weights, so mostly attention scores and activation
    functions. `dots`: all but matmuls. See docs/training.md for what each costs."""

    def __post_init__(self):
        s, v, e = self.siglip, self.vlm, self.expert
        problems = []
        if min(s.image_size) < s.patch_size:
            problems.append(f"siglip.image_size {s.image_size} is smaller than siglip.patch_size {s.patch_size}")
        if s.width % s.num_heads:
            problems.append(f"siglip.width {s.width} is not a multiple of siglip.num_heads {s.num_heads}")
        if (v.depth, v.num_heads, v.num_kv_heads, v.head_dim) != (e.depth, e.num_heads, e.num_kv_heads, e.head_dim):
            problems.append(
                "the towers share keys and values, so depth, num_heads, num_kv_heads and head_dim must agree: "
                f"vlm {(v.depth, v.num_heads, v.num_kv_heads, v.head_dim)}, "
                f"expert {(e.depth, e.num_heads, e.num_kv_heads, e.head_dim)}"
            )
        if v.num_heads % v.num_kv_heads:
            problems.append(f"num_heads {v.num_heads} is not a multiple of num_kv_heads {v.num_kv_heads}")
        if not 1 <= s.blocks_run <= s.depth:
            problems.append(f"siglip.tap {s.tap} is no block of siglip.depth {s.depth}, counted from the end")
        if problems:
            raise ValueError("ModelConfig: " + "; ".join(problems))

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
    def recomputed(self) -> str | None:
        """What the backward pass recomputes (`remat_policy`); None: nothing."""
        return self.remat_policy if self.remat else None


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Tokenizer, prompt template and token budgets."""

    tokenizer: str = "embedded"
    """`embedded` (shipped, small), `paligemma` (the public 257,152-piece model from the cache), or a path to a
    SentencePiece `.model` file."""
    template: str = "subtask"
    """A key of `openpi_ar.text.templates.TEMPLATES`, for rows that name none themselves."""
    max_prompt_tokens: int = 200
    max_target_tokens: int = 32
    """Budget of what the model writes, EOS included; also the most tokens ever generated."""


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """`loss = flow_weight * flow + subtask_weight * subtask_ce + answer_weight * answer_ce + action_token_weight * ...`, each
    cross-entropy the mean over the batch's supervised tokens of that kind."""

    flow_weight: float = 10.0
    subtask_weight: float = 1.0
    answer_weight: float = 1.0
    action_token_weight: float = 1.0
    flow_draws: int = 4
    """Noise and time draws per prefix; the prefix costs ~100x what the action tower does."""
    knowledge_insulation: bool = False
    """Stop the flow loss's gradient at the keys and values of the first tower (arXiv 2505.23705)."""
    average_padded_dims: bool = False
    """Average the flow loss over padded action dimensions too, as openpi does (re-weights flow against text)."""


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """How text and actions are sampled."""

    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """Draw text from the k most likely tokens only; 0: all."""
    top_p: float = 1.0
    """Draw text from the most likely tokens that together reach this probability; 1: all."""
    denoise_steps: int = 10
    """Euler steps from noise (t = 1) to actions (t = 0)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of weights and matmuls in the policy; auto: float32 on CPU, bfloat16 elsewhere."""
    prompt_buckets: tuple[int, ...] = (48, 96)
    """Prompt lengths that have a program of their own besides `text.max_prompt_tokens`: short prompts cost less."""
    resize: Literal["auto", "host", "device"] = "auto"
    """Where a policy resizes images, to the same pixels; auto: on the device, if that is not the CPU. On the device each
    size of images is a program of its own."""
    draft: bool = True
    """Greedy text only: check the last text instead of decoding it again. The text stays the same."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up, cosine decay and global-norm clipping, all from optax."""

    peak_lr: float = 2.5e-5
    final_lr: float = 2.5e-6
    warmup_steps: int = 1_000
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 1e-10
    clip_norm: float = 1.0
    ema_decay: float | None = 0.99
    """None: no moving average. When on, the average is what `params` of a checkpoint holds. Only what is trained has one."""
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """How Adam's two moments are kept between steps (the update itself is float32); `bfloat16` needs b2 <= 0.99."""
    accumulate: int = 1
    """Slices of a batch that go through the model one after another; the update is that of the whole batch."""


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Random changes of training images, made on the device; all off by default. openpi's values in parentheses."""

    crop: float = 0.0
    """Most of the width and height that a random window leaves out (0.05)."""
    uncropped: tuple[str, ...] = ()
    """Model cameras that are not cropped: on a gripper, say, where the gripper's place in the image tells something."""
    brightness: float = 0.0
    """Factor on the pixels, drawn from 1 +- this (0.3)."""
    contrast: float = 0.0
    """Factor on the distance from the mean grey, drawn from 1 +- this (0.4)."""
    saturation: float = 0.0
    """Factor on the distance from each pixel's own grey, drawn from 1 +- this (0.5)."""
    mistakes: float = 0.0
    """Fraction of the rows whose subtask is fed with mistakes: a third of its tokens are those of another row. The target
    stays. Without mistakes a model can predict the next word from its last ones, where the prompt should decide it. These
    rows train no actions."""


@dataclasses.dataclass(frozen=True)
class InferenceConfig:
    """Everything a policy depends on besides parameters, tokenizer and statistics."""

    model: ModelConfig = ModelConfig()
    text: TextConfig = TextConfig()
    decode: DecodeConfig = DecodeConfig()
    robot: RobotSpec | None = None
    """Whose observations come in and whose actions go out. None: the plain form of `data/inputs.py`."""
    world: str = ""
    """Simulated world that the robot lives in; empty: none."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything one training run depends on. It travels in the checkpoint's `assets/config.json`."""

    name: str
    """Preset name; first level of the checkpoint path."""
    exp_name: str = "default"
    """Experiment name; second level of the checkpoint path."""
    model: ModelConfig = ModelConfig()
    text: TextConfig = TextConfig()
    loss: LossConfig = LossConfig()
    decode: DecodeConfig = DecodeConfig()
    data: LeRobotData = dataclasses.field(default_factory=LeRobotData)
    optimizer: OptimizerConfig = OptimizerConfig()
    augment: AugmentConfig = AugmentConfig()
    frozen: tuple[str, ...] = ()
    """What is not trained: patterns of parameter paths, as of a shell (`*` matches anything). The last that matches
    a parameter decides, and `!` in front means trained: `img/* vlm/* !*lora*`. `python -m openpi_ar.checkpoints inspect`
    lists the paths."""
    frozen_dtype: Literal["float32", "bfloat16"] = "float32"
    """How frozen weights are kept in memory and in checkpoints; norms and biases stay float32."""
    init_from: str = ""
    """Checkpoint to start from: ours, openpi's, a PyTorch port's or LeRobot's; a directory, file, address or hub id, or
    `tabletop`: the one that comes with the package. Empty: random initialisation."""
    world: str = ""
    """Simulated world that the model's robot lives in: `infer.py --rollout` plays there. Empty: none."""
    fsdp_devices: int = 1
    """Devices among which parameters, moments and average are divided; the rest of the devices hold copies."""
    seed: int = 0
    batch_size: int = 32
    workers: int = 0
    """Processes that make batches; 0: threads, enough where frames are cached. Batches are the same."""
    num_steps: int = 30_000
    log_every: int = 20
    eval_every: int = 1_000
    """0: never, not even at the end."""
    eval_batches: int = 4
    save_every: int = 1_000
    keep_last: int = 1
    """Checkpoints kept besides the last one of the run."""
    keep_every: int = 0
    """Checkpoints of steps that are multiples of this are kept for good; 0: none are."""
    keep_best: str = ""
    """Held-out metric (`loss`, `action_mse`, ...; `-subtask_generated_exact`: the higher the better) whose best parameters are kept in
    `<exp>/best/<step>`, ready for a policy; empty: none."""
    checkpoint_dir: str = "checkpoints"
    tensorboard: bool = False
    wandb: bool = False

    @property
    def inference(self) -> InferenceConfig:
        """What a policy of this run depends on."""
        robot = self.data.reader(self.model.cameras) if self.data.path else None
        return InferenceConfig(self.model, self.text, self.decode, robot, self.world)


@dataclasses.dataclass(frozen=True)
class Distributed:
    """Which process of a run this is; nothing of it is part of the run or its checkpoints. See docs/clusters.md."""

    coordinator: str = ""
    """HOST:PORT of process 0, where the others can reach it. Empty: what the cluster says."""
    num_processes: int | None = None
    """Processes of the run. None: what the cluster says."""
    process_id: int | None = None
    """0, 1, ... of this process. None: what the cluster says."""
    local_devices: tuple[int, ...] = ()
    """Devices of this machine that are this process's. Empty: all, or one each where the cluster counts processes by machine."""
    cluster: Literal["auto", "on", "off"] = "auto"
    """`auto`: several processes if flags, Slurm, Open MPI or a TPU slice say so. `on`: ask jax's own detection in any case
    (TPU virtual machines, Kubernetes with its API). `off`: this process is alone, whatever the environment says."""
    timeout_s: int = 300
    """How long to wait for the other processes to start."""
    heartbeat_s: int = 100
    """After how long a silent process counts as dead, which ends the others."""
