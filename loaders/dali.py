"""The DALI loader: encoded bytes in our order through DALI's decoder, on a GPU or a CPU.

The order comes from `Schedule` and the bytes from the shards; DALI gets them
through `external_source` and decodes ahead in its own threads. Its webdataset reader was the
other choice. Both decoded at the same rate when they were compared, but the reader's permutation is
uniform only with a buffer as large as the split, depends on its history, and needs DALI's own
checkpoints to resume; here the order is a function of (seed, epoch) and the state two numbers.
"""

import collections
import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.utils.dlpack
from nvidia.dali.pipeline import Pipeline

from loaders.batch import Batch
from loaders.buffers import HostBuffers
from loaders.decoding import PREFETCH, choose_decoder, decoding_pipeline
from loaders.finishing import finish
from loaders.schedule import Slot
from loaders.scheduled import ScheduledLoader
from loaders.spec import LoaderSpec
from shards.errors import BadData
from shards.folder import Samples, SplitReader
from shards.pixels import decode_sample


class _UnderWay(NamedTuple):
    """A batch that DALI has been given."""

    epoch: int
    batch: int
    slot: Slot
    samples: Samples


class DaliLoader(ScheduledLoader):
    """Keeps the contract of `Loader`; see there.

    Memory: the shards stay in the page cache; a few batches are held, encoded and decoded. At the end of
    an epoch the first batches of the next are on their way already.
    """

    def __init__(self, spec: LoaderSpec) -> None:
        self._reader = SplitReader(spec.shards, spec.split)
        super().__init__(spec, len(self._reader))
        self._buffers = HostBuffers()
        self._size = spec.shards.manifest.size
        self._upcoming: Iterator[tuple[int, int, Slot]] = iter(())
        self._under_way: collections.deque[_UnderWay] = collections.deque()
        self._pipeline: Pipeline | None = None

    def _epoch(self) -> Iterator[Batch]:
        schedule = self._schedule
        while schedule.batch < self.batches:
            # Looked at anew each time: somebody else may have iterated, or loaded another state.
            self._run_to(schedule.epoch, schedule.batch)
            images = self._decoded()
            given = self._under_way.popleft()
            labels, rows = torch.from_numpy(given.samples.labels), torch.from_numpy(given.samples.rows)
            with _one_torch_thread() if self._spec.augment == "none" else contextlib.nullcontext():
                images = images[..., 0]
                batch = finish(images, labels, rows, given.slot, self._spec, self._buffers.like(images))
            self._running.release_outputs()
            self._running.schedule_run()
            yield batch

    def close(self) -> None:
        """See Loader; a closed loader starts again when it is iterated."""
        self._pipeline = None
        self._under_way.clear()

    @property
    def _running(self) -> Pipeline:
        assert self._pipeline is not None
        return self._pipeline

    def _run_to(self, epoch: int, batch: int) -> None:
        # Let the pipeline run, with this batch as the next to come out.
        if self._under_way and (self._under_way[0].epoch, self._under_way[0].batch) != (epoch, batch):
            self._drain()
        if self._pipeline is None:
            decoder = choose_decoder(self._spec, self._reader)
            self._pipeline = decoding_pipeline(
                self._next_encoded, self._spec.batch_size, decoder, self._spec.device
            )
        if not self._under_way:
            self._upcoming = self._schedule.upcoming()
        while len(self._under_way) < PREFETCH:
            self._pipeline.schedule_run()

    def _next_encoded(self) -> list[Any]:
        # Called by DALI when it has room for a batch.
        epoch, batch, slot = next(self._upcoming)
        samples = self._reader.read(slot.positions)
        self._under_way.append(_UnderWay(epoch, batch, slot, samples))
        return samples.images

    def _decoded(self) -> torch.Tensor:
        # [n, S, S, 1] in DALI's memory, valid until release_outputs.
        try:
            # On a GPU the outputs are bound to torch's stream: DALI reuses their memory only after
            # what torch has queued on it, and nothing waits on the host.
            gpu = self._spec.device.type == "cuda"
            stream = torch.cuda.current_stream(self._spec.device) if gpu else None
            (images,) = self._running.share_outputs(cuda_stream=stream)
            decoded = torch.utils.dlpack.from_dlpack(images.as_tensor())
            if list(decoded.shape[1:]) != [self._size, self._size, 1]:
                raise ValueError(f"images decode to {list(decoded.shape[1:])}")
            # What was decoded on the host is copied at once, for DALI writes the next batch to its memory;
            # into pinned memory, so that the host waits neither for the copy from there nor for the step.
            if gpu and decoded.device.type == "cpu":
                decoded = decoded.pin_memory()
            return decoded.to(self._spec.device, non_blocking=True)
        except (RuntimeError, ValueError) as error:
            # One bad image ends a DALI pipeline; say which it was, and build anew if asked again.
            culprit = self._undecodable()
            self.close()
            if culprit is None:
                raise
            raise BadData(f"{culprit} does not decode; pack again") from error

    def _drain(self) -> None:
        # What is under way is taken out and dropped.
        while self._pipeline is not None and self._under_way:
            self._pipeline.share_outputs()
            self._pipeline.release_outputs()
            self._under_way.popleft()

    def _undecodable(self) -> str | None:
        for given in self._under_way:
            for position, image in zip(given.slot.positions.tolist(), given.samples.images, strict=True):
                try:
                    decode_sample(image.tobytes(), self._size)
                except ValueError:
                    return self._reader.name(position)
        return None


@contextlib.contextmanager
def _one_torch_thread() -> Iterator[None]:
    # OpenMP's threads spin for milliseconds when torch is done with them, on cores that DALI decodes
    # on: 7.2 instead of 9.4 thousand images/s on two cores.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
