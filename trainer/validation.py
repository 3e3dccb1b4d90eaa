"""Metrics on val: the mean loss and, on request, the macro AUROC; and early stopping by one of them."""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
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
    batches: Iterable[Batch | None],
    forward: Callable[[Tensor], Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
    autocast: Callable[[], AbstractContextManager[None]],
    *,
    auroc: bool,
    stop: Callable[[], bool],
    dist: Distributed = SINGLE_PROCESS,
) -> ValMetrics | None:
    """Return the metrics of a model in evaluation mode; None if `stop` returned True between two batches.

    Each rank gives its own batches, as many as the others, None where it has no image, and all get the metrics of all
    together. Waits for the device once, at the end.
    """
    total: Tensor | float = 0.0
    images = 0
    pairs: list[tuple[Tensor, Tensor]] = []
    for batch in batches:
        if batch is not None:
            with autocast():
                logits = forward(batch.images).float()
            # Summed on the device in float64: a sum from the host would have to be copied there first.
            total = total + (loss(logits, batch.labels.float()) * len(logits)).double()
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
    from sklearn.metrics import roc_auc_score  # seconds to import, and most runs never ask for it

    both = [column for column in range(labels.shape[1]) if len(np.unique(labels[:, column])) == 2]
    each = [roc_auc_score(labels[:, column], scores[:, column]) for column in both]
    return float(np.mean(each)) if each else float("nan")


@dataclass
class EarlyStopping:
    """Keeps the best value and counts the epochs since. With patience 1 the first setback stops."""

    patience: int
    """Epochs; 0: never stop."""
    higher_is_better: bool = False
    best_epoch: int = 0
    epochs_since_best: int = 0

    def __post_init__(self) -> None:
        self.best = -math.inf if self.higher_is_better else math.inf

    @property
    def should_stop(self) -> bool:
        """Whether patience is used up."""
        return 0 < self.patience <= self.epochs_since_best

    def observe(self, epoch: int, value: float) -> bool:
        """Take in one epoch's value on val; return whether it is the best so far. NaN never is."""
        if value > self.best if self.higher_is_better else value < self.best:
            self.best, self.best_epoch, self.epochs_since_best = value, epoch, 0
            return True
        self.epochs_since_best += 1
        return False

    def state_dict(self) -> dict[str, Any]:
        """Return what load_state_dict takes; patience and direction are options, not states."""
        return {"best": self.best, "best_epoch": self.best_epoch, "epochs_since_best": self.epochs_since_best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved state."""
        vars(self).update(state)
