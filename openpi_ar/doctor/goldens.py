"""Reading goldens: directories of arrays that reference code computed from known inputs; and the difference from one.

inputs.npz, outputs.npz                          openpi's JAX code; PaliGemma in the transformers library
inputs_train.npz, inputs_sample.npz, outputs.npz a subtask model whose whole prompt is causal text
golden.npz                                       openpi's PyTorch code
"""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
from pathlib import Path
import re

import numpy as np

from openpi_ar.errors import UserError
from openpi_ar.model_config import PaliGemmaConfig
from openpi_ar.types import Array, Kind, Observation, Tokens

Golden = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Difference:
    """One quantity: largest and mean absolute difference over the entries that mean something, and the bound on
    `judged`."""

    name: str
    largest: float
    mean: float
    bound: float
    judged: str = "largest"

    @property
    def ok(self) -> bool:
        """Within the bound. Not a number is not."""
        return getattr(self, self.judged) <= self.bound


Compare = Callable[..., Iterator[Difference]]


def comparison(a: Golden, mean_bound: Callable[[float], float | None] | None) -> Compare:
    """`compare(name, ours, bound, where)`: the difference from an array of the golden, if the golden has it.

    In bfloat16 the mean is judged, by `mean_bound(bound)`; what that has no bound for is not compared, and neither are
    losses: squares or sums, in another unit. Raises UserError if the shapes differ.
    """

    def compare(name: str, ours: Array, bound: float, where: np.ndarray | None = None) -> Iterator[Difference]:
        if name not in a:
            return
        golden, mine = np.asarray(a[name], np.float64), np.asarray(ours).astype(np.float64)
        if golden.shape != mine.shape:
            raise UserError(f"{name}: the golden's shape is {list(golden.shape)}, the checkpoint's {list(mine.shape)}")
        d = np.abs(golden - mine)
        d = d if where is None else d[where]
        if mean_bound is None:
            yield Difference(name, float(d.max()), float(d.mean()), bound)
        elif "loss" not in name and (mean := mean_bound(bound)) is not None:
            yield Difference(name, float(d.max()), float(d.mean()), mean, "mean")

    return compare


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
            # Of two versions of the transformers library the newer one scales in bfloat16 as big_vision does.
            arrays = {p + k: v for name, p in files.items() for k, v in np.load(golden / name).items()}
            return {k.removeprefix("hf5/"): v for k, v in arrays.items()}
    raise UserError(f"{golden} is no golden: expected golden.npz, or inputs*.npz and {outputs}")


def input_arrays(arrays: Golden, cameras: tuple[str, ...], cfg: PaliGemmaConfig) -> dict[str, np.ndarray]:
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
