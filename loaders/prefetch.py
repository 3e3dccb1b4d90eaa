"""Prefetching to a GPU: copies run on a stream of their own, beside the queued training step."""

from collections.abc import Iterator

import torch

from loaders.loader import Batch


def prefetch_to_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield the batches; their work on a GPU is queued on a stream of its own.

    A batch is requested when the step before it has been queued, not when it is done, so both run at
    once. Nothing waits on the host: the consumer's stream waits for the batch it is given. On other
    devices the batches pass through.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
    while True:
        with torch.cuda.stream(stream):
            batch = next(batches, None)
            ready.record(stream)
        if batch is None:
            return
        consumer = torch.cuda.current_stream(device)
        consumer.wait_event(ready)
        for tensor in batch:
            tensor.record_stream(consumer)  # its memory is not reused before the consumer is done
        yield batch
