"""Which family's tensors a source holds, and what size their axes have."""

from collections import Counter
from collections.abc import Iterator, Sequence
import dataclasses
import re
from typing import NamedTuple

from openpi_ar.checkpoints.family import Column, Family, Row, Sizes, Writer, axes, expected_shape, groups
from openpi_ar.checkpoints.sources import Source
from openpi_ar.errors import UserError


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor of the source that a row of the table names.

    raw          its name in the source; `name` is that of the table, with the layer's number.
    layer, part  index on our axes of layers and of parts; None where one array holds all.
    """

    row: Row
    raw: str
    name: str
    layer: int | None = None
    part: int | None = None


@dataclasses.dataclass(frozen=True)
class Matched:
    """A source by the names of one column of a family's table.

    found    tensors that rows name.
    left     names that no row knows.
    ignored  names that are known and not read, each with the reason.
    """

    source: Source
    family: Family
    column: Column
    found: list[Stored]
    left: list[str]
    ignored: list[str]

    @property
    def writer(self) -> Writer:
        """The program that wrote the source."""
        names, settings = list(self.source.specs), self.source.settings
        return next(w for w in self.family.writers if w.column == self.column and w.wrote(names, settings))

    def shape(self, item: Stored) -> tuple[int, ...]:
        """Shape of a tensor as it is stored."""
        return self.source.specs[item.raw].shape


def recognise(source: Source, families: Sequence[Family]) -> Matched:
    """The source by the names of the table that knows most of them.

    Raises UserError if no table knows half of them, or two tensors are the same parameter.
    """
    tried = [match(source, family, column) for family in families for column in source.columns]
    best = max(tried, key=lambda m: len(m.found))
    if adapters := [name for name in best.left if re.search(r"\.lora_[AB](\.|$)", name)]:
        raise UserError(
            f"{source.path} holds PEFT adapters that are not merged ({adapters[0]}, ...): merge them first "
            "(`model.merge_and_unload().save_pretrained(DIR)`) and give DIR"
        )
    if len(best.left) > len(source.specs) // 2:
        known = "; ".join(family.title for family in families)
        policy, count = source.settings.get("type"), f"{len(best.left)} of its {len(source.specs)}"
        raise UserError(
            f"{source.path} holds another model{f', {policy}' if policy else ''}: {count} tensors are unknown to"
            f" {known} ({', '.join(sorted(best.left)[:4])}, ...)"
        )
    seen: dict[str, str] = {}
    twice = [f"{seen[i.name]} and {i.raw}" for i in best.found if seen.setdefault(i.name, i.raw) != i.raw]
    if twice:
        raise UserError(f"{source.path} holds the same parameter twice: {'; '.join(twice)}")
    return best


def match(source: Source, family: Family, column: Column) -> Matched:
    """The source's tensors by the names of one column of a table."""
    known = {name: (row, i) for row in family.rows for i, name in enumerate(row.names(column))}
    out = Matched(source, family, column, [], [], [])
    names = {family.canonical(raw) for raw in source.specs}
    for raw in source.specs:
        name = family.canonical(raw)
        if column == "torch" and name == family.tied[1]:
            if family.tied[0] in names:
                out.ignored.append(f"{name}: the same matrix as {family.tied[0]}, which is read")
                continue
            name = family.tied[0]
        number = re.search(r"\.layers\.(\d+)\.", name) if column == "torch" else None
        template = name if number is None else f"{name[: number.start(1)]}{{}}{name[number.end(1) :]}"
        if template in known:
            row, part = known[template]
            layer = None if number is None else int(number[1])
            out.found.append(Stored(row, raw, name, layer, part if len(row.names(column)) > 1 else None))
        elif column == "torch" and (reason := _reason(family, name)):
            out.ignored.append(f"{raw}: {reason}")
        else:
            out.left.append(name)
    return out


def _reason(family: Family, name: str) -> str | None:
    return next((why for pattern, why in family.ignored if re.fullmatch(pattern, name)), None)


def solve(m: Matched, given: Sizes) -> Sizes:
    """Size of every axis.

    Where tensors disagree on an axis the majority is right, so that one wrong tensor is one complaint. Products such as
    heads x head dim, which PyTorch stores as one axis, are divided by what is known: `given`, or other tensors.
    """
    votes: dict[str, Counter[int]] = {}
    for group, size in _stored_axes(m):
        if len(group) == 1 and group[0] not in m.family.fixed:
            votes.setdefault(group[0], Counter())[size] += 1
    sizes = dict(m.family.fixed) | _winners(votes)
    if m.column == "torch":
        for axis in ("L", "l"):
            sizes[axis] = max((i.layer + 1 for i in m.found if i.row.layers == axis and i.layer is not None), default=0)
    sizes = given | sizes
    for _ in range(2):  # `K H` gives H, then `N H` gives N
        votes = {}
        for group, size in _stored_axes(m):
            unknown = [axis for axis in group if axis not in sizes]
            known = 1
            for axis in group:
                known *= sizes.get(axis, 1)
            if len(unknown) == 1 and size % known == 0:
                votes.setdefault(unknown[0], Counter())[size // known] += 1
        sizes |= _winners(votes)
    return sizes


class Shape(NamedTuple):
    """Stands for an array whose shape is all that counts."""

    shape: tuple[int, ...]


def expected(m: Matched, sizes: Sizes, paths: set[str]) -> dict[str, Shape]:
    """Names in the table's column, and shapes, of the tensors that hold these parameters."""
    out = {}
    for row in m.family.rows:
        if row.ours in paths:
            shape = Shape(expected_shape(row.stored_layout(m.column), sizes))
            layers = range(sizes[row.layers]) if m.column == "torch" and row.layers else range(1)
            out |= {name.format(i): shape for name in row.names(m.column) for i in layers}
    return out


def _winners(votes: dict[str, Counter[int]]) -> Sizes:
    return {axis: count.most_common(1)[0][0] for axis, count in votes.items()}


def _stored_axes(m: Matched) -> Iterator[tuple[list[str], int]]:
    for item in m.found:
        layout, shape = groups(item.row.stored_layout(m.column)), m.shape(item)
        if len(layout) == len(shape):
            yield from ((axes(group), size) for group, size in zip(layout, shape, strict=True))
