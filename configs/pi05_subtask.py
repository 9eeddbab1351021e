"""pi0.5 that generates its next subtask and acts on it: at full size, and on the embedded tabletop."""

import dataclasses

from openpi_ar.config import AugmentConfig, LeRobotData, LossConfig, OptimizerConfig, TextConfig, TrainConfig
from openpi_ar.model_config import ModelConfig, TowerConfig, VitConfig

# Sizes of the released pi05_base: 32 state and action dimensions (a robot's own are padded), chunks of 50 actions
# (openpi fine-tunes LIBERO with 10 and DROID with 15: set --model.action-horizon), 200 prompt tokens.
PI05_SUBTASK = TrainConfig(
    name="pi05_subtask",
    model=ModelConfig(pi05=True, action_horizon=50),
    text=TextConfig(tokenizer="paligemma", template="subtask", max_prompt_tokens=200, max_target_tokens=32),
    loss=LossConfig(),
    data=LeRobotData(),
    # openpi's fine-tuning values.
    optimizer=OptimizerConfig(peak_lr=2.5e-5, final_lr=2.5e-6, warmup_steps=1_000, ema_decay=0.999),
    # As in openpi: what a gripper's camera sees is tied to the gripper's place in its image.
    augment=AugmentConfig(uncropped=("left_wrist_0_rgb", "right_wrist_0_rgb")),
    batch_size=32,
)

# openpi's LoRA ranks, and what its LoRA configurations freeze, plus the vision tower, which theirs train although their
# names do not suggest it. The projections and the time MLP around the action tower are small and trained whole. Start
# it from a released model:
# --init-from gs://openpi-assets/checkpoints/pi05_base/params
PI05_SUBTASK_LORA = dataclasses.replace(
    PI05_SUBTASK,
    name="pi05_subtask_lora",
    model=dataclasses.replace(
        PI05_SUBTASK.model,
        vlm=dataclasses.replace(PI05_SUBTASK.model.vlm, lora_rank=16),
        expert=dataclasses.replace(PI05_SUBTASK.model.expert, lora_rank=32),
    ),
    frozen=("img/*", "embedder/*", "vlm/*", "expert/*", "!*lora_?"),
    frozen_dtype="bfloat16",
    # Slices of 8 rows: about 12 GiB, so that a 24 GB card is enough.
    optimizer=dataclasses.replace(PI05_SUBTASK.optimizer, ema_decay=None, accumulate=4),
)

# About 2.5 million parameters: several steps a second on two CPU cores. All numbers of the tabletop models are here.
TABLETOP_MODEL = ModelConfig(
    pi05=True,
    siglip=VitConfig(width=128, depth=3, mlp_dim=384, num_heads=4, patch_size=16, image_size=(64, 64)),
    vlm=TowerConfig(width=128, depth=4, mlp_dim=512, num_heads=4, num_kv_heads=1, head_dim=32),
    expert=TowerConfig(width=96, depth=4, mlp_dim=256, num_heads=4, num_kv_heads=1, head_dim=32),
    vocab_size=1024,
    cameras=("front", "wrist"),
    state_dim=4,
    action_dim=4,
    action_horizon=8,
    dtype="float32",
    remat=False,
)

# From random parameters, or better from what `python -m openpi_ar.worlds.tabletop pretrain` writes (docs/training.md).
# The longest prompt of the scene takes 27 tokens (28 with template `openpi`), the longest subtask 9, the longest answer
# to a question 12; the rest is room for other wordings.
TABLETOP_FROM_NOTHING = TrainConfig(
    name="tabletop_from_nothing",
    model=TABLETOP_MODEL,
    text=TextConfig(tokenizer="embedded", template="subtask", max_prompt_tokens=32, max_target_tokens=16),
    loss=LossConfig(flow_draws=4),
    data=LeRobotData("world://tabletop?episodes=1000&commanded=0.25&pairs=0.45", prompt_swap=0.1),
    world="tabletop",
    optimizer=OptimizerConfig(
        peak_lr=1e-3, final_lr=1e-5, warmup_steps=200, b2=0.99, weight_decay=1e-4, ema_decay=0.999
    ),
    batch_size=32,
    num_steps=1_500,
    log_every=20,
    eval_every=500,
    save_every=500,
)

# Fine-tunes the checkpoint that comes with the package, gently: about five minutes on two CPU cores, demonstrations
# included.
PI05_SUBTASK_TABLETOP = dataclasses.replace(
    TABLETOP_FROM_NOTHING,
    name="pi05_subtask_tabletop",
    init_from="tabletop",
    data=dataclasses.replace(
        TABLETOP_FROM_NOTHING.data, path="world://tabletop?episodes=300&seed=2&commanded=0.25&pairs=0.45"
    ),
    optimizer=dataclasses.replace(TABLETOP_FROM_NOTHING.optimizer, peak_lr=1e-4, warmup_steps=50),
    num_steps=400,
    eval_every=200,
    save_every=200,
)


def actions_only(cfg: TrainConfig) -> TrainConfig:
    """The same preset without text: openpi's prompt, flow loss alone."""
    return dataclasses.replace(
        cfg,
        data=dataclasses.replace(cfg.data, prompt_swap=0.0),
        text=dataclasses.replace(cfg.text, template="openpi", max_target_tokens=1),
    )
