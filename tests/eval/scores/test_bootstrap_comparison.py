"""Paired differences are those of the resamples, and a p-value keeps its promise."""

import numpy as np
import pytest

from eval.scores.bootstrap import bootstrap, compare, p_value
from eval.scores.metrics import DECIDED, ERRORS, MEASURES, RANKED, score

NAMES = ("Mass", "Edema")
CUTS = np.array([0.5, 0.5])


def truth(seed=0, patients=150):
    random = np.random.default_rng(seed)
    of = np.repeat(np.arange(patients), random.integers(1, 6, patients))
    return (random.random((patients, 2)) < (0.4, 0.2))[of].astype(np.uint8), of


def model(labels, of, strength, seed):
    """Probabilities in which the patients differ, whatever the label."""
    random = np.random.default_rng(seed)
    noise = random.normal(size=(of.max() + 1, 2))[of] + 0.5 * random.normal(size=labels.shape)
    return 1 / (1 + np.exp(-(strength * labels + noise - 0.5)))


def measured(labels, probabilities, of, thresholds=CUTS, resamples=200, seed=0, names=NAMES):
    resampled = bootstrap(labels, probabilities, thresholds, of, names, resamples=resamples, seed=seed)
    return resampled, score(labels, probabilities, thresholds, names)


def compared(first, other):
    return compare(first[0], other[0], first[1], other[1])


def test_the_differences_are_other_minus_first_on_the_same_resamples():
    labels, of = truth()
    first, other = (measured(labels, model(labels, of, strength, 1), of) for strength in (0.5, 2.0))
    table = compared(first, other)
    assert table.index.tolist() == [*NAMES, "macro", "micro"]
    ends = ("difference", "low", "high", "p")
    assert table.columns.tolist() == [f"{measure}_{end}" for measure in MEASURES for end in ends]
    before, after = first[1].to_frame(), other[1].to_frame()
    for measure in MEASURES:
        difference = (after[measure] - before[measure]).to_numpy(dtype=np.float64)
        np.testing.assert_array_equal(table[f"{measure}_difference"], difference)
    paired = other[0].values["auroc"] - first[0].values["auroc"]
    low, high = np.quantile(paired, [0.025, 0.975], axis=0, method="weibull")
    np.testing.assert_allclose(table["auroc_low"], low, rtol=0, atol=1e-12)
    np.testing.assert_allclose(table["auroc_high"], high, rtol=0, atol=1e-12)
    assert (table["auroc_low"] > 0).all() and (table["auroc_p"] == 2 / 201).all()


def test_pairing_sees_a_difference_that_the_separate_intervals_do_not():
    labels, of = truth()
    first, other = (measured(labels, model(labels, of, strength, 1), of) for strength in (0.5, 0.7))
    before, after = first[0].intervals(), other[0].intervals()
    assert (after["auroc_low"] < before["auroc_high"]).all()
    assert (compared(first, other)["auroc_p"] < 0.05).all()


def test_turning_the_models_round_turns_the_signs_and_keeps_the_p_values():
    labels, of = truth()
    first, other = (measured(labels, model(labels, of, 1.0, seed), of) for seed in (1, 2))
    there, back = compared(first, other), compared(other, first)
    for measure in MEASURES:
        for end, opposite in (("difference", "difference"), ("low", "high"), ("high", "low")):
            got, expected = there[f"{measure}_{end}"], -back[f"{measure}_{opposite}"]
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)
        np.testing.assert_array_equal(there[f"{measure}_p"], back[f"{measure}_p"])


def test_a_model_beside_itself_does_not_differ():
    labels, of = truth()
    probabilities = model(labels, of, 1.0, 1)
    first, other = measured(labels, probabilities, of), measured(labels, probabilities**2, of, CUTS**2)
    table = compared(first, other)
    for measure in (*RANKED, *DECIDED):  # the same order and the same decisions
        assert (table[[f"{measure}_{end}" for end in ("difference", "low", "high")]] == 0).all(axis=None)
        assert (table[f"{measure}_p"] == 1).all()
    for measure in ERRORS:
        assert (table[f"{measure}_difference"] != 0).all()


def test_the_p_value_by_hand():
    assert p_value(np.array([1.0] * 19)) == 2 / 20
    assert p_value(np.array([1.0] * 16 + [-1.0] * 3)) == 2 * 4 / 20
    assert p_value(np.array([-1.0] * 18 + [0.0])) == 2 * 2 / 20
    assert p_value(np.array([1.0, -1.0])) == 1
    assert p_value(np.zeros(7)) == 1
    assert np.isnan(p_value(np.array([])))


def share_of_false_alarms(sets, resamples):
    """How often two models of the same worth have p <= 0.05 in AUROC, per row."""
    alarms = np.zeros(4)
    for number in range(sets):
        labels, of = truth(number)
        first, other = (
            measured(labels, model(labels, of, 1.0, [number, which]), of, resamples=resamples) for which in (1, 2)
        )
        alarms += compared(first, other)["auroc_p"] <= 0.05
    return alarms / sets


@pytest.mark.full
def test_models_of_the_same_worth_differ_in_2_to_8_percent_of_300_sets():
    # 5 %, give or take twice the standard error of a share of 300 sets, 1.3 %.
    shares = share_of_false_alarms(300, 1000)
    assert ((shares >= 0.02) & (shares <= 0.08)).all(), shares


def test_models_of_the_same_worth_rarely_differ():
    # Of 25 sets 5 % are 1; more than 5 happens by chance in 1 of 800 (binomial).
    shares = share_of_false_alarms(25, 100)
    assert (shares * 25 <= 5).all(), shares


def test_a_finding_without_a_number_in_one_model_has_no_difference():
    labels, of = truth()
    first = measured(labels, model(labels, of, 1.0, 1), of)
    other = measured(labels, model(labels, of, 1.0, 2), of, np.array([0.5, np.nan]))
    table = compared(first, other)
    for measure in DECIDED:
        columns = [f"{measure}_{end}" for end in ("difference", "low", "high", "p")]
        assert table.loc["Mass", columns].notna().all()
        # Their means are of two findings and of one.
        assert table.loc[["Edema", "macro", "micro"], columns].isna().all(axis=None)
    for measure in (*RANKED, *ERRORS):
        assert table[[f"{measure}_low", f"{measure}_p"]].notna().all(axis=None)


def test_models_that_were_not_measured_on_the_same_are_refused():
    labels, of = truth()
    probabilities = model(labels, of, 1.0, 1)
    first = measured(labels, probabilities, of)
    with pytest.raises(ValueError, match="200 of seed 0 and 200 of seed 1"):
        compared(first, measured(labels, probabilities, of, seed=1))
    with pytest.raises(ValueError, match="200 of seed 0 and 100 of seed 0"):
        compared(first, measured(labels, probabilities, of, resamples=100))
    with pytest.raises(ValueError, match="the images differ"):
        compared(first, measured(labels[1:], probabilities[1:], of[1:]))
    flipped = labels.copy()
    flipped[0] ^= 1
    with pytest.raises(ValueError, match="the labels differ"):
        compared(first, measured(flipped, probabilities, of))
    with pytest.raises(ValueError, match="the findings differ"):
        compared(first, measured(labels, probabilities, of, names=("Mass", "Hernia")))
