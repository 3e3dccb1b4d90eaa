"""torch.compile where it helps, and the uncompiled model where it fails."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

log = logging.getLogger("cxrapid.trainer")


def should_compile(choice: str, device: torch.device) -> bool:
    """Resolve `auto`: on a GPU. On a CPU compiling takes longer than a short run gains by it."""
    return choice == "on" or (choice == "auto" and device.type == "cuda")


class CompiledModel:
    """Calls a model, compiled for batches of exactly `batch_size` images.

    Shorter batches, the last of an epoch, go through the same model uncompiled: filled up they would change the
    statistics of batch norm, and another compilation costs more than the few steps gain. If compiling fails, that is
    logged once and the plain model is used from then on.
    """

    def __init__(self, model: Callable[[Tensor], Tensor], batch_size: int, *, compiled: bool) -> None:
        self._model = model
        self._batch_size = batch_size
        self._compiled = torch.compile(model, dynamic=False) if compiled else None

    def __call__(self, images: Tensor) -> Tensor:
        """Return the model's logits."""
        if self._compiled is None or len(images) != self._batch_size:
            return self._model(images)
        try:
            return self._compiled(images)
        # Compiling comes before running, so nothing has been changed yet.
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            log.info(f"torch.compile failed, continuing without it: {reason}")
            self._compiled = None
            return self._model(images)
