"""The DALI loader: encoded bytes in our order through DALI's decoder, on a GPU or a CPU.

The order comes from `EpochSampler` and the bytes from the shards; DALI gets them through
`external_source` and decodes ahead in its own threads. DALI's webdataset reader decodes at the same
rate, but its permutation is uniform only with a buffer as large as the split, depends on its history,
and needs DALI's own checkpoints to resume; here the order is a function of (seed, epoch) and the state
two numbers.
"""

import collections
import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.utils.dlpack
from nvidia.dali.pipeline import Pipeline

from loaders.collate import BufferPool, collate
from loaders.decoder import PREFETCH, choose_decoder, decoding_pipeline
from loaders.loader import Batch, Loader
from loaders.sampler import BatchIndices
from loaders.spec import LoaderSpec
from shards.errors import BadData
from shards.folder import Samples, SplitReader
from shards.pixels import decode_sample


class _InFlight(NamedTuple):
    """A batch that DALI is decoding."""

    epoch: int
    batch: int
    indices: BatchIndices
    samples: Samples


class DaliLoader(Loader):
    """Keeps the contract of `Loader`; see there.

    Memory: the shards stay in the page cache; a few batches are held, encoded and decoded. At the end of
    an epoch the first batches of the next are already being decoded.
    """

    def __init__(self, spec: LoaderSpec) -> None:
        self._reader = SplitReader(spec.shards, spec.split)
        super().__init__(spec, len(self._reader))
        self._buffers = BufferPool()
        self._size = spec.shards.manifest.size
        self._ahead: Iterator[tuple[int, int, BatchIndices]] = iter(())
        self._in_flight: collections.deque[_InFlight] = collections.deque()
        self._pipeline: Pipeline | None = None

    def _epoch(self) -> Iterator[Batch]:
        sampler = self._sampler
        while sampler.batch < self.batches:
            # Read anew each time: somebody else may have iterated, or loaded another state.
            pipeline = self._run_to(sampler.epoch, sampler.batch)
            images = self._decoded(pipeline)
            current = self._in_flight.popleft()
            labels, rows = torch.from_numpy(current.samples.labels), torch.from_numpy(current.samples.rows)
            with _one_torch_thread() if self._spec.augment == "none" else contextlib.nullcontext():
                images = images[..., 0]
                into = self._buffers.empty_like(images)
                batch = collate(images, labels, rows, current.indices, self._spec, into)
            pipeline.release_outputs()
            pipeline.schedule_run()
            yield batch

    def close(self) -> None:
        """See Loader."""
        self._pipeline = None
        self._in_flight.clear()

    def _run_to(self, epoch: int, batch: int) -> Pipeline:
        # Return the pipeline, whose next output is this batch.
        if self._pipeline is None:
            decoder = choose_decoder(self._spec, self._reader)
            self._pipeline = decoding_pipeline(self._next_encoded, self._spec.batch_size, decoder, self._spec.device)
        while self._in_flight and self._in_flight[0][:2] != (epoch, batch):
            self._pipeline.share_outputs()
            self._pipeline.release_outputs()
            self._in_flight.popleft()
        if not self._in_flight:
            self._ahead = self._sampler.iter_ahead()
        while len(self._in_flight) < PREFETCH:
            self._pipeline.schedule_run()
        return self._pipeline

    def _next_encoded(self) -> list[Any]:
        # Called by DALI when it has room for a batch.
        epoch, batch, indices = next(self._ahead)
        samples = self._reader.read(indices.positions)
        self._in_flight.append(_InFlight(epoch, batch, indices, samples))
        return samples.images

    def _decoded(self, pipeline: Pipeline) -> torch.Tensor:
        # [n, S, S, 1] in DALI's memory, valid until release_outputs.
        try:
            # On a GPU the outputs are bound to torch's stream: DALI reuses their memory only after
            # what torch has queued on it, and nothing waits on the host.
            gpu = self._spec.device.type == "cuda"
            stream = torch.cuda.current_stream(self._spec.device) if gpu else None
            (images,) = pipeline.share_outputs(cuda_stream=stream)
            decoded = torch.utils.dlpack.from_dlpack(images.as_tensor())
            if list(decoded.shape[1:]) != [self._size, self._size, 1]:
                raise ValueError(f"images decode to {list(decoded.shape[1:])}")
            # Images decoded on the host are copied now, since DALI writes the next batch to their memory;
            # into pinned memory, so that the host waits neither for the copy from there nor for the step.
            if gpu and decoded.device.type == "cpu":
                decoded = decoded.pin_memory()
            return decoded.to(self._spec.device, non_blocking=True)
        except (RuntimeError, ValueError) as error:
            # One bad image ends a DALI pipeline; name it, and build a new pipeline at the next iteration.
            culprit = self._undecodable()
            self.close()
            if culprit is None:
                raise
            raise BadData(f"{culprit} does not decode; pack again") from error

    def _undecodable(self) -> str | None:
        for each in self._in_flight:
            for position, image in zip(each.indices.positions.tolist(), each.samples.images, strict=True):
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
