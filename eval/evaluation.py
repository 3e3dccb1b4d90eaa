"""The evaluation protocol: fit thresholds and calibration on val, score the selected images."""

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from eval.ensemble import average
from eval.heatmaps.gallery import HeatMap
from eval.heatmaps.localization import Localization
from eval.operating_point import FITTED_ON as FITTED_ON
from eval.operating_point import OperatingPoint, read_operating_point, write_operating_point
from eval.predict.predictions import Predictions
from eval.predict.scored_run import ScoredRun, folder_name
from eval.predict.selection import Selection
from eval.scores.bootstrap import CALIBRATED, Resampled, all_intervals, bootstrap
from eval.scores.calibration import Calibration, Method, fit_calibration
from eval.scores.metrics import DECIDED, ERRORS, RANKED, Scores, score
from eval.scores.subgroups import Subgroups, subgroups
from eval.scores.thresholds import F1, Floats, Rule, pick_thresholds
from shards.findings import FINDINGS
from shards.folder import ShardFolder
from trainer.model_header import ModelHeader
from trainer.run_directory import RunDirectory

_LONGEST_NAME = 200  # bytes; file systems stop at 255, and temporary files add a little


@dataclass(frozen=True)
class Protocol:
    """What is asked of an evaluation."""

    selection: Selection
    rule: Rule = F1
    calibration: Method | None = "platt"
    resamples: int = 1000
    """Of the patients, for the intervals; 0: no intervals."""
    seed: int = 0
    """Of the resamples; the same for all that are to be compared."""

    @property
    def what_if(self) -> str:
        """What the folder of the results has behind its name: nothing by the default rule and calibration."""
        rule = "" if self.rule.name == F1.name else f"-{self.rule.name}"
        return rule if self.calibration == "platt" else f"{rule}-calibration={self.calibration or 'none'}"


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One run, or the average of several, scored on one selection of images."""

    name: str
    runs: tuple[RunDirectory, ...]
    """One, or those that were averaged."""
    shards: ShardFolder
    headers: tuple[ModelHeader, ...]
    """One a run: digest of its weights, its parameters, its metadata as it was before this."""
    scored_on: tuple[str, ...]
    """One a run: manifest digest of the shards that it predicted; of other pixels where sizes differ."""
    split: str
    """val, test, or the name of the list."""
    tta: bool
    """Whether each image was averaged with its mirror."""
    predictions: dict[str, Predictions]
    """Of val and of the split."""
    rule: str
    thresholds: dict[str, float]
    """Per finding, from val alone; NaN for a finding without one."""
    scores: Scores
    """At `thresholds`."""
    at_half: Scores
    """At 0.5, for comparison."""
    calibration: Calibration | None
    """From val alone."""
    calibrated: pd.DataFrame | None
    """Index: the findings, macro, micro; columns brier, ece, calibrated_brier, calibrated_ece."""
    resampled: Resampled | None
    intervals: pd.DataFrame | None
    """95 %, as `all_intervals` has them; None where nothing was resampled."""
    subgroups: Subgroups | None
    folder: Path
    """Where its files go."""
    localization: Localization | None = None
    """None where no box is known, or no heat map was asked for."""
    gallery: tuple[HeatMap, ...] = ()
    operating_point: OperatingPoint | None = None
    """What was fitted on val here; None of an evaluation that nothing can decide by: of several runs."""
    decided_before: OperatingPoint | None = None
    """What the run decided by when this began."""
    decides: bool = False
    """Whether this has set what the run decides by."""

    @property
    def trained_on(self) -> tuple[str, ...]:
        """One a run: manifest digest of the shards that it was trained on."""
        return tuple(str(header.metadata["manifest_sha256"]) for header in self.headers)

    @property
    def on_other_shards(self) -> tuple[str, ...]:
        """The names of those runs that were trained on other shards than they are scored on."""
        each = zip(self.runs, self.trained_on, self.scored_on, strict=True)
        return tuple(run.name for run, trained_on, scored_on in each if trained_on != scored_on)

    @property
    def patients(self) -> int:
        """Of the scored images."""
        return len(np.unique(self.predictions[self.split].patients))

    @property
    def warnings(self) -> tuple[str, ...]:
        """One sentence for whatever is left out or not as it should be; to be printed, not dropped.

        The gravest stand first. Those of the subgroups, which have their own, are summed up in one.
        """
        found = []
        if self.on_other_shards:
            found.append(
                f"Trained on other shards than these: {', '.join(self.on_other_shards)}. Val and test here "
                "may hold patients of that train split, on whom any model is too good."
            )
        rows = self.predictions[self.split].rows
        seen = int(np.isin(rows, self.predictions[FITTED_ON].rows).sum())
        if seen:
            which = "these very images" if seen == len(rows) else f"{seen:,} of these {len(rows):,} images"
            found.append(
                f"Thresholds and calibration were fitted on {which}, which are of {FITTED_ON}: what depends "
                "on them is too good."
            )
        for part in (self.scores, self.calibration, self.resampled):
            found += () if part is None else part.warnings
        if self.subgroups is not None and self.subgroups.warnings:
            attributes = ", ".join(warning.partition(":")[0] for warning in self.subgroups.warnings)
            found.append(f"Groups of too few patients are left out of the subgroups by {attributes}.")
        if self.localization is not None:
            found += self.localization.warnings
        return tuple(found)


def fit(val: Predictions, protocol: Protocol, *, tta: bool) -> OperatingPoint:
    """Fit thresholds and calibration on the predictions on val, and on nothing else."""
    fitted = None
    if protocol.calibration is not None:
        # One thread: on arrays this small several are slower, and round as the number of cores has it.
        with threadpool_limits(1, user_api="blas"):
            fitted = fit_calibration(val.labels, val.probabilities, protocol.calibration, FINDINGS)
    thresholds = pick_thresholds(val.labels, val.probabilities, protocol.rule)
    return OperatingPoint(protocol.rule.name, thresholds, fitted, tta)


def is_plain(scored_run: ScoredRun, protocol: Protocol) -> bool:
    """Tell a plain evaluation from a what-if: the defaults on val or test of the run's own shards."""
    as_trained = scored_run.on_training_shards and not scored_run.options.tta
    return as_trained and not protocol.what_if and protocol.selection.images is None


def evaluate(scored_run: ScoredRun, protocol: Protocol, *, set_decisions: bool = False) -> Evaluation:
    """Score a run's best weights, with predictions made where there are none yet.

    A plain evaluation sets what the run decides by, and so does any with `set_decisions`; but none of a
    scored_run that is read only. Whoever calls this holds the run's lock. Errors are those of
    `ScoredRun.predict` and `read_operating_point`.
    """
    name = protocol.selection.name
    predictions = {FITTED_ON: scored_run.predict(FITTED_ON, _val_file(scored_run, name))}
    if name != FITTED_ON:
        predictions[name] = scored_run.predict_selected(protocol.selection)
    folder = scored_run.folder(name)
    folder = folder.with_name(f"{folder.name}{protocol.what_if}")
    fitted = fit(predictions[FITTED_ON], protocol, tta=scored_run.options.tta)
    evaluation = _score([scored_run], scored_run.run.name, folder, predictions, fitted, protocol)
    if scored_run.read_only:
        return evaluation
    before = read_operating_point(scored_run.run, scored_run.header)
    decides = set_decisions or is_plain(scored_run, protocol)
    if decides:
        write_operating_point(scored_run.run, scored_run.header, fitted)
    return dataclasses.replace(evaluation, operating_point=fitted, decided_before=before, decides=decides)


def evaluate_average(scored_runs: Sequence[ScoredRun], protocol: Protocol) -> Evaluation:
    """Score the mean probabilities of several runs on the same images, as if they were one model.

    What val taught is fitted anew on the mean. Its files go to NAME+NAME/ beside the first run. Raises
    BadData where images, labels or patients differ; else errors are those of `evaluate`.
    """
    first, name = scored_runs[0], protocol.selection.name
    folder = joint_folder([each.run for each in scored_runs], "+") / folder_name(name, scored_runs)
    val = [
        (each.run.name, each.shards, each.predict(FITTED_ON, _val_file(each, name))) for each in scored_runs
    ]
    predictions = {FITTED_ON: average(val, FITTED_ON)}
    if name != FITTED_ON:
        scored = [
            (each.run.name, each.shards, each.predict_selected(protocol.selection)) for each in scored_runs
        ]
        predictions[name] = average(scored, name)
        predictions[FITTED_ON].to_csv(folder / f"{FITTED_ON}_predictions.csv", first.shards)
    predictions[name].to_csv(folder / "predictions.csv", first.shards)
    fitted = fit(predictions[FITTED_ON], protocol, tta=first.options.tta)
    joint = joint_name([each.run for each in scored_runs], "+")
    folder = folder.with_name(f"{folder.name}{protocol.what_if}")
    return _score(scored_runs, joint, folder, predictions, fitted, protocol)


def joint_folder(runs: Sequence[RunDirectory], sign: str) -> Path:
    """Return where results of several runs go: A+B or A-vs-B beside the first run, with eval/ within."""
    return runs[0].path.parent / joint_name(runs, sign) / "eval"


def joint_name(runs: Sequence[RunDirectory], sign: str) -> str:
    """Return the runs' names with the sign between them; a digest of them where that is too long."""
    name = sign.join(run.name for run in runs)
    if len(name.encode()) <= _LONGEST_NAME:
        return name
    return f"{len(runs)}-runs-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def _val_file(scored_run: ScoredRun, name: str) -> Path:
    folder = scored_run.folder(name)
    return folder / ("predictions.csv" if name == FITTED_ON else f"{FITTED_ON}_predictions.csv")


def _score(
    scored_runs: Sequence[ScoredRun],
    name: str,
    folder: Path,
    predictions: dict[str, Predictions],
    fitted: OperatingPoint,
    protocol: Protocol,
) -> Evaluation:
    split, shards = protocol.selection.name, scored_runs[0].shards
    scored = predictions[split]
    calibrated = None if fitted.calibration is None else fitted.calibration.apply(scored.probabilities)
    resampled, intervals = None, None
    if protocol.resamples:
        resampled = bootstrap(
            scored.labels,
            scored.probabilities,
            fitted.thresholds,
            scored.patients,
            FINDINGS,
            resamples=protocol.resamples,
            seed=protocol.seed,
        )
        arrays = scored.labels, scored.probabilities, scored.patients
        intervals = all_intervals(resampled, *arrays, calibrated)
    scores = score(scored.labels, scored.probabilities, fitted.thresholds, FINDINGS)
    return Evaluation(
        name=name,
        runs=tuple(each.run for each in scored_runs),
        headers=tuple(each.header for each in scored_runs),
        scored_on=tuple(each.shards.digest for each in scored_runs),
        shards=shards,
        split=split,
        tta=scored_runs[0].options.tta,
        predictions=predictions,
        rule=fitted.rule,
        thresholds=dict(zip(FINDINGS, fitted.thresholds.tolist(), strict=True)),
        scores=scores,
        at_half=_at_half(scores, scored),
        calibration=fitted.calibration,
        calibrated=_calibrated(scores, scored, calibrated),
        resampled=resampled,
        intervals=intervals,
        subgroups=subgroups(
            scored.labels,
            scored.probabilities,
            shards.entries.loc[scored.rows],
            FINDINGS,
            fitted.thresholds,
            resamples=protocol.resamples,
            seed=protocol.seed,
        ),
        folder=folder,
    )


def _at_half(scores: Scores, scored: Predictions) -> Scores:
    """Return the scores at 0.5; what no threshold changes is taken from `scores`, which saves the sorting."""
    thresholds = np.full(len(FINDINGS), 0.5)
    half = score(scored.labels, scored.probabilities, thresholds, FINDINGS, measures=DECIDED)
    kept = (*RANKED, *ERRORS)
    return dataclasses.replace(
        half,
        per_finding=half.per_finding.assign(**{name: scores.per_finding[name] for name in kept}),
        macro=half.macro | {name: scores.macro[name] for name in kept},
        micro=half.micro | {name: scores.micro[name] for name in kept},
    )


def _calibrated(scores: Scores, scored: Predictions, probabilities: Floats | None) -> pd.DataFrame | None:
    """Return Brier and ECE before and after calibration to these probabilities; None without them."""
    if probabilities is None:
        return None
    no_thresholds = np.full(len(FINDINGS), np.nan)
    after = score(scored.labels, probabilities, no_thresholds, FINDINGS, measures=ERRORS)
    before, after_frame = (each.to_frame()[list(ERRORS)] for each in (scores, after))
    return before.join(after_frame.add_prefix(CALIBRATED))
