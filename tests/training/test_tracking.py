"""If this fails, a resumed run starts another W&B run, or TensorBoard shows steps twice."""

import dataclasses
import sys
import types

import pytest

from configs import get_preset
from openpi_ar.errors import UserError
from openpi_ar.training import distributed
from openpi_ar.training.metrics import MetricsLog, read_metrics

CFG = dataclasses.replace(get_preset("debug"), wandb=True, tensorboard=True)


@pytest.fixture
def extras(monkeypatch):
    """What W&B and TensorBoard are told, whether installed here or not."""
    told = types.SimpleNamespace(runs=[], logged=[], writers=[], scalars=[])
    run = types.SimpleNamespace(log=lambda values, step: told.logged.append((step, values)), finish=lambda: None)
    wandb = types.SimpleNamespace(init=lambda **how: told.runs.append(how) or run)
    writer = types.SimpleNamespace(add_scalar=lambda *a: told.scalars.append(a), close=lambda: None)
    board = types.SimpleNamespace(SummaryWriter=lambda folder, **how: told.writers.append((folder, how)) or writer)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "tensorboardX", board)
    return told


def run(directory, start: int, steps: int) -> None:
    log = MetricsLog(directory, CFG, start_step=start)
    for step in range(start + 1, start + steps + 1):
        log.write("train", step, {"loss": 1.0 / step})
    log.close()


def test_a_resumed_run_goes_on_with_its_curves(tmp_path, extras):
    run(tmp_path, 0, 6)
    run(tmp_path, 4, 3)  # killed after step 6, resumed from the checkpoint of step 4
    first, again = extras.runs
    assert first["id"] == again["id"] and first["resume"] == "allow" and first["name"] == "debug-default"
    assert [step for step, _ in extras.logged] == [1, 2, 3, 4, 5, 6, 5, 6, 7]
    assert extras.logged[0][1] == {"train/loss": 1.0}
    (folder, fresh), (same, resumed) = extras.writers
    assert folder == same == str(tmp_path / "tensorboard")
    assert (fresh["purge_step"], resumed["purge_step"]) == (None, 5)  # what it has of 5 and 6 is hidden
    assert extras.scalars[0] == ("train/loss", 1.0, 1)
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 8))
    # Another experiment is another run.
    (tmp_path / "other").mkdir()
    run(tmp_path / "other", 0, 1)
    assert extras.runs[2]["id"] != first["id"]


def test_one_process_of_several_writes(tmp_path, extras, monkeypatch):
    monkeypatch.setattr(distributed, "is_primary", lambda: False)
    run(tmp_path, 0, 3)
    assert extras.runs == extras.writers == [] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["wandb", "tensorboardX"])
def test_an_extra_that_is_not_installed_is_named(tmp_path, extras, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=f"needs {name}, which is not installed"):
        MetricsLog(tmp_path, CFG, start_step=0)
