"""Where arrays live: one mesh of `data` x `fsdp` devices, and a table from parameter paths to logical axes to mesh
axes.

    batch rows      over all devices, so every device computes on its own share
    parameters,     cut into `fsdp` pieces along the axis that the table calls `cut`, and whole on each of the `data`
    optimizer, EMA  replicas; XLA gathers a layer when it is used and scatters its gradient (ZeRO-3)

Modules know nothing of this: each family of models has a table (`sharding_paligemma.py`, `sharding_pi0.py`). A
parameter that no row of it names is an error: a forgotten one would silently be whole on every device.
"""

import dataclasses
from fnmatch import fnmatchcase
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from openpi_ar.compilation import attention_on
from openpi_ar.config import TrainConfig
from openpi_ar.errors import UserError
from openpi_ar.model_config import ModelConfig, PaliGemmaConfig
from openpi_ar.params import leaf_paths
from openpi_ar.training.sharding_paligemma import PALIGEMMA
from openpi_ar.training.sharding_pi0 import PI0

MESH_AXES: dict[str, tuple[str, ...] | None] = {"rows": ("data", "fsdp"), "cut": ("fsdp",), "-": None}
"""Logical axes -> mesh axes."""

Table = tuple[tuple[str, str], ...]
"""(pattern of parameter paths, logical axis of each array axis, or `whole`); the first row that matches decides.
Patterns begin with `*`: a moment's path is that of its parameter behind a prefix."""

TABLES: dict[type[PaliGemmaConfig], Table] = {PaliGemmaConfig: PALIGEMMA, ModelConfig: PI0}
"""The table of each family of models, by its type of configuration."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh, the table that says how parameters lie on it, and the two shardings that everything else has."""

    mesh: Mesh | AbstractMesh
    table: Table

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def batch(self) -> NamedSharding:
        """Rows over all devices."""
        return NamedSharding(self.mesh, PartitionSpec(MESH_AXES["rows"]))

    @property
    def devices(self) -> int:
        return self.mesh.size

    @property
    def fsdp(self) -> int:
        """Pieces that parameters are cut into."""
        return self.mesh.shape["fsdp"]


def make_placement(cfg: TrainConfig) -> Placement:
    """Placement over all devices of all processes; `cfg.fsdp_devices` of them share one copy of the parameters.

    Raises UserError if devices do not divide into such groups, or the batch among devices, for pieces of parameters on
    the CPUs of several processes, and where the devices have no kernel for `model.attention`.
    """
    attention_on(cfg.model.attention, cfg.model.dtype)
    devices, fsdp = jax.device_count(), cfg.fsdp_devices
    if fsdp < 1 or devices % fsdp:
        raise UserError(
            f"fsdp_devices {fsdp} does not divide the {devices} devices: use one of "
            f"{', '.join(str(n) for n in range(1, devices + 1) if devices % n == 0)}"
        )
    if fsdp > 1 and jax.process_count() > 1 and jax.default_backend() == "cpu":
        # Seen with jaxlib 0.10.2: gathers of different size that one step has under way at once take each other's data,
        # since XLA gives all of them one tag. One thread (NPROC=1) ends in a standstill, 64 fail at once.
        raise UserError(
            f"fsdp_devices is {fsdp}, but gloo, which joins the CPUs of several processes, mixes up the gathers of "
            f"such a step: use 1 (GPUs and TPUs have collectives of their own)"
        )
    slices = cfg.optimizer.accumulate
    if cfg.batch_size % (devices * slices):
        raise UserError(
            f"batch_size {cfg.batch_size} does not divide among {devices} devices"
            + (f" in {slices} slices" if slices > 1 else "")
            + ": use a multiple of it"
        )
    mesh = jax.make_mesh((devices // fsdp, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    return Placement(mesh, TABLES[type(cfg.model)])


def spec(table: Table, path: str, shape: tuple[int, ...], fsdp: int) -> PartitionSpec | None:
    """How a parameter is cut; None if no row names its path. What does not divide into `fsdp` pieces stays whole."""
    for pattern, axes in table:
        if not fnmatchcase(path, pattern):
            continue
        names = axes.split()
        if axes == "whole" or len(names) != len(shape):
            return PartitionSpec() if axes == "whole" else None
        fits = fsdp > 1 and all(name == "-" or size % fsdp == 0 for name, size in zip(names, shape, strict=True))
        return PartitionSpec(*(MESH_AXES[name] for name in names)) if fits else PartitionSpec()
    return None


def shardings(tree: Any, placement: Placement) -> Any:
    """A sharding for each leaf of a model or train state (abstract or concrete); scalars are replicated.

    Moments and averages are named by the parameter they belong to. Raises UserError listing every leaf that no row
    names, or whose row has another number of axes.
    """
    leaves, structure = jax.tree.flatten(tree)
    found, unnamed = [], []
    for path, leaf in zip(leaf_paths(tree), leaves, strict=True):
        where = PartitionSpec() if leaf.ndim == 0 else spec(placement.table, path, leaf.shape, placement.fsdp)
        if where is None:
            unnamed.append(f"{path} {list(leaf.shape)}")
        found.append(NamedSharding(placement.mesh, PartitionSpec() if where is None else where))
    if unnamed:
        raise UserError(
            f"no row of the sharding table names {', '.join(unnamed)}: add one to it, in openpi_ar/training/, that "
            f"says which axis is cut"
        )
    return jax.tree.unflatten(structure, found)


def nbytes(table: Table, tree: Any, fsdp: int = 1) -> int:
    """Bytes that one of `fsdp` devices holds of a model, train state or part of one (abstract or concrete)."""
    total = 0
    for path, leaf in zip(leaf_paths(tree), jax.tree.leaves(tree), strict=True):
        where = spec(table, path, leaf.shape, fsdp) if leaf.ndim else None
        total += leaf.size * leaf.dtype.itemsize // (fsdp if where else 1)
    return total
