"""Every metric under many weightings of the same images, without scoring them again."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from eval.scores.metrics import DECIDED, ECE_BINS, ERRORS, MEASURES, RANKED, calibration_bins, two_classes
from eval.scores.ranking import Ranking, rank
from eval.scores.thresholds import Floats, apply_thresholds


@dataclass(frozen=True, eq=False)
class WeightedScores:
    """A split, summed up per unit (a patient) as far as weights allow."""

    scored: npt.NDArray[np.bool_]
    """[F], the findings with both classes."""
    decided: npt.NDArray[np.bool_]
    """[F], those of them with a threshold."""
    images: Floats
    """[U], the images of each unit."""
    sums: tuple[csr_array, ...]
    """Of each finding what `_unit_sums` returns."""
    rankings: tuple[Ranking, ...]
    """Of each finding."""
    pooled: Ranking
    """Of the scored findings together."""
    signed_gaps: csr_array
    """[F + 1, U], of each finding and of the scored ones pooled: the probabilities minus labels of each
    unit, added over the bins with the sign that a bin's sum has on the whole split."""

    def measure(self, weights: Floats) -> dict[str, Floats]:
        """Return each of metrics.MEASURES under R weightings: float64 [R, F + 2], findings, macro, micro.

        `weights` is [U, R]: how often resample r holds the images of unit u, whole numbers >= 0. A
        measure is NaN where the weight is on one class, macro where one of its findings is. Macro
        and micro are always of the findings that are scored (for DECIDED: and have a threshold)
        on the whole split.
        """
        images: Floats = self.images @ weights
        sums = np.stack([finding @ weights for finding in self.sums])
        ranked = np.stack([ranking.measure(weights) for ranking in self.rankings], axis=1)
        pooled = self.pooled.measure(weights)
        single = _from_sums(sums, images) | dict(zip(RANKED, ranked, strict=True))
        micro = dict(zip(RANKED, pooled, strict=True))
        micro |= _pool(sums, images, self.scored, ERRORS) | _pool(sums, images, self.decided, DECIDED)
        values = {}
        for measure in MEASURES:
            averaged = single[measure][self.decided if measure in DECIDED else self.scored]
            macro = averaged.mean(axis=0) if len(averaged) else np.full(len(images), np.nan)
            values[measure] = np.column_stack([*single[measure], macro, micro[measure]])
        for measure in DECIDED:
            values[measure][:, :-2][:, ~self.decided] = np.nan
        return values

    def signed_ece(self, weights: Floats) -> Floats:
        """Return the ECE under R weightings with no bin's gap folded: float64 [R, F + 2].

        Each gap counts with the sign it has on the whole split instead of as an absolute value, so the
        result is linear in the gaps. Equal to the ECE where no gap changes its sign; `weights` and the
        columns are those of `measure`.
        """
        images: Floats = self.images @ weights
        gaps = self.signed_gaps @ weights
        single = gaps[:-1] / images
        scored = single[self.scored]
        macro = scored.mean(axis=0) if len(scored) else np.full(len(images), np.nan)
        return np.column_stack([*single, macro, gaps[-1] / (images * max(len(scored), 1))])


def weighted_scores(
    truth: npt.NDArray[np.bool_], probabilities: Floats, thresholds: Floats, units: npt.NDArray[Any]
) -> WeightedScores:
    """Sum up a split; `truth` and `probabilities` are [N, F], `thresholds` [F], `units` 0 to U - 1, [N]."""
    scored = two_classes(truth)
    images = np.bincount(units).astype(np.float64)
    columns = list(zip(truth.T, probabilities.T, apply_thresholds(probabilities, thresholds).T, strict=True))
    sums = tuple(_unit_sums(*column, units) for column in columns)
    return WeightedScores(
        scored=scored,
        decided=scored & ~np.isnan(thresholds),
        images=images,
        sums=sums,
        rankings=tuple(rank(labels, values, units, len(images)) for labels, values, _ in columns),
        pooled=rank(
            truth[:, scored].ravel(), probabilities[:, scored].ravel(), np.repeat(units, int(scored.sum())), len(images)
        ),
        signed_gaps=_signed_gaps([finding.toarray()[4:] for finding in sums], scored),
    )


def _unit_sums(
    truth: npt.NDArray[np.bool_], probabilities: Floats, predicted: npt.NDArray[np.bool_], units: npt.NDArray[Any]
) -> csr_array:
    """Return, per unit, what the measures without a ranking are made of: float64 [4 + ECE_BINS, U].

    Rows: true positives, predicted positives, positives, squared error; per bin probabilities - labels.
    """
    gap = probabilities - truth
    count = int(units.max()) + 1
    sums = np.zeros((4 + ECE_BINS, count))
    for row, values in enumerate((truth & predicted, predicted, truth, gap**2)):
        sums[row] = np.bincount(units, weights=values, minlength=count)
    np.add.at(sums, (4 + calibration_bins(probabilities), units), gap)
    # Sparse, because scipy adds in one order, where a BLAS may go by its number of threads.
    return csr_array(sums)


def _signed_gaps(gaps: Sequence[Floats], scored: npt.NDArray[np.bool_]) -> csr_array:
    """Add the gaps [ECE_BINS, U] of each finding, and of the scored ones pooled, as `signed_gaps` says."""
    pooled = sum((gap for gap, is_scored in zip(gaps, scored, strict=True) if is_scored), np.zeros_like(gaps[0]))
    return csr_array(np.stack([np.sign(gap.sum(axis=1)) @ gap for gap in (*gaps, pooled)]))


def _pool(sums: Floats, images: Floats, chosen: npt.NDArray[np.bool_], measures: Sequence[str]) -> dict[str, Floats]:
    """Return measures [R] over the images of the chosen findings pooled."""
    together = _from_sums(sums[chosen].sum(axis=0), images * chosen.sum())
    return {measure: together[measure] for measure in measures}


def _from_sums(sums: Floats, images: Floats) -> dict[str, Floats]:
    """Turn weighted sums [..., 4 + ECE_BINS, R] of images in all [R] into measures [..., R]."""
    true_positives, predicted, positives, squared_error = (sums[..., row, :] for row in range(4))
    negatives = images - positives
    true_negatives = images - predicted - positives + true_positives
    one_class = (positives == 0) | (negatives == 0)

    def share(part: Floats, whole: Floats) -> Floats:
        quotient = np.divide(part, whole, out=np.zeros_like(whole), where=whole > 0)
        return np.where(one_class, np.nan, quotient)

    images = np.broadcast_to(images, positives.shape)
    return {
        "precision": share(true_positives, predicted),
        "recall": share(true_positives, positives),
        "specificity": share(true_negatives, negatives),
        "npv": share(true_negatives, images - predicted),
        "f1": share(2 * true_positives, predicted + positives),
        "brier": share(squared_error, images),
        "ece": share(np.abs(sums[..., 4:, :]).sum(axis=-2), images),
    }
