"""Worker processes of torch's DataLoader that end cleanly, with a named error when one dies or hangs."""

import contextlib
import errno
import os
import resource
import signal
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import click
import torch
from torch.utils.data import DataLoader, Dataset

from shards.errors import ResourceMissing

PATIENCE = 120.0
"""Seconds without a batch after which a process has hung. Reading a batch takes milliseconds, and starting
with Python's imports some seconds."""
# Counted with 1 to 8 processes: at most 12 open files and 5 for each process, here as well as in each.
_FILES, _FILES_A_PROCESS = 16, 8


class WorkerPool:
    """The processes of a DataLoader over a dataset, started at the first epoch and again after close().

    They stay from epoch to epoch. Their context is spawn, since the caller may have threads (DALI, torch),
    which do not survive a fork; a generator of their own leaves alone the one that a run resumes.

    Args:
        dataset: what each process gets a copy of. It yields batches, or a ClickException as the last item.
        name: the loader's name, for messages.
        workers: the number of processes.
        files: how many files each process opens.
        options: further options of DataLoader.
    """

    def __init__(self, dataset: Dataset[Any], name: str, workers: int, files: int, **options: Any) -> None:
        self._dataset = dataset
        self._name = name
        self._workers = workers
        self._files = files
        self._options = options
        self._loader: DataLoader[Any] | None = None
        self._iterator: Any = None
        self._hung: list[int] = []  # processes that were ended, since they sent nothing

    def epoch(self) -> Iterator[Any]:
        """Start the processes, or discard what they have of an epoch left early, and yield their batches.

        An error among them is raised. Raises ResourceMissing within seconds when one of them is killed,
        after PATIENCE when one hangs, and where files or shared memory do not suffice.
        """
        try:
            with _quiet_start(), self._patience():
                self._start()
            while (item := self._next()) is not None:
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
            self._check_files()
            self._loader = DataLoader(
                self._dataset,
                num_workers=self._workers,
                collate_fn=_identity,
                worker_init_fn=_begin_worker,
                multiprocessing_context="spawn",
                generator=torch.Generator(),
                persistent_workers=True,
                **self._options,
            )
            self._hung = []
        self._iterator = iter(self._loader)

    def _next(self) -> Any:
        with self._patience():
            return next(self._iterator, None)

    @contextlib.contextmanager
    def _patience(self) -> Iterator[None]:
        # DataLoader's own timeout ends waiting for a message, not fetching the memory that it names: that
        # asks the process which sent it, and one that is stopped never answers. Once killed, it is missed.
        timer = threading.Timer(PATIENCE, self._end_hung)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _end_hung(self) -> None:
        self._hung = [process.pid for process in self._awaited()]
        for process in self._processes():
            process.kill()  # a stopped process does not heed the gentler signal

    def _check_files(self) -> None:
        # A process that cannot open another file on its way to send a batch loses it without a word.
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        needed = len(os.listdir("/dev/fd")) + _FILES + _FILES_A_PROCESS * self._workers + self._files
        if limit != resource.RLIM_INFINITY and needed > limit:
            raise ResourceMissing(
                f"the loader {self._name} needs {needed} open files with {self._workers} processes, and may "
                f"have {limit}: raise the limit with ulimit -n 4096, or take fewer --threads"
            )

    def _missing(self, error: Exception) -> ResourceMissing | None:
        # What an error of DataLoader is for the user; None: none of those that are known.
        text = str(error)
        if self._hung:
            return ResourceMissing(
                f"process {' or '.join(map(str, self._hung))} of the loader {self._name} sent nothing for "
                f"{PATIENCE:.0f} s and was ended: it was stopped, or the disk with the shards does not "
                "answer. Check the disk, and run the same command again"
            )
        code = error.errno if isinstance(error, OSError) else None
        if code in (errno.EMFILE, errno.ENFILE) or text.startswith("Too many open files"):
            return ResourceMissing(
                f"the loader {self._name} cannot open another file: raise the limit with ulimit -n 4096, or "
                "take fewer --threads"
            )
        if code == errno.ENOSPC:
            return no_shared_memory(self._name)
        # All but the first two come from fetching what a process shared just before it was killed.
        if text.startswith(("DataLoader worker", "Pin memory thread exited")) or isinstance(
            error, (ConnectionError, EOFError, FileNotFoundError)
        ):
            return ResourceMissing(
                f"a process of the loader {self._name} was killed: out of memory, or of shared memory "
                "(/dev/shm; docker run --shm-size 1g)? Free some and run the same command again"
            )
        return None

    def _awaited(self) -> list[Any]:
        # The process whose turn it is, or all where none has a task yet.
        if self._iterator is None or not (task := self._iterator._task_info.get(self._iterator._rcvd_idx)):
            return self._processes()
        return [self._processes()[task[0]]]

    def _processes(self) -> list[Any]:
        return list(self._iterator._workers) if self._iterator is not None else []


def _identity(batch: Any) -> Any:
    return batch


def _begin_worker(_worker: int) -> None:
    # Ctrl-C reaches every process of a terminal, but the parent handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.filterwarnings("ignore", "The image decoding and encoding", DeprecationWarning)  # torchvision's


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
