"""AUROC and average precision under weights are scikit-learn's, whatever the ties and the weights."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import average_precision_score, roc_auc_score

from eval.scores.weighted import rank


def expected(truth, probabilities, counts):
    """Score with every image repeated as often as it is drawn."""
    truth, probabilities = np.repeat(truth, counts), np.repeat(probabilities, counts)
    if len(np.unique(truth)) < 2:
        return np.nan, np.nan
    return roc_auc_score(truth, probabilities), average_precision_score(truth, probabilities)


def assert_as_in_scikit_learn(truth, probabilities, units, weights):
    """`weights` is [units, resamples]."""
    ranking = rank(truth, probabilities, units, len(weights))
    got = np.array(ranking.measure(weights.astype(np.float64)))
    wanted = np.array([expected(truth, probabilities, column[units]) for column in weights.T]).T
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-12)


@settings(deadline=None)
@given(st.data())
def test_both_measures_are_those_of_the_repeated_images(data):
    count = data.draw(st.integers(1, 30))
    truth = data.draw(hnp.arrays(np.bool_, count))
    coarse = st.integers(0, 4).map(lambda step: step / 4)
    probabilities = data.draw(
        hnp.arrays(np.float64, count, elements=data.draw(st.sampled_from([coarse, st.floats(0, 1)])))
    )
    units = data.draw(hnp.arrays(np.int64, count, elements=st.integers(0, 5)))
    weights = data.draw(hnp.arrays(np.int64, (6, 4), elements=st.integers(0, 3)))
    assert_as_in_scikit_learn(truth, probabilities, units, weights)


@pytest.mark.parametrize("decimals", [1, 3, 16])
@pytest.mark.parametrize("prevalence", [0.001, 0.1, 0.5, 0.999])
def test_thousands_of_images_score_as_in_scikit_learn(prevalence, decimals):
    random = np.random.default_rng(3)
    truth = random.random(6000) < prevalence
    truth[:2] = True, False
    probabilities = np.round(0.7 * random.random(6000) + 0.3 * truth, decimals)
    weights = random.poisson(1, (900, 5))
    weights[:10] = 1
    assert_as_in_scikit_learn(truth, probabilities, random.integers(0, 900, 6000), weights)


def test_the_weights_are_scikit_learns_sample_weight():
    random = np.random.default_rng(4)
    truth, probabilities = random.random(500) < 0.2, np.round(random.random(500), 2)
    units, weights = np.arange(500) // 5, random.integers(1, 4, (100, 3)).astype(np.float64)
    auroc, average_precision = rank(truth, probabilities, units, 100).measure(weights)
    for column in range(3):
        of_images = weights[units, column]
        wanted = (
            roc_auc_score(truth, probabilities, sample_weight=of_images),
            average_precision_score(truth, probabilities, sample_weight=of_images),
        )
        assert (auroc[column], average_precision[column]) == pytest.approx(wanted, rel=0, abs=1e-12)


def test_by_hand():
    truth = np.array([True, False, True, False])
    ranking = rank(truth, np.array([0.9, 0.5, 0.5, 0.1]), np.arange(4), 4)
    auroc, average_precision = ranking.measure(np.array([[1.0, 0], [1, 2], [1, 1], [1, 0]]))
    assert auroc.tolist() == [3.5 / 4, 0.5]
    assert average_precision.tolist() == pytest.approx([0.5 * 1 + 0.5 * 2 / 3, 1 / 3], abs=1e-15)


def test_a_constant_score_is_chance():
    truth = np.array([True, False, False, False])
    auroc, average_precision = rank(truth, np.full(4, 0.3), np.arange(4), 4).measure(np.ones((4, 1)))
    assert (auroc.tolist(), average_precision.tolist()) == ([0.5], [0.25])


@pytest.mark.parametrize("truth", [[True, True], [False, False], []])
def test_one_class_or_no_image_has_no_number(truth):
    ranking = rank(np.array(truth, dtype=np.bool_), np.linspace(0, 1, len(truth)), np.arange(len(truth)), 3)
    assert np.isnan(ranking.measure(np.ones((3, 2)))).all()
