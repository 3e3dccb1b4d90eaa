"""The intervals of all that is shown: at the thresholds, at 0.5 for every finding, after calibration."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from eval.scores.bootstrap import Resampled, bootstrap
from eval.scores.metrics import DECIDED, ERRORS
from eval.scores.thresholds import Floats

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
    resampled: Resampled,
    labels: npt.NDArray[Any],
    probabilities: npt.NDArray[Any],
    patients: npt.NDArray[Any],
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
