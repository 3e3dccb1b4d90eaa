"""The optimizer over the parameters that are not frozen, as one fused kernel."""

from collections.abc import Callable, Iterable

import torch

MOMENTUM = 0.9


def _sgd(trainable: list[torch.nn.Parameter], lr: torch.Tensor, weight_decay: float) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(
        trainable, lr=lr, weight_decay=weight_decay, momentum=MOMENTUM, nesterov=True, fused=True
    )
    # Torch makes these at the first step; where fp16 skips that one, it leaves them uninitialised.
    for parameter in trainable:
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


OPTIMIZERS: dict[str, Callable[[list[torch.nn.Parameter], torch.Tensor, float], torch.optim.Optimizer]] = {
    "adam": lambda trainable, lr, decay: torch.optim.Adam(trainable, lr=lr, weight_decay=decay, fused=True),
    "adamw": lambda trainable, lr, decay: torch.optim.AdamW(trainable, lr=lr, weight_decay=decay, fused=True),
    "sgd": _sgd,
}
"""Adam (Kingma and Ba, arXiv:1412.6980) with an L2 penalty in the gradient, AdamW (Loshchilov and Hutter,
arXiv:1711.05101) with decoupled decay, SGD with Nesterov momentum and an L2 penalty."""


def make_optimizer(
    name: str, parameters: Iterable[torch.nn.Parameter], lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Return the optimizer of this name over those parameters that require a gradient.

    Its rate is a float32 tensor on their device, so that a schedule can set it there. Raises ValueError
    where every parameter is frozen.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    if not trainable:
        raise ValueError("every parameter is frozen: there is nothing to train")
    return OPTIMIZERS[name](trainable, torch.tensor(lr, device=trainable[0].device), weight_decay)
