"""Step times and data wait: they tell whether loader or model is the bottleneck."""

import itertools
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np
import torch

Item = TypeVar("Item")


class DataWait:
    """Iterates over batches and counts the seconds spent waiting for them."""

    def __init__(self) -> None:
        self.waited = 0.0
        """Seconds inside the loader."""
        self._begun = time.perf_counter()

    def over(self, batches: Iterable[Item]) -> Iterator[Item]:
        """Yield the items of `batches`, timing each wait."""
        start = time.perf_counter()
        for item in batches:
            self.waited += time.perf_counter() - start
            yield item
            start = time.perf_counter()
        self.waited += time.perf_counter() - start

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
