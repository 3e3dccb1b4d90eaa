"""Every metric under many weightings of the same images, exactly, without sorting or scoring them again."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from eval.scores.metrics import DECIDED, ECE_BINS, ERRORS, MEASURES, RANKED, calibration_bins, two_classes
from eval.scores.thresholds import Floats, apply_thresholds

# Runs summed at once: the sums of 32 weightings then stay in a core's cache. Measured fastest of 256, 1024 and 4096 on
# 14 findings with half of all labels positive.
_BLOCK = 1024


@dataclass(frozen=True, eq=False)
class Ranking:
    """Images sorted once; every weighting of them then costs one pass of additions and no sort.

    Only the probabilities of positive images can move either measure: between two of them the negatives matter by
    their weight alone. So the images are summed into runs: K runs of positives of equal probability, descending, and
    for each of them two runs of negatives, those between the run before and this one and those of this probability.
    """

    blocks: tuple[tuple[csr_array, csr_array], ...]
    """float64 [k, U] and [2 k, U]: the positive and negative images of each unit in the next k runs."""
    negatives: Floats
    """[U], the negative images of each unit."""

    def measure(self, weights: Floats) -> tuple[Floats, Floats]:
        """Return AUROC and average precision, both float64 [R], under each weighting.

        `weights` is [U, R]: how often resample r holds the images of unit u, whole numbers >= 0. The results are those
        of scikit-learn's `roc_auc_score` and `average_precision_score` with each image's weight as `sample_weight`, or
        with each image repeated that often. Both are NaN where all weight is on one class. All sums but that of the
        precisions are of whole numbers, so exact as long as positives x negatives stay below 2**52.
        """
        positives, losses, precisions = np.zeros((3, weights.shape[1]))
        above = np.zeros(weights.shape[1])
        for of_positives, of_negatives in self.blocks:
            hits = of_positives @ weights
            true_positives = positives + np.cumsum(hits, axis=0)
            misses = of_negatives @ weights
            misses[0] += above
            np.cumsum(misses, axis=0, out=misses)
            higher, down_to = misses[::2], misses[1::2]
            # A positive loses to the negatives above it and draws with those of its probability.
            losses += np.einsum("kr,kr->r", hits, higher + down_to) / 2
            # Without predicted positives there is no precision, nor a positive that would count it.
            precision = true_positives / np.maximum(true_positives + down_to, 1)
            precisions += np.einsum("kr,kr->r", hits, precision)
            positives, above = true_positives[-1], down_to[-1]
        pairs = positives * (self.negatives @ weights)
        with np.errstate(invalid="ignore", divide="ignore"):
            return (
                np.where(pairs == 0, np.nan, (pairs - losses) / pairs),
                np.where(pairs == 0, np.nan, precisions / positives),
            )


def rank(truth: npt.NDArray[np.bool_], probabilities: Floats, units: npt.NDArray[Any], unit_count: int) -> Ranking:
    """Sort images by probability, for weights that all images of a unit (a patient) share.

    `truth`, `probabilities` and `units` (0 to `unit_count` - 1) are [N]. For the pooled decisions of several findings
    give the flattened columns, and each image's unit once for each of them.
    """
    order = np.argsort(-probabilities, kind="stable")
    truth, units, values = truth[order], units[order], probabilities[order]
    differs = np.ones(len(values), dtype=np.bool_)
    differs[1:] = values[1:] != values[:-1]
    group = np.cumsum(differs) - 1
    with_positive = np.bincount(group, weights=truth) > 0
    # How many groups with a positive there are down to each image, its own group included.
    reached = np.cumsum(with_positive)[group]
    runs = int(with_positive.sum())
    negative_run = np.where(with_positive[group], 2 * reached - 1, 2 * reached)
    # The negatives below the last positive lose to every positive: they are in no run.
    counted = ~truth & (negative_run < 2 * runs)
    hits = count_images(reached[truth] - 1, units[truth], (runs, unit_count))
    misses = count_images(negative_run[counted], units[counted], (2 * runs, unit_count))
    return Ranking(
        blocks=tuple(
            (hits[start : start + _BLOCK], misses[2 * start : 2 * (start + _BLOCK)]) for start in range(0, runs, _BLOCK)
        ),
        negatives=np.bincount(units[~truth], minlength=unit_count).astype(np.float64),
    )


def count_images(rows: npt.NDArray[np.intp], units: npt.NDArray[Any], shape: tuple[int, int]) -> csr_array:
    """Count images by the row and the unit of each: float64 [rows, U]."""
    return csr_array((np.ones(len(rows)), (rows, units)), shape=shape)


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
    """Of each finding, as `_unit_sums` returns them."""
    rankings: tuple[Ranking, ...]
    """Of each finding."""
    pooled: Ranking
    """Of the scored findings together."""
    signed_gaps: csr_array
    """[F + 1, U], of each finding and of the scored ones pooled: the probabilities minus labels of each unit, added
    over the bins with the sign that a bin's sum has on the whole split."""

    def measure(self, weights: Floats) -> dict[str, Floats]:
        """Return each of metrics.MEASURES under R weightings: float64 [R, F + 2], findings, macro, micro.

        `weights` are those of `Ranking.measure`. A measure is NaN where the weight is on one class, macro where one of
        its findings is NaN. Macro and micro are always of the findings that are scored (for DECIDED: and have a
        threshold) on the whole split.
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
        """Return the ECE under R weightings with signed gaps: float64 [R, F + 2].

        Each gap counts with the sign it has on the whole split instead of as an absolute value, so the result is linear
        in the gaps. Equal to the ECE where no gap changes its sign; `weights` and columns are those of `measure`.
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
    """Return, per unit, the sums from which `_from_sums` computes measures: float64 [4 + ECE_BINS, U].

    Rows: true positives, predicted positives, positives, squared error; per bin probabilities - labels.
    """
    gap = probabilities - truth
    count = int(units.max()) + 1
    sums = np.zeros((4 + ECE_BINS, count))
    for row, values in enumerate((truth & predicted, predicted, truth, gap**2)):
        sums[row] = np.bincount(units, weights=values, minlength=count)
    np.add.at(sums, (4 + calibration_bins(probabilities), units), gap)
    # Sparse, because scipy adds in one order, where a BLAS may add in another with each number of threads.
    return csr_array(sums)


def _signed_gaps(gaps: Sequence[Floats], scored: npt.NDArray[np.bool_]) -> csr_array:
    """Add the gaps [ECE_BINS, U] of each finding, and of the scored ones pooled: `WeightedScores.signed_gaps`."""
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
