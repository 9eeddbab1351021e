"""A checkpoint to hand out: parameters and assets only, smaller in bfloat16.

python -m openpi_ar.checkpoints.slim checkpoints/pi05_subtask_tabletop/long/12000 my_policy --dtype bfloat16
"""

import dataclasses
from pathlib import Path
import shutil
import sys
import tempfile
from typing import Literal

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import tyro

from openpi_ar.checkpoints import store
from openpi_ar.errors import UserError

_MARK = "commit_success.txt"


@dataclasses.dataclass(frozen=True)
class Args:
    """Copy the parameters and assets of a checkpoint, without optimizer state."""

    source: tyro.conf.Positional[Path]
    """Directory of a step or of an experiment (its newest step)."""
    target: tyro.conf.Positional[Path]
    """New directory; must not exist."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Stored type. It is loaded as float32 either way."""


def slim(source: Path, target: Path, dtype: str) -> int:
    """Writes `target` (complete or not at all) and returns its size in bytes.

    Raises UserError if `source` is no complete checkpoint or `target` exists.
    """
    if target.exists():
        raise UserError(f"{target} exists: name a new directory, or delete this one first")
    step_dir = store.resolve_step_dir(source)
    _, model, _, _ = store.load_policy_checkpoint(step_dir)
    pure = store.pure_params(jax.tree.map(lambda a: a.astype(jnp.dtype(dtype)), model))
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent)).absolute()
    try:
        ocp.PyTreeCheckpointer().save(scratch / "params", {"params": pure})
        # orbax's marks of success name the directory they were written in; complete is what has been renamed.
        (scratch / "params" / _MARK).unlink(missing_ok=True)
        shutil.copytree(step_dir / "assets", scratch / "assets", ignore=shutil.ignore_patterns(_MARK))
        shutil.copy(step_dir / "_CHECKPOINT_METADATA", scratch)
        scratch.chmod(0o755)
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return sum(f.stat().st_size for f in target.rglob("*") if f.is_file())


def main(argv: list[str] | None = None) -> None:
    """Entry point. Bad input ends with one line on stderr and exit code 2."""
    args = tyro.cli(Args, args=argv, prog="python -m openpi_ar.checkpoints.slim")
    try:
        size = slim(args.source, args.target, args.dtype)
    except UserError as e:
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"{args.target}: {size / 1e6:.1f} MB, {args.dtype}")


if __name__ == "__main__":
    main()
