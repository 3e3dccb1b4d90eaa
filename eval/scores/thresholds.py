"""Decision thresholds: one per finding, fitted on val, applied anywhere.

The comparison is everywhere `float64(probability) >= threshold`. A fitted threshold is one of the probabilities it was
fitted on, not a midpoint. Widening float16 or float32 to float64 is exact and JSON writes a float64 with all digits, so
a stored threshold repeats the decisions of the fit to the last image.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class OperatingPoints:
    """Every decision a threshold can make for one finding, fewest predicted positives first."""

    values: Floats
    """The distinct probabilities, descending, shape [C]; `probability >= values[c]` is positive."""
    true_positives: Counts
    """True positives at each threshold, shape [C]."""
    predicted_positives: Counts
    """Predicted positives at each threshold, shape [C]; the last is the number of images."""

    @property
    def positives(self) -> int:
        """The number of positive images: at the lowest threshold every image is predicted positive."""
        return int(self.true_positives[-1])

    @property
    def negatives(self) -> int:
        """The number of negative images."""
        return int(self.predicted_positives[-1]) - self.positives

    @property
    def false_positives(self) -> Counts:
        """False positives at each threshold, shape [C]."""
        return self.predicted_positives - self.true_positives


@dataclass(frozen=True)
class Rule:
    """How to pick one of the operating points of a finding."""

    name: str
    """As given on the command line and stored: `f1`, `youden`, `sensitivity=0.9`."""
    meaning: str
    """One phrase: what is picked, and which of several equal ones."""
    pick: Callable[[OperatingPoints], float] = field(compare=False, repr=False)
    """Returns one of `points.values`, or NaN where the rule is undefined for the finding."""


def parse_rule(text: str) -> Rule:
    """Return the rule of that name; RULES lists them.

    A target, as in `sensitivity=0.9`, lies above 0 and at most at 1. Every rule takes the exact optimum over all
    operating points, and every tie is resolved:

    - `f1`: the greatest F1; the highest of equal ones, which predicts the fewest positives.
    - `youden`: the greatest J = sensitivity + specificity - 1 (Youden, Cancer 1950, 3:32-35), ties as for f1.
    - `sensitivity=S`: the highest threshold of at least this sensitivity, which has the greatest specificity.
    - `specificity=S`: the lowest threshold of at least this specificity, which has the greatest sensitivity.
    - `precision=P`: the threshold of greatest sensitivity among those of at least this precision; the highest of equal
      ones.

    Raises ValueError for any other text.

    >>> parse_rule("sensitivity=0.90").name
    'sensitivity=0.9'
    """
    if text == F1.name:
        return F1
    if text == "youden":
        return Rule(
            text, "the greatest sensitivity + specificity - 1; of equal ones the highest threshold", _best_youden
        )
    kind, _, number = text.partition("=")
    if kind not in _TARGETS:
        raise ValueError(f"unknown threshold rule {text!r}; there are {RULES}")
    try:
        target = float(number)
    except ValueError:
        target = math.nan
    if not 0 < target <= 1:
        raise ValueError(f"the target of {kind} is a number above 0 and at most 1, got {text!r}")
    meaning, pick = _TARGETS[kind]
    return Rule(f"{kind}={target}", meaning.format(target), partial(pick, target))


def _best_f1(points: OperatingPoints) -> float:
    """Return the threshold of the greatest F1 = 2 TP / (predicted positives + positives); NaN without positives.

    Equal F1 compare equal: a quotient of integers is rounded once, and different quotients of numbers below 2**25
    differ by more than float64 rounds.
    """
    if points.positives == 0:
        return math.nan
    f1 = 2 * points.true_positives / (points.predicted_positives + points.positives)
    return float(points.values[np.argmax(f1)])  # argmax takes the first, and the values descend


def _best_youden(points: OperatingPoints) -> float:
    """Return the threshold of the greatest TP / positives - FP / negatives; NaN without both classes."""
    if points.positives == 0 or points.negatives == 0:
        return math.nan
    # Times positives x negatives: integers, so that equal ones compare equal.
    scaled = points.true_positives * points.negatives - points.false_positives * points.positives
    return float(points.values[np.argmax(scaled)])


def _at_sensitivity(target: float, points: OperatingPoints) -> float:
    """Return the highest threshold with TP / positives >= target; NaN without positives."""
    if points.positives == 0:
        return math.nan
    # A quotient that equals the target is rounded to the same float64 as its decimal.
    return float(points.values[np.argmax(points.true_positives / points.positives >= target)])


def _at_specificity(target: float, points: OperatingPoints) -> float:
    """Return the lowest threshold with TN / negatives >= target; NaN if none has, or without negatives."""
    if points.negatives == 0:
        return math.nan
    reached = (points.negatives - points.false_positives) / points.negatives >= target
    return float(points.values[reached][-1]) if reached.any() else math.nan


def _at_precision(target: float, points: OperatingPoints) -> float:
    """Return the threshold of most TP with TP / predicted positives >= target; NaN if there is none."""
    reached = points.true_positives / points.predicted_positives >= target
    if not reached.any():
        return math.nan
    return float(points.values[np.argmax(np.where(reached, points.true_positives, -1))])


F1 = Rule("f1", "the greatest F1; of equal ones the highest threshold", _best_f1)

_TARGETS: dict[str, tuple[str, Callable[[float, OperatingPoints], float]]] = {
    "sensitivity": ("the highest threshold with sensitivity {} or more", _at_sensitivity),
    "specificity": ("the lowest threshold with specificity {} or more", _at_specificity),
    "precision": (
        "the greatest sensitivity with precision {} or more; of equal ones the highest threshold",
        _at_precision,
    ),
}

RULES = "f1, youden, sensitivity=S, specificity=S and precision=P, with S and P above 0 and at most 1"


def pick_thresholds(labels: npt.NDArray[Any], probabilities: npt.NDArray[Any], rule: Rule = F1) -> Floats:
    """Fit one threshold per finding by `rule`, over every distinct probability and not over a grid.

    `labels` is 0 or 1, `probabilities` a float in [0, 1], both [N, F] and from the val split. Returns float64 [F]. A
    finding for which the rule is undefined (F1: no positives), or whose target no threshold reaches, gets NaN; the
    caller must report it. Raises ValueError as `paired` does.
    """
    labels, probabilities = paired(labels, probabilities)
    columns = zip(labels.T, probabilities.T, strict=True)
    return np.array([rule.pick(_operating_points(positive, scores)) for positive, scores in columns], dtype=np.float64)


def apply_thresholds(probabilities: npt.NDArray[Any], thresholds: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Return the decisions `float64(probability) >= threshold`, bool [N, F].

    `probabilities` is [N, F], `thresholds` is [F]. The column of a NaN threshold is all False and must not be scored.
    Raises ValueError if the shapes do not fit.
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

    Raises ValueError, naming the first offender, unless both are [N, F] with N >= 1, every label is 0 or 1 and every
    probability lies in [0, 1] (so no NaN, and no logits).
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


def with_thresholds(
    labels: npt.NDArray[Any], probabilities: npt.NDArray[Any], thresholds: npt.NDArray[Any], findings: Sequence[str]
) -> tuple[npt.NDArray[np.bool_], Floats, Floats]:
    """Return the arrays of `paired`, and the thresholds as float64 [F].

    Raises ValueError as `paired` does, or unless there are one column and one threshold per finding.
    """
    truth, probabilities = paired(labels, probabilities)
    thresholds = np.asarray(thresholds, dtype=np.float64)
    if not truth.shape[1:] == thresholds.shape == (len(findings),):
        raise ValueError(
            f"expected one column and one threshold for each of {len(findings)} findings, "
            f"got arrays of shape {list(truth.shape)} and {list(thresholds.shape)}"
        )
    return truth, probabilities, thresholds


def _all(values: npt.NDArray[Any], good: npt.NDArray[np.bool_], wanted: str) -> None:
    if not good.all():
        row, column = np.argwhere(~good)[0]
        raise ValueError(f"expected {wanted}, got {values[row, column]} in row {row}, column {column}")


def _operating_points(positive: npt.NDArray[np.bool_], scores: Floats) -> OperatingPoints:
    order = np.argsort(-scores)
    scores = scores[order]
    # Images of equal probability turn positive together: only the last of each run is a threshold.
    last = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)
    return OperatingPoints(
        values=scores[last],
        true_positives=np.cumsum(positive[order], dtype=np.int64)[last],
        predicted_positives=last.astype(np.int64) + 1,
    )
