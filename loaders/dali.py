"""The DALI loader: encoded bytes in our order through DALI's decoder, on a GPU or a CPU.

The order comes from `Schedule` and the bytes from the memory-mapped shards; DALI gets them
through `external_source` and decodes ahead in its own threads. Its webdataset reader was the
other choice. Both decode at the same rate (two cores, 224 px gray JPEG: 5.7 to 8.2 thousand
images/s with the reader, 6.3 to 8.1 with external_source), but the reader's permutation is
uniform only with a buffer as large as the split, depends on its history, and needs DALI's own
checkpoints to resume; here the order is a function of (seed, epoch) and the state two numbers.
"""

import collections
from collections.abc import Iterator
from typing import Any

import nvidia.dali.fn as fn
import nvidia.dali.types as dali_types
import torch
import torch.utils.dlpack
from nvidia.dali.pipeline import Pipeline

from loaders.batch import Batch
from loaders.schedule import Schedule, Slot
from loaders.spec import LoaderSpec
from shards.cores import available_cores
from shards.errors import BadData
from shards.folder import Samples, SplitReader
from shards.pixels import decode_sample

# Batches decoded ahead. Two hide a slow batch; more cost memory and gave nothing on two cores.
PREFETCH = 2


def decoding_pipeline(source: Any, batch_size: int, threads: int, device_id: int | None) -> Pipeline:
    """Return the built pipeline: encoded images from `source` to uint8 [S, S, 1].

    `source` is called once a batch and returns a list of 1-D uint8 arrays, or raises
    StopIteration at the end of an epoch. With a `device_id` the decoder is `mixed` (JPEG on
    that GPU, PNG on the host); with None everything runs on the CPU, without any driver.
    """
    pipeline = Pipeline(batch_size, threads, device_id, prefetch_queue_depth=PREFETCH)
    with pipeline:
        encoded = fn.external_source(source=source, batch=True, ndim=1, dtype=dali_types.UINT8)
        device = "cpu" if device_id is None else "mixed"
        pipeline.set_outputs(fn.decoders.image(encoded, device=device, output_type=dali_types.GRAY))
    pipeline.build()
    return pipeline


class DaliLoader:
    """Keeps the contract of `Loader`; see there.

    Memory: the shards are mapped, not loaded; PREFETCH decoded batches are held. Flips are one
    vectorised select over the batch, on the device it is on.
    """

    def __init__(self, spec: LoaderSpec) -> None:
        self._spec = spec
        self._reader = SplitReader(spec.shards, spec.split)
        self._schedule = Schedule(spec, len(self._reader))
        self.samples = self._schedule.samples
        self.batches = self._schedule.batches
        self._slots: Iterator[Slot] = iter(())
        self._in_flight: collections.deque[tuple[Slot, Samples]] = collections.deque()
        self._pipeline: Pipeline | None = None

    def __iter__(self) -> Iterator[Batch]:
        self._schedule.start()
        self._slots = self._schedule.remaining()
        pipeline = self._running_pipeline()
        try:
            pipeline.schedule_run()
            while (images := self._decoded(pipeline)) is not None:
                slot, samples = self._in_flight.popleft()
                batch = self._finish(images, slot, samples)
                pipeline.release_outputs()
                pipeline.schedule_run()
                self._schedule.hand_out()
                yield batch
            self._schedule.finish()
        finally:
            self._drain()

    def __enter__(self) -> "DaliLoader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """See Loader."""
        return self._schedule.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See Loader."""
        self._schedule.load_state_dict(state)

    def close(self) -> None:
        """See Loader; a closed loader starts again when it is iterated."""
        self._pipeline = None

    def _running_pipeline(self) -> Pipeline:
        if self._pipeline is None:
            threads = self._spec.threads or available_cores()
            device = self._spec.device
            device_id = (device.index or 0) if device.type == "cuda" else None
            self._pipeline = decoding_pipeline(self._next_encoded, self._spec.batch_size, threads, device_id)
        return self._pipeline

    def _next_encoded(self) -> list[Any]:
        # Called by DALI when it has room for a batch; StopIteration ends the epoch.
        slot = next(self._slots)
        samples = self._reader.read(slot.positions)
        self._in_flight.append((slot, samples))
        return samples.images

    def _decoded(self, pipeline: Pipeline) -> torch.Tensor | None:
        # [n, S, S, 1] in DALI's memory, valid until release_outputs; None at the end of the epoch.
        try:
            # On a GPU the outputs are bound to torch's stream: DALI reuses their memory only after
            # what torch has queued on it, and nothing waits on the host.
            gpu = self._spec.device.type == "cuda"
            stream = torch.cuda.current_stream(self._spec.device) if gpu else None
            (images,) = pipeline.share_outputs(cuda_stream=stream)
            return torch.utils.dlpack.from_dlpack(images.as_tensor())
        except StopIteration:
            return None
        except RuntimeError as error:
            # One bad image ends a DALI pipeline; say which it was, and build anew if asked again.
            culprit = self._undecodable()
            self._pipeline = None
            if culprit is None:
                raise
            raise BadData(f"{culprit} does not decode; pack again") from error

    def _finish(self, decoded: torch.Tensor, slot: Slot, samples: Samples) -> Batch:
        device = self._spec.device
        labels, rows = torch.from_numpy(samples.labels), torch.from_numpy(samples.rows)
        if self._spec.flip == "both":
            decoded = torch.cat([decoded, decoded.flip(2)])
            labels, rows = labels.repeat(2, 1), rows.repeat(2)
        elif self._spec.flip == "random":
            mirrored = torch.from_numpy(slot.mirrored).to(decoded.device, non_blocking=True)
            decoded = torch.where(mirrored[:, None, None, None], decoded.flip(2), decoded)
        else:
            decoded = decoded.clone()
        return Batch(
            decoded.permute(0, 3, 1, 2),
            labels.to(device, non_blocking=True),
            rows.to(device, non_blocking=True),
        )

    def _drain(self) -> None:
        # An epoch left early has batches under way; the pipeline is reset once they are out.
        self._slots = iter(())
        if self._pipeline is not None:
            try:
                while True:
                    self._pipeline.share_outputs()
                    self._pipeline.release_outputs()
                    self._pipeline.schedule_run()
            except StopIteration:
                self._pipeline.reset()
        self._in_flight.clear()

    def _undecodable(self) -> str | None:
        for slot, samples in self._in_flight:
            for position, image in zip(slot.positions.tolist(), samples.images, strict=True):
                try:
                    decode_sample(image.tobytes())
                except ValueError:
                    return self._reader.name(position)
        return None
