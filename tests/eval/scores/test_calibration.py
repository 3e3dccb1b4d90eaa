"""Calibration keeps the ranking, brings probabilities nearer to frequencies, and survives storage."""

import json

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.optimize import minimize
from scipy.special import expit, logit
from sklearn.isotonic import isotonic_regression
from sklearn.metrics import log_loss

from eval.scores.calibration import METHODS, Calibration, Method, Sigmoid, fit_calibration
from shards.errors import BadData

Floats = npt.NDArray[np.float64]

EVERY_METHOD = pytest.mark.parametrize("method", METHODS)


def split(n: int = 4000, slope: float = 2.5, shift: float = 1.0) -> tuple[npt.NDArray[np.uint8], Floats]:
    """Labels drawn from true probabilities, and what an overconfident model says of them."""
    random = np.random.default_rng(5)
    true = random.normal([-1.0, -2.5, -4.0], 1.2, size=(n, 3))
    labels = (random.random(true.shape) < expit(true)).astype(np.uint8)
    return labels, expit(slope * true + shift)


def fit_one(labels: object, probabilities: object, method: Method) -> Calibration:
    return fit_calibration(np.array(labels)[:, None], np.array(probabilities)[:, None], method, ["Mass"])


@st.composite
def cases(draw: st.DrawFn) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.floating]]:
    """Labels and probabilities [N, 2]; the coarse scores make ties, constants and 0 and 1 common."""
    shape = (draw(st.integers(1, 30)), 2)
    labels = draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, 1)))
    coarse = st.integers(0, 4).map(lambda step: step / 4)
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    fine = st.floats(0, 1, width=32 if dtype == np.float32 else 64)
    return labels, draw(hnp.arrays(dtype, shape, elements=draw(st.sampled_from([coarse, fine]))))


@EVERY_METHOD
@settings(deadline=None, max_examples=60)
@given(case=cases())
def test_no_curve_turns_two_images_around(
    method: Method, case: tuple[npt.NDArray[np.uint8], npt.NDArray[np.floating]]
) -> None:
    labels, probabilities = case
    fitted = fit_calibration(labels, probabilities, method, ["Mass", "Edema"])
    grid = np.sort(np.append(probabilities.astype(np.float64), np.linspace(0, 1, 60)))
    calibrated = fitted.apply(np.column_stack([grid, grid]))
    assert ((calibrated >= 0) & (calibrated <= 1)).all()
    assert (np.diff(calibrated, axis=0) >= -1e-15).all()


@EVERY_METHOD
@settings(deadline=None, max_examples=40)
@given(case=cases())
def test_a_stored_calibration_is_the_same_to_the_last_bit(
    method: Method, case: tuple[npt.NDArray[np.uint8], npt.NDArray[np.floating]]
) -> None:
    fitted = fit_calibration(*case, method, ["Mass", "Edema"])
    stored = Calibration.from_json(json.loads(json.dumps(fitted.to_json(), allow_nan=False)))
    assert stored == fitted
    np.testing.assert_array_equal(stored.apply(case[1]), fitted.apply(case[1]))
    assert stored.findings == ("Mass", "Edema")
    assert stored.warnings == fitted.warnings


@pytest.mark.parametrize("method", ["platt", "isotonic"])
def test_the_mean_of_the_calibrated_probabilities_is_the_prevalence(method: Method) -> None:
    labels, probabilities = split()
    calibrated = fit_calibration(labels, probabilities, method, "abc").apply(probabilities)
    np.testing.assert_allclose(calibrated.mean(axis=0), labels.mean(axis=0), atol=5e-4)


@EVERY_METHOD
def test_calibration_lowers_the_log_loss_of_an_overconfident_model(method: Method) -> None:
    labels, probabilities = split()
    calibrated = fit_calibration(labels[:2000], probabilities[:2000], method, "abc").apply(probabilities[2000:])
    for column in range(3):
        truth = labels[2000:, column]
        assert log_loss(truth, calibrated[:, column]) < log_loss(truth, probabilities[2000:, column])


def test_temperature_and_platt_find_the_slope_and_shift_that_were_put_in() -> None:
    labels, probabilities = split(n=50_000, slope=2.0, shift=0.0)
    for curve in fit_calibration(labels, probabilities, "temperature", "abc").curves.values():
        assert isinstance(curve, Sigmoid)
        assert (curve.slope, curve.intercept) == (pytest.approx(0.5, rel=0.05), 0.0)
    labels, probabilities = split(n=50_000, slope=2.0, shift=1.0)
    for curve in fit_calibration(labels, probabilities, "platt", "abc").curves.values():
        assert isinstance(curve, Sigmoid)
        assert (curve.slope, curve.intercept) == (pytest.approx(0.5, rel=0.1), pytest.approx(-0.5, abs=0.1))


@pytest.mark.parametrize("method", ["temperature", "platt"])
def test_the_sigmoid_has_the_least_log_loss_that_a_general_optimizer_finds(method: Method) -> None:
    labels, probabilities = split(n=500, slope=1.5)  # all logits within 2**-24 of neither end
    fitted = fit_calibration(labels, probabilities, method, "abc")
    for column, curve in enumerate(fitted.curves.values()):
        truth, scores = labels[:, column], logit(probabilities[:, column])
        positives, negatives = truth.sum(), (1 - truth).sum()
        targets = np.where(truth, (positives + 1) / (positives + 2), 1 / (negatives + 2))

        def loss(given: Floats, scores: Floats = scores, targets: Floats = targets) -> float:
            z = given[0] * scores + (given[1] if method == "platt" else 0)
            return float(np.mean(np.logaddexp(0, z) - targets * z))

        best = minimize(loss, [1.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-14})
        assert isinstance(curve, Sigmoid)
        assert loss(np.array([curve.slope, curve.intercept])) <= best.fun + 1e-12


def test_isotonic_gives_scikit_learn_s_fitted_values_on_what_it_was_fitted_on() -> None:
    labels, probabilities = split(n=300)
    calibrated = fit_calibration(labels, probabilities, "isotonic", "abc").apply(probabilities)
    for column in range(3):
        order = np.argsort(probabilities[:, column])
        expected = isotonic_regression(labels[order, column].astype(float))
        np.testing.assert_allclose(calibrated[order, column], expected, atol=1e-12)


@EVERY_METHOD
def test_a_finding_of_one_class_keeps_its_probabilities_aloud(method: Method) -> None:
    labels, probabilities = split()
    labels[:, 0], labels[:, 2] = 1, 0
    fitted = fit_calibration(labels, probabilities, method, ["Mass", "Edema", "Hernia"])
    calibrated = fitted.apply(probabilities)
    np.testing.assert_array_equal(calibrated[:, [0, 2]], probabilities[:, [0, 2]])
    assert (calibrated[:, 1] != probabilities[:, 1]).any()
    assert fitted.warnings == (
        "Mass is not calibrated: it has no negatives to fit a curve on.",
        "Hernia is not calibrated: it has no positives to fit a curve on.",
    )


@pytest.mark.parametrize("method", ["temperature", "platt"])
def test_a_model_that_ranks_backwards_is_not_turned_around(method: Method) -> None:
    fitted = fit_one([1, 1, 0, 0], [0.1, 0.2, 0.8, 0.9], method)
    assert fitted.apply(np.array([[0.1], [0.9]])).tolist() == [[0.1], [0.9]]
    assert fitted.warnings == ("Mass is not calibrated: its higher probabilities are not the likelier ones.",)


@EVERY_METHOD
def test_a_constant_probability_is_left_as_it_is(method: Method) -> None:
    fitted = fit_one([1, 0, 0], [0.25, 0.25, 0.25], method)
    assert fitted.apply(np.array([[0.25]])).tolist() == [[0.25]]
    assert "all its probabilities are equal" in fitted.warnings[0]


@EVERY_METHOD
def test_a_separable_val_and_probabilities_of_0_and_1_stay_finite(method: Method) -> None:
    fitted = fit_one([0, 0, 1, 1], np.array([0, 1e-30, 1, 1], dtype=np.float32), method)
    assert np.isfinite(fitted.apply(np.array([[0.0], [0.5], [1.0]]))).all()


@EVERY_METHOD
def test_no_image_gives_no_probability(method: Method) -> None:
    labels, probabilities = split(n=200)
    assert fit_calibration(labels, probabilities, method, "abc").apply(probabilities[:0]).shape == (0, 3)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros((3, 2)), r"\[N, 1\], got \[3, 2\]"),
        (np.array([[np.nan]]), r"\[0, 1\]"),
        (np.array([[-2.0]]), r"\[0, 1\]"),
    ],
)
def test_what_is_no_probability_is_not_calibrated(bad: Floats, message: str) -> None:
    fitted = fit_one([0, 1, 1], [0.1, 0.3, 0.4], "platt")
    with pytest.raises(ValueError, match=message):
        fitted.apply(bad)


def test_an_unknown_method_and_other_findings_are_refused() -> None:
    labels, probabilities = split(n=50)
    with pytest.raises(ValueError, match="'beta'; known are temperature, platt, isotonic"):
        fit_calibration(labels, probabilities, "beta", "abc")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="each of 2 findings, got 3"):
        fit_calibration(labels, probabilities, "platt", "ab")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "damaged"),
        ({"method": "beta", "findings": {}}, "'beta' is none of"),
        ({"method": "platt"}, "findings"),
        ({"method": "platt", "findings": {"Mass": {"slope": -1.0, "intercept": 0.0}}}, "slope -1.0"),
        ({"method": "platt", "findings": {"Mass": {"slope": 1.0}}}, "intercept"),
        ({"method": "isotonic", "findings": {"Mass": {"logits": [1, 0], "probabilities": [0, 1]}}}, "rise"),
        ({"method": "isotonic", "findings": {"Mass": {"logits": [0, 1], "probabilities": [0, 2]}}}, "rise"),
        ({"method": "isotonic", "findings": {"Mass": {"logits": [0, 1], "probabilities": [0]}}}, "rise"),
        ({"method": "isotonic", "findings": {"Mass": {"logits": [], "probabilities": []}}}, "rise"),
    ],
)
def test_a_damaged_calibration_is_refused_by_its_source(record: object, message: str) -> None:
    with pytest.raises(BadData, match=message) as refused:
        Calibration.from_json(record, "runs/small/calibration.json")
    assert refused.value.message.startswith("runs/small/calibration.json is damaged: ")
