"""If this fails, several processes learn something else than one, or lose work when one of them dies."""

import contextlib
import dataclasses
import os
from pathlib import Path
import re
import signal
import socket
import subprocess
import sys
import threading

import grain
import jax
import numpy as np
import pytest

from openpi_ar.checkpoints import store
from openpi_ar.config import Distributed
from openpi_ar.data import loader
from openpi_ar.data.inputs import stack_rows
from openpi_ar.data.prompt_swap import PromptSwap
from openpi_ar.errors import UserError
from openpi_ar.training import distributed, rendezvous
from openpi_ar.training.distributed import resolve
from openpi_ar.training.metrics import read_metrics
from tests.data_fixtures import PROMPTS, sources, transform

ROOT = Path(__file__).parents[2]

# ---- who is who -----------------------------------------------------------------------------------------------------

SLURM = {"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "node[01-02]", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
FLAGS = Distributed(coordinator="a:1", num_processes=2, process_id=1)


@pytest.mark.parametrize(
    ("cfg", "env", "expected"),
    [
        (Distributed(), {}, None),
        (Distributed(), {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # any pod has that
        (Distributed(), {"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "node01"}, None),
        (Distributed(), {"SLURM_NTASKS": "4"}, None),  # in the batch script itself, not under srun
        (Distributed(), SLURM, Distributed()),
        (Distributed(cluster="off"), SLURM, None),
        (Distributed(), {"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        (Distributed(), {"TPU_WORKER_HOSTNAMES": "w0,w1"}, Distributed()),
        (Distributed(cluster="on"), {}, Distributed(cluster="on")),
        (FLAGS, {}, FLAGS),
        (
            Distributed(coordinator="a:1"),
            OPEN_MPI,
            Distributed(coordinator="a:1", num_processes=4, process_id=3, local_devices=(1,)),
        ),
    ],
)
def test_a_process_is_one_of_several_when_flags_or_its_launcher_say_so(cfg, env, expected):
    assert resolve(cfg, env) == expected


@pytest.mark.parametrize(
    ("cfg", "env", "words"),
    [
        (Distributed(coordinator="a:1"), {}, "add --distributed.num-processes N, --distributed.process-id I"),
        (dataclasses.replace(FLAGS, coordinator="a"), {}, "must be HOST:PORT, found 'a'"),
        (dataclasses.replace(FLAGS, process_id=2), {}, "must be 0 to 1, found 2"),
        (dataclasses.replace(FLAGS, cluster="off"), {}, "cluster off excludes"),
        (Distributed(), OPEN_MPI, "add --distributed.coordinator HOST:PORT"),
    ],
)
def test_flags_that_do_not_say_who_is_who_are_refused(cfg, env, words):
    with pytest.raises(UserError, match=words):
        resolve(cfg, env)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_a_coordinator_that_does_not_answer_is_named():
    with pytest.raises(UserError, match=r"process 1 cannot join process 0 at 127.0.0.1:\d+ within 1 s .*refused"):
        distributed.start(Distributed(f"127.0.0.1:{free_port()}", 2, 1, timeout_s=1))


@pytest.fixture
def together():
    """Starts the meeting of some processes, each in a thread, and gives how it ended for each."""

    def run(*processes: Distributed) -> dict[int | None, str]:
        ends = {}

        def one(cfg: Distributed) -> None:
            try:
                ends[cfg.process_id] = rendezvous.meet(cfg) or "met"
            except UserError as e:
                ends[cfg.process_id] = str(e)

        threads = [threading.Thread(target=one, args=(cfg,)) for cfg in processes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return ends

    return run


def test_processes_meet_and_who_is_missing_is_named(together):
    def process(number: int, count: int = 3) -> Distributed:
        return Distributed(f"127.0.0.1:{port}", count, number, timeout_s=2)

    port = free_port()
    assert together(process(0), process(1), process(2)) == {0: "met", 1: "met", 2: "met"}
    ends = together(process(0), process(2))
    assert f"process 1 of 3 did not come to process 0 at 127.0.0.1:{port} within 2 s" in ends[0]
    assert "it answers, but not all others have come" in ends[2]
    ends = together(process(0), process(1, count=4))
    assert "process 1 has --distributed.num-processes 4, process 0 3" in ends[0]
    assert "has ended, or another program listens there" in ends[1]


def test_a_port_that_is_taken_is_named(together):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ends = together(Distributed(f"127.0.0.1:{port}", 2, 0, timeout_s=60))
    assert re.match(rf"process 0 cannot listen on port {port} .*choose another port", ends[0])


def test_somebody_else_at_the_door_does_no_harm(together):
    """A probe of the port that says nothing, and one that says something else."""
    first = Distributed(f"127.0.0.1:{free_port()}", 2, 0, timeout_s=60)
    second = dataclasses.replace(first, process_id=1)
    ends = {}
    waiting = threading.Thread(target=lambda: ends.update(together(first)))
    waiting.start()
    for words in (b"", b"GET / HTTP/1.1"):
        called = False
        while waiting.is_alive() and not called:
            with contextlib.suppress(ConnectionError), socket.create_connection(("127.0.0.1", port_of(first))) as call:
                called = True
                call.sendall(words)
    assert together(second) == {1: "met"}
    waiting.join()
    assert ends == {0: "met"}


def port_of(cfg: Distributed) -> int:
    return int(cfg.coordinator.rpartition(":")[2])


# ---- who makes which rows -------------------------------------------------------------------------------------------


class Share(jax.sharding.Sharding):
    """Of a sharding of which this process has some devices: rows in pieces of two, not in order."""

    is_fully_addressable = False

    def __init__(self, *pieces: int):
        self.pieces = pieces

    def addressable_devices_indices_map(self, global_shape):
        return {i: (slice(2 * i, 2 * i + 2),) for i in self.pieces}


def test_shares_of_a_batch_are_its_rows_whatever_is_drawn_at_random():
    source, rows = sources()[0], transform()

    def batches(sharding) -> list[dict]:
        data = grain.MapDataset.source(source).seed(3).shuffle().repeat()
        data, count = loader.share(data.random_map(PromptSwap(PROMPTS, 0.5)), 8, sharding)
        data = data.map(rows.sample).batch(count, batch_fn=stack_rows)
        return [data[i] for i in (0, 1, 5)]  # across the border of an epoch

    whole = batches(None)
    for pieces, expected in (((3, 1), [2, 3, 6, 7]), ((0, 2), [0, 1, 4, 5])):
        for share, batch in zip(batches(Share(*pieces)), whole, strict=True):
            jax.tree.map(lambda a, b, e=expected: np.testing.assert_array_equal(a, b[e]), share, batch)
    # Negative control: other rows differ.
    assert not np.array_equal(whole[0]["images"][:4], whole[0]["images"][4:])


# ---- two processes on this machine ----------------------------------------------------------------------------------

STEPS = 14
RUN = [sys.executable, "train.py", "--config", "debug", "--num-steps", str(STEPS), "--save-every", "4"]
RUN += ["--log-every", "1", "--eval-every", "7", "--eval-batches", "1", "--optimizer.clip-norm", "10"]


@dataclasses.dataclass
class Processes:
    """The processes of a run, and what the first has printed."""

    all: list[subprocess.Popen]
    lines: list[str]

    def wait_for(self, start: str) -> None:
        """Reads what process 0 prints until a line begins so."""
        assert self.all[0].stdout is not None
        for line in self.all[0].stdout:
            self.lines.append(line)
            if line.startswith(start):
                return
        raise AssertionError(f"{start!r} was never printed: {self.lines} {[p.communicate()[1] for p in self.all]}")

    def finish(self) -> tuple[list[int], list[str]]:
        """(exit codes, what went to stderr of each)."""
        ends = [p.communicate(timeout=600) for p in self.all]
        self.lines += ends[0][0].splitlines()
        self.others = "".join(out for out, _ in ends[1:])
        return [p.returncode for p in self.all], [err for _, err in ends]


def launch(root: Path, count: int, *flags: str) -> Processes:
    env = os.environ | {"JAX_PLATFORMS": "cpu", "OPENPI_AR_CACHE": str(root.parent / "cache")}
    # Small programs too are compiled once for all starts.
    env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    if count == 1:
        joined = [[]]
    else:
        common = ["--distributed.coordinator", f"127.0.0.1:{free_port()}", "--distributed.num-processes", str(count)]
        joined = [[*common, "--distributed.process-id", str(i)] for i in range(count)]
    pipe = subprocess.PIPE
    started = [
        subprocess.Popen(
            [*RUN, "--checkpoint-dir", str(root), *flags, *more], cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True
        )
        for more in joined
    ]
    return Processes(started, [])


def curves(root: Path) -> dict[tuple[str, int], dict[str, float]]:
    timing = ("samples_per_s", "wait_s", "step", "kind")
    records = read_metrics(root / "debug" / "default" / "metrics.jsonl")
    return {(r["kind"], r["step"]): {k: v for k, v in r.items() if k not in timing} for r in records}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_processes_learn_what_one_does_and_lose_nothing_when_one_is_killed(tmp_path):
    one, two, killed = tmp_path / "one", tmp_path / "two", tmp_path / "killed"
    assert launch(one, 1).finish()[0] == [0]

    # Parameters whole in each process: gloo, the collectives of CPUs, mixes up those of a step that also gathers
    # pieces. Each makes its rows in a worker process of its own.
    run = launch(two, 2, "--workers", "1")
    codes, errors = run.finish()
    assert codes == [0, 0], errors
    assert any(line.startswith("2 processes, 2 devices, 1 here") for line in run.lines)
    assert "step" not in run.others and "loss" not in run.others  # process 0 alone speaks
    alone, together = curves(one), curves(two)
    assert len(together) == STEPS + 2 and alone.keys() == together.keys()
    for key, values in alone.items():
        # Figures are kept to six digits; the processes add up sums over rows in another order than one does.
        np.testing.assert_allclose(list(together[key].values()), list(values.values()), rtol=2e-5, err_msg=str(key))
        assert together[key].keys() == values.keys()

    # One is killed: the other ends too, and says why.
    run = launch(killed, 2, "--auto-resume")
    run.wait_for(f"step 7/{STEPS}")
    run.all[1].kill()
    codes, errors = run.finish()
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, None)
    # Again from the last checkpoint, this time with a notice to the other one.
    saved = store.latest_step(killed / "debug" / "default")
    assert saved in (4, 8)
    run = launch(killed, 2, "--auto-resume")
    run.wait_for(f"step {saved + 1}/{STEPS}")
    run.all[1].send_signal(signal.SIGTERM)
    codes, errors = run.finish()
    assert codes == [0, 0], errors
    stopped = store.latest_step(killed / "debug" / "default")
    assert stopped is not None and stopped > saved
    codes, errors = launch(killed, 2, "--auto-resume").finish()
    assert codes == [0, 0], errors
    assert curves(killed) == together
    assert store.latest_step(killed / "debug" / "default") == STEPS
    # Negative control: no two steps are alike.
    assert len({values["loss"] for (kind, _), values in together.items() if kind == "train"}) == STEPS
