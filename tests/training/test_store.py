"""If this fails, a resumed run begins with another state than was saved, or the wrong checkpoints are deleted."""

import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from openpi_ar.checkpoints import store
from openpi_ar.errors import UserError
from openpi_ar.training.store import restore_train_state
from tests.checkpoint_fixtures import CFG, NO_EMA, abstract, assert_same, save


@pytest.mark.parametrize("cfg", [CFG, NO_EMA], ids=["ema", "no ema"])
def test_train_state_comes_back_to_the_bit(tmp_path, cfg):
    (saved,) = save(tmp_path, cfg, 7)
    restored, position = restore_train_state(tmp_path / "7", abstract(cfg))
    assert_same(restored, saved)
    assert position == 70
    # Negative control: the comparison sees one changed number.
    with pytest.raises(AssertionError):
        assert_same(restored._replace(step=restored.step + 1), saved)


def test_only_the_last_ones_are_kept(tmp_path):
    save(tmp_path, CFG, 1, 2, 3, 4, keep_last=1)
    assert store.complete_steps(tmp_path) == [3, 4]
    assert store.latest_step(tmp_path / "nowhere") is None


def test_a_full_disk_is_one_line_before_anything_is_half_written(tmp_path, monkeypatch):
    save(tmp_path, CFG, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    with pytest.raises(UserError, match=r"cannot be written: 0.\d MB are needed \(1.0 MB free\): free some space"):
        save(tmp_path, CFG, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["1"] and store.complete_steps(tmp_path) == [1]


def test_policy_only_checkpoint_cannot_be_resumed(tmp_path):
    save(tmp_path, CFG, 5)
    shutil.rmtree(tmp_path / "5" / "train_state")
    store.load_policy_checkpoint(tmp_path / "5")
    with pytest.raises(UserError, match="holds no train_state"):
        restore_train_state(tmp_path / "5", abstract(CFG))


def test_a_policy_and_its_checkpoints_need_no_training():
    code = """
import pkgutil, sys
import openpi_ar.checkpoints, openpi_ar.policy
for package in (openpi_ar.checkpoints, openpi_ar.policy):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith("__main__"):
            __import__(module.name)
assert "openpi_ar.policy.policy" in sys.modules and "openpi_ar.checkpoints.export" in sys.modules
upward = ("openpi_ar.training", "openpi_ar.doctor", "openpi_ar.worlds")
sys.exit(", ".join(name for name in sys.modules if name.startswith(upward)) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
