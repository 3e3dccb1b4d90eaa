"""Worker processes: tasks done by several at once, which end with the command that started them."""

import concurrent.futures
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from shards.errors import ResourceMissing

Task = TypeVar("Task")
Result = TypeVar("Result")


def map_in_processes(
    work: Callable[[Task], Result], tasks: Sequence[Task], jobs: int
) -> Iterator[tuple[Task, Result]]:
    """Yield every task with its result, as they are done, from `jobs` processes.

    With one job or one task this process does the work, in order. `work` and the tasks are
    pickled to the workers. Raises what `work` raises, and ResourceMissing when a worker is
    killed; tasks that were not begun are then dropped. A worker never outlives this process.
    """
    if jobs == 1 or len(tasks) < 2:
        yield from ((task, work(task)) for task in tasks)
        return
    # spawn: the caller may have threads (DALI, torch), which do not survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(min(jobs, len(tasks)), context, _follow_parent)
    try:
        futures = {pool.submit(work, task): task for task in tasks}
        for future in concurrent.futures.as_completed(futures):
            yield futures[future], future.result()
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
