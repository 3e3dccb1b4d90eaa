"""Binary cross-entropy over 14 findings, with a weight for the positives of rare ones."""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from shards.findings import FINDINGS
from shards.manifest import SplitRecord

_WEIGHTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": torch.ones_like,
    "log": torch.log1p,
    "sqrt": torch.sqrt,
    "ratio": lambda ratio: ratio,
}
POS_WEIGHTS = tuple(_WEIGHTS)


def positive_weights(rule: str, train: SplitRecord) -> torch.Tensor:
    """Return float32 [14]: the factor on each finding's positives in the loss.

    With r = negatives / positives of the finding in train: none 1, log ln(1 + r), sqrt √r,
    ratio r (which balances both classes). A finding without positives gets 1: there is
    nothing to weigh.
    """
    positives = _counts(train.positives)
    ratio = (train.images - positives) / positives.clamp(min=1)
    weights = _WEIGHTS[rule](ratio)
    return torch.where(positives > 0, weights, torch.ones_like(weights)).float()


def make_loss(rule: str, train: SplitRecord, device: torch.device) -> nn.Module:
    """Return the loss: float32 logits [N, 14] and float32 labels [N, 14] to their mean, a scalar."""
    return nn.BCEWithLogitsLoss(pos_weight=positive_weights(rule, train)).to(device)


def _counts(positives: Mapping[str, int]) -> torch.Tensor:
    return torch.tensor([positives[finding] for finding in FINDINGS], dtype=torch.float64)
