"""What every loader has in common: a schedule, and with it the order, the epochs and the state."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, TypeVar

from loaders.batch import Batch
from loaders.schedule import Schedule
from loaders.spec import LoaderSpec

Self = TypeVar("Self", bound="ScheduledLoader")


class ScheduledLoader(ABC):
    """Keeps the contract of `Loader`; see there. A subclass only makes the batches."""

    def __init__(self, spec: LoaderSpec, samples: int) -> None:
        self._spec = spec
        self._schedule = Schedule(spec, samples)
        self.samples = self._schedule.samples
        self.batches = self._schedule.batches

    @abstractmethod
    def _epoch(self) -> Iterator[Batch]:
        """Yield the batches of this epoch that have not been handed out."""

    def __iter__(self) -> Iterator[Batch]:
        self._schedule.start()
        for batch in self._epoch():
            self._schedule.hand_out()
            yield batch
        self._schedule.finish()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """See Loader."""
        return self._schedule.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See Loader."""
        self._schedule.load_state_dict(state)

    def close(self) -> None:  # noqa: B027  (not every loader holds something)
        """See Loader; a closed loader starts again when it is iterated. Here there is nothing to free."""
