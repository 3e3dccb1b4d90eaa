"""Run tasks in worker processes that end with the command that started them."""

import concurrent.futures
import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from shards.errors import ResourceMissing

Task = TypeVar("Task")
Result = TypeVar("Result")

# Tasks begun for each worker before their results are taken, so that none waits while the caller
# is busy, with a disk for example.
_AHEAD = 4


def map_in_processes(
    work: Callable[[Task], Result], tasks: Sequence[Task], jobs: int
) -> Generator[tuple[Task, Result], None, None]:
    """Yield every task with its result, in order, from `jobs` processes.

    With one job or one task this process does the work. `work` and the tasks are pickled to the
    workers, which run at most _AHEAD tasks each before their results are taken, so the memory is
    bounded. Raises what `work` raises, and ResourceMissing when a worker is killed; tasks that
    were not begun are then dropped. A worker never outlives this process.
    """
    if jobs == 1 or len(tasks) < 2:
        yield from ((task, work(task)) for task in tasks)
        return
    jobs = min(jobs, len(tasks))
    # spawn: the caller may have threads (DALI, torch), which do not survive a fork.
    pool = concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _follow_parent)
    begun: deque[tuple[Task, concurrent.futures.Future[Result]]] = deque()
    rest = iter(tasks)
    try:
        for task in itertools.islice(rest, _AHEAD * jobs):
            begun.append((task, pool.submit(work, task)))
        while begun:
            task, future = begun.popleft()
            result = future.result()
            begun.extend((task, pool.submit(work, task)) for task in itertools.islice(rest, 1))
            yield task, result
    except BrokenProcessPool as error:
        raise ResourceMissing(
            "a worker process was killed (out of memory?); run the same command again, "
            "with --jobs 1 in the least memory"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _follow_parent() -> None:
    # Ctrl-C reaches every process of a terminal; it is the parent's to unwind.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A worker that outlived a killed command would work on beside the command that is run next.
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
