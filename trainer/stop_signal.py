"""SIGINT and SIGTERM: finish the step in progress, save the run, exit; a second one exits without saving.

The training loop (trainer.loop) looks at the signal after each optimizer step, all batches of its gradient
accumulation included, and then saves a checkpoint. Validation, caching, compiling and downloads are abandoned at once,
with several ranks at the next batch, and decoding before the first batch at once on every rank, as soon as a loader's
worker processes have started. What was trained since the last checkpoint is saved; before the first step there is
nothing to save. The exit code is 143 for SIGTERM and 130 for SIGINT. A repeat within 3 s is ignored; a later one
restores the previous handlers and is raised again: the process ends without saving, and the last checkpoint stands.
"""

import itertools
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

from shards.processes import handled_signals
from trainer.distributed import SINGLE_PROCESS, Distributed

Item = TypeVar("Item")
_SAME_REQUEST = 3.0  # seconds


class Stopped(BaseException):
    """A signal ended what was in progress.

    Not an Exception, as KeyboardInterrupt is none, so that no library takes it for a failure of its own.
    """


class StopSignal:
    """Holds the signal that asked to stop, if any; see `agreed` and `interruptible`."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._raises = False

    @property
    def exit_code(self) -> int:
        """130 for SIGINT, 143 for SIGTERM, as shells count them."""
        return 128 + (self.signal or 0)

    def agreed(self, dist: Distributed, *, save: bool = False) -> tuple[bool, bool]:
        """Return whether any rank got a signal, and whether rank 0 wants to `save`.

        All ranks must call this, and follow the answer alone: a signal that came since counts next time.
        """
        number, due = dist.all_reduce_max(self.signal or 0, save and dist.is_rank_zero)
        if number:
            self.signal = number
        return bool(number), bool(due)

    def receive(self, number: int) -> None:
        """Take in a signal: it is held, and within `interruptible` raised as Stopped."""
        self.signal = number
        if self._raises:
            raise Stopped

    @contextmanager
    def interruptible(self, dist: Distributed = SINGLE_PROCESS) -> Iterator[None]:
        """Raise Stopped within this on a signal, also on one that came before.

        With several ranks the signal is held, since others may wait for this one in the meantime.
        """
        before, self._raises = self._raises, self._raises or dist.size == 1
        try:
            if self._raises and self.signal is not None:
                raise Stopped
            yield
        finally:
            self._raises = before

    def interruptible_start(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items; making the first, which may decode a whole split, is interruptible."""
        iterator = iter(items)
        with self.interruptible():
            first = list(itertools.islice(iterator, 1))
        yield from first
        yield from iterator


@contextmanager
def handle_signals() -> Iterator[StopSignal]:
    """Hold the first SIGINT or SIGTERM, ignore repeats within 3 s, and let a later one end the process.

    Ctrl-C reaches all processes of a terminal, and the ranks of torchrun a second time, from torchrun: hence the
    3 s. A signal that the parent set to be ignored stays ignored.
    """
    stop, first, before = StopSignal(), 0.0, handled_signals()

    def receive(number: int, _frame: FrameType | None) -> None:
        nonlocal first
        if stop.signal is None:
            first = time.monotonic()
            stop.receive(number)
        elif time.monotonic() - first >= _SAME_REQUEST:
            restore()
            signal.raise_signal(number)

    def restore() -> None:
        for each, handler in before.items():
            signal.signal(each, handler)

    for each in before:
        signal.signal(each, receive)
    try:
        yield stop
    finally:
        restore()
