"""The sizes of PaliGemma: from a checkpoint's tensors, from a configuration, and in the words of transformers'
config.json."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from openpi_ar.checkpoints.family import Sizes, axes, image_size, number
from openpi_ar.checkpoints.options import AS_IT_IS, LoadOptions
from openpi_ar.checkpoints.paligemma.names import FIXED, ROWS
from openpi_ar.errors import UserError
from openpi_ar.model_config import PaliGemmaConfig
from openpi_ar.textfile import is_number

_NEEDED = "w m n h p T D F N K H V l L"
_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu": "gelu"}


def build(paths: set[str], sizes: Sizes, overrides: Mapping[str, Any], base: PaliGemmaConfig | None) -> PaliGemmaConfig:
    """The configuration of a model with parameters at these paths and of these sizes.

    `overrides` are fields of the configuration and `image_size`; `base` has what neither tells. Raises ValueError if no
    tensor tells a dimension.
    """
    check_sizes(sizes, _NEEDED, ROWS)
    base = base or PaliGemmaConfig()
    fields = {k: v for k, v in overrides.items() if k != "image_size"}
    return dataclasses.replace(base, **(vlm_fields(sizes, overrides.get("image_size"), base) | fields))


def check_sizes(sizes: Sizes, needed: str, rows: Any) -> None:
    """Raises ValueError, which names their tensors, if the size of a needed axis is not known."""
    if missing := [axis for axis in needed.split() if not sizes.get(axis)]:
        tensors = sorted({row.openpi for row in rows if set(axes(row.layout)) & set(missing)})[:6]
        raise ValueError(f"the tensors that tell its dimensions are missing ({', '.join(tensors)}, ...)")


def vlm_fields(sizes: Sizes, image_size: tuple[int, int] | None, base: PaliGemmaConfig) -> dict[str, Any]:
    """The fields of `PaliGemmaConfig` that shapes tell. Without an image size the grid of patches must be square."""
    patch, side = sizes["p"], int(sizes["T"] ** 0.5)
    if image_size is None:
        if side * side != sizes["T"]:
            raise ValueError(
                f"{sizes['T']} position embeddings are no square grid: give the image size (height, width)"
            )
        image_size = (side * patch, side * patch)
    siglip = {"width": sizes["w"], "depth": sizes["l"], "mlp_dim": sizes["m"], "num_heads": sizes["n"]}
    vlm = {"width": sizes["D"], "depth": sizes["L"], "mlp_dim": sizes["F"], "head_dim": sizes["H"]}
    vlm |= {"num_heads": sizes["N"], "num_kv_heads": sizes["K"], "lora_rank": sizes.get("R", 0)}
    return {
        "siglip": dataclasses.replace(base.siglip, **siglip, patch_size=patch, image_size=tuple(image_size)),
        "vlm": dataclasses.replace(base.vlm, **vlm),
        "vocab_size": sizes["V"],
    }


def sizes(cfg: PaliGemmaConfig) -> Sizes:
    """Size of every axis of the name table: the inverse of `build`."""
    s, v = cfg.siglip, cfg.vlm
    siglip = {"w": s.width, "m": s.mlp_dim, "n": s.num_heads, "h": s.width // s.num_heads, "p": s.patch_size}
    tower = {"D": v.width, "F": v.mlp_dim, "N": v.num_heads, "K": v.num_kv_heads, "H": v.head_dim}
    return FIXED | siglip | tower | {"T": s.num_tokens, "V": cfg.vocab_size}


def told(settings: Mapping[str, Any]) -> tuple[LoadOptions, PaliGemmaConfig | None]:
    """What transformers' config.json says: (what no tensor tells, a configuration of the constants of the layers).

    Raises UserError if it says anything that the model does not have.
    """
    vision, text = (settings.get(f"{part}_config") for part in ("vision", "text"))
    if not isinstance(vision, dict) or not isinstance(text, dict):
        return AS_IT_IS, None
    if (decoder := text.get("model_type", "gemma")) != "gemma":
        raise UserError(f"config.json: text_config.model_type is {decoder!r}: only PaliGemma's first version is known")
    base, rope = PaliGemmaConfig(), text.get("rope_parameters")
    constants = {
        "norm_eps": _positive(text, "rms_norm_eps", base.vlm.norm_eps),
        "rope_base": _positive(rope if isinstance(rope, dict) else text, "rope_theta", base.vlm.rope_base),
    }
    for name in ("hidden_activation", "hidden_act"):
        if str(text.get(name) or "gelu") not in _ACTIVATIONS:  # "gelu" has always meant the approximation in Gemma
            raise UserError(
                f"config.json: text_config.{name} {text[name]!r} is not Gemma's: expected gelu_pytorch_tanh"
            )
    activation = _ACTIVATIONS.get(str(vision.get("hidden_act", "gelu_pytorch_tanh")))
    if activation is None:
        raise UserError(
            f"config.json: vision_config.hidden_act {vision['hidden_act']!r} is not known: expected one of "
            f"{', '.join(_ACTIVATIONS)}"
        )
    eps = _positive(vision, "layer_norm_eps", base.siglip.norm_eps)
    siglip = dataclasses.replace(base.siglip, norm_eps=eps, activation=activation)
    options = LoadOptions(
        siglip_heads=number(vision, "num_attention_heads"),
        num_kv_heads=number(text, "num_key_value_heads"),
        image_size=image_size(vision, "image_size"),
    )
    return options, dataclasses.replace(base, siglip=siglip, vlm=dataclasses.replace(base.vlm, **constants))


def _positive(part: Mapping[str, Any], key: str, default: float) -> float:
    value = part.get(key)
    if value is not None and not (is_number(value) and value > 0):
        raise UserError(f"config.json: {key} is {value!r}, expected a positive number")
    return default if value is None else float(value)


def torch_settings(cfg: PaliGemmaConfig, dtype: str) -> dict[str, Any]:
    """Body of transformers' config.json."""
    s, v = cfg.siglip, cfg.vlm
    height, width = s.image_size
    return {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "model_type": "paligemma",
        "image_token_index": cfg.vocab_size,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "hidden_size": v.width,
        "projection_dim": v.width,
        "torch_dtype": dtype,
        "text_config": {
            "model_type": "gemma",
            "hidden_size": v.width,
            "intermediate_size": v.mlp_dim,
            "num_hidden_layers": v.depth,
            "num_attention_heads": v.num_heads,
            "num_key_value_heads": v.num_kv_heads,
            "head_dim": v.head_dim,
            "vocab_size": cfg.vocab_size,
            "num_image_tokens": s.num_tokens,
            "rms_norm_eps": v.norm_eps,
            "rope_theta": v.rope_base,
            "torch_dtype": dtype,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": s.width,
            "intermediate_size": s.mlp_dim,
            "num_hidden_layers": s.depth,
            "num_attention_heads": s.num_heads,
            "image_size": height if height == width else [height, width],
            "patch_size": s.patch_size,
            "num_image_tokens": s.num_tokens,
            "projection_dim": v.width,
            "vision_use_head": False,
            "layer_norm_eps": s.norm_eps,
            "hidden_act": "gelu_pytorch_tanh" if s.activation == "gelu_tanh" else s.activation,
            "torch_dtype": dtype,
        },
    }
