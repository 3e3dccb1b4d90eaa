"""The evaluation protocol: fit thresholds and calibration on val, score the selected images."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from eval.ensemble import average, joint_folder, joint_name
from eval.heatmaps.gallery import HeatMap
from eval.heatmaps.localization import Localization
from eval.operating_point import FITTED_ON as FITTED_ON
from eval.operating_point import OperatingPoint
from eval.options import Protocol
from eval.predict.predictions import Predictions
from eval.predict.scored_run import ScoredRun, folder_name
from eval.predict.selection import Selection
from eval.scores.bootstrap import CALIBRATED, Resampled, all_intervals, bootstrap
from eval.scores.calibration import fit_calibration
from eval.scores.metrics import DECIDED, ERRORS, RANKED, Scores, score
from eval.scores.subgroups import Subgroups, subgroups
from eval.scores.thresholds import Floats, pick_thresholds
from shards.files import atomic_write_text
from shards.folder import ShardFolder
from trainer.model_file import ModelHeader
from trainer.run_directory import RunDirectory


@dataclass(frozen=True)
class Explanation:
    """Where the model looks."""

    gallery: tuple[HeatMap, ...] = ()
    localization: Localization | None = None
    """None where no box is known, or without heat maps."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One run, or the average of several, scored on one selection of images."""

    # Provenance.
    name: str
    runs: tuple[RunDirectory, ...]
    """One, or those that were averaged."""
    headers: tuple[ModelHeader, ...]
    """Of the weights of each run."""
    shards: ShardFolder
    scored_on: tuple[str, ...]
    """Manifest digest of the shards that each run predicted; they differ where input sizes do."""
    split: str
    """val, test, or the name of the list."""
    folder: Path
    """Where its files go."""
    predictions: dict[str, Predictions]
    """On val and on the split."""
    operating_point: OperatingPoint
    """Fitted on val alone."""

    # Scores on the split.
    scores: Scores
    at_half: Scores
    """With the threshold 0.5 for every finding, for comparison."""
    calibrated: pd.DataFrame | None
    """Index: the findings, macro, micro; columns brier, ece, calibrated_brier, calibrated_ece."""
    resampled: Resampled | None
    intervals: pd.DataFrame | None
    """95 %, as `all_intervals` returns them; None without resamples."""
    subgroups: Subgroups | None

    explanation: Explanation = Explanation()

    @property
    def thresholds(self) -> dict[str, float]:
        """Per finding; NaN for a finding without one."""
        return dict(zip(self.operating_point.findings, self.operating_point.thresholds.tolist(), strict=True))

    @property
    def trained_on(self) -> tuple[str, ...]:
        """Manifest digest of the shards that each run was trained on."""
        return tuple(str(header.metadata["manifest_sha256"]) for header in self.headers)

    @property
    def on_other_shards(self) -> tuple[str, ...]:
        """The names of the runs trained on other shards than they are scored on."""
        each = zip(self.runs, self.trained_on, self.scored_on, strict=True)
        return tuple(run.name for run, trained_on, scored_on in each if trained_on != scored_on)

    @property
    def patients(self) -> int:
        """Of the scored images."""
        return len(np.unique(self.predictions[self.split].patients))

    @property
    def warnings(self) -> tuple[str, ...]:
        """One sentence for each thing left out or wrong, the gravest first; one sums up those of the subgroups."""
        found = []
        if self.on_other_shards:
            found.append(
                f"Trained on other shards than these: {', '.join(self.on_other_shards)}. Val and test here "
                "may hold patients of that train split, so scores may be too high."
            )
        rows = self.predictions[self.split].rows
        seen = int(np.isin(rows, self.predictions[FITTED_ON].rows).sum())
        if seen:
            which = "these very images" if seen == len(rows) else f"{seen:,} of these {len(rows):,} images"
            found.append(
                f"Thresholds and calibration were fitted on {which}, which are of {FITTED_ON}: scores that "
                "depend on them are too high."
            )
        for each in (self.scores, self.operating_point.calibration, self.resampled):
            found += () if each is None else each.warnings
        if self.subgroups is not None and self.subgroups.warnings:
            attributes = ", ".join(warning.partition(":")[0] for warning in self.subgroups.warnings)
            found.append(
                f"Scores of findings that are too rare in a group are left out of the subgroups by {attributes}."
            )
        if self.explanation.localization is not None:
            found += self.explanation.localization.warnings
        return tuple(found)


def _fit(val: Predictions, findings: tuple[str, ...], protocol: Protocol, *, tta: bool) -> OperatingPoint:
    """Fit thresholds and calibration on the predictions on val."""
    calibration = None
    if protocol.calibration is not None:
        # One thread: faster on arrays this small, and rounding does not depend on the number of cores.
        with threadpool_limits(1, user_api="blas"):
            calibration = fit_calibration(val.labels, val.probabilities, protocol.calibration, findings)
    thresholds = pick_thresholds(val.labels, val.probabilities, protocol.rule)
    return OperatingPoint(findings, protocol.rule.name, thresholds, calibration, tta)


def is_plain(scored_run: ScoredRun, protocol: Protocol) -> bool:
    """Return whether this is a plain evaluation, not a what-if: the defaults on val or test of the run's own shards."""
    as_trained = scored_run.on_training_shards and not scored_run.options.tta
    return as_trained and not protocol.what_if and protocol.selection.images is None


def evaluate(scored_run: ScoredRun, protocol: Protocol) -> Evaluation:
    """Score the best weights of a run; predicts where no predictions are stored.

    Errors are those of `ScoredRun.predict`.
    """
    selection = protocol.selection
    folder, predictions = scored_run.folder(selection.name), _predict(scored_run, selection)
    return _score([scored_run], scored_run.run.name, folder, predictions, protocol)


def evaluate_average(scored_runs: Sequence[ScoredRun], protocol: Protocol) -> Evaluation:
    """Score the mean probabilities of several runs on the same images, as if they were one model.

    Thresholds and calibration are fitted on the mean. Files go to NAME+NAME/ beside the first run. Raises BadData where
    images, labels or patients differ; other errors are those of `evaluate`.
    """
    runs, selection = [each.run for each in scored_runs], protocol.selection
    folder = joint_folder(runs, "+") / folder_name(selection.name, scored_runs)
    members = [_predict(each, selection) for each in scored_runs]
    predictions = {}
    for split in members[0]:
        named = [(each.run.name, each.shards, own[split]) for each, own in zip(scored_runs, members, strict=True)]
        predictions[split] = average(named, split)
        text = predictions[split].to_csv(scored_runs[0].shards)
        atomic_write_text(folder / _predictions_file(split, selection), text)
    return _score(scored_runs, joint_name(runs, "+"), folder, predictions, protocol)


def _predict(scored_run: ScoredRun, selection: Selection) -> dict[str, Predictions]:
    """Return the predictions on val and on the selection."""
    val_file = scored_run.folder(selection.name) / _predictions_file(FITTED_ON, selection)
    predictions = {FITTED_ON: scored_run.predict(FITTED_ON, val_file)}
    if selection.name != FITTED_ON:
        predictions[selection.name] = scored_run.predict_selected(selection)
    return predictions


def _predictions_file(split: str, selection: Selection) -> str:
    return "predictions.csv" if split == selection.name else f"{split}_predictions.csv"


def _score(
    scored_runs: Sequence[ScoredRun], name: str, folder: Path, predictions: dict[str, Predictions], protocol: Protocol
) -> Evaluation:
    split, shards = protocol.selection.name, scored_runs[0].shards
    scored, findings = predictions[split], shards.manifest.findings
    fitted = _fit(predictions[FITTED_ON], findings, protocol, tta=scored_runs[0].options.tta)
    calibrated = None if fitted.calibration is None else fitted.calibration.apply(scored.probabilities)
    arrays, resamples, seed = (scored.labels, scored.probabilities), protocol.resamples, protocol.seed
    resampled, intervals = None, None
    if resamples:
        resampled = bootstrap(*arrays, fitted.thresholds, scored.patients, findings, resamples=resamples, seed=seed)
        intervals = all_intervals(resampled, *arrays, scored.patients, calibrated)
    scores = score(*arrays, fitted.thresholds, findings)
    return Evaluation(
        name=name,
        runs=tuple(each.run for each in scored_runs),
        headers=tuple(each.header for each in scored_runs),
        scored_on=tuple(each.shards.digest for each in scored_runs),
        shards=shards,
        split=split,
        predictions=predictions,
        operating_point=fitted,
        scores=scores,
        at_half=_at_half(scores, scored, findings),
        calibrated=_calibrated(scores, scored, calibrated, findings),
        resampled=resampled,
        intervals=intervals,
        subgroups=subgroups(
            *arrays, shards.entries.loc[scored.rows], findings, fitted.thresholds, resamples=resamples, seed=seed
        ),
        folder=folder.with_name(f"{folder.name}{protocol.what_if}"),
    )


def _at_half(scores: Scores, scored: Predictions, findings: tuple[str, ...]) -> Scores:
    """Return the scores at 0.5; measures without a threshold are copied from `scores` to save time."""
    thresholds = np.full(len(findings), 0.5)
    half = score(scored.labels, scored.probabilities, thresholds, findings, measures=DECIDED)
    return half.with_columns(scores, (*RANKED, *ERRORS))


def _calibrated(
    scores: Scores, scored: Predictions, probabilities: Floats | None, findings: tuple[str, ...]
) -> pd.DataFrame | None:
    """Return Brier and ECE before and after calibration to these probabilities; None without them."""
    if probabilities is None:
        return None
    no_thresholds = np.full(len(findings), np.nan)
    after = score(scored.labels, probabilities, no_thresholds, findings, measures=ERRORS)
    before, after_frame = (each.to_frame()[list(ERRORS)] for each in (scores, after))
    return before.join(after_frame.add_prefix(CALIBRATED))
