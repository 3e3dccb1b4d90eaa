"""The DataLoader loader: torch's own, tuned; a strong baseline, and a way without DALI.

What a good engineer would write with torch.utils.data alone: worker processes that stay, a whole
batch fetched and decoded as uint8 gray at a time, pinned memory, normalisation left to the model.
The order comes from `Schedule`, so it does not depend on the number of workers.
"""

import dataclasses
import itertools
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import click
import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from loaders.batch import Batch
from loaders.finishing import finish
from loaders.own_stream import beside_the_step
from loaders.processes import Workers, ignore_interrupts, no_shared_memory
from loaders.schedule import Slot
from loaders.scheduled import ScheduledLoader
from loaders.spec import LoaderSpec
from shards.cores import available_cores
from shards.errors import BadData, ResourceMissing
from shards.folder import ShardFolder, SplitReader
from shards.pixels import decode_sample

try:
    # One core decodes 5.9 thousand JPEGs/s of 224 px with it, 4.4 with Pillow (PNGs 1.7 and 1.5), to
    # the same pixels. torchvision 0.29 announces its removal; where it is gone, Pillow decodes.
    from torchvision.io import ImageReadMode, decode_image
except ImportError:
    decode_image = None

NAME = "dataloader"
PREFETCH = 2  # batches each worker decodes ahead: torch's own default


class Decoded(NamedTuple):
    """What a worker sends: uint8 [n, S, S] in shared memory, the rest in the message itself."""

    images: torch.Tensor
    # Arrays, for every tensor would keep a file descriptor open for as long as somebody holds it.
    labels: npt.NDArray[np.uint8]
    rows: npt.NDArray[np.int32]


class DecodedImages(Dataset[Decoded | click.ClickException]):
    """One split, decoded by position, whole batches at a time.

    It is sent to the workers without memory maps and table: each opens the shards at its first batch.
    An error is returned, not raised, for DataLoader would wrap it in a traceback.
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
            images = []
            for position, encoded in zip(positions, samples.images, strict=True):
                try:
                    images.append(decode_gray(encoded, self._shards.manifest.size))
                except (RuntimeError, ValueError):
                    return BadData(f"{self._reader.name(position)} does not decode; pack again")
            try:
                return Decoded(default_collate(images), samples.labels, samples.rows)  # in shared memory
            except RuntimeError:
                return no_shared_memory(NAME)
        except click.ClickException as error:
            return error
        except OSError as error:
            return ResourceMissing(f"{self._shards.path} cannot be read: {error}")


class TunedDataLoader(ScheduledLoader):
    """Keeps the contract of `Loader`; see there.

    The workers start with the first iteration, which takes seconds, and stay until close(); one that is
    killed raises ResourceMissing. Each has torch in its memory, and PREFETCH batches in shared memory.
    """

    def __init__(self, spec: LoaderSpec) -> None:
        super().__init__(spec, len(spec.shards.rows(spec.split)))
        self._ahead = _Positions()
        files = len(spec.shards.manifest.shards_of(spec.split))
        self._workers = Workers(self._make_loader, NAME, files)

    def _epoch(self) -> Iterator[Batch]:
        return beside_the_step(self._batches(), self._spec.device)

    def _batches(self) -> Iterator[Batch]:
        # The same slots twice: the workers are told of them a few batches before they are handed out.
        self._ahead.slots, slots = itertools.tee(self._schedule.remaining())
        for slot, decoded in zip(slots, self._workers.epoch(), strict=True):
            labels, rows = torch.from_numpy(decoded.labels), torch.from_numpy(decoded.rows)
            yield finish(decoded.images, labels, rows, slot, self._spec)

    def close(self) -> None:
        """See Loader; no worker is left. A closed loader starts again when it is iterated."""
        self._workers.close()

    def _make_loader(self) -> "DataLoader[Decoded | click.ClickException]":
        threads = self._spec.threads or available_cores()
        return DataLoader(
            DecodedImages(self._spec.shards, self._spec.split),
            batch_sampler=self._ahead,
            num_workers=max(min(threads, self.batches), 1),
            collate_fn=_as_it_is,
            pin_memory=self._spec.device.type == "cuda",
            worker_init_fn=_begin_worker,
            multiprocessing_context="spawn",
            generator=torch.Generator(),
            prefetch_factor=PREFETCH,
            persistent_workers=True,
        )


class _Positions:
    """The positions of the batches to come, for DataLoader to send to its workers."""

    slots: Iterator[Slot] = iter(())

    def __iter__(self) -> Iterator[list[int]]:
        return (slot.positions.tolist() for slot in self.slots)


def decode_gray(encoded: npt.NDArray[np.uint8], size: int) -> torch.Tensor:
    """Decode one encoded image to uint8 [size, size]; RuntimeError or ValueError where it is none."""
    if not decode_image:
        return torch.from_numpy(decode_sample(encoded.tobytes(), size).copy())
    image: torch.Tensor = decode_image(torch.from_numpy(encoded.copy()), ImageReadMode.GRAY)[0]
    if image.shape != (size, size):
        raise ValueError(f"{tuple(image.shape)} pixels instead of {size}")
    return image


def _as_it_is(decoded: Any) -> Any:
    return decoded


def _begin_worker(number: int) -> None:
    ignore_interrupts(number)
    warnings.filterwarnings("ignore", "The image decoding and encoding", DeprecationWarning)
