"""What stands beside the scores is resampled as they are, and its intervals are of what they say."""

import numpy as np
import pandas as pd
import pytest

from eval.scores.bootstrap import all_intervals, bootstrap
from eval.scores.metrics import DECIDED, ERRORS, MEASURES, score

NAMES = ("Mass", "Edema")
CUTS = np.array([0.3, np.nan])


def resampled():
    random = np.random.default_rng(0)
    patients = np.repeat(np.arange(80), 3)
    labels = (random.random((240, 2)) < 0.3).astype(np.uint8)
    probabilities = (0.7 * random.random(labels.shape) + 0.3 * labels).astype(np.float32)
    arrays = labels, probabilities, patients
    return bootstrap(labels, probabilities, CUTS, patients, NAMES, resamples=99, seed=4), arrays


def columns(measures, prefix=""):
    return [f"{prefix}{measure}_{end}" for measure in measures for end in ("low", "high")]


def test_all_intervals_stand_in_one_table_by_name():
    whole, arrays = resampled()
    table = all_intervals(whole, *arrays, arrays[1] ** 2)
    assert table.columns.tolist() == [
        *columns(MEASURES),
        *columns(DECIDED, "at_half_"),
        *columns(ERRORS, "calibrated_"),
    ]
    pd.testing.assert_frame_equal(table[columns(MEASURES)], whole.intervals())
    without = all_intervals(whole, *arrays)
    pd.testing.assert_frame_equal(without, table[without.columns])
    assert not [name for name in without if name.startswith("calibrated_")]


def test_those_at_one_half_and_after_calibration_are_of_the_same_resamples():
    whole, (labels, probabilities, patients) = resampled()
    calibrated = probabilities.astype(np.float64) ** 2
    table = all_intervals(whole, labels, probabilities, patients, calibrated)
    for prefix, values, measures in (("at_half_", probabilities, DECIDED), ("calibrated_", calibrated, ERRORS)):
        half = np.full(2, 0.5)
        other = bootstrap(labels, values, half, patients, NAMES, resamples=99, seed=4).intervals()
        np.testing.assert_array_equal(table[columns(measures, prefix)], other[columns(measures)])
        points = score(labels, values, half, NAMES).to_frame()
        for measure in set(measures) - {"ece"}:
            low, high = (table[f"{prefix}{measure}_{end}"] for end in ("low", "high"))
            assert ((low < points[measure]) & (points[measure] < high)).all(), measure


def test_a_finding_without_a_threshold_is_decided_at_one_half_all_the_same():
    whole, arrays = resampled()
    row = all_intervals(whole, *arrays).loc["Edema"]
    assert np.isnan(row["recall_low"])
    assert row["at_half_recall_low"] < row["at_half_recall_high"]
    assert row["auroc_low"] == pytest.approx(whole.intervals().at["Edema", "auroc_low"])
