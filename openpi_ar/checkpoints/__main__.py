"""Tools for checkpoints of any known format.

python -m openpi_ar.checkpoints inspect gs://openpi-assets/checkpoints/pi05_base
python -m openpi_ar.checkpoints convert checkpoints/pi05_subtask/run/30000 my_policy --to torch --dtype bfloat16
"""

from pathlib import Path
from typing import Annotated

import numpy as np
from rich.console import Console
from rich.table import Table
import tyro

from openpi_ar import files, flags
from openpi_ar.checkpoints.options import AS_IT_IS, Format, LoadOptions
from openpi_ar.errors import command_line
from openpi_ar.model_config import ModelConfig, TowerConfig

Where = Annotated[str, tyro.conf.Positional]
"""Directory, file, address (gs://, https://, hf://) or hub id of a checkpoint."""

_out = Console(soft_wrap=True, markup=False)


def convert(
    source: Where,
    target: Annotated[Path, tyro.conf.Positional],
    *,
    to: Format,
    options: Annotated[LoadOptions, tyro.conf.OmitArgPrefixes] = AS_IT_IS,
) -> None:
    """Write a checkpoint in another format: parameters and assets, no optimizer state.

    Args:
        source: directory, file, address or hub id of the checkpoint.
        target: new directory; must not exist.
        to: openpi (orbax), torch (openpi's model.safetensors), lerobot, or ours.
        options: what the source does not tell, and what is wanted.
    """
    from openpi_ar.checkpoints import export, load

    files.check_new(target)
    loaded = load.load_model(source, options)
    for note in (*loaded.notes, *export.convert(loaded, target, to)):
        _out.print(f"note: {note}", highlight=False)
    _out.print(f"{target}: {_size_of(target) / 1e6:.1f} MB, {loaded.kind} -> {to}", highlight=False)


def inspect(source: Where, *, options: Annotated[LoadOptions, tyro.conf.OmitArgPrefixes] = AS_IT_IS) -> None:
    """Say what a checkpoint is, from its headers alone.

    Args:
        source: directory, file, address or hub id of the checkpoint.
        options: what the checkpoint does not tell.
    """
    from openpi_ar.checkpoints import load
    from openpi_ar.checkpoints.sources import root_of

    looked = load.inspect(source, options)
    cfg, opened = looked.config, looked.matched.source
    specs = opened.specs
    count = {name: int(np.prod(spec.shape, dtype=np.int64)) for name, spec in specs.items()}
    dtypes: dict[str, int] = {}
    for name, spec in specs.items():
        dtypes[spec.dtype.name] = dtypes.get(spec.dtype.name, 0) + count[name]
    root = root_of(opened.path)
    files = (p for pattern in ("assets/**/*", "policy_*") for p in root.glob(pattern) if p.is_file())
    table = Table(show_header=False, box=None)
    rows = {
        "path": str(opened.path),
        "format": _FORMATS[looked.kind],
        "model": {"pi0": "pi0", "pi05": "pi0.5", "paligemma": "PaliGemma"}[cfg.kind],
        "tensors": f"{len(specs)}, {sum(count.values()):,} values, {sum(s.nbytes for s in specs.values()) / 1e9:.2f} "
        "GB",
        "types": ", ".join(f"{name} {n:,}" for name, n in sorted(dtypes.items())),
        "images": f"{cfg.siglip.image_size[0]} x {cfg.siglip.image_size[1]}, patch {cfg.siglip.patch_size}, "
        f"{len(cfg.cameras)} cameras: {', '.join(cfg.cameras)}",
        "SigLIP": f"width {cfg.siglip.width}, depth {cfg.siglip.depth}, mlp {cfg.siglip.mlp_dim}, heads "
        f"{cfg.siglip.num_heads}",
        "first tower": _tower(cfg.vlm) + f", vocabulary {cfg.vocab_size}",
        "second tower": "none: it answers questions and cannot act",
        "assets": ", ".join(sorted(str(p.relative_to(root)) for p in files)) or "none",
    }
    if isinstance(cfg, ModelConfig):
        rows["second tower"] = _tower(cfg.expert)
        rows["actions"] = f"{cfg.action_dim} dimensions, horizon {cfg.action_horizon}, state {cfg.state_dim}"
    for key, value in rows.items():
        table.add_row(key, value)
    _out.print(table)
    for note in looked.notes:
        _out.print(f"note: {note}", highlight=False)


_FORMATS = {
    "ours": "openpi_ar (orbax)",
    "openpi": "openpi, JAX (orbax)",
    "torch": "openpi, PyTorch (safetensors)",
    "lerobot": "LeRobot (safetensors)",
    "big_vision": "big_vision (.npz)",
    "transformers": "transformers (safetensors)",
}


def _size_of(folder: Path) -> int:
    """Bytes of all files below a directory."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def _tower(t: TowerConfig) -> str:
    lora = f", LoRA rank {t.lora_rank}" if t.lora_rank else ""
    return (
        f"width {t.width}, depth {t.depth}, mlp {t.mlp_dim}, heads {t.num_heads} / {t.num_kv_heads} x "
        f"{t.head_dim}{lora}"
    )


def main(argv: list[str] | None = None) -> None:
    """Entry point. Bad input ends with one line on stderr and exit code 2."""
    with command_line():
        flags.parse({"convert": convert, "inspect": inspect}, argv, "python -m openpi_ar.checkpoints")()


if __name__ == "__main__":
    main()
