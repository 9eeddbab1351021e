"""Fixtures shared by tests: one tiny checkpoint, saved once, as `train.py` would leave it."""

# Whatever imports JAX is imported where it is used: the process that hands out the tests loads this file too.
from __future__ import annotations

import dataclasses
from pathlib import Path
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from openpi_ar.policy import Policy

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
    from tests.checkpoint_fixtures import CFG, abstract, write
    from tests.model_fixtures import random_like

    # More ids than the tokenizer has, as in real models: none of the spare ones may ever be generated.
    cfg = dataclasses.replace(CFG, exp_name="tiny", model=dataclasses.replace(CFG.model, vocab_size=1040))
    directory = tmp_path_factory.mktemp("tiny")
    write(directory, cfg, [random_like(abstract(cfg), 0.3)])
    return directory


@pytest.fixture(scope="session")
def tiny_policy(tiny_checkpoint: Path) -> Policy:
    """Its policy, compiled once for all tests."""
    from openpi_ar.policy import Policy

    return Policy.from_checkpoint(tiny_checkpoint)
