"""One fixed batch, as often as an epoch has batches: the ceiling that no loader can pass.

Its images are noise, so a model trained on it has learnt nothing; it exists to measure.
"""

from collections.abc import Iterator
from typing import Any

import torch

from loaders.batch import Batch
from loaders.schedule import Schedule
from loaders.spec import LoaderSpec
from shards.folder import SplitReader


class SyntheticLoader:
    """Keeps the shapes, the number of batches and the state of a real loader, not its data.

    Labels and rows are those of the split's first samples, repeated to fill the batch.
    """

    def __init__(self, spec: LoaderSpec) -> None:
        reader = SplitReader(spec.shards, spec.split)
        self._schedule = Schedule(spec, len(reader))
        self._doubled = spec.flip == "both"
        self.samples = self._schedule.samples
        self.batches = self._schedule.batches
        size = spec.shards.manifest.size
        generator = torch.Generator().manual_seed(spec.seed)
        images = torch.randint(
            0, 256, (spec.batch_size, size, size, 1), dtype=torch.uint8, generator=generator
        )
        first = reader.read([n % len(reader) for n in range(spec.batch_size)] if len(reader) else [])
        self._batch = Batch(
            images.permute(0, 3, 1, 2).to(spec.device),
            torch.from_numpy(first.labels).to(spec.device),
            torch.from_numpy(first.rows).to(spec.device),
        )

    def __iter__(self) -> Iterator[Batch]:
        self._schedule.start()
        for slot in self._schedule.remaining():
            count = len(slot.positions) * (2 if self._doubled else 1)
            self._schedule.hand_out()
            yield Batch(*(tensor[:count] for tensor in self._batch))
        self._schedule.finish()

    def __enter__(self) -> "SyntheticLoader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """See Loader."""
        return self._schedule.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See Loader."""
        self._schedule.load_state_dict(state)

    def close(self) -> None:
        """See Loader; there is nothing to free."""
