"""Which parameters are trained: all, those of the last stage and the head, or the head's alone."""

from models.classifier import Classifier

FREEZES = ("none", "partial", "backbone")
"""What can be frozen: nothing, all before the last stage, or all before the head."""


def freeze(model: Classifier, how: str) -> None:
    """Make the chosen parameters trainable and freeze the others, which then stay in evaluation mode.

    Call it before the optimizer is made and before DistributedDataParallel or torch.compile wraps the
    model. Calling it again replaces the earlier choice.

    Args:
        model: is changed in place; it stays in the mode it is in.
        how: `none` trains everything, `partial` the last stage and the head, `backbone` the head only.

    Raises:
        ValueError: `how` is none of these.
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
