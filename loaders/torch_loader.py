"""The dataloader loader: torch's DataLoader over the shards, tuned; the fall-back without DALI.

Persistent worker processes each fetch and decode a whole batch as uint8 gray; memory is pinned, and the
model normalises. The order comes from `EpochSampler`, so it does not depend on the number of workers.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import click
import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset, default_collate

from loaders.collate import collate
from loaders.loader import Batch, Loader
from loaders.prefetch import prefetch_to_device
from loaders.sampler import BatchIndices
from loaders.spec import LoaderSpec
from loaders.worker_pool import WorkerPool, no_shared_memory
from shards.errors import BadData, ResourceMissing
from shards.folder import ShardFolder, SplitReader
from shards.pixels import decode_sample
from shards.processes import available_cores

try:
    # One core decodes 5.9 thousand JPEGs/s of 224 px with it, 4.4 with Pillow (PNGs 1.7 and 1.5), to
    # the same pixels. torchvision 0.29 announces its removal; where it is gone, Pillow decodes.
    from torchvision.io import ImageReadMode, decode_image
except ImportError:
    decode_image = None

NAME = "dataloader"
PREFETCH = 2  # batches each worker decodes ahead: torch's own default


class Decoded(NamedTuple):
    """One decoded batch on its way from a worker process."""

    images: torch.Tensor
    """uint8 [n, S, S], in shared memory."""
    # Arrays, for every tensor would keep a file descriptor open for as long as somebody holds it.
    labels: npt.NDArray[np.uint8]
    """[n, 14]."""
    rows: npt.NDArray[np.int32]
    """[n]."""


class DecodedImages(Dataset[Decoded | click.ClickException]):
    """One split, decoded by position, a batch at a time.

    Workers get it without memory maps and table: each opens the shards at its first batch. An error is
    returned, not raised, since DataLoader would wrap it in a traceback.
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


class TorchLoader(Loader):
    """Keeps the contract of `Loader`; see there.

    The workers start at the first iteration, which takes seconds, and stay until close(); one that is
    killed raises ResourceMissing. Each has torch in its memory, and PREFETCH batches in shared memory.
    """

    def __init__(self, spec: LoaderSpec) -> None:
        super().__init__(spec, len(spec.shards.rows(spec.split)))
        self._ahead = _Positions()
        files = len(spec.shards.manifest.shards_of(spec.split))
        threads = spec.threads or available_cores()
        self._pool = WorkerPool(
            DecodedImages(spec.shards, spec.split),
            NAME,
            max(min(threads, self.batches), 1),
            files,
            batch_sampler=self._ahead,
            prefetch_factor=PREFETCH,
            pin_memory=spec.device.type == "cuda",
        )

    def _epoch(self) -> Iterator[Batch]:
        return prefetch_to_device(self._batches(), self._spec.device)

    def _batches(self) -> Iterator[Batch]:
        # The same indices twice: DataLoader sends them to the workers a few batches ahead.
        self._ahead.batches, remaining = itertools.tee(self._sampler.remaining())
        for indices, decoded in zip(remaining, self._pool.epoch(), strict=True):
            labels, rows = torch.from_numpy(decoded.labels), torch.from_numpy(decoded.rows)
            yield collate(decoded.images, labels, rows, indices, self._spec)

    def close(self) -> None:
        """See Loader; no worker is left."""
        self._pool.close()


class _Positions:
    """The positions of the batches to come, for DataLoader to send to its workers."""

    batches: Iterator[BatchIndices] = iter(())

    def __iter__(self) -> Iterator[list[int]]:
        return (indices.positions.tolist() for indices in self.batches)


def decode_batch(
    encoded: Sequence[npt.NDArray[np.uint8]], size: int, name_of: Callable[[int], str], loader: str
) -> torch.Tensor:
    """Decode to uint8 [n, size, size] in shared memory, for a worker process to send.

    Raises BadData with `name_of` the first that does not decode, ResourceMissing where shared memory is full.
    """
    images = []
    for index, data in enumerate(encoded):
        try:
            images.append(decode_gray(data, size))
        except (RuntimeError, ValueError) as error:
            raise BadData(f"{name_of(index)} does not decode; pack again") from error
    try:
        batch: torch.Tensor = default_collate(images)  # in shared memory, since this is a worker
    except RuntimeError as error:
        raise no_shared_memory(loader) from error
    return batch


def decode_gray(encoded: npt.NDArray[np.uint8], size: int) -> torch.Tensor:
    """Decode one encoded image to uint8 [size, size]; RuntimeError or ValueError where it is none."""
    if not decode_image:
        return torch.from_numpy(decode_sample(encoded.tobytes(), size).copy())
    image: torch.Tensor = decode_image(torch.from_numpy(encoded.copy()), ImageReadMode.GRAY)[0]
    if image.shape != (size, size):
        raise ValueError(f"{tuple(image.shape)} pixels instead of {size}")
    return image
