"""The model's dimensions from the shapes of a checkpoint's tensors."""

from collections import Counter
from collections.abc import Iterator
import dataclasses
import re

from openpi_ar.checkpoints import names
from openpi_ar.checkpoints.names import Row
from openpi_ar.checkpoints.sources import Source
from openpi_ar.config import GEMMA_300M, ModelConfig, SigLIPConfig, TowerConfig
from openpi_ar.errors import UserError

Sizes = dict[str, int]
"""Size of each axis letter of `names`; `L` and `l` are the numbers of layers."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor of the source that a row of the table names: `layer` and `part` are None where JAX stacks them."""

    row: Row
    name: str
    layer: int | None = None
    part: int | None = None


def stored_layout(row: Row, source: Source) -> str:
    """Axes of a row's tensor as the source stores it."""
    if source.layout == "torch":
        return row.to_torch
    lead = "1 " if row.lead and source.layout == "openpi" else ""
    return " ".join(x for x in (row.layers, lead + row.layout) if x)


def match(source: Source) -> tuple[list[Stored], list[str], list[str]]:
    """(tensors that rows of the table name, leftovers that none names, ignored ones with the reason)."""
    found: list[Stored] = []
    ignored: list[str] = []
    by_name = {n: row for row in names.TABLE for n in ((row.ours,) if source.layout == "ours" else (row.openpi,))}
    by_torch = {n: (row, i if len(row.torch) == 2 else None) for row in names.TABLE for i, n in enumerate(row.torch)}
    untied = names.EMBED_TOKENS in source.specs
    left = []
    for name in source.specs:
        if source.layout != "torch":
            if row := by_name.get(name):
                found.append(Stored(row, name))
            else:
                left.append(name)
            continue
        if name == names.LM_HEAD:
            if untied:
                ignored.append(f"{name}: the embedding, written twice; ours is tied to it")
            else:
                found.append(Stored(by_torch[names.EMBED_TOKENS][0], name))
            continue
        number = re.search(r"\.layers\.(\d+)\.", name)
        template = name if number is None else f"{name[: number.start(1)]}{{}}{name[number.end(1) :]}"
        if template in by_torch:
            row, part = by_torch[template]
            found.append(Stored(row, name, None if number is None else int(number[1]), part))
        elif reason := next((why for pattern, why in names.TORCH_IGNORED if re.fullmatch(pattern, name)), None):
            ignored.append(f"{name}: {reason}")
        else:
            left.append(name)
    return found, left, ignored


def solve(source: Source, found: list[Stored], given: Sizes) -> tuple[Sizes, list[str]]:
    """(size of every axis, tensors whose shape contradicts them).

    Where tensors disagree on an axis the majority is right, so that one wrong tensor is one complaint. Products such as
    heads x head dim, which PyTorch stores as one axis, are divided by what is known: `given`, or other tensors.
    """
    votes: dict[str, Counter[int]] = {}
    for item in found:
        for group, size in _groups(item, source):
            if len(group) == 1 and group[0] not in names.FIXED:
                votes.setdefault(group[0], Counter())[size] += 1
    sizes = dict(names.FIXED) | {axis: count.most_common(1)[0][0] for axis, count in votes.items()}
    if source.layout == "torch":
        for axis in ("L", "l"):
            sizes[axis] = max((i.layer + 1 for i in found if i.row.layers == axis and i.layer is not None), default=0)
    sizes = given | sizes
    for _ in range(2):  # `K H` gives H, then `N H` gives N
        votes = {}
        for item in found:
            for group, size in _groups(item, source):
                unknown = [axis for axis in group if axis not in sizes]
                known = 1
                for axis in group:
                    known *= sizes.get(axis, 1)
                if len(unknown) == 1 and size % known == 0:
                    votes.setdefault(unknown[0], Counter())[size // known] += 1
        sizes |= {axis: count.most_common(1)[0][0] for axis, count in votes.items()}
    return sizes, [problem for item in found if (problem := _clash(item, source, sizes))]


def expected_shape(layout: str, sizes: Sizes) -> tuple[int, ...]:
    """Shape of a layout; an axis of unknown size counts as 0."""
    shape = []
    for group in re.findall(r"\([^)]*\)|\S+", layout):
        size = 1
        for axis in _axes(group):
            size *= sizes.get(axis, 0) if axis != "1" else 1
        shape.append(size)
    return tuple(shape)


def model_config(
    source: Source, found: list[Stored], sizes: Sizes, overrides: dict, base: ModelConfig | None = None
) -> ModelConfig:
    """The configuration that these sizes mean; `overrides` are ModelConfig fields and `image_size`, `base` has the rest.

    Raises UserError if a dimension is told by no tensor.
    """
    rows = {item.row.ours for item in found}
    has_expert = "action_in/kernel" in rows
    needed = "w m n h p T D F N K H V l L" + (" E G X" if has_expert else "")
    if missing := [axis for axis in needed.split() if not sizes.get(axis)]:
        tensors = sorted({row.openpi for row in names.TABLE if set(_axes(row.layout)) & set(missing)})[:6]
        raise UserError(
            f"{source.path} lacks the tensors that tell the model's dimensions ({', '.join(tensors)}, ...): it is no "
            f"pi0, pi0.5 or PaliGemma, or it is incomplete"
        )
    patch, side = sizes["p"], int(sizes["T"] ** 0.5)
    image_size = overrides.pop("image_size", None)
    if image_size is None:
        if side * side != sizes["T"]:
            raise UserError(
                f"{source.path}: {sizes['T']} position embeddings are no square grid: give the image size (height, width)"
            )
        image_size = (side * patch, side * patch)
    siglip = SigLIPConfig(sizes["w"], sizes["l"], sizes["m"], sizes["n"], patch, (image_size[0], image_size[1]))
    heads = (sizes["N"], sizes["K"], sizes["H"])
    vlm = TowerConfig(sizes["D"], sizes["L"], sizes["F"], *heads, lora_rank=sizes.get("R", 0))
    if has_expert:
        expert = TowerConfig(sizes["E"], sizes["L"], sizes["G"], *heads, lora_rank=sizes.get("S", 0))
    else:
        expert = TowerConfig(GEMMA_300M.width, sizes["L"], GEMMA_300M.mlp_dim, *heads)
    fields = {
        "pi05": "state_in/kernel" not in rows,
        "siglip": siglip,
        "vlm": vlm,
        "expert": expert,
        "vocab_size": sizes["V"],
        "action_dim": sizes.get("X", 32),
        "state_dim": sizes.get("P", sizes.get("X", 32)),
    }
    return dataclasses.replace(base or ModelConfig(), **(fields | overrides))


def _axes(layout: str) -> list[str]:
    """Axis letters of a layout; `E1` and `E2` are both `E`."""
    return ["1" if x == "1" else x.rstrip("12") for x in layout.replace("(", " ").replace(")", " ").split()]


def _groups(item: Stored, source: Source) -> Iterator[tuple[list[str], int]]:
    layout = re.findall(r"\([^)]*\)|\S+", stored_layout(item.row, source))
    shape = source.specs[item.name].shape
    if len(layout) == len(shape):
        yield from ((_axes(group), size) for group, size in zip(layout, shape, strict=True))


def _clash(item: Stored, source: Source, sizes: Sizes) -> str | None:
    want, have = expected_shape(stored_layout(item.row, source), sizes), source.specs[item.name].shape
    if want == have:
        return None
    return f"{item.name}: expected {list(want)}, found {list(have)}"
