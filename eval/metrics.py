"""Score decisions and probabilities against labels: per finding, and as named macro and micro means."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.metrics import average_precision_score, precision_recall_fscore_support, roc_auc_score

from eval.thresholds import Floats, apply_thresholds, paired

DECIDED = ("precision", "recall", "f1")
RANKED = ("auroc", "average_precision")
COUNTS = ("scored", "images", "positives", "tp", "fp", "fn", "tn")
COLUMNS = (*COUNTS[:3], "prevalence", "threshold", *COUNTS[3:], *DECIDED, *RANKED)

Row = dict[str, float]


@dataclass(frozen=True, eq=False)
class Scores:
    """What a model scored on one split; NaN (NA in the counts) is a number that does not exist."""

    per_finding: pd.DataFrame
    """One row per finding, index `finding`, columns COLUMNS. `scored` is 1, or 0 for one left out;
    `average_precision` is the area under the precision-recall curve as scikit-learn sums it."""
    macro: Row
    """Means over the scored findings (`scored` says how many), by column; no counts but `images`."""
    micro: Row
    """The same measures on the decisions and probabilities of all scored findings, pooled."""
    skipped: tuple[str, ...]
    """Findings with one class only: all their measures are NaN, and both means leave them out."""
    without_threshold: tuple[str, ...]
    """Findings with a NaN threshold, not among the skipped: ranked, but without precision, recall
    and F1, and left out of the means of these three."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """One sentence for each finding that is left out of a mean; to be printed, not dropped."""
        one_class = (
            f"{finding} has no {'negatives' if self.per_finding.at[finding, 'positives'] else 'positives'} "
            f"in this split: it scores NaN and is left out of the macro and micro means."
            for finding in self.skipped
        )
        undecided = (
            f"{finding} has no threshold: its precision, recall and F1 are NaN "
            f"and left out of the macro and micro means."
            for finding in self.without_threshold
        )
        return (*one_class, *undecided)

    def to_frame(self) -> pd.DataFrame:
        """Return the table of metrics.csv: a row per finding, then the rows `macro` and `micro`."""
        return pd.concat([self.per_finding, _frame({"macro": self.macro, "micro": self.micro})])

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain dicts, lists and numbers, with None for NaN."""
        rows = self.per_finding.to_dict("index")
        return {
            "per_finding": {finding: _plain(row) for finding, row in rows.items()},
            "macro": _plain(self.macro),
            "micro": _plain(self.micro),
            "skipped": list(self.skipped),
            "without_threshold": list(self.without_threshold),
            "warnings": list(self.warnings),
        }

    def to_text(self) -> str:
        """Return the table for a terminal, three decimals, `-` for NaN, and the warnings under it."""
        table = self.to_frame().drop(columns="scored").rename_axis(index=None)
        text = table.rename(columns={"average_precision": "AP", "auroc": "AUROC", "f1": "F1"}).to_string(
            float_format=lambda value: f"{value:.3f}", na_rep="-"
        )
        return "\n".join([text.replace("<NA>", "   -"), *self.warnings])


def score(
    labels: npt.NDArray[Any],
    probabilities: npt.NDArray[Any],
    thresholds: npt.NDArray[Any],
    findings: Sequence[str],
) -> Scores:
    """Score `probabilities` and the decisions that `thresholds` make of them.

    `labels` is 0 or 1 and `probabilities` a float in [0, 1], both [N, F] in the order of `findings`;
    `thresholds` is float [F], fitted on another split, NaN for a finding without one.

    All measures are scikit-learn's. A finding without any alarm has precision 0 and F1 0, which is
    its `zero_division=0`; `average_precision` is the step-wise sum over (R_n - R_{n-1}) P_n, not the
    trapezoid. A finding without positives or without negatives has NaN for every measure. Macro is
    the mean over the findings that are not NaN; micro pools the same findings, and its AUROC ranks
    the flattened matrix. Raises ValueError as `paired` does, or if F differs between the arguments.
    """
    truth, probabilities = paired(labels, probabilities)
    thresholds = np.asarray(thresholds, dtype=np.float64)
    if not truth.shape[1:] == thresholds.shape == (len(findings),):
        raise ValueError(
            f"expected one column and one threshold for each of {len(findings)} findings, "
            f"got arrays of shape {list(truth.shape)} and {list(thresholds.shape)}"
        )
    rows = {}
    for column, finding in enumerate(findings):
        one = slice(column, column + 1)
        rows[finding] = _row(truth[:, one], probabilities[:, one], thresholds[one])
        rows[finding]["threshold"] = float(thresholds[column])
    per_finding = _frame(rows)
    scored = two_classes(truth)
    averaged = ("prevalence", *DECIDED, *RANKED)
    means = {name: float(per_finding.loc[scored, name].mean()) for name in averaged}
    return Scores(
        per_finding=per_finding,
        macro=_filled({"scored": int(scored.sum()), "images": len(truth), **means}),
        micro=_row(truth[:, scored], probabilities[:, scored], thresholds[scored]),
        skipped=_named(findings, ~scored),
        without_threshold=_named(findings, scored & np.isnan(thresholds)),
    )


def two_classes(labels: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Tell, bool [F], which columns of the 0/1 labels [N, F] hold both classes and can be scored."""
    truth = labels.astype(np.bool_)
    return np.asarray(truth.any(axis=0) & ~truth.all(axis=0))


def _row(truth: npt.NDArray[np.bool_], probabilities: Floats, thresholds: Floats) -> Row:
    """Pool the columns of one finding, or of all that are scored, into one row of measures."""
    ranked = two_classes(truth)
    with_threshold = ~np.isnan(thresholds)
    row: Row = {"scored": int(ranked.sum()), "images": len(truth), "positives": int(truth.sum())}
    if truth.size:
        row["prevalence"] = float(truth.mean())
    if ranked.any():
        flat = truth[:, ranked].ravel(), probabilities[:, ranked].ravel()
        row["auroc"] = float(roc_auc_score(*flat))
        row["average_precision"] = float(average_precision_score(*flat))
    if with_threshold.any():
        alarms = apply_thresholds(probabilities, thresholds)[:, with_threshold]
        decided = truth[:, with_threshold]
        row["tp"] = int((decided & alarms).sum())
        row["fp"] = int((~decided & alarms).sum())
        row["fn"] = int((decided & ~alarms).sum())
        row["tn"] = int((~decided & ~alarms).sum())
        if (ranked & with_threshold).any():
            measures = precision_recall_fscore_support(
                decided.ravel(), alarms.ravel(), average="binary", zero_division=0
            )
            row |= zip(DECIDED, map(float, measures[:3]), strict=True)
    return _filled(row)


def _filled(row: Row) -> Row:
    return dict.fromkeys(COLUMNS, math.nan) | row


def _frame(rows: dict[str, Row]) -> pd.DataFrame:
    table = pd.DataFrame.from_dict(rows, orient="index", columns=list(COLUMNS))
    return table.astype(dict.fromkeys(COUNTS, "Int64")).rename_axis(index="finding")


def _named(findings: Sequence[str], chosen: npt.NDArray[np.bool_]) -> tuple[str, ...]:
    return tuple(finding for finding, is_chosen in zip(findings, chosen, strict=True) if is_chosen)


def _plain(row: Mapping[Any, Any]) -> dict[str, float | None]:
    return {name: None if pd.isna(value) else value for name, value in row.items()}
