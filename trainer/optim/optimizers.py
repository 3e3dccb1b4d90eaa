"""The optimizer over the parameters that are not frozen, as one fused kernel, and its learning rate.

The rate is a pure function of the step, so that resuming needs no state.
"""

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# What torch's OneCycleLR takes by default, after Smith and Topin (2018).
_RISE, _START, _END = 0.3, 1 / 25, 1 / 25e4


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": functools.partial(torch.optim.SGD, momentum=0.9, nesterov=True),
}
"""Adam (Kingma and Ba, arXiv:1412.6980) with an L2 penalty in the gradient, AdamW (Loshchilov and Hutter,
arXiv:1711.05101) with decoupled decay, SGD with Nesterov momentum and an L2 penalty."""


def make_optimizer(
    name: str, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Return the optimizer of this name over those parameters that require a gradient.

    `lr` is its rate until `Step` sets one, a tensor on the device: torch's constructors would read such a tensor
    and wait for it. Raises ValueError where every parameter is frozen.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    if not trainable:
        raise ValueError("every parameter is frozen: there is nothing to train")
    optimizer = OPTIMIZERS[name](trainable, lr=lr, weight_decay=weight_decay, fused=True)
    if name == "sgd":
        # Torch makes these at the first step; where fp16 skips that one, it leaves them uninitialised.
        for parameter in trainable:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def constant(step: Tensor, steps: int, warmup: int) -> Tensor:
    """Return 1, after a linear rise: (step + 1) / warmup while step < warmup."""
    return ((step + 1) / warmup).clamp(max=1) if warmup else torch.ones_like(step)


def cosine(step: Tensor, steps: int, warmup: int) -> Tensor:
    """Return (1 + cos(pi t)) / 2 with t = (step - warmup) / (steps - warmup), after constant()'s rise.

    Loshchilov and Hutter, SGDR, arXiv:1608.03983, equation 5, without restarts.
    """
    fall = (1 + torch.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
    return torch.where(step < warmup, constant(step, steps, warmup), fall)


def onecycle(step: Tensor, steps: int, warmup: int) -> Tensor:
    """Rise from 1/25 to 1 in `warmup` steps (0: 30 % of them), then fall to 1/250,000, both as a half cosine.

    Smith and Topin, Super-Convergence, arXiv:1708.07120; the numbers are those of torch's OneCycleLR.
    """
    top = (warmup or _RISE * steps) - 1
    rise = _between(_START, 1.0, step / top if top > 0 else torch.ones_like(step))
    fall = _between(1.0, _END, (step - top) / max(steps - 1 - top, 1))
    return torch.where(step <= top, rise, fall)


def _between(start: float, end: float, done: Tensor) -> Tensor:
    return end + (start - end) * (1 + torch.cos(math.pi * done)) / 2


SCHEDULES = {"constant": constant, "cosine": cosine, "onecycle": onecycle}
"""Name -> (step from 0 in float64, steps in all, steps of warm-up) -> the share of the highest rate, 0..1."""


@dataclass(frozen=True)
class LearningRate:
    """The rate of any step, computed when it is needed: a table of all of them could take gigabytes."""

    schedule: str
    """A name of SCHEDULES."""
    highest: float
    steps: int
    """In all; later ones have the rate of the last."""
    warmup: int
    """Steps."""

    def __call__(self, applied: Tensor) -> Tensor:
        """Return the rate, float64, after so many steps were applied (int64 of any shape), on its device."""
        step = applied.clamp(0, self.steps - 1).double()
        return self.highest * SCHEDULES[self.schedule](step, self.steps, self.warmup)
