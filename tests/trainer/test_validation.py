"""Macro AUROC on val."""

import contextlib

import numpy as np
import pytest
import torch

from loaders import Batch
from shards.errors import BadData
from shards.findings import FINDINGS
from shards.manifest import SplitRecord
from trainer.optim.losses import FindingLoss
from trainer.setup import single_class_findings
from trainer.validation import macro_auroc, validate


def test_the_auroc_is_the_chance_that_a_positive_is_above_a_negative_in_the_mean_over_findings() -> None:
    generator = np.random.default_rng(0)
    labels, scores = generator.integers(0, 2, (40, 3)), generator.normal(size=(40, 3)).round(1)
    labels[:, 2] = 0  # one class only: left out
    each = []
    for column in (0, 1):
        positives = scores[labels[:, column] == 1, column][:, None]
        negatives = scores[labels[:, column] == 0, column][None]
        each.append(np.mean((positives > negatives) + 0.5 * (positives == negatives)))
    assert macro_auroc(labels, scores) == pytest.approx(np.mean(each))


def test_findings_of_one_class_are_named_and_none_with_two_is_an_error() -> None:
    some = SplitRecord(10, 10, {finding: number % 11 for number, finding in enumerate(FINDINGS)}, {})
    assert single_class_findings(some) == [FINDINGS[0], FINDINGS[10], FINDINGS[11]]
    with pytest.raises(BadData, match="--monitor loss"):
        single_class_findings(SplitRecord(10, 10, dict.fromkeys(FINDINGS, 0), {}))


def test_the_loss_is_the_mean_over_images_whatever_the_batches() -> None:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (10, 1, 4, 4), dtype=torch.uint8)
    labels = torch.randint(0, 2, (10, 14), dtype=torch.uint8)
    rows = torch.arange(10, dtype=torch.int32)
    loss = FindingLoss("bce", torch.ones(14))

    def forward(batch: torch.Tensor) -> torch.Tensor:
        return batch.flatten(1)[:, :14].float() / 99

    def score(*sizes: int, stop: bool = False) -> object:
        parts = zip(images.split(sizes), labels.split(sizes), rows.split(sizes), strict=True)
        return validate(
            (Batch(*part) for part in parts), forward, loss, contextlib.nullcontext, auroc=True, stop=lambda: stop
        )

    whole, parts = score(10), score(3, 7)
    assert parts.loss == pytest.approx(float(loss(forward(images), labels.float())), rel=1e-6)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    assert parts.auroc == whole.auroc
    assert score(3, 7, stop=True) is None
