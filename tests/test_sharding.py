"""If this fails, a run on several devices learns something else than on one, or saves no memory by it."""

import dataclasses
from pathlib import Path

import jax
from jax.sharding import PartitionSpec
import pytest

from configs import PRESETS
from openpi_ar.errors import UserError
from openpi_ar.training import memory, sharding

ROOT = Path(__file__).parents[1]
DEBUG, FULL, LORA = PRESETS["debug"], PRESETS["pi05_subtask"], PRESETS["pi05_subtask_lora"]


@pytest.mark.parametrize("name", PRESETS)
def test_every_parameter_of_every_preset_is_named(name):
    state = memory.abstract_state(PRESETS[name])
    missing = [p for p, x in _leaves(state) if x.ndim and sharding.spec(p, x.shape, 2) is None]
    assert missing == []


def _leaves(tree):
    return zip(sharding.freeze.leaf_paths(tree), jax.tree.leaves(tree), strict=True)


def test_full_size_divides_almost_wholly():
    for cfg, factor in ((FULL, 0.126), (LORA, 0.2)):
        state = memory.abstract_state(cfg)
        assert sharding.nbytes(state, 8) < factor * sharding.nbytes(state)
    eight = dataclasses.replace(FULL, fsdp_devices=8)
    assert memory.estimate(eight, devices=8).parameters < 0.126 * memory.estimate(FULL, devices=8).parameters


def test_a_moment_is_cut_as_its_parameter_is():
    paths = dict(_leaves(memory.abstract_state(DEBUG)))
    moment = next(p for p in paths if p.endswith("mu/embedder/table"))
    for path in ("model/embedder/table", moment):
        assert sharding.spec(path, paths[path].shape, 4) == PartitionSpec(None, ("fsdp",))
    # An axis that does not divide stays whole.
    assert sharding.spec("model/embedder/table", (100, 18), 4) == PartitionSpec()


def test_parameters_that_no_row_names_are_all_listed(monkeypatch):
    monkeypatch.setattr(
        sharding, "TABLE", tuple(r for r in sharding.TABLE if not r[0].startswith(("*embed", "*img/patch")))
    )
    model = memory.abstract_state(DEBUG).model
    with pytest.raises(UserError, match=r"embedder/table \[1024, 16\], img/patch_kernel \[16, 16, 3, 16\]: add one"):
        sharding.shardings(model, sharding.make_placement(DEBUG))


def test_groups_that_do_not_fit_the_devices_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 6)
    with pytest.raises(UserError, match="fsdp_devices 4 does not divide the 6 devices: use one of 1, 2, 3, 6"):
        sharding.make_placement(dataclasses.replace(DEBUG, fsdp_devices=4))
    with pytest.raises(UserError, match="batch_size 4 does not divide among 6 devices"):
        sharding.make_placement(DEBUG)
