"""The DALI loader: encoded bytes in our order through DALI's decoder, on a GPU or a CPU.

The order comes from `EpochSampler` and the bytes from the shards; DALI gets them through
`external_source` and decodes ahead in its own threads. DALI's webdataset reader decodes at the same
rate, but its permutation is uniform only with a buffer as large as the split, depends on its history,
and needs DALI's own checkpoints to resume; here the order is a function of (seed, epoch) and the state
two numbers.
"""

import collections
import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.utils.dlpack
from nvidia.dali.pipeline import Pipeline

from loaders.collate import collate
from loaders.decoder import PREFETCH, UNDECIDED, Decoder, choose_decoder, decoding_pipeline
from loaders.loader import Batch, Loader
from loaders.sampler import BatchIndices
from loaders.spec import LoaderSpec
from shards.errors import BadData, CannotResume
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

    On a GPU the state names the decoder, which is chosen at the first batch: decoders differ by one gray level.

    Memory: the shards stay in the page cache; a few batches are held, encoded and decoded. At the end of
    an epoch the first batches of the next are already being decoded.
    """

    def __init__(self, spec: LoaderSpec) -> None:
        self._reader = SplitReader(spec.shards, spec.split)
        super().__init__(spec, len(self._reader))
        self._size = spec.shards.manifest.size
        self._ahead: Iterator[tuple[int, int, BatchIndices]] = iter(())
        self._in_flight: collections.deque[_InFlight] = collections.deque()
        self._decoder = UNDECIDED
        self._pipeline: Pipeline | None = None

    def _epoch(self) -> Iterator[Batch]:
        sampler = self._sampler
        while sampler.batch < self.batches:
            # Read anew each time: somebody else may have iterated, or loaded another state.
            pipeline = self._run_to(sampler.epoch, sampler.batch)
            batch = self._collated(self._decoded(pipeline), self._in_flight.popleft())
            pipeline.release_outputs()
            pipeline.schedule_run()
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """See Loader."""
        state = super().state_dict()
        if self._spec.device.type == "cuda":
            state["decoder"] = dataclasses.asdict(self._decoder)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See Loader; on a GPU it also takes the decoder of the state, with the spec's threads if it names them."""
        super().load_state_dict(state)
        if self._spec.device.type != "cuda":
            return
        try:
            decoder = Decoder(**state["decoder"])
        except (KeyError, TypeError) as error:
            raise CannotResume("the loader's state does not fit: it names no decoder") from error
        if self._spec.threads:
            decoder = dataclasses.replace(decoder, threads=self._spec.threads)
        if decoder.device != UNDECIDED.device and decoder != self._decoder:
            self.close()
            self._decoder = decoder

    def close(self) -> None:
        """See Loader."""
        self._pipeline = None
        self._in_flight.clear()

    def _run_to(self, epoch: int, batch: int) -> Pipeline:
        # Return the pipeline, whose next output is this batch.
        if self._pipeline is None:
            if self._decoder == UNDECIDED:
                self._decoder = choose_decoder(self._spec, self._reader)
            self._pipeline = decoding_pipeline(self._next_encoded, self._spec, self._decoder)
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
        # [n, S, S, 1] in DALI's memory, which the tensor shares: DALI takes another piece for the next batch, and
        # frees this one when torch drops the tensor. Of a GPU's memory that is after a device sync in a thread of
        # DALI's own (DLTensorGraveyard in its dltensor.cc), since what torch queued on it may not have run.
        try:
            # With a stream nothing waits on the host: the stream waits for the images.
            gpu = self._spec.device.type == "cuda"
            stream = torch.cuda.current_stream(self._spec.device) if gpu else None
            (images,) = pipeline.share_outputs(cuda_stream=stream)
            decoded = torch.utils.dlpack.from_dlpack(images.as_tensor())
            if list(decoded.shape[1:]) != [self._size, self._size, 1]:
                raise ValueError(f"images decode to {list(decoded.shape[1:])}")
            return decoded
        except (RuntimeError, ValueError) as error:
            # One bad image ends a DALI pipeline; name it, and build a new pipeline at the next iteration.
            culprit = self._undecodable()
            self.close()
            if culprit is None:
                raise
            raise BadData(f"{culprit} does not decode; pack again") from error

    def _collated(self, decoded: torch.Tensor, of: _InFlight) -> Batch:
        images, on_cpu = decoded[..., 0], self._spec.device.type == "cpu"
        labels, rows = torch.from_numpy(of.samples.labels), torch.from_numpy(of.samples.rows)
        with _one_torch_thread() if on_cpu and self._spec.augment == "none" else contextlib.nullcontext():
            # A batch on a CPU stays in the memory that it was decoded into. On a GPU a copy costs nothing, and gives
            # DALI its memory back before the step on the batch is done.
            into = None if on_cpu else torch.empty_like(images)
            return collate(images, labels, rows, of.indices, self._spec, into)

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
