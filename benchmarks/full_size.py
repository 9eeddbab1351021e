"""A random pi0.5 of full size (3.35 B parameters, bfloat16) written to disk, loaded, and run once on this machine.

uv run python -m benchmarks.full_size --dir /tmp/full_size

Proves that the loader's memory stays near one copy and that nothing in the model depends on being small. The checkpoint
(7.2 GB, openpi's PyTorch layout) stays in --dir for the next time; delete it when done.
"""

import dataclasses
import json
from pathlib import Path
import resource
import time

import jax
import ml_dtypes
import numpy as np

from configs.pi05_subtask import PI05_SUBTASK
from openpi_ar import files, flags
from openpi_ar.algorithms.act import act
from openpi_ar.algorithms.sampling import Sampling
from openpi_ar.checkpoints import export
from openpi_ar.checkpoints.load import load_model
from openpi_ar.checkpoints.options import LoadOptions
from openpi_ar.errors import command_line
from openpi_ar.model_config import ModelConfig
from openpi_ar.models import family
from openpi_ar.params import flatten
from openpi_ar.types import Observation, Tokens


@dataclasses.dataclass(frozen=True)
class Args:
    """Write, load and run a full-size pi0.5."""

    dir: Path
    """Where the checkpoint is or will be; 8 GB free."""
    prompt: int = 48
    tokens: int = 3
    denoise_steps: int = 2
    compute_dtype: str = "bfloat16"
    json: Path | None = None
    """Write the figures there too."""


class _Noise:
    """Stands for an array of small random values: made when indexed, a slice at a time."""

    def __init__(self, shape: tuple[int, ...], seed: int):
        self.shape, self.dtype, self._seed = shape, np.dtype(ml_dtypes.bfloat16), seed

    def __getitem__(self, place: tuple[int, ...]) -> np.ndarray:
        shape = self.shape[len(place) :]
        rng = np.random.default_rng([self._seed, *place])
        # One megabyte of noise repeated: random numbers for 3 billion values take minutes.
        block = (rng.standard_normal(500_009, np.float32) * 0.02).astype(self.dtype)
        return np.resize(block, shape)


def write(folder: Path, cfg: ModelConfig) -> None:
    """The checkpoint, in openpi's PyTorch layout."""
    abstract = family.abstract(cfg)
    flat = {k: _Noise(v.shape, i) for i, (k, v) in enumerate(flatten(abstract).items())}
    folder.mkdir(parents=True, exist_ok=True)
    export.save_safetensors(folder, flat, cfg, "torch")  # type: ignore[arg-type]


def peak_gb() -> float:
    """Largest resident memory of this process so far, GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main(args: Args) -> None:
    files.check_file(args.json, "--json")
    files.check_directory(args.dir, "name another directory")
    cfg = PI05_SUBTASK.model
    figures: dict[str, float] = {}
    if not (args.dir / export.SAFETENSORS).exists():
        start = time.perf_counter()
        write(args.dir, cfg)
        figures["write_s"] = time.perf_counter() - start
    figures["file_gb"] = (args.dir / export.SAFETENSORS).stat().st_size / 1e9
    before, start = peak_gb(), time.perf_counter()
    loaded = load_model(args.dir, LoadOptions(cameras=("base_0_rgb",), compute_dtype=args.compute_dtype))
    figures["load_s"] = time.perf_counter() - start
    figures["load_peak_gb"] = peak_gb()
    leaves = jax.tree.leaves(loaded.model)
    figures["parameters"] = sum(x.size for x in leaves)
    figures["parameters_gb"] = sum(x.nbytes for x in leaves) / 1e9
    print(f"before {before:.2f} GB; {json.dumps(figures)}", flush=True)

    ids = np.arange(2, 2 + args.prompt, dtype=np.int32)[None]
    obs = Observation(
        images=np.zeros((1, 1, *cfg.siglip.image_size, 3), np.uint8),
        image_mask=np.ones((1, 1), bool),
        prompt=Tokens.of(ids),
        state=np.zeros((1, cfg.state_dim), np.float32),
    )
    run = jax.jit(act, static_argnames=("num_steps",))
    sampling = Sampling(eos_id=-1, max_new_tokens=args.tokens)
    noise = jax.random.normal(jax.random.key(0), (1, cfg.action_horizon, cfg.action_dim))
    start = time.perf_counter()
    compiled = run.lower(loaded.model, obs, noise, sampling, num_steps=args.denoise_steps).compile()
    figures["compile_s"] = time.perf_counter() - start
    start = time.perf_counter()
    out = jax.block_until_ready(compiled(loaded.model, obs, noise, sampling))
    figures["run_s"] = time.perf_counter() - start
    figures["peak_gb"] = peak_gb()
    assert np.isfinite(out.actions).all() and out.actions.shape == (1, cfg.action_horizon, cfg.action_dim)
    assert int(out.text.valid.sum()) == args.tokens
    print(json.dumps(figures, indent=2))
    print(f"generated {out.text.ids[0].tolist()}, actions of deviation {float(out.actions.std()):.3f}")
    files.write_json(args.json, figures)


if __name__ == "__main__":
    with command_line():
        main(flags.parse(Args, None, "python -m benchmarks.full_size"))
