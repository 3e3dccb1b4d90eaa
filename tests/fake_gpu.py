"""A GPU that is not there: CUDA tensors without values, and an error for whatever makes the host wait for them."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
_COPIES = {aten._to_copy.default, aten.copy_.default}
# Kernels that torch cannot run on fake tensors. All they do is change their arguments.
_IN_PLACE = {
    aten._fused_adam_.tensor_lr,
    aten._fused_adamw_.tensor_lr,
    aten._fused_sgd_.tensor_lr,
    aten._amp_update_scale_.default,
}


@contextlib.contextmanager
def fake_gpu(kind: str = "cuda") -> Iterator[torch.device]:
    """Yield a device; the tensors that the context makes are fake, there and on the host. They may meet real ones.

    Whatever needs the value of a fake tensor raises: `item()`, `bool()`, a boolean mask, `nonzero()`.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield torch.device(kind, 0 if kind == "cuda" else None)


class HostWaitError(AssertionError):
    """The host would wait for the GPU, or tensors of both met."""


class never_waits(TorchDispatchMode):  # noqa: N801  read as a context: with never_waits()
    """Raises HostWaitError in a `fake_gpu` for what fake tensors allow: they have no values to wait for.

    These are copies from the GPU, copies to it that are not `non_blocking`, and any other operation on tensors of
    the two. Torch takes a CPU scalar or index beside GPU tensors, but copies some of them there, and waits.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        devices = {tensor.device.type for tensor in tensors}
        if func in _COPIES:
            # copy_(destination, source, non_blocking); _to_copy(source, device=, non_blocking=)
            to = args[0].device if len(tensors) > 1 else kwargs.get("device") or args[0].device
            devices.add(to.type)
            waits = to.type == "cpu" or not (kwargs.get("non_blocking") or args[2:] == (True,))
        else:
            waits = True
        if waits and len(devices) > 1:
            raise HostWaitError(f"{func} of tensors on {sorted(devices)}")
        if func in _IN_PLACE:
            return args[0] if func is aten._amp_update_scale_.default else None
        if func is aten._pin_memory.default:  # fake tensors have none either
            return args[0].clone()
        return func(*args, **kwargs)


class gradients_of_zeros(TorchFunctionMode):  # noqa: N801
    """Has `backward()` leave a gradient of zeros in every parameter of the model, and do nothing else.

    Autograd's engine asks the CUDA driver for its streams before it runs a node on a CUDA tensor, fake or not
    (GraphTask::stash_current_streams), and raises where there is no GPU. All that it runs is torch's own.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.backward:
            return func(*args, **(kwargs or {}))
        for parameter in self._model.parameters():
            gradient = torch.zeros_like(parameter)
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return None
