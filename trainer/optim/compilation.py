"""torch.compile where it pays, and the uncompiled model where it fails."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

log = logging.getLogger("cxrapid.trainer")

WORTHWHILE = 500_000
"""Images of a whole run on a GPU. Compiling takes one to two minutes; below this a run gains less by it."""


def should_compile(choice: str, device: torch.device, images: int) -> bool:
    """Resolve `auto`: on a GPU, for a run of at least WORTHWHILE `images` in all its epochs.

    On a CPU compiling takes longer than a run gains by it.
    """
    return choice == "on" or (choice == "auto" and device.type == "cuda" and images >= WORTHWHILE)


class CompiledModel:
    """Calls a model, compiled for batches of exactly `batch_size` images.

    Shorter batches, the last of an epoch, go through the same model uncompiled, and cuDNN does not search for their
    fastest algorithms: filled up they would change the statistics of batch norm, and another compilation or search
    costs more than the few steps gain. If compiling fails, that is logged once and the plain model is used from then
    on.
    """

    def __init__(self, model: Callable[[Tensor], Tensor], batch_size: int, *, compiled: bool) -> None:
        self._model = model
        self._batch_size = batch_size
        self._compiled: Callable[[Tensor], Tensor] | None = None
        if compiled:
            _lower_max_pool_backward()
            self._compiled = torch.compile(model, dynamic=False)

    def __call__(self, images: Tensor) -> Tensor:
        """Return the model's logits."""
        is_full = len(images) == self._batch_size
        if images.is_cuda:
            torch.backends.cudnn.benchmark = is_full  # and stays so for the backward pass
        if self._compiled is None or not is_full:
            return self._model(images)
        try:
            # By default the backward pass is compiled in the first backward(), where a failure could not be caught.
            with torch._functorch.config.patch(force_non_lazy_backward_lowering=True):
                return self._compiled(images)
        # Compiling comes before running, so nothing has been changed yet.
        except Exception as error:
            if not _is_compile_failure(error):
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            log.info(f"torch.compile failed, continuing without it: {reason}")
            self._compiled = None
            return self._model(images)


def _lower_max_pool_backward() -> None:
    """Let Inductor compile the backward pass of max pooling as a gather.

    Inductor has a lowering for it, but torch 2.9 to 2.14 decompose it first, into a float32 scatter with atomic
    additions, which moves a third more memory for custom_cnn (pytorch/pytorch issue 167318).
    """
    from torch._inductor.decomposition import decompositions, fast_random_decomps

    backward = torch.ops.aten.max_pool2d_with_indices_backward.default
    if decompositions.pop(backward, None) is not None:
        fast_random_decomps.cache_clear()


def _is_compile_failure(error: Exception) -> bool:
    """Tell whether an error is of the compiler, or of a kernel that this GPU cannot launch."""
    if isinstance(error, torch._dynamo.exc.TorchDynamoException):
        return True
    from torch._inductor.runtime.triton_compat import OutOfResources

    # Where no variant of a kernel fits, Inductor raises a RuntimeError with this text (runtime/triton_heuristics.py).
    return isinstance(error, OutOfResources) or "No valid triton configs" in str(error)
