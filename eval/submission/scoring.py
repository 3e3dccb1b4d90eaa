"""Score a submission: thresholds from val, or from one half of its patients."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from eval.scores.bootstrap import Resampled, at_half_intervals, bootstrap
from eval.scores.metrics import DECIDED, Scores, score
from eval.scores.thresholds import Floats, Rule, pick_thresholds
from eval.submission.reading import Submission
from shards.errors import BadData
from shards.findings import FINDINGS

OF_DECISIONS = ("threshold", "tp", "fp", "fn", "tn", *DECIDED)
"""The columns of scores that need a threshold."""


@dataclass(frozen=True, eq=False)
class SubmissionScores:
    """What a submission scored, and on which of its images."""

    scores: Scores
    """OF_DECISIONS are of the images of `decided`, everything else is of all images."""
    intervals: pd.DataFrame | None
    """As `all_intervals` has them without calibration, of the same images as the scores; None without
    resamples."""
    at_half: Scores
    """With the threshold 0.5 for every finding, each column of the same images as that of the scores."""
    fitted: Submission
    """What the thresholds were picked on."""
    decided: Submission
    """What they were applied to."""
    warnings: tuple[str, ...]
    """What is left out of a mean or an interval; to be printed, not dropped."""

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain dicts, lists and numbers, with None for NaN."""
        return {
            "fitted": self.fitted.to_json(),
            "decided": self.decided.to_json(),
            **self.scores.to_json(),
            "warnings": list(self.warnings),
            "intervals": None if self.intervals is None else _plain(self.intervals),
            "at_half": self.at_half.to_json(),
        }

    def to_text(self) -> str:
        """Return the table for a terminal, the headline's interval, and the warnings under it."""
        lines = self.scores.to_text().splitlines()[: len(self.scores.per_finding) + 3]
        if self.intervals is not None:
            low, high = self.intervals.loc["macro", ["auroc_low", "auroc_high"]]
            lines.append(
                f"macro AUROC {self.scores.macro['auroc']:.3f}, "
                f"95 % confidence interval over patients {low:.3f} to {high:.3f}"
            )
        return "\n".join([*lines, *self.warnings])


def score_submission(
    given: Submission, val: Submission | None, rule: Rule, *, resamples: int = 1000, seed: int = 0
) -> SubmissionScores:
    """Score a submission with thresholds that `rule` picks on `val`.

    Without `val` they are picked on one half of the patients, drawn with `seed`, and what needs a
    threshold is scored on the other half alone. AUROC, average precision, Brier and ECE are of all
    images either way. Intervals are over patients, drawn with the same seed; 0 resamples: none.
    Raises BadData where there is but one patient to halve.
    """
    fitted, decided = _halve(given, seed) if val is None else (val, given)
    thresholds = pick_thresholds(fitted.labels, fitted.probabilities, rule)
    scores = _score(given, thresholds)
    drawn = [_bootstrap(given, thresholds, resamples, seed)] if resamples else []
    intervals = drawn[0].intervals() if drawn else None
    half = np.full(len(FINDINGS), 0.5)
    at_half = _score(given, half)
    warnings = [*scores.warnings]
    if decided is not given:
        other = _score(decided, thresholds)
        warnings += [
            f"{finding} has one class only in the half that is decided on: its precision, recall, "
            "specificity, NPV and F1 are NaN and left out of the macro and micro means."
            for finding in other.skipped
            if finding not in scores.skipped
        ]
        scores, at_half = _joined(scores, other), _joined(at_half, _score(decided, half))
        if intervals is not None:
            drawn.append(_bootstrap(decided, thresholds, resamples, seed))
            ends = [f"{measure}_{end}" for measure in DECIDED for end in ("low", "high")]
            intervals = intervals.assign(**{name: drawn[1].intervals()[name] for name in ends})
    if intervals is not None:
        arrays = decided.labels, decided.probabilities, decided.patients
        intervals = intervals.join(at_half_intervals(drawn[-1], *arrays))
    warnings += dict.fromkeys(warning for each in drawn for warning in each.warnings)
    return SubmissionScores(scores, intervals, at_half, fitted, decided, tuple(warnings))


def _plain(frame: pd.DataFrame) -> dict[str, dict[str, float | None]]:
    rows = frame.astype(object).where(frame.notna(), None).to_dict("index")
    return {str(row): {str(name): value for name, value in values.items()} for row, values in rows.items()}


def _halve(given: Submission, seed: int) -> tuple[Submission, Submission]:
    patients = np.unique(given.patients)
    if len(patients) < 2:
        raise BadData("one patient cannot be halved to pick thresholds; give predictions on others with --val")
    first = np.random.default_rng(seed).permutation(patients)[: len(patients) // 2]
    chosen = np.isin(given.patients, first)
    return given.of(chosen), given.of(~chosen)


def _score(part: Submission, thresholds: Floats) -> Scores:
    return score(part.labels, part.probabilities, thresholds, FINDINGS)


def _bootstrap(part: Submission, thresholds: Floats, resamples: int, seed: int) -> Resampled:
    return bootstrap(
        part.labels, part.probabilities, thresholds, part.patients, FINDINGS, resamples=resamples, seed=seed
    )


def _joined(ranked: Scores, decided: Scores) -> Scores:
    """Take what needs a threshold from the second, everything else from the first."""
    columns = list(OF_DECISIONS)
    return dataclasses.replace(
        ranked,
        per_finding=ranked.per_finding.assign(**{name: decided.per_finding[name] for name in columns}),
        macro=ranked.macro | {name: decided.macro[name] for name in columns},
        micro=ranked.micro | {name: decided.micro[name] for name in columns},
    )
