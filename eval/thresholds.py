"""Turn probabilities into decisions: one threshold per finding, fitted on val and applied anywhere.

The comparison is everywhere `float64(probability) >= threshold`. A fitted threshold is one of the
probabilities it was fitted on, not a midpoint. Widening float16 or float32 to float64 is exact and
JSON writes a float64 with all its digits, so the decisions of the fit come back from a stored
threshold to the last image.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Cuts:
    """All the decisions that thresholds can make for one finding, fewest alarms first."""

    values: Floats
    """The distinct probabilities, descending, shape [C]; `probability >= values[c]` is an alarm."""
    true_positives: Counts
    """Positive images with an alarm at each cut, shape [C]."""
    alarms: Counts
    """Images with an alarm at each cut, shape [C]; the last is the number of images."""

    @property
    def positives(self) -> int:
        """The number of positive images: the lowest cut raises an alarm for every image."""
        return int(self.true_positives[-1])


Rule = Callable[[Cuts], float]
"""A rule picks one of `cuts.values`, or NaN where the finding gives it nothing to go by."""


def best_f1(cuts: Cuts) -> float:
    """Return the cut of the greatest F1 = 2 TP / (alarms + positives); NaN without positives.

    Among cuts of equal F1 the highest wins, which is the one with the fewest alarms. Equal F1 are
    found equal: a quotient of integers is rounded once, and different quotients of numbers below
    2**25 lie further apart than float64 resolves.
    """
    if cuts.positives == 0:
        return float("nan")
    f1 = 2 * cuts.true_positives / (cuts.alarms + cuts.positives)
    return float(cuts.values[np.argmax(f1)])  # argmax takes the first, and the cuts descend


def pick_thresholds(
    labels: npt.NDArray[Any], probabilities: npt.NDArray[Any], rule: Rule = best_f1
) -> Floats:
    """Fit one threshold per finding by `rule`, over every cut point and not over a grid.

    `labels` is 0 or 1, `probabilities` a float in [0, 1], both [N, F] and from the val split.
    Returns float64 [F]. A finding for which the rule is undefined (F1: no positives) gets NaN: it has
    no threshold, which the caller must say. Raises ValueError as `paired` does.
    """
    labels, probabilities = paired(labels, probabilities)
    columns = zip(labels.T, probabilities.T, strict=True)
    return np.array([rule(_cuts(positive, scores)) for positive, scores in columns], dtype=np.float64)


def apply_thresholds(probabilities: npt.NDArray[Any], thresholds: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Return the decisions `float64(probability) >= threshold`, bool [N, F].

    `probabilities` is [N, F], `thresholds` is [F]. A NaN threshold decides nothing: its column is
    all False and must not be scored. Raises ValueError if the shapes do not fit.
    """
    thresholds = np.asarray(thresholds, dtype=np.float64)
    if probabilities.ndim != 2 or thresholds.shape != probabilities.shape[1:]:
        raise ValueError(
            f"expected probabilities [N, F] and thresholds [F], "
            f"got {list(probabilities.shape)} and {list(thresholds.shape)}"
        )
    return np.asarray(probabilities.astype(np.float64) >= thresholds)


def paired(labels: npt.NDArray[Any], probabilities: npt.NDArray[Any]) -> tuple[npt.NDArray[np.bool_], Floats]:
    """Check labels against probabilities; return them as bool and as float64, both [N, F].

    Raises ValueError unless both are [N, F] with N >= 1, every label is 0 or 1 and every probability
    lies in [0, 1] (so no NaN, and no logits); the message names the first offender.
    """
    if labels.ndim != 2 or labels.shape != probabilities.shape or len(labels) == 0:
        raise ValueError(
            f"expected labels and probabilities of one shape [N, F], N >= 1, "
            f"got {list(labels.shape)} and {list(probabilities.shape)}"
        )
    probabilities = probabilities.astype(np.float64)
    _all(labels, (labels == 0) | (labels == 1), "a label of 0 or 1")
    _all(probabilities, (probabilities >= 0) & (probabilities <= 1), "a probability in [0, 1]")
    return labels.astype(np.bool_), probabilities


def _all(values: npt.NDArray[Any], good: npt.NDArray[np.bool_], wanted: str) -> None:
    if not good.all():
        row, column = np.argwhere(~good)[0]
        raise ValueError(f"expected {wanted}, got {values[row, column]} in row {row}, column {column}")


def _cuts(positive: npt.NDArray[np.bool_], scores: Floats) -> Cuts:
    order = np.argsort(-scores)
    scores = scores[order]
    # Images of one probability raise their alarms together: only the last of each run is a cut.
    last = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)
    return Cuts(
        values=scores[last],
        true_positives=np.cumsum(positive[order], dtype=np.int64)[last],
        alarms=last.astype(np.int64) + 1,
    )
