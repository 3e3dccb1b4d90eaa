"""The rule that ends training."""

import math

import pytest

from trainer.validation import EarlyStopping


def run(patience: int, losses: list[float]) -> tuple[int, int]:
    """Return (epochs run, best epoch)."""
    stopping = EarlyStopping(patience)
    for epoch, loss in enumerate(losses, 1):
        stopping.observe(epoch, loss)
        if stopping.should_stop:
            return epoch, stopping.best_epoch
    return len(losses), stopping.best_epoch


@pytest.mark.parametrize(
    ("patience", "losses", "expected"),
    [
        (1, [3, 2, 2.5, 1], (3, 2)),  # the first rise stops
        (1, [3, 2, 2, 1], (3, 2)),  # and so does standing still
        (2, [3, 2, 2.5, 1, 1.5, 1.6, 0], (6, 4)),
        (0, [3, 4, 5], (3, 1)),  # never
        (1, [math.nan, 1], (1, 0)),  # not a number is not lower
    ],
)
def test_patience_counts_epochs_in_a_row_without_a_lower_loss(
    patience: int, losses: list[float], expected: tuple[int, int]
) -> None:
    assert run(patience, losses) == expected


def test_a_restored_state_counts_on() -> None:
    first = EarlyStopping(2)
    first.observe(1, 1.0)
    first.observe(2, 2.0)
    second = EarlyStopping(2)
    second.load_state_dict(first.state_dict())
    second.observe(3, 2.0)
    assert second.should_stop
    assert (second.best, second.best_epoch) == (1.0, 1)
