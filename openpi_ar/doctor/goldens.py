"""Reading goldens: directories of arrays that reference code computed from known inputs; and the difference from one.

inputs.npz, outputs.npz                          openpi's JAX code; PaliGemma in the transformers library
inputs_train.npz, inputs_sample.npz, outputs.npz a subtask model whose whole prompt is causal text
golden.npz                                       openpi's PyTorch code
"""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
from pathlib import Path
import re
import zipfile
import zlib

import numpy as np

from openpi_ar.errors import UserError
from openpi_ar.types import Array, Kind, Observation, Tokens

Golden = Mapping[str, np.ndarray]


class Arrays(dict[str, np.ndarray]):
    """Arrays of a golden by name. One that is missing is a UserError."""

    def __missing__(self, name: str) -> np.ndarray:
        raise UserError(f"the golden lacks the array {name!r}")


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


_IMAGE = re.compile(r"(train:|sample:)?(?:image/|in_image_(?!mask_))(.+)")


def read_arrays(golden: Path, compute_dtype: str) -> Arrays:
    """All arrays of a golden; inputs of the two runs of a subtask golden are prefixed `train:` and `sample:`.

    Raises UserError if the directory is no golden or a file of it is damaged.
    """
    outputs = "outputs_bf16.npz" if compute_dtype == "bfloat16" else "outputs.npz"
    layouts = (
        {"golden.npz": ""},
        {"inputs.npz": "", outputs: ""},
        {"inputs_train.npz": "train:", "inputs_sample.npz": "sample:", outputs: ""},
    )
    for files in layouts:
        if all((golden / name).is_file() for name in files):
            arrays = Arrays()
            for name, prefix in files.items():
                try:
                    arrays |= {prefix + k: v for k, v in np.load(golden / name).items()}
                except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as e:
                    raise UserError(f"{golden / name} cannot be read as an .npz of arrays: {e}") from e
            # Of two versions of the transformers library the newer one scales in bfloat16 as big_vision does.
            return Arrays({k.removeprefix("hf5/"): v for k, v in arrays.items()})
    raise UserError(f"{golden} is no golden: expected golden.npz, or inputs*.npz and {outputs}")


def camera_names(arrays: Golden, told: object, golden: Path) -> tuple[str, ...]:
    """The cameras in the model's order: as the golden's config.json says, else as its arrays come."""
    found = tuple(dict.fromkeys(m[2] for k in arrays if (m := _IMAGE.fullmatch(k))))
    if not found:
        raise UserError(f"{golden} holds no images: expected arrays image/<camera> or in_image_<camera>")
    if told and not (isinstance(told, list) and set(map(str, told)) <= set(found)):
        raise UserError(f"{golden}: image_keys of config.json are {told!r:.80}, but the images are {', '.join(found)}")
    return tuple(told) if isinstance(told, list) and told else found


def image_size(arrays: Golden, golden: Path) -> tuple[int, int]:
    """Height and width of the golden's images. Raises UserError if they have none, or several."""
    shapes = {v.shape[1:] for k, v in arrays.items() if _IMAGE.fullmatch(k)}
    height, width = min(shapes)[:2] if len(shapes) == 1 and len(min(shapes)) == 3 else (0, 0)
    if not height or not width:
        raise UserError(f"{golden}: expected images [B height width 3] of one size, found {sorted(map(list, shapes))}")
    return height, width


def action_horizon(arrays: Golden, golden: Path, kind: object) -> int:
    """Actions of the golden's chunks. Raises UserError if it has none: nothing here computes what it holds."""
    for name, array in arrays.items():
        if re.split("[:/]", name)[-1] in ("actions", "in_actions") and array.ndim == 3:
            return array.shape[1]
    what = f" ({kind})" if isinstance(kind, str) else ""
    raise UserError(
        f"{golden} holds no actions{what}: pi0, pi0.5, subtask models and PaliGemma can be verified, pi0-FAST and "
        "others cannot"
    )


def input_arrays(arrays: Golden, cameras: tuple[str, ...]) -> dict[str, np.ndarray]:
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
