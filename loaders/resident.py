"""The resident loader: every image decoded once and held in memory; a batch is a gather.

A gray image of 224 px is 50 KB, NIH's whole train split 3.8 GB: that fits into most GPUs and into any
workstation. After the first decoding an epoch costs a gather and the flips.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch

from loaders.collate import BufferPool, collate, prefetch_to_device
from loaders.loader import Batch, Loader
from loaders.memory import SharedMemory, pick_device, remove_stale, shared_bytes, stale_bytes
from loaders.spec import LoaderSpec
from shards.console import progress_bar
from shards.errors import ResourceMissing

# Of the free memory, what one split may take: train and val together leave a fifth.
SHARE = 0.4
_CPU = torch.device("cpu")
_DECODE_BATCH = 256
_DIGITS = 32  # of the manifest's digest, in the names of shared memory


def resident_device(spec: LoaderSpec) -> tuple[torch.device | None, str]:
    """Return where a split's images fit, the spec's device, else the host, else None; and the figures."""
    needed = spec.shards.manifest.splits[spec.split].images * spec.shards.manifest.size**2
    # What killed runs left is removed when the loader is made; what the first rank took, it took for all.
    reclaimable = stale_bytes(spec.shards.digest[:_DIGITS])
    if spec.world_size > 1:
        reclaimable += shared_bytes(_shared_name(spec))
    device, figures = pick_device(needed, spec.device, SHARE, reclaimable=reclaimable)
    return device, f"the decoded {spec.split} split {figures}"


class ResidentLoader(Loader):
    """Keeps the contract of `Loader`; see there.

    `make_decoding` makes the loader that decodes the split, once, when the first epoch begins. The images
    stay on the spec's device where they take at most SHARE of its free memory, else on the host, where
    the ranks of one machine share them; ResourceMissing is raised where they fit in neither. What killed
    runs left in shared memory is removed.
    """

    def __init__(self, spec: LoaderSpec, make_decoding: Callable[[LoaderSpec], Loader]) -> None:
        remove_stale(spec.shards.digest[:_DIGITS])
        device, figures = resident_device(spec)
        if device is None:
            raise ResourceMissing(f"the loader resident has no room: {figures}; take --loader dali")
        self._rows = spec.shards.rows(spec.split)
        super().__init__(spec, len(self._rows))
        self._shape = (len(self._rows), spec.shards.manifest.size, spec.shards.manifest.size)
        self._make_decoding = make_decoding
        self._device = device
        self._buffers = BufferPool()
        self._images: torch.Tensor | None = None
        self._labels = torch.empty(0)
        self._shared: SharedMemory | None = None

    def _epoch(self) -> Iterator[Batch]:
        return prefetch_to_device(self._batches(), self._spec.device)

    def _batches(self) -> Iterator[Batch]:
        images = self._resident_images()
        rows = torch.from_numpy(self._rows).to(self._device, non_blocking=True)
        is_there = self._device == self._spec.device
        for indices in self._sampler.remaining():
            positions = torch.from_numpy(indices.positions).to(self._device, non_blocking=True)
            like = images[: len(positions)]
            # Pinned where it is copied to a GPU from the host.
            chosen = self._buffers.empty_like(like) if is_there else torch.empty_like(like, pin_memory=True)
            torch.index_select(_as_int64(images), 0, positions, out=_as_int64(chosen))
            labels, batch_rows = self._labels.index_select(0, positions), rows.index_select(0, positions)
            yield collate(chosen, labels, batch_rows, indices, self._spec)

    def close(self) -> None:
        """See Loader; decodes anew when it is iterated again."""
        self._images = None
        if self._shared is not None:
            self._shared.close()
            self._shared = None

    def _resident_images(self) -> torch.Tensor:
        # uint8 [N, S, S].
        if self._images is None:
            if self._device == _CPU and self._spec.world_size > 1:
                # The first rank decodes, the others wait for it.
                self._shared = SharedMemory(_shared_name(self._spec), math.prod(self._shape), self._decode_into)
                self._images = torch.from_numpy(self._shared.memory).view(self._shape)
            else:
                self._images = torch.empty(self._shape, dtype=torch.uint8, device=self._device)
                self._decode_into(self._images)
            # Those of entries.csv, with which the loader that decoded has compared the shards'.
            labels = self._spec.shards.labels(self._spec.split)
            # This waits until the images are decoded, whatever stream the next epoch gathers on.
            self._labels = torch.from_numpy(labels).to(self._device)
        return self._images

    def _decode_into(self, memory: torch.Tensor | npt.NDArray[np.uint8]) -> None:
        images, spec = torch.as_tensor(memory).view(self._shape), self._spec
        alone = self._device == _CPU  # else every rank fills its own GPU at the same time
        once = LoaderSpec(
            spec.shards,
            spec.split,
            _DECODE_BATCH,
            self._device,
            training=False,
            local_world_size=1 if alone else spec.local_world_size,
            threads=spec.threads,
        )
        start = 0
        quiet = not alone and spec.rank > 0
        with (
            self._make_decoding(once) as loader,
            progress_bar(len(images), f"decoding {spec.split}", "img", disable=quiet) as bar,
        ):
            for batch in loader:
                end = start + len(batch.images)
                images[start:end] = batch.images[:, 0]
                start = end
                bar.update(len(batch.images))


def _shared_name(spec: LoaderSpec) -> str:
    return f"{spec.shards.digest[:_DIGITS]}-{spec.split}"


def _as_int64(images: torch.Tensor) -> torch.Tensor:
    # [n, S * S / 8] of int64 over the same memory: gathered 1.6 times as fast as bytes are.
    flat = images.flatten(1)
    return flat.view(torch.int64) if flat.shape[1] % 8 == 0 else flat
