"""Checkpoints of pi0 and pi0.5, as openpi (JAX and PyTorch) and LeRobot write them."""

from openpi_ar.checkpoints.family import Family, Writer
from openpi_ar.checkpoints.pi0 import config, names
from openpi_ar.model_config import ModelConfig

FAMILY = Family(
    title="pi0 and pi0.5",
    config=ModelConfig,
    rows=names.ROWS,
    writers=(
        Writer("ours", "ours"),
        Writer("openpi", "openpi"),
        Writer("lerobot", "torch", prefix=r"model\."),
        Writer("lerobot", "torch", setting="type"),
        Writer("torch", "torch"),
    ),
    fixed=names.FIXED,
    public={"siglip_heads": ("n", 16), "num_kv_heads": ("K", 1)},
    needs=(
        (
            "expert/|action_",
            "has no action expert: it is PaliGemma alone, as in pi0-FAST's checkpoints, which write actions as text. "
            "openpi_ar acts with pi0 and pi0.5",
        ),
    ),
    position_embedding="img/pos_embedding",
    token_embedding="embedder/table",
    tied=(names.EMBED_TOKENS, names.LM_HEAD),
    # LeRobot writes both of the tied tensors.
    formats={"openpi": (), "torch": (names.LM_HEAD,), "lerobot": (names.EMBED_TOKENS, names.LM_HEAD), "ours": ()},
    ignored=names.IGNORED,
    renames=names.RENAMES,
    build=config.build,
    sizes=config.sizes,
    # Every file of the PyTorch port has the second tower's head.
    padding=lambda cfg: {names.EXPERT_HEAD: (cfg.vocab_size, cfg.expert.width)},
    torch_settings=config.torch_settings,
    told=config.told,
)
