"""If this fails, the number of denoising steps that a checkpoint is said to need is wrong, or its policy ignores it."""

import dataclasses
import shutil

import numpy as np
import pytest

from openpi_ar.algorithms.flow import Steps
from openpi_ar.checkpoints import store
from openpi_ar.errors import UserError
from openpi_ar.policy import Policy, steps
from openpi_ar.policy.__main__ import main
from openpi_ar.policy.ladder import Ladder
from tests.policy.test_policy import raw_observation


@pytest.fixture
def samples(tiny_policy) -> list[dict]:
    horizon, rng = tiny_policy.cfg.model.action_horizon, np.random.default_rng(0)
    out = []
    for seed in range(5):
        valid = np.arange(horizon) < 2 + seed
        actions = rng.normal(0.0, [1, 2, 3, 0], (horizon, 4))
        out.append({**raw_observation(seed), "actions": actions, "action_valid": valid, "subtask": "done"})
    return out


def test_fewer_steps_of_the_same_policy_are_those_of_the_config(tiny_checkpoint, tiny_policy):
    raw, (cfg, *parts) = raw_observation(0), store.load_policy_checkpoint(tiny_checkpoint)
    decode = dataclasses.replace(cfg.decode, denoise_steps=2, denoise_method="heun", denoise_shift=2.0)
    want = Policy(dataclasses.replace(cfg, decode=decode), *parts).infer(raw)
    before = tiny_policy.infer(raw)
    got = tiny_policy.denoising(2, "heun", 2.0).infer(raw)
    assert got["subtask"] == want["subtask"] == before["subtask"]
    np.testing.assert_array_equal(got["actions"], want["actions"])
    np.testing.assert_array_equal(tiny_policy.infer(raw)["actions"], before["actions"])
    assert np.abs(got["actions"] - before["actions"]).max() > 1e-3


def test_errors_are_those_of_the_chunks_in_units_of_each_dimensions_spread(tiny_policy, samples):
    ways = steps.ways(Ladder(num=(1, 4), methods=("euler",)))
    measured = steps.measure(tiny_policy, samples, ways, batch=2)
    assert [m.steps for m in measured] == [Steps(1), Steps(4)]
    shape = len(samples), tiny_policy.cfg.model.action_horizon, tiny_policy.cfg.model.action_dim
    noise = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    chunks = {
        n: [
            tiny_policy.denoising(n).infer(row, noise=noise[i], subtask="done")["actions"]
            for i, row in enumerate(samples)
        ]
        for n in (1, 4)
    }
    true = np.concatenate([row["actions"][row["action_valid"]] for row in samples])[:, :3]  # the last never moves
    got = {
        n: np.concatenate([c[r["action_valid"]] for c, r in zip(chunks[n], samples, strict=True)])[:, :3]
        for n in (1, 4)
    }
    for m, n in zip(measured, (1, 4), strict=True):
        assert m.error == pytest.approx(np.mean(np.abs(got[n] - true) / true.std(0)), rel=1e-5)
        assert m.apart == pytest.approx(np.mean(np.abs(got[n] - got[4]) / true.std(0)), rel=1e-5, abs=1e-5)
        assert m.ms > 0
    assert measured[0].apart > 1e-3 > measured[1].apart
    for row in samples:
        row["actions"] = np.zeros_like(row["actions"])
    with pytest.raises(UserError, match="5 frames are all the same"):
        steps.measure(tiny_policy, samples, ways)


def test_the_fewest_passes_within_the_tolerance_are_enough():
    errors = {Steps(1): 0.3, Steps(2): 0.11, Steps(5): 0.1005, Steps(1, "heun"): 0.1, Steps(10): 0.099}
    assert steps.fewest(errors, 0.0) == Steps(10)
    assert steps.fewest(errors, 0.0015) == Steps(1, "heun")  # two passes, as good as five
    assert steps.fewest(errors, 0.0112) == Steps(1, "heun")  # of two with two passes the more exact
    assert steps.fewest(errors, 1.0) == Steps(1)


def test_what_is_written_is_what_the_policy_uses(tiny_checkpoint, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, copy)
    file = steps.write(str(copy), Steps(3, "heun", 0.5))
    assert file.is_file() and copy in file.parents
    decode, own = (Policy.from_checkpoint(path).cfg.decode for path in (copy, tiny_checkpoint))
    assert (decode.denoise_steps, decode.denoise_method, decode.denoise_shift) == (3, "heun", 0.5)
    assert own == dataclasses.replace(decode, denoise_steps=10, denoise_method="euler", denoise_shift=1.0)
    with pytest.raises(UserError, match="comes with the package: copy it"):
        steps.write("tabletop", Steps(3))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--frames", "1"], "--frames must be 2 or more, found 1"),
        (["--num", "0"], "1 step or more and a shift above 0, found 0"),
        (["--shifts", "-1"], "shift above 0, found 1 and -1.0"),
        (["--data", "world://tabletop"], "must be the directory of a LeRobot dataset, found 'world://tabletop'"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_bad_flags_are_one_line(tiny_checkpoint, tiny_policy, monkeypatch, capsys, flags, message):
    monkeypatch.setattr(Policy, "from_checkpoint", lambda path: tiny_policy)
    with pytest.raises(SystemExit) as e:
        main(["steps", "--ckpt", str(tiny_checkpoint), *flags])
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count("\n") == 1 and message in err
