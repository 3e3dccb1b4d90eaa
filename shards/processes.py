"""Processes: the cores they may use, a graceful exit on signals, and workers that end with their parent."""

import concurrent.futures
import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from types import FrameType
from typing import Any, TypeVar

from shards.console import echo
from shards.errors import ResourceMissing

Task = TypeVar("Task")
Result = TypeVar("Result")

# Tasks begun for each worker before their results are taken, so that none waits while the caller is busy.
_AHEAD = 4


def available_cores() -> int:
    """Return how many cores this process may use: on Linux those that taskset or a container allows, else all."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def handled_signals() -> dict[signal.Signals, Any]:
    """Return SIGINT and SIGTERM with their handlers, without one that the parent set to be ignored.

    A shell starts background jobs of a script with SIGINT ignored: Ctrl-C is then for others.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    return {number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN}


class _Stopped(BaseException):
    """Unwinds the stack, so that whatever is open is closed."""

    def __init__(self, number: int) -> None:
        self.number = number


@contextlib.contextmanager
def graceful_exit(advice: str) -> Iterator[None]:
    """Run the block; on SIGINT or SIGTERM unwind it, print `advice` and exit with 130 or 143.

    For the main thread. Signals that follow the first are ignored while the block unwinds, which must be short. A
    signal that was ignored when the command started stays ignored.
    """

    def stop(number: int, _frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise _Stopped(number)

    before = handled_signals()
    try:
        for each in before:
            signal.signal(each, stop)
        yield
    except _Stopped as stopped:
        echo(f"stopped by {signal.Signals(stopped.number).name}; {advice}", err=True)
        raise SystemExit(128 + stopped.number) from None
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextlib.contextmanager
def deferred_signals() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back while the block runs, which must be short; then handle them."""
    held: list[int] = []
    before = handled_signals() if threading.current_thread() is threading.main_thread() else {}
    try:
        for each in before:
            signal.signal(each, lambda number, _frame: held.append(number))
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
        for number in held:
            signal.raise_signal(number)


def map_in_processes(
    work: Callable[[Task], Result], tasks: Sequence[Task], jobs: int
) -> Generator[tuple[Task, Result], None, None]:
    """Yield every task with its result, in order, from `jobs` processes.

    With one job or one task this process does the work. `work` and the tasks are pickled to the workers, which run at
    most _AHEAD tasks each before their results are taken, so the memory is bounded. Raises what `work` raises, and
    ResourceMissing when a worker is killed; tasks not begun are then dropped. A worker never outlives this process.
    """
    if jobs == 1 or len(tasks) < 2:
        yield from ((task, work(task)) for task in tasks)
        return
    jobs = min(jobs, len(tasks))
    # spawn: the caller may have threads (DALI, torch), which do not survive a fork.
    pool = concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), follow_parent)
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


def follow_parent() -> None:
    """Have this worker process leave Ctrl-C to its parent, and end when the parent does."""
    # Ctrl-C reaches every process of a terminal; it is the parent's to unwind.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A worker that outlived a killed command would work on beside the command that is run next.
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
