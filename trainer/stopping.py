"""Early stopping: after so many epochs in a row without a new best on val."""

import math
from typing import Any

MONITORS = {"loss": False, "auroc": True}
"""What can be watched on val -> whether higher is better."""


class EarlyStopping:
    """Keeps the best value and counts the epochs since. With patience 1 the first setback stops."""

    def __init__(self, patience: int, *, higher_is_better: bool = False) -> None:
        self.patience = patience
        """Epochs; 0: never stop."""
        self.higher_is_better = higher_is_better
        self.best = -math.inf if higher_is_better else math.inf
        self.best_epoch = 0
        self.epochs_since_best = 0

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
        self.best = state["best"]
        self.best_epoch = state["best_epoch"]
        self.epochs_since_best = state["epochs_since_best"]
