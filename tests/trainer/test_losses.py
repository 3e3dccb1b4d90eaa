"""Losses against the plain formula in float64."""

import math

import numpy as np
import pytest
import torch

from shards.findings import FINDINGS
from shards.manifest import SplitRecord
from trainer.losses import POS_WEIGHTS, make_loss, positive_weights

COUNTS = {finding: 7 * number for number, finding in enumerate(FINDINGS)}  # Atelectasis has none
TRAIN = SplitRecord(images=100, patients=40, positives=COUNTS, prevalence={})


@pytest.mark.parametrize("rule", POS_WEIGHTS)
def test_the_loss_is_weighted_binary_cross_entropy(rule: str) -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 3, (32, 14))
    labels = generator.integers(0, 2, (32, 14)).astype(float)
    weights = positive_weights(rule, TRAIN).double().numpy()
    chance = 1 / (1 + np.exp(-logits))
    expected = -(weights * labels * np.log(chance) + (1 - labels) * np.log(1 - chance)).mean()
    loss = make_loss(rule, TRAIN, torch.device("cpu"))
    found = loss(torch.tensor(logits).float(), torch.tensor(labels).float())
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_the_weights_follow_their_rule_and_a_finding_without_positives_gets_one() -> None:
    ratio = (100 - 7) / 7
    expected = {"none": 1, "log": math.log(1 + ratio), "sqrt": math.sqrt(ratio), "ratio": ratio}
    for rule in POS_WEIGHTS:
        weights = positive_weights(rule, TRAIN)
        assert weights.dtype == torch.float32
        assert weights[0] == 1
        assert float(weights[1]) == pytest.approx(expected[rule])
