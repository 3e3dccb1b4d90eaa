"""One batch ahead on a GPU: copied there on a stream of its own while the one before is trained on."""

from collections.abc import Iterator

import torch

from loaders.batch import Batch


def one_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield the batches; on a GPU each is queued, copies and all, before the one before it is yielded.

    Nothing waits on the host: the consumer's stream waits for the batch it is given. Elsewhere the
    batches come as they are.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    ready = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def queued() -> Batch | None:
        with torch.cuda.stream(stream):
            batch = next(batches, None)
            ready.record(stream)
        return batch

    ahead = queued()
    while ahead is not None:
        batch = ahead
        consumer = torch.cuda.current_stream(device)
        consumer.wait_event(ready)
        for tensor in batch:
            tensor.record_stream(consumer)  # its memory is not given away before the consumer is done
        ahead = queued()
        yield batch
