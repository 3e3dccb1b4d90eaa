"""Batches brought to a GPU on a stream of their own, so that copies run beside the step that is queued."""

from collections.abc import Iterator

import torch

from loaders.batch import Batch


def beside_the_step(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield the batches; what they do on a GPU is queued on a stream of its own.

    A batch is asked for when the step before it has been queued, not when it is done, so both run at once.
    Nothing waits on the host: the consumer's stream waits for the batch it is given. On other devices
    the batches come as they are.
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
            tensor.record_stream(consumer)  # its memory is not given away before the consumer is done
        yield batch
