"""A model from any public checkpoint, without being told what it is.

    openpi's JAX parameters (orbax, with and without nnx's `value` level), our own checkpoints, `model.safetensors` of
    openpi's PyTorch port, of LeRobot and of PaliGemma (one file or shards), big_vision's `.npz` of PaliGemma

Tensors are read one at a time, largest first, converted and placed on the device: the host never holds two copies.
"""

from collections.abc import Callable
import dataclasses
from pathlib import Path
import re
from typing import Any
import warnings

from einops import rearrange
import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from openpi_ar import config_json
from openpi_ar.checkpoints import match, paligemma, pi0, remote, store
from openpi_ar.checkpoints.family import Family, Sizes, expected_shape
from openpi_ar.checkpoints.match import Matched, Shape, Stored
from openpi_ar.checkpoints.options import AS_IT_IS, Dtype, LoadOptions
from openpi_ar.checkpoints.sources import Source, open_source, root_of
from openpi_ar.errors import UserError
from openpi_ar.model_config import ModelConfig, PaliGemmaConfig, portable
from openpi_ar.models import family
from openpi_ar.models.vit import resample_pos_embedding
from openpi_ar.models.vlm import VLA, VLM
from openpi_ar.params import flatten, misfits, with_leaves

# Of two tables that know equally many names, the first is taken: the one of the smaller model.
FAMILIES: tuple[Family, ...] = (paligemma.FAMILY, pi0.FAMILY)
PUBLIC_HORIZON = 50
_QUIET_BYTES = 200 << 20
"""Checkpoints smaller than this load without a progress bar."""

_all_finite = jax.jit(lambda a: jnp.isfinite(a).all())


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model and what it came from.

    kind           what wrote it: "ours", "openpi", "torch", "lerobot"; of PaliGemma "big_vision" or "transformers".
    source         the tensors, and the files beside them.
    notes          what a user should know: ignored tensors, sizes that no tensor tells.
    """

    model: VLM
    config: PaliGemmaConfig
    kind: str
    source: Source
    notes: tuple[str, ...]

    def acting(self) -> tuple[VLA, ModelConfig]:
        """Model and configuration of a model that acts. Raises UserError if it has no action tower."""
        config = _acting(self.config, self.source.path)
        assert isinstance(self.model, VLA)
        return self.model, config


@dataclasses.dataclass(frozen=True)
class Inspected:
    """What a checkpoint is, from its headers alone: see `inspect`.

    tells_horizon  the options or the checkpoint's files say how many actions a chunk has.
    grid           of the stored position embedding, in patches.
    dtype          of the parameters that are wanted; None: as stored.
    """

    matched: Matched
    config: PaliGemmaConfig
    sizes: Sizes
    notes: tuple[str, ...]
    tells_horizon: bool
    grid: tuple[int, int]
    dtype: Dtype | None = None

    @property
    def kind(self) -> str:
        """What wrote the checkpoint."""
        return self.matched.writer.kind

    def acting(self) -> ModelConfig:
        """Configuration of a model that acts. Raises UserError if it has no action tower."""
        return _acting(self.config, self.matched.source.path)


def _acting(config: PaliGemmaConfig, path: Path) -> ModelConfig:
    if isinstance(config, ModelConfig):
        return config
    raise UserError(f"{path} has no action tower: it answers questions and cannot act")


def inspect(path: str | Path, options: LoadOptions = AS_IT_IS) -> Inspected:
    """The model that a checkpoint holds; reads headers, no tensor. Arguments and errors: see `load_model`."""
    local = remote.local_copy(path)
    folder = store.resolve_step_dir(local) if local.is_dir() else local
    source = open_source(folder)
    m = match.recognise(source, FAMILIES)
    for pattern, reason in m.family.needs:
        if not any(re.match(pattern, item.row.ours) for item in m.found):
            raise UserError(f"{source.path} {reason}")
    told, base = m.family.told(source.settings)
    own = root_of(source.path) / "assets" / store.CONFIG
    ours = config_json.read(own).model if own.is_file() else None
    if ours is not None and type(ours) is m.family.config:
        told, base = told.over(_of_config(ours)), portable(ours)
    known = options.over(told)
    notes = list(m.ignored)
    given = {axis: getattr(known, option) or size for option, (axis, size) in m.family.public.items()}
    if m.column == "torch":
        for option, (axis, _) in m.family.public.items():
            if getattr(known, option) is None:
                notes.append(f"{option} {given[axis]}: no tensor tells it, the public models' value is taken")
    fields = _overrides(known, m, ours is None)
    if "action_horizon" in fields and known.action_horizon is None:
        notes.append(f"action_horizon {PUBLIC_HORIZON}: no tensor tells it, the base models' value is taken")
    if issubclass(m.family.config, ModelConfig) and known.cameras is None:
        notes.append(f"cameras {', '.join(m.family.config().cameras)}: no file names them, openpi's are taken")
    sizes = match.solve(m, given)
    try:
        config = m.family.build({i.row.ours for i in m.found}, sizes, fields, base)
        grid = _grid(sizes, config, told.image_size)
    except ValueError as e:
        options_given = ", ".join(m.family.public)
        raise UserError(f"{source.path} makes no model: {e}; {options_given} and image_size can be given") from e
    if problems := _misfits(m, config, sizes):
        raise UserError(f"{source.path} does not fit the model it seems to hold: {'; '.join(problems)}")
    return Inspected(m, config, sizes, tuple(notes), known.action_horizon is not None, grid, options.dtype)


def load_model(path: str | Path, options: LoadOptions = AS_IT_IS, *, progress: bool = True) -> Loaded:
    """Recognises and loads a checkpoint; layers stacked.

    Args:
        path: directory, file, `gs://`, `https://`, `hf://` address or hub id (`lerobot/pi05_base`).
        options: what no tensor tells, and what is wanted.
        progress: show a bar for large files.

    Raises:
        UserError: no checkpoint that is known, or one that does not fit: all missing, unknown and misshapen tensors at
            once.
    """
    return read(inspect(path, options), progress=progress)


def read(looked: Inspected, *, progress: bool = True) -> Loaded:
    """The parameters of a checkpoint that was inspected. Raises UserError if its files are damaged."""
    m, cfg, notes = looked.matched, looked.config, list(looked.notes)
    abstract = family.abstract(cfg)
    want = flatten(abstract)
    items: dict[str, list[Stored]] = {}
    for item in m.found:
        items.setdefault(item.row.ours, []).append(item)
    done: dict[str, jax.Array] = {}
    total = sum(m.source.specs[item.raw].nbytes for item in m.found)
    columns = (TextColumn("loading"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not progress or total < _QUIET_BYTES) as bar:
        task = bar.add_task("loading", total=total)
        # Largest first: while it is converted, nothing else is in memory yet.
        for ours in sorted(items, key=lambda path: -int(np.prod(want[path].shape))):
            array = _assemble(m, items[ours], looked.sizes, looked.dtype, lambda n: bar.advance(task, n))
            if ours == m.family.position_embedding and looked.grid != cfg.siglip.grid:
                old, new = looked.grid, cfg.siglip.grid
                array = resample_pos_embedding(array.astype(np.float32), old, new).astype(array.dtype)
                notes.append(f"position embedding resampled from {old} to {new} patches")
            done[ours] = jax.block_until_ready(jax.device_put(array))
            if not bool(_all_finite(done[ours])):
                name = items[ours][0].row.openpi
                warnings.warn(f"{m.source.path}: {name} holds values that are not finite", stacklevel=2)
            del array
    return Loaded(with_leaves(abstract, done), cfg, looked.kind, m.source, tuple(notes))


def _overrides(known: LoadOptions, m: Matched, foreign: bool) -> dict[str, Any]:
    """Fields of the configuration that shapes do not tell, and `image_size`."""
    fields: dict[str, Any] = {"action_horizon": known.action_horizon or PUBLIC_HORIZON}
    if known.image_size:
        fields["image_size"] = known.image_size
    if known.cameras:
        fields["cameras"] = known.cameras
    if foreign:
        fields["exact_time"] = m.column == "torch"
    if known.compute_dtype or foreign:
        # bfloat16 matrix-vector products are 10 to 20 times slower than float32 on CPUs.
        fields["dtype"] = known.compute_dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    return {name: value for name, value in fields.items() if name == "image_size" or hasattr(m.family.config, name)}


def _grid(sizes: Sizes, cfg: PaliGemmaConfig, told: tuple[int, int] | None) -> tuple[int, int]:
    """Height and width in patches of the stored position embedding.

    It is that of the model if that one has as many patches, else of the image size that the files tell, else square.
    Raises ValueError if it is none of them.
    """
    stored, patch = sizes["T"], sizes["p"]
    side = int(stored**0.5)
    of_files = (told[0] // patch, told[1] // patch) if told else (side, side)
    for grid in (cfg.siglip.grid, of_files, (side, side)):
        if grid[0] * grid[1] == stored:
            return grid
    raise ValueError(f"{stored} position embeddings are no square grid, so they cannot be resampled")


def _assemble(
    m: Matched, items: list[Stored], sizes: Sizes, dtype: str | None, advance: Callable[[int], None]
) -> np.ndarray:
    """Our array of one row: layers stacked, in the target type."""
    row, specs = items[0].row, m.source.specs
    if m.column != "torch":
        array = m.source.read(items[0].raw)
        advance(specs[items[0].raw].nbytes)
        array = array.reshape(array.shape[1:]) if row.lead and m.column == "openpi" else array
        return array if dtype is None else array.astype(np.dtype(dtype), copy=False)
    target = np.dtype(dtype) if dtype else np.dtype(jnp.result_type(*(specs[item.raw].dtype for item in items)))
    out = np.empty(expected_shape(row.stored_layout("ours"), sizes), target)
    used = row.part_axes(sizes)
    for item in items:
        place = tuple(i for i in (item.layer, item.part) if i is not None)
        out[place] = rearrange(m.source.read(item.raw), f"{row.to_torch} -> {row.part_layout}", **used)
        advance(specs[item.raw].nbytes)
    return out


def _misfits(m: Matched, cfg: PaliGemmaConfig, sizes: Sizes) -> list[str]:
    """What the model needs and the source lacks, what is there that this model has no use for, and other shapes."""
    paths = set(flatten(family.abstract(cfg)))
    unnamed = [f"{path}: no row of the name table" for path in sorted(paths - m.family.by_path.keys())]
    have = {i.name: Shape(m.shape(i)) for i in m.found} | dict.fromkeys(m.left, Shape(()))
    types = {i.name: m.source.specs[i.raw].dtype for i in m.found}
    whole = {name: t for name, t in types.items() if not jnp.issubdtype(t, jnp.floating)}
    unnamed += [f"{name}: stored as {t}, expected floating point" for name, t in whole.items()]
    return unnamed + misfits(match.expected(m, sizes, paths), have)


def _of_config(cfg: PaliGemmaConfig) -> LoadOptions:
    """What a configuration of ours says of what no tensor tells."""
    acts = {"action_horizon": cfg.action_horizon, "cameras": cfg.cameras} if isinstance(cfg, ModelConfig) else {}
    heads, kv_heads = cfg.siglip.num_heads, cfg.vlm.num_kv_heads
    return LoadOptions(image_size=cfg.siglip.image_size, siglip_heads=heads, num_kv_heads=kv_heads, **acts)
