"""How long the step waits for data: the figure that says whether the loader or the model is the limit."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


class DataWait:
    """Iterates over batches and counts the seconds spent waiting for them."""

    def __init__(self) -> None:
        self.waited = 0.0
        """Seconds inside the loader."""
        self._begun = time.perf_counter()

    def over(self, batches: Iterable[Item]) -> Iterator[Item]:
        """Yield the items of `batches`, timing each wait."""
        iterator = iter(batches)
        while True:
            start = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self.waited += time.perf_counter() - start
            yield item

    @property
    def seconds(self) -> float:
        """Seconds since this object was made."""
        return time.perf_counter() - self._begun

    @property
    def share(self) -> float:
        """Data wait: the share of the time so far that was spent waiting, 0..1."""
        return self.waited / max(self.seconds, 1e-9)
