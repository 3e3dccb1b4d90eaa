"""Checks of a saved state against the one it replaces, before anything is replaced."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_LARGEST = 2**53
"""Of any count: no run has so many steps."""


def require_like(found: Any, own: Any, name: str) -> None:
    """Raise ValueError naming the first thing in `found` that is not of the form of `own`.

    A dict has the same keys, a list the same length, a tensor the same shape and type and, but for bytes,
    finite numbers; a count lies in 0..2^53, and no number is NaN. None stands for itself.
    """
    if isinstance(own, Tensor):
        require_tensor(found, own.shape, own.dtype, name)
    elif isinstance(own, dict):
        if not isinstance(found, dict):
            raise ValueError(f"{name} is a {type(found).__name__}, not a dict")
        if found.keys() != own.keys():
            differing = sorted(map(str, found.keys() ^ own.keys()))[0]
            raise ValueError(f"{name} has not the same keys: {differing[:64]}")
        for key, value in own.items():
            require_like(found[key], value, f"{name}.{key}")
    elif type(found) is not type(own):
        raise ValueError(f"{name} is a {type(found).__name__}, not a {type(own).__name__}")
    elif isinstance(own, list):
        if len(found) != len(own):
            raise ValueError(f"{name} has {len(found)} items, not {len(own)}")
        for number, value in enumerate(own):
            require_like(found[number], value, f"{name}[{number}]")
    elif isinstance(own, int) and not 0 <= found <= _LARGEST:
        raise ValueError(f"{name} is no count")
    elif isinstance(own, float) and math.isnan(found):
        raise ValueError(f"{name} is NaN")


def require_tensor(found: Any, shape: torch.Size, dtype: torch.dtype, name: str) -> None:
    """Raise ValueError unless `found` is a dense tensor of this shape and type whose numbers are finite."""
    if not isinstance(found, Tensor) or found.layout != torch.strided:
        raise ValueError(f"{name} is a {type(found).__name__}, not a tensor")
    if found.shape != shape or found.dtype != dtype:
        raise ValueError(f"{name} is {found.dtype} {list(found.shape)}, not {dtype} {list(shape)}")
    if found.is_floating_point() and not bool(found.isfinite().all()):
        raise ValueError(f"{name} holds a number that is not finite")


def require_optimizer_state(found: Any, optimizer: torch.optim.Optimizer, name: str) -> None:
    """Raise ValueError unless `found` is what this optimizer keeps of its parameters, if it took a step."""
    if not isinstance(found, dict):
        raise ValueError(f"{name} is a {type(found).__name__}, not a dict")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kept = _state_names(optimizer)
    for number, values in found.items():
        where = f"{name}.{number}"
        if not isinstance(number, int) or not 0 <= number < len(parameters):
            raise ValueError(f"{where}: there is no such parameter")
        if not isinstance(values, dict) or values.keys() != kept.keys():
            raise ValueError(f"{where} does not hold {', '.join(kept)}")
        for key, is_scalar in kept.items():
            shape = torch.Size() if is_scalar else parameters[number].shape
            require_tensor(values[key], shape, torch.float32, f"{where}.{key}")


def _state_names(optimizer: torch.optim.Optimizer) -> dict[str, bool]:
    # What it keeps of a parameter after a step -> whether that is a scalar; found out on one.
    trial = torch.nn.Parameter(torch.zeros(2, device=optimizer.param_groups[0]["params"][0].device))
    trial.grad = torch.zeros_like(trial)
    group = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    twin: torch.optim.Optimizer = type(optimizer)([{**group, "params": [trial]}])  # type: ignore[call-arg]
    twin.step()
    return {key: value.dim() == 0 for key, value in twin.state[trial].items()}


def all_finite(states: Iterable[dict[str, Any]]) -> bool:
    """Return whether every number in the tensors of these is finite; waits for the device once."""
    # In float64 finite numbers of float32 have a finite sum, and it is one pass over each.
    sums = [
        value.sum(dtype=torch.float64)
        for state in states
        for value in state.values()
        if torch.is_tensor(value) and value.is_floating_point()
    ]
    # Adam keeps its step counters on the CPU in some versions of torch.
    return bool(torch.stack([total.to(sums[0].device) for total in sums]).isfinite().all())
