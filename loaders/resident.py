"""The resident loader: every image decoded once, kept as bytes in memory, gathered batch by batch.

A gray image of 224 px is 50 KB, NIH's whole train split 3.8 GB: that fits into most GPUs and into any
workstation. From then on an epoch costs a gather and the flips: an exact permutation as always.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from loaders.batch import Batch
from loaders.buffers import HostBuffers
from loaders.finishing import finish
from loaders.memory import free_memory, place_with_room
from loaders.own_stream import beside_the_step
from loaders.registry import Loader
from loaders.scheduled import ScheduledLoader
from loaders.shared_file import SharedFile, remove_unheld, shared_bytes
from loaders.spec import LoaderSpec
from shards.errors import ResourceMissing
from shards.progress import progress_bar

# Of the free memory, the share that one split may take: train and val together leave a fifth.
SHARE = 0.4
_CPU = torch.device("cpu")
_DECODED_AT_ONCE = 256
_DIGITS = 32  # of the manifest's digest, in the names of shared files


def pick_device(spec: LoaderSpec) -> tuple[torch.device | None, str]:
    """Return where a split's images fit: the spec's device, else the host, else None; and the figures."""
    needed = spec.shards.manifest.splits[spec.split].images * spec.shards.manifest.size**2
    remove_unheld(spec.shards.digest[:_DIGITS])  # what a killed run left would count as used

    def free(device: torch.device) -> float:
        # What the rank that came first has taken, it has taken for all.
        shared = device == _CPU and spec.world_size > 1
        return free_memory(device) + (shared_bytes(_shared_name(spec)) if shared else 0)

    place, figures = place_with_room(needed, spec.device, SHARE, free)
    return place, f"the decoded {spec.split} split {figures}"


class ResidentLoader(ScheduledLoader):
    """Keeps the contract of `Loader`; see there.

    `decoding` makes the loader that decodes the split, once, when the first epoch begins. The images
    are kept on the spec's device where they take at most SHARE of its free memory, else on the host,
    where the ranks of one machine share them; ResourceMissing is raised where they fit in neither.
    """

    def __init__(self, spec: LoaderSpec, decoding: Callable[[LoaderSpec], Loader]) -> None:
        place, figures = pick_device(spec)
        if place is None:
            raise ResourceMissing(f"the loader resident has no room: {figures}; take --loader dali")
        self._rows = spec.shards.rows(spec.split)
        super().__init__(spec, len(self._rows))
        self._shape = (len(self._rows), spec.shards.manifest.size, spec.shards.manifest.size)
        self._decoding = decoding
        self._place = place
        self._buffers = HostBuffers()
        self._images: torch.Tensor | None = None
        self._labels = torch.empty(0)
        self._shared: SharedFile | None = None

    def _epoch(self) -> Iterator[Batch]:
        return beside_the_step(self._batches(), self._spec.device)

    def _batches(self) -> Iterator[Batch]:
        images = self._resident_images()
        rows = torch.from_numpy(self._rows).to(self._place)
        for slot in self._schedule.remaining():
            positions = torch.from_numpy(slot.positions).to(self._place, non_blocking=True)
            chosen = self._memory_for(len(positions))
            torch.index_select(_in_words(images), 0, positions, out=_in_words(chosen))
            labels, its_rows = self._labels.index_select(0, positions), rows.index_select(0, positions)
            yield finish(chosen, labels, its_rows, slot, self._spec)

    def close(self) -> None:
        """See Loader; a closed loader decodes anew when it is iterated."""
        self._images = None
        if self._shared is not None:
            self._shared.close()
            self._shared = None

    def _memory_for(self, count: int) -> torch.Tensor:
        # uint8 [count, S, S] where the images are kept, pinned where they go on to a GPU from there.
        shape = (count, *self._shape[1:])
        if self._place == self._spec.device == _CPU:
            return self._buffers.shaped(shape)
        pinned = self._place != self._spec.device
        return torch.empty(shape, dtype=torch.uint8, device=self._place, pin_memory=pinned)

    def _resident_images(self) -> torch.Tensor:
        # uint8 [N, S, S] where they are kept.
        if self._images is None:
            if self._place == _CPU and self._spec.world_size > 1:
                self._images = self._of_all_ranks()
            else:
                self._images = torch.empty(self._shape, dtype=torch.uint8, device=self._place)
                self._decode_into(self._images)
            # Those of entries.csv, with which the loader that decoded has compared the shards'.
            labels = self._spec.shards.labels(self._spec.split)
            # This waits until what was decoded is there, for whatever stream the next epoch gathers on.
            self._labels = torch.from_numpy(labels).to(self._place)
        return self._images

    def _decode_into(self, images: torch.Tensor) -> None:
        told = replace(
            self._spec, batch_size=_DECODED_AT_ONCE, device=self._place, training=False, flip="none",
            augment="none", rank=0, world_size=1,
        )  # fmt: skip
        start = 0
        others_show = self._place != _CPU and self._spec.rank > 0  # every rank fills its own GPU
        with (
            self._decoding(told) as loader,
            progress_bar(len(images), f"decoding {self._spec.split}", "img", disable=others_show) as bar,
        ):
            for batch in loader:
                end = start + len(batch.images)
                images[start:end] = batch.images[:, 0]
                start = end
                bar.update(len(batch.images))

    def _of_all_ranks(self) -> torch.Tensor:
        # The first rank to come decodes, the others wait for it.
        def fill(memory: npt.NDArray[np.uint8]) -> None:
            self._decode_into(torch.from_numpy(memory).view(self._shape))

        self._shared = SharedFile(_shared_name(self._spec), math.prod(self._shape), fill)
        return torch.from_numpy(self._shared.memory).view(self._shape)


def _shared_name(spec: LoaderSpec) -> str:
    return f"{spec.shards.digest[:_DIGITS]}-{spec.split}"


def _in_words(images: torch.Tensor) -> torch.Tensor:
    # [n, S * S / 8] of int64 over the same memory: gathered 1.6 times as fast as bytes are.
    flat = images.flatten(1)
    return flat.view(torch.int64) if flat.shape[1] % 8 == 0 else flat
