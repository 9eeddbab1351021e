"""One run in several processes: setup, agreement, and output of the first process alone.

JAX runs the same program in every process and joins their devices into one mesh, so `training/sharding.py` is the same
for one process and for many. What differs is here: how processes find each other, files that one of them writes, and
decisions that all must take alike. `data/shards.py` has the rows of a batch that each process makes for its own
devices.
"""

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import os
import signal
import sys
import time
from typing import Any, NoReturn

import jax
from jax.experimental import multihost_utils
import numpy as np

from openpi_ar.config import Distributed
from openpi_ar.data.shards import put
from openpi_ar.errors import UserError
from openpi_ar.training import rendezvous

# Seconds that a directory made by one process may take to be seen by another over a network's file system.
_APPEARS_S = 60.0


def launched_as_one_of_several(env: Mapping[str, str]) -> str:
    """Name of the launcher whose variables say that this process is one of several; empty if none does.

    Which address, count and number follow from them is left to `jax.distributed`.
    """
    if int(env.get("SLURM_NTASKS") or 1) > 1 and "SLURM_STEP_NODELIST" in env:  # the latter: started by srun
        return "Slurm"
    if int(env.get("OMPI_COMM_WORLD_SIZE") or 1) > 1:
        return "Open MPI"
    workers = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES") or ""
    if "," in workers or int(env.get("MEGASCALE_NUM_SLICES") or 1) > 1:
        return "TPU slice"
    return ""


def resolve(cfg: Distributed, env: Mapping[str, str]) -> Distributed | None:
    """`cfg` with what the launcher's variables add to it; None if this process is alone.

    Raises UserError for flags that contradict each other or do not suffice.
    """
    given = cfg.coordinator or cfg.num_processes is not None or cfg.process_id is not None
    launcher = launched_as_one_of_several(env)
    if cfg.cluster == "off" or not (given or launcher or cfg.cluster == "on"):
        if given and cfg.cluster == "off":
            raise UserError("--distributed.cluster off excludes the coordinator, number and count of processes")
        return None
    if launcher == "Open MPI":  # jax knows versions up to 4 by a variable that later ones no longer set
        cfg = dataclasses.replace(
            cfg,
            num_processes=int(env["OMPI_COMM_WORLD_SIZE"]) if cfg.num_processes is None else cfg.num_processes,
            process_id=int(env["OMPI_COMM_WORLD_RANK"]) if cfg.process_id is None else cfg.process_id,
            local_devices=cfg.local_devices or (int(env["OMPI_COMM_WORLD_LOCAL_RANK"]),),
        )
        if not cfg.coordinator and "OMPI_MCA_orte_hnp_uri" not in env:
            raise UserError(
                "this Open MPI does not say where process 0 is: add --distributed.coordinator HOST:PORT with the first "
                "machine's name and a free port"
            )
    if given and not launcher and cfg.cluster != "on":
        missing = [
            flag
            for flag, value in (
                ("--distributed.coordinator HOST:PORT", cfg.coordinator or None),
                ("--distributed.num-processes N", cfg.num_processes),
                ("--distributed.process-id I", cfg.process_id),
            )
            if value is None
        ]
        if missing:
            raise UserError(f"several processes without a launcher need all three flags: add {', '.join(missing)}")
    _check_numbers(cfg)
    return cfg


def _check_numbers(cfg: Distributed) -> None:
    host, _, port = cfg.coordinator.rpartition(":")
    if cfg.coordinator and not (host and port.isdigit() and 0 < int(port) < 2**16):
        raise UserError(f"--distributed.coordinator must be HOST:PORT, found {cfg.coordinator!r}")
    count, number = cfg.num_processes, cfg.process_id
    if count is not None and count < 1:
        raise UserError(f"--distributed.num-processes must be 1 or more, found {count}")
    if number is not None and not 0 <= number < (count or sys.maxsize):
        raise UserError(f"--distributed.process-id must be 0 to {(count or 2) - 1}, found {number}")


def start(cfg: Distributed) -> None:
    """Joins the other processes, if there are any. Call before anything computes.

    Raises UserError if the coordinator cannot be reached or the environment does not say who this process is.
    """
    resolved = resolve(cfg, os.environ)
    if resolved is None:
        if jax.process_count() > 1:
            raise UserError(
                f"the devices are those of {jax.process_count()} processes which have not been joined: "
                f"add --distributed.cluster on"
            )
        return
    if resolved.coordinator and resolved.num_processes is not None and resolved.process_id is not None:
        rendezvous.meet(resolved)
    try:
        jax.distributed.initialize(
            coordinator_address=resolved.coordinator or None,
            num_processes=resolved.num_processes,
            process_id=resolved.process_id,
            local_device_ids=list(resolved.local_devices) or None,
            initialization_timeout=resolved.timeout_s,
            heartbeat_timeout_seconds=resolved.heartbeat_s,
        )
    except (RuntimeError, ValueError, OSError, KeyError) as e:
        raise UserError(f"the processes of this run cannot be joined: {e}; see docs/clusters.md") from e
    say(f"{jax.process_count()} processes, {jax.device_count()} devices, {jax.local_device_count()} here")


# ---- the first process ----------------------------------------------------------------------------------------------


def several() -> bool:
    """Whether this run has more than one process."""
    return jax.process_count() > 1


def is_primary() -> bool:
    """Whether this process prints, logs and writes plain files."""
    return jax.process_index() == 0


def say(*lines: str) -> None:
    """Prints, once for the whole run."""
    if lines and is_primary():
        print("\n".join(lines), flush=True)


# ---- agreement ------------------------------------------------------------------------------------------------------


def same_everywhere(tree: Any) -> Any:
    """Process 0's numbers, in every process (numpy)."""
    return multihost_utils.broadcast_one_to_all(tree) if several() else tree


def agree(value: float) -> float:
    """Process 0's value."""
    # As bytes: jax would narrow 64 bits to 32.
    bits = np.frombuffer(np.float64(value).tobytes(), np.uint8)
    return float(np.frombuffer(np.asarray(same_everywhere(bits), np.uint8).tobytes(), np.float64)[0])


@contextlib.contextmanager
def primary_first(what: str) -> Iterator[None]:
    """Process 0 runs the block first; the others wait, and find in a shared cache what it wrote."""
    if several() and not is_primary():
        multihost_utils.sync_global_devices(what)
    yield
    if several() and is_primary():
        multihost_utils.sync_global_devices(what)


def check_shared(directory: os.PathLike[str]) -> None:
    """Raises UserError in a process that does not see a directory which process 0 has made."""
    if several():
        multihost_utils.sync_global_devices("directory")
    end = time.monotonic() + _APPEARS_S
    while not os.path.isdir(directory):
        if time.monotonic() > end:
            raise UserError(
                f"process {jax.process_index()} does not see {directory}, which process 0 has made: --checkpoint-dir "
                f"must be on storage that all machines share"
            )
        time.sleep(0.2)


def spread(tree: Any, where: Any) -> Any:
    """Places a tree, which every process holds whole, on the devices of all (`where`: a tree of shardings)."""
    return jax.tree.map(put, tree, where) if several() else jax.device_put(tree, where)


class PreemptionNotice:
    """True at a step that all processes have agreed on after any of them got SIGTERM; must be asked once a step, in
    every process.

    jax catches the signal and agrees on the step; Ctrl-C is passed on as that signal.
    """

    def __init__(self):
        self.signal: str | None = None
        self._asked = 0

    def __bool__(self) -> bool:
        self._asked += 1
        if multihost_utils.reached_preemption_sync_point(self._asked):
            self.signal = "SIGTERM"
        return self.signal is not None

    def pass_on(self, number: int, frame: object) -> None:
        """Handler of SIGINT. A second one ends at once."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.kill(os.getpid(), signal.SIGTERM)


def end_alone(code: int) -> NoReturn:
    """Ends this process now. A normal end waits for the others, which may wait for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
