"""Writes checkpoints in the formats of others: openpi's orbax tree, openpi's and LeRobot's safetensors; and in ours.

Everything is written beside the target, which appears when it is complete; a conversion that fails leaves nothing
behind.
"""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import json
from pathlib import Path
import shutil
from typing import Any

from einops import rearrange
import numpy as np
import orbax.checkpoint as ocp

from openpi_ar import config_json
from openpi_ar.checkpoints import assets, lerobot, lerobot_write, store
from openpi_ar.checkpoints.assets import Said
from openpi_ar.checkpoints.family import Family, expected_shape
from openpi_ar.checkpoints.load import FAMILIES, Loaded
from openpi_ar.checkpoints.options import Format
from openpi_ar.checkpoints.sources import SAFETENSORS, root_of
from openpi_ar.data.normalize import FILE as NORM_STATS
from openpi_ar.data.normalize import save_norm_stats
from openpi_ar.errors import UserError
from openpi_ar.files import atomic_directory
from openpi_ar.model_config import ModelConfig, PaliGemmaConfig
from openpi_ar.params import flatten, unflatten
from openpi_ar.textfile import read_object
from openpi_ar.types import Array

_PROCESSORS = "lerobot"
"""Directory under `assets/` that keeps LeRobot's processors in other formats."""
_STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def convert(loaded: Loaded, target: Path, to: Format) -> list[str]:
    """Writes a loaded model as another format, in the types that its parameters have in memory.

    Args:
        loaded: see `load.load_model`. Its assets (statistics, tokenizer) travel along, and so does its configuration,
            as `assets/config.json`, which openpi_ar reads in any format.
        target: new directory; must not exist.
        to: "openpi" (orbax, what its `restore_params` reads), "torch" (openpi's `model.safetensors`), "lerobot" or
            "ours".

    Returns what a user should know: what no file of the source said, and what no file of the target says to its own
    readers.

    Raises:
        UserError: the target exists, it cannot be written, the model is not written in that format, or the name table
            lacks parameters of the model.
    """
    flat = flatten(loaded.model)
    family = _family(flat, loaded.config)
    if to not in family.formats:
        raise UserError(
            f"{loaded.source.path} is {family.title}, which can be written as {', '.join(family.formats)}, not {to}"
        )
    said = assets.read(loaded.source, loaded.config) if isinstance(loaded.config, ModelConfig) else None
    with atomic_directory(target.absolute(), must_be_new=True) as scratch:
        if (files := root_of(loaded.source.path) / "assets").is_dir():
            shutil.copytree(files, scratch / "assets", ignore=shutil.ignore_patterns(store.COMMITTED, store.CONFIG))
        if to == "ours":
            _save_orbax(scratch / "params", unflatten(flat))
            (scratch / store.MARK).write_text("{}\n")
        elif to == "openpi":
            _save_orbax(scratch / "params", unflatten(to_openpi(flat, loaded.config)))
        else:
            save_safetensors(scratch, flat, loaded.config, to)
        notes = [] if said is None else _save_assets(scratch, said)
        if said is not None and to == "lerobot":
            lacking = lerobot_write.write(
                scratch, said.inference, said.stats, np.dtype(flat[family.token_embedding].dtype).name
            )
            _restore_processors(scratch, said)
            if lacking:
                notes.append(
                    f"LeRobot has no place for {', '.join(lacking)}: kept in assets/, which openpi_ar alone reads"
                )
        elif said is not None and to != "ours":
            notes.append(
                f"cameras, template, budgets and robot are in assets/{store.CONFIG}: openpi has them in its code"
            )
        if to in ("torch", "lerobot") and any("lora" in path for path in flat):
            notes.append("LoRA adapters are added to the weights that they belong to: PyTorch's files have none")
    return notes


def to_openpi(flat: Mapping[str, Array], cfg: PaliGemmaConfig) -> dict[str, Array]:
    """Arrays by openpi's path. Raises UserError listing the parameters that the name table lacks."""
    rows = _family(flat, cfg).by_path
    return {rows[path].openpi: a[None] if rows[path].lead else a for path, a in flat.items()}


def _family(flat: Mapping[str, Array], cfg: PaliGemmaConfig) -> Family:
    """The family of a model, all of whose parameters its table names."""
    family = next(f for f in FAMILIES if type(cfg) is f.config)
    if unnamed := sorted(flat.keys() - family.by_path.keys()):
        raise UserError(f"the name table of {family.title} has no row for {', '.join(unnamed)}: it cannot be written")
    return family


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One PyTorch tensor to be: shape and type now, the array when it is written."""

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]


def to_torch(flat: Mapping[str, Array], cfg: PaliGemmaConfig) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of openpi's PyTorch module. Adapters are added to the weights they belong to."""
    family = _family(flat, cfg)
    sizes = family.sizes(cfg)
    for path, array in flat.items():
        row, dtype = family.by_path[path], np.dtype(array.dtype)
        shape = expected_shape(row.to_torch, sizes)
        for i in range(array.shape[0]) if row.layers else (None,):
            for part, name in enumerate(row.torch):
                place = tuple(x for x in (i, part if len(row.torch) == 2 else None) if x is not None)

                def make(path=path, place=place, row=row, dtype=dtype) -> np.ndarray:
                    one = np.asarray(flat[path][place]) + _lora_delta(path, flat, place)
                    axes = row.part_axes(sizes)
                    return rearrange(one.astype(dtype), f"{row.part_layout} -> {row.to_torch}", **axes)

                yield name.format(i), Tensor(shape, dtype, make)
    dtype = np.dtype(flat[family.token_embedding].dtype)
    for name, shape in family.padding(cfg).items():
        yield name, Tensor(shape, dtype, lambda shape=shape: np.zeros(shape, dtype))


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


def _save_orbax(folder: Path, tree: Any) -> None:
    ocp.PyTreeCheckpointer().save(folder.absolute(), {"params": tree})
    # orbax's marks of success name the directory they were written in; complete is what has been renamed.
    (folder / store.COMMITTED).unlink(missing_ok=True)


def _save_assets(scratch: Path, said: Said) -> list[str]:
    """The target's `assets/`; returns notes on what was filled in."""
    folder, cfg, notes = scratch / "assets", said.config, list(said.notes)
    folder.mkdir(exist_ok=True)
    (folder / store.CONFIG).write_text(config_json.dumps(cfg))
    if said.tokenizer is not None:
        shutil.copy(said.tokenizer, folder / store.TOKENIZER)
    if said.lerobot is not None and said.stats:
        for file in folder.rglob(NORM_STATS):
            file.unlink()
        save_norm_stats(folder, said.stats)
    for file in said.root.glob(lerobot.FILES):
        (folder / _PROCESSORS).mkdir(exist_ok=True)
        shutil.copy(file, folder / _PROCESSORS)
    if said.problem is not None:
        notes.append(f"statistics: {said.problem}")
    if not said.knows_robot:
        notes.append(
            f"template {cfg.text.template}, max_prompt_tokens {cfg.text.max_prompt_tokens}, tokenizer "
            f"{cfg.text.tokenizer}: no file says them, openpi's are written; a robot named at inference brings its own "
            "template"
        )
    return notes


def _restore_processors(scratch: Path, said: Said) -> None:
    """LeRobot's own processors in place of those just written, if a conversion has kept them and the statistics are
    still theirs: they may normalise images, or in ways that ours do not know."""
    kept = scratch / "assets" / _PROCESSORS
    if said.stats and any(kept.glob(lerobot.FILES)):
        _, stats = lerobot.read(kept, read_object(scratch / "config.json"), None, said.config.model)
        if stats and assets.same_map(stats, said.stats):
            for file in scratch.glob(lerobot.FILES):
                file.unlink()
            for file in kept.glob(lerobot.FILES):
                shutil.copy(file, scratch)
    shutil.rmtree(kept, ignore_errors=True)


def save_safetensors(folder: Path, flat: Mapping[str, Array], cfg: PaliGemmaConfig, to: Format) -> None:
    """Writes `model.safetensors` of LeRobot, or ("torch") of openpi's PyTorch port, for PaliGemma of the transformers
    library, with its `config.json`."""
    family = _family(flat, cfg)
    (kept, other), names = family.tied, family.formats[to]
    # `safetensors.torch.save_model` writes one of two tied tensors and notes the other.
    metadata = {"format": "pt"} | ({kept: other} if names == (other,) else {})
    prefix = "model." if to == "lerobot" else ""

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in to_torch(flat, cfg):
            yield from ((prefix + written, tensor) for written in (names if name == kept else (name,)))

    write_safetensors(folder / SAFETENSORS, dict(tensors()), metadata)
    if to == "torch":
        body = family.torch_settings(cfg, np.dtype(flat[family.token_embedding].dtype).name)
        (folder / "config.json").write_text(json.dumps(body, indent=2) + "\n")


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
