"""The name table of pi0 and pi0.5: one row a tensor, our path <-> openpi's (JAX) <-> PyTorch's (openpi and LeRobot).

`openpi/models/gemma.py` and `pi0.py` define openpi's side, its `examples/convert_jax_model_to_pytorch.py` PyTorch's.
The first tower and SigLIP are PaliGemma's rows (`checkpoints/paligemma/names.py`, with the legend of their axes).

    E G      second tower: width, mlp width               X  action dim    P  state dim
    R S      LoRA rank of the first and the second tower
    c t      fixed: 2 (keys and values, gate and up, actions and time), 3 (scale, shift, gate)
"""

import re

from openpi_ar.checkpoints.family import Row
from openpi_ar.checkpoints.lerobot import STATISTICS
from openpi_ar.checkpoints.paligemma import names as paligemma

FIXED = paligemma.FIXED | {"t": 3}

_VIT = "paligemma_with_expert.paligemma.model.vision_tower.vision_model"
_PROJECTOR = "paligemma_with_expert.paligemma.model.multi_modal_projector.linear"
_LM = "paligemma_with_expert.paligemma.model.language_model"
_EXPERT = "paligemma_with_expert.gemma_expert.model"

EMBED_TOKENS = f"{_LM}.embed_tokens.weight"
LM_HEAD = "paligemma_with_expert.paligemma.lm_head.weight"
"""The same matrix as EMBED_TOKENS: `safetensors` keeps only this name of the two, LeRobot writes both."""
EXPERT_HEAD = "paligemma_with_expert.gemma_expert.lm_head.weight"


def _linear(ours: str, name: str, layout: str, to_torch: str, bias: str) -> list[Row]:
    return [
        Row(f"{ours}/kernel", f"{name}/kernel", layout, (f"{name}.weight",), to_torch),
        Row(f"{ours}/bias", f"{name}/bias", bias, (f"{name}.bias",), bias),
    ]


ROWS: tuple[Row, ...] = (
    *paligemma.vlm_rows("PaliGemma", _VIT, _PROJECTOR, _LM),
    *paligemma.tower("expert", "PaliGemma", "_1", _EXPERT, "E", "G", "S"),
    *_linear("action_in", "action_in_proj", "X E", "E X", "E"),
    *_linear("action_out", "action_out_proj", "E X", "X E", "X"),
    *_linear("time_mlp_in", "time_mlp_in", "E1 E2", "E2 E1", "E"),
    *_linear("time_mlp_out", "time_mlp_out", "E1 E2", "E2 E1", "E"),
    *_linear("state_in", "state_proj", "P E", "E P", "E"),
    *_linear("action_time_mlp_in", "action_time_mlp_in", "(c E1) E2", "E2 (c E1)", "E"),
    *_linear("action_time_mlp_out", "action_time_mlp_out", "E1 E2", "E2 E1", "E"),
)

IGNORED: tuple[tuple[str, str], ...] = (
    (re.escape(EXPERT_HEAD), "the second tower has no vocabulary: random and never used"),
    *paligemma.IGNORED,
    (r"(model\.)*" + STATISTICS + r".*", "statistics of LeRobot before 0.4, not parameters"),
)

_PALIGEMMA = r"(model\.)*(paligemma_with_expert\.paligemma\.)?(model\.)?"
RENAMES: tuple[tuple[str, str], ...] = (
    # pi0 as it was before transformers 4.52, and as it is from 5.24, which has no `vision_model`.
    (_PALIGEMMA + r"language_model\.(model\.)?(?=layers|norm|embed_tokens)", f"{_LM}."),
    (_PALIGEMMA + r"vision_tower\.(vision_model\.)?", f"{_VIT}."),
    (_PALIGEMMA + r"multi_modal_projector\.linear", _PROJECTOR),
    (_PALIGEMMA + r"(language_model\.)?lm_head\.weight", LM_HEAD),
    (r"(model\.)+(?=action_|time_|state_|paligemma_with_expert\.)", ""),  # LeRobot's policies
)
