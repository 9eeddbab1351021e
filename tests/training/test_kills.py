"""If this fails, a training run that is killed does not end as one that was never stopped."""

from pathlib import Path
import signal
import time

import jax
import numpy as np
import pytest

from openpi_ar.checkpoints import store
from openpi_ar.training import memory
from openpi_ar.training.state import TrainState
from openpi_ar.training.store import restore_train_state
from tests.training.test_distributed import curves, launch

STEPS, KILLS = 60, 5
LONGER = ["--num-steps", str(STEPS), "--eval-every", "10"]


def check_every_step(experiment: Path) -> dict[int, TrainState]:
    """Everything in every step that is listed can be read, as training and as a policy would. The states by step."""
    states = {}
    for step in store.complete_steps(experiment):
        assert store.load_policy_checkpoint(experiment / str(step))
        cfg = store.load_assets(experiment / str(step)).config
        states[step], position = restore_train_state(experiment / str(step), memory.abstract_state(cfg))
        assert int(states[step].step) == position == step
    return states


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_training_killed_at_random_moments_ends_as_if_never_stopped(tmp_path):
    whole, killed, rng = tmp_path / "whole", tmp_path / "killed", np.random.default_rng(0)
    assert launch(whole, 1, *LONGER).finish()[0] == [0]
    experiment = killed / "debug" / "default"
    resumed_from = []
    for kill in range(KILLS):
        resumed_from.append(store.latest_step(experiment) or 0)
        run = launch(killed, 1, *LONGER, "--auto-resume", "--save-every", "2")
        reached = 0
        if kill:  # the first one dies at some moment of starting
            reached = resumed_from[-1] + int(rng.integers(4, 10))
            run.wait_for(f"step {reached}/{STEPS}")
        time.sleep(rng.uniform(0.0, 0.2 if kill else 5.0))
        run.all[0].kill()
        assert run.finish()[0] == [-signal.SIGKILL]
        # What may be lost is the save that was being written and the steps since.
        assert reached - 4 <= max(check_every_step(experiment), default=0) < STEPS
    assert resumed_from == sorted(resumed_from) and resumed_from[-1] > 0
    codes, errors = launch(killed, 1, *LONGER, "--auto-resume").finish()
    assert codes == [0], errors
    assert curves(killed) == curves(whole)
    ends = [check_every_step(root / "debug" / "default")[STEPS] for root in (whole, killed)]
    jax.tree.map(np.testing.assert_array_equal, *ends)
    # Negative control: no two steps are alike.
    assert len({values["loss"] for (kind, _), values in curves(whole).items() if kind == "train"}) == STEPS
