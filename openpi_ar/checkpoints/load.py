"""A model from any public checkpoint, without being told what it is.

    openpi's JAX parameters (orbax, with and without nnx's `value` level), our own checkpoints, `model.safetensors` of
    openpi's PyTorch port and of LeRobot (one file or shards), PaliGemma's `.npz`

Tensors are read one at a time, largest first, converted and placed on the device: the host never holds two copies.
"""

import dataclasses
from pathlib import Path
from typing import Any
import warnings

from einops import rearrange
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from openpi_ar import config_json
from openpi_ar.checkpoints import infer_config, names, remote, store
from openpi_ar.checkpoints.infer_config import Sizes, Stored
from openpi_ar.checkpoints.sources import Source, open_source
from openpi_ar.config import ModelConfig
from openpi_ar.errors import UserError
from openpi_ar.models.pi0 import Pi0
from openpi_ar.models.vit import resample_pos_embedding
from openpi_ar.params import flatten, with_leaves

PUBLIC_SIGLIP_HEADS = 16
PUBLIC_KV_HEADS = 1
PUBLIC_HORIZON = 50
_QUIET_BYTES = 200 << 20
"""Checkpoints smaller than this load without a progress bar."""

_all_finite = jax.jit(lambda a: jnp.isfinite(a).all())


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model and what it came from.

    kind   "ours", "openpi", "torch", "lerobot" or "paligemma".
    path   local file or directory.
    notes  what a user should know: ignored tensors, dimensions that no tensor tells, parameters left at their init.
    """

    model: Pi0
    config: ModelConfig
    kind: str
    path: Path
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Inspected:
    """What a checkpoint is, from its headers alone: see `inspect`."""

    source: Source
    config: ModelConfig
    found: list[Stored]
    sizes: Sizes
    notes: tuple[str, ...]


def inspect(
    path: str | Path,
    *,
    image_size: tuple[int, int] | None = None,
    action_horizon: int | None = None,
    siglip_heads: int | None = None,
    num_kv_heads: int | None = None,
    cameras: tuple[str, ...] | None = None,
    compute_dtype: str | None = None,
) -> Inspected:
    """The model that a checkpoint holds; reads headers, no tensor. Arguments and errors: see `load_model`."""
    local = remote.local_copy(path)
    folder = store.resolve_step_dir(local) if local.is_dir() else local
    source = open_source(folder)
    hints = _hints(folder)
    found, left, ignored = infer_config.match(source)
    given = {
        "n": siglip_heads or hints.get("siglip_heads") or PUBLIC_SIGLIP_HEADS,
        "K": num_kv_heads or hints.get("num_kv_heads") or PUBLIC_KV_HEADS,
    }
    notes = list(ignored)
    if source.layout == "torch":
        for option, axis in (("siglip_heads", "n"), ("num_kv_heads", "K")):
            if not {"siglip_heads": siglip_heads, "num_kv_heads": num_kv_heads}[option] and option not in hints:
                notes.append(f"{option} {given[axis]}: no tensor tells it, the public models' value is taken")
    sizes, clashes = infer_config.solve(source, found, given)
    if source.layout != "ours" and len(left) > len(source.specs) // 2:
        raise UserError(
            f"{source.path} holds another model: {len(left)} of its {len(source.specs)} tensors are unknown to pi0, pi0.5 "
            f"and PaliGemma ({', '.join(sorted(left)[:4])}, ...)"
        )
    image_size = image_size or hints.get("image_size")
    overrides: dict[str, Any] = {"image_size": image_size} if image_size else {}
    base: ModelConfig | None = hints.get("base")
    if base is None:
        overrides["exact_time"] = source.layout == "torch"
    horizon = action_horizon or hints.get("action_horizon")
    if horizon is None:
        notes.append(f"action_horizon {PUBLIC_HORIZON}: no tensor tells it, the base models' value is taken")
    overrides["action_horizon"] = horizon or PUBLIC_HORIZON
    if cameras or hints.get("cameras"):
        overrides["cameras"] = cameras or hints["cameras"]
    if compute_dtype or base is None:
        # bfloat16 matrix-vector products are 10 to 20 times slower than float32 on CPUs.
        overrides["dtype"] = compute_dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    try:
        config = infer_config.model_config(source, found, sizes, overrides, base)
    except ValueError as e:
        raise UserError(
            f"{source.path}: the tensors' shapes make no model: {e}; siglip_heads and num_kv_heads can be given"
        ) from e
    problems = [f"{name}: no tensor of the model" for name in left] + clashes
    problems += _coverage(source, config, found, sizes)
    if problems:
        raise UserError(f"{source.path} does not fit the model it seems to hold: {'; '.join(problems)}")
    return Inspected(source, config, found, sizes, tuple(notes))


def load_model(
    path: str | Path,
    *,
    dtype: str | None = None,
    image_size: tuple[int, int] | None = None,
    action_horizon: int | None = None,
    siglip_heads: int | None = None,
    num_kv_heads: int | None = None,
    cameras: tuple[str, ...] | None = None,
    compute_dtype: str | None = None,
    progress: bool = True,
) -> Loaded:
    """Recognises and loads a checkpoint; layers stacked.

    Args:
        path: directory, file, `gs://`, `https://`, `hf://` address or hub id (`lerobot/pi05_base`).
        dtype: of the parameters in memory, "float32" or "bfloat16"; None as stored.
        image_size: height and width the model is to see; its position embedding is resampled where it was another one.
        action_horizon: actions of a chunk; None: what the checkpoint's config.json says, else 50.
        siglip_heads: for PyTorch files, whose shapes do not tell; None: config.json, else 16.
        num_kv_heads: the same for the towers; None: config.json, else 1.
        cameras: names of the cameras in the model's order; None: what the checkpoint says, else openpi's three.
        compute_dtype: "float32" or "bfloat16"; None: float32 on CPU, else bfloat16.
        progress: show a bar for large files.

    Raises:
        UserError: no checkpoint that is known, or one that does not fit: all missing, unknown and misshapen tensors at once.
    """
    looked = inspect(
        path,
        image_size=image_size,
        action_horizon=action_horizon,
        siglip_heads=siglip_heads,
        num_kv_heads=num_kv_heads,
        cameras=cameras,
        compute_dtype=compute_dtype,
    )
    source, cfg = looked.source, looked.config
    notes = list(looked.notes)
    abstract = nnx.eval_shape(lambda: Pi0(cfg, rngs=nnx.Rngs(0)))
    flat = flatten(abstract)
    by_row: dict[str, list[Stored]] = {}
    for item in looked.found:
        by_row.setdefault(item.row.ours, []).append(item)
    rows = {row.ours: row for row in names.TABLE}
    done: dict[str, jax.Array] = {}
    # Largest first: while it is converted, nothing else is in memory yet.
    order = sorted(by_row, key=lambda path: -int(np.prod(flat[path].shape)))
    total = sum(source.specs[item.name].nbytes for item in looked.found)
    columns = (TextColumn("loading"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not progress or total < _QUIET_BYTES) as bar:
        task = bar.add_task("loading", total=total)
        for ours in order:
            array = _assemble(source, by_row[ours], looked.sizes, dtype, lambda n: bar.advance(task, n))
            if ours == "img/pos_embedding" and array.shape != flat[ours].shape:
                side = int(array.shape[0] ** 0.5)
                old = (side, side)
                array = resample_pos_embedding(array.astype(np.float32), old, cfg.siglip.grid).astype(array.dtype)
                notes.append(f"position embedding resampled from {old} to {cfg.siglip.grid} patches")
            done[ours] = jax.block_until_ready(jax.device_put(array))
            if not bool(_all_finite(done[ours])):
                warnings.warn(f"{source.path}: {rows[ours].openpi} holds values that are not finite", stacklevel=2)
            del array
    if missing := [path for path in flat if path not in done]:
        notes.append(f"{len(missing)} parameters are not in the file and keep their random init: {', '.join(missing)}")
        done |= _fresh(cfg, missing, dtype)
    model = with_leaves(abstract, done)
    return Loaded(model, cfg, source.kind, source.path, tuple(notes))


def _fresh(cfg: ModelConfig, paths: list[str], dtype: str | None) -> dict[str, jax.Array]:
    """Initial values of some parameters; the others are never computed."""

    def init() -> dict[str, jax.Array]:
        flat = flatten(Pi0(cfg, rngs=nnx.Rngs(0)))
        return {path: jnp.asarray(flat[path], dtype and jnp.dtype(dtype)) for path in paths}

    return jax.jit(init)()


def _assemble(source: Source, items: list[Stored], sizes: Sizes, dtype: str | None, advance: Any) -> np.ndarray:
    """Our array of one row: layers stacked, in the target type."""
    row = items[0].row
    if source.layout != "torch":
        array = source.read(items[0].name)
        advance(source.specs[items[0].name].nbytes)
        array = array.reshape(array.shape[1:]) if row.lead and source.layout == "openpi" else array
        return array if dtype is None else array.astype(np.dtype(dtype), copy=False)
    target = np.dtype(dtype) if dtype else np.result_type(*{source.specs[item.name].dtype for item in items})
    shape = infer_config.expected_shape(" ".join(x for x in (row.layers, row.layout) if x), sizes)
    out = np.empty(shape, target)
    axes = set(row.part_layout.replace("(", " ").replace(")", " ").split())
    used = {axis: sizes[axis.rstrip("12")] for axis in axes}
    for item in items:
        place = tuple(i for i in (item.layer, item.part) if i is not None)
        out[place] = rearrange(source.read(item.name), f"{row.to_torch} -> {row.part_layout}", **used)
        advance(source.specs[item.name].nbytes)
    return out


def _coverage(source: Source, cfg: ModelConfig, found: list[Stored], sizes: Sizes) -> list[str]:
    """What the model needs and the source lacks, and what is there that this model has no use for."""
    abstract = nnx.eval_shape(lambda: Pi0(cfg, rngs=nnx.Rngs(0)))
    needed = set(flatten(abstract))
    rows = {row.ours: row for row in names.TABLE}
    problems = [f"{path}: no row of the name table" for path in needed if path not in rows]
    have: dict[str, int] = {}
    for item in found:
        have[item.row.ours] = have.get(item.row.ours, 0) + 1
        if item.row.ours not in needed:
            problems.append(f"{item.name}: no tensor of this model")
    for path in sorted(needed & set(rows)):
        row = rows[path]
        parts, layers = (len(row.torch), sizes[row.layers] if row.layers else 1) if source.layout == "torch" else (1, 1)
        name = {"ours": row.ours, "openpi": row.openpi, "torch": " ".join(row.torch)}[source.layout]
        is_vlm = path.startswith(("img/", "embedder/", "vlm/"))
        if source.kind == "paligemma" and not is_vlm:
            continue
        if have.get(path, 0) < parts * layers:
            problems.append(
                f"{name}: missing" + (f" ({have.get(path, 0)} of {parts * layers})" if parts * layers > 1 else "")
            )
    return problems


def _hints(folder: Path) -> dict[str, Any]:
    """What shapes do not tell, from the configuration files beside the tensors: ours, openpi's or LeRobot's."""
    folder = folder if folder.is_dir() else folder.parent
    ours = folder / "assets" / store.CONFIG
    if ours.is_file():
        cfg = config_json.loads(ours.read_text(), source=str(ours)).model
        return {"base": cfg, "action_horizon": cfg.action_horizon, "image_size": cfg.siglip.image_size}
    path = folder / "config.json"
    if not path.is_file():
        return {}
    body = config_json.read_object(path)
    known = {
        "action_horizon": body.get("action_horizon", body.get("chunk_size")),
        "siglip_heads": body.get("siglip_heads"),
        "num_kv_heads": body.get("num_kv_heads"),
    }
    # LeRobot lists the cameras in the order in which its policy stacks them.
    inputs = body.get("input_features")
    if isinstance(inputs, dict):
        visual = [k for k, v in inputs.items() if isinstance(v, dict) and v.get("type") == "VISUAL"]
        known["cameras"] = tuple(k.removeprefix("observation.images.") for k in visual) or None
    return {key: value for key, value in known.items() if value is not None}
