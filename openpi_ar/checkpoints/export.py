"""Checkpoints in the formats of others: openpi's orbax tree, openpi's and LeRobot's safetensors, and our own.

Written beside the target and renamed when whole; an interrupted or failed conversion leaves nothing behind.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import json
from pathlib import Path
import shutil
from typing import Any, Literal

from einops import rearrange
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp

from openpi_ar import config_json
from openpi_ar.checkpoints import names, store
from openpi_ar.checkpoints.infer_config import expected_shape
from openpi_ar.checkpoints.load import Loaded
from openpi_ar.config import ModelConfig, TextConfig, TrainConfig
from openpi_ar.errors import UserError
from openpi_ar.files import when_whole
from openpi_ar.params import flatten, unflatten
from openpi_ar.types import Array

Format = Literal["openpi", "torch", "lerobot", "ours"]

SAFETENSORS = "model.safetensors"
_STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def convert(loaded: Loaded, target: Path, to: Format) -> None:
    """Writes a loaded model as another format, in the types that its parameters have in memory.

    Args:
        loaded: see `load.load_model`. Its assets (norm stats, tokenizer) travel along.
        target: new directory; must not exist.
        to: "openpi" (orbax, what its `restore_params` reads), "torch" (openpi's `model.safetensors`), "lerobot" or "ours".

    Raises:
        UserError: the target exists or the disk is full.
    """
    if target.exists():
        raise UserError(f"{target} exists: name a new directory, or delete this one first")
    flat = flatten(loaded.model)
    assets = assets_of(loaded.path)
    with _atomically(target) as scratch:
        if assets is not None:
            shutil.copytree(assets, scratch / "assets", ignore=shutil.ignore_patterns(store.COMMITTED, store.CONFIG))
        if to == "ours":
            _save_orbax(scratch / "params", unflatten(flat))
            _save_config(scratch / "assets", assets, loaded.config)
            (scratch / store.MARK).write_text("{}\n")
        elif to == "openpi":
            _save_orbax(scratch / "params", unflatten(to_openpi(flat)))
        else:
            save_safetensors(scratch, flat, loaded.config, to)


def to_openpi(flat: Mapping[str, Array]) -> dict[str, Array]:
    """Arrays by openpi's path."""
    rows = {row.ours: row for row in names.TABLE}
    return {rows[path].openpi: a[None] if rows[path].lead else a for path, a in flat.items()}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One PyTorch tensor to be: shape and type now, the array when it is written."""

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]


def to_torch(flat: Mapping[str, Array], cfg: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of openpi's PyTorch module. Adapters are added to the weights they belong to."""
    rows = {row.ours: row for row in names.TABLE}
    sizes = _sizes(cfg)
    for path, array in flat.items():
        row, dtype = rows[path], np.dtype(array.dtype)
        if not row.torch:
            continue
        used = {a: sizes[a.rstrip("12")] for a in row.part_layout.replace("(", " ").replace(")", " ").split()}
        shape = expected_shape(row.to_torch, sizes)
        for i in range(array.shape[0]) if row.layers else (None,):
            for part, name in enumerate(row.torch):
                place = tuple(x for x in (i, part if len(row.torch) == 2 else None) if x is not None)

                def make(path=path, place=place, row=row, used=used, dtype=dtype) -> np.ndarray:
                    one = np.asarray(flat[path][place]) + _lora_delta(path, flat, place)
                    return rearrange(one.astype(dtype), f"{row.part_layout} -> {row.to_torch}", **used)

                yield name.format(i), Tensor(shape, dtype, make)
    # Every file of the PyTorch port holds this matrix; nothing reads it.
    shape, dtype = (cfg.vocab_size, cfg.expert.width), np.dtype(flat["embedder/table"].dtype)
    yield names.EXPERT_HEAD, Tensor(shape, dtype, lambda: np.zeros(shape, dtype))


def _sizes(cfg: ModelConfig) -> dict[str, int]:
    s, v, e = cfg.siglip, cfg.vlm, cfg.expert
    head = s.width // s.num_heads
    siglip = {"w": s.width, "m": s.mlp_dim, "n": s.num_heads, "h": head, "p": s.patch_size, "T": s.num_tokens}
    towers = {"D": v.width, "F": v.mlp_dim, "E": e.width, "G": e.mlp_dim, "N": v.num_heads, "K": v.num_kv_heads}
    return (
        names.FIXED | siglip | towers | {"H": v.head_dim, "V": cfg.vocab_size, "X": cfg.action_dim, "P": cfg.state_dim}
    )


def _lora_delta(path: str, flat: Mapping[str, Array], place: tuple[int, ...]) -> np.ndarray | int:
    """What the adapters add to the entry `place` of a stacked weight, in float32; 0 without adapters."""
    stem = path.removesuffix("/w") + "/lora" if path.endswith("/w") else path + "_lora"
    if f"{stem}_a" not in flat:
        return 0
    a, b = (np.asarray(flat[f"{stem}_{x}"][place], np.float32) for x in "ab")
    if path.endswith("out/w"):
        # The output has no axis of heads, so each adapter sums over it by itself (see `layers.lora_specs`).
        b = b.sum(0, keepdims=True)
    return a @ b


def _save_orbax(folder: Path, params: Any) -> None:
    ocp.PyTreeCheckpointer().save(folder.absolute(), {"params": params})
    # orbax's marks of success name the directory they were written in; complete is what has been renamed.
    (folder / store.COMMITTED).unlink(missing_ok=True)


def _save_config(folder: Path, assets: Path | None, model: ModelConfig) -> None:
    """The run's config with this model, or, for a checkpoint that is not ours, one that says the model and no more."""
    folder.mkdir(exist_ok=True)
    own = None if assets is None else assets / store.CONFIG
    if own is not None and own.is_file():
        cfg = config_json.loads(own.read_text(), source=str(own))
    else:
        cfg = TrainConfig(name="converted", text=TextConfig(tokenizer="paligemma", template="openpi"))
    (folder / store.CONFIG).write_text(config_json.dumps(dataclasses.replace(cfg, model=model)))


def save_safetensors(folder: Path, flat: Mapping[str, Array], cfg: ModelConfig, to: Format) -> None:
    """Writes `model.safetensors` and `config.json` of openpi's PyTorch port ("torch") or of LeRobot."""
    is_half = flat["embedder/table"].dtype == ml_dtypes.bfloat16
    metadata = {"format": "pt"}
    # What shapes do not tell, for readers that are not bound to the public sizes.
    heads = {"siglip_heads": cfg.siglip.num_heads, "num_kv_heads": cfg.vlm.num_kv_heads}
    if to == "torch":
        # `safetensors.torch.save_model` keeps the first name of two tied tensors and notes the other.
        metadata[names.EMBED_TOKENS] = names.LM_HEAD
        body = {
            "action_dim": cfg.action_dim,
            "action_horizon": cfg.action_horizon,
            "paligemma_variant": "gemma_2b",
            "action_expert_variant": "gemma_300m",
            "precision": "bfloat16" if is_half else "float32",
        }
    else:
        body = _lerobot_config(cfg) | {"dtype": "bfloat16" if is_half else "float32"}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in to_torch(flat, cfg):
            if name == names.EMBED_TOKENS:
                yield (names.LM_HEAD if to == "torch" else f"model.{names.LM_HEAD}"), tensor
            if to == "lerobot":
                yield f"model.{name}", tensor
            elif name != names.EMBED_TOKENS:
                yield name, tensor

    write_safetensors(folder / SAFETENSORS, dict(tensors()), metadata)
    (folder / "config.json").write_text(json.dumps(body | heads, indent=2) + "\n")


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file, one tensor in memory at a time; the library's own writer wants all of them at once.

    Format: https://huggingface.co/docs/safetensors (8 bytes of header length, JSON header, the tensors back to back).
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    # The library's order: widest type first, so that all are aligned, then by name.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    for name in order:
        t = tensors[name]
        end = offset + int(np.prod(t.shape, dtype=np.int64)) * t.dtype.itemsize
        header[name] = {"dtype": _STORED[t.dtype.name], "shape": list(t.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            f.write(np.ascontiguousarray(tensors[name].make()).view(np.uint8).data)


def _lerobot_config(cfg: ModelConfig) -> dict[str, Any]:
    """LeRobot's policy config: what its `PI0Config` and `PI05Config` need to build the same model."""
    height, width = cfg.siglip.image_size
    images = {f"observation.images.{c}": {"type": "VISUAL", "shape": [3, height, width]} for c in cfg.cameras}
    norm = "QUANTILES" if cfg.pi05 else "MEAN_STD"
    return {
        "type": "pi05" if cfg.pi05 else "pi0",
        "input_features": images | {"observation.state": {"type": "STATE", "shape": [cfg.state_dim]}},
        "output_features": {"action": {"type": "ACTION", "shape": [cfg.action_dim]}},
        "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m",
        "dtype": "float32",
        "chunk_size": cfg.action_horizon,
        "n_action_steps": cfg.action_horizon,
        "max_state_dim": cfg.state_dim,
        "max_action_dim": cfg.action_dim,
        "image_resolution": [height, width],
        "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": norm, "ACTION": norm},
    }


def assets_of(path: Path) -> Path | None:
    """The assets directory of a checkpoint, given its params directory, step directory or file."""
    for folder in (path, path.parent):
        if (folder / "assets").is_dir():
            return folder / "assets"
    return None


@contextlib.contextmanager
def _atomically(target: Path) -> Iterator[Path]:
    """A scratch directory that becomes `target` if all goes well and vanishes if not."""
    try:
        with when_whole(target.absolute()) as scratch:
            yield scratch
            scratch.chmod(0o755)
    except OSError as e:
        free = shutil.disk_usage(target.parent).free
        raise UserError(f"{target} cannot be written ({free / 1e9:.1f} GB free): {e}; nothing was left behind") from e


def size_of(folder: Path) -> int:
    """Bytes of all files below a directory."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
