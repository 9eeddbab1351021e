"""What a family of models says about its checkpoints: names, axes and sizes of its tensors. One package a family
(`pi0/`).

A layout names a tensor's axes as einops does; layers are left out of it. JAX trees stack layers on a leading axis,
PyTorch numbers them (`{}` in a name). A digit after an axis letter tells axes of equal size apart.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import re
from typing import Any, Literal

from openpi_ar.checkpoints.options import Format, LoadOptions
from openpi_ar.errors import UserError
from openpi_ar.model_config import PaliGemmaConfig
from openpi_ar.textfile import whole_number

Column = Literal["ours", "openpi", "torch"]

# What PyTorch puts before the names inside a wrapped module: torch.compile, DDP and DataParallel, DeepSpeed, FSDP,
# activation checkpointing.
_WRAPPERS = re.compile(
    r"(?:(?<=\.)|^)(?:_orig_mod|module|_forward_module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
Sizes = dict[str, int]
"""Size of each axis letter of a family's table; `L` and `l` are the numbers of layers."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor.

    ours      path of the parameter (`params.flatten`).
    openpi    path in openpi's tree.
    layout    axes of ours, per layer.
    torch     names of the PyTorch tensors: two if our leading axis `c` is two tensors there; none if there is none.
    to_torch  axes of each of them.
    lead      openpi's array has an axis of size 1 before ours.
    """

    ours: str
    openpi: str
    layout: str
    torch: tuple[str, ...] = ()
    to_torch: str = ""
    lead: bool = False

    @property
    def layers(self) -> str:
        """The axis of layers: `l` (vision), `L` (towers), "" for a tensor outside the layers."""
        if "/layers/" not in self.ours:
            return ""
        return "l" if self.ours.startswith("img/") else "L"

    @property
    def part_layout(self) -> str:
        """Axes of ours that one PyTorch tensor holds."""
        return self.layout.removeprefix("c ") if len(self.torch) == 2 else self.layout

    def names(self, column: Column) -> tuple[str, ...]:
        """Names of the tensors that hold this parameter in a column of the table."""
        return self.torch if column == "torch" else (getattr(self, column),)

    def stored_layout(self, column: Column) -> str:
        """Axes of each of them."""
        if column == "torch":
            return self.to_torch
        lead = "1 " if self.lead and column == "openpi" else ""
        return " ".join(x for x in (self.layers, lead + self.layout) if x)

    def part_axes(self, sizes: Mapping[str, int]) -> Sizes:
        """Sizes of the axes of `part_layout`, for einops."""
        return {axis: sizes[axis.rstrip("12")] for axis in re.findall(r"\w+", self.part_layout)}


@dataclasses.dataclass(frozen=True)
class Writer:
    """A program that writes checkpoints of a family.

    kind     what it is called.
    column   the column of the table that its names are in.
    prefix   pattern at the start of a name that only this one writes.
    setting  key of a config.json that only this one writes.
    """

    kind: str
    column: Column
    prefix: str = ""
    setting: str = ""

    def wrote(self, names: list[str], settings: Mapping[str, Any]) -> bool:
        """Whether these names and config.json are of this program, as far as they tell."""
        return any(re.match(self.prefix, _WRAPPERS.sub("", name)) for name in names) and (
            not self.setting or self.setting in settings
        )


@dataclasses.dataclass(frozen=True)
class Family:
    """Everything that is special to the checkpoints of one kind of model.

    title    what it is called in messages.
    config   its type of configuration.
    rows     the name table.
    writers  who writes such checkpoints; the first that fits a checkpoint is its writer.
    fixed    axes whose size never varies.
    public   {option of LoadOptions: (axis, size)} of axes that no PyTorch tensor tells: the public models' sizes.
    needs    (pattern of parameters, what to say of a checkpoint that holds none of them).
    position_embedding, token_embedding   paths of what is resampled to other image sizes, and of the vocabulary.
    tied     (name, other name) of one PyTorch matrix; where a file has both, the first is read.
    formats  formats that it is written in; of those of PyTorch, which of the tied names have the matrix.
    ignored  (pattern of a whole PyTorch name, reason) of tensors that may be there and are not read.
    renames  (pattern at the start of a name, replacement): the first that matches makes it one of the table's.
    build    (paths found, sizes, overrides, base) -> configuration; raises ValueError, also if a size is missing.
    sizes    configuration -> size of every axis.
    padding  tensors that its PyTorch files have and nothing reads: configuration -> {name: shape}.
    torch_settings  (configuration, dtype) -> body of the config.json beside its file of PyTorch tensors.
    told     body of the config.json beside the tensors -> (what it says of what they do not tell, base of `build`).
    """

    title: str
    config: type[PaliGemmaConfig]
    rows: tuple[Row, ...]
    writers: tuple[Writer, ...]
    fixed: Mapping[str, int]
    public: Mapping[str, tuple[str, int]]
    needs: tuple[tuple[str, str], ...]
    position_embedding: str
    token_embedding: str
    tied: tuple[str, str]
    formats: Mapping[Format, tuple[str, ...]]
    ignored: tuple[tuple[str, str], ...]
    renames: tuple[tuple[str, str], ...]
    build: Callable[[set[str], Sizes, Mapping[str, Any], Any], Any]
    sizes: Callable[[Any], Sizes]
    padding: Callable[[Any], dict[str, tuple[int, ...]]]
    torch_settings: Callable[[Any, str], dict[str, Any]]
    told: Callable[[Mapping[str, Any]], tuple[LoadOptions, PaliGemmaConfig | None]]

    @functools.cached_property
    def by_path(self) -> dict[str, Row]:
        """Rows by our path."""
        return {row.ours: row for row in self.rows}

    def canonical(self, name: str) -> str:
        """A stored tensor's name as the table has it."""
        name = _WRAPPERS.sub("", name)
        for pattern, replacement in self.renames:
            if re.match(pattern, name):
                return re.sub(f"^{pattern}", replacement, name)
        return name


def number(settings: Mapping[str, Any], *keys: str) -> int | None:
    """The positive whole number that a config.json has under the first of these keys that it has. Raises UserError."""
    key = next((key for key in keys if settings.get(key) is not None), None)
    return None if key is None else whole_number(settings, key, "config.json", 1)


def image_size(settings: Mapping[str, Any], key: str) -> tuple[int, int] | None:
    """Height and width under a key of a config.json: a list, or one number for both. Raises UserError."""
    size = settings.get(key)
    sides = [n for n in (size if isinstance(size, list) else [size, size]) if type(n) is int and 0 < n < 1 << 16]
    if size is None:
        return None
    if len(sides) != 2:
        raise UserError(f"config.json: {key} must be [height, width], found {size!r:.80}")
    return sides[0], sides[1]


def expected_shape(layout: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Shape of a layout; an axis of unknown size counts as 0."""
    shape = []
    for group in groups(layout):
        size = 1
        for axis in axes(group):
            size *= sizes.get(axis, 0) if axis != "1" else 1
        shape.append(size)
    return tuple(shape)


def groups(layout: str) -> list[str]:
    """Entries of a layout, one for each axis of the stored array: `(N H) D` -> `(N H)`, `D`."""
    return re.findall(r"\([^)]*\)|\S+", layout)


def axes(layout: str) -> list[str]:
    """Axis letters of a layout; `E1` and `E2` are both `E`."""
    return ["1" if x == "1" else x.rstrip("12") for x in re.findall(r"\w+", layout)]
