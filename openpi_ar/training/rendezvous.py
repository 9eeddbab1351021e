"""The processes of a run find each other before jax joins them.

jax's coordination service ends a process from C++ where a port is taken or somebody is missing: nothing could say what
is wrong. So process 0 first waits on the same port until all others have called, and then leaves the port to jax.
"""

import contextlib
import socket
import time

from openpi_ar.config import Distributed
from openpi_ar.errors import UserError

_GO = b"openpi_ar: go"
_PAUSE_S = 0.2


def meet(cfg: Distributed) -> None:
    """Returns when all processes are there. `cfg`: as `distributed.resolve` gives it, coordinator and numbers known.

    Raises UserError if the port is taken, if somebody does not come within `timeout_s`, or if they count differently.
    """
    host, _, port = cfg.coordinator.rpartition(":")
    if cfg.process_id == 0:
        _wait_for_all(cfg, int(port))
    else:
        _call(cfg, host.strip("[]"), int(port))


def _wait_for_all(cfg: Distributed, port: int) -> None:
    assert cfg.num_processes is not None
    end, calls = time.monotonic() + cfg.timeout_s, {}
    with contextlib.ExitStack() as stack:
        try:
            both = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if both else socket.AF_INET
            door = stack.enter_context(socket.create_server(("", port), family=family, dualstack_ipv6=both))
        except OSError as e:
            raise UserError(
                f"process 0 cannot listen on port {port} of {cfg.coordinator}: {e.strerror or e}; choose another port "
                f"with --distributed.coordinator, the same in all processes"
            ) from e
        while missing := sorted(set(range(1, cfg.num_processes)) - set(calls)):
            door.settimeout(max(end - time.monotonic(), 0.01))
            try:
                call = stack.enter_context(door.accept()[0])
                call.settimeout(5)
                number, count = (int(word) for word in call.recv(64).split())
            except TimeoutError:
                if time.monotonic() < end:
                    continue  # somebody else, who says nothing
                raise UserError(
                    f"{_named(missing)} of {cfg.num_processes} did not come to process 0 at {cfg.coordinator} within "
                    f"{cfg.timeout_s} s: start all with the same command, or wait longer (--distributed.timeout-s)"
                ) from None
            except (ValueError, OSError):
                continue  # somebody else: a probe of the port
            if count != cfg.num_processes:
                raise UserError(
                    f"process {number} has --distributed.num-processes {count}, process 0 {cfg.num_processes}: give "
                    f"all the same"
                )
            calls[number] = call  # the newest of a process that was started again
        for call in calls.values():
            call.sendall(_GO)


def _call(cfg: Distributed, host: str, port: int) -> None:
    end, problem = time.monotonic() + cfg.timeout_s, "no answer"
    while (left := end - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=min(left, 5)) as call:
                call.sendall(f"{cfg.process_id} {cfg.num_processes}".encode())
                call.settimeout(end - time.monotonic())
                problem = "it answers, but not all others have come"
                if call.recv(64) == _GO:
                    return
                raise UserError(
                    f"process {cfg.process_id}: process 0 at {cfg.coordinator} has ended, or another program listens "
                    f"there: see what process 0 says, or choose another port with --distributed.coordinator"
                )
        except TimeoutError:
            continue
        except OSError as e:
            problem = str(e)
        time.sleep(_PAUSE_S)
    raise UserError(
        f"process {cfg.process_id} cannot join process 0 at {cfg.coordinator} within {cfg.timeout_s} s ({problem}): "
        f"is it running, is the name one that this machine can resolve, and is the port open?"
    )


def _named(numbers: list[int]) -> str:
    return f"process{'es' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"
