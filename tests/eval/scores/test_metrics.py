"""The scores are scikit-learn's, and a finding that cannot be scored is left out aloud."""

import csv
import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve

from eval.scores.metrics import (
    COLUMNS,
    DECIDED,
    ECE_BINS,
    ERRORS,
    MEASURES,
    calibration_bins,
    expected_calibration_error,
    score,
)
from shards.findings import FINDINGS

F = len(FINDINGS)


def split(seed=0, n=300, dtype=np.float32):
    """A split in which every finding has both classes, with tied probabilities."""
    random = np.random.default_rng(seed)
    labels = (random.random((n, F)) < random.uniform(0.05, 0.6, F)).astype(np.uint8)
    labels[0], labels[1] = 0, 1
    probabilities = np.round(0.8 * random.random((n, F)) + 0.2 * labels, 2).astype(dtype)
    return labels, probabilities, random.uniform(0.3, 0.9, F)


def expect_close(got, expected):
    assert got == pytest.approx(expected, rel=0, abs=1e-12)


def sklearn_decided(labels, alarms, average):
    def of(measure, flip=False):
        return measure(labels ^ flip, alarms ^ flip, average=average, zero_division=0)

    return [
        of(sk.precision_score),
        of(sk.recall_score),
        of(sk.recall_score, flip=True),
        of(sk.precision_score, flip=True),
        of(sk.f1_score),
    ]


def ece_by_hand(labels, probabilities):
    """One bin after the other, each closed above and the first also below."""
    total, edges = 0.0, np.linspace(0, 1, 16)
    for number, (low, high) in enumerate(itertools.pairwise(edges)):
        inside = (probabilities > low) & (probabilities <= high) | ((probabilities == 0) & (number == 0))
        if inside.any():
            gap = abs(probabilities[inside].mean() - labels[inside].mean())
            total += inside.mean() * gap
    return total


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), dtype=st.sampled_from([np.float32, np.float64]))
def test_means_are_those_of_scikit_learn(seed, dtype):
    labels, probabilities, thresholds = split(seed, n=40, dtype=dtype)
    alarms = (probabilities.astype(np.float64) >= thresholds).astype(np.uint8)
    scores = score(labels, probabilities, thresholds, FINDINGS)
    for average, row in (("macro", scores.macro), ("micro", scores.micro)):
        expect_close([row[name] for name in DECIDED], sklearn_decided(labels, alarms, average))
        expect_close(row["auroc"], sk.roc_auc_score(labels, probabilities, average=average))
        expected = sk.average_precision_score(labels, probabilities, average=average)
        expect_close(row["average_precision"], expected)
    expect_close(scores.macro["brier"], ((labels - probabilities.astype(np.float64)) ** 2).mean())
    flat = labels.ravel(), probabilities.astype(np.float64).ravel()
    expect_close(scores.micro["brier"], sk.brier_score_loss(*flat))
    expect_close(scores.micro["ece"], ece_by_hand(*flat))


def test_every_finding_scores_as_in_scikit_learn():
    labels, probabilities, thresholds = split()
    alarms = (probabilities.astype(np.float64) >= thresholds).astype(np.uint8)
    table = score(labels, probabilities, thresholds, FINDINGS).per_finding
    decided = np.array(sklearn_decided(labels, alarms, None))
    for column, finding in enumerate(FINDINGS):
        row = table.loc[finding]
        expect_close([row[name] for name in DECIDED], decided[:, column].tolist())
        expect_close(row["auroc"], sk.roc_auc_score(labels[:, column], probabilities[:, column]))
        expected = sk.average_precision_score(labels[:, column], probabilities[:, column])
        expect_close(row["average_precision"], expected)
        widened = probabilities[:, column].astype(np.float64)
        expect_close(row["brier"], sk.brier_score_loss(labels[:, column], widened))
        expect_close(row["ece"], ece_by_hand(labels[:, column], widened))
        counts = sk.confusion_matrix(labels[:, column], alarms[:, column]).ravel().tolist()
        assert [row[name] for name in ("tn", "fp", "fn", "tp")] == counts
        assert row["positives"] == labels[:, column].sum()
        expect_close(row["prevalence"], labels[:, column].mean())
        assert row["threshold"] == thresholds[column]


def test_counts_by_hand():
    labels = np.array([[1], [1], [0], [0], [0]], dtype=np.uint8)
    probabilities = np.array([[0.9], [0.4], [0.5], [0.1], [0.2]])
    row = score(labels, probabilities, np.array([0.5]), ("Mass",)).per_finding.loc["Mass"]
    assert [row[name] for name in ("images", "positives", "tp", "fp", "fn", "tn")] == [5, 2, 1, 1, 1, 2]
    assert [row[name] for name in ("precision", "recall", "f1")] == [0.5, 0.5, 0.5]
    expect_close([row["specificity"], row["npv"]], [2 / 3, 2 / 3])
    expect_close(row["brier"], (0.1**2 + 0.6**2 + 0.5**2 + 0.1**2 + 0.2**2) / 5)
    expect_close(row["ece"], (0.1 + 0.6 + 0.5 + 0.1 + 0.2) / 5)  # five bins of one image
    expect_close(row["auroc"], 5 / 6)
    expect_close(row["average_precision"], 0.5 * 1 + 0.5 * 2 / 3)


def test_macro_is_the_mean_of_its_own_table():
    labels, probabilities, thresholds = split()
    labels[:, 3], labels[:, 5] = 0, 1
    scores = score(labels, probabilities, thresholds, FINDINGS)
    for measure in MEASURES:
        expect_close(scores.macro[measure], scores.per_finding[measure].mean())
    assert scores.macro["scored"] == scores.micro["scored"] == F - 2


def test_micro_is_the_pool_of_its_own_table():
    labels, probabilities, thresholds = split()
    labels[:, 3] = 0
    scores = score(labels, probabilities, thresholds, FINDINGS)
    kept = scores.per_finding.drop(index=FINDINGS[3])
    for count in ("positives", "tp", "fp", "fn", "tn"):
        assert scores.micro[count] == kept[count].sum()
    columns = np.arange(F) != 3
    expect_close(scores.micro["auroc"], sk.roc_auc_score(labels[:, columns].ravel(), probabilities[:, columns].ravel()))


def test_a_finding_of_one_class_scores_nan_and_is_left_out_aloud():
    labels, probabilities, thresholds = split()
    labels[:, 13], labels[:, 0] = 0, 1
    scores = score(labels, probabilities, thresholds, FINDINGS)
    assert scores.skipped == ("Atelectasis", "Hernia")
    assert scores.per_finding.loc[list(scores.skipped), MEASURES].isna().all(axis=None)
    assert scores.per_finding.loc["Hernia", ["scored", "positives", "tp", "fn"]].tolist() == [0, 0, 0, 0]
    assert len(scores.warnings) == 2
    assert scores.warnings[0].startswith("Atelectasis has no negatives")
    assert scores.warnings[1].startswith("Hernia has no positives")
    rest = slice(1, 13)
    alone = score(labels[:, rest], probabilities[:, rest], thresholds[rest], FINDINGS[rest])
    assert alone.skipped == ()
    assert alone.warnings == ()
    expect_close([scores.macro[name] for name in MEASURES], [alone.macro[name] for name in MEASURES])
    expect_close([scores.micro[name] for name in MEASURES], [alone.micro[name] for name in MEASURES])


def test_a_finding_without_threshold_is_ranked_but_not_decided():
    labels, probabilities, thresholds = split()
    thresholds[4] = math.nan
    scores = score(labels, probabilities, thresholds, FINDINGS)
    row = scores.per_finding.loc["Mass"]
    assert row[["tp", "fp", "fn", "tn", *DECIDED]].isna().all()
    expect_close(row["auroc"], sk.roc_auc_score(labels[:, 4], probabilities[:, 4]))
    assert scores.skipped == ()
    assert scores.without_threshold == ("Mass",)
    assert scores.warnings[0].startswith("Mass has no threshold")
    expect_close(scores.macro["f1"], scores.per_finding["f1"].drop(index="Mass").mean())
    expect_close(scores.micro["auroc"], sk.roc_auc_score(labels.ravel(), probabilities.ravel()))
    kept = np.arange(F) != 4
    alarms = probabilities.astype(np.float64) >= thresholds
    expect_close(scores.micro["f1"], sk.f1_score(labels[:, kept].ravel(), alarms[:, kept].ravel()))


def test_a_finding_without_alarms_has_precision_and_f1_of_zero():
    labels, probabilities, thresholds = split()
    thresholds[2] = 1.5
    row = score(labels, probabilities, thresholds, FINDINGS).per_finding.loc["Effusion"]
    assert row[["precision", "recall", "specificity", "f1"]].tolist() == [0, 0, 1, 0]
    expect_close(row["npv"], 1 - labels[:, 2].mean())


def test_a_finding_with_an_alarm_for_every_image_has_npv_of_zero():
    labels, probabilities, thresholds = split()
    thresholds[2] = 0
    row = score(labels, probabilities, thresholds, FINDINGS).per_finding.loc["Effusion"]
    assert row[["recall", "specificity", "npv"]].tolist() == [1, 0, 0]
    expect_close(row["precision"], labels[:, 2].mean())


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.sampled_from(np.linspace(0, 1, 31).tolist()) | st.floats(0, 1)),
        min_size=1,
        max_size=60,
    )
)
def test_the_ece_is_that_of_scikit_learns_calibration_curve(images):
    labels, probabilities = map(np.array, zip(*images, strict=True))
    fraction, mean = calibration_curve(labels, probabilities, n_bins=ECE_BINS)
    filled = np.bincount(calibration_bins(probabilities))
    expected = (filled[filled > 0] * abs(fraction - mean)).sum() / len(labels)
    got = expected_calibration_error(labels, probabilities)
    expect_close(got, expected)
    expect_close(got, ece_by_hand(labels, probabilities))


def test_a_probability_on_an_edge_is_in_the_bin_below_it():
    edges = np.linspace(0, 1, 16)
    assert calibration_bins(edges).tolist() == [0, *range(15)]
    assert calibration_bins(np.nextafter(edges[:-1], 1)).tolist() == list(range(15))


def test_the_errors_see_a_shift_that_the_ranks_do_not():
    labels, probabilities, thresholds = split()
    plain = score(labels, probabilities / 2, thresholds, FINDINGS)
    shifted = score(labels, probabilities / 2 + 0.5, thresholds, FINDINGS)
    expect_close(plain.macro["auroc"], shifted.macro["auroc"])
    assert all(plain.macro[error] < shifted.macro[error] for error in ERRORS)


def test_a_constant_model_has_chance_auroc_and_prevalence_as_average_precision():
    labels, _, thresholds = split()
    table = score(labels, np.full(labels.shape, 0.5), thresholds, FINDINGS).per_finding
    expect_close(table["auroc"].tolist(), [0.5] * F)
    expect_close(table["average_precision"].tolist(), table["prevalence"].tolist())


def test_a_split_in_which_nothing_can_be_scored_has_nan_means():
    labels, probabilities, thresholds = split()
    scores = score(np.zeros_like(labels), probabilities, thresholds, FINDINGS)
    assert scores.skipped == FINDINGS
    assert all(math.isnan(mean[name]) for mean in (scores.macro, scores.micro) for name in MEASURES)
    assert scores.to_json()["macro"]["auroc"] is None


def test_the_csv_has_a_row_per_finding_and_both_means_and_comes_back_exactly(tmp_path):
    labels, probabilities, thresholds = split()
    labels[:, 13] = 0
    frame = score(labels, probabilities, thresholds, FINDINGS).to_frame()
    assert frame.index.tolist() == [*FINDINGS, "macro", "micro"]
    assert frame.columns.tolist() == list(COLUMNS)
    frame.to_csv(tmp_path / "metrics.csv")
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row.pop("finding") for row in rows] == frame.index.tolist()
    back = [[float(cell) if cell else math.nan for cell in row.values()] for row in rows]
    np.testing.assert_array_equal(back, frame.to_numpy(dtype=np.float64, na_value=math.nan))
    assert rows[0]["tp"].isdecimal()


def test_the_json_is_strict_and_holds_the_table():
    labels, probabilities, thresholds = split()
    labels[:, 13] = 0
    scores = score(labels, probabilities, thresholds, FINDINGS)
    back = json.loads(json.dumps(scores.to_json(), allow_nan=False))
    assert list(back["per_finding"]) == list(FINDINGS)
    assert back["per_finding"]["Hernia"]["auroc"] is None
    assert back["per_finding"]["Mass"]["auroc"] == scores.per_finding.at["Mass", "auroc"]
    assert back["macro"]["f1"] == scores.macro["f1"]
    assert back["micro"]["tp"] == scores.micro["tp"]
    assert back["skipped"] == ["Hernia"]
    assert back["warnings"] == list(scores.warnings)


def test_the_printed_table_has_a_line_per_row_and_the_warnings_under_it():
    labels, probabilities, thresholds = split()
    labels[:, 13] = 0
    scores = score(labels, probabilities, thresholds, FINDINGS)
    lines = scores.to_text().splitlines()
    assert [line.split()[0] for line in lines[1:17]] == [*FINDINGS, "macro", "micro"]
    assert lines[0].split()[-4:] == ["AUROC", "AP", "Brier", "ECE"]
    assert lines[15].split()[-1] == f"{scores.macro['ece']:.3f}"
    assert lines[14].split()[-1] == "-"
    assert lines[17:] == list(scores.warnings)


def test_arrays_that_do_not_fit_the_findings_are_refused():
    labels, probabilities, thresholds = split()
    with pytest.raises(ValueError, match=r"each of 13 findings, got arrays of shape \[300, 14\] and \[14\]"):
        score(labels, probabilities, thresholds, FINDINGS[:13])
    with pytest.raises(ValueError, match=r"\[300, 14\] and \[13\]"):
        score(labels, probabilities, thresholds[:13], FINDINGS)
    with pytest.raises(ValueError, match=r"a probability in \[0, 1\], got nan"):
        score(labels, np.full(labels.shape, np.nan), thresholds, FINDINGS)
