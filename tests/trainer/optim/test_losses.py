"""Losses against the plain formulas in float64."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from shards.findings import FINDINGS
from shards.manifest import SplitRecord
from trainer.optim.losses import LOSSES, POS_WEIGHTS, FindingLoss, make_loss, positive_weights

COUNTS = {finding: 7 * number for number, finding in enumerate(FINDINGS)}  # Atelectasis has none
TRAIN = SplitRecord(images=100, patients=40, positives=COUNTS, prevalence={})
Array = npt.NDArray[Any]


def plain(name: str, logits: Array, labels: Array, weights: Array) -> float:
    """The formulas as the papers write them."""
    p = 1 / (1 + np.exp(-logits))
    if name == "bce":
        each = weights * labels * np.log(p) + (1 - labels) * np.log(1 - p)
    elif name == "focal":
        each = weights * labels * (1 - p) ** 2 * np.log(p) + (1 - labels) * p**2 * np.log(1 - p)
    else:
        q = np.maximum(p - 0.05, 0)
        each = weights * labels * (1 - p) * np.log(p) + (1 - labels) * q**4 * np.log(1 - q)
    return float(-each.mean())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("rule", POS_WEIGHTS)
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_its_formula(name: str, rule: str, smoothing: float) -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 3, (32, 14))
    labels = generator.integers(0, 2, (32, 14)).astype(float)
    weights = positive_weights(rule, TRAIN).double().numpy()
    expected = plain(name, logits, labels * (1 - smoothing) + smoothing / 2, weights)
    loss = make_loss(name, rule, TRAIN, torch.device("cpu"), smoothing)
    found = loss(torch.tensor(logits).float(), torch.tensor(labels).float())
    assert float(found) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_extreme_logits_keep_loss_and_gradient_finite_and_right(name: str) -> None:
    logits = torch.tensor([[-200.0, -30.0, 0.0, 30.0, 200.0]] * 2, requires_grad=True)
    labels = torch.tensor([[0.0] * 5, [1.0] * 5])
    loss = FindingLoss(name, torch.ones(5))(logits, labels)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    # A sure and wrong answer costs its logit, but for asymmetric's negatives, whose q ends at 0.95.
    wrong_positives = 230.0
    wrong_negatives = 230.0 if name != "asymmetric" else 2 * 0.95**4 * -math.log(0.05)
    middle = plain(name, np.zeros((2, 1)), np.array([[0.0], [1.0]]), np.ones(1)) * 2
    assert float(loss.detach()) == pytest.approx((wrong_positives + wrong_negatives + middle) / 10, rel=1e-6)


def test_the_weights_follow_their_rule_and_a_finding_without_positives_gets_one() -> None:
    ratio = (100 - 7) / 7
    effective = (1 - 0.9999**93) / (1 - 0.9999**7)
    expected = {"none": 1, "log": math.log(1 + ratio), "sqrt": math.sqrt(ratio), "ratio": ratio, "effective": effective}
    for rule in POS_WEIGHTS:
        weights = positive_weights(rule, TRAIN)
        assert weights.dtype == torch.float32
        assert weights[0] == 1
        assert float(weights[1]) == pytest.approx(expected[rule])


def test_a_finding_that_every_image_has_gets_a_finite_weight() -> None:
    everywhere = SplitRecord(100, 40, dict.fromkeys(FINDINGS, 100), {})
    assert all(positive_weights(rule, everywhere).isfinite().all() for rule in POS_WEIGHTS)
