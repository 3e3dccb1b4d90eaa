"""Freezing: which parameters train, and a frozen classifier as feature extractor and trainable head."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.classifier import Classifier

FREEZES = ("none", "partial", "backbone")
"""What can be frozen: nothing, all before the last stage, or all before the head."""


def freeze(model: Classifier, how: str) -> None:
    """Make the chosen parameters trainable and freeze the others, which then stay in evaluation mode.

    `none` trains everything, `partial` the last stage and the head, `backbone` the head only; another raises
    ValueError. The model is changed in place and stays in its mode; a later call replaces the choice. Call
    it before the optimizer is made and before DistributedDataParallel or torch.compile wraps the model.
    """
    if how not in FREEZES:
        raise ValueError(f"unknown freeze {how!r}; known: {', '.join(FREEZES)}")
    model.requires_grad_(how == "none")
    model.head.requires_grad_(True)
    if how == "partial":
        for module in model.last_stage:
            module.requires_grad_(True)
    model.train(model.training)


def parameter_counts(model: Classifier) -> tuple[int, int]:
    """Return (trainable parameters, all parameters)."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trainable in sizes if trainable), sum(size for size, _ in sizes)


def feature_extractor(model: Classifier, how: str) -> Callable[[Tensor], Tensor]:
    """Return the function from raw images to the input of the trainable head.

    It runs the model's own modules, without gradients, in the mode they are in, up to the first module
    that is trained. `trainable_head(model, how)(feature_extractor(model, how)(images))` is `model(images)`.
    With `backbone` it gives features [N, F]; with `partial` the input of the last stage: maps [N, C, H, W],
    channels-last, or tokens [N, tokens, F]. Arguments and errors are those of `trainable_head`.
    """
    trainable_head(model, how)  # raises where the model is not frozen like this
    first = model.head if how == "backbone" else model.last_stage[0]

    @torch.no_grad()
    def run(images: Tensor) -> Tensor:
        handle = first.register_forward_pre_hook(_stop)
        try:
            model(images)
        except _Reached as reached:
            return reached.features
        finally:
            handle.remove()
        raise RuntimeError(f"{model.arch} did not call the first module that is trained")

    return run


def trainable_head(model: Classifier, how: str) -> nn.Module:
    """Return the rest as one module that shares the model's parameters: features in, logits out.

    Training it trains the model; `train()` and `eval()` of either set the mode of both.

    Args:
        model: frozen by `freeze(model, how)`, or all of it, as an average of weights is.
        how: `backbone`: the head. `partial`: the last stage, the pooling and the head.

    Raises:
        ValueError: the model is not frozen like that, or nothing of it is frozen.
    """
    if how not in ("backbone", "partial"):
        raise ValueError(f"freeze {how!r} leaves no frozen part to cut off; known: partial, backbone")
    head, network = model.head, model.network
    if how == "partial":
        pooling = [network.get_submodule(each) if isinstance(each, str) else each for each in model.arch_spec.pooling]
        head = nn.Sequential(*model.last_stage, *pooling, head)
    own = {id(weight) for weight in head.parameters()}
    trained = {id(weight) for weight in model.parameters() if weight.requires_grad}
    if trained not in (own, set()):
        raise ValueError(f"the model is not frozen as {how!r}: call freeze(model, {how!r}) first")
    return head


class _Reached(Exception):  # noqa: N818  no error: the way out of a forward pass
    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features


def _stop(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    raise _Reached(inputs[0])
