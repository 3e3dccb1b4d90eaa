"""Worker processes that decode batches: they end cleanly, with a named error when one dies or hangs."""

import atexit
import contextlib
import errno
import itertools
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import resource
import signal
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import click
import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from loaders.collate import collate, prefetch_to_device
from loaders.loader import Batch
from loaders.sampler import EpochSampler
from loaders.spec import LoaderSpec
from shards.errors import BadData, ResourceMissing
from shards.pixels import decode_sample
from shards.processes import available_cores, deferred_signals, follow_parent

try:
    # One core decodes 5.9 thousand JPEGs/s of 224 px with it, 4.4 with Pillow (PNGs 1.7 and 1.5), to
    # the same pixels. torchvision 0.29 announces its removal; where it is gone, Pillow decodes.
    from torchvision.io import ImageReadMode, decode_image
except ImportError:
    decode_image = None

PATIENCE = 120.0
"""Seconds without a batch after which a process has hung. Reading a batch takes milliseconds, and starting
with Python's imports some seconds."""
_LOOK = 0.5  # seconds between two looks at how long a batch has been waited for
# Counted with 1 to 8 processes: at most 12 open files and 5 for each process, here as well as in each.
_FILES, _FILES_A_PROCESS = 16, 8


class Decoded(NamedTuple):
    """One decoded batch on its way from a worker process."""

    images: torch.Tensor
    """uint8 [n, S, S], in shared memory."""
    # Arrays, for every tensor would keep a file descriptor open for as long as somebody holds it.
    labels: npt.NDArray[np.uint8]
    """[n, F]."""
    rows: npt.NDArray[np.int32]
    """[n]."""


class WorkerPool:
    """The processes of a DataLoader over a dataset, started at the first epoch and again after close().

    They stay from epoch to epoch. All are forked from one server, which has imported torch for them and has none of
    the caller's threads (DALI, torch), which do not survive a fork; a generator of their own leaves alone the one that
    a run resumes.

    Args:
        name: the loader's name, for messages.
        dataset: what each process gets a copy of. It yields `Decoded`, or a ClickException as the last item.
        spec: the loader's. Its threads, else the cores, are the number of processes, at most one per batch.
        sampler: the loader's.
        files: how many files each process opens.
        options: further options of DataLoader.
    """

    def __init__(
        self,
        name: str,
        dataset: Dataset[Decoded | click.ClickException],
        spec: LoaderSpec,
        sampler: EpochSampler,
        files: int,
        **options: Any,
    ) -> None:
        self.workers = max(1, min(spec.threads or available_cores(), sampler.batches))
        self._name = name
        self._dataset = dataset
        self._spec = spec
        self._sampler = sampler
        self._files = files
        self._options = options
        self._loader: DataLoader[Any] | None = None
        self._iterator: Any = None
        self._hung: list[int] = []  # processes that were ended, since they sent nothing
        _POOLS.add(self)

    def batches(self) -> Iterator[Batch]:
        """Start the processes, or discard what they have of an epoch left early, and yield the epoch's batches.

        An error among them is raised. Raises ResourceMissing within seconds when one of them is killed,
        after PATIENCE when one hangs, and where files or shared memory do not suffice.
        """
        return prefetch_to_device(self._collated(), self._spec.device)

    def close(self) -> None:
        """End the processes and wait for them."""
        if self._iterator is not None:
            # DataLoader has no public close, and waiting for its destructor is no promise.
            workers = self._iterator._workers
            self._iterator._shutdown_workers()
            for process in workers:
                if process.is_alive():  # it hangs, and SIGTERM is blocked
                    process.kill()
        self._loader = self._iterator = None

    def _collated(self) -> Iterator[Batch]:
        for indices, decoded in zip(self._sampler.remaining(), self._decoded(), strict=True):
            labels, rows = torch.from_numpy(decoded.labels), torch.from_numpy(decoded.rows)
            yield collate(decoded.images, labels, rows, indices, self._spec)

    def _decoded(self) -> Iterator[Decoded]:
        watchdog = _Watchdog(self._end_hung)
        try:
            with watchdog.waiting(), _quiet_start():
                self._start()
            while True:
                with watchdog.waiting():
                    item = next(self._iterator, None)
                if item is None:
                    return
                if isinstance(item, click.ClickException):
                    raise item
                yield item
        except (RuntimeError, OSError, EOFError) as error:
            missing = self._missing(error)
            if missing is None:
                raise
            self.close()
            raise missing from error
        finally:
            watchdog.over.set()

    def _start(self) -> None:
        if self._loader is not None:
            self._iterator = iter(self._loader)
            return
        self._check_files()
        self._hung = []
        # Stopped in between, the server would begin processes that nobody knows.
        with deferred_signals():
            _start_fork_server()
            self._loader = DataLoader(
                self._dataset,
                num_workers=self.workers,
                collate_fn=_identity,
                worker_init_fn=_begin_worker,
                multiprocessing_context="forkserver",
                generator=torch.Generator(),
                persistent_workers=True,
                pin_memory=self._spec.device.type == "cuda",
                **self._options,
            )
            others = set(multiprocessing.active_children())
            try:
                self._iterator = iter(self._loader)
            except BaseException:
                for process in set(multiprocessing.active_children()) - others:
                    process.kill()
                raise

    def _check_files(self) -> None:
        # A process that cannot open another file on its way to send a batch loses it without a word.
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        needed = len(os.listdir("/dev/fd")) + _FILES + _FILES_A_PROCESS * self.workers + self._files
        if limit != resource.RLIM_INFINITY and needed > limit:
            raise ResourceMissing(
                f"the loader {self._name} needs {needed} open files with {self.workers} processes, and may "
                f"have {limit}: raise the limit with ulimit -n 4096, or take fewer --threads"
            )

    def _end_hung(self) -> None:
        iterator = self._iterator
        if iterator is None:
            return
        processes, task = iterator._workers, iterator._task_info.get(iterator._rcvd_idx)
        # The one whose turn it is, or all where none has a task yet.
        self._hung = [process.pid for process in ([processes[task[0]]] if task else processes)]
        for process in processes:
            process.kill()  # a stopped process does not heed the gentler signal

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


_POOLS: "weakref.WeakSet[WorkerPool]" = weakref.WeakSet()


# Before multiprocessing waits for them: it sends SIGTERM first, which they have blocked.
@atexit.register
def _close_pools() -> None:
    for pool in list(_POOLS):
        pool.close()


class _Watchdog:
    """Calls `bite` when a `waiting` block takes longer than PATIENCE, until `over` is set.

    DataLoader's own timeout ends waiting for a message, not fetching the memory that it names: that asks
    the process which sent it, and one that is stopped never answers. Once killed, it is missed.
    """

    def __init__(self, bite: Callable[[], None]) -> None:
        self._bite = bite
        self._looks: Iterator[int] | None = None
        self.over = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        self._looks = itertools.count(1)  # a counter of its own, so that no wait inherits another's
        try:
            yield
        finally:
            self._looks = None

    def _watch(self) -> None:
        # Looks are counted, not seconds: a run that was stopped (Ctrl-Z, a scheduler) waited for nothing meanwhile.
        while not self.over.wait(_LOOK):
            looks = self._looks
            if looks is not None and next(looks) * _LOOK > PATIENCE:
                self._looks = None
                self._bite()


def _identity(batch: Any) -> Any:
    return batch


def _start_fork_server() -> None:
    multiprocessing.set_forkserver_preload([__name__])
    # Ctrl-C reaches every process of a terminal, and scancel's SIGTERM every process of a job; but they are the
    # parent's to handle. The server inherits this, and its workers from it.
    multiprocessing.resource_tracker.ensure_running()  # whose start would unblock them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker(_worker: int) -> None:
    follow_parent()
    warnings.filterwarnings("ignore", "The image decoding and encoding", DeprecationWarning)  # torchvision's


@contextlib.contextmanager
def _quiet_start() -> Iterator[None]:
    # torch's handler would raise in whatever the main thread is doing when a process dies, amid a
    # training step for example. Without it the death is noticed when the next batch is due.
    before = signal.getsignal(signal.SIGCHLD)
    with warnings.catch_warnings():
        # More processes than cores are slow, but a resume may need them.
        warnings.filterwarnings("ignore", "This DataLoader will create")
        try:
            yield
        finally:
            if before is not None and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGCHLD, before)


def no_shared_memory(name: str) -> ResourceMissing:
    """Return the error of a loader that finds /dev/shm full."""
    return ResourceMissing(
        f"the loader {name} has no room left in shared memory (/dev/shm): free some, start the container "
        "with docker run --shm-size 1g, or take fewer --threads or a smaller --batch-size"
    )


def decode_batch(
    encoded: Sequence[npt.NDArray[np.uint8]], size: int, name_of: Callable[[int], str], loader: str
) -> torch.Tensor:
    """Decode to uint8 [n, size, size] in shared memory, for a worker process to send.

    Raises BadData with `name_of` the first that does not decode, ResourceMissing where shared memory is full.
    """
    images = []
    for index, data in enumerate(encoded):
        try:
            images.append(decode_gray(data, size))
        except (RuntimeError, ValueError) as error:
            raise BadData(f"{name_of(index)} does not decode; pack again") from error
    try:
        batch: torch.Tensor = default_collate(images)  # in shared memory, since this is a worker
    except RuntimeError as error:
        raise no_shared_memory(loader) from error
    return batch


def decode_gray(encoded: npt.NDArray[np.uint8], size: int) -> torch.Tensor:
    """Decode one encoded image to uint8 [size, size]; RuntimeError or ValueError where it is none."""
    if not decode_image:
        return torch.from_numpy(decode_sample(encoded.tobytes(), size).copy())
    image: torch.Tensor = decode_image(torch.from_numpy(encoded.copy()), ImageReadMode.GRAY)[0]
    if image.shape != (size, size):
        raise ValueError(f"{tuple(image.shape)} pixels instead of {size}")
    return image
