"""Worker processes of torch's DataLoader: started quietly, missed when killed, gone when closed."""

import contextlib
import errno
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader

from shards.errors import ResourceMissing

HANGS = 120.0
"""Seconds after which a process that gives nothing is given up: the `timeout` of the DataLoader."""
_TOO_MANY_FILES = ("Too many open files", "ancillary data")  # torch's words where it cannot share memory


class Workers:
    """The processes of a DataLoader, started when they are needed first and after close().

    `make` returns the DataLoader. It should have persistent workers, the context spawn, since the caller
    may have threads (DALI, torch), which do not survive a fork, and a generator of its own, so that
    iterating draws nothing from the one that a run resumes.
    """

    def __init__(self, make: "Callable[[], DataLoader[Any]]", name: str) -> None:
        self._make = make
        self._name = name
        self._loader: DataLoader[Any] | None = None
        self._iterator: Any = None

    def epoch(self) -> Iterator[Any]:
        """Start the processes, or drop what they still have of an epoch left early, and yield theirs.

        Raises ResourceMissing within seconds when one of them is killed, after HANGS seconds when one does
        nothing any more, and where there are too few files or too little memory for them.
        """
        try:
            with _quiet_start():
                if self._loader is None:
                    self._loader = self._make()
                self._iterator = iter(self._loader)
            yield from self._iterator
        except (RuntimeError, OSError, EOFError) as error:
            advice = self._advice(error)
            if advice is None:
                raise
            self.close(at_once=True)
            raise ResourceMissing(advice) from error

    def _advice(self, error: Exception) -> str | None:
        text = str(error)
        if text.startswith("DataLoader timed out"):
            return (
                f"process {self._late()} of the loader {self._name} gave nothing for {HANGS:g} s: it was "
                "stopped, or the disk of the shards does not answer; see to it and run the same command again"
            )
        if getattr(error, "errno", None) == errno.EMFILE or any(words in text for words in _TOO_MANY_FILES):
            return (
                f"the processes of the loader {self._name} have too many files open; allow more with "
                "`ulimit -n 4096`, or take --loader dali"
            )
        # All but the first come from fetching what a process shared just before it was killed.
        killed = isinstance(error, ConnectionError | EOFError | FileNotFoundError)
        if killed or text.startswith("DataLoader worker"):
            return (
                f"a process of the loader {self._name} was killed: out of memory, or of shared memory "
                "(/dev/shm; docker run --shm-size 1g)? Free some and run the same command again"
            )
        return None

    def _late(self) -> int | None:
        # The one whose batch is due; torch has no public name for it.
        number = self._iterator._task_info.get(self._iterator._rcvd_idx, (0,))[0]
        pid: int | None = self._iterator._workers[number].pid
        return pid

    def close(self, *, at_once: bool = False) -> None:
        """End the processes and wait for them; `at_once` those, too, that do not listen."""
        if self._iterator is not None:
            for worker in self._iterator._workers if at_once else ():
                worker.kill()
            # DataLoader has no public close, and waiting for its destructor is no promise.
            self._iterator._shutdown_workers()
        self._loader = self._iterator = None


def ignore_interrupts(_worker: int) -> None:
    """Begin a worker: Ctrl-C reaches every process of a terminal, but it is the parent's to unwind."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


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
