"""The sizes of pi0, pi0.5 and PaliGemma: from a checkpoint's tensors, from a configuration, and in the words of
others."""

import dataclasses
from typing import Any

from openpi_ar.checkpoints.family import Sizes, axes
from openpi_ar.checkpoints.pi0.names import FIXED, ROWS
from openpi_ar.model_config import GEMMA_300M, ModelConfig, TowerConfig, VitConfig


def build(paths: set[str], sizes: Sizes, overrides: dict[str, Any], base: ModelConfig | None) -> ModelConfig:
    """The configuration of a model with parameters at these paths and of these sizes.

    `overrides` are fields of ModelConfig and `image_size`; `base` has what neither tells. Raises ValueError if no
    tensor tells a dimension.
    """
    has_expert = "action_in/kernel" in paths
    needed = "w m n h p T D F N K H V l L" + (" E G X" if has_expert else "")
    if missing := [axis for axis in needed.split() if not sizes.get(axis)]:
        tensors = sorted({row.openpi for row in ROWS if set(axes(row.layout)) & set(missing)})[:6]
        raise ValueError(f"the tensors that tell its dimensions are missing ({', '.join(tensors)}, ...)")
    patch, side = sizes["p"], int(sizes["T"] ** 0.5)
    image_size = overrides.pop("image_size", None)
    if image_size is None:
        if side * side != sizes["T"]:
            raise ValueError(
                f"{sizes['T']} position embeddings are no square grid: give the image size (height, width)"
            )
        image_size = (side * patch, side * patch)
    siglip = VitConfig(sizes["w"], sizes["l"], sizes["m"], sizes["n"], patch, (image_size[0], image_size[1]))
    heads = (sizes["N"], sizes["K"], sizes["H"])
    vlm = TowerConfig(sizes["D"], sizes["L"], sizes["F"], *heads, lora_rank=sizes.get("R", 0))
    if has_expert:
        expert = TowerConfig(sizes["E"], sizes["L"], sizes["G"], *heads, lora_rank=sizes.get("S", 0))
    else:
        expert = TowerConfig(GEMMA_300M.width, sizes["L"], GEMMA_300M.mlp_dim, *heads)
    fields = {
        "pi05": "state_in/kernel" not in paths,
        "siglip": siglip,
        "vlm": vlm,
        "expert": expert,
        "vocab_size": sizes["V"],
        "action_dim": sizes.get("X", 32),
        "state_dim": sizes.get("P", sizes.get("X", 32)),
    }
    return dataclasses.replace(base or ModelConfig(), **(fields | overrides))


def sizes(cfg: ModelConfig) -> Sizes:
    """Size of every axis of the name table: the inverse of `build`."""
    s, v, e = cfg.siglip, cfg.vlm, cfg.expert
    head = s.width // s.num_heads
    siglip = {"w": s.width, "m": s.mlp_dim, "n": s.num_heads, "h": head, "p": s.patch_size, "T": s.num_tokens}
    towers = {"D": v.width, "F": v.mlp_dim, "E": e.width, "G": e.mlp_dim, "N": v.num_heads, "K": v.num_kv_heads}
    return FIXED | siglip | towers | {"H": v.head_dim, "V": cfg.vocab_size, "X": cfg.action_dim, "P": cfg.state_dim}


def torch_settings(cfg: ModelConfig, dtype: str, kind: str) -> dict[str, Any]:
    """Body of config.json beside openpi's PyTorch file ("torch") or of LeRobot's policies ("lerobot")."""
    body: dict[str, Any] = (
        _lerobot(cfg) if kind == "lerobot" else {"action_dim": cfg.action_dim, "action_horizon": cfg.action_horizon}
    )
    body |= {"paligemma_variant": "gemma_2b", "action_expert_variant": "gemma_300m"}
    body["dtype" if kind == "lerobot" else "precision"] = dtype
    # What shapes do not tell, for readers that are not bound to the public sizes.
    return body | {"siglip_heads": cfg.siglip.num_heads, "num_kv_heads": cfg.vlm.num_kv_heads}


def _lerobot(cfg: ModelConfig) -> dict[str, Any]:
    """What LeRobot's `PI0Config` and `PI05Config` need to build the same model."""
    height, width = cfg.siglip.image_size
    images = {f"observation.images.{c}": {"type": "VISUAL", "shape": [3, height, width]} for c in cfg.cameras}
    norm = "QUANTILES" if cfg.norm_mode == "quantile" else "MEAN_STD"
    return {
        "type": cfg.kind,
        "input_features": images | {"observation.state": {"type": "STATE", "shape": [cfg.state_dim]}},
        "output_features": {"action": {"type": "ACTION", "shape": [cfg.action_dim]}},
        "chunk_size": cfg.action_horizon,
        "n_action_steps": cfg.action_horizon,
        "max_state_dim": cfg.state_dim,
        "max_action_dim": cfg.action_dim,
        "image_resolution": [height, width],
        "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": norm, "ACTION": norm},
    }
