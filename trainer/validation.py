"""Metrics on val: the mean loss and, on request, the macro AUROC."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from loaders import Batch
from trainer.distributed import SINGLE_PROCESS, Distributed


@dataclass(frozen=True)
class ValMetrics:
    """Metrics on val."""

    loss: float
    """Mean over images and findings."""
    auroc: float | None
    """Macro: the mean over findings with both classes; None if it was not asked for."""


@torch.no_grad()
def validate(
    batches: Iterable[Batch],
    forward: Callable[[Tensor], Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
    autocast: Callable[[], AbstractContextManager[None]],
    *,
    auroc: bool,
    stop: Callable[[], bool],
    dist: Distributed = SINGLE_PROCESS,
) -> ValMetrics | None:
    """Return the metrics of a model in evaluation mode; None if `stop` returned True between two batches.

    Each rank gives its own batches, as many as the others, and all get the score of all
    together. The device is waited for once, at the end.
    """
    total, images = torch.zeros((), dtype=torch.float64), 0
    pairs: list[tuple[Tensor, Tensor]] = []
    for batch in batches:
        if len(batch.images):
            with autocast():
                logits = forward(batch.images).float()
            total = total.to(logits.device) + loss(logits, batch.labels.float()) * len(logits)
            images += len(logits)
            if auroc:
                pairs.append((batch.labels, logits))
        if stop():
            return None
    totals, counts = zip(*dist.gather((float(total), images)), strict=True)
    mean = sum(totals) / sum(counts)
    if not auroc or not np.isfinite(mean):
        return ValMetrics(mean, None)
    own = [torch.cat(part).cpu().numpy() for part in zip(*pairs, strict=True)]
    labels, scores = (np.concatenate(part) for part in zip(*filter(None, dist.gather(own)), strict=True))
    return ValMetrics(mean, macro_auroc(labels, scores))


def macro_auroc(labels: npt.NDArray[Any], scores: npt.NDArray[Any]) -> float:
    """Return the mean AUROC over the columns of [N, F] that hold both classes; NaN where none does."""
    both = [column for column in range(labels.shape[1]) if len(np.unique(labels[:, column])) == 2]
    each = [roc_auc_score(labels[:, column], scores[:, column]) for column in both]
    return float(np.mean(each)) if each else float("nan")
