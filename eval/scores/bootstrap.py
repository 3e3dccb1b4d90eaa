"""Bootstrap over patients: every metric on resamples of the patients, and confidence intervals."""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from eval.scores.metrics import DECIDED, ERRORS, MEASURES
from eval.scores.thresholds import Floats, with_thresholds
from eval.scores.weighted import weighted_scores
from shards.processes import available_cores

MEANS = ("macro", "micro")

LEVEL = 0.95
"""Default confidence level."""

# Resamples measured at once: their weights of 2,797 patients, NIH's test split, then fit a core's cache.
# Measured fastest of 16, 32, 64 and 128.
_CHUNK = 32


@dataclass(frozen=True, eq=False)
class Resampled:
    """All measures of one model on the same resamples of the patients."""

    findings: tuple[str, ...]
    values: dict[str, Floats]
    """Of each measure of metrics.MEASURES, float64 [R, F + 2]: the findings, macro, micro. NaN where a
    resample has one class only."""
    point_estimate: dict[str, Floats]
    """The same of the split itself, [F + 2]; equal to `metrics.score` but for rounding."""
    signed_ece: Floats
    """[R, F + 2], as `WeightedScores.signed_ece` has it: how an ECE varies, without its bias."""
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
        """How many resamples are left out of each row's intervals, having one class only.

        All of them for a finding that is not scored; for macro those in which any scored finding
        has one class.
        """
        return pd.Series(np.isnan(self.values["auroc"]).sum(axis=0), index=self.rows, name="dropped")

    @property
    def warnings(self) -> tuple[str, ...]:
        """One sentence for each row whose intervals leave resamples out; to be printed, not dropped."""
        return tuple(
            f"{row} has one class only in {count:,} of {self.resamples:,} resamples: its intervals leave these out."
            if row != "macro"
            else f"macro lacks a finding in {count:,} of {self.resamples:,} resamples: its intervals leave these out."
            for row, count in self.dropped.items()
            if 0 < count < self.resamples
        )

    def intervals(self, level: float = LEVEL) -> pd.DataFrame:
        """Return the percentile intervals: a row per finding, then macro and micro; NaN where none is.

        The columns are `{measure}_low` and `{measure}_high`. The ends are the (R + 1) alpha-th
        smallest values of `estimates`, alpha = (1 - level) / 2 and 1 - alpha, interpolated (Davison
        and Hinkley, "Bootstrap Methods and their Application", 1997, section 5.3.1), within 0..1.
        In 1,500 simulated splits of 300 patients they held the truth in 93.1 to 95.9 %, of two
        findings and both means and of every measure; intervals over images, in 500 of these splits,
        in 66 to 78 % (tests/eval/scores/test_bootstrap.py).
        """
        columns = {}
        for measure in self.values:
            estimates = self.estimates(measure).clip(0, 1)
            ends = np.array([percentiles(column, level) for column in estimates.T])
            columns[f"{measure}_low"], columns[f"{measure}_high"] = ends.T
        return pd.DataFrame(columns, index=pd.Index(self.rows, name="finding"))

    def estimates(self, measure: str) -> Floats:
        """Return what the intervals of a measure are read from, float64 [R, F + 2].

        These are the resampled values, except for `ece`: point - bias - (signed_ece - point), with bias =
        mean of the resampled values - point (the bias-corrected basic bootstrap, Davison and Hinkley,
        sections 2.2 and 5.2). ECE adds absolute gaps, so chance inflates it, resampling inflates it again,
        and taking absolute values narrows its spread. Hence the bias comes from the values and the spread
        from the signed gaps, and the interval can lie below the ECE of the split. In the simulation with
        a true ECE of 0.03, the values themselves cover it in 1 to 64 %, their reflection in 86 to 91 %.
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

    Images of one patient resemble each other, so that they are drawn together. Arguments are those of
    `metrics.score`; `patients` is [N], integers. The thresholds stay as they are: the intervals are of
    these decisions, not of the fit. Resample r depends on `seed`, r and the set of patients alone, so
    that two models on the same images are measured on the same resamples, and more resamples
    begin with the same ones.

    In each resample every measure is what `metrics.score` defines, zero divisions included. Macro is
    the mean over the findings that have a number on the whole split; in a resample in which one of
    them has one class only it is NaN, because a mean over fewer findings is another mean. Micro
    pools the same findings in every resample. 1,000 resamples of 25,596 images x 14 findings take 1.4 s
    on one core. Raises ValueError as `score` does, if `patients` is not [N], and for less than one resample.
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

    `statistics` takes weights [U, r], how often each of r resamples holds each patient, and returns
    arrays [..., r]. Returns each of them as [..., 1 + R]: the sample itself, then R resamples, of which
    resample i depends on `seed`, i and U alone. Chunks of resamples run in threads, and their number
    changes no result: numpy's and scipy's loops release the interpreter lock.
    """

    def evaluate(start: int) -> Sequence[Floats]:
        numbers = range(start, min(start + _CHUNK, resamples))
        return statistics(np.stack([bootstrap_counts(patients, seed, number) for number in numbers], axis=1))

    with ThreadPoolExecutor(available_cores()) as pool:
        chunks = list(pool.map(evaluate, range(0, resamples, _CHUNK)))
    point = statistics(np.ones((patients, 1)))
    return [np.concatenate(arrays, axis=-1) for arrays in zip(point, *chunks, strict=True)]


def _rows(columns: Floats) -> Floats:
    # In memory row by row, so that sums over the resamples add in the same order as ever.
    return np.ascontiguousarray(columns.T)


def percentiles(values: Floats, level: float = LEVEL) -> tuple[float, float]:
    """Return the ends of the percentile interval of resampled values [R] without their NaN; NaN of none."""
    values = values[~np.isnan(values)]
    if not len(values):
        return math.nan, math.nan
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], method="weibull")
    return float(low), float(high)


def bootstrap_counts(units: int, seed: int, number: int) -> Floats:
    """Return how often resample `number` holds each of the units: float64 [U], whole, with sum U."""
    drawn = np.random.default_rng([seed, number]).integers(0, units, units)
    return np.bincount(drawn, minlength=units).astype(np.float64)


AT_HALF, CALIBRATED = "at_half_", "calibrated_"
"""What the names of the columns begin with that are not of the decisions and probabilities themselves."""


def all_intervals(
    resampled: Resampled,
    labels: npt.NDArray[Any],
    probabilities: npt.NDArray[Any],
    patients: npt.NDArray[Any],
    calibrated: npt.NDArray[Any] | None = None,
) -> pd.DataFrame:
    """Return the 95 % intervals of `resampled` and, on the same resamples, those of what stands beside.

    `labels`, `probabilities` and `patients` are what `resampled` was made of; `calibrated` is the
    probabilities after calibration, [N, F]. The rows are those of `Resampled.intervals`, and so are
    the columns, followed by `at_half_{measure}_low` and `_high` of each measure in DECIDED, with 0.5 as
    the threshold of every finding, and, of the calibrated probabilities, `calibrated_{measure}_low`
    and `_high` of each in ERRORS.
    """
    table = resampled.intervals().join(at_half_intervals(resampled, labels, probabilities, patients))
    if calibrated is None:
        return table
    return table.join(_others(resampled, labels, calibrated, patients, np.nan, ERRORS, CALIBRATED))


def at_half_intervals(
    resampled: Resampled, labels: npt.NDArray[Any], probabilities: npt.NDArray[Any], patients: npt.NDArray[Any]
) -> pd.DataFrame:
    """Return the columns of `all_intervals` that are of the threshold 0.5."""
    return _others(resampled, labels, probabilities, patients, 0.5, DECIDED, AT_HALF)


def _others(
    resampled: Resampled,
    labels: npt.NDArray[Any],
    probabilities: npt.NDArray[Any],
    patients: npt.NDArray[Any],
    threshold: float,
    measures: tuple[str, ...],
    prefix: str,
) -> pd.DataFrame:
    thresholds: Floats = np.full(len(resampled.findings), threshold)
    other = bootstrap(
        labels,
        probabilities,
        thresholds,
        patients,
        resampled.findings,
        resamples=resampled.resamples,
        seed=resampled.seed,
    )
    ends = [f"{measure}_{end}" for measure in measures for end in ("low", "high")]
    return other.intervals()[ends].add_prefix(prefix)
