"""The resident loader: every image decoded once, kept as bytes in memory, gathered batch by batch.

A gray image of 224 px is 50 KB, NIH's whole train split 3.8 GB: that fits into most GPUs and into any
workstation. From then on an epoch costs a gather and the flips: an exact permutation as always.
"""

import contextlib
import fcntl
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from loaders.batch import Batch
from loaders.buffers import HostBuffers
from loaders.finishing import finish
from loaders.memory import free_memory
from loaders.registry import Loader
from loaders.scheduled import ScheduledLoader
from loaders.spec import LoaderSpec
from shards.errors import ResourceMissing
from shards.folder import SplitReader
from shards.manifest import NAME as MANIFEST
from shards.progress import progress_bar
from shards.publishing import publish

# Of the free memory, the share that one split may take: train and val together leave a fifth.
SHARE = 0.4
_CPU = torch.device("cpu")
_DECODED_AT_ONCE = 256


def place_for(spec: LoaderSpec) -> tuple[torch.device | None, str]:
    """Return where a split's images fit: the spec's device, else the host, else None; and the figures."""
    needed = spec.shards.manifest.splits[spec.split].images * spec.shards.manifest.size**2
    figures = f"the decoded {spec.split} split takes {_gib(needed)}"
    for device in dict.fromkeys((spec.device, _CPU)):
        free = free_memory(device)
        figures += f", {SHARE:.0%} of what is free on {device} are {_gib(SHARE * free)}"
        if needed <= SHARE * free:
            return device, figures
    return None, figures


class ResidentLoader(ScheduledLoader):
    """Keeps the contract of `Loader`; see there.

    `decoding` makes the loader that decodes the split, once, when the first epoch begins. The images
    are kept on the spec's device where they take at most SHARE of its free memory, else on the host,
    where the ranks of one machine share them; ResourceMissing is raised where they fit in neither.
    """

    def __init__(self, spec: LoaderSpec, decoding: Callable[[LoaderSpec], Loader]) -> None:
        place, figures = place_for(spec)
        if place is None:
            raise ResourceMissing(f"the loader resident has no room: {figures}; take --loader dali")
        self._reader = SplitReader(spec.shards, spec.split)
        super().__init__(spec, len(self._reader))
        self._decoding = decoding
        self._place = place
        self._buffers = HostBuffers()
        self._images: torch.Tensor | None = None
        self._labels = torch.empty(0)
        self._shared: Path | None = None

    def _epoch(self) -> Iterator[Batch]:
        images = self._resident_images()
        rows = torch.from_numpy(self._reader.rows).to(self._place)
        for slot in self._schedule.remaining():
            positions = torch.from_numpy(slot.positions).to(self._place, non_blocking=True)
            chosen = images.index_select(0, positions)
            if self._place != self._spec.device:
                chosen = chosen.pin_memory()
            labels, its_rows = self._labels.index_select(0, positions), rows.index_select(0, positions)
            yield finish(chosen, labels, its_rows, slot, self._spec, self._buffers)

    def close(self) -> None:
        """See Loader; a closed loader decodes anew when it is iterated."""
        self._images = None
        if self._shared is not None:
            self._shared.unlink(missing_ok=True)
            self._shared = None

    def _resident_images(self) -> torch.Tensor:
        # uint8 [N, S, S] where they are kept.
        if self._images is None:
            size = self._spec.shards.manifest.size
            shape = (len(self._reader), size, size)
            if self._place == _CPU and self._spec.world_size > 1:
                self._images = self._of_all_ranks(shape)
            else:
                self._images = torch.empty(shape, dtype=torch.uint8, device=self._place)
                self._decode_into(self._images)
            labels = self._reader.read(range(len(self._reader))).labels
            self._labels = torch.from_numpy(labels).to(self._place)
        return self._images

    def _decode_into(self, images: torch.Tensor) -> None:
        told = replace(
            self._spec, batch_size=_DECODED_AT_ONCE, device=self._place, training=False, flip="none",
            augment="none", rank=0, world_size=1,
        )  # fmt: skip
        start = 0
        with (
            self._decoding(told) as loader,
            progress_bar(len(images), f"decoding {self._spec.split}", "img") as bar,
        ):
            for batch in loader:
                end = start + len(batch.images)
                images[start:end] = batch.images[:, 0]
                start = end
                bar.update(len(batch.images))

    def _of_all_ranks(self, shape: tuple[int, int, int]) -> torch.Tensor:
        # One file in shared memory for all ranks of this machine: the first to come decodes into it,
        # the others wait. One left behind by a killed run is whole, and the next run takes it up.
        name = f"cxrapid-{os.getuid()}-{self._spec.shards.digest[:32]}-{self._spec.split}"
        path = _shared_memory() / name
        with _alone(self._spec.shards.path / MANIFEST):
            if not (path.is_file() and path.stat().st_uid == os.getuid()):
                with publish(path) as partial:
                    # Memory is taken now or not at all: a page that is missing later ends the process.
                    with partial.open("wb") as file:
                        os.posix_fallocate(file.fileno(), 0, math.prod(shape))
                    images = np.memmap(partial, np.uint8, "r+", shape=shape)
                    self._decode_into(torch.from_numpy(images))
        self._shared = path
        return torch.from_numpy(np.memmap(path, np.uint8, "r+", shape=shape))


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    # One process at a time; the lock ends with the process, however that ends.
    with lock.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _shared_memory() -> Path:
    memory = Path("/dev/shm")
    return memory if memory.is_dir() else Path(tempfile.gettempdir())


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
