"""One rank's batches of a split: as many as every other rank has, so that all take every step together."""

from collections.abc import Iterator
from dataclasses import dataclass

from loaders import Batch, Loader


@dataclass(frozen=True)
class ShardedLoader:
    """The loader of one rank, and the number of batches that all ranks share.

    The loaders of n ranks give rank r every n-th sample of one order, so batch k of all ranks together
    holds exactly the images of batch k of a single process with the whole batch size.
    """

    loader: Loader
    samples: int
    """Images an epoch on all ranks, mirrors counted."""
    batch_size: int
    """Images a batch on all ranks together."""
    empty_batch: Batch
    """For a rank whose images are used up."""

    @property
    def batches(self) -> int:
        """Batches an epoch: the same on every rank."""
        return -(-self.samples // self.batch_size)

    def iter_from(self, images: int) -> Iterator[tuple[int, Batch]]:
        """Yield (images on all ranks, this rank's batch) for the batches after so many images.

        The loader advances to the next epoch when this is exhausted, and not before.
        """
        own = iter(self.loader)
        for number in range(-(-images // self.batch_size), self.batches):
            batch = next(own) if number < self.loader.batches else self.empty_batch
            yield min(self.batch_size, self.samples - number * self.batch_size), batch
        for _ in own:
            raise RuntimeError("a loader has more batches than it says")
