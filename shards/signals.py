"""Graceful exit on SIGINT and SIGTERM: one line and the exit code that shells expect."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

from shards.console import echo


def heeded() -> dict[signal.Signals, Any]:
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

    For the main thread. Signals that follow the first are ignored while the block unwinds,
    which must be short. A signal that was ignored when the command started stays so.
    """

    def stop(number: int, _frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise _Stopped(number)

    before = heeded()
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
