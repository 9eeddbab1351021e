"""The sizes of pi0 and pi0.5: from a checkpoint's tensors, from a configuration, and in the words of others."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from openpi_ar.checkpoints import lerobot
from openpi_ar.checkpoints.family import Sizes, image_size, number
from openpi_ar.checkpoints.options import LoadOptions
from openpi_ar.checkpoints.paligemma import config as paligemma
from openpi_ar.checkpoints.pi0.names import FIXED, ROWS
from openpi_ar.model_config import ModelConfig

_NEEDED = "w m n h p T D F N K H V l L E G X"


def build(paths: set[str], sizes: Sizes, overrides: Mapping[str, Any], base: ModelConfig | None) -> ModelConfig:
    """The configuration of a model with parameters at these paths and of these sizes.

    `overrides` are fields of ModelConfig and `image_size`; `base` has what neither tells. Raises ValueError if no
    tensor tells a dimension.
    """
    paligemma.check_sizes(sizes, _NEEDED, ROWS)
    base = base or ModelConfig()
    expert = {"width": sizes["E"], "depth": sizes["L"], "mlp_dim": sizes["G"], "head_dim": sizes["H"]}
    expert |= {"num_heads": sizes["N"], "num_kv_heads": sizes["K"], "lora_rank": sizes.get("S", 0)}
    fields = {
        "pi05": "state_in/kernel" not in paths,
        "expert": dataclasses.replace(base.expert, **expert),
        "action_dim": sizes["X"],
        "state_dim": sizes.get("P", sizes["X"]),
    }
    fields |= {k: v for k, v in overrides.items() if k != "image_size"}
    return dataclasses.replace(base, **(paligemma.vlm_fields(sizes, overrides.get("image_size"), base) | fields))


def sizes(cfg: ModelConfig) -> Sizes:
    """Size of every axis of the name table: the inverse of `build`."""
    e = cfg.expert
    return FIXED | paligemma.sizes(cfg) | {"E": e.width, "G": e.mlp_dim, "X": cfg.action_dim, "P": cfg.state_dim}


def told(settings: Mapping[str, Any]) -> tuple[LoadOptions, None]:
    """What the config.json of openpi's PyTorch port or of LeRobot says and no tensor does. Raises UserError."""
    options = LoadOptions(
        action_horizon=number(settings, "action_horizon", "chunk_size"),
        siglip_heads=number(settings, "siglip_heads"),
        num_kv_heads=number(settings, "num_kv_heads"),
        cameras=lerobot.cameras(settings),
        image_size=image_size(settings, "image_resolution"),
    )
    return options, None


def torch_settings(cfg: ModelConfig, dtype: str) -> dict[str, Any]:
    """Body of config.json beside openpi's PyTorch file."""
    return {
        "action_dim": cfg.action_dim,
        "action_horizon": cfg.action_horizon,
        "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m",
        "precision": dtype,
        # What shapes do not tell, for readers that are not bound to the public sizes.
        "siglip_heads": cfg.siglip.num_heads,
        "num_kv_heads": cfg.vlm.num_kv_heads,
    }
