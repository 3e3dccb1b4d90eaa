"""Losses over findings that may be present together, with a weight for the positives of rare ones."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shards.manifest import SplitRecord

# Lin et al.: the value they found best. Ridnik et al.: those of their multi-label experiments.
FOCAL_GAMMA = 2
ASYMMETRIC_GAMMA_NEG, ASYMMETRIC_GAMMA_POS, ASYMMETRIC_MARGIN = 4, 1, 0.05
# Cui et al.: the larger beta, the closer to ratio; theirs are 0.9 to 0.9999, the last for large sets.
EFFECTIVE_BETA = 0.9999


def _effective(positives: Tensor, negatives: Tensor) -> Tensor:
    beta = torch.tensor(EFFECTIVE_BETA, dtype=torch.float64)
    return (1 - beta**negatives) / (1 - beta**positives)


POS_WEIGHTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": lambda positives, negatives: torch.ones_like(positives),
    "log": lambda positives, negatives: torch.log1p(negatives / positives),
    "sqrt": lambda positives, negatives: torch.sqrt(negatives / positives),
    "ratio": lambda positives, negatives: negatives / positives,
    "effective": _effective,
}
"""Rule -> (positives, negatives) of each finding in train -> the factor on its positives."""


def positive_weights(rule: str, train: SplitRecord) -> Tensor:
    """Return float32 [F]: the factor on each finding's positives in the loss, from train alone.

    With p positives, n negatives and r = n / p: none 1, log ln(1 + r), sqrt √r, ratio r (which balances both classes),
    effective E(n) / E(p) with the effective number of samples E(k) = (1 - b^k) / (1 - b), b = 0.9999 (Cui et al.,
    Class-Balanced Loss, arXiv:1901.05555). A finding without positives gets 1: there is nothing to weigh.
    """
    positives = torch.tensor(list(train.positives.values()), dtype=torch.float64)
    known = positives.clamp(min=1)
    weights = POS_WEIGHTS[rule](known, train.images - known)
    return torch.where(positives > 0, weights, torch.ones_like(weights)).float()


def bce(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Return binary cross-entropy, elementwise: -(w y ln p + (1 - y) ln(1 - p)) with p = sigmoid(logit)."""
    return F.binary_cross_entropy_with_logits(logits, labels, pos_weight=weights, reduction="none")


def focal(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Return -(w y (1-p)^2 ln p + (1-y) p^2 ln(1-p)): Lin et al., Focal Loss, arXiv:1708.02002, gamma 2.

    `weights` takes the place of their alpha.
    """
    chance, against = torch.sigmoid(logits), torch.sigmoid(-logits)
    positive = weights * labels * against**FOCAL_GAMMA * F.logsigmoid(logits)
    return -(positive + (1 - labels) * chance**FOCAL_GAMMA * F.logsigmoid(-logits))


def asymmetric(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Return -(w y (1-p) ln p + (1-y) q^4 ln(1-q)) with q = max(p - 0.05, 0).

    Ridnik et al., Asymmetric Loss For Multi-Label Classification, arXiv:2009.14119, with gamma- 4,
    gamma+ 1, margin 0.05. Negatives below the margin cost nothing.
    """
    against = torch.sigmoid(-logits)
    positive = weights * labels * against**ASYMMETRIC_GAMMA_POS * F.logsigmoid(logits)
    # 1 - q from sigmoid(-logit), which keeps its digits where p is close to 1.
    rest = (against + ASYMMETRIC_MARGIN).clamp(max=1)
    return -(positive + (1 - labels) * (1 - rest) ** ASYMMETRIC_GAMMA_NEG * torch.log(rest))


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"bce": bce, "focal": focal, "asymmetric": asymmetric}
"""Name -> (logits [N, F], labels [N, F], pos weights [F]) -> the loss of each, [N, F]."""


class FindingLoss(nn.Module):
    """Logits and labels, both float32 [N, F], to the mean loss over images and findings, a scalar."""

    weights: Tensor

    def __init__(self, name: str, weights: Tensor, smoothing: float = 0.0) -> None:
        super().__init__()
        self._elementwise = LOSSES[name]
        self._smoothing = smoothing
        self.register_buffer("weights", weights)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean; with smoothing s the labels count as y (1 - s) + s / 2."""
        if self._smoothing:
            labels = labels * (1 - self._smoothing) + self._smoothing / 2
        return self._elementwise(logits, labels, self.weights).mean()


def make_loss(name: str, rule: str, train: SplitRecord, device: torch.device, smoothing: float = 0.0) -> FindingLoss:
    """Return the loss of this name with positives weighted by `rule`, on the device.

    Label smoothing (Szegedy et al., arXiv:1512.00567, for two classes) is for train; the val loss goes
    without it, so that it means the same in every run.
    """
    return FindingLoss(name, positive_weights(rule, train), smoothing).to(device)
