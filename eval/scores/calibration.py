"""Probability calibration: one monotone curve per finding, fitted on val, applied anywhere.

Decisions and rankings always use the raw probabilities; calibrated ones are for display, and for Brier and ECE after
calibration.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from sklearn.exceptions import ConvergenceWarning
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from eval.scores.thresholds import Floats, paired
from shards.errors import BadData

Method = Literal["temperature", "platt", "isotonic"]
METHODS: tuple[Method, ...] = get_args(Method)

# The greatest float32 below 1 is 1 - 2**-24: a sigmoid that float32 rounded to 1 keeps a finite logit.
_NEAREST_TO_ONE = 2.0**-24


@dataclass(frozen=True)
class Sigmoid:
    """`sigmoid(slope * logit + intercept)`: temperature scaling and Platt scaling."""

    slope: float
    """Above 0; 1 / temperature."""
    intercept: float
    """0 in temperature scaling."""

    def __call__(self, logits: Floats) -> Floats:
        """Return float64 [N], 0..1, of logits [N]."""
        return np.asarray(0.5 + 0.5 * np.tanh(0.5 * (self.slope * logits + self.intercept)))


@dataclass(frozen=True)
class IsotonicCurve:
    """Straight lines between the knots of an isotonic regression, constant outside of them."""

    logits: tuple[float, ...]
    """Ascending."""
    probabilities: tuple[float, ...]
    """0..1, never descending, one a logit."""

    def __call__(self, logits: Floats) -> Floats:
        """Return float64 [N], 0..1, of logits [N]."""
        return np.interp(logits, self.logits, self.probabilities)


Curve = Sigmoid | IsotonicCurve


@dataclass(frozen=True)
class Calibration:
    """One curve per finding, fitted by one method."""

    method: Method
    curves: dict[str, Curve | str]
    """By finding, in the order of the columns; for a finding that keeps its raw probabilities, the reason."""

    @property
    def findings(self) -> tuple[str, ...]:
        """The findings, in the order of the columns."""
        return tuple(self.curves)

    @property
    def warnings(self) -> tuple[str, ...]:
        """One sentence for each finding that is not calibrated; to be printed, not dropped."""
        reasons = {finding: curve for finding, curve in self.curves.items() if isinstance(curve, str)}
        return tuple(f"{finding} is not calibrated: {reason}." for finding, reason in reasons.items())

    def apply(self, probabilities: npt.NDArray[Any]) -> Floats:
        """Return the calibrated probabilities, float64 [N, F], 0..1; N may be 0.

        `probabilities` is [N, F], 0..1, with the columns of `findings`. No curve reverses the order of two images,
        though it may make them equal. Raises ValueError for another number of columns, and outside of 0..1.
        """
        if probabilities.ndim != 2 or probabilities.shape[1] != len(self.curves):
            raise ValueError(f"expected probabilities [N, {len(self.curves)}], got {list(probabilities.shape)}")
        raw = probabilities.astype(np.float64)
        if not ((raw >= 0) & (raw <= 1)).all():
            raise ValueError("expected probabilities in [0, 1]")
        logits = _logits(raw)
        return np.column_stack(
            [
                raw[:, column] if isinstance(curve, str) else curve(logits[:, column])
                for column, curve in enumerate(self.curves.values())
            ]
        )

    def to_json(self) -> dict[str, Any]:
        """Return calibration.json: method, and per finding the curve's numbers or why there is none."""
        return {
            "method": self.method,
            "findings": {
                name: {"identity": curve} if isinstance(curve, str) else asdict(curve)
                for name, curve in self.curves.items()
            },
        }

    @classmethod
    def from_json(cls, record: Any, source: str = "the calibration") -> "Calibration":
        """Return the calibration that `to_json` turned into `record`, to the last bit.

        Raises BadData, naming `source`, for anything else: an unknown method, a slope that is not above 0, knots that
        do not ascend.
        """
        try:
            if record["method"] not in METHODS:
                raise ValueError(f"method {record['method']!r} is none of {', '.join(METHODS)}")
            curves = {name: _curve(plain) for name, plain in record["findings"].items()}
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise BadData(f"{source} is damaged: {error or type(error).__name__}") from error
        return cls(record["method"], curves)


def fit_calibration(
    labels: npt.NDArray[Any], probabilities: npt.NDArray[Any], method: Method, findings: Sequence[str]
) -> Calibration:
    """Fit one curve per finding on val.

    `labels` is 0 or 1 and `probabilities` a float in [0, 1], both [N, F] in the order of `findings`, from the val
    split. With `logit = log(p / (1 - p))`, p at least 2**-24 away from 0 and 1:

    - temperature: `sigmoid(logit / T)` (Guo et al., "On Calibration of Modern Neural Networks", 2017). It cannot shift:
      a model that calls too many positives at every level needs another method.
    - platt: `sigmoid(slope * logit + intercept)` (Platt, "Probabilistic Outputs for Support Vector Machines", 1999).
    - isotonic: the non-decreasing steps of least squared error (Zadrozny and Elkan, 2002), joined by straight lines
      over the logit.

    The first two have the least log loss against Platt's targets (positives + 1) / (positives + 2) and
    1 / (negatives + 2) instead of 1 and 0, so that they stay finite where val is separable. A finding of one class or
    of one probability, and one for which slope or 1/T is not above 0 (it would reverse the ranking), keeps its raw
    probabilities; `warnings` names it. Raises ValueError as `paired` does, for an unknown method, or if F differs.
    """
    truth, raw = paired(labels, probabilities)
    if truth.shape[1] != len(findings):
        raise ValueError(f"expected one column for each of {len(findings)} findings, got {truth.shape[1]}")
    fit = _FITS.get(method)
    if fit is None:
        raise ValueError(f"unknown method {method!r}; known are {', '.join(METHODS)}")
    columns = zip(findings, truth.T, _logits(raw).T, strict=True)
    return Calibration(
        method, {finding: _no_fit(positive, logits) or fit(positive, logits) for finding, positive, logits in columns}
    )


def _logits(probabilities: Floats) -> Floats:
    inside = np.clip(probabilities, _NEAREST_TO_ONE, 1 - _NEAREST_TO_ONE)
    return np.asarray(np.log(inside) - np.log1p(-inside))


Bools = npt.NDArray[np.bool_]


def _no_fit(positive: Bools, logits: Floats) -> str | None:
    """Return why no method can fit a curve on these images; None where one can."""
    if positive.all() or not positive.any():
        return f"it has no {'negatives' if positive.any() else 'positives'} to fit a curve on"
    if logits.min() == logits.max():
        return "all its probabilities are equal"
    return None


def _fit_sigmoid(positive: Bools, logits: Floats, *, shift: bool) -> Curve | str:
    # The scaled problem has the same optimum, and Newton's method is well-conditioned in it.
    middle, scale = (float(logits.mean()), float(logits.std())) if shift else (0.0, float(np.abs(logits).max()))
    scaled = (logits - middle) / scale
    # A soft target t is the image twice: as a positive that weighs t and a negative that weighs 1 - t.
    positives = int(positive.sum())
    negatives = len(positive) - positives
    targets = np.where(positive, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    # C=inf is no penalty, and 1e-10 an optimum to eight digits and more.
    model = LogisticRegression(C=np.inf, fit_intercept=shift, solver="newton-cholesky", tol=1e-10)
    with warnings.catch_warnings():
        # Where rounding hides any further descent, scikit-learn warns and continues with lbfgs.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(
            np.concatenate([scaled, scaled])[:, None],
            np.repeat([1, 0], len(logits)),
            sample_weight=np.concatenate([targets, 1 - targets]),
        )
    slope = float(model.coef_[0, 0]) / scale
    if slope <= 0:
        return "its higher probabilities are not the likelier ones"
    return Sigmoid(slope, float(model.intercept_[0]) - slope * middle if shift else 0.0)


def _fit_isotonic(positive: Bools, logits: Floats) -> Curve | str:
    model = IsotonicRegression(y_min=0, y_max=1).fit(logits, positive.astype(np.float64))
    return IsotonicCurve(tuple(model.X_thresholds_.tolist()), tuple(model.y_thresholds_.tolist()))


_FITS: dict[str, Callable[[Bools, Floats], Curve | str]] = {
    "temperature": partial(_fit_sigmoid, shift=False),
    "platt": partial(_fit_sigmoid, shift=True),
    "isotonic": _fit_isotonic,
}


def _curve(plain: dict[str, Any]) -> Curve | str:
    if "identity" in plain:
        return str(plain["identity"])
    if "slope" in plain:
        slope, intercept = float(plain["slope"]), float(plain["intercept"])
        if not (0 < slope < np.inf and np.isfinite(intercept)):
            raise ValueError(f"slope {slope}, intercept {intercept}")
        return Sigmoid(slope, intercept)
    logits = tuple(map(float, plain["logits"]))
    probabilities = tuple(map(float, plain["probabilities"]))
    rising = bool((np.diff(logits) > 0).all() and (np.diff(probabilities) >= 0).all())
    paired = 0 < len(logits) == len(probabilities)
    if not (paired and rising and 0 <= probabilities[0] <= probabilities[-1] <= 1):
        raise ValueError("the knots of a curve do not rise")
    return IsotonicCurve(logits, probabilities)
