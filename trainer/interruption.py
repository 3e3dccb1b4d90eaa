"""SIGINT and SIGTERM as a request that the loop looks at between steps, so that it can save first."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from trainer.distributed import Team


class Interruption:
    """Holds the signal that asked to stop, if any."""

    def __init__(self) -> None:
        self.signal: int | None = None

    @property
    def exit_code(self) -> int:
        """130 for SIGINT, 143 for SIGTERM, as shells count them."""
        return 128 + (self.signal or 0)

    def agreed(self, team: Team, *, save: bool = False) -> tuple[bool, bool]:
        """Return whether any rank was asked to stop, and whether the writer wants to `save`.

        All ranks must ask, and then go by the answer alone: a signal that has come since counts next time.
        """
        number, due = team.agree(self.signal or 0, save and team.writes)
        if number:
            self.signal = number
        return bool(number), bool(due)


@contextmanager
def listen() -> Iterator[Interruption]:
    """Catch the first SIGINT or SIGTERM; a second one has its usual effect."""
    request = Interruption()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _frame: FrameType | None) -> None:
        request.signal = number
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        restore()
