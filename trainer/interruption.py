"""SIGINT and SIGTERM as a request that is looked at where the run can be saved, and soon enough."""

import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

from torch import nn

from shards.signals import heeded
from trainer.distributed import Team

Item = TypeVar("Item")
_SAME_REQUEST = 3.0  # seconds


class Stopped(BaseException):
    """What was under way was given up since a signal asked for it; nothing of it is to be kept.

    Not an Exception, as KeyboardInterrupt is none, so that no library takes it for a failure of its own.
    """


class Interruption:
    """Holds the signal that asked to stop, if any.

    Most code looks at it now and then, by `agreed`. What can take longer than that and leaves nothing
    half done stands in `at_once`.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._raises = False

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

    def note(self, number: int) -> None:
        """Take in a signal: it is held, and within `at_once` raised as Stopped."""
        self.signal = number
        if self._raises:
            raise Stopped

    @contextmanager
    def at_once(self, really: bool = True) -> Iterator[None]:
        """Let a signal raise Stopped wherever Python is within this, also one that came before it.

        Only where no other rank waits for this one in the meantime. Where not `really`, it is only held.
        """
        if not really:
            yield
            return
        before, self._raises = self._raises, True
        try:
            if self.signal is not None:
                raise Stopped
            yield
        finally:
            self._raises = before

    def fetching(self, items: Iterable[Item], really: Callable[[], bool] = lambda: True) -> Iterator[Item]:
        """Yield the items, each of which is fetched `at_once`: making the first may take a minute.

        `really` is asked before each.
        """
        iterator = iter(items)
        while True:
            with self.at_once(really()):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item


def let_signals_in(model: nn.Module) -> None:
    """Have Python look for signals within a backward pass on a CPU, after each weight's gradient.

    Otherwise it does so only when the pass is over, which for a large batch takes longer than a run that
    is told to stop has time.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.device.type == "cpu":
            parameter.register_post_accumulate_grad_hook(lambda _: None)  # type: ignore[no-untyped-call]


@contextmanager
def listen() -> Iterator[Interruption]:
    """Catch the first SIGINT or SIGTERM; a second one, three seconds later or more, has its usual effect.

    One sooner is the same request again: a Ctrl-C reaches all processes of a terminal, and the ranks of
    torchrun then a second time, from torchrun. One that the parent set to be ignored stays ignored.
    """
    request, first = Interruption(), 0.0
    before = heeded()

    def note(number: int, _frame: FrameType | None) -> None:
        nonlocal first
        if request.signal is None:
            first = time.monotonic()
            request.note(number)
        elif time.monotonic() - first >= _SAME_REQUEST:
            restore()
            signal.raise_signal(number)

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        restore()
