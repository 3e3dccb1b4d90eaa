"""Thresholds are the exact optimum on the split they are fitted on, and survive storage."""

import json
import math
import re
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import f1_score

from eval.scores.thresholds import RULES, Rule, apply_thresholds, parse_rule, pick_thresholds


def f1(positive, alarms):
    alarmed_or_positive = int(alarms.sum()) + int(positive.sum())
    return 2 * int((positive & alarms).sum()) / alarmed_or_positive if alarmed_or_positive else 0.0


def brute_force(labels, scores):
    """Try every distinct score, highest first; a later one must be better to win."""
    best, threshold = 0.0, math.nan
    for cut in sorted({float(score) for score in scores}, reverse=True):
        here = f1(labels == 1, np.array([float(score) >= cut for score in scores]))
        if here > best:
            best, threshold = here, cut
    return best, threshold


@st.composite
def cases(draw, dtypes=(np.float32, np.float64)):
    """Labels and probabilities [N, 2]; the coarse scores make ties, and constants, common."""
    shape = (draw(st.integers(1, 25)), 2)
    labels = draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, 1)))
    coarse = st.integers(0, 4).map(lambda step: step / 4)
    dtype = draw(st.sampled_from(dtypes))
    fine = st.floats(0, 1, width=32 if dtype == np.float32 else 64)
    return labels, draw(hnp.arrays(dtype, shape, elements=draw(st.sampled_from([coarse, fine]))))


@settings(deadline=None)
@given(cases())
def test_a_threshold_is_the_highest_of_the_best_cut_points_found_by_brute_force(case):
    labels, probabilities = case
    expected = [brute_force(labels[:, column], probabilities[:, column])[1] for column in range(2)]
    np.testing.assert_array_equal(pick_thresholds(labels, probabilities), expected)


@settings(deadline=None)
@given(cases())
def test_a_stored_threshold_gives_back_the_maximal_f1_exactly(case):
    labels, probabilities = case
    fitted = pick_thresholds(labels, probabilities)
    stored = np.array(json.loads(json.dumps(fitted.tolist())))
    alarms = apply_thresholds(probabilities, stored)
    for column in np.flatnonzero(labels.any(axis=0)):
        best, _ = brute_force(labels[:, column], probabilities[:, column])
        assert f1(labels[:, column] == 1, alarms[:, column]) == best


@settings(deadline=None)
@given(cases(dtypes=(np.float32,)))
def test_float32_probabilities_and_the_same_in_float64_are_decided_alike(case):
    labels, probabilities = case
    widened = probabilities.astype(np.float64)
    thresholds = pick_thresholds(labels, probabilities)
    np.testing.assert_array_equal(thresholds, pick_thresholds(labels, widened))
    np.testing.assert_array_equal(apply_thresholds(probabilities, thresholds), apply_thresholds(widened, thresholds))


def test_no_threshold_of_a_fine_grid_beats_the_fitted_one():
    random = np.random.default_rng(7)
    labels = (random.random((500, 3)) < 0.1).astype(np.uint8)
    probabilities = (0.7 * random.random((500, 3)) + 0.3 * labels).astype(np.float32)
    fitted = apply_thresholds(probabilities, pick_thresholds(labels, probabilities))
    for column in range(3):
        best = f1_score(labels[:, column], fitted[:, column])
        assert all(
            f1_score(labels[:, column], probabilities[:, column] >= cut, zero_division=0) <= best
            for cut in np.linspace(0, 1, 101)
        )


def test_of_two_cut_points_of_equal_f1_the_one_with_fewer_alarms_wins():
    labels = np.array([[1], [0], [0], [1]], dtype=np.uint8)
    probabilities = np.array([[0.9], [0.8], [0.7], [0.6]])  # F1 2/3 with one alarm, 2/3 with four
    assert pick_thresholds(labels, probabilities).tolist() == [0.9]


def test_a_constant_score_is_its_own_threshold():
    labels = np.array([[1], [0], [0]], dtype=np.uint8)
    assert pick_thresholds(labels, np.full((3, 1), 0.25)).tolist() == [0.25]


def test_a_finding_without_positives_has_no_threshold_and_raises_no_alarm():
    labels = np.array([[0, 1], [0, 0]], dtype=np.uint8)
    probabilities = np.array([[0.9, 0.8], [0.1, 0.2]])
    thresholds = pick_thresholds(labels, probabilities)
    assert math.isnan(thresholds[0])
    assert thresholds[1] == 0.8
    assert apply_thresholds(probabilities, thresholds).tolist() == [[False, True], [False, False]]


def test_a_finding_without_negatives_gets_its_lowest_score():
    labels = np.ones((3, 1), dtype=np.uint8)
    assert pick_thresholds(labels, np.array([[0.5], [0.25], [0.75]])).tolist() == [0.25]


def test_a_rule_can_be_any_choice_among_the_cuts():
    labels = np.array([[1], [0], [1]], dtype=np.uint8)
    probabilities = np.array([[0.5], [0.5], [0.25]])
    seen = []
    rule = Rule("half", "0.5", lambda cuts: seen.append(cuts) or 0.5)
    assert pick_thresholds(labels, probabilities, rule).tolist() == [0.5]
    assert seen[0].values.tolist() == [0.5, 0.25]
    assert seen[0].true_positives.tolist() == [1, 2]
    assert seen[0].predicted_positives.tolist() == [2, 3]
    assert seen[0].false_positives.tolist() == [1, 1]
    assert (seen[0].positives, seen[0].negatives) == (2, 1)


def exact(labels, scores, cut):
    """Sensitivity, specificity, precision of one cut as fractions; None where there is none."""
    alarms, positive = scores >= cut, labels == 1
    hits = int((alarms & positive).sum())
    quiet_negatives = int((~alarms & ~positive).sum())
    shares = (hits, positive.sum()), (quiet_negatives, (~positive).sum()), (hits, alarms.sum())
    return [Fraction(part, int(whole)) if whole else None for part, whole in shares]


def picked_by_hand(name, labels, scores):
    """Walk down the distinct scores with exact fractions; a later one must be better to win."""
    kind, _, target = name.partition("=")
    best = threshold = None
    for cut in sorted(set(scores.tolist()), reverse=True):
        sensitivity, specificity, precision = exact(labels, scores, cut)
        if kind == "youden":
            worth = None if None in (sensitivity, specificity) else sensitivity + specificity
        elif kind == "sensitivity":
            reached = sensitivity is not None and sensitivity >= Fraction(target)
            worth = specificity or 0 if reached else None
        elif kind == "specificity":
            # Going down loses specificity and gains sensitivity, so that the last one is best.
            worth = (best or 0) + 1 if specificity is not None and specificity >= Fraction(target) else None
        else:
            worth = sensitivity if sensitivity is not None and precision >= Fraction(target) else None
        if worth is not None and (best is None or worth > best):
            best, threshold = worth, cut
    return math.nan if threshold is None else threshold


NAMES = ["youden", "sensitivity=0.9", "sensitivity=1", "specificity=0.9", "specificity=0.5", "precision=0.5"]


@settings(deadline=None)
@given(cases(), st.sampled_from([*NAMES, "sensitivity=0.6", "precision=0.7", "precision=1"]))
def test_every_rule_picks_the_cut_that_a_walk_over_all_of_them_finds(case, name):
    labels, probabilities = case
    widened = probabilities.astype(np.float64)
    expected = [picked_by_hand(name, labels[:, column], widened[:, column]) for column in range(2)]
    np.testing.assert_array_equal(pick_thresholds(labels, probabilities, parse_rule(name)), expected)


@pytest.mark.parametrize(
    ("name", "threshold"),
    [("f1", 0.6), ("youden", 0.8), ("sensitivity=0.75", 0.6), ("specificity=0.75", 0.6), ("precision=0.5", 0.3)],
)
def test_each_rule_by_hand(name, threshold):
    labels = np.array([[1], [1], [0], [1], [0], [0], [1], [0]], dtype=np.uint8)
    probabilities = np.array([[0.9], [0.8], [0.7], [0.6], [0.5], [0.4], [0.3], [0.2]])
    assert pick_thresholds(labels, probabilities, parse_rule(name)).tolist() == [threshold]


@pytest.mark.parametrize("name", NAMES)
def test_a_rule_that_one_class_or_no_cut_satisfies_gives_no_threshold(name):
    negative, constant = np.zeros((4, 1), dtype=np.uint8), np.full((4, 1), 0.5)
    if name.startswith("specificity"):  # the only cut raises an alarm for all
        assert math.isnan(pick_thresholds(negative, constant, parse_rule(name))[0])
    else:
        assert math.isnan(pick_thresholds(negative, np.linspace(0, 1, 4)[:, None], parse_rule(name))[0])


def test_a_rule_has_one_name_and_says_what_it_picks():
    assert [parse_rule(name).name for name in ("f1", "youden", "precision=0.50")] == ["f1", "youden", "precision=0.5"]
    assert parse_rule("sensitivity=.9") == parse_rule("sensitivity=0.90")
    assert "sensitivity 0.9 or more" in parse_rule("sensitivity=0.9").meaning


@pytest.mark.parametrize("text", ["", "F1", "auroc", "recall=0.9", "f1=0.5", "youden=1"])
def test_an_unknown_rule_is_refused_with_those_there_are(text):
    with pytest.raises(ValueError, match=re.escape(f"unknown threshold rule {text!r}; there are {RULES}")):
        parse_rule(text)


@pytest.mark.parametrize("text", ["sensitivity", "sensitivity=", "precision=high", "specificity=90", "precision=0"])
def test_a_target_outside_its_range_is_refused(text):
    with pytest.raises(ValueError, match=f"above 0 and at most 1, got '{text}'"):
        parse_rule(text)


@pytest.mark.parametrize(
    ("labels", "probabilities", "message"),
    [
        ([[0]], [[np.nan]], r"probability in \[0, 1\], got nan in row 0, column 0"),
        ([[0, 1]], [[0.5, -3.2]], r"probability in \[0, 1\], got -3.2 in row 0, column 1"),
        ([[1], [2]], [[0.5], [0.5]], "label of 0 or 1, got 2 in row 1, column 0"),
        ([[1]], [[0.5, 0.5]], r"got \[1, 1\] and \[1, 2\]"),
        (np.zeros((0, 2)), np.zeros((0, 2)), "N >= 1"),
    ],
)
def test_bad_arrays_are_refused_by_place_and_value(labels, probabilities, message):
    with pytest.raises(ValueError, match=message):
        pick_thresholds(np.array(labels), np.array(probabilities))


def test_thresholds_of_another_number_of_findings_are_refused():
    with pytest.raises(ValueError, match=r"got \[4, 2\] and \[3\]"):
        apply_thresholds(np.zeros((4, 2)), np.zeros(3))
