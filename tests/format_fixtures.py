"""The goldens as checkpoints in several formats, and what tests of them share."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from openpi_ar.checkpoints import __main__ as cli
from openpi_ar.checkpoints.load import Loaded, load_model
from openpi_ar.checkpoints.options import LoadOptions
from openpi_ar.params import flatten

GOLDEN = Path(__file__).parent / "golden"
LEROBOT, TORCH = GOLDEN / "torch_pi0" / "lerobot_layout", GOLDEN / "torch_pi0" / "openpi_layout_bf16"
HEADS = LoadOptions(siglip_heads=4)
"""What the shapes of those two do not tell."""

RNG = np.random.default_rng(0)
CENTRE = RNG.normal(size=8)
STATISTICS = {
    "mean": CENTRE,
    "std": RNG.uniform(0.5, 2, 8),
    "min": CENTRE - 4,
    "max": CENTRE + 5,
    "q01": CENTRE - 2,
    "q99": CENTRE + 3,
    "q10": CENTRE - 1,
    "q90": CENTRE + 2,
    "count": np.array([100]),
}
"""Of a state and an action of eight dimensions, as LeRobot keeps them."""


@functools.cache
def golden(path: Path, options: LoadOptions = HEADS) -> Loaded:
    """One of the goldens, read once."""
    return load_model(path, options)


def params(loaded) -> dict[str, np.ndarray]:
    return {k: np.asarray(v) for k, v in flatten(loaded.model).items()}


def assert_equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def refused(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as e:
        cli.main(list(argv))
    assert e.value.code == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("error: ")
    assert "\n" not in err
    return err


def damaged(tmp_path: Path, change) -> Path:
    tensors = load_file(LEROBOT / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def processors(folder: Path, state: str, action: str, renames: dict | None = None, **relative) -> Path:
    """What lerobot-train saves beside the model."""
    norm_map = {"VISUAL": "MEAN_STD", "STATE": state, "ACTION": action}
    tensors = {f"{feature}.{name}": np.asarray(array, np.int64 if name == "count" else np.float32)
               for feature in ("observation.state", "action") for name, array in STATISTICS.items()}  # fmt: skip
    tensors["observation.images.image.mean"] = np.full((3, 1, 1), 0.5, np.float32)
    first = [{"registry_name": "rename_observations_processor", "config": {"rename_map": renames or {}}}]
    if relative:
        first.append({"registry_name": "relative_actions_processor", "config": {"enabled": True, **relative}})
    for which, kind, before in (("pre", "normalizer", first), ("post", "unnormalizer", [])):
        file = f"policy_{which}processor_step_{len(before)}_{kind}_processor.safetensors"
        save_file(tensors, folder / file)
        step = {"registry_name": f"{kind}_processor", "config": {"eps": 1e-8, "norm_map": norm_map}, "state_file": file}
        body = {"name": f"policy_{which}processor", "steps": [*before, step]}
        (folder / f"policy_{which}processor.json").write_text(json.dumps(body))
    return folder
