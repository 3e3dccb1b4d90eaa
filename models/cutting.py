"""A frozen classifier in two: the part that never changes, and the part that is trained."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.classifier import Classifier


def feature_extractor(model: Classifier, how: str) -> Callable[[Tensor], Tensor]:
    """Return the function from raw images to what the trained part is given.

    It runs the model's own modules, without gradients, in the mode they are in, up to the first module
    that is trained. `trainable_head(model, how)(feature_extractor(model, how)(images))` is `model(images)`.

    Args:
        model: frozen by `freeze(model, how)`, or as a whole, as an average of weights is.
        how: `backbone` gives features [N, F]; `partial` what the last stage is given: maps
            [N, C, H, W], channels-last, or tokens [N, tokens, F].

    Raises:
        ValueError: the model is not frozen like that, or nothing of it is frozen.
    """
    _require_frozen(model, how)
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
        raise RuntimeError(f"{model.arch} did not call the first module of its trained part")

    return run


def trainable_head(model: Classifier, how: str) -> nn.Module:
    """Return the rest as a module of its own, with the model's own parameters: features in, logits out.

    Training it trains the model; `train()` and `eval()` of either set the mode of both.

    Args:
        model: frozen by `freeze(model, how)`, or as a whole, as an average of weights is.
        how: `backbone`: the head. `partial`: the last stage and the head.

    Raises:
        ValueError: the model is not frozen like that, or nothing of it is frozen.
    """
    _require_frozen(model, how)
    return model.head if how == "backbone" else _tail(model)


class _Reached(Exception):  # noqa: N818  no error: the way out of a forward pass
    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features


def _stop(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    raise _Reached(inputs[0])


def _tail(model: Classifier) -> nn.Module:
    """Return the last stage, what joins it to the head, and the head."""
    pooling = [
        model.network.get_submodule(part) if isinstance(part, str) else part for part in model.record.pooling
    ]
    return nn.Sequential(*model.last_stage, *pooling, model.head)


def _require_frozen(model: Classifier, how: str) -> None:
    if how not in ("backbone", "partial"):
        raise ValueError(f"freeze {how!r} leaves no frozen part to cut off; known: partial, backbone")
    part = {id(weight) for weight in (model.head if how == "backbone" else _tail(model)).parameters()}
    trained = {id(weight) for weight in model.parameters() if weight.requires_grad}
    if trained not in (part, set()):
        raise ValueError(f"the model is not frozen as {how!r}: call freeze(model, {how!r}) first")
