"""An exponential moving average of the weights, which often scores better than the last weights."""

import copy

import torch
from torch import nn

from models import Classifier


def trained_names(model: nn.Module) -> set[str]:
    """Return the names in the state of a model that training changes: the rest is frozen.

    They are those of each module that has a trainable weight of its own, so running statistics count.
    """
    names: set[str] = set()
    for prefix, module in model.named_modules():
        weights = dict(module.named_parameters(prefix, recurse=False))
        if any(weight.requires_grad for weight in weights.values()):
            names |= {*weights, *dict(module.named_buffers(prefix, recurse=False))}
    return names


class EMA:
    """The exponential moving average of a model's weights and buffers, as a model of its own.

    After step t every floating-point tensor a becomes d a + (1 - d) w, with w the model's and d = min(decay, (1 + t) /
    (10 + t)), which lets go of the initial weights quickly (TensorFlow's ExponentialMovingAverage with num_updates).
    Integer buffers, batch norm's num_batches_tracked, are copied. Costs one copy of what is trained: what is frozen
    when this is made is shared with the model.
    """

    def __init__(self, model: Classifier, decay: float) -> None:
        self.decay = decay
        trained = trained_names(model)
        theirs = model.state_dict(keep_vars=True)
        shared = {id(tensor): tensor for name, tensor in theirs.items() if name not in trained}
        self.model = copy.deepcopy(model, shared).requires_grad_(False).eval()
        """In evaluation mode; takes what the model takes."""
        mine = self.model.state_dict()
        # These share their memory with the models, also after their load_state_dict.
        averaged = [name for name in mine if name in trained and mine[name].is_floating_point()]
        copied = [name for name in mine if name in trained and not mine[name].is_floating_point()]
        self._averaged = [mine[name] for name in averaged], [theirs[name].detach() for name in averaged]
        self._copied = [mine[name] for name in copied], [theirs[name] for name in copied]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the model's weights after a step, counted from 1; waits for nothing."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(*self._averaged, share)
        if self._copied[0]:
            torch._foreach_copy_(*self._copied)
