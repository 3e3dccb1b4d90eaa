"""Step times and data wait: they tell whether loader or model is the bottleneck."""

import collections
import itertools
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch

Item = TypeVar("Item")


class DataWait:
    """Iterates over batches and measures how long the device waits for them.

    On a CPU that is the time inside the loader. A GPU runs behind the host, which may wait for a batch while the GPU
    still works, or hand over one whose copy has not arrived: there it is the time on the consumer's stream between
    the end of the step before and the batch, measured by events.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._waited = 0.0
        self._events: collections.deque[tuple[torch.cuda.Event, torch.cuda.Event]] = collections.deque()
        self._begun = time.perf_counter()

    def over(self, batches: Iterable[Item]) -> Iterator[Item]:
        """Yield the items of `batches`, timing each wait."""
        iterator, more = iter(batches), True
        while more:
            with self._timed():
                item = next(iterator, None)
            more = item is not None
            if item is not None:
                yield item

    @contextmanager
    def _timed(self) -> Iterator[None]:
        if self._device.type == "cuda":
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            stream = torch.cuda.current_stream(self._device)
            before.record(stream)
            yield
            after.record(stream)
            self._events.append((before, after))
        else:
            start = time.perf_counter()
            yield
            self._waited += time.perf_counter() - start

    @property
    def waited(self) -> float:
        """Seconds so far, on a GPU up to the batch that it has reached; waits for nothing."""
        while self._events and self._events[0][1].query():  # type: ignore[no-untyped-call]
            before, after = self._events.popleft()
            self._waited += before.elapsed_time(after) / 1e3
        return self._waited

    @property
    def seconds(self) -> float:
        """Seconds since this object was made."""
        return time.perf_counter() - self._begun

    @property
    def share(self) -> float:
        """Data wait: the share of the time so far that was spent waiting, 0..1."""
        return self.waited / max(self.seconds, 1e-9)


class StepTimes:
    """Times the distance between marks: by the clock on a CPU, by events on a GPU, which runs behind."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._clock: list[float] = []
        self._events: list[torch.cuda.Event] = []
        self.mark()

    def mark(self) -> None:
        """Note the end of a step; waits for nothing."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._device))
            self._events.append(event)
        else:
            self._clock.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """Return how long each step took. Waits for a GPU."""
        if self._device.type == "cuda":
            self._events[-1].synchronize()
            return [start.elapsed_time(end) for start, end in itertools.pairwise(self._events)]
        return [float(span) for span in 1e3 * np.diff(self._clock)]

    def percentile(self, *percents: float) -> list[float | None]:
        """Return these percentiles, 0..100, of `milliseconds`; None where no step was marked."""
        taken = self.milliseconds()
        return [float(np.percentile(taken, percent)) if taken else None for percent in percents]
