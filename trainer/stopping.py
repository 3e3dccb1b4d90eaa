"""When to stop: after so many epochs in a row without a lower val loss."""

import math
from typing import Any


class EarlyStopping:
    """Keeps the best val loss and counts the epochs since. With patience 1 the first rise stops."""

    def __init__(self, patience: int) -> None:
        self.patience = patience
        """Epochs; 0: never stop."""
        self.best_loss = math.inf
        self.best_epoch = 0
        self.epochs_since_best = 0

    @property
    def should_stop(self) -> bool:
        """Whether patience is used up."""
        return 0 < self.patience <= self.epochs_since_best

    def observe(self, epoch: int, val_loss: float) -> bool:
        """Take in one epoch's val loss; return whether it is the best so far."""
        if val_loss < self.best_loss:
            self.best_loss, self.best_epoch, self.epochs_since_best = val_loss, epoch, 0
            return True
        self.epochs_since_best += 1
        return False

    def state_dict(self) -> dict[str, Any]:
        """Return what load_state_dict takes; patience is an option, not a state."""
        return {
            "best_loss": self.best_loss,
            "best_epoch": self.best_epoch,
            "epochs_since_best": self.epochs_since_best,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved state."""
        self.best_loss = state["best_loss"]
        self.best_epoch = state["best_epoch"]
        self.epochs_since_best = state["epochs_since_best"]
