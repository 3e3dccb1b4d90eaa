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
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.utils.dlpack
from nvidia.dali.pipeline import Pipeline

from loaders.collate import collate
from loaders.decoder import PREFETCH, UNDECIDED, Decoder, batches_at_once, choose_decoder, decoding_pipeline
from loaders.loader import Batch, Loader
from loaders.sampler import BatchIndices
from loaders.spec import LoaderSpec
from shards.errors import BadData, CannotResume
from shards.folder import Samples, SplitReader
from shards.pixels import decode_sample


class _Run(NamedTuple):
    """Consecutive batches of an epoch that DALI decodes at once."""

    epoch: int
    first: int
    batches: list[BatchIndices]
    positions: npt.NDArray[np.int64]
    """Of all their samples."""
    samples: Samples

    def holds(self, epoch: int, batch: int) -> bool:
        return self.epoch == epoch and 0 <= batch - self.first < len(self.batches)


class _Decoded(NamedTuple):
    """A batch that is decoded and has not been yielded."""

    epoch: int
    batch: int
    indices: BatchIndices
    images: torch.Tensor
    """[n, S, S, 1], in memory that DALI gave away."""
    labels: npt.NDArray[np.uint8]
    rows: npt.NDArray[np.int32]


class DaliLoader(Loader):
    """Keeps the contract of `Loader`; see there.

    On a GPU the state names the decoder, which is chosen at the first batch: decoders differ by one gray level.

    Memory: the shards stay in the page cache; a few runs (a batch each, or on a CPU 256 images) are held, encoded and
    decoded. At the end of an epoch the first of the next are already being decoded.
    """

    def __init__(self, spec: LoaderSpec) -> None:
        self._reader = SplitReader(spec.shards, spec.split)
        super().__init__(spec, len(self._reader))
        self._size = spec.shards.manifest.size
        self._per_run = batches_at_once(spec)
        self._ahead: Iterator[tuple[int, int, BatchIndices]] = iter(())
        self._in_flight: collections.deque[_Run] = collections.deque()
        self._decoded: collections.deque[_Decoded] = collections.deque()
        self._decoder = UNDECIDED
        self._pipeline: Pipeline | None = None

    def _epoch(self) -> Iterator[Batch]:
        sampler = self._sampler
        while sampler.batch < self.batches:
            # Looked for anew each time: somebody else may have iterated, or loaded another state.
            yield self._collated(self._decoded_batch(sampler.epoch, sampler.batch))

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
        self._decoded.clear()

    def _decoded_batch(self, epoch: int, batch: int) -> _Decoded:
        # Each is given out once, for it is flipped in place.
        while True:
            while self._decoded and self._decoded[0][:2] != (epoch, batch):
                self._decoded.popleft()
            if self._decoded:
                return self._decoded.popleft()
            self._decoded.extend(self._run_with(epoch, batch))

    def _run_with(self, epoch: int, batch: int) -> list[_Decoded]:
        # Return the batches of the run that holds this one, and have DALI go on with the next runs.
        if self._pipeline is None:
            if self._decoder == UNDECIDED:
                self._decoder = choose_decoder(self._spec, self._reader)
            self._pipeline = decoding_pipeline(self._next_encoded, self._spec, self._decoder)
        pipeline = self._pipeline
        while self._in_flight and not self._in_flight[0].holds(epoch, batch):
            pipeline.share_outputs()
            pipeline.release_outputs()
            self._in_flight.popleft()
        if not self._in_flight:
            self._ahead = self._sampler.iter_ahead()
        while len(self._in_flight) < PREFETCH:
            pipeline.schedule_run()
        images = self._images(pipeline)
        run = self._in_flight.popleft()
        pipeline.release_outputs()
        pipeline.schedule_run()
        decoded, start = [], 0
        for number, indices in enumerate(run.batches, run.first):
            part = slice(start, start := start + len(indices.positions))
            labels, rows = run.samples.labels[part], run.samples.rows[part]
            decoded.append(_Decoded(run.epoch, number, indices, images[part], labels, rows))
        return decoded

    def _next_encoded(self) -> list[Any]:
        # Called by DALI when it has room for a run, which ends with its epoch at the latest.
        epoch, first, indices = next(self._ahead)
        following = min(self._per_run, self.batches - first) - 1
        batches = [indices, *(indices for _, _, indices in itertools.islice(self._ahead, following))]
        positions = np.concatenate([indices.positions for indices in batches])
        samples = self._reader.read(positions)
        self._in_flight.append(_Run(epoch, first, batches, positions, samples))
        return samples.images

    def _images(self, pipeline: Pipeline) -> torch.Tensor:
        # [n, S, S, 1] in DALI's memory, which the tensor shares: DALI takes another piece for the next run, and
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

    def _collated(self, batch: _Decoded) -> Batch:
        images, on_cpu = batch.images[..., 0], self._spec.device.type == "cpu"
        labels, rows = torch.from_numpy(batch.labels), torch.from_numpy(batch.rows)
        with _one_torch_thread() if on_cpu and self._spec.augment == "none" else contextlib.nullcontext():
            # A batch on a CPU stays in the memory that it was decoded into. On a GPU a copy costs nothing, and gives
            # DALI its memory back before the step on the batch is done.
            into = None if on_cpu else torch.empty_like(images)
            return collate(images, labels, rows, batch.indices, self._spec, into)

    def _undecodable(self) -> str | None:
        for run in self._in_flight:
            for position, image in zip(run.positions.tolist(), run.samples.images, strict=True):
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
