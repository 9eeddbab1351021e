"""The goldens as checkpoints in several formats, and what tests of them share."""

import functools
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
