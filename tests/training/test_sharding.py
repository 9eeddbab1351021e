"""If this fails, a run on several devices learns something else than on one, or saves no memory by it."""

import dataclasses
from fnmatch import fnmatchcase
import json
import os
from pathlib import Path
import subprocess
import sys

import jax
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from configs import PRESETS
from openpi_ar.errors import UserError
from openpi_ar.params import flatten, leaf_paths
from openpi_ar.training import memory, sharding
from openpi_ar.training.sharding_pi0 import PI0

ROOT = Path(__file__).parents[2]
DEBUG, FULL, LORA = PRESETS["debug"], PRESETS["pi05_subtask"], PRESETS["pi05_subtask_lora"]

# Ten steps on the same batch, on one device, and on 8 that hold copies, pieces, or copies in pieces.
RUN = """
import dataclasses, json
import jax, numpy as np
from configs import PRESETS
from openpi_ar.data.inputs import stack_rows, to_device
from openpi_ar.training import memory, sharding
from openpi_ar.training.optimizer import make_optimizer
from openpi_ar.training.sharding_pi0 import PI0
from openpi_ar.training.state import train_key
from openpi_ar.training.step import make_train_step
from tests.data_fixtures import sources, transform

cfg = dataclasses.replace(PRESETS["debug"], batch_size=8)
cfg = dataclasses.replace(cfg, optimizer=dataclasses.replace(cfg.optimizer, peak_lr=1e-3))
tx = make_optimizer(cfg.optimizer, cfg.num_steps)
t, data = transform(), sources()[0]
rows = stack_rows([t.sample(data[i]) for i in range(8)])
abstract = memory.abstract_state(cfg)
# Filled on the host: initialising for real would compile a large program for each mesh.
rng = np.random.default_rng(0)
start = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract)
model = jax.tree.map(lambda x: (0.1 * rng.normal(size=x.shape)).astype(x.dtype), abstract.model)
start = start._replace(model=model, ema=model)
out = {}
for name, count, pieces in (("one", 1, 1), ("8x1", 8, 1), ("4x2", 8, 2), ("1x8", 8, 8)):
    mesh = jax.make_mesh((count // pieces, pieces), ("data", "fsdp"), devices=jax.devices()[:count],
                         axis_types=(jax.sharding.AxisType.Auto,) * 2)
    placement = sharding.Placement(mesh, PI0)
    where = sharding.shardings(abstract, placement)
    state = jax.tree.map(jax.device_put, start, where)
    step, batch, losses = make_train_step(cfg, tx, where), to_device(rows, placement.batch), []
    for _ in range(10):
        state, metrics = step(state, batch, train_key(cfg))
        losses.append(float(metrics["loss"]))
    first = jax.devices()[0]
    shards = [(s.device, s.data.nbytes) for x in jax.tree.leaves(state) for s in x.addressable_shards]
    held = [sum(size for device, size in shards if device == d) for d in jax.devices()[:count]]
    out[name] = {"losses": losses, "held": held, "expected": sharding.nbytes(PI0, abstract, pieces), "same": all(
        x.sharding == s for x, s in zip(jax.tree.leaves(state), jax.tree.leaves(where), strict=True))}
print("RESULT " + json.dumps(out))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_eight_devices_learn_what_one_does_and_hold_their_share():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    # XLA:CPU's collectives block a thread each until all devices are there: with as many threads as cores, eight
    # devices on two cores wait for one another for ever now and then. It takes the size of its pool from NPROC.
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "NPROC": "64"}
    done = subprocess.run([sys.executable, "-c", RUN], cwd=ROOT, env=env, capture_output=True, text=True, timeout=870)
    assert done.returncode == 0, done.stderr[-2000:]
    out = json.loads(done.stdout.split("RESULT ")[1])
    losses = {mesh: o["losses"] for mesh, o in out.items()}
    assert losses["one"][-1] < 0.9 * losses["one"][0]  # it is a run, not a standstill
    for mesh, o in out.items():
        np.testing.assert_allclose(losses[mesh], losses["one"], rtol=1e-5, err_msg=mesh)
        assert set(o["held"]) == {o["expected"]}, mesh  # every device holds its share, to the byte
        assert o["same"], mesh  # what is cut stays cut
    whole = out["one"]["expected"]
    assert out["8x1"]["expected"] == whole
    assert out["4x2"]["expected"] < 0.6 * whole and out["1x8"]["expected"] < 0.25 * whole
    print({mesh: o["expected"] for mesh, o in out.items()})


@pytest.mark.parametrize("name", PRESETS)
def test_every_parameter_of_every_preset_is_named(name):
    state = memory.abstract_state(PRESETS[name])
    missing = [p for p, x in flatten(state).items() if x.ndim and sharding.spec(PI0, p, x.shape, 2) is None]
    assert missing == []


def test_full_size_divides_almost_wholly():
    for cfg, factor in ((FULL, 0.126), (LORA, 0.2)):
        state = memory.abstract_state(cfg)
        assert sharding.nbytes(PI0, state, 8) < factor * sharding.nbytes(PI0, state)
    eight = dataclasses.replace(FULL, fsdp_devices=8)
    assert memory.estimate(eight, devices=8).parameters < 0.126 * memory.estimate(FULL, devices=8).parameters


def test_a_moment_is_cut_as_its_parameter_is():
    paths = flatten(memory.abstract_state(DEBUG))
    moment = next(p for p in paths if p.endswith("mu/embedder/table"))
    for path in ("model/embedder/table", moment):
        assert sharding.spec(PI0, path, paths[path].shape, 4) == PartitionSpec(None, ("fsdp",))
    # An axis that does not divide stays whole.
    assert sharding.spec(PI0, "model/embedder/table", (100, 18), 4) == PartitionSpec()


def test_every_row_names_a_parameter_of_some_preset():
    paths = {path for cfg in PRESETS.values() for path in leaf_paths(memory.abstract_state(cfg).model)}
    used = {next(i for i, (pattern, _) in enumerate(PI0) if fnmatchcase(path, pattern)) for path in paths}
    assert used == set(range(len(PI0)))


def test_parameters_that_no_row_names_are_all_listed():
    model = memory.abstract_state(DEBUG).model
    placement = sharding.make_placement(DEBUG)
    fewer = tuple(row for row in PI0 if not row[0].startswith(("*embed", "*img/patch")))
    with pytest.raises(UserError, match=r"embedder/table \[1024, 16\], img/patch_kernel \[16, 16, 3, 16\]: add one"):
        sharding.shardings(model, dataclasses.replace(placement, table=fewer))


def test_groups_that_do_not_fit_the_devices_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 6)
    with pytest.raises(UserError, match="fsdp_devices 4 does not divide the 6 devices: use one of 1, 2, 3, 6"):
        sharding.make_placement(dataclasses.replace(DEBUG, fsdp_devices=4))
    with pytest.raises(UserError, match="batch_size 4 does not divide among 6 devices"):
        sharding.make_placement(DEBUG)
    fused = dataclasses.replace(DEBUG, model=dataclasses.replace(DEBUG.model, attention="cudnn"))
    with pytest.raises(UserError, match="attention cudnn needs an NVIDIA GPU"):
        sharding.make_placement(fused)
    assert fused.inference.model.attention == "auto"  # a policy of it runs anywhere
