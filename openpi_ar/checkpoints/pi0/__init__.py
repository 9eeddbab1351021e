"""Checkpoints of pi0, pi0.5 and PaliGemma, as openpi (JAX and PyTorch), LeRobot and big_vision write them."""

from openpi_ar.checkpoints.family import Family, Writer
from openpi_ar.checkpoints.pi0 import config, names
from openpi_ar.model_config import ModelConfig

FAMILY = Family(
    title="pi0, pi0.5 and PaliGemma",
    config=ModelConfig,
    rows=names.ROWS,
    writers=(
        Writer("ours", "ours"),
        Writer("paligemma", "openpi", prefix="params/", holds="(img|embedder|vlm)/"),
        Writer("openpi", "openpi"),
        Writer("lerobot", "torch", prefix=r"model\."),
        Writer("lerobot", "torch", setting="type"),
        Writer("torch", "torch"),
    ),
    fixed=names.FIXED,
    public={"siglip_heads": ("n", 16), "num_kv_heads": ("K", 1)},
    tied=(names.EMBED_TOKENS, names.LM_HEAD),
    ignored=names.IGNORED,
    renames=names.RENAMES,
    build=config.build,
    sizes=config.sizes,
    # Every file of the PyTorch port has the second tower's head.
    padding=lambda cfg: {names.EXPERT_HEAD: (cfg.vocab_size, cfg.expert.width)},
    torch_settings=config.torch_settings,
)
