"""Bootstrap over patients: metrics on resamples, confidence intervals, and paired differences of two models."""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from eval.scores.metrics import DECIDED, ERRORS, MEASURES, Scores
from eval.scores.thresholds import Floats, with_thresholds
from eval.scores.weighted import weighted_scores
from shards.processes import available_cores

MEANS = ("macro", "micro")

LEVEL = 0.95
"""Default confidence level."""

AT_HALF, CALIBRATED = "at_half_", "calibrated_"
"""Prefixes of the columns for the threshold 0.5 and for the calibrated probabilities."""

# Resamples measured at once: their weights of 2,797 patients, NIH's test split, then fit a core's cache.
# Measured fastest of 16, 32, 64 and 128.
_CHUNK = 32


@dataclass(frozen=True, eq=False)
class Resampled:
    """All measures of one model on the same resamples of the patients."""

    findings: tuple[str, ...]
    values: dict[str, Floats]
    """Of each measure of metrics.MEASURES, float64 [R, F + 2]: the findings, macro, micro. NaN where a resample has
    one class only."""
    point_estimate: dict[str, Floats]
    """The same of the split itself, [F + 2]; equal to `metrics.score` but for rounding."""
    signed_ece: Floats
    """[R, F + 2], as `WeightedScores.signed_ece` returns it: how an ECE varies, without its bias."""
    seed: int
    patients: npt.NDArray[np.int64]
    """[N], sorted: the patient of each image. With the seed they determine the resamples."""

    @property
    def resamples(self) -> int:
        """R, the number of resamples."""
        return len(self.values["auroc"])

    @property
    def rows(self) -> tuple[str, ...]:
        """The names of the F + 2 columns of `values`: the findings, macro, micro."""
        return (*self.findings, *MEANS)

    @property
    def dropped(self) -> pd.Series:
        """How many resamples each row's intervals leave out, because they have one class only.

        All of them for a finding that is not scored; for macro those in which any scored finding has one class.
        """
        return pd.Series(np.isnan(self.values["auroc"]).sum(axis=0), index=self.rows, name="dropped")

    @property
    def warnings(self) -> tuple[str, ...]:
        """One sentence for each row whose intervals leave resamples out; to be printed, not dropped."""
        return tuple(
            f"{row} {'lacks a finding' if row == 'macro' else 'has one class only'} in {count:,} of "
            f"{self.resamples:,} resamples: its intervals leave these out."
            for row, count in self.dropped.items()
            if 0 < count < self.resamples
        )

    def intervals(self, level: float = LEVEL) -> pd.DataFrame:
        """Return the percentile intervals: a row per finding, then macro and micro; NaN where there is none.

        The columns are `{measure}_low` and `{measure}_high`. The ends are the (R + 1) alpha-th smallest values of
        `estimates`, alpha = (1 - level) / 2 and 1 - alpha, interpolated (Davison and Hinkley, "Bootstrap Methods and
        their Application", 1997, section 5.3.1), within 0..1. In 1,500 simulated splits of 300 patients they held the
        truth in 93.1 to 95.9 %, of two findings and both means and of every measure; intervals over images, in 500 of
        these splits, in 66 to 78 % (tests/eval/scores/test_bootstrap.py).
        """
        columns = {}
        for measure in self.values:
            estimates = self.estimates(measure).clip(0, 1)
            columns[f"{measure}_low"], columns[f"{measure}_high"] = _ends(estimates, level)
        return pd.DataFrame(columns, index=pd.Index(self.rows, name="finding"))

    def estimates(self, measure: str) -> Floats:
        """Return the values that the intervals of a measure are read from, float64 [R, F + 2].

        These are the resampled values, except for `ece`: point - bias - (signed_ece - point), with bias = mean of the
        resampled values - point (the bias-corrected basic bootstrap, Davison and Hinkley, sections 2.2 and 5.2). ECE
        adds absolute gaps, so chance inflates it, resampling inflates it again, and taking absolute values narrows its
        spread. Hence the bias comes from the values and the spread from the signed gaps, and the interval can lie
        below the ECE of the split. In the simulation with a true ECE of 0.03, the values themselves cover it in 1 to
        64 %, their reflection in 86 to 91 %.
        """
        values = self.values[measure]
        if measure != "ece":
            return values
        known = ~np.isnan(values)
        counts = np.maximum(known.sum(axis=0), 1)
        bias = np.where(known, values, 0).sum(axis=0) / counts - self.point_estimate[measure]
        return np.where(known, 2 * self.point_estimate[measure] - bias - self.signed_ece, np.nan)


def bootstrap(
    labels: npt.NDArray[Any],
    probabilities: npt.NDArray[Any],
    thresholds: npt.NDArray[Any],
    patients: npt.NDArray[Any],
    findings: Sequence[str],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Resampled:
    """Measure `resamples` draws of P of the P patients with replacement, each with all its images.

    Images of one patient resemble each other, so they are drawn together. Arguments are those of `metrics.score`;
    `patients` is [N], integers. The thresholds stay as they are: the intervals are of these decisions, not of the fit.
    Resample r depends on `seed`, r and the set of patients alone: two models on the same images are measured on the
    same resamples, and more resamples begin with the same ones.

    In each resample every measure is what `metrics.score` defines, zero divisions included. Macro is the mean over the
    findings that have a number on the whole split; in a resample in which one of them has one class only it is NaN,
    because a mean over fewer findings is another mean. Micro pools the same findings in every resample. 1,000
    resamples of 25,596 images x 14 findings take 1.4 s on one core. Raises ValueError as `score` does, if `patients`
    is not [N], and for less than one resample.
    """
    truth, probabilities, thresholds = with_thresholds(labels, probabilities, thresholds, findings)
    if patients.shape != truth.shape[:1]:
        raise ValueError(f"expected a patient for each of {len(truth)} images, got {list(patients.shape)}")
    if resamples < 1:
        raise ValueError(f"expected one resample or more, got {resamples}")
    names, units = np.unique(patients, return_inverse=True)
    weighted = weighted_scores(truth, probabilities, thresholds, units)

    def statistics(weights: Floats) -> list[Floats]:
        measured = weighted.measure(weights)
        return [*(measured[name].T for name in MEASURES), weighted.signed_ece(weights).T]

    *measured, signed = resample(statistics, len(names), resamples=resamples, seed=seed)
    return Resampled(
        findings=tuple(findings),
        values={name: _rows(array[:, 1:]) for name, array in zip(MEASURES, measured, strict=True)},
        point_estimate={name: array[:, 0] for name, array in zip(MEASURES, measured, strict=True)},
        signed_ece=_rows(signed[:, 1:]),
        seed=seed,
        patients=np.sort(patients).astype(np.int64),
    )


def resample(
    statistics: Callable[[Floats], Sequence[Floats]], patients: int, *, resamples: int, seed: int
) -> list[Floats]:
    """Evaluate statistics on a sample and on bootstrap resamples of its U patients.

    `statistics` takes weights [U, r], how often each of r resamples holds each patient, and returns arrays [..., r].
    Returns each of them as [..., 1 + R]: the sample itself, then R resamples, of which resample i depends on `seed`, i
    and U alone. Chunks of resamples run in threads, and their number changes no result: numpy's and scipy's loops
    release the interpreter lock.
    """

    def evaluate(start: int) -> Sequence[Floats]:
        numbers = range(start, min(start + _CHUNK, resamples))
        return statistics(np.stack([bootstrap_counts(patients, seed, number) for number in numbers], axis=1))

    with ThreadPoolExecutor(available_cores()) as pool:
        chunks = list(pool.map(evaluate, range(0, resamples, _CHUNK)))
    point = statistics(np.ones((patients, 1)))
    return [np.concatenate(arrays, axis=-1) for arrays in zip(point, *chunks, strict=True)]


def _rows(columns: Floats) -> Floats:
    # Row by row in memory: the order in which sums over the resamples add depends on the layout.
    return np.ascontiguousarray(columns.T)


def bootstrap_counts(units: int, seed: int, number: int) -> Floats:
    """Return how often resample `number` holds each of the units: float64 [U], whole numbers of sum U."""
    drawn = np.random.default_rng([seed, number]).integers(0, units, units)
    return np.bincount(drawn, minlength=units).astype(np.float64)


def percentiles(values: Floats, level: float = LEVEL) -> tuple[float, float]:
    """Return the ends of the percentile interval of resampled values [R] without their NaN; NaN of none."""
    values = values[~np.isnan(values)]
    if not len(values):
        return math.nan, math.nan
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], method="weibull")
    return float(low), float(high)


def _ends(estimates: Floats, level: float = LEVEL) -> Floats:
    """Return the lower and the upper ends [2, C] of the intervals of resampled values [R, C]."""
    return np.array([percentiles(column, level) for column in estimates.T]).T


def all_intervals(
    resampled: Resampled,
    labels: npt.NDArray[Any],
    probabilities: npt.NDArray[Any],
    patients: npt.NDArray[Any],
    calibrated: npt.NDArray[Any] | None = None,
) -> pd.DataFrame:
    """Return the 95 % intervals of `resampled` and, on the same resamples, at 0.5 and after calibration.

    `labels`, `probabilities` and `patients` are what `resampled` was computed from; `calibrated` is the probabilities
    after calibration, [N, F]. Rows and columns are those of `Resampled.intervals`, followed by the columns
    `at_half_{measure}_low` and `_high` of each measure in DECIDED, with 0.5 as the threshold of every finding, and, of
    the calibrated probabilities, `calibrated_{measure}_low` and `_high` of each in ERRORS.
    """
    table = resampled.intervals().join(
        _other_intervals(resampled, labels, probabilities, patients, 0.5, DECIDED, AT_HALF)
    )
    if calibrated is None:
        return table
    return table.join(_other_intervals(resampled, labels, calibrated, patients, np.nan, ERRORS, CALIBRATED))


def _other_intervals(
    resampled: Resampled,
    labels: npt.NDArray[Any],
    probabilities: npt.NDArray[Any],
    patients: npt.NDArray[Any],
    threshold: float,
    measures: tuple[str, ...],
    prefix: str,
) -> pd.DataFrame:
    findings, count = resampled.findings, resampled.resamples
    cuts: Floats = np.full(len(findings), threshold)
    other = bootstrap(labels, probabilities, cuts, patients, findings, resamples=count, seed=resampled.seed)
    ends = [f"{measure}_{end}" for measure in measures for end in ("low", "high")]
    return other.intervals()[ends].add_prefix(prefix)


def compare(first: Resampled, other: Resampled, first_scores: Scores, other_scores: Scores) -> pd.DataFrame:
    """Return what `other` scores more than `first`, with 95 % interval and p-value, per finding and mean.

    The rows are the findings, macro and micro; the columns, for each measure of metrics.MEASURES,
    `{measure}_difference` (other - first, on the whole split), `{measure}_low` and `{measure}_high` (percentile
    interval of the difference within each resample), and `{measure}_p` (`p_value` of those differences); of ECE they
    are computed from `Resampled.estimates`. For Brier and ECE a negative difference is the better one. NaN where a
    model has no number, and for the means of the measures DECIDED if the models lack thresholds of different findings:
    those means are not of the same findings. No p-value is corrected for the number of findings and measures.

    Both models must have been measured on the same images and resampled alike; raises ValueError, naming what differs,
    if patients, labels, findings, seed or number of resamples are not the same.
    """
    _require_alike(first, other, first_scores, other_scores)
    before, after = first_scores.to_frame(), other_scores.to_frame()
    columns: dict[str, npt.NDArray[np.float64]] = {}
    for measure in MEASURES:
        columns[f"{measure}_difference"] = (after[measure] - before[measure]).to_numpy(dtype=np.float64)
        resampled = other.estimates(measure) - first.estimates(measure)
        columns[f"{measure}_low"], columns[f"{measure}_high"] = _ends(resampled)
        columns[f"{measure}_p"] = np.array([p_value(column[~np.isnan(column)]) for column in resampled.T])
    table = pd.DataFrame(columns, index=pd.Index(first.rows, name="finding"))
    if first_scores.without_threshold != other_scores.without_threshold:
        decided = [name for name in table if str(name).rpartition("_")[0] in DECIDED]
        table.loc[list(MEANS), decided] = math.nan
    return table


def p_value(differences: Floats) -> float:
    """Return the two-sided bootstrap p-value of no difference, in (0, 1]; NaN without any resample.

    `differences` is float64 [R], one of each resample. The value is 2 (1 + k) / (R + 1), at most 1, where k is the
    smaller of the numbers of differences <= 0 and >= 0: the percentile interval inverted (Efron and Tibshirani, "An
    Introduction to the Bootstrap", 1993, section 15.4), with the 1 added to both numbers that keeps a simulated
    p-value from 0 (Davison and Hinkley, equation 4.11). At R = 1,000 the smallest is 0.002. Two models that never
    differ have 1.
    """
    if not len(differences):
        return math.nan
    smaller = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    return min(1.0, 2 * (1 + smaller) / (len(differences) + 1))


def _require_alike(first: Resampled, other: Resampled, first_scores: Scores, other_scores: Scores) -> None:
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
