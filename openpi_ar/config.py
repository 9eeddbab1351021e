"""The schema: frozen dataclasses only. Presets live in `configs/`; derived values are properties.

Every field is a tyro flag: `python train.py --config debug --model.action-horizon 4 --optimizer.peak-lr 1e-4`.
"""

import dataclasses
from typing import Literal

from openpi_ar.data_config import LeRobotData
from openpi_ar.model_config import PI05, ModelConfig, portable
from openpi_ar.robot_spec import RobotSpec


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
    conditioning: Literal["append", "reprompt"] = "append"
    """How the actions see the text. append: its keys and values follow the prompt's. reprompt: they see a prompt of
    their own instead, in which the text takes the task's place, as released pi0.5 models read a subtask; it costs a
    second prefill, without the vision tower."""
    action_template: str = "openpi"
    """The template of that prompt, for `conditioning` reprompt."""
    memory: int = 0
    """How many of the last completed subtasks are written into the prompt, before the state: what tells two moments
    apart that look the same. In training they come from the labels, at inference from what a session has generated.
    0: none, and prompts are as ever."""


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """`loss = flow_weight * flow + subtask_weight * subtask_ce + answer_weight * answer_ce + action_token_weight *
    ...`, each cross-entropy the mean over the batch's supervised tokens of that kind."""

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


DenoiseMethod = Literal["euler", "heun"]


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
    """Steps from noise (t = 1) to actions (t = 0)."""
    denoise_method: DenoiseMethod = "euler"
    """heun: two passes through the action tower a step, for a more exact path."""
    denoise_shift: float = 1.0
    """1: equal steps. Above 1 shorter ones near the noise, below 1 near the actions."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of weights and matmuls in the policy; auto: float32 on CPU, bfloat16 elsewhere."""
    prompt_buckets: tuple[int, ...] = (48, 96)
    """Prompt lengths that have a program of their own besides `text.max_prompt_tokens`: short prompts cost less."""
    resize: Literal["auto", "host", "device"] = "auto"
    """Where a policy resizes images, to the same pixels; auto: on the device, if that is not the CPU. On the device
    each size of images is a program of its own."""
    draft: bool = True
    """Greedy text only: check the last text instead of decoding it again. The text stays the same."""
    subtasks: tuple[str, ...] = ()
    """Only these can be generated before actions; empty: any text."""
    block: int = 8
    """Greedy text only: tokens that one pass through the model may carry where it is known how a text may go on
    (`InferenceConfig.subtasks`). The text stays the same. 1: always one token a pass."""


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
    """None: no moving average. The average is what `params` of a checkpoint holds; only what is trained has one."""
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
    """Fraction of the rows whose subtask is fed with mistakes: a third of its tokens are those of another row. The
    target stays. Without mistakes a model can predict the next word from its last ones, where the prompt should decide
    it. These rows train no actions."""


@dataclasses.dataclass(frozen=True)
class InferenceConfig:
    """Everything a policy depends on besides parameters, tokenizer and statistics."""

    model: ModelConfig = PI05
    text: TextConfig = TextConfig()
    decode: DecodeConfig = DecodeConfig()
    robot: RobotSpec | None = None
    """Whose observations come in and whose actions go out. None: the plain form of `data/inputs.py`."""
    world: str = ""
    """Simulated world that the robot lives in; empty: none."""
    subtasks: tuple[str, ...] = ()
    """Subtasks of the training data, the most frequent first. They take few passes to decode; any other text can be
    generated too."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything one training run depends on. It travels in the checkpoint's `assets/config.json`."""

    name: str
    """Preset name; first level of the checkpoint path."""
    exp_name: str = "default"
    """Experiment name; second level of the checkpoint path."""
    model: ModelConfig = PI05
    text: TextConfig = TextConfig()
    loss: LossConfig = LossConfig()
    decode: DecodeConfig = DecodeConfig()
    data: LeRobotData = dataclasses.field(default_factory=LeRobotData)
    optimizer: OptimizerConfig = OptimizerConfig()
    augment: AugmentConfig = AugmentConfig()
    frozen: tuple[str, ...] = ()
    """What is not trained: patterns of parameter paths, as of a shell (`*` matches anything). The last that matches
    a parameter decides, and `!` in front means trained: `img/* vlm/* !*lora*`. `python -m openpi_ar.checkpoints
    inspect` lists the paths."""
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
    """Held-out metric (`loss`, `action_mse`, ...; `-subtask_generated_exact`: the higher the better) whose best
    parameters are kept in `<exp>/best/<step>`, ready for a policy; empty: none."""
    checkpoint_dir: str = "checkpoints"
    tensorboard: bool = False
    wandb: bool = False

    @property
    def inference(self) -> InferenceConfig:
        """What a policy of this run depends on."""
        robot = self.data.reader(self.model.cameras) if self.data.path else None
        return InferenceConfig(portable(self.model), self.text, self.decode, robot, self.world)


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
    """Devices of this machine for this process. Empty: all; one each where the cluster counts processes by machine."""
    cluster: Literal["auto", "on", "off"] = "auto"
    """`auto`: several processes if flags, Slurm, Open MPI or a TPU slice say so. `on`: ask jax's own detection in any
    case (TPU virtual machines, Kubernetes with its API). `off`: this process is alone, whatever the environment
    says."""
    timeout_s: int = 300
    """How long to wait for the other processes to start."""
    heartbeat_s: int = 100
    """After how long a silent process counts as dead, which ends the others."""
