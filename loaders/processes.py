"""Worker processes of torch's DataLoader: started quietly, missed when killed or hung, gone when closed."""

import contextlib
import errno
import os
import resource
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import click
import torch
from torch.utils.data import DataLoader

from shards.errors import ResourceMissing

PATIENCE = 120.0
"""Seconds without a batch after which a process has hung. Reading a batch takes milliseconds, and starting
with Python's imports some seconds."""
_POLL = 5.0  # seconds, after which it is looked whether all processes live: torch's own period
# Counted with 1 to 8 processes: at most 12 open files and 5 for each process, here as well as in each.
_FILES, _FILES_A_PROCESS = 16, 8


class Workers:
    """The processes of a DataLoader, started when they are needed first and after close().

    `make` returns the DataLoader. It should have persistent workers, the context spawn, since the caller
    may have threads (DALI, torch), which do not survive a fork, and a generator of its own, so that
    iterating draws nothing from the one that a run resumes. Each process opens so many `files` of its own.
    """

    def __init__(self, make: "Callable[[], DataLoader[Any]]", name: str, files: int) -> None:
        self._make = make
        self._name = name
        self._files = files
        self._loader: DataLoader[Any] | None = None
        self._iterator: Any = None

    def epoch(self) -> Iterator[Any]:
        """Start the processes, or drop what they still have of an epoch left early, and yield theirs.

        An error that they yield is raised. Raises ResourceMissing within seconds when one of them is killed,
        after PATIENCE when one hangs, and where files or shared memory do not suffice.
        """
        try:
            with _quiet_start():
                self._start()
            for item in self._iterator:
                if isinstance(item, click.ClickException):
                    raise item
                yield item
        except (RuntimeError, OSError, EOFError) as error:
            missing = self._missing(error)
            if missing is None:
                raise
            self.close()
            raise missing from error

    def close(self) -> None:
        """End the processes and wait for them."""
        if self._iterator is not None:
            # DataLoader has no public close, and waiting for its destructor is no promise.
            self._iterator._shutdown_workers()
        self._loader = self._iterator = None

    def _start(self) -> None:
        if self._loader is None:
            loader = self._make()
            self._check_files(loader.num_workers)
            loader.timeout = PATIENCE
            self._loader = loader
        self._iterator = iter(self._loader)
        self._iterator._try_get_data = _in_polls(type(self._iterator)._try_get_data, self._iterator)

    def _check_files(self, workers: int) -> None:
        # A process that cannot open another file on its way to send a batch loses it without a word.
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        needed = len(os.listdir("/dev/fd")) + _FILES + _FILES_A_PROCESS * workers + self._files
        if limit != resource.RLIM_INFINITY and needed > limit:
            raise ResourceMissing(
                f"the loader {self._name} needs {needed} open files with {workers} processes, and may have "
                f"{limit}: raise the limit with ulimit -n 4096, or take fewer --threads"
            )

    def _missing(self, error: Exception) -> ResourceMissing | None:
        # What an error of DataLoader is for the user; None: none of those that are known.
        text = str(error)
        if text.startswith("DataLoader timed out"):
            hung = self._awaited()
            for process in hung:
                process.kill()  # a stopped process does not heed the gentler signal
            named = " or ".join(str(process.pid) for process in hung)
            return ResourceMissing(
                f"process {named} of the loader {self._name} sent nothing for {PATIENCE:.0f} s and was "
                "ended: it was stopped, or the disk with the shards does not answer. Check the disk, and run "
                "the same command again"
            )
        code = error.errno if isinstance(error, OSError) else None
        if code in (errno.EMFILE, errno.ENFILE) or text.startswith("Too many open files"):
            return ResourceMissing(
                f"the loader {self._name} cannot open another file: raise the limit with ulimit -n 4096, or "
                "take fewer --threads"
            )
        if code == errno.ENOSPC:
            return no_shared_memory(self._name)
        # All but the first come from fetching what a process shared just before it was killed.
        if text.startswith("DataLoader worker") or isinstance(
            error, (ConnectionError, EOFError, FileNotFoundError)
        ):
            return ResourceMissing(
                f"a process of the loader {self._name} was killed: out of memory, or of shared memory "
                "(/dev/shm; docker run --shm-size 1g)? Free some and run the same command again"
            )
        return None

    def _awaited(self) -> list[Any]:
        # The process whose turn it is, or all where nothing has been asked of them yet.
        asked = self._iterator._task_info.get(self._iterator._rcvd_idx)
        workers: list[Any] = self._iterator._workers
        return workers if asked is None else [workers[asked[0]]]


def ignore_interrupts(_worker: int) -> None:
    """Begin a worker: Ctrl-C reaches every process of a terminal, but it is the parent's to unwind."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def no_shared_memory(name: str) -> ResourceMissing:
    """Return the error of a loader that finds /dev/shm full."""
    return ResourceMissing(
        f"the loader {name} has no room left in shared memory (/dev/shm): free some, start the container "
        "with docker run --shm-size 1g, or take fewer --threads or a smaller --batch-size"
    )


def share(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Move a tensor to shared memory; raise ResourceMissing where the loader of this name finds no room."""
    try:
        return tensor.share_memory_()  # type: ignore[no-untyped-call,no-any-return]
    except RuntimeError as error:
        raise no_shared_memory(name) from error


def _in_polls(
    attempt: Callable[[Any, float], tuple[bool, Any]], iterator: Any
) -> Callable[[float], tuple[bool, Any]]:
    # Torch notices that a process was killed at the end of an attempt to get its data, which with a timeout
    # is one long attempt.
    def get(_timeout: float) -> tuple[bool, Any]:
        deadline = time.monotonic() + PATIENCE
        while True:
            left = deadline - time.monotonic()
            success, data = attempt(iterator, max(min(left, _POLL), 0.0))
            if success or left <= _POLL:
                return success, data

    return get


@contextlib.contextmanager
def _quiet_start() -> Iterator[None]:
    # torch's handler would raise in whatever the main thread is doing when a process dies, amid a
    # training step for example. Without it the death is noticed when the next batch is due.
    child_ended = getattr(signal, "SIGCHLD", None)  # not on Windows
    before = signal.getsignal(child_ended) if child_ended else None
    with warnings.catch_warnings():
        # More processes than cores are slow, but a resume may need them.
        warnings.filterwarnings("ignore", "This DataLoader will create")
        try:
            yield
        finally:
            if before is not None and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGCHLD, before)
