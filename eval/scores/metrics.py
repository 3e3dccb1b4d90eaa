"""Metrics of probabilities and decisions: per finding, macro and micro means."""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.metrics import average_precision_score, brier_score_loss, precision_recall_fscore_support, roc_auc_score

from eval.scores.thresholds import Floats, apply_thresholds, with_thresholds

DECIDED = ("precision", "recall", "specificity", "npv", "f1")
"""Measures of the decisions at the thresholds; `npv` is the negative predictive value."""
RANKED = ("auroc", "average_precision")
"""Measures of the order of the probabilities alone."""
ERRORS = ("brier", "ece")
"""Measures of the probabilities as probabilities; the smaller the better."""
MEASURES = (*DECIDED, *RANKED, *ERRORS)
COUNTS = ("scored", "images", "positives", "tp", "fp", "fn", "tn")
COLUMNS = (*COUNTS[:3], "prevalence", "threshold", *COUNTS[3:], *MEASURES)

ECE_BINS = 15
"""Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, section 5."""

_HEADINGS = {"npv": "NPV", "f1": "F1", "auroc": "AUROC", "average_precision": "AP", "brier": "Brier", "ece": "ECE"}

Row = dict[str, float]


@dataclass(frozen=True, eq=False)
class Scores:
    """What a model scored on one split; NaN (NA in the counts) is a number that does not exist."""

    per_finding: pd.DataFrame
    """One row per finding, index `finding`, columns COLUMNS. `scored` is 1, or 0 for one left out; `average_precision`
    is the area under the precision-recall curve as scikit-learn sums it."""
    macro: Row
    """Means over the scored findings (`scored` is their number), by column; no counts but `images`."""
    micro: Row
    """The same measures on the decisions and probabilities of all scored findings, pooled."""
    skipped: tuple[str, ...]
    """Findings with one class only: all their measures are NaN, and both means leave them out."""
    without_threshold: tuple[str, ...]
    """Findings with a NaN threshold, not among the skipped: ranked, but without the measures DECIDED, and left out of
    the means of these."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """One sentence for each finding that is left out of a mean; to be printed, not dropped."""
        one_class = (
            f"{finding} has no {'negatives' if self.per_finding.at[finding, 'positives'] else 'positives'} "
            "in this split: it scores NaN and is left out of the macro and micro means."
            for finding in self.skipped
        )
        undecided = (
            f"{finding} has no threshold: its precision, recall, specificity, NPV and F1 are NaN "
            "and left out of the macro and micro means."
            for finding in self.without_threshold
        )
        return (*one_class, *undecided)

    def to_frame(self) -> pd.DataFrame:
        """Return the table of metrics.csv: a row per finding, then the rows `macro` and `micro`."""
        return pd.concat([self.per_finding, _frame({"macro": self.macro, "micro": self.micro})])

    def with_columns(self, other: "Scores", names: Sequence[str]) -> "Scores":
        """Return these scores with the columns `names` of others, means included."""
        return replace(
            self,
            per_finding=self.per_finding.assign(**{name: other.per_finding[name] for name in names}),
            macro=self.macro | {name: other.macro[name] for name in names},
            micro=self.micro | {name: other.micro[name] for name in names},
        )

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain dicts, lists and numbers, with None for NaN."""
        return {
            "per_finding": plain_rows(self.per_finding.to_dict("index")),
            **plain_rows({"macro": self.macro, "micro": self.micro}),
            "skipped": list(self.skipped),
            "without_threshold": list(self.without_threshold),
            "warnings": list(self.warnings),
        }

    def to_text(self) -> str:
        """Return the table for a terminal, three decimals, `-` for NaN, and the warnings under it.

        Its only count is the positives: with all of them a line would not fit.
        """
        table = self.to_frame()[["positives", "prevalence", "threshold", *MEASURES]].rename_axis(index=None)
        text = table.rename(columns=_HEADINGS).to_string(float_format=lambda value: f"{value:.3f}", na_rep="-")
        return "\n".join([text.replace("<NA>", "   -"), *self.warnings])


def score(
    labels: npt.NDArray[Any],
    probabilities: npt.NDArray[Any],
    thresholds: npt.NDArray[Any],
    findings: Sequence[str],
    *,
    measures: Collection[str] = MEASURES,
) -> Scores:
    """Score `probabilities` and the decisions that `thresholds` make of them.

    `labels` is 0 or 1 and `probabilities` a float in [0, 1], both [N, F] in the order of `findings`; `thresholds` is
    float [F], fitted on another split, NaN for a finding without one. Of MEASURES only those in `measures` are
    computed; the others are NaN.

    All measures but `ece` (see `expected_calibration_error`) are scikit-learn's, `specificity` and `npv` as recall and
    precision of the negatives. Where a measure would divide by zero it is 0, as with `zero_division=0`: precision and
    F1 of a finding that is never predicted, NPV of one that is predicted for every image. `average_precision` is the
    step-wise sum over (R_n - R_{n-1}) P_n, not the trapezoid. A finding without positives or without negatives has NaN
    for every measure, also for those that one class would give a number. Macro is the mean over the findings that are
    not NaN; micro pools the same findings: its AUROC ranks the flattened matrix, its ECE bins it. Raises ValueError as
    `paired` does, or if F differs between the arguments.
    """
    truth, probabilities, thresholds = with_thresholds(labels, probabilities, thresholds, findings)
    rows = {}
    for column, finding in enumerate(findings):
        one = slice(column, column + 1)
        rows[finding] = _row(truth[:, one], probabilities[:, one], thresholds[one], measures)
        rows[finding]["threshold"] = float(thresholds[column])
    per_finding = _frame(rows)
    scored = two_classes(truth)
    averaged = ("prevalence", *MEASURES)
    means = {name: float(per_finding.loc[scored, name].mean()) for name in averaged}
    return Scores(
        per_finding=per_finding,
        macro=_filled({"scored": int(scored.sum()), "images": len(truth), **means}),
        micro=_row(truth[:, scored], probabilities[:, scored], thresholds[scored], measures),
        skipped=_named(findings, ~scored),
        without_threshold=_named(findings, scored & np.isnan(thresholds)),
    )


def two_classes(labels: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Return, bool [F], which columns of the 0/1 labels [N, F] hold both classes and can be scored."""
    truth = labels.astype(np.bool_)
    return np.asarray(truth.any(axis=0) & ~truth.all(axis=0))


def calibration_bins(probabilities: npt.NDArray[Any]) -> npt.NDArray[np.intp]:
    """Return the bin of each probability, 0 to ECE_BINS - 1, in the shape of `probabilities`.

    The bins are of equal width and closed above, ((m - 1) / 15, m / 15], as in Guo et al.; 0 is in the first. These are
    the bins of scikit-learn's `calibration_curve(..., n_bins=15)`.
    """
    inner_edges = np.linspace(0, 1, ECE_BINS + 1)[1:-1]
    return np.searchsorted(inner_edges, probabilities.astype(np.float64))


def expected_calibration_error(labels: npt.NDArray[Any], probabilities: npt.NDArray[Any]) -> float:
    """Return the expected calibration error (ECE): |mean probability - prevalence|, averaged over bins.

    `labels` is 0 or 1, `probabilities` in [0, 1], both [N], N >= 1. This is the binary form of ECE (Guo et al., ICML
    2017, equation 3): the sum over the bins of share of images x |mean probability - fraction of positives|. It is of
    the probability of the finding, not of the confidence in the decision. Chance gaps do not cancel between bins, so
    few images give a perfectly calibrated model an ECE above 0.
    """
    bins = calibration_bins(probabilities)
    gaps = np.bincount(bins, weights=probabilities.astype(np.float64) - labels)
    return float(np.abs(gaps).sum() / len(labels))


_UNDECIDED: dict[str, Callable[..., float]] = {
    "auroc": roc_auc_score,
    "average_precision": average_precision_score,
    "brier": brier_score_loss,
    "ece": expected_calibration_error,
}
"""The measures that no threshold changes."""


def _row(truth: npt.NDArray[np.bool_], probabilities: Floats, thresholds: Floats, measures: Collection[str]) -> Row:
    """Pool the columns of one finding, or of all that are scored, into one row of measures."""
    ranked = two_classes(truth)
    with_threshold = ~np.isnan(thresholds)
    row: Row = {"scored": int(ranked.sum()), "images": len(truth), "positives": int(truth.sum())}
    if truth.size:
        row["prevalence"] = float(truth.mean())
    if ranked.any():
        flat = truth[:, ranked].ravel(), probabilities[:, ranked].ravel()
        row |= {name: float(_UNDECIDED[name](*flat)) for name in _UNDECIDED if name in measures}
    if with_threshold.any():
        predicted = apply_thresholds(probabilities, thresholds)[:, with_threshold]
        decided = truth[:, with_threshold]
        row["tp"] = int((decided & predicted).sum())
        row["fp"] = int((~decided & predicted).sum())
        row["fn"] = int((decided & ~predicted).sum())
        row["tn"] = int((~decided & ~predicted).sum())
        if (ranked & with_threshold).any() and not set(DECIDED).isdisjoint(measures):
            precision, recall, f1, _ = precision_recall_fscore_support(
                decided.ravel(), predicted.ravel(), labels=[False, True], zero_division=0
            )
            row |= {"precision": float(precision[1]), "recall": float(recall[1]), "f1": float(f1[1])}
            row |= {"npv": float(precision[0]), "specificity": float(recall[0])}
    return _filled(row)


def _filled(row: Row) -> Row:
    return dict.fromkeys(COLUMNS, math.nan) | row


def _frame(rows: dict[str, Row]) -> pd.DataFrame:
    table = pd.DataFrame.from_dict(rows, orient="index", columns=list(COLUMNS))
    return table.astype(dict.fromkeys(COUNTS, "Int64")).rename_axis(index="finding")


def _named(findings: Sequence[str], chosen: npt.NDArray[np.bool_]) -> tuple[str, ...]:
    return tuple(finding for finding, is_chosen in zip(findings, chosen, strict=True) if is_chosen)


def plain_rows(rows: dict[Any, Any]) -> dict[str, dict[str, Any]]:
    """Return rows, by name, as JSON values: None for NaN."""
    return {
        str(name): {str(column): None if pd.isna(value) else value for column, value in row.items()}
        for name, row in rows.items()
    }
