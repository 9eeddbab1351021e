"""Reading goldens: directories of arrays that reference code computed from known inputs.

inputs.npz, outputs.npz                          openpi's JAX code
inputs_train.npz, inputs_sample.npz, outputs.npz a subtask model whose whole prompt is causal text
golden.npz                                       openpi's PyTorch code
"""

from collections.abc import Mapping
from pathlib import Path
import re

import numpy as np

from openpi_ar.errors import UserError
from openpi_ar.model_config import ModelConfig
from openpi_ar.types import Kind, Observation, Tokens

Golden = Mapping[str, np.ndarray]


IMAGE = re.compile(r"(train:|sample:)?(?:image/|in_image_(?!mask_))(.+)")


def read_arrays(golden: Path, compute_dtype: str) -> dict[str, np.ndarray]:
    """All arrays of a golden; inputs of the two runs of a subtask golden are prefixed `train:` and `sample:`."""
    outputs = "outputs_bf16.npz" if compute_dtype == "bfloat16" else "outputs.npz"
    layouts = (
        {"golden.npz": ""},
        {"inputs.npz": "", outputs: ""},
        {"inputs_train.npz": "train:", "inputs_sample.npz": "sample:", outputs: ""},
    )
    for files in layouts:
        if all((golden / name).is_file() for name in files):
            return {p + k: v for name, p in files.items() for k, v in np.load(golden / name).items()}
    raise UserError(f"{golden} is no golden: expected golden.npz, or inputs*.npz and {outputs}")


def input_arrays(arrays: Golden, cameras: tuple[str, ...], cfg: ModelConfig) -> dict[str, np.ndarray]:
    """The inputs under one set of names: in_images, in_image_mask, in_ids, in_valid, in_state, per prefix."""
    found: dict[str, np.ndarray] = {}
    for prefix in ("", "train:", "sample:"):
        image, mask = f"{prefix}image/{{}}", f"{prefix}image_mask/{{}}"
        ids, valid = f"{prefix}tokenized_prompt", f"{prefix}tokenized_prompt_mask"
        if not prefix and "in_tokens" in arrays:
            image, mask, ids, valid = "in_image_{}", "in_image_mask_{}", "in_tokens", "in_token_mask"
        if ids not in arrays:
            continue
        found[f"{prefix}in_images"] = np.stack([arrays[image.format(c)] for c in cameras], axis=1)
        found[f"{prefix}in_image_mask"] = np.stack([arrays[mask.format(c)] for c in cameras], axis=1)
        found[f"{prefix}in_ids"], found[f"{prefix}in_valid"] = arrays[ids], arrays[valid]
        for name in ("state", "actions", "noise", "time"):
            torch = f"in_{name}"
            found[f"{prefix}in_{name}"] = arrays[torch if torch in arrays else f"{prefix}{name}"]
        have, want = found[f"{prefix}in_images"].shape[2:4], cfg.siglip.image_size
        if have != want:
            raise UserError(f"the golden's images are {have}, the checkpoint's model reads {want}")
    found["in_images"] = found.get("in_images", found.get("train:in_images", np.zeros(0)))
    return found


def text_run(ids: np.ndarray, valid: np.ndarray, *, causal: bool, loss: np.ndarray | None = None) -> Tokens:
    """Tokens of a prompt, or of a subtask if they are causal."""
    kind = Kind.SUBTASK if causal else Kind.PROMPT
    return Tokens.of(ids, valid, kind=kind, causal=causal, loss=False if loss is None else loss)


def observation(a: Golden, prefix: str = "", *, causal: bool = False, rows: slice = slice(None)) -> Observation:
    return Observation(
        images=a[f"{prefix}in_images"][rows],
        image_mask=a[f"{prefix}in_image_mask"][rows],
        prompt=text_run(a[f"{prefix}in_ids"][rows], a[f"{prefix}in_valid"][rows], causal=causal),
        state=a[f"{prefix}in_state"][rows],
    )
