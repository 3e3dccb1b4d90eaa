"""The dataloader loader: torch's DataLoader over the shards, tuned; the fall-back without DALI.

Persistent worker processes each fetch and decode a whole batch as uint8 gray; memory is pinned, and the
model normalises. The order comes from `EpochSampler`, so it does not depend on the number of workers.
"""

import dataclasses
from collections.abc import Iterator

import click
from torch.utils.data import Dataset

from loaders.loader import Batch, Loader
from loaders.spec import LoaderSpec
from loaders.worker_pool import Decoded, WorkerPool, decode_batch
from shards.errors import ResourceMissing
from shards.folder import ShardFolder, SplitReader

NAME = "dataloader"


class TorchLoader(Loader):
    """Keeps the contract of `Loader`; see there.

    The workers start at the first iteration, which takes seconds, and stay until close(); one that is
    killed raises ResourceMissing. Each has torch in its memory, and two batches in shared memory.
    """

    def __init__(self, spec: LoaderSpec) -> None:
        super().__init__(spec, len(spec.shards.rows(spec.split)))
        images = DecodedImages(spec.shards, spec.split)
        files = len(spec.shards.manifest.shards_of(spec.split))
        self._pool = WorkerPool(NAME, images, spec, self._sampler, files, batch_sampler=self._sampler)

    def _epoch(self) -> Iterator[Batch]:
        return self._pool.batches()

    def close(self) -> None:
        """See Loader; no worker is left."""
        self._pool.close()


class DecodedImages(Dataset[Decoded | click.ClickException]):
    """One split, decoded by position, a batch at a time.

    Workers get it without files and table: each opens the shards at its first batch. An error is returned,
    not raised, since DataLoader would wrap it in a traceback.
    """

    def __init__(self, shards: ShardFolder, split: str) -> None:
        self._shards = dataclasses.replace(shards)  # a copy has not read the table of entries
        self._split = split
        self._reader: SplitReader | None = None

    def __getitems__(self, positions: list[int]) -> Decoded | click.ClickException:
        """Return the samples at these positions, or what is wrong with one of them."""
        try:
            if self._reader is None:
                self._reader = SplitReader(dataclasses.replace(self._shards), self._split)
            samples = self._reader.read(positions)
            reader, size = self._reader, self._shards.manifest.size
            images = decode_batch(samples.images, size, lambda n: reader.name(positions[n]), NAME)
            return Decoded(images, samples.labels, samples.rows)
        except click.ClickException as error:
            return error
        except OSError as error:
            return ResourceMissing(f"{self._shards.path} cannot be read: {error}")
