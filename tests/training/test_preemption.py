"""If this fails, a killed run leaves a checkpoint that cannot be read, or saving fills the host's memory or the
disk."""

import dataclasses
import multiprocessing
from pathlib import Path
import time

import jax
import numpy as np
import pytest

from openpi_ar.checkpoints import store
from openpi_ar.training.best import KeepBest
from openpi_ar.training.metrics import MetricsLog
from openpi_ar.training.store import CheckpointStore, restore_train_state
from tests.checkpoint_fixtures import CFG, abstract, assets, random_state

MIB = 2**20


# Processes that are forked from one which has imported everything and computed nothing: none waits for its imports.
KILLED = multiprocessing.get_context("forkserver")
KILLED.set_forkserver_preload([__name__])


def save_forever(directory: Path) -> None:
    """Saves as fast as it can from the step after the last whole one on."""
    jax.config.update("jax_platforms", "cpu")
    writer, step = CheckpointStore(directory, keep_last=1), (store.latest_step(directory) or 0) + 1
    while True:
        writer.save(random_state(CFG, step), 10 * step, assets(CFG))
        step += 1


def kill_while_saving(directory: Path, rng: np.random.Generator) -> int:
    """Kills a process that saves at a random moment, and returns the newest step, whose every number was checked."""
    before = store.latest_step(directory) or 0
    process = KILLED.Process(target=save_forever, args=(directory,), daemon=True)
    process.start()
    deadline = time.monotonic() + 120
    while (store.latest_step(directory) or 0) <= before and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(rng.uniform(0.0, 0.4))
    process.kill()
    process.join()
    newest = store.latest_step(directory)
    assert newest is not None and newest > before
    for step in store.complete_steps(directory):
        restored, position = restore_train_state(directory / str(step), abstract(CFG))
        jax.tree.map(np.testing.assert_array_equal, restored, random_state(CFG, step))
        assert position == 10 * step
    store.load_policy_checkpoint(directory)
    return newest


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_killed_while_saving_leaves_only_whole_checkpoints(tmp_path):
    rng = np.random.default_rng(0)
    steps = [kill_while_saving(tmp_path, rng) for _ in range(20)]
    assert steps == sorted(set(steps))
    # What was half-written is deleted by the run that goes on.
    last = steps[-1] + 1
    writer = CheckpointStore(tmp_path, keep_last=1)
    writer.save(random_state(CFG, last), 10 * last, assets(CFG))
    writer.close()
    assert store.latest_step(tmp_path) == last and not list(tmp_path.glob("*tmp*"))
    # Negative control: a step that was cut short is told apart from a whole one.
    (tmp_path / str(last) / "params" / "_METADATA").unlink()
    assert store.latest_step(tmp_path) != last


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_many_saves_take_no_more_memory_than_a_few(tmp_path):
    saves = 200
    # 16 MiB: one copy that stays behind with every save would be found out after a few.
    cfg = dataclasses.replace(CFG, model=dataclasses.replace(CFG.model, vocab_size=2**16))
    state = random_state(cfg, 1)
    assert sum(x.nbytes for x in jax.tree.leaves(state)) > 16 * MIB
    writer = CheckpointStore(tmp_path, keep_last=1)

    def save(first: int, count: int) -> float:
        """Resident MiB, the most of what is seen after each save."""
        most = 0.0
        for step in range(first, first + count):
            writer.save(state._replace(step=np.int32(step)), step, assets(cfg))
            status = Path("/proc/self/status").read_text()
            most = max(most, int(status.split("VmRSS:")[1].split()[0]) / 1024)
        return most

    # The allocator's arenas fill during the first quarter; after it 0.2 MiB a save remain, strings that tensorstore
    # does not give back. A copy of the state would be 16 MiB a save and more.
    warm = saves // 4
    save(1, warm - 5)
    few, _, many = save(warm - 4, 5), save(warm + 1, saves - warm - 5), save(saves - 4, 5)
    writer.close()
    print(f"resident at most: {few:.0f} MiB by save {warm}, {many:.0f} MiB during the last 5 of {saves}")
    assert many - few < 50
    assert len(store.complete_steps(tmp_path)) == 2


@pytest.mark.slow
def test_every_so_many_steps_one_is_kept_for_good(tmp_path):
    writer = CheckpointStore(tmp_path, keep_last=1, keep_every=4)
    for step in (2, 4, 6, 8, 10, 12, 13):
        writer.save(random_state(CFG, step), step, assets(CFG))
    writer.close()
    assert store.complete_steps(tmp_path) == [4, 8, 12, 13]


def test_the_best_parameters_are_kept_whatever_comes_after(tmp_path):
    cfg = dataclasses.replace(CFG, keep_best="-subtask_generated_exact")
    log = MetricsLog(tmp_path, cfg, start_step=0)
    keep = KeepBest(cfg, tmp_path, assets(cfg))
    saved = []
    for step, value in ((1, 0.2), (2, 0.6), (3, 0.6), (4, 0.1)):
        log.write("eval", step, {"subtask_generated_exact": value})
        saved.append(keep.offer(step, {"subtask_generated_exact": value}, random_state(cfg, step)))
    keep.close()
    assert saved == [True, True, False, False]
    assert store.complete_steps(tmp_path / "best") == [2]
    model = store.load_policy_checkpoint(tmp_path / "best")[1]
    jax.tree.map(np.testing.assert_array_equal, model, random_state(cfg, 2).ema)
    # A resumed run goes on from the best so far; one resumed from before it forgets it.
    again = KeepBest(cfg, tmp_path, assets(cfg))
    assert not again.offer(5, {"subtask_generated_exact": 0.5}, random_state(cfg, 5))
    again.close()
    MetricsLog(tmp_path, cfg, start_step=1)
    early = KeepBest(cfg, tmp_path, assets(cfg))
    assert early.offer(2, {"subtask_generated_exact": 0.5}, random_state(cfg, 2))
    early.close()
    with pytest.raises(store.UserError, match="no held-out metric 'subtask_generated_exact'; there are loss"):
        KeepBest(cfg, tmp_path, assets(cfg)).offer(9, {"loss": 1.0}, random_state(cfg, 9))
