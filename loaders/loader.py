"""The contract of every loader, as the base class that keeps it, and the loader that decodes nothing."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import torch

from loaders.sampler import EpochSampler
from loaders.spec import LoaderSpec

Self = TypeVar("Self", bound="Loader")


class Batch(NamedTuple):
    """N samples on the target device, flipped but not normalised."""

    images: torch.Tensor
    """uint8 [N, 1, S, S], channels-last, gray levels 0..255."""
    labels: torch.Tensor
    """uint8 [N, F] in the order of the manifest's findings, 0 or 1."""
    rows: torch.Tensor
    """int32 [N]: the row of each sample in entries.csv."""


class Loader(ABC):
    """An iterable of batches, one epoch at a time, for use in a `with`. A subclass only makes the batches.

    Training: every sample of the split exactly once per epoch, in a uniform permutation of the
    whole split drawn from (seed, epoch); webdataset permutes less finely, see loaders.web, and
    synthetic repeats one batch. Evaluation: row order, every sample exactly once.
    The last batch is short where the numbers do not divide. Iterating again after leaving a
    training epoch early continues where it was left; evaluation starts anew.

    `state_dict()` between two batches, loaded into a loader of the same spec, continues with
    the same bits. Loading it with another manifest, split, batch size, flip, augmentation, seed
    or world size, or in evaluation instead of training, raises CannotResume. Iterating raises
    BadData naming a sample that is not the packed one, or does not decode.
    """

    samples: int
    """Images per epoch on this rank, mirrors counted."""
    batches: int
    """Batches per epoch on this rank."""

    def __init__(self, spec: LoaderSpec, samples: int) -> None:
        self._spec = spec
        self._sampler = EpochSampler(spec, samples)
        self.samples = self._sampler.samples
        self.batches = self._sampler.batches

    @abstractmethod
    def _epoch(self) -> Iterator[Batch]:
        """Yield the remaining batches of this epoch; called only where there are any."""

    def __iter__(self) -> Iterator[Batch]:
        self._sampler.start()
        if self._sampler.batch < self.batches:
            for batch in self._epoch():
                self._sampler.advance()
                yield batch
        self._sampler.next_epoch()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Return what load_state_dict needs to continue after the last batch yielded."""
        return self._sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved position."""
        self._sampler.load_state_dict(state)

    def close(self) -> None:  # noqa: B027  (not every loader holds something)
        """Free processes, threads and memory; a closed loader starts again when it is iterated."""


class SyntheticLoader(Loader):
    """One fixed batch of noise, repeated: for benchmarks, the ceiling that no loader can pass.

    Shapes, the number of batches and the state are those of a real loader. Labels and rows are those of the
    split's first samples, repeated to fill the batch.
    """

    def __init__(self, spec: LoaderSpec) -> None:
        rows, labels = spec.shards.rows(spec.split), spec.shards.labels(spec.split)
        super().__init__(spec, len(rows))
        size = spec.shards.manifest.size
        generator = torch.Generator().manual_seed(spec.seed)
        images = torch.randint(0, 256, (spec.batch_size, size, size, 1), dtype=torch.uint8, generator=generator)
        first = [n % len(rows) for n in range(spec.batch_size)] if len(rows) else []
        self._batch = Batch(
            images.permute(0, 3, 1, 2).to(spec.device),
            torch.from_numpy(labels[first]).to(spec.device),
            torch.from_numpy(rows[first]).to(spec.device),
        )

    def _epoch(self) -> Iterator[Batch]:
        for indices in self._sampler.remaining():
            count = len(indices.positions) * self._spec.copies
            yield Batch(*(tensor[:count] for tensor in self._batch))
