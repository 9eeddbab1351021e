"""The smallest run that exercises everything: a few seconds, for tests."""

import dataclasses

from configs.pi05_subtask import TABLETOP_FROM_NOTHING as TABLETOP
from openpi_ar.config import LeRobotData, OptimizerConfig
from openpi_ar.model_config import TowerConfig, VitConfig

DEBUG = dataclasses.replace(
    TABLETOP,
    name="debug",
    model=dataclasses.replace(
        TABLETOP.model,
        siglip=VitConfig(width=16, depth=1, mlp_dim=32, num_heads=2, patch_size=16, image_size=(32, 32)),
        vlm=TowerConfig(width=16, depth=2, mlp_dim=32, num_heads=2, num_kv_heads=1, head_dim=8),
        expert=TowerConfig(width=16, depth=2, mlp_dim=32, num_heads=2, num_kv_heads=1, head_dim=8),
        action_horizon=4,
    ),
    loss=dataclasses.replace(TABLETOP.loss, flow_draws=2),
    data=LeRobotData("world://tabletop?episodes=3&image_size=32x32"),
    optimizer=OptimizerConfig(peak_lr=1e-2, final_lr=1e-3, warmup_steps=2, b2=0.99, ema_decay=0.99),
    batch_size=4,
    num_steps=6,
    log_every=2,
    eval_every=4,
    eval_batches=1,
    save_every=4,
)
