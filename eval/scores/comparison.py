"""Paired differences between two models on the same resamples of the same patients."""

import numpy as np
import numpy.typing as npt
import pandas as pd

from eval.scores.bootstrap import LEVEL, MEANS, Resampled, percentiles
from eval.scores.metrics import DECIDED, MEASURES, Scores
from eval.scores.thresholds import Floats


def compare(
    first: Resampled, other: Resampled, first_scores: Scores, other_scores: Scores, level: float = LEVEL
) -> pd.DataFrame:
    """Return what `other` scores more than `first`, with interval and p-value, per finding and mean.

    The rows are the findings, macro and micro; the columns, for each measure of metrics.MEASURES,
    `{measure}_difference` (other - first, on the whole split), `{measure}_low` and `{measure}_high`
    (percentile interval of the difference within each resample), and `{measure}_p` (`p_value` of
    those differences); of ECE as `Resampled.estimates` has it. For Brier and ECE a negative
    difference is the better one. NaN where a model has no number, and for the means of the
    measures DECIDED if the models lack thresholds of different findings: those means are not of
    the same findings. No p-value is corrected for the number of findings and measures.

    Both models must have been measured on the same images, resampled alike; raises ValueError,
    saying what differs, if patients, labels, findings, seed or number of resamples are not the same.
    """
    _check(first, other, first_scores, other_scores)
    before, after = first_scores.to_frame(), other_scores.to_frame()
    columns: dict[str, npt.NDArray[np.float64]] = {}
    for measure in MEASURES:
        columns[f"{measure}_difference"] = (after[measure] - before[measure]).to_numpy(dtype=np.float64)
        resampled = other.estimates(measure) - first.estimates(measure)
        columns[f"{measure}_low"], columns[f"{measure}_high"] = np.array(
            [percentiles(column, level) for column in resampled.T]
        ).T
        columns[f"{measure}_p"] = np.array([p_value(column[~np.isnan(column)]) for column in resampled.T])
    table = pd.DataFrame(columns, index=pd.Index(first.rows, name="finding"))
    if first_scores.without_threshold != other_scores.without_threshold:
        decided = [name for name in table if str(name).rpartition("_")[0] in DECIDED]
        table.loc[list(MEANS), decided] = float("nan")
    return table


def p_value(differences: Floats) -> float:
    """Return the two-sided bootstrap p-value of no difference, in (0, 1]; NaN without any resample.

    `differences` is float64 [R], one of each resample. The value is 2 (1 + k) / (R + 1), at most 1,
    where k is the smaller of the numbers of differences <= 0 and >= 0: the percentile interval
    turned round (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, section 15.4),
    with the 1 added to both numbers that keeps a simulated p-value from 0 (Davison and Hinkley,
    "Bootstrap Methods and their Application", 1997, equation 4.11). At R = 1,000 the smallest is
    0.002. Two models that never differ have 1.
    """
    if not len(differences):
        return float("nan")
    smaller = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    return min(1.0, 2 * (1 + smaller) / (len(differences) + 1))


def _check(first: Resampled, other: Resampled, first_scores: Scores, other_scores: Scores) -> None:
    if first.findings != other.findings:
        raise ValueError(f"the findings differ: {first.findings} and {other.findings}")
    if not np.array_equal(first.patients, other.patients):
        raise ValueError(
            f"the images differ: {len(first.patients)} of {len(np.unique(first.patients))} patients "
            f"and {len(other.patients)} of {len(np.unique(other.patients))} patients are not the same"
        )
    if (first.seed, first.resamples) != (other.seed, other.resamples):
        raise ValueError(
            f"the resamples differ: {first.resamples} of seed {first.seed} and {other.resamples} of seed {other.seed}"
        )
    before, after = (scores.per_finding["positives"].tolist() for scores in (first_scores, other_scores))
    if before != after:
        raise ValueError(f"the labels differ: {before} and {after} positives per finding")
