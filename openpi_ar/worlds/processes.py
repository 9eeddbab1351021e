"""Episodes recorded by several processes at the same time."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
import multiprocessing
from typing import TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


def map_in_processes(
    function: Callable[[Job], Result], jobs: Sequence[Job], workers: int, chunk: int = 1
) -> Iterator[Result]:
    """`map(function, jobs)` by that many processes, `chunk` jobs sent at a time; fewer than two: by this process."""
    if workers < 2:
        yield from map(function, jobs)
        return
    # Never fork: the parent may hold a GL context, or the threads of an accelerator runtime.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(function, jobs, chunksize=chunk)
