"""Checkpoint files as lazy mappings: names, shapes and dtypes at once, an array only when it is asked for."""

from collections.abc import Callable
import dataclasses
from pathlib import Path
from typing import Any
import zipfile
import zlib

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
from safetensors import SafetensorError, safe_open

from openpi_ar.checkpoints.family import Column
from openpi_ar.errors import UserError
from openpi_ar.textfile import read_object

SAFETENSORS = "model.safetensors"

# Beside a model: PEFT's adapters, and the statistics of LeRobot's processors.
_NO_MODEL = ("adapter_model", "policy_preprocessor", "policy_postprocessor")
_NPY_BFLOAT16 = "|V2"  # numpy's files have no bfloat16: two bytes of anything
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"} | {
    f"{letter}{bits}": f"{name}{bits}" for letter, name in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)
}


@dataclasses.dataclass(frozen=True)
class Spec:
    """Shape and numpy dtype of a stored tensor."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes it takes in memory."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Source:
    """Tensors of one checkpoint by their names in it, read one at a time.

    path      the directory or file that was opened.
    columns   the columns of a family's name table that its names may be in.
    specs     shape and dtype by name.
    read      returns one array; raises UserError if the file is damaged.
    settings  body of the config.json beside the tensors, empty if there is none.
    """

    path: Path
    columns: tuple[Column, ...]
    specs: dict[str, Spec]
    read: Callable[[str], np.ndarray]
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


def root_of(path: Path) -> Path:
    """The directory that holds a checkpoint's other files: its tensors are a file in it, or its `params/`."""
    return path.parent if path.is_file() or path.name == "params" else path


def open_source(path: Path) -> Source:
    """The tensors of a local checkpoint, whatever it is: see `load.load_model`.

    Raises UserError if the path is no checkpoint that is known, or its headers cannot be read.
    """
    source, beside = _open(path), (path if path.is_dir() else path.parent) / "config.json"
    return dataclasses.replace(source, settings=read_object(beside)) if beside.is_file() else source


def _open(path: Path) -> Source:
    if path.is_file():
        if path.suffix == ".npz":
            return _open_npz(path)
        if path.name.endswith(".safetensors.index.json"):
            return _open_index(path)
        if path.suffix != ".safetensors":
            raise UserError(
                f"{path} is no checkpoint: expected a .safetensors or .npz file or a directory, found {path.suffix!r}"
            )
    elif not path.is_dir():
        raise UserError(f"{path} does not exist: expected a checkpoint directory, a .safetensors or a .npz file")
    for folder in (path / "params", path):
        if (folder / "_METADATA").is_file():
            return _open_orbax(folder)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    files = [file for file in files if not file.name.startswith(_NO_MODEL)]
    if path / SAFETENSORS in files:
        files = [path / SAFETENSORS]
    elif index := sorted(path.glob("*.safetensors.index.json")):
        return _open_index(index[0])
    if files:
        return open_safetensors(path, files)
    if (config := root_of(path) / "adapter_config.json").is_file():
        raise UserError(
            f"{path} is an adapter (PEFT), not a whole model: merge it into its base model, "
            f"{read_object(config).get('base_model_name_or_path')}, and give the directory that "
            "`model.merge_and_unload().save_pretrained(DIRECTORY)` writes"
        )
    if (path / "params").is_dir() or (path / "manifest.ocdbt").exists():
        raise UserError(f"{path} holds an orbax checkpoint without params/_METADATA: it is half-written or half-copied")
    found = path.name if path.is_file() else ", ".join(sorted(p.name for p in path.iterdir())[:8])
    raise UserError(
        f"{path} is no checkpoint that is known: expected params/ (orbax), {SAFETENSORS} or a step directory in "
        f"it, found {found or 'nothing'}"
    )


def _open_index(index: Path) -> Source:
    where = read_object(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
        raise UserError(
            f'{index} is no index of shards: expected {{"weight_map": {{tensor: file}}}}, found {where!r:.80}'
        )
    shards = sorted(set(where.values()))
    if missing := [name for name in shards if not (index.parent / name).is_file()]:
        raise UserError(f"{index} names shards that are not beside it: {', '.join(missing)}")
    return open_safetensors(index.parent, [index.parent / name for name in shards])


def open_safetensors(path: Path, files: list[Path]) -> Source:
    where: dict[str, Path] = {}
    names: dict[str, str] = {}
    specs: dict[str, Spec] = {}
    ties: dict[str, str] = {}
    for file in files:
        with _safe_open(file) as f:
            for name in f.keys():  # noqa: SIM118 (not a mapping)
                view = f.get_slice(name)
                if name in where:
                    raise UserError(f"{path}: {name} is in {where[name].name} and in {file.name}")
                if (stored := view.get_dtype()) not in _DTYPES:
                    raise UserError(f"{file}: {name} is stored as {stored}: expected one of {', '.join(_DTYPES)}")
                where[name], names[name] = file, name
                specs[name] = Spec(tuple(view.get_shape()), np.dtype(_DTYPES[stored]))
            ties |= {k: v for k, v in (f.metadata() or {}).items() if isinstance(v, str)}
    # Of two tied tensors safetensors.torch.save_model writes one, and the pair of names into the header.
    for dropped, kept in ties.items():
        if kept in specs and dropped not in specs:
            where[dropped], names[dropped], specs[dropped] = where[kept], kept, specs[kept]

    def read(name: str) -> np.ndarray:
        with _safe_open(where[name]) as f:
            return f.get_tensor(names[name])

    return Source(path, ("torch",), specs, read)


def _safe_open(file: Path) -> Any:
    try:
        return safe_open(str(file), framework="numpy")
    except (SafetensorError, OSError) as e:
        size = file.stat().st_size if file.exists() else 0
        raise UserError(
            f"{file} ({size} bytes) cannot be read as safetensors: {e}; it is truncated or no such file: fetch it again"
        ) from e


def _open_npz(path: Path) -> Source:
    try:
        archive = np.load(path)
        headers = {name: _npy_spec(archive, name) for name in archive.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as e:
        raise UserError(f"{path} cannot be read as an .npz of arrays: {e}") from e
    if not any(name.startswith("PaliGemma/") for name in headers):  # not openpi's: big_vision's, perhaps with more
        headers = {name: spec for name, spec in headers.items() if name.startswith("params/")}
    if not headers:
        raise UserError(
            f"{path} is no checkpoint: expected arrays named params/llm/... and params/img/... (PaliGemma), or "
            f"openpi's PaliGemma/..."
        )

    def read(name: str) -> np.ndarray:
        try:
            return archive[name].view(headers[name].dtype)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as e:
            raise UserError(f"{path}: array {name} cannot be read: {e}") from e

    return Source(path, ("openpi",), headers, read)


def _npy_spec(archive: Any, name: str) -> Spec:
    """Shape and dtype from the header alone."""
    with archive.zip.open(f"{name}.npy") as f:
        version = np.lib.format.read_magic(f)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = header(f)
    return Spec(shape, np.dtype(ml_dtypes.bfloat16) if dtype.str == _NPY_BFLOAT16 else dtype)


def _open_orbax(folder: Path) -> Source:
    handler = ocp.PyTreeCheckpointer()
    try:
        metadata: Any = handler.metadata(folder.absolute()).item_metadata
        if metadata is None:
            raise ValueError("files of it are missing or damaged")
        leaves = jax.tree_util.tree_leaves_with_path(metadata.tree, is_leaf=lambda x: hasattr(x, "shape"))
    except Exception as e:
        raise UserError(f"{folder} cannot be read as orbax parameters: {' '.join(str(e).split())[:300]}") from e
    paths = {tuple(str(getattr(k, "key", k)) for k in path): leaf for path, leaf in leaves}
    # Training loops of openpi leave nnx's `value` at the end of every path, its released checkpoints do not.
    suffix = bool(paths) and all(path[-1] == "value" for path in paths)
    keys: dict[str, tuple[str, ...]] = {}
    for path in paths:
        short = path[:-1] if suffix else path
        keys["/".join(short[1:] if short[0] == "params" else short)] = path
    specs = {name: Spec(tuple(paths[key].shape), np.dtype(paths[key].dtype)) for name, key in keys.items()}

    def read(name: str) -> np.ndarray:
        item: Any = jax.ShapeDtypeStruct(specs[name].shape, specs[name].dtype)
        args: Any = ocp.RestoreArgs(restore_type=np.ndarray)
        for part in reversed(keys[name]):
            item, args = {part: item}, {part: args}
        try:
            tree = handler.restore(
                folder.absolute(), args=ocp.args.PyTreeRestore(item=item, restore_args=args, partial_restore=True)
            )
        except Exception as e:  # orbax and its backends have errors of their own
            raise UserError(f"{folder}: array {name} cannot be read: {' '.join(str(e).split())[:300]}") from e
        return jax.tree.leaves(tree)[0]

    return Source(folder, ("ours", "openpi"), specs, read)
