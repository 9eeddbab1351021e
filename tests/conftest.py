"""Fixtures shared by tests: one tiny checkpoint, saved once, as `train.py` would leave it."""

# Whatever imports JAX is imported where it is used: the process that hands out the tests loads this file too.
from __future__ import annotations

import dataclasses
from pathlib import Path
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from openpi_ar.config import TrainConfig
    from openpi_ar.data.normalize import NormStats
    from openpi_ar.policy import Policy

# The tabletop's ranges: tool x, y, z in metres, then finger opening (state) or grip (action).
_LOW, _HIGH = np.float32([-0.16, -0.18, 0.022, 0.0]), np.float32([0.16, 0.2, 0.2, 0.09])


# Files that take longest, longest first. Each process takes the next file, so that both end at about the same time.
_LONG = (
    "test_train.py",
    "test_goldens.py",
    "test_export.py",
    "test_load.py",
    "test_commands.py",
    "test_step.py",
    "test_decode.py",
    "test_memory.py",
    "test_freeze.py",
    "test_lerobot_commands.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: i for i, name in enumerate(_LONG)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


def tabletop_stats() -> dict[str, NormStats]:
    from openpi_ar.data.normalize import NormStats

    high = np.float32([*_HIGH[:3], 1.0])
    low = np.float32([*_LOW[:3], -1.0])
    return {
        "state": NormStats(mean=(_LOW + _HIGH) / 2, std=(_HIGH - _LOW) / 4, q01=_LOW, q99=_HIGH),
        "actions": NormStats(mean=(low + high) / 2, std=(high - low) / 4, q01=low, q99=high),
    }


def save_checkpoint(directory: Path, cfg: TrainConfig) -> Path:
    """An untrained model, its every parameter random, as step 0 of an experiment. Returns the step's directory."""
    import jax

    from openpi_ar.checkpoints import store
    from openpi_ar.text.tokenizer import load_tokenizer
    from openpi_ar.training.optimizer import make_optimizer
    from openpi_ar.training.state import init_state
    from openpi_ar.training.store import CheckpointStore
    from tests.model_fixtures import random_like

    abstract = jax.eval_shape(lambda: init_state(cfg, make_optimizer(cfg.optimizer, cfg.num_steps)))
    state = random_like(abstract, 0.3)
    writer = CheckpointStore(directory, keep_last=1)
    writer.save(state, 0, store.Assets(cfg, load_tokenizer(cfg.text.tokenizer), tabletop_stats()))
    writer.close()
    return directory / "0"


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built as `uv build` does."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=Path(__file__).parents[1], check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experiment directory of a talking and acting tabletop model of a few thousand parameters."""
    from configs import get_preset

    preset = get_preset("debug")
    # More ids than the tokenizer has, as in real models: none of the spare ones may ever be generated.
    cfg = dataclasses.replace(preset, exp_name="tiny", model=dataclasses.replace(preset.model, vocab_size=1040))
    return save_checkpoint(tmp_path_factory.mktemp("tiny"), cfg).parent


@pytest.fixture(scope="session")
def tiny_policy(tiny_checkpoint: Path) -> Policy:
    """Its policy, compiled once for all tests."""
    from openpi_ar.policy import Policy

    return Policy.from_checkpoint(tiny_checkpoint)
