"""Turn probabilities into decisions: one threshold per finding, fitted on val and applied anywhere.

The comparison is everywhere `float64(probability) >= threshold`. A fitted threshold is one of the
probabilities it was fitted on, not a midpoint. Widening float16 or float32 to float64 is exact and
JSON writes a float64 with all its digits, so the decisions of the fit come back from a stored
threshold to the last image.
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

    @property
    def negatives(self) -> int:
        """The number of negative images."""
        return int(self.alarms[-1]) - self.positives

    @property
    def false_positives(self) -> Counts:
        """Negative images with an alarm at each cut, shape [C]."""
        return self.alarms - self.true_positives


@dataclass(frozen=True)
class Rule:
    """How a threshold is picked among the cuts of one finding."""

    name: str
    """As it is asked for and stored: `f1`, `youden`, `sensitivity=0.9`."""
    meaning: str
    """One phrase that says what is picked, and which of equal ones."""
    pick: Callable[[Cuts], float] = field(compare=False, repr=False)
    """Returns one of `cuts.values`, or NaN where the finding gives it nothing to go by."""


def parse_rule(text: str) -> Rule:
    """Return the rule of that name; RULES says which there are.

    A target, as in `sensitivity=0.9`, lies above 0 and at most at 1. Every rule takes the exact
    optimum over all cuts, and every tie is resolved:

    - `f1`: the greatest F1; the highest of equal ones, which has the fewest alarms.
    - `youden`: the greatest J = sensitivity + specificity - 1 (Youden, Cancer 1950, 3:32-35); the
      highest of equal ones.
    - `sensitivity=S`: the highest cut of at least this sensitivity, which has the greatest specificity.
    - `specificity=S`: the lowest cut of at least this specificity, which has the greatest sensitivity.
    - `precision=P`: of the cuts of at least this precision the one of greatest sensitivity; the
      highest of equal ones.

    Raises ValueError for any other text.

    >>> parse_rule("sensitivity=0.90").name
    'sensitivity=0.9'
    """
    if text == F1.name:
        return F1
    if text == "youden":
        return Rule(
            text, "the greatest sensitivity + specificity - 1; the highest of equal ones", _best_youden
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


def _best_f1(cuts: Cuts) -> float:
    """Return the cut of the greatest F1 = 2 TP / (alarms + positives); NaN without positives.

    Equal F1 are found equal: a quotient of integers is rounded once, and different quotients of
    numbers below 2**25 lie further apart than float64 resolves.
    """
    if cuts.positives == 0:
        return math.nan
    f1 = 2 * cuts.true_positives / (cuts.alarms + cuts.positives)
    return float(cuts.values[np.argmax(f1)])  # argmax takes the first, and the cuts descend


def _best_youden(cuts: Cuts) -> float:
    """Return the cut of the greatest TP / positives - FP / negatives; NaN without both classes."""
    if cuts.positives == 0 or cuts.negatives == 0:
        return math.nan
    # Times positives x negatives: integers, so that equal ones are found equal.
    return float(
        cuts.values[np.argmax(cuts.true_positives * cuts.negatives - cuts.false_positives * cuts.positives)]
    )


def _at_sensitivity(target: float, cuts: Cuts) -> float:
    """Return the highest cut with TP / positives >= target; NaN without positives."""
    if cuts.positives == 0:
        return math.nan
    # A quotient that equals the target is rounded to the same float64 as its decimal.
    return float(cuts.values[np.argmax(cuts.true_positives / cuts.positives >= target)])


def _at_specificity(target: float, cuts: Cuts) -> float:
    """Return the lowest cut with TN / negatives >= target; NaN if none has, or without negatives."""
    if cuts.negatives == 0:
        return math.nan
    reached = (cuts.negatives - cuts.false_positives) / cuts.negatives >= target
    return float(cuts.values[reached][-1]) if reached.any() else math.nan


def _at_precision(target: float, cuts: Cuts) -> float:
    """Return the cut of most TP among those with TP / alarms >= target; NaN if there is none."""
    reached = cuts.true_positives / cuts.alarms >= target
    if not reached.any():
        return math.nan
    return float(cuts.values[np.argmax(np.where(reached, cuts.true_positives, -1))])


F1 = Rule("f1", "the exact maximum of F1; the highest of equal ones", _best_f1)

_TARGETS: dict[str, tuple[str, Callable[[float, Cuts], float]]] = {
    "sensitivity": ("the highest of sensitivity {} or more", _at_sensitivity),
    "specificity": ("the lowest of specificity {} or more", _at_specificity),
    "precision": (
        "the greatest sensitivity at precision {} or more; the highest of equal ones",
        _at_precision,
    ),
}

RULES = "f1, youden, sensitivity=S, specificity=S and precision=P, with S and P above 0 and at most 1"


def pick_thresholds(labels: npt.NDArray[Any], probabilities: npt.NDArray[Any], rule: Rule = F1) -> Floats:
    """Fit one threshold per finding by `rule`, over every cut point and not over a grid.

    `labels` is 0 or 1, `probabilities` a float in [0, 1], both [N, F] and from the val split.
    Returns float64 [F]. A finding for which the rule is undefined (F1: no positives), or whose target
    no cut reaches, gets NaN: it has no threshold, which the caller must say. Raises ValueError as
    `paired` does.
    """
    labels, probabilities = paired(labels, probabilities)
    columns = zip(labels.T, probabilities.T, strict=True)
    return np.array([rule.pick(_cuts(positive, scores)) for positive, scores in columns], dtype=np.float64)


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


def with_thresholds(
    labels: npt.NDArray[Any],
    probabilities: npt.NDArray[Any],
    thresholds: npt.NDArray[Any],
    findings: Sequence[str],
) -> tuple[npt.NDArray[np.bool_], Floats, Floats]:
    """Return what `paired` does, and the thresholds as float64 [F].

    Raises ValueError as `paired` does, or if there is not one column and one threshold a finding.
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
