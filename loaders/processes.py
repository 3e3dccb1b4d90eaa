"""Worker processes of torch's DataLoader: started quietly, missed when killed, gone when closed."""

import contextlib
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch.utils.data import DataLoader

from shards.errors import ResourceMissing

Item = TypeVar("Item")


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

        Raises ResourceMissing within seconds when one of them is killed.
        """
        try:
            with _quiet_start():
                if self._loader is None:
                    self._loader = self._make()
                self._iterator = iter(self._loader)
            yield from self._iterator
        except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
            # All but the first come from fetching what a process shared just before it was killed.
            if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):
                raise
            self.close()
            raise ResourceMissing(
                f"a process of the loader {self._name} was killed: out of memory, or of shared memory "
                "(/dev/shm; docker run --shm-size 1g)? Free some and run the same command again"
            ) from error

    def close(self) -> None:
        """End the processes and wait for them."""
        if self._iterator is not None:
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
