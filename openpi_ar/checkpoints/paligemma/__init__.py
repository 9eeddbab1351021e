"""Checkpoints of PaliGemma, as big_vision and the transformers library write them."""

from openpi_ar.checkpoints.family import Family, Writer
from openpi_ar.checkpoints.paligemma import config, names
from openpi_ar.model_config import PaliGemmaConfig

FAMILY = Family(
    title="PaliGemma",
    config=PaliGemmaConfig,
    rows=names.ROWS,
    writers=(Writer("ours", "ours"), Writer("big_vision", "openpi"), Writer("transformers", "torch")),
    fixed=names.FIXED,
    public={"siglip_heads": ("n", 16), "num_kv_heads": ("K", 1)},
    needs=(),
    position_embedding="img/pos_embedding",
    token_embedding="embedder/table",
    tied=(names.EMBED_TOKENS, names.LM_HEAD),
    formats={"torch": (names.EMBED_TOKENS,)},
    ignored=names.IGNORED,
    renames=names.RENAMES,
    build=config.build,
    sizes=config.sizes,
    padding=lambda cfg: {},
    torch_settings=config.torch_settings,
    told=config.told,
)
