"""Records batches of the tabletop's fine-tune, for a machine without a simulator.

    python -m benchmarks.device.recorded

They are those of the run itself, in its order, whose demonstrations are made on first use; the last ones are of
held-out episodes.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.device.real import BATCHES, HELD_OUT
from configs import PRESETS
from openpi_ar.data.inputs import InputTransform
from openpi_ar.data.loader import Loader, evaluation_batches
from openpi_ar.data.prompt_swap import PromptSwap
from openpi_ar.data.sources import load_sources
from openpi_ar.text.tokenizer import load_tokenizer
from openpi_ar.worlds import datasets


def main(argv: list[str] | None = None) -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--batches", type=int, default=400, help="400: all of the run")
    parser.add_argument("--out", type=Path, default=BATCHES)
    args = parser.parse_args(argv)
    cfg = PRESETS["pi05_subtask_tabletop"]
    train, held_out, _ = load_sources(cfg, datasets.local)
    tokenizer = load_tokenizer(cfg.text.tokenizer)
    transform = InputTransform.for_training(cfg, tokenizer, train.norm_stats(cfg.model.norm_mode))
    swap = PromptSwap(sorted(train.prompts), cfg.data.prompt_swap)
    loader = Loader(train, transform, batch_size=cfg.batch_size, seed=cfg.seed, augment=swap)
    batches = [jax.device_get(next(loader)) for _ in range(args.batches)]
    loader.close()
    aside = evaluation_batches(held_out, transform, batch_size=cfg.batch_size, batches=HELD_OUT)
    batches += [jax.device_get(batch) for _, batch in aside]
    leaves = zip(*(jax.tree.leaves(batch) for batch in batches), strict=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {f"leaf_{i}": np.stack(leaf) for i, leaf in enumerate(leaves)}
    np.savez_compressed(args.out, **arrays)
    print(f"{len(batches)} batches of {cfg.batch_size} rows in {args.out} ({args.out.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
